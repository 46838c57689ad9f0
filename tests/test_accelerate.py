"""`accelerate` on networks made of the parts of other projects: same numbers, same model, and nothing guessed at."""

from __future__ import annotations

import copy
import json
import pickle
import random
import types
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from benchmarks import accelerate as benchmark
from deeplab_fast import accelerate, accelerated, build_model
from deeplab_fast.errors import UserError
from deeplab_fast.ops import dispatch, native

pytestmark = pytest.mark.skipif(native.load() is None, reason="deeplab_fast._C is not built")


@pytest.fixture(autouse=True)
def fresh_record(monkeypatch):
    monkeypatch.setattr(dispatch, "_last", {})


def ran() -> set[str]:
    """Ops whose kernel ran since the test began."""
    return {name for name in dispatch.OPS if dispatch.last_backend(name) == "native"}


class Residual(nn.Module):
    """As torchvision's BasicBlock: one ReLU for all, the sum in place."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class ConvNormRelu6(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs), nn.ReLU6(inplace=True))


class Inverted(nn.Module):
    """As torchvision's InvertedResidual."""

    def __init__(self, channels: int, wide: int) -> None:
        super().__init__()
        self.use_res_connect = True
        self.conv = nn.Sequential(
            ConvNormRelu6(channels, wide, 1),
            ConvNormRelu6(wide, wide, 3, groups=wide),
            nn.Conv2d(wide, channels, 1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        return self.conv(x)


class Backbone(nn.ModuleDict):
    """As torchvision's IntermediateLayerGetter."""

    def __init__(self) -> None:
        super().__init__(
            OrderedDict(
                stem=nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False),
                norm=nn.BatchNorm2d(8),
                relu=nn.ReLU(inplace=True),
                layer1=nn.Sequential(Residual(8, 8), Residual(8, 16)),
                pool=nn.MaxPool2d(4),
                layer2=nn.Sequential(Inverted(16, 32), nn.Identity()),
            )
        )

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        out = OrderedDict()
        for name, module in self.items():
            x = module(x)
            if name in ("layer1", "layer2"):
                out[name] = x
        return out


class SeparableConv2d(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, dilation: int = 1) -> None:
        options = {"padding": dilation, "dilation": dilation, "groups": inputs, "bias": False}
        super().__init__(nn.Conv2d(inputs, inputs, 3, **options), nn.Conv2d(inputs, outputs, 1, bias=False))


class Pooling(nn.Sequential):
    def __init__(self, inputs: int, outputs: int) -> None:
        conv = nn.Conv2d(inputs, outputs, 1, bias=False)
        super().__init__(nn.AdaptiveAvgPool2d(1), conv, nn.BatchNorm2d(outputs), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        size = x.shape[-2:]
        for part in self:
            x = part(x)
        return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


class ASPP(nn.Module):
    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        branch = nn.Sequential(SeparableConv2d(inputs, width, 2), nn.BatchNorm2d(width), nn.ReLU())
        self.convs = nn.ModuleList([branch, Pooling(inputs, width)])
        self.project = nn.Sequential(
            nn.Conv2d(2 * width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(0.0)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.project(torch.cat([conv(x) for conv in self.convs], dim=1))


class Decoder(nn.Module):
    """As segmentation_models_pytorch's DeepLabV3PlusDecoder."""

    def __init__(self) -> None:
        super().__init__()
        self.aspp = nn.Sequential(ASPP(16, 8), SeparableConv2d(8, 8), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.Upsample(mode="bilinear", scale_factor=4, align_corners=True)
        self.block1 = nn.Sequential(nn.Conv2d(16, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU())
        self.block2 = nn.Sequential(SeparableConv2d(14, 8), nn.BatchNorm2d(8), nn.ReLU())

    def forward(self, features: OrderedDict[str, Tensor]) -> Tensor:
        x = self.up(self.aspp(features["layer2"]))
        return self.block2(torch.cat([x, self.block1(features["layer1"])], dim=1))


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()
        self.decoder = Decoder()
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        logits = self.head(self.decoder(self.backbone(x)))
        return F.interpolate(logits, size=x.shape[-2:], mode="bilinear", align_corners=False)


FOUND = {
    "batch norm": 1,
    "batch norm, ReLU": 5,
    "batch norm, ReLU6, depthwise convolution, batch norm, ReLU6": 1,
    "batch norm, sum": 1,
    "batch norm, sum, ReLU": 2,
    "concatenation": 1,
    "separable convolution, batch norm, ReLU": 3,
    "upsampling, concatenation": 1,
}


def randomised(model: nn.Module) -> nn.Module:
    """Norms away from 0 and 1, so that one that is left out shows."""
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for tensor in (part.weight, part.running_var):
                tensor.data.uniform_(0.5, 1.5, generator=generator)
            for tensor in (part.bias, part.running_mean):
                tensor.data.uniform_(-0.5, 0.5, generator=generator)
    return model


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    return randomised(Network())


def image(*shape: int) -> Tensor:
    return torch.randn(shape or (2, 3, 32, 48), generator=torch.Generator().manual_seed(2))


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Result, gradient of the image, those of the parameters, and buffers after one pass both ways; in fp64."""
    x = x.clone().requires_grad_()
    y = model(x)
    y.square().mean().backward()
    gradients = [p.grad.flatten().double() for p in model.parameters()]
    buffers = [b.flatten().double() for b in model.buffers()]
    return [y.detach().double(), x.grad.double(), torch.cat(gradients), torch.cat(buffers)]


def assert_as_close(actual: list[Tensor], own: list[Tensor], exact: list[Tensor], factor: float = 4.0) -> None:
    """As near to the results in fp64 as the model's own in fp32, up to a factor."""
    for a, b, truth in zip(actual, own, exact, strict=True):
        scale = truth.norm()
        assert scale > 0
        assert (a - truth).norm() <= factor * (b - truth).norm() + 1e-6 * scale


def test_training_gives_the_same(network) -> None:
    fast, exact = accelerate(copy.deepcopy(network)), copy.deepcopy(network).double()
    assert_as_close(outcome(fast, image()), outcome(network, image()), outcome(exact, image().double()))
    assert ran() >= {
        *("batch_norm_act", "batch_norm_act_backward", "depthwise_conv", "depthwise_conv_normalised"),
        *("depthwise_conv_backward", "upsample_concat", "upsample_concat_backward"),
    }


def test_inference_gives_the_same(network) -> None:
    fast, exact = accelerate(copy.deepcopy(network)).eval(), copy.deepcopy(network).double().eval()
    with torch.inference_mode():
        assert_as_close([fast(image())], [network.eval()(image())], [exact(image().double())])
    assert ran() == {"batch_norm_act_inference", "depthwise_conv", "separable_conv", "upsample_concat"}


def test_half_precision_gives_the_same(network) -> None:
    fast, exact = accelerate(copy.deepcopy(network)), copy.deepcopy(network).double()
    with torch.autocast("cpu", torch.bfloat16):
        actual, own = outcome(fast, image()), outcome(network, image())
    assert_as_close(actual, own, outcome(exact, image().double()), factor=2.0)
    assert "batch_norm_act" in ran()


def test_frozen_norms_stay_frozen(network) -> None:
    """segmentation_models_pytorch's freeze_encoder: norms in eval mode in a network that trains."""
    for part in network.backbone.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.eval().requires_grad_(False)
    fast, exact = accelerate(copy.deepcopy(network)), copy.deepcopy(network).double()
    for model in (fast, network, exact):
        model.requires_grad_(True)
    assert_as_close(outcome(fast, image()), outcome(network, image()), outcome(exact, image().double()))
    assert torch.equal(fast.backbone["norm"].running_mean, network.backbone["norm"].running_mean)


def test_tells_what_it_found(network) -> None:
    assert accelerated(network) == {}
    assert accelerate(network) is network
    assert accelerated(network) == FOUND == accelerated(network.eval())


def test_the_model_stays_what_it_was(network) -> None:
    before = copy.deepcopy(network)
    tensors = [*network.parameters(), *network.buffers()]
    modules = list(network.modules())
    accelerate(network)
    assert all(a is b for a, b in zip(tensors, [*network.parameters(), *network.buffers()], strict=True))
    assert all(a is b for a, b in zip(modules, network.modules(), strict=True))
    assert repr(network) == repr(before)
    assert all(isinstance(a, type(b)) for a, b in zip(modules, before.modules(), strict=True))
    state, old = network.state_dict(), before.state_dict()
    assert list(state) == list(old) and all(torch.equal(state[key], old[key]) for key in old)
    network.load_state_dict(old)
    assert isinstance(network.backbone(image()), OrderedDict)
    modes = [m.training for m in network.eval().modules()]
    assert not any(modes) and all(m.training for m in network.train().modules())


def test_once_more_is_once(network) -> None:
    classes = [type(module) for module in accelerate(network).modules()]
    assert accelerated(accelerate(network)) == FOUND
    assert [type(module) for module in network.modules()] == classes
    network.backbone["layer1"][0] = Residual(8, 8)
    assert accelerated(network)["batch norm, sum, ReLU"] == 1
    assert accelerated(accelerate(network)) == FOUND


def test_a_copy_is_accelerated_and_on_its_own(network) -> None:
    copied = copy.deepcopy(accelerate(network))
    assert accelerated(copied) == FOUND == accelerated(network)
    with torch.no_grad():
        copied.backbone["stem"].weight.zero_()
        assert not torch.equal(copied.eval()(image()), network.eval()(image()))


def test_pickled_it_is_the_plain_model() -> None:
    plain = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()).eval()
    fast = accelerate(copy.deepcopy(plain))
    loaded = pickle.loads(pickle.dumps(fast))
    assert accelerated(fast) == {"batch norm, ReLU": 1} and accelerated(loaded) == {}
    assert type(loaded) is nn.Sequential
    torch.testing.assert_close(loaded(image()), plain(image()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize(
    "name", ["relu", "layer1.0.relu", "layer1.1.bn2", "layer1.1.downsample", "layer2.0.conv", "layer2.0.conv.1.2"]
)
def test_hooks_see_what_they_saw(network, name: str, early: bool) -> None:
    fast = copy.deepcopy(network)
    if not early:
        accelerate(fast)
    seen: list[list[Tensor]] = [[], []]
    for model, results in zip((network, fast), seen, strict=True):
        hook = lambda _m, _x, y, results=results: results.append(y.clone())  # noqa: E731
        handle = model.backbone.get_submodule(name).register_forward_hook(hook)
    if early:
        accelerate(fast)
    with torch.inference_mode():
        torch.testing.assert_close(fast.eval()(image()), network.eval()(image()))
    assert seen[0]
    torch.testing.assert_close(seen[1], seen[0])
    assert sum(accelerated(fast).values()) > 10, "the rest goes on"
    if not early:
        handle.remove()
        assert accelerated(fast.train()) == FOUND


def replace_norm(model: nn.Module) -> None:
    torch.manual_seed(3)
    model.backbone["layer1"][0].bn2 = nn.GroupNorm(2, 8)


def remove_norm(model: nn.Module) -> None:
    model.backbone["layer1"][0].bn2 = nn.Identity()


def other_activation(model: nn.Module) -> None:
    model.backbone["layer1"][0].relu = nn.Tanh()


def longer_sequence(model: nn.Module) -> None:
    model.backbone["layer2"][0].conv.append(nn.Tanh())


def no_shortcut(model: nn.Module) -> None:
    model.backbone["layer2"][0].use_res_connect = False


def own_forward(model: nn.Module) -> None:
    model.backbone["layer2"][0].conv.forward = lambda x: x * 2


def parametrised(model: nn.Module) -> None:
    parametrize.register_parametrization(model.decoder.block2[0][0], "weight", nn.Tanh())


def other_upsampling(model: nn.Module) -> None:
    model.decoder.up.align_corners = False


def other_ceiling(model: nn.Module) -> None:
    model.backbone["layer2"][0].conv[0][2].max_val = 0.5


def own_method(model: nn.Module) -> None:
    model.decoder.block2[0][0]._conv_forward = lambda x, weight, bias: x * 2


class Halved(Tensor):
    """As quantised weights are: what it means, it knows itself."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        if function is not torch.conv2d:
            return super().__torch_function__(function, kinds, args, kwargs)
        plain = [a.as_subclass(Tensor) / 2 if isinstance(a, Halved) else a for a in args]
        return function(*plain, **(kwargs or {}))


def other_tensor(model: nn.Module) -> None:
    conv = model.decoder.block2[0][0]
    weight = conv.weight.detach().as_subclass(Halved)
    del conv.weight
    conv._parameters["weight"] = weight


def synchronised(model: nn.Module) -> None:
    model.decoder = nn.SyncBatchNorm.convert_sync_batchnorm(model.decoder)


@pytest.mark.parametrize(
    "change",
    [
        *(replace_norm, remove_norm, other_activation, longer_sequence, no_shortcut, own_forward, parametrised),
        *(other_upsampling, other_ceiling, own_method, other_tensor, synchronised),
    ],
)
def test_what_changes_later_counts(network, change) -> None:
    fast = accelerate(copy.deepcopy(network))
    before = fast.eval()(image())
    for model in (network, fast):
        change(model)
    with torch.inference_mode():
        actual = fast.eval()(image())
        torch.testing.assert_close(actual, network.eval()(image()), rtol=1e-4, atol=1e-5)
    assert change is synchronised or not torch.allclose(actual, before)


def test_a_norm_that_is_shared_later_moves_in_its_order() -> None:
    torch.manual_seed(0)
    plain = randomised(Residual(3, 4))
    fast = accelerate(copy.deepcopy(plain))
    for model in (plain, fast):
        model.bn2 = model.downsample[1]
        model(image())
    torch.testing.assert_close(fast.bn2.running_mean, plain.bn2.running_mean)


class Layers(nn.Module):
    """What the forwards below are made of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.conv2 = nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.norm, self.norm2 = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.relu, self.act, self.pool = nn.ReLU(inplace=True), nn.ReLU(), nn.AdaptiveAvgPool2d(1)
        self.up, self.same = nn.Upsample(scale_factor=2, mode="bilinear"), Same()
        self.calls, self.flag, self.scale = 0, True, 2 * torch.ones(1)
        self.function, self.options = torch.neg, {"a": {"b": 1}}
        self.register_buffer("moved", torch.zeros(()))


class Same(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


class Understood(Layers):
    """What is refused below must be refused for what it adds to this."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class AsksForType(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return y if isinstance(x, Tensor) else y * 2


class AsksForAttribute(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return y if hasattr(x, "shape") else y * 2


class Draws(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return y if random.random() < 2 else x


class DrawsFromNumpy(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return y * np.random.rand()


class Counts(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return F.relu(self.norm(self.conv(x)))


class MovesABuffer(Layers):
    def forward(self, x: Tensor) -> Tensor:
        self.moved.add_(1)
        return F.relu(self.norm(self.conv(x)))


class LooseTensor(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) * self.scale


class LooksAtValues(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return y if x.sum() < 1e9 else x


class TakesTwo(Layers):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return y if mask is None else y * 2


class WithoutGradient(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.conv(x)
        return F.relu(self.norm(x))


class WithoutAutocast(Layers):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return F.relu(self.norm(self.conv(x.float())))


class Checkpoints(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(checkpoint(self.conv, x, use_reentrant=False)))


class Decorated(Layers):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class CallsAnAttribute(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.function(F.relu(self.norm(self.conv(x))))


class LooksUp(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x))) * self.options["a"]["b"]


class Super(Understood):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class HidesAGlobal(Layers):
    """An unbound local is an error, not the global of that name."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)))
        if not self.flag:
            torch = None
        return torch.cat([x, x], 1)  # noqa: F823


class OwnCall(Understood):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) * 2


class OwnInnerCall(Understood):
    def _call_impl(self, *args: object) -> Tensor:
        return super()._call_impl(*args) * 2


class PrivateName(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.__act = nn.Sigmoid()
        self.add_module("__act", nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.__act(self.norm(self.conv(x)))


class NamedByAKeyword(Layers):
    def __init__(self) -> None:
        super().__init__()
        self.named = nn.Sequential(OrderedDict([("global", nn.Conv2d(3, 3, 1)), ("in", nn.BatchNorm2d(3))]))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.named(x)))


class OtherSelf(Layers):
    def forward(this, self: Tensor) -> Tensor:  # noqa: N805
        return this.norm(this.conv(self))


class OwnLookup(Understood):
    def __getattr__(self, name: str) -> object:
        return super().__getattr__("act" if name == "norm" and "act" in self._modules else name)


class Registry(Understood):
    known: list[type] = []

    def __init_subclass__(cls) -> None:
        Registry.known.append(cls)


class NotItsSource(Layers):
    """Says that it is written where another one is."""

    forward = types.FunctionType(
        Same.forward.__code__.replace(co_firstlineno=Understood.forward.__code__.co_firstlineno), globals(), "forward"
    )


REFUSED = [
    *(AsksForType, AsksForAttribute, Draws, DrawsFromNumpy, Counts, MovesABuffer, LooseTensor, LooksAtValues),
    *(TakesTwo, WithoutGradient, WithoutAutocast, Checkpoints, Decorated, CallsAnAttribute, LooksUp, Super),
    *(HidesAGlobal, OwnCall, OwnInnerCall, OwnLookup, Registry, NotItsSource, PrivateName, OtherSelf),
]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_left_alone(kind) -> None:
    torch.manual_seed(0)
    model, plain = nn.Sequential(kind(), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), kind()
    before = dict(vars(model[0]))
    state = torch.get_rng_state(), random.getstate()
    accelerate(model)
    assert type(model[0]) is kind and accelerated(model) == {"batch norm, ReLU": 1}
    assert all(vars(model[0])[key] is value for key, value in before.items()) and len(vars(model[0])) == len(before)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1] and not Registry.known
    with pytest.raises(UserError, match=f"found nothing to replace in {kind.__name__}"):
        accelerate(plain)


def test_names_that_code_cannot_hold_are_left_alone() -> None:
    model = accelerate(nn.Sequential(NamedByAKeyword(), Understood()))
    assert type(model[0]) is NamedByAKeyword and type(model[0].named) is nn.Sequential
    assert accelerated(model) == {"batch norm, ReLU": 1}


class TrainsByCheckpoint(Layers):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            return checkpoint(self.conv, x, use_reentrant=False)
        return self.relu(self.norm(self.conv(x)))


def test_what_only_the_other_mode_holds_is_no_error() -> None:
    model = accelerate(TrainsByCheckpoint().train())
    assert accelerated(model) == {} and accelerated(model.eval()) == {"batch norm, ReLU": 1}


class SameNames(Understood):
    def __init__(self) -> None:
        super().__init__()
        self._plans, self._plain_class = [1], "mine"

    def _plan(self) -> str:
        return "mine"


def test_names_of_the_users_own_stay_theirs() -> None:
    model = copy.deepcopy(accelerate(SameNames()))
    assert (model._plans, model._plain_class, model._plan()) == ([1], "mine", "mine") and accelerated(model)


class CopiedAsAnother(Understood):
    def __deepcopy__(self, memo: dict) -> nn.Module:
        return nn.Identity()


def test_what_a_copy_is_the_users_class_says() -> None:
    assert type(copy.deepcopy(accelerate(CopiedAsAnother()))) is nn.Identity


def test_the_same_module_is_understood() -> None:
    assert accelerated(accelerate(Understood())) == {"batch norm, ReLU": 1}


class SumIntoShortcut(Layers):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = x * 2
        y = shortcut
        y += self.norm(self.conv(x))
        return y, shortcut


class Broadcasts(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + self.pool(x))


class WritesBetween(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        y += x
        return F.relu(z) + y


class WritesIntoTheNormsInput(Layers):
    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(x)
        y = self.relu(x)
        return self.act(z + y)


class ReadTwice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return self.relu(z) + z


class TrainsOtherwise(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.conv(x)))
        return y * 2 if self.training else F.dropout(y, 0.5, self.training)


class PreActivation(Layers):
    """As segmentation_models_pytorch's Xception, where the caller sees its tensor change."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.relu(x)))
        y += x
        return y


class NormFirst(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(x))


class AddsTheArgument(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + x)


class ResizesTheArgument(Layers):
    def forward(self, x: Tensor) -> Tensor:
        low = F.interpolate(x, scale_factor=2)
        return torch.cat([self.up(x), low], 1)


class OneNormTwice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)) + self.norm(self.conv2(x)))


class TwoNorms(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += self.norm2(self.conv2(x))
        return self.relu(y)


class ResizesWhatIsWrittenInto(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.same(x))
        z = self.up(self.norm(self.relu(x)))
        return torch.cat([y, z], 1)


class ConcatenatesOneTwice(Layers):
    def forward(self, x: Tensor) -> Tensor:
        y = self.up(self.act(self.norm(x)))
        return torch.cat([y, y], dim=1)


class Collects(Layers):
    def forward(self, x: Tensor) -> list[Tensor]:
        features = [x]
        features.append(self.act(self.norm(self.conv(x))))
        y = features[-1]
        y += x
        return features


class TakesAll(Layers):
    def forward(self, *features: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(features[-1]))) + features[0]


class Decides(Layers):
    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x))
        if not self.flag or self.calls >= 1:
            x = self.norm2(x)
        return F.relu6(x) if self.up is not None else self.act(x)


WRITES = [
    *(SumIntoShortcut, Broadcasts, WritesBetween, WritesIntoTheNormsInput, ReadTwice, TrainsOtherwise, PreActivation),
    *(OneNormTwice, TwoNorms, ResizesWhatIsWrittenInto, ConcatenatesOneTwice, Collects, TakesAll, Decides),
]


def seen_by_the_caller(model: nn.Module, *, training: bool) -> list[Tensor]:
    """Results, their gradient, the argument afterwards, and the buffers."""
    given = image().requires_grad_()
    x = given * 1.5
    y = model.train(training)(x)
    results = [y] if isinstance(y, Tensor) else list(y)
    loss = sum((r * r).sum() for r in results)
    gradient = torch.autograd.grad(loss, given) if torch.is_grad_enabled() else ()
    return [*results, *gradient, x, *(b.float() for b in model.buffers())]


@pytest.mark.parametrize("kind", WRITES)
@pytest.mark.parametrize("training", [True, False])
def test_who_reads_and_writes_what_is_kept(kind, training: bool) -> None:
    torch.manual_seed(0)
    plain = randomised(kind())
    fast = accelerate(copy.deepcopy(plain))
    # Writing into what a gradient needs is an error with both.
    with torch.set_grad_enabled(kind not in (WritesBetween, WritesIntoTheNormsInput, Collects)):
        for actual, own in zip(*(seen_by_the_caller(m, training=training) for m in (fast, plain)), strict=True):
            torch.testing.assert_close(actual, own, rtol=1e-3, atol=1e-4)
        learns = torch.is_grad_enabled()
    ours = kind is not Broadcasts and (training or not learns)
    assert any(name.startswith("batch_norm") for name in ran()) is ours


@pytest.mark.parametrize("kind", [PreActivation, TwoNorms, Broadcasts, NormFirst, AddsTheArgument, ResizesTheArgument])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_autocast_leaves_norms_and_sums_their_dtype(kind, dtype: torch.dtype, training: bool) -> None:
    torch.manual_seed(0)
    plain = randomised(kind()).train(training)
    fast = accelerate(copy.deepcopy(plain))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        actual, own = fast(image().to(dtype)), plain(image().to(dtype))
    assert actual.dtype == own.dtype
    assert (actual - own).float().norm() <= 0.01 * own.float().norm()


@pytest.mark.parametrize("change", ["weight", "affine", "running", "frozen"])
def test_norms_without_parameters_or_statistics(change: str) -> None:
    torch.manual_seed(0)
    plain = randomised(TwoNorms())
    if change == "weight":
        plain.norm.weight = None
    elif change == "frozen":
        plain.norm2.requires_grad_(False).eval()
    else:
        plain.norm2 = nn.BatchNorm2d(3, affine=change == "running", track_running_stats=change == "affine")
    fast = accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        for mode in (True, False):
            torch.testing.assert_close(fast.train(mode)(image()), plain.train(mode)(image()), rtol=1e-4, atol=1e-5)


class Resizes(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.up = nn.Upsample(mode="bilinear", **options)

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat((self.up(x[0]), x[1]), 1)


@pytest.mark.parametrize(
    ("options", "native_too"),
    [({"size": (9, 14)}, True), ({"scale_factor": 2, "align_corners": True}, False), ({"scale_factor": 2.0}, False)],
    ids=str,
)
def test_only_the_same_resize_is_replaced(options: dict, native_too: bool) -> None:
    """9 x 14 from 4 x 7: twice the size is 8 x 14, and does not fit, with the same error."""
    model = Resizes(**options)
    fast = accelerate(copy.deepcopy(model))
    for height in (9, 8):
        x = [image(1, 4, 4, 7), image(1, 3, height, 14)]
        if (height == 9) is native_too:
            torch.testing.assert_close(fast(x), model(x))
            assert "upsample_concat" in ran()
        else:
            with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
                fast(x)


def test_a_size_that_code_cannot_hold_is_left_alone() -> None:
    model = Resizes(size=(np.int64(9), np.int64(14)))
    x = [image(1, 4, 4, 7), image(1, 3, 9, 14)]
    torch.testing.assert_close(accelerate(copy.deepcopy(model))(x), model(x))
    assert "upsample_concat" not in ran()


def test_what_is_called_is_recorded_as_the_plain_model(network) -> None:
    """Exported (for any size too), compiled, scripted, traced: no op of this project, and the same results."""
    plain = Understood().eval()
    fast, x = accelerate(copy.deepcopy(plain)), image()
    size = {2: torch.export.Dim("height"), 3: torch.export.Dim("width")}
    graphs = [
        torch.export.export(fast, (x,), dynamic_shapes=(size,)).module(),
        torch.jit.script(fast),
        torch.jit.trace(fast, x),
        torch.fx.symbolic_trace(fast),
        torch.compile(fast, backend="eager", fullgraph=True),
    ]
    y = plain(x)
    dispatch._last.clear()  # tracing compares with the model itself
    for graph in graphs:
        torch.testing.assert_close(graph(x), y, rtol=0, atol=0)
    assert not ran() and accelerated(fast) == {"batch norm, ReLU": 1}
    assert "deeplab_fast" not in str(graphs[0].graph) + str(graphs[1].inlined_graph) + str(graphs[2].inlined_graph)
    whole = torch.export.export(accelerate(network.eval()), (image(),))
    assert "deeplab_fast" not in str(whole.graph) and "batch_norm" in str(whole.graph)
    root = nn.Sequential(plain)
    tracer = torch.fx.Tracer()
    tracer.is_leaf_module = lambda module, name: True
    with pytest.raises(UserError, match="found nothing to replace"):
        accelerate(torch.fx.GraphModule(root, tracer.trace(root)))


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_transforms_and_other_tensors_get_the_plain_model() -> None:
    plain = randomised(Understood()).eval()
    fast, x = accelerate(copy.deepcopy(plain)), image(4, 2, 3, 5, 6)
    values = {name: value.detach() * 2 for name, value in plain.named_parameters()}

    def energy(parameters: dict[str, Tensor], model: nn.Module) -> Tensor:
        return torch.func.functional_call(model, parameters, (x[0],)).square().sum()

    transforms = [
        lambda model: torch.func.vmap(model)(x),
        lambda model: torch.func.jvp(model, (x[0],), (x[1],))[1],
        lambda model: torch.func.functional_call(model, values, (x[0],)),
        lambda model: torch.func.grad(energy)(values, model)["norm.weight"],
    ]
    for transform in transforms:
        torch.testing.assert_close(transform(fast), transform(plain), rtol=1e-4, atol=1e-4)
    assert copy.deepcopy(fast).to("meta")(x[0].to("meta")).device.type == "meta"
    with Names() as seen, torch.no_grad():
        fast(x[0])
    assert seen.names and not any("deeplab_fast" in name for name in seen.names)


def test_layout_is_of_four_dimensions() -> None:
    model = Understood()
    model.other = nn.Conv3d(3, 3, 3)
    assert accelerate(model).other.weight.dim() == 5


def test_layout_of_shared_memory_is_left_alone() -> None:
    model, flat = Understood(), torch.zeros(3 * 3 * 3 * 3 + 1)
    model.conv.weight = nn.Parameter(torch.randn(3, 3, 2, 2))
    model.conv.share_memory()
    model.conv2.weight.data = flat[1:].view(3, 3, 3, 3)
    buffer = model.register_buffer("kept", torch.zeros(1, 2, 3, 3)) or model.kept
    accelerate(model)
    assert model.conv.weight.is_shared() and model.kept is buffer
    flat.fill_(1)
    assert model.conv2.weight.eq(1).all()


def test_layers_that_have_no_weights_yet_are_left_alone() -> None:
    model = accelerate(nn.Sequential(Understood(), nn.LazyConv2d(4, 3)))
    assert model(image(1, 3, 5, 6)).shape == (1, 4, 3, 4)


def test_layout_is_an_option(network) -> None:
    def packed(model: nn.Module) -> bool:
        return model.backbone["layer1"][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)

    plain = accelerate(copy.deepcopy(network), channels_last=False)
    assert packed(accelerate(network)) and not packed(plain)
    torch.testing.assert_close(plain.eval()(image()), network.eval()(image()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Linear(2, 2), "found nothing to replace in Linear"),
        (lambda: build_model(num_classes=2), "models of deeplab_fast are made of its layers already"),
        (lambda: "model.pt", "accelerate was given a str: expected a torch.nn.Module"),
    ],
    ids=["linear", "own", "path"],
)
def test_nothing_to_replace_is_one_sentence(model, said: str) -> None:
    with pytest.raises(UserError, match=said):
        accelerate(model())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_the_benchmark_times_no_wrong_result(monkeypatch, dtype: str) -> None:
    def make() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, benchmark.CLASSES, 1, bias=False), nn.BatchNorm2d(benchmark.CLASSES), nn.ReLU()
        )

    def spoiled(make) -> dict[str, nn.Module]:
        models = variants(make)
        with torch.no_grad():
            models["accelerated"][1].bias.add_(0.5)
        return models

    variants = benchmark.variants
    for name, value in {"IMAGE": (1, 9, 8), "BATCH": (2, 9, 8), "DTYPES": {dtype: benchmark.DTYPES[dtype]}}.items():
        monkeypatch.setattr(benchmark, name, value)
    assert len(benchmark.measure(make)) == len(benchmark.CASES)
    monkeypatch.setattr(benchmark, "variants", spoiled)
    with pytest.raises(SystemExit, match=f"inference, {dtype}: accelerated is .* nothing was timed"):
        benchmark.measure(make)


def test_the_committed_table_and_readme_are_of_the_committed_figures() -> None:
    path = benchmark.RESULTS / "accelerate.json"
    about = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == benchmark.table(about)
    readme = (benchmark.RESULTS.parent.parent / "README.md").read_text()
    for cases in about["results"].values():
        rows = cases.values()
        cells = [f"{row['channels_last_ratio']:.2f} ({row['as_it_is_ratio']:.2f})" for row in rows]
        assert len(cells) == 4 and " | ".join(cells) in readme
