"""What the numbers of a GPU are judged by, into the JSON of the first one.

python -m benchmarks.gpu_facts ceilings   a large copy, and a bf16 product of two 8192 x 8192 matrices
python -m benchmarks.gpu_facts cudnn      the kernels that serve a dilated depthwise convolution, channels-last in bf16
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks import ratios
from benchmarks.shapes import TINY

COPY_BYTES = 1 << (17 if TINY else 33)
SIDE = 64 if TINY else 8192
SHAPE = (1, 33, 9, 11) if TINY else (16, 2048, 32, 32)  # N, C, H, W: DeepLab's ASPP at output stride 16
DILATIONS = (1, 6, 12, 18)
CALLS = 5


def kernels(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """{kernel: microseconds of the device in one call}, as torch's profiler sees it."""
    activity = torch.profiler.ProfilerActivity
    for _ in range(3):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    with torch.profiler.profile(activities=[activity.CUDA if device.type == "cuda" else activity.CPU]) as profile:
        for _ in range(CALLS):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    events = [e for e in profile.key_averages() if device.type == "cpu" or e.self_device_time_total > 0]
    time = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return {e.key[:120]: round(getattr(e, time) / CALLS, 1) for e in sorted(events, key=lambda e: -getattr(e, time))}


def cudnn(device: torch.device) -> dict[str, dict[str, float]]:
    """Of the forward and of both gradients at each dilation."""
    x, grad = (
        torch.randn(SHAPE, device=device).bfloat16().contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    weight = torch.randn(SHAPE[1], 1, 3, 3, device=device).bfloat16()
    found = {}
    for d in DILATIONS:
        window = [1, 1], [d, d], [d, d], False, [0, 0], SHAPE[1], [True, True, False]
        calls = {
            "forward": lambda d=d: F.conv2d(x, weight, None, 1, d, d, SHAPE[1]),
            "backward": lambda window=window: torch.ops.aten.convolution_backward(grad, x, weight, None, *window),
        }
        for name, call in calls.items():
            found[f"depthwise bf16 {'x'.join(map(str, SHAPE))} d={d} {name}"] = kernels(call, device)
    return found


def main(name: str, device: torch.device) -> None:
    if name == "ceilings":
        facts = {"roof": {k: round(v, 3) for k, v in ratios.ceilings(device, COPY_BYTES, SIDE).items()}}
    elif name == "cudnn":
        facts = {"cudnn": cudnn(device)}
    else:
        raise SystemExit(__doc__)
    for group, rows in next(iter(facts.values())).items():
        print(group, *(rows.items() if isinstance(rows, dict) else [rows]), sep="\n  ")
    path = ratios.merge(ratios.describe(device) | facts)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]), torch.device("cuda", 0))
