"""`accelerate` on networks made of the parts of other projects: same numbers, same model, and nothing guessed at."""

from __future__ import annotations

import copy
import json
import pickle
import random
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

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
    "batch norm, ReLU": 6,
    "batch norm, ReLU6": 1,
    "batch norm, sum": 1,
    "batch norm, sum, ReLU": 2,
    "concatenation": 1,
    "depthwise convolution, batch norm, ReLU6": 1,
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
        *("batch_norm_act", "batch_norm_act_backward", "depthwise_conv", "depthwise_conv_statistics"),
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


def synchronised(model: nn.Module) -> None:
    model.decoder = nn.SyncBatchNorm.convert_sync_batchnorm(model.decoder)


@pytest.mark.parametrize(
    "change",
    [
        *(replace_norm, remove_norm, other_activation, longer_sequence, no_shortcut, own_forward, parametrised),
        *(other_upsampling, synchronised),
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


class Refused(nn.Module):
    """A norm and an activation in a forward that a graph would not tell all of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1, bias=False)
        self.norm = nn.BatchNorm2d(3)
        self.calls = 0
        self.scale = 2 * torch.ones(1)

    def body(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)))


class AsksForType(Refused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if isinstance(x, Tensor) else y * 2


class Draws(Refused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if random.random() < 2 else x


class DrawsFromTorch(Refused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y if torch.rand(()) < 2 else x


class Counts(Refused):
    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.body(x)


class MovesABuffer(Refused):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("moved", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.moved.add_(1)
        return self.body(x)


class LooseTensor(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) * self.scale


class LooksAtValues(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if x.sum() < 1e9 else x


class TakesTwo(Refused):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = self.body(x)
        return y if mask is None else y * 2


REFUSED = [AsksForType, Draws, DrawsFromTorch, Counts, MovesABuffer, LooseTensor, LooksAtValues, TakesTwo]


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_understood_is_left_alone(kind) -> None:
    torch.manual_seed(0)
    model, plain = nn.Sequential(kind(), nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU()), kind()
    before = dict(vars(model[0]))
    state = torch.get_rng_state(), random.getstate()
    accelerate(model)
    assert type(model[0]) is kind and accelerated(model) == {"batch norm, ReLU": 1}
    assert all(vars(model[0])[key] is value for key, value in before.items()) and len(vars(model[0])) == len(before)
    assert not any(b.any() for b in model[0].buffers(recurse=False))
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]
    with pytest.raises(UserError, match=f"found nothing to replace in {kind.__name__}"):
        accelerate(plain)


class Understood(Refused):
    """The same without what is refused: the test above must not pass because nothing ever is replaced."""

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_the_same_module_is_understood() -> None:
    assert accelerated(accelerate(Understood())) == {"batch norm, ReLU": 1}


class SumIntoShortcut(Refused):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shortcut = x * 2
        y = shortcut
        y += self.norm(self.conv(x))
        return y, shortcut


class Broadcasts(Refused):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + x.mean((2, 3), keepdim=True))


class WritesBetween(Refused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        y.zero_()
        return F.relu(z) + y


class ReadTwice(Refused):
    def forward(self, x: Tensor) -> Tensor:
        z = self.norm(self.conv(x))
        return F.relu(z) + z


class TrainsOtherwise(Refused):
    def forward(self, x: Tensor) -> Tensor:
        y = self.body(x)
        return y * 2 if self.training else F.dropout(y, 0.5, self.training)


@pytest.mark.parametrize("kind", [SumIntoShortcut, Broadcasts, WritesBetween, ReadTwice, TrainsOtherwise])
@pytest.mark.parametrize("training", [True, False])
def test_who_reads_and_writes_what_is_kept(kind, training: bool) -> None:
    torch.manual_seed(0)
    plain = randomised(kind()).train(training)
    fast = accelerate(copy.deepcopy(plain))
    with torch.no_grad():
        torch.testing.assert_close(fast(image()), plain(image()), rtol=1e-4, atol=1e-5)
    assert any(name.startswith("batch_norm") for name in ran()) is (kind is not Broadcasts)


class Resizes(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options, self.child = options, nn.Identity()

    def forward(self, x: list[Tensor]) -> Tensor:
        return torch.cat((F.interpolate(x[0], mode="bilinear", **self.options), x[1]), 1)


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


def test_layout_is_an_option(network) -> None:
    def packed(model: nn.Module) -> bool:
        return model.backbone["layer1"][0].conv1.weight.is_contiguous(memory_format=torch.channels_last)

    plain = accelerate(copy.deepcopy(network), channels_last=False)
    assert packed(accelerate(network)) and not packed(plain)
    torch.testing.assert_close(plain.eval()(image()), network.eval()(image()), rtol=1e-4, atol=1e-5)


def test_exported_it_is_the_plain_model(network) -> None:
    exported = torch.export.export(accelerate(network.eval()), (image(),))
    assert "deeplab_fast" not in str(exported.graph) and "batch_norm" in str(exported.graph)


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


def test_the_committed_table_and_readme_are_of_the_committed_figures() -> None:
    path = benchmark.RESULTS / "accelerate.json"
    about = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == benchmark.table(about)
    readme = (benchmark.RESULTS.parent.parent / "README.md").read_text()
    for cases in about["results"].values():
        rows = cases.values()
        cells = [f"{row['channels_last_ratio']:.2f} ({row['as_it_is_ratio']:.2f})" for row in rows]
        assert len(cells) == 4 and " | ".join(cells) in readme
