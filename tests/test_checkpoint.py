"""Checkpoints: whole or not at all, and readable without running code."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import signal
import subprocess
import sys
import textwrap

import pytest
import torch

from deeplab_fast import checkpoint
from deeplab_fast.config import Config, ModelConfig, RunConfig
from deeplab_fast.data.labels import CAMVID
from deeplab_fast.errors import UserError

SMALL = ModelConfig(backbone="resnet18", aspp_channels=8, decoder_channels=8, low_level_channels=4)


def content(config: Config) -> dict:
    torch.manual_seed(0)
    model = checkpoint.build(config, CAMVID)
    return {
        "step": 3,
        "model": model.state_dict(),
        "config": config.to_dict(),
        "classes": checkpoint.classes_to_dict(CAMVID),
        "metrics": None,
    }


def test_model_comes_back_with_config_and_classes(tmp_path):
    config = dataclasses.replace(Config(), model=SMALL)
    saved = content(config)
    checkpoint.save(tmp_path / "best.pt", saved)
    model, loaded, classes = checkpoint.load_model(tmp_path / "best.pt")
    assert loaded == config and classes == CAMVID and not model.training
    torch.testing.assert_close(model.state_dict(), saved["model"], rtol=0, atol=0)


@pytest.mark.parametrize("rates", [None, (2, 4)])
@pytest.mark.parametrize("backbone", ["resnet18", "xception41"])
def test_at_half_the_output_stride_every_second_logit_is_the_old_one(tmp_path, backbone, rates):
    """Without the image pooling, whose mean is over more values; it holds only if ASPP's rates are doubled, too."""
    other = {"name": "deeplabv3", "image_pooling": False, "first_block_dilation": "previous", "atrous_rates": rates}
    config = Config(model=dataclasses.replace(SMALL, backbone=backbone, **other))
    checkpoint.save(tmp_path / "best.pt", content(config))
    x = torch.randn(1, 3, 129, 97, generator=torch.Generator().manual_seed(0))
    coarse = checkpoint.load_model(tmp_path / "best.pt")[0]
    dense, loaded, _ = checkpoint.load_model(tmp_path / "best.pt", output_stride=8)
    assert loaded.model.output_stride == dense.output_stride == 8
    with torch.no_grad():
        expected, found = coarse(x), dense(x)
    assert expected.shape[-2:] == (9, 7) and found.shape[-2:] == (17, 13) and expected.std() > 0
    torch.testing.assert_close(found[..., ::2, ::2], expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


def test_rates_that_would_not_stay_whole_are_named():
    with pytest.raises(UserError, match=r"--output-stride 32: ASPP's rates \(3, 6\) at output stride 16 would not"):
        checkpoint.at_output_stride(ModelConfig(atrous_rates=(3, 6)), 32)


@pytest.mark.parametrize("channels_last", [True, False])
def test_weights_lie_as_the_inputs_will(tmp_path, channels_last):
    config = dataclasses.replace(Config(), model=SMALL, run=RunConfig(channels_last=channels_last))
    checkpoint.save(tmp_path / "best.pt", content(config))
    model, _, _ = checkpoint.load_model(tmp_path / "best.pt")
    weight = model.backbone.conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert weight.is_contiguous() != channels_last


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (None, "no such weights file"),
        (lambda path: path.write_bytes(b"\x00" * 100), "not a readable weights file"),
        (lambda path: path.write_bytes(b""), "not a readable weights file"),
        (lambda path: path.write_text("hello"), "not a readable weights file"),
        (lambda path: torch.save({"model": {}}, path), "not a checkpoint of this project"),
        (lambda path: torch.save([1, 2], path), "not a checkpoint of this project"),
    ],
)
def test_other_files_are_one_sentence(tmp_path, make, message):
    path = tmp_path / "x.pt"
    if make:
        make(path)
    with pytest.raises(UserError, match=rf"x\.pt: {message}") as error:
        checkpoint.load(path)
    assert "\n" not in str(error.value)


def test_truncated_file_is_one_sentence(tmp_path):
    path = tmp_path / "cut.pt"
    checkpoint.save(path, {"model": {"w": torch.zeros(1000)}})
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(UserError, match=r"cut\.pt: not a readable weights file"):
        checkpoint.load(path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "ran"),))

    torch.save({"format": checkpoint.FORMAT, "x": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="not a readable weights file"):
        checkpoint.load(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


WRITER = """
    import itertools, sys, torch
    from deeplab_fast import checkpoint
    for number in itertools.count():
        checkpoint.save(sys.argv[1], {"number": number, "model": torch.full((3_000_000,), float(number))})
        print(number, flush=True)
"""


@pytest.mark.parametrize("delay_ms", [0, 3, 7, 12, 20])
def test_kill_during_a_write_leaves_a_whole_file(tmp_path, delay_ms):
    """SIGKILL at different moments of an endless series of writes."""
    path = tmp_path / "last.pt"
    command = [sys.executable, "-c", textwrap.dedent(WRITER), str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        for _ in range(3):
            done = int(writer.stdout.readline())
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(delay_ms / 1000)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    loaded = checkpoint.load(path)
    assert loaded["number"] >= done
    assert torch.equal(loaded["model"], torch.full((3_000_000,), float(loaded["number"])))
    # The remains of the killed write do not grow in number, and the next write takes them over.
    checkpoint.save(path, {"number": -1})
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
    assert checkpoint.load(path)["number"] == -1


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on file sizes")
def test_full_disk_is_one_sentence_and_keeps_the_old_file(tmp_path):
    """A limit on file sizes stands for the full disk: the write fails half way with an OSError of the same kind."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, {"number": 1})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"last\.pt cannot be written: .*"):
            checkpoint.save(path, {"number": 2, "model": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert checkpoint.load(path)["number"] == 1
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]
