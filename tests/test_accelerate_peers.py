"""`accelerate` on the DeepLabs of segmentation_models_pytorch and torchvision, with encoders of timm too."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deeplab_fast import accelerate, accelerated, ops
from deeplab_fast.ops import dispatch, native

pytestmark = [
    pytest.mark.usefixtures("torchvision_imports"),
    pytest.mark.skipif(native.load() is None, reason="deeplab_fast._C is not built"),
]


def built(name: str) -> nn.Module:
    """torchvision's `name`, or segmentation_models_pytorch's "Kind encoder"; norms away from 0 and 1, no dropout."""
    models = pytest.importorskip("torchvision.models", exc_type=(ImportError, RuntimeError))
    torch.manual_seed(0)
    kind, _, encoder = name.partition(" ")
    if encoder:
        smp = pytest.importorskip("segmentation_models_pytorch")
        model = getattr(smp, kind)(encoder, encoder_weights=None, classes=5)
    else:
        model = getattr(models.segmentation, name)(weights=None, weights_backbone=None, num_classes=5, aux_loss=True)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_var.uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.5, 0.5)
            module.running_mean.uniform_(-0.5, 0.5)
    return model


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y["out"] + y["aux"].mean() if isinstance(y, dict) else y


def outcome(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Logits in training mode, gradients, buffers after that, and logits in eval mode, in fp64."""
    y = logits(model.train(), x)
    y.square().mean().backward()
    parts = [y.detach(), torch.cat([p.grad.flatten() for p in model.parameters()])]
    parts.append(torch.cat([b.flatten().double() for b in model.buffers()]))
    with torch.inference_mode():
        parts.append(logits(model.eval(), x))
    return [part.double() for part in parts]


def assert_as_near(actual: list[Tensor], plain: list[Tensor], exact: list[Tensor], *, kinks: bool) -> None:
    """The outcome has about the plain model's error. kinks: but for gradients, where ReLUs open or shut by rounding:
    the plain models' differ by up to a hundredth for an input that differs by a millionth."""
    for i, (a, b, truth) in enumerate(zip(actual, plain, exact, strict=True)):
        allowed = 0.1 if kinks and i == 1 else 2e-5
        assert truth.norm() > 0
        assert (a - truth).norm() <= 10 * (b - truth).norm() + allowed * truth.norm(), i


def smooth(model: nn.Module) -> nn.Module:
    """The model with norms whose results lie between 3 and 6: the same side of every kink."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.05, 0.15)
            module.bias.data.fill_(4.5)
    return model


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("deeplabv3_resnet50", {"batch norm, sum, ReLU": 16, "batch norm, ReLU": 40, "concatenation": 1}),
        (
            "deeplabv3_mobilenet_v3_large",
            {"batch norm, ReLU, depthwise convolution, batch norm, ReLU": 5, "batch norm, sum": 5},
        ),
        ("DeepLabV3 resnet18", {"batch norm, sum, ReLU": 8, "concatenation": 1}),
        ("DeepLabV3Plus resnet18", {"separable convolution, batch norm, ReLU": 5, "upsampling, concatenation": 1}),
        (
            "DeepLabV3Plus mobilenet_v2",
            {"batch norm, ReLU6, depthwise convolution, batch norm, ReLU6": 16, "batch norm, sum": 10},
        ),
        ("DeepLabV3Plus tu-resnet18", {"batch norm, sum, ReLU": 8, "upsampling, concatenation": 1}),
        ("DeepLabV3Plus tu-mobilenetv3_small_050", {"depthwise convolution": 11}),
    ],
)
def test_gives_the_same(name: str, least: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_last", {})
    model = built(name)
    fast, exact = accelerate(copy.deepcopy(model)), copy.deepcopy(model).double()
    found = accelerated(fast)
    assert {what: found.get(what, 0) for what in least} == least, found
    x = torch.randn(4, 3, 64, 64)
    actual = outcome(fast, x)
    assert dispatch.last_backend("batch_norm_act") == dispatch.last_backend("batch_norm_act_inference") == "native"
    if "Plus" in name:
        assert dispatch.last_backend("upsample_concat") == dispatch.last_backend("separable_conv") == "native"
    assert_as_near(actual, outcome(model, x), outcome(exact, x.double()), kinks=True)
    assert fast.state_dict().keys() == model.state_dict().keys() and repr(fast) == repr(model)


@pytest.mark.parametrize(
    "name", ["deeplabv3_mobilenet_v3_large", "DeepLabV3Plus resnet18", "DeepLabV3Plus mobilenet_v2"]
)
def test_gradients(name: str) -> None:
    model = smooth(built(name))
    fast, exact = accelerate(copy.deepcopy(model)), copy.deepcopy(model).double()
    x = torch.randn(4, 3, 64, 64)
    assert_as_near(outcome(fast, x), outcome(model, x), outcome(exact, x.double()), kinks=False)


def test_low_resolution_logits_as_in_the_readme() -> None:
    model = accelerate(built("DeepLabV3Plus resnet18")).eval()
    x, mask = torch.randn(2, 3, 64, 96), torch.randint(0, 5, (2, 64, 96), dtype=torch.uint8)
    with torch.no_grad():
        head, *_ = model.segmentation_head
        low = head(model.decoder(model.encoder(x)))
        loss, _, _ = ops.upsample_cross_entropy(low, mask, align_corners=True)
        labels = ops.upsample_argmax(low, x.shape[-2:], align_corners=True)
        full = model(x)
    torch.testing.assert_close(loss, F.cross_entropy(full, mask.long()), rtol=1e-4, atol=1e-5)
    assert (labels == full.argmax(1)).float().mean() > 0.999
