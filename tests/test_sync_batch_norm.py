"""Synchronised batch norm of 2 and 3 processes is plain batch norm of one process that has all their images."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from deeplab_fast.model import build_model
from deeplab_fast.model.layers import ConvNormAct, SeparableConv, norm_act
from deeplab_fast.model.norm import SyncBatchNorm2d
from deeplab_fast.model.recompute import run_block
from deeplab_fast.ops import dispatch, native
from deeplab_fast.testing import TOLERANCES

C = 7
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch has no torch.distributed")
NORMS = {"batch": nn.BatchNorm2d, "sync_batch": SyncBatchNorm2d}


class NormAct(nn.Module):
    def __init__(self, norm: str, activation: str) -> None:
        super().__init__()
        self.norm, self.activation = NORMS[norm](C), activation

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return norm_act(x, self.norm, self.activation, residual)


class Recomputed(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        self.block = nn.Sequential(ConvNormAct(norm, C, C, 3), ConvNormAct(norm, C, C, 1))

    def forward(self, x: Tensor) -> Tensor:
        return run_block(self.block, x, True)


class TwoSteps(nn.Module):
    def __init__(self, norm: str) -> None:
        super().__init__()
        self.norm = NORMS[norm](C, momentum=None)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x) + self.norm(2 * x + 1)


def small_model(norm: str) -> nn.Module:
    small = {"num_classes": 5, "aspp_channels": 16, "decoder_channels": 16, "low_level_channels": 8, "dropout": 0.0}
    return build_model(norm=norm, backbone="mobilenet_v2", width_mult=0.25, separable=True, **small)


def same_weights(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        values = torch.randn(parameter.shape, generator=generator)
        parameter.data = (values / 3 if parameter.dim() > 1 else 1 + values / 4).to(parameter.dtype)
    return module.to(memory_format=torch.channels_last)


class Case(NamedTuple):
    build: Callable[[str], nn.Module]  # of "batch" or "sync_batch"
    shares: tuple[int, ...] = (2, 3, 1)  # images of each process
    size: tuple[int, ...] = (C, 6, 5)
    dtype: torch.dtype = torch.float32
    residual: bool = False
    backends: str = ""  # as in DEEPLAB_FAST_BACKEND
    ran: str = "native"  # the backend of the layers
    gathers: int = 1
    parallel: bool = False  # in DistributedDataParallel
    wide: bool = False  # weights in the dtype too


HALF = {"dtype": torch.bfloat16}
CASES = {
    "norm": Case(lambda norm: NORMS[norm](C)),
    "relu": Case(lambda norm: NormAct(norm, "relu")),
    "relu6, residual": Case(lambda norm: NormAct(norm, "relu6"), residual=True),
    "residual": Case(lambda norm: NormAct(norm, "none"), residual=True),
    "an empty share": Case(lambda norm: NormAct(norm, "relu"), (0, 4, 2), residual=True),
    "one process has all": Case(lambda norm: NormAct(norm, "relu"), (5, 0, 0)),
    "one value each": Case(lambda norm: NormAct(norm, "none"), (1, 1, 1), (C, 1, 1)),
    "bf16": Case(lambda norm: NormAct(norm, "relu"), residual=True, **HALF),
    "bf16, an empty share": Case(lambda norm: NormAct(norm, "relu"), (3, 0, 1), **HALF),
    "fp16": Case(lambda norm: NormAct(norm, "relu"), dtype=torch.float16, ran="reference"),
    "fp64": Case(lambda norm: NormAct(norm, "relu6"), dtype=torch.float64, ran="reference", wide=True),
    "reference": Case(
        lambda norm: NormAct(norm, "relu"), (2, 0, 3), residual=True, backends="reference", ran="reference"
    ),
    "no affine": Case(lambda norm: NORMS[norm](C, affine=False)),
    "no running statistics": Case(lambda norm: NORMS[norm](C, track_running_stats=False)),
    "no momentum": Case(TwoSteps, gathers=2),
    "convolution": Case(lambda norm: ConvNormAct(norm, C, 8, 3)),
    "leaky": Case(lambda norm: ConvNormAct(norm, C, 8, 3, activation="leaky_relu")),
    "separable": Case(lambda norm: SeparableConv(norm, C, 8, order="norm_each"), (1, 3, 2), gathers=2),
    "separable, an empty share": Case(lambda norm: SeparableConv(norm, C, 8, order="norm_each"), (3, 0, 1), gathers=2),
    "recomputed": Case(Recomputed, gathers=4),
    "model": Case(
        small_model, (2, 1, 3), (3, 33, 33), torch.float64, ran="reference", gathers=-1, parallel=True, wide=True
    ),
    "model, fused": Case(small_model, (2, 1, 3), (3, 33, 33), gathers=-1, parallel=True),
}


class Collectives(TorchDispatchMode):
    """The messages sent within the scope, by name, and the names of all operators."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.operators: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.name()
        self.operators.add(name)
        if name.startswith(("_c10d_functional::", "c10d::")) and "wait_tensor" not in name:
            self.seen.append(name.partition("::")[2])
        return func(*args, **kwargs or {})


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return x.contiguous(memory_format=torch.channels_last)


def outcome(case: Case, norm: str, share: slice, images: int, module: nn.Module | None = None) -> dict[str, Any]:
    """One pass forward and backward over a share of the images: results, gradients, buffers, messages, backends."""
    module = same_weights(case.build(norm) if module is None else module)
    if case.wide:
        module.to(case.dtype)
    called = (
        DistributedDataParallel(module, broadcast_buffers=False) if case.parallel and norm == "sync_batch" else module
    )
    inputs = [random((images, *case.size), 1, case.dtype) * 2 + 1]
    if case.residual:
        inputs.append(random((images, *case.size), 2, case.dtype))
    inputs = [x[share].detach().requires_grad_() for x in inputs]
    dispatch._last.clear()
    with dispatch.requesting(case.backends), Collectives() as messages:
        y = called(*inputs)
        forward, operators = list(messages.seen), set(messages.operators)
        grad = random((images, *y.shape[1:]), 4, case.dtype)[share]
        (y * grad).sum().backward()
    backward = messages.seen[len(forward) :]
    return {
        "y": y.detach(),
        "inputs": [x.grad for x in inputs],
        "parameters": {name: p.grad for name, p in module.named_parameters()},
        "buffers": {name: b.clone() for name, b in module.named_buffers()},
        "messages": (forward, backward),
        "operators": operators,
        "ran": {name: dispatch.last_backend(name) for name in ("batch_norm_act", "batch_norm_act_backward")},
        "norms": sum(isinstance(m, SyncBatchNorm2d) for m in module.modules()),
    }


def slices(case: Case, size: int) -> tuple[list[slice], int]:
    shares = case.shares[:size]
    ends = [sum(shares[: i + 1]) for i in range(size)]
    return [slice(end - n, end) for n, end in zip(shares, ends, strict=True)], sum(shares)


def complaint(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def other_cases(rank: int, size: int) -> dict[str, Any]:
    """What is no comparison of whole and shares."""
    found: dict[str, Any] = {}
    one_value = torch.ones(1, C, 1, 1)[: 1 - rank if rank < 2 else 0]
    found["one value"] = complaint(lambda: SyncBatchNorm2d(C)(one_value))

    norm = SyncBatchNorm2d(C)
    y = norm(torch.ones(0, C, 4, 4, requires_grad=True))
    y.sum().backward()
    found["nothing"] = {
        "shape": y.shape,
        "buffers": {k: b.clone() for k, b in norm.named_buffers()},
        "grad": norm.weight.grad,
    }

    with Collectives() as messages:
        NormAct("sync_batch", "relu").eval().requires_grad_(False)(torch.ones(rank, C, 4, 4))
    found["eval"] = messages.seen, messages.operators

    def twice() -> None:
        x = torch.ones(2, C, 2, 2, requires_grad=True)
        (grad,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
        grad.sum().backward()

    found["twice"] = complaint(twice)

    layer, x = same_weights(NormAct("sync_batch", "relu")), random((2 + rank, C, 6, 5), 5 + rank, torch.float32)
    results = []
    for compiled in (False, True):
        own, leaf = copy.deepcopy(layer), x.clone().requires_grad_()
        y = (torch.compile(own, backend="aot_eager", fullgraph=True) if compiled else own)(leaf, x)
        y.square().sum().backward()
        results.append([y.detach(), leaf.grad, *(p.grad for p in own.parameters()), *own.buffers()])
    found["compiled"] = results
    return found


def work(rank: int, size: int, folder: str) -> None:
    torch.set_num_threads(1)
    early = CASES["norm"].build("sync_batch")  # before there are processes
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=size)
    found = other_cases(rank, size)
    for name, case in CASES.items():
        parts, images = slices(case, size)
        found[name] = outcome(case, "sync_batch", parts[rank], images, early if name == "norm" else None)
    torch.save(found, f"{folder}/{rank}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of 2 and of 3 processes found, all cases in one start of them."""
    folder: Path = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        method = "forkserver" if "forkserver" in torch.multiprocessing.get_all_start_methods() else "spawn"
        if method == "forkserver":  # of one process that has imported this
            torch.multiprocessing.get_context(method).set_forkserver_preload([__name__])
        torch.multiprocessing.start_processes(work, (request.param, str(folder)), request.param, start_method=method)
    return [torch.load(folder / str(rank), weights_only=False) for rank in range(request.param)]


def close(actual: Tensor, expected: Tensor, dtype: torch.dtype, factor: float = 1.0) -> None:
    rtol, atol = TOLERANCES[dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=factor * rtol, atol=factor * atol)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process_with_all_images(ranks, name):
    case, got = CASES[name], [found[name] for found in ranks]
    _, images = slices(case, len(ranks))
    whole = outcome(case, "batch", slice(None), images)
    # Rounding grows over the layers of a model with few pixels: it is compared closely in fp64.
    deep = 100.0 if name == "model, fused" else 1.0
    close(torch.cat([part["y"] for part in got]), whole["y"], case.dtype, deep)
    for i, expected in enumerate(whole["inputs"]):
        close(torch.cat([part["inputs"][i] for part in got]), expected, case.dtype, deep)
    for key, expected in whole["parameters"].items():
        total = sum(part["parameters"][key].double() for part in got)  # DDP's are means: all the same
        close(total, expected, case.dtype, deep)
    for key, expected in whole["buffers"].items():
        assert all(torch.equal(part["buffers"][key], got[0]["buffers"][key]) for part in got), key
        close(got[0]["buffers"][key], expected, torch.float32 if case.dtype != torch.float64 else case.dtype, deep)


@pytest.mark.parametrize("name", CASES)
def test_one_message_for_each_layer_each_way(ranks, name):
    for found in (rank[name] for rank in ranks):
        layers = found["norms"] if CASES[name].gathers < 0 else CASES[name].gathers
        forward, backward = found["messages"]
        again = found["norms"] if name == "recomputed" else 0
        own = [message for message in backward if not CASES[name].parallel or message != "allreduce_"]
        assert forward.count("all_gather_into_tensor") == len(forward) == layers - again
        assert own.count("all_gather_into_tensor") == again
        assert own.count("all_reduce") == len(own) - again == layers - again


@pytest.mark.parametrize("name", CASES)
def test_the_layers_run_on_the_ops(ranks, name):
    if native.load() is None and CASES[name].ran == "native":
        pytest.skip("deeplab_fast._C is not built")
    for found in (rank[name] for rank in ranks):
        assert set(found["ran"].values()) == {CASES[name].ran}
        if CASES[name].ran == "native":  # activation and residual in the same pass, statistics in the convolution's
            apart = {"aten::relu", "aten::relu_", "aten::hardtanh", "aten::hardtanh_", "aten::native_batch_norm"}
            assert not found["operators"] & apart
            assert not name.startswith("separable") or "deeplab_fast::depthwise_conv_statistics" in found["operators"]


def test_one_value_in_all_is_refused_by_all(ranks):
    for found in ranks:
        assert found["one value"].startswith("ValueError: Expected more than 1 value per channel when training")


def test_no_image_in_any_process_leaves_the_running_statistics(ranks):
    for found in (rank["nothing"] for rank in ranks):
        buffers = found["buffers"]
        assert found["shape"] == (0, C, 4, 4) and torch.equal(found["grad"], torch.zeros(C))
        assert torch.equal(buffers["running_mean"], torch.zeros(C)) and buffers["num_batches_tracked"] == 1
        assert torch.equal(buffers["running_var"], torch.ones(C))


def test_eval_mode_sends_nothing(ranks):
    for messages, operators in (found["eval"] for found in ranks):
        assert messages == []
        assert native.load() is None or "deeplab_fast::batch_norm_act_inference" in operators


def test_a_second_derivative_is_refused(ranks):
    assert all(found["twice"].startswith("RuntimeError: ") for found in ranks)


def test_a_compiled_layer_is_the_eager_one(ranks):
    for found in ranks:
        for ours, eager in zip(*reversed(found["compiled"]), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-6, atol=1e-6)


def test_state_dict_is_that_of_plain_batch_norm():
    ours, plain = SyncBatchNorm2d(C).state_dict(), nn.BatchNorm2d(C).state_dict()
    assert list(ours) == list(plain) and all(torch.equal(ours[key], plain[key]) for key in plain)


def test_one_process_sends_nothing_and_is_plain_batch_norm(tmp_path):
    x, y = random((3, C, 4, 5), 1, torch.float32), []
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    with contextlib.ExitStack() as stack:
        stack.callback(dist.destroy_process_group)
        messages = stack.enter_context(Collectives())
        for norm in NORMS:
            y.append(NormAct(norm, "relu")(x))
            y.append(NORMS[norm](C)(x))
    assert messages.seen == [] and torch.equal(y[0], y[2]) and torch.equal(y[1], y[3])
