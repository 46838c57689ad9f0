from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from deeplab_fast.errors import UserError
from deeplab_fast.ops import dispatch, kth_largest, native
from deeplab_fast.testing import backends

OP = "kth_largest"
on_each_backend = pytest.mark.parametrize("backend, device", backends(OP))
built = pytest.mark.skipif(native.load() is None, reason="deeplab_fast._C is not built")


def losses(size: int, *, seed: int = 0) -> Tensor:
    """(size,) as cross entropy has them: a third of exact zeros, equal neighbours, eight orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(size, generator=generator).mul(4).exp().repeat_interleave(3)[:size]
    x[torch.rand(size, generator=generator) < 1 / 3] = 0
    return x


def any_bits(size: int, *, seed: int = 0) -> Tensor:
    """(size,) of every finite float: denormals, both signs and both zeros."""
    bits = torch.randint(-(2**31), 2**31, (size,), generator=torch.Generator().manual_seed(seed))
    x = bits.int().view(torch.float32)
    x[::50] = 0.0
    x[7::50] = -0.0
    return x.nan_to_num(nan=1.0, posinf=2.0, neginf=-3.0)


def neighbours(size: int, *, seed: int = 0) -> Tensor:
    """(size,) on both sides of where bits 21 and 10 change, at which the kernels' digits meet."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(0, 4, (size,), generator=generator) * 2**21 + torch.tensor(1.5).view(torch.int32).item()
    middle = torch.randint(-1, 2, (size,), generator=generator) * 2**10
    return (base + middle + torch.randint(-2, 3, (size,), generator=generator)).int().view(torch.float32)


def ranks(size: int) -> list[int]:
    return sorted({1, min(2, size), size // 3 + 1, size // 2 + 1, max(1, size - 1), size})


def expected(x: Tensor, k: int) -> float:
    """The definition."""
    values = x.flatten().tolist()
    return math.nan if any(map(math.isnan, values)) else sorted(values, reverse=True)[k - 1]


def check(x: Tensor, k: int, backend: str) -> None:
    value = kth_largest(x, k, backend=backend)
    assert dispatch.last_backend(OP) == backend
    assert value.shape == () and value.dtype == x.dtype and value.device == x.device
    wanted = expected(x, k)
    assert value.item() == wanted or (math.isnan(wanted) and value.isnan())


@on_each_backend
@pytest.mark.parametrize("size", [1, 2, 3, 63, 64, 65, 1000, 4099, 100_001])  # the last: several threads work
@pytest.mark.parametrize("make", [losses, any_bits, neighbours])
def test_is_the_definition_s(backend, device, make, size):
    x = make(size).to(device)
    for k in ranks(size):
        check(x, k, backend)


@on_each_backend
def test_every_rank_of_few_values(backend, device):
    x = torch.tensor([0.0, 3.0, -1.0, 3.0, 0.0, 1e-45, -0.0, 2.0, 3.0], device=device)
    for k in range(1, 10):
        check(x, k, backend)


@on_each_backend
@pytest.mark.parametrize("value", [0.0, -2.5, 3e38, -3e38, 1e-45, math.inf, -math.inf])
def test_all_alike(backend, device, value):
    x = torch.full((3, 71), value, device=device)
    for k in (1, 100, 213):
        check(x, k, backend)


@on_each_backend
def test_infinities_are_values(backend, device):
    x = losses(999).to(device)
    x[::100], x[5::200] = math.inf, -math.inf
    for k in (1, 10, 11, 12, 994, 995, 999):
        check(x, k, backend)


@on_each_backend
@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0x7FFFFFFF, -1, -0x400000, -0x7FFFFF])  # of either sign
def test_nan_is_the_result_wherever_it_lies(backend, device, bits):
    """As topk's smallest value is: NaN counts as the largest. So mining keeps all pixels, for the loop to see."""
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    assert nan.isnan()
    for place in (0, 70, 998):
        x = losses(999)
        x[place] = nan
        x[500] = math.inf
        for k in (1, 2, 3, 500, 999):
            check(x.to(device), k, backend)


@on_each_backend
def test_any_strides_and_alignment(backend, device):
    x = losses(6 * 50 * 70).reshape(6, 50, 70).to(device)
    for view in (
        lambda x: x[:, 3:, 5:61],
        lambda x: x.transpose(0, 2),
        lambda x: x[::2, ::3, 1],
        lambda x: x[:1].expand(4, 50, 70),
        lambda x: x.flatten()[3:],  # not aligned to a vector
    ):
        check(view(x), 23, backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_reference(dtype):
    x = losses(500).clamp(max=6e4).to(dtype)
    for k in (1, 170, 500):
        assert kth_largest(x, k).item() == expected(x, k)
    assert dispatch.last_backend(OP) == "reference"
    with pytest.raises(UserError, match="the kernels take float32, and got|not built"):
        kth_largest(x, 1, backend="native")


@built
@pytest.mark.parametrize("name", ["avx512", "avx2", "portable"])
def test_every_instruction_set(name):
    module = native.load()
    if name not in module.instruction_sets():
        pytest.skip(f"this processor has no kernels for {name}")
    before = module.instruction_set()
    module.use_instruction_set(name)
    try:
        for make in (losses, any_bits, neighbours):
            x = make(4099, seed=1)
            for k in ranks(4099):
                check(x, k, "native")
    finally:
        module.use_instruction_set(before)


@built
def test_threads_do_not_change_the_value():
    x = any_bits(300_007, seed=2)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            for k in (1, 100_000, 300_007):
                check(x, k, "native")
    finally:
        torch.set_num_threads(before)


@on_each_backend
def test_opcheck(backend, device):
    x = losses(333).to(device)
    torch.library.opcheck(torch.ops.deeplab_fast.kth_largest.default, (x, 20, backend))


def test_compile_and_export_hold_one_op_and_name_no_backend(tmp_path):
    class Hardest(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x >= kth_largest(x, x.numel() // 4)

    x = losses(1200).reshape(3, 20, 20)
    expected_mask = Hardest()(x)
    assert expected_mask.sum() >= 300
    compiled = torch.compile(Hardest(), backend="aot_eager", fullgraph=True, dynamic=True)
    assert torch.equal(compiled(x), expected_mask)
    assert torch.equal(compiled(x[:2]), Hardest()(x[:2]))
    batch = torch.export.Dim("batch", min=2, max=8)
    exported = torch.export.export(Hardest(), (x,), dynamic_shapes=({0: batch},))
    calls = [n for n in exported.graph.nodes if n.target is torch.ops.deeplab_fast.kth_largest.default]
    assert [call.args[-1] for call in calls] == ["auto"]
    torch.export.save(exported, tmp_path / "hardest.pt2")
    loaded = torch.export.load(tmp_path / "hardest.pt2").module()
    assert torch.equal(loaded(x[:2]), Hardest()(x[:2]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("backend", list(dispatch.OPS[OP].backends))
def test_captured_in_a_cuda_graph(backend):
    x = losses(2 * 300 * 301).cuda()
    if reason := dispatch.explain(OP, x, 1)[backend]:
        pytest.skip(reason)
    kth_largest(x, 5000, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        value = kth_largest(x, 5000, backend=backend)
    x.copy_(any_bits(x.numel()))
    graph.replay()
    assert value.item() == expected(x, 5000)


def test_rejects_what_has_no_such_value():
    x = torch.zeros(2, 3)
    for k in (0, -1, 7):
        with pytest.raises(ValueError, match=rf"k is {k}; expected 1 to 6, the number of values of x \(2, 3\)"):
            kth_largest(x, k)
    with pytest.raises(ValueError, match="k is 1; expected 1 to 0"):
        kth_largest(x[:0], 1)
    with pytest.raises(ValueError, match=r"x is torch.int64; expected a floating-point type"):
        kth_largest(x.long(), 1)


def test_a_gradient_raises():
    x = torch.zeros(4, requires_grad=True)
    with pytest.raises(RuntimeError, match="kth_largest has no gradient: it is a threshold"):
        kth_largest(x, 2)
    with torch.no_grad():
        assert kth_largest(x, 2) == 0
