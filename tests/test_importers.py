"""Files of other projects: rebuilt from their tables (`restated.py`), loaded, and compared by what they compute."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import deeplab_fast
from deeplab_fast.errors import UserError
from deeplab_fast.model import build_model
from deeplab_fast.model.importers import Loaded, load_weights
from deeplab_fast.model.importers.tensors import absolute_scales
from deeplab_fast.ops.normalize_image import MEAN, STD

from . import restated as peers
from .restated import RESNET50, RESNET101

# Each with the number of tensors that a file of the published ResNet-101 (or the MobileNetV2) holds.
PEERS: dict[str, tuple[Callable[[tuple[int, ...]], nn.Module], int]] = {
    "jfzhang95": (lambda depths: peers.Jfzhang95(5, depths), 680),
    "hualin95": (lambda depths: peers.Hualin95(5, depths), 680),
    "CoinCheung": (lambda depths: peers.CoinCheung(5, depths, konami86=False), 569),
    "konami86": (lambda depths: peers.CoinCheung(5, depths, konami86=True), 569 + 33 + 4),
    "chenxi116": (lambda depths: peers.Chenxi116(5, depths, group=False), 662),
    "chenxi116 GN": (lambda depths: peers.Chenxi116(5, depths, group=True), 332),
    "zym1119": (lambda _: peers.Zym1119(5), 416),
    "VainF": (lambda depths: peers.Vainf(5, depths), 674),
    "VainF v3": (lambda depths: peers.Vainf(5, depths, plus=False), 668),
    "VainF separable": (lambda depths: peers.Vainf(5, depths, separable=True), 678),
    "VainF MobileNetV2": (lambda _: peers.Vainf(5, None), 306 + 50),
}


def randomise(peer: nn.Module) -> nn.Module:
    """Every norm, bias and scale away from where it starts, so that a swapped or left-out one shows."""
    generator = torch.Generator().manual_seed(0)
    for key, value in peer.state_dict().items():
        if value.dim() == 1 and key.endswith(("running_var", "weight")):
            value.uniform_(0.5, 1.5, generator=generator)
        elif value.dim() == 1:
            value.uniform_(-0.1, 0.1, generator=generator)
    for module in peer.modules():
        if isinstance(module, peers.InPlaceABN):  # it takes the sign off
            module.weight.data *= torch.randint(0, 2, module.weight.shape, generator=generator) * 2 - 1
    return peer.eval()


@pytest.fixture
def written(tmp_path: Path) -> Callable[..., Path]:
    def write(state: dict, **others: object) -> Path:
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, **others}, tmp_path / "file.pth")
        return tmp_path / "file.pth"

    return write


def assert_same(actual: Tensor, expected: Tensor) -> None:
    scale = expected.abs().max().item()
    assert actual.shape == expected.shape and scale > 1e-3
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * scale)


@torch.no_grad()
@pytest.mark.parametrize("name", PEERS)
def test_a_built_model_computes_the_graph_of_the_file(name: str, written: Callable[..., Path]) -> None:
    torch.manual_seed(0)
    peer = randomise(PEERS[name][0](RESNET50))
    loaded = load_weights(None, written(peer.state_dict()))
    assert isinstance(loaded, Loaded) and not loaded.missing and not loaded.left_over
    assert name.split()[0] in loaded.source
    x = torch.randn(1, 3, 97, 130)
    theirs = x
    if name == "zym1119":  # it was given BGR in 0 ... 1
        theirs = (x * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)).flip(1)
    assert_same(loaded.model.predict_logits(x), peer(theirs))


@pytest.mark.parametrize("name", PEERS)
def test_restated_files_have_the_published_number_of_tensors(name: str) -> None:
    build, count = PEERS[name]
    with torch.device("meta"):
        assert len(build(RESNET101).state_dict()) == count


def test_the_depth_is_counted(written: Callable[..., Path]) -> None:
    with torch.device("meta"):
        state = peers.Chenxi116(3, RESNET101, group=True).state_dict()
    with pytest.raises(UserError, match=r"its ResNet has \(3, 4, 22, 3\) blocks, expected one of resnet18"):
        path = written({k: torch.zeros(1) for k in state if "layer3.22" not in k})
        load_weights(None, path)


@pytest.fixture(scope="module")
def hualin95() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return randomise(peers.Hualin95(5, RESNET50)).state_dict()


GRAPH = {"backbone": "resnet50", "separable": False, "align_corners": True, "dropout": 0.5}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("output_stride", [16, 8])
def test_a_given_model_gets_the_same_weights(written, hualin95: dict, output_stride: int) -> None:
    path = written(hualin95)
    model = build_model(num_classes=5, output_stride=output_stride, **GRAPH)
    loaded = deeplab_fast.load_weights(model, path)
    assert loaded.model is model and model.training
    assert same(model.state_dict(), load_weights(None, path).model.state_dict())


def test_fields_that_no_file_tells_are_given(written, hualin95: dict) -> None:
    loaded = load_weights(None, written(hualin95), output_stride=8, norm="frozen_batch")
    assert loaded.model.output_stride == 8 and not loaded.model.training
    assert loaded.model.backbone.layer4[0].conv2.dilation == (4, 4)
    assert [branch.conv.dilation[0] for branch in loaded.model.aspp.branches] == [1, 12, 24, 36]
    assert loaded.fields["output_stride"] == 8 and loaded.fields["num_classes"] == 5
    assert not any(p.requires_grad for p in loaded.model.backbone.bn1.parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"multi_grid": (1, 2, 4)},
            r"another graph: backbone.layer4.1.conv2 \(stride, padding, dilation\) is .* and 1 more",
        ),
        ({"first_block_dilation": "previous"}, "another graph: backbone.layer4.0.conv2"),
        (
            {"align_corners": False},
            "another graph: align_corners is False in the model and was True; .*align_corners True",
        ),
        ({"pixels": "symmetric"}, "another graph: pixels is symmetric in the model and was imagenet"),
        ({"activation": "leaky_relu"}, "another graph: backbone.activation is leaky_relu in the model and was relu"),
    ],
    ids=str,
)
def test_a_model_of_another_graph_is_refused(written, hualin95: dict, change: dict, message: str) -> None:
    with torch.device("meta"):
        model = build_model(num_classes=5, **{**GRAPH, **change})
    path = written(hualin95)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(model, path)
    assert str(path) in str(caught.value)


def test_mismatches_are_named_and_the_model_stays(written, hualin95: dict) -> None:
    model = build_model(num_classes=5, **GRAPH)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    for change, message in (
        (lambda s: s.pop("decoder.conv2.weight"), "lacks decoder.refinements.0.conv.weight: expected"),
        (lambda s: s.update({"extra.bias": torch.ones(1)}), "holds extra.bias, unknown to the model: expected"),
        (lambda s: s.update({"decoder.conv4.weight": torch.ones(7, 256, 1, 1), "decoder.conv4.bias": torch.ones(7)}),
         r"has classifier.weight of \(7, 256, 1, 1\) where the model has \(5, 256, 1, 1\): expected"),
    ):  # fmt: skip
        state = dict(hualin95)
        change(state)
        with pytest.raises(UserError, match=f"file.pth, a file of hualin95/Deeplab-v3plus, {message}"):
            load_weights(model, written(state))
        assert same(model.state_dict(), before)


def test_partial_takes_what_fits_and_lists_the_rest(written, hualin95: dict) -> None:
    state = {**hualin95, "extra.bias": torch.ones(1), "decoder.conv4.weight": torch.ones(7, 256, 1, 1)}
    del state["decoder.conv2.weight"]
    model = build_model(num_classes=5, **{**GRAPH, "align_corners": False})
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = load_weights(model, written(state), partial=True)
    assert set(loaded.missing) == {"decoder.refinements.0.conv.weight", "classifier.weight"}
    assert set(loaded.left_over) == {"extra.bias", "classifier.weight"}
    after = model.state_dict()
    assert torch.equal(after["classifier.weight"], before["classifier.weight"])
    assert torch.equal(after["backbone.conv1.weight"], hualin95["Resnet101.conv1.weight"])


def test_a_classifier_of_other_classes_may_stay(written, hualin95: dict) -> None:
    model = build_model(num_classes=3, **GRAPH)
    loaded = load_weights(model, written(hualin95), new_classifier=True)
    assert loaded.missing == loaded.left_over == ("classifier.weight", "classifier.bias")
    assert torch.equal(model.state_dict()["backbone.conv1.weight"], hualin95["Resnet101.conv1.weight"])


def test_inplace_abn_scales_by_the_absolute_weight_and_an_epsilon() -> None:
    plain = {f"plain.{k}": torch.tensor([-2.0]) for k in ("weight", "running_mean", "num_batches_tracked")}
    state = absolute_scales({"abn.weight": torch.tensor([0.0, -2.0]), "abn.running_mean": torch.zeros(2), **plain})
    torch.testing.assert_close(state["abn.weight"], torch.tensor([1e-5, 2.00001]), rtol=1e-6, atol=0)
    assert state["plain.weight"] == -2


@pytest.mark.parametrize("legacy", [False, True])
def test_a_training_scripts_dictionary(tmp_path: Path, legacy: bool) -> None:
    """With NumPy's numbers and the optimiser's state, in either of torch's formats."""
    state = build_model(backbone="resnet18", num_classes=2).backbone.state_dict()
    content = {"epoch": 3, "best_pred": np.float64(0.78), "optimizer": {"state": {}}, "model_state": state}
    torch.save(content, tmp_path / "file.pth.tar", _use_new_zipfile_serialization=not legacy)
    loaded = load_weights(None, tmp_path / "file.pth.tar", num_classes=4)
    assert loaded.source == "torchvision's backbone" and loaded.fields["backbone"] == "resnet18"
    assert same(loaded.model.backbone.state_dict(), state)
    assert loaded.missing and not any(k.startswith("backbone.") for k in loaded.missing)


def test_a_backbone_alone_needs_the_classes(tmp_path: Path) -> None:
    backbone = build_model(backbone="mobilenet_v2", width_mult=0.5, num_classes=2).backbone
    state = {**backbone.state_dict(), "classifier.1.weight": torch.ones(2, 2), "features.18.0.weight": torch.ones(1)}
    torch.save(state, tmp_path / "file.pth")
    with pytest.raises(UserError, match="torchvision's backbone has no classifier .* expected num_classes, or a model"):
        load_weights(None, tmp_path / "file.pth")
    loaded = load_weights(None, tmp_path / "file.pth", num_classes=4)
    assert loaded.fields["width_mult"] == 0.5 and same(loaded.model.backbone.state_dict(), backbone.state_dict())
    assert set(loaded.left_over) == {"backbone.classifier.1.weight", "backbone.features.18.0.weight"}
    # The same into a model that has other dilations: a backbone's weights bind no graph.
    model = build_model(backbone="mobilenet_v2", width_mult=0.5, num_classes=2, output_stride=8)
    assert set(load_weights(model, tmp_path / "file.pth").missing) == set(loaded.missing)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"a.weight": 1, "b.weight": 1},
            "no project's layout that is known; its tensors begin with a.weight, b.weight",
        ),
        (
            {"aspp.conv_out.conv.weight": 1, "aspp.conv1x1.conv.weight": 1},
            "image pooling that CoinCheung/.* pads wrongly",
        ),
        ({"aspp.aspp1_bn.weight": 1, "conv1.0.weight": 1}, "trained with --beta: three convolutions"),
        (
            {"aspp.aspp1.atrous_conv.weight": 1, "backbone.conv1.weight": 1},
            "with a ResNet can be read, this has another",
        ),
        (
            {"aspp.aspp1.atrous_conv.weight": 1, "backbone.block20.rep.1.conv1.weight": 1},
            "with a ResNet can be read, this has an Xception that is not xception65: its decoder reads",
        ),
        ({"aspp.aspp1.atrous_conv.weight": 1, "backbone.layer0.0.weight": 1}, "can be read, this has a DRN"),
        (
            {"aspp.aspp1.atrous_conv.weight": 1, "backbone.features.0.0.weight": 1},
            "can be read, this has a MobileNetV2",
        ),
        ({"classifier.aspp.convs.0.0.weight": 1}, "with a ResNet or MobileNetV2 can be read, this has another"),
        (
            {"classifier.aspp.convs.0.0.weight": 1, "backbone.block12.rep.1.conv1.weight": 1},
            "with a ResNet or MobileNetV2 can be read, this has Chollet's Xception: max pooling",
        ),
        (
            {
                "classifier.classifier.0.convs.0.0.weight": 1,
                "backbone.layer1.0.conv1.weight": 1,
                "backbone.stage4.0.branches.0.0.conv1.weight": 1,
            },
            "with a ResNet or MobileNetV2 can be read, this has an HRNet",
        ),
        ({"classifier.0.convs.0.0.weight": 1, "backbone.0.0.weight": 1}, "MobileNetV3 for a backbone"),
        ({"aspp.branches.0.conv.weight": 1}, "is a checkpoint of this project: evaluate, predict and train --weights"),
        ({"21.conv11.0.weight": 1}, "a file of zym1119/.* without 'backbone.features.0.0.weight', expected a whole"),
    ],
    ids=str,
)
def test_files_that_cannot_be_read_say_why(tmp_path: Path, state: dict, message: str) -> None:
    torch.save({k: torch.ones(v) for k, v in state.items()}, tmp_path / "file.pth")
    with pytest.raises(UserError, match=f"file.pth.* {message}"):
        load_weights(None, tmp_path / "file.pth")


def test_a_given_model_takes_no_fields(written, hualin95: dict) -> None:
    with torch.device("meta"):
        model = build_model(num_classes=5, **GRAPH)
    with pytest.raises(UserError, match="output_stride: a model that is given is what it is"):
        load_weights(model, written(hualin95), output_stride=8)
