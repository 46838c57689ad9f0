"""The layers on the ops are the plain network: same values, gradients, statistics and keys, and any child that is not
plain is called as it is."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from deeplab_fast import ops
from deeplab_fast.model import build_model
from deeplab_fast.model.layers import ConvNormAct, SeparableConv, conv_norm_act, norm_act
from deeplab_fast.model.mobilenet import InvertedResidual
from deeplab_fast.model.norm import FrozenBatchNorm2d
from deeplab_fast.ops import dispatch, native

pytestmark = pytest.mark.skipif(native.load() is None, reason="deeplab_fast._C is not built")
SMALL = {"num_classes": 5, "aspp_channels": 16, "decoder_channels": 16, "low_level_channels": 8, "dropout": 0.0}


@pytest.fixture(autouse=True)
def fresh_record(monkeypatch):
    monkeypatch.setattr(dispatch, "_last", {})


def ran(*names: str) -> bool:
    """Whether all of these ops ran natively since the test began."""
    return all(dispatch.last_backend(name) == "native" for name in names)


def batch(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return x.to(memory_format=torch.channels_last)


def randomise(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.running_var):
                tensor.data = torch.rand(tensor.shape, generator=generator) + 0.5
            for tensor in (part.bias, part.running_mean):
                tensor.data = torch.randn(tensor.shape, generator=generator)
    return module.to(memory_format=torch.channels_last)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-12))


def outcome(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """Output, gradients and buffers after one pass forward and backward."""
    y = model(x)
    y.float().square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return y.detach(), gradients, {name: b.clone() for name, b in model.named_buffers()}


def compare_with_plain(model: nn.Module, x: Tensor, *names: str) -> None:
    """The ops `names` run natively, and output, gradients and buffers are those of the plain network.

    Against fp64, to a hundredth on the average or twice what the plain network is off in fp32: an activation at
    its edge falls to the other side, and moves the gradients of all layers before it. A wrong one is wrong by more.
    """
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    y, gradients, buffers = outcome(model, x)
    assert ran(*names)
    with dispatch.requesting("reference"):
        plain_y, plain_gradients, plain_buffers = outcome(plain, x)
        exact_y, exact_gradients, _ = outcome(exact, x.double())
    assert relative(y, exact_y) <= max(0.01, 2 * relative(plain_y, exact_y))
    assert gradients.keys() == plain_gradients.keys()
    used = [name for name, gradient in exact_gradients.items() if gradient.norm() > 1e-9]  # others are rounding alone
    ours = torch.tensor([relative(gradients[name], exact_gradients[name]) for name in used])
    theirs = torch.tensor([relative(plain_gradients[name], exact_gradients[name]) for name in used])
    assert ours.max() < 0.1 and ours.mean() < max(0.01, 2 * theirs.mean())
    for name, buffer in plain_buffers.items():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18", "resnet50"])
@pytest.mark.parametrize("order", ["norm_last", "norm_each"])
def test_training_is_that_of_the_plain_network(backbone, order):
    torch.manual_seed(0)
    # Without the pooling branch: batch norm over the two values of two images amplifies rounding a thousandfold.
    model = randomise(build_model(backbone=backbone, separable_order=order, image_pooling=False, **SMALL)).train()
    depthwise = "depthwise_conv_statistics" if order == "norm_each" else "depthwise_conv"
    names = ("batch_norm_act", "batch_norm_act_statistics", "batch_norm_act_backward", "upsample_concat")
    if backbone == "mobilenet_v2":
        names += ("depthwise_conv_normalised", "depthwise_conv_normalised_backward")
    compare_with_plain(model, batch(2, 3, 65, 49), depthwise, *names)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "resnet18"])
def test_inference_is_that_of_the_plain_network(backbone):
    torch.manual_seed(0)
    model, x = randomise(build_model(backbone=backbone, **SMALL)).eval(), batch(1, 3, 70, 45)
    with torch.inference_mode():
        y = model(x)
        assert ran("separable_conv", "batch_norm_act_inference", "upsample_concat")
        with dispatch.requesting("reference"):
            assert relative(y, model(x)) < 1e-4


def test_frozen_norms_train_the_rest():
    torch.manual_seed(0)
    model = randomise(build_model(backbone="mobilenet_v2", norm="frozen_batch", **SMALL)).train()
    compare_with_plain(model, batch(2, 3, 33, 49), "batch_norm_act_inference", "depthwise_conv")


@pytest.mark.parametrize("momentum", [0.1, 0.01, None])
def test_running_statistics_move_as_those_of_torch(momentum):
    ours, plain = (ConvNormAct("batch", 3, 8, 3) for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    ours.norm.momentum = plain.norm.momentum = momentum
    for step in range(3):
        x = batch(2, 3, 5, 7) + step
        ours(x)
        with dispatch.requesting("reference"):
            plain(x)
    assert ran("batch_norm_act")
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, msg=key)


def test_an_empty_batch_leaves_the_running_statistics():
    ours, plain = (nn.BatchNorm2d(8) for _ in range(2))
    for norm, request in ((ours, ""), (plain, "reference")):
        with dispatch.requesting(request):
            norm_act(batch(0, 8, 9, 9), norm)
    for key, value in plain.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key


def strided(layer: SeparableConv) -> None:
    layer.depthwise.stride = (2, 2)


def pointwise_with_bias(layer: SeparableConv) -> None:
    layer.pointwise.bias = nn.Parameter(torch.full((8,), 3.0))


def wider(layer: SeparableConv) -> None:
    layer.depthwise = nn.Conv2d(6, 6, 5, padding=2, groups=6, bias=False)


@pytest.mark.parametrize("change", [strided, pointwise_with_bias, wider])
def test_a_layer_is_what_its_convolutions_are(change):
    torch.manual_seed(0)
    layer, x = randomise(SeparableConv("batch", 6, 8, order="norm_last")).eval(), batch(2, 6, 9, 7)
    change(layer)
    with torch.no_grad():
        y = layer(x)
        with dispatch.requesting("reference"):
            torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-4)


def test_bf16_on_a_cpu_with_amx_takes_the_single_ops(monkeypatch):
    from deeplab_fast.ops import separable_conv as module

    layer = randomise(SeparableConv("batch", 16, 8, order="norm_last")).eval().bfloat16()
    layer.norm.float()
    monkeypatch.setattr(sys.modules[module.__module__], "_has_amx", lambda: True)
    with dispatch.requesting(""), torch.no_grad():
        layer(batch(1, 16, 6, 5).bfloat16())
    assert dispatch.last_backend("separable_conv") is None
    assert ran("depthwise_conv")


@pytest.mark.parametrize("order", ["norm_last", "norm_each"])
@pytest.mark.parametrize("pooling", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_aspp_writes_its_branches_side_by_side(monkeypatch, order, pooling, dtype):
    """Bit for bit what torch.cat of the branches gives, under autocast too; a branch with a hook takes that."""
    monkeypatch.setattr(sys.modules[ops.separable_conv.__module__], "_has_amx", lambda: False)
    model = randomise(build_model(backbone="mobilenet_v2", separable_order=order, image_pooling=pooling, **SMALL))
    aspp, x, seen = model.eval().aspp, batch(2, 320, 5, 6), []
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16), dispatch.requesting(""):
        y = aspp(x)
        assert ran("separable_conv_concat") and dispatch.last_backend("separable_conv") is None
        branch = aspp.branches[2]
        branch.register_forward_hook(lambda *args: seen.append(args))
        assert torch.equal(y, aspp(x))
    assert len(seen) == 1 and ran("separable_conv")


def test_one_value_per_channel_is_refused_as_by_torch():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ConvNormAct("batch", 3, 8, 3)(torch.randn(1, 3, 1, 1))


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def subclassed(layer: SeparableConv) -> None:
    class Conv(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    layer.depthwise.__class__ = Conv


def hooked(layer: SeparableConv) -> None:
    layer.depthwise.register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked_norm(layer: SeparableConv) -> None:
    layer.norm.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 2 + 1,))


def parametrised(layer: SeparableConv) -> None:
    parametrize.register_parametrization(layer.depthwise, "weight", Doubled())


def with_bias(layer: SeparableConv) -> None:
    layer.depthwise.bias = nn.Parameter(torch.full((6,), 3.0))


def replaced_norm(layer: SeparableConv) -> None:
    layer.norm = nn.GroupNorm(2, 8)


def block(**options: object) -> InvertedResidual:
    torch.manual_seed(0)
    given = {"expansion": 6, "stride": 1, "dilation": 1, "residual": True} | options
    return randomise(InvertedResidual("batch", 8, 8, **given)).train()


@pytest.mark.parametrize("options", [{}, {"stride": 2, "residual": False}, {"dilation": 2}], ids=str)
def test_an_inverted_residual_does_not_write_what_it_expands(options):
    """Neither for the gradient nor, with two norms in training, at all."""
    layer, x = block(**options), batch(2, 8, 9, 8)
    compare_with_plain(layer, x, "depthwise_conv_normalised", "depthwise_conv_normalised_backward")

    def kept() -> int:
        found: dict[int, int] = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: found.update({t.data_ptr(): t.numel()}) or t, lambda t: t
        ):
            layer(x.clone().requires_grad_())
        return sum(found.values())

    ours = kept()
    with dispatch.requesting("depthwise_conv_normalised=reference"):
        assert kept() - ours >= 2 * 48 * 9 * 8


def padded_first(layer: InvertedResidual) -> None:
    layer.padding = 1
    layer.conv[1][0].padding = (0, 0)


def hooked_step(layer: InvertedResidual) -> None:
    layer.conv[0].register_forward_hook(lambda module, inputs, output: 2 * output)


def hooked_first_norm(layer: InvertedResidual) -> None:
    layer.conv[0][1].register_forward_hook(lambda module, inputs, output: output + 1)


def group_norm_between(layer: InvertedResidual) -> None:
    layer.conv[1][1] = nn.GroupNorm(2, 48)


def frozen(layer: InvertedResidual) -> None:
    layer.conv[0][1].eval()


def frozen_second(layer: InvertedResidual) -> None:
    layer.conv[1][1].eval()


@pytest.mark.parametrize(
    "change", [padded_first, hooked_step, hooked_first_norm, group_norm_between, frozen, frozen_second]
)
def test_an_inverted_residual_with_other_children_calls_them_as_they_are(change):
    layer, x = block(), batch(2, 8, 9, 8)
    change(layer)
    plain, before = copy.deepcopy(layer), block()
    with torch.no_grad():
        y = layer(x)
        assert dispatch.last_backend("depthwise_conv_normalised") is None
        with dispatch.requesting("reference"):
            torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
        assert not torch.allclose(y, before(x))


def test_an_inverted_residual_moves_the_statistics_as_torch_does():
    layer = block()
    plain = copy.deepcopy(layer)
    for step in range(3):
        x = batch(2, 8, 6, 7) + step
        layer(x)
        with dispatch.requesting("reference"):
            plain(x)
    assert ran("depthwise_conv_normalised")
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[key], value, rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("change", [subclassed, hooked, hooked_norm, parametrised, with_bias, replaced_norm])
@pytest.mark.parametrize("training", [True, False])
def test_a_child_that_is_not_plain_is_called_as_it_is(change, training):
    torch.manual_seed(0)
    layer = randomise(SeparableConv("batch", 6, 8, order="norm_last")).train(training)
    x, before = batch(2, 6, 9, 7), copy.deepcopy(layer)
    change(layer)
    plain = copy.deepcopy(layer)
    with torch.no_grad():
        y = layer(x)
        with dispatch.requesting("reference"):
            torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
        # Batch statistics undo a factor of two.
        assert training or not torch.allclose(y, before(x))


def test_backward_hooks_run():
    layer, calls = SeparableConv("batch", 6, 8, order="norm_last"), []
    layer.depthwise.register_full_backward_hook(lambda module, grad_input, grad_output: calls.append("hook"))
    layer.depthwise.register_full_backward_pre_hook(lambda module, grad_output: calls.append("pre-hook"))
    layer(batch(2, 6, 9, 7).requires_grad_()).square().mean().backward()
    assert calls == ["pre-hook", "hook"]


def test_conversion_to_sync_batch_norm_holds():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(ConvNormAct("batch", 3, 8, 3))
    assert type(layer.norm) is nn.SyncBatchNorm
    layer.eval()(torch.randn(2, 3, 4, 4))
    assert dispatch.last_backend("batch_norm_act_inference") is None


def test_scales_that_learn_under_frozen_statistics_get_gradients():
    layer = randomise(ConvNormAct("batch", 3, 8, 3)).eval()
    compare_with_plain(layer, batch(2, 3, 6, 5))
    assert layer.norm.weight.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4).eval(), FrozenBatchNorm2d(4), nn.GroupNorm(2, 4)]
)
@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_residual_is_added_before_the_activation(norm, activation):
    x, residual = batch(2, 4, 5, 6), 3 * batch(2, 4, 5, 6).flip(0)
    act = {"none": lambda t: t, "relu": torch.relu, "relu6": nn.functional.relu6}[activation]
    expected = act(copy.deepcopy(norm)(x) + residual)
    kept = residual.clone()
    with torch.no_grad():
        torch.testing.assert_close(norm_act(x.clone(), copy.deepcopy(norm), activation, residual), expected.detach())
    assert torch.equal(residual, kept)


def test_state_dict_is_that_of_the_plain_layers():
    layer = SeparableConv("batch", 6, 8, order="norm_each")
    norms = [f"{name}.{key}" for name in ("depthwise_norm", "norm") for key in nn.BatchNorm2d(1).state_dict()]
    assert set(layer.state_dict()) == {"depthwise.weight", "pointwise.weight", *norms}


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_network_holds_the_ops(training):
    torch.manual_seed(0)
    model = randomise(build_model(backbone="mobilenet_v2", **SMALL)).train(training)
    x = batch(2, 3, 33, 33)
    plain = copy.deepcopy(model)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    with torch.no_grad():
        y = torch.compile(model, backend=keep, fullgraph=True)(x)
        torch.testing.assert_close(y, plain(x), rtol=1e-4, atol=1e-4)
    names = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    wanted = "depthwise_conv_normalised" if training else "separable_conv"
    assert any(wanted in name for name in names), names


def test_export_holds_the_ops(tmp_path):
    torch.manual_seed(0)
    model, x = randomise(build_model(backbone="mobilenet_v2", **SMALL)).eval(), batch(1, 3, 33, 33)
    with torch.no_grad():
        exported = torch.export.export(model, (x,))
        targets = {str(node.target) for node in exported.graph.nodes}
        assert {f"deeplab_fast.separable_conv{part}.default" for part in ("", "_concat")} <= targets
        torch.export.save(exported, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        torch.testing.assert_close(loaded(x), model(x))


def test_autocast_keeps_the_dtypes_of_the_plain_network():
    layer, x = randomise(ConvNormAct("batch", 3, 8, 3)), batch(2, 3, 9, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
        depthwise = conv_norm_act(batch(2, 8, 9, 9), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), layer.norm)
    assert y.dtype == depthwise.dtype == torch.bfloat16
    assert layer.norm.running_mean.dtype == torch.float32
