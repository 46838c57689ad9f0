"""Models of other projects before and after `deeplab_fast.accelerate`: an image to its logits, and a training step.

python -m benchmarks.accelerate   needs segmentation_models_pytorch and torchvision. Writes results/accelerate.json and,
from it, results/accelerate.md; `python -m benchmarks.accelerate table` writes the latter alone.

Each case runs the model as it is made (NCHW), the same in channels-last, and accelerated, in turns; a result that
differs is not timed. Inference is of one image under torch.inference_mode(), a training step is forward, cross entropy
at full resolution, backward and SGD.
"""

from __future__ import annotations

import contextlib
import copy
import json
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.ratios import CPU, RESULTS, describe, seconds
from deeplab_fast import accelerate
from deeplab_fast.device import set_allocator

CLASSES = 21
ROUNDS, WARM_UP = 3, 2
IMAGE, BATCH = (1, 512, 512), (4, 128, 128)
DTYPES = {"fp32": None, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-3, "bf16": 0.2}  # of the norm of the fp32 logits, or of the loss


def smp(encoder: str) -> nn.Module:
    import segmentation_models_pytorch

    return segmentation_models_pytorch.DeepLabV3Plus(encoder, encoder_weights=None, classes=CLASSES)


def torchvisions() -> nn.Module:
    from torchvision.models.segmentation import deeplabv3_resnet50

    return deeplabv3_resnet50(weights=None, weights_backbone=None, num_classes=CLASSES)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "segmentation_models_pytorch DeepLabV3Plus, mobilenet_v2": lambda: smp("mobilenet_v2"),
    "segmentation_models_pytorch DeepLabV3Plus, resnet50": lambda: smp("resnet50"),
    "torchvision deeplabv3_resnet50": torchvisions,
}


def variants(make: Callable[[], nn.Module]) -> dict[str, nn.Module]:
    torch.manual_seed(0)
    model = make()
    for part in model.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0  # so that the losses can be compared
    return {
        "accelerated": accelerate(copy.deepcopy(model)),
        "channels_last": copy.deepcopy(model).to(memory_format=torch.channels_last),
        "as_it_is": model,
    }


def logits(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return y["out"] if isinstance(y, dict) else y


def autocast(dtype: torch.dtype | None) -> Any:
    return contextlib.nullcontext() if dtype is None else torch.autocast("cpu", dtype)


def normalised(shape: tuple[int, int, int]) -> Tensor:
    return torch.randn(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(1))


def inference(model: nn.Module, dtype: torch.dtype | None) -> Callable[[], Tensor]:
    x = normalised(IMAGE)

    def run() -> Tensor:
        with torch.inference_mode(), autocast(dtype):
            return logits(model.eval(), x)

    return run


def training(model: nn.Module, dtype: torch.dtype | None) -> Callable[[], Tensor]:
    x, mask = normalised(BATCH), torch.randint(CLASSES, BATCH, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)  # rate 0: every step computes the same

    def run() -> Tensor:
        with autocast(dtype):
            y = logits(model.train(), x)
        loss = F.cross_entropy(y.float(), mask)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return run


CASES = {"inference": inference, "training step": training}


def measure(make: Callable[[], nn.Module]) -> dict[str, dict[str, float]]:
    """By case and dtype, the median seconds of each variant and how many times ours the others take."""
    found = {}
    models = variants(make)
    for case, prepare in CASES.items():
        exact = prepare(models["as_it_is"], None)()
        for name, dtype in DTYPES.items():
            runs = {variant: prepare(model, dtype) for variant, model in models.items()}
            for variant, run in runs.items():
                error = float((run().float() - exact).norm() / exact.norm())
                if not error < TOLERANCE[name]:
                    raise SystemExit(f"{case}, {name}: {variant} is {error:.2g} away from fp32; nothing was timed")
            times: dict[str, list[float]] = {variant: [] for variant in runs}
            for turn in range(WARM_UP - 1 + ROUNDS):
                for variant, run in runs.items():
                    taken = seconds(run, CPU)
                    if turn >= WARM_UP - 1:
                        times[variant].append(taken)
            ours = times["accelerated"]
            row = {f"{variant}_s": round(statistics.median(t), 4) for variant, t in times.items()}
            for variant in ("channels_last", "as_it_is"):
                ratios = [theirs / own for theirs, own in zip(times[variant], ours, strict=True)]
                row[f"{variant}_ratio"] = round(statistics.median(ratios), 3)
            found[f"{case} {name}"] = row
            print(case, name, row, flush=True)
    return found


def table(about: dict[str, Any]) -> str:
    versions = about["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "segmentation_models_pytorch"))
    size, batch = "{1} x {2}".format(*IMAGE), "{} x {} x {}".format(*BATCH)
    lines = [
        "# Models of other projects, accelerated",
        "",
        f"Written by `python -m benchmarks.accelerate`. {about['device']}, {about['threads']} threads, {packages}, "
        f"commit {about['commit']}, {about['date']}. Inference of one {size} image to full-size logits, training steps "
        f"of {batch}. How many times as long the model takes without `accelerate`, in channels-last and as it is made:",
        "",
        "| model | | accelerated | in channels-last | as it is |",
        "|---|---|---|---|---|",
    ]
    for model, cases in about["results"].items():
        for case, row in cases.items():
            times = f"{row['accelerated_s']:.3g} s | {row['channels_last_ratio']:.2f} x | {row['as_it_is_ratio']:.2f} x"
            lines.append(f"| {model} | {case} | {times} |")
    return "\n".join(lines) + "\n"


def main(what: str = "measure") -> None:
    path = RESULTS / "accelerate.json"
    if what == "measure":
        import segmentation_models_pytorch
        import torchvision

        set_allocator()
        about = describe(CPU)
        peers = {package.__name__: package.__version__ for package in (torchvision, segmentation_models_pytorch)}
        about["versions"] |= peers
        about["results"] = {}
        for name, make in MODELS.items():
            print(name, flush=True)
            about["results"][name] = measure(make)
            path.write_text(json.dumps(about, indent=1) + "\n")
    path.with_suffix(".md").write_text(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main(*sys.argv[1:])
