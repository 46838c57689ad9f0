"""What several processes cost: measured on this CPU, and modelled up to 512 GPUs.

python -m benchmarks.scaling [measure]   trains on one and on two processes of a thread each (gloo), counts what they
send, times the loading of real images (DEEPLAB_FAST_TEST_DATA), and writes results/scaling.json; then, and without
`measure`, writes scaling.md from that file and the model below.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.ratios import CPU, FOLDER, RESULTS, describe
from deeplab_fast import build_model
from deeplab_fast.config import Config
from deeplab_fast.data.datasets import open_dataset
from deeplab_fast.data.loader import train_batches
from deeplab_fast.device import set_allocator
from deeplab_fast.distributed import Processes, start
from deeplab_fast.ops import dispatch
from deeplab_fast.presets import PRESETS
from deeplab_fast.state import Training
from deeplab_fast.train import optimise

FP32 = 4
SCALARS = 2 * 8  # [weight, wrong] before a step's passes, as many bytes of [loss, kept] after them: fp64
WARM_UP, STEPS, ROUNDS = 2, 6, 2


class Messages(NamedTuple):
    """What a process hands to its collectives in one step of one pass."""

    gradients: int  # bytes
    norms: int  # layers whose statistics are shared
    norms_forward: int  # bytes: pixels, mean and n var of every channel
    norms_backward: int  # bytes: two sums of every channel
    scalars: int  # bytes, in two messages


def messages(model: nn.Module, *, synchronised: bool) -> Messages:
    """Counted from the parameters and the norms of a model in training."""
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d) and m.training] if synchronised else []
    channels = sum(norm.num_features for norm in norms)
    gradients = sum(p.numel() * FP32 for p in model.parameters() if p.requires_grad)
    return Messages(gradients, len(norms), 3 * channels * FP32, 2 * channels * FP32, 2 * SCALARS)


class Cluster(NamedTuple):
    """Assumed, not measured: H100 nodes of eight with NVLink, an InfiniBand NDR port (400 Gb/s) for each GPU."""

    gpus: int = 8
    nvlink: float = 360e9  # bytes/s that a ring all-reduce gets of 450e9 each way
    infiniband: float = 45e9  # bytes/s a GPU of 50e9
    launch: float = 15e-6  # seconds of a small collective within a node
    hop: float = 5e-6  # seconds of each doubling of the nodes
    flops: float = 200e12  # a second, a fifth of the bf16 peak
    memory: float = 2.3e12  # bytes/s, two thirds of HBM3's 3.35e12
    hidden: float = 0.6  # share of a step's computing behind which gradients can travel: most of the backward pass


def small_message(processes: int, cluster: Cluster) -> float:
    """Seconds of a collective that is all latency."""
    if processes == 1:
        return 0.0
    nodes = -(-processes // cluster.gpus)
    return cluster.launch + cluster.hop * 2 * math.ceil(math.log2(nodes)) if nodes > 1 else cluster.launch


def large_message(size: float, processes: int, cluster: Cluster) -> float:
    """Seconds of a ring all-reduce of `size` bytes, in the node and between nodes, where each GPU has its share."""
    local = min(processes, cluster.gpus)
    nodes = -(-processes // cluster.gpus)
    within = 2 * (local - 1) / local * size / cluster.nvlink
    between = 2 * (nodes - 1) / nodes * size / local / cluster.infiniband
    return within + between + small_message(processes, cluster)


class Step(NamedTuple):
    """Seconds of one step."""

    compute: float
    gradients: float  # what is not hidden behind the backward pass
    norms: float
    scalars: float

    @property
    def efficiency(self) -> float:
        return self.compute / sum(self)


def step(sent: Messages, compute: float, processes: int, cluster: Cluster) -> Step:
    exposed = max(0.0, large_message(sent.gradients, processes, cluster) - cluster.hidden * compute)
    # Every process receives what all send forward: an all-gather.
    gathered = sent.norms_forward * (processes - 1)
    bandwidth = cluster.nvlink if processes <= cluster.gpus else cluster.infiniband
    latency = small_message(processes, cluster)
    norms = 2 * sent.norms * latency + gathered / bandwidth + large_message(sent.norms_backward, processes, cluster)
    norms -= latency if sent.norms else large_message(0, processes, cluster)  # counted among the layers
    return Step(compute, exposed, max(0.0, norms), 2 * latency)


def compute_seconds(config: Config, size: tuple[int, int], images: int, cluster: Cluster) -> float:
    """Forward and backward pass of `images`, from what one image costs: FLOP, and bytes that layers read and write."""
    moved = 0

    def note(layer: nn.Module, inputs: tuple, y: Any) -> None:
        nonlocal moved
        moved += 2 * (inputs[0].numel() + y.numel())  # bf16

    with FakeTensorMode(), dispatch.requesting("reference"), torch.no_grad():
        model = model_of(config, "cpu").eval()
        for layer in model.modules():
            if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
                layer.register_forward_hook(note)
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, *size))
    return 3 * images * (counter.get_total_flops() / cluster.flops + moved / cluster.memory)


def model_of(config: Config, device: str = "meta", classes: int = 19) -> nn.Module:
    fields = {name: getattr(config.model, name) for name in config.model.__dataclass_fields__}
    with torch.device(device):
        return build_model(num_classes=classes, **fields).train()


def bench_config(batch_size: int, norm: str) -> Config:
    """Small enough for two cores: MobileNetV2 on painted scenes."""
    config = PRESETS["scenes"]()
    model = replace(config.model, backbone="mobilenet_v2", norm=norm)
    return replace(
        config,
        data=replace(config.data, workers=0),
        model=model,
        optim=replace(config.optim, batch_size=batch_size, steps=10_000),
        run=replace(config.run, threads=1, device="cpu", precision="fp32"),
    )


def work(batch_size: str, norm: str) -> None:
    """What each process runs: prints, in the main one, seconds a step and what it has sent."""
    torch.set_num_threads(1)
    set_allocator()
    processes = start()
    config = bench_config(int(batch_size), norm)
    train_set = open_dataset(config.data, "train")
    training = Training(config, train_set, open_dataset(config.data, "val"), processes)
    training.start(None)
    counted = count_buckets(training) if processes.size > 1 else []
    # Painting a scene would hide the rest: the same batches again.
    batches = list_batches(train_set, config, processes)
    seconds = []
    for number in range(WARM_UP + STEPS):
        began = time.perf_counter()
        optimise(training, iter(batches))
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - began)
    sent = messages(training.model.train(), synchronised=norm == "sync_batch")
    if counted:
        assert sum(counted) == sent.gradients * (WARM_UP + STEPS), (sum(counted), sent)
    if processes.is_main:
        print(json.dumps({"seconds": statistics.median(seconds), "messages": sent._asdict()}))
    processes.close()


def list_batches(train_set: Any, config: Config, processes: Processes) -> list:
    batches = train_batches(train_set, config, 0, CPU, processes)
    return [next(batches)]


def count_buckets(training: Training) -> list[int]:
    """Bytes of each bucket of gradients as it leaves."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    sizes = []

    def counting(state, bucket):  # torch reads the annotations, and knows its own only
        sizes.append(bucket.buffer().numel() * bucket.buffer().element_size())
        return allreduce_hook(state, bucket)

    training.forward.register_comm_hook(None, counting)
    return sizes


def measure() -> None:
    """One process with 4 images; two with 4 together; two with 4 each. In turns, medians."""
    cases = {
        "1 process, 4 images": (1, 4, "batch"),
        "2 processes, 2 images each": (2, 4, "sync_batch"),
        "2 processes, 4 images each": (2, 8, "sync_batch"),
        "2 processes, 4 images each, norms of their own": (2, 8, "batch"),
    }
    runs: dict[str, list[dict]] = {name: [] for name in cases}
    for _ in range(ROUNDS):
        for name, (count, batch, norm) in cases.items():
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count)]
            argv = [sys.executable, *(launcher if count > 1 else []), "-m", "benchmarks.scaling", "work"]
            argv += [str(batch), norm]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(argv, env=environment, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            runs[name].append(json.loads(done.stdout.splitlines()[-1]))
    torch.set_num_threads(1)
    about = describe(CPU)
    about["loading_seconds"] = {name: loading_seconds(name, folder) for name, folder in DATA.items()}
    about["cases"] = {
        name: {
            "processes": cases[name][0],
            "images": cases[name][1],
            "seconds": statistics.median(run["seconds"] for run in found),
            "messages": found[0]["messages"],
        }
        for name, found in runs.items()
    }
    (RESULTS / "scaling.json").write_text(json.dumps(about, indent=1) + "\n")


MODELLED = {
    "ResNet-101, 513 x 513, batch norm": ("voc", (513, 513), 4, False),
    "ResNet-101, 513 x 513, synchronised": ("voc", (513, 513), 4, True),
    "ResNet-101, 769 x 769, synchronised": ("cityscapes", (769, 769), 2, True),
    "MobileNetV2, 352 x 352, synchronised": ("camvid", (352, 352), 8, True),
}
COUNTS = (1, 8, 16, 64, 128, 512)
DATA = {"voc": "voc53", "camvid": "camvid"}  # folders of real images under DEEPLAB_FAST_TEST_DATA/data


def loading_seconds(preset: str, folder: str) -> float:
    """Of one training image on one core, as the preset augments it; the files are in memory after the first round."""
    root = Path(os.environ["DEEPLAB_FAST_TEST_DATA"]) / "data" / folder
    config = PRESETS[preset]()
    config = replace(config, data=replace(config.data, root=str(root), workers=0), optim=replace(config.optim, steps=4))
    dataset, rounds = open_dataset(config.data, "train"), []
    for _ in range(1 + ROUNDS):
        began = time.perf_counter()
        images = sum(len(batch.index) for batch in train_batches(dataset, config, 0, CPU))
        rounds.append((time.perf_counter() - began) / images)
    return statistics.median(rounds[1:])


def modelled(cluster: Cluster, loading: dict[str, float]) -> list[str]:
    head = (
        "| model, images a GPU | compute | gradients | norms | "
        + " | ".join(f"{n} GPU{'s' * (n > 1)}" for n in COUNTS)
        + " |"
    )
    rows = [head + " cores a GPU |", "|---" * (5 + len(COUNTS)) + "|"]
    for name, (preset, size, images, synchronised) in MODELLED.items():
        config = PRESETS[preset]()
        sent = messages(model_of(config), synchronised=synchronised)
        compute = compute_seconds(config, size, images, cluster)
        shares = [f"{step(sent, compute, n, cluster).efficiency:.0%}" for n in COUNTS]
        norms = f"{sent.norms} x {(sent.norms_forward + sent.norms_backward) / max(sent.norms, 1) / 1e3:.1f} kB"
        cores = f"{images / compute * loading[preset]:.1f}" if preset in loading else ""
        rows.append(
            f"| {name}, {images} | {compute * 1e3:.1f} ms | {sent.gradients / 1e6:.0f} MB | "
            f"{norms if sent.norms else '-'} | " + " | ".join(shares) + f" | {cores} |"
        )
    return rows


def measured(about: dict[str, Any]) -> list[str]:
    rows = ["| | seconds a step | images a second | gradients | norms, forward + backward |", "|---|---|---|---|---|"]
    for name, case in about["cases"].items():
        sent = Messages(**case["messages"])
        gradients = f"{sent.gradients / 1e6:.2f} MB" if case["processes"] > 1 else "-"
        norms = f"{sent.norms} x 2 messages, {(sent.norms_forward + sent.norms_backward) / 1e3:.0f} kB"
        rows.append(
            f"| {name} | {case['seconds']:.3f} | {case['images'] / case['seconds']:.1f} | {gradients} | "
            f"{norms if sent.norms else '-'} |"
        )
    return rows


TEXT = """# Several processes: cost

Written by `python -m benchmarks.scaling`. "Measured" is `results/scaling.json`; the model is one, which no GPU has
confirmed yet.

## Measured

{machine}, two cores. MobileNetV2, crops of 128 x 256, fp32, one thread a process, gloo; loading is
left out. The bytes of the gradients are counted where they leave, and equal the model's parameters. With norms of their
own two processes train {own:.2f} times the images of one in the same time. A collective costs {collective:.1f} ms here,
and with one for each norm each way they train {shared:.2f} times the images: on one CPU, use threads.

{measured}

Reading, decoding, scaling and cropping a training image on one core takes {loading}.

## Model

A step of N GPUs, g of them in a node with NVLink, n = N / g nodes, B bytes of gradients, L synchronised norms:

    compute     3 x images x (FLOP / ({flops:.0f} TFLOP/s) + bytes of convolutions and norms / ({memory:.1f} TB/s))
    ring        2 (g - 1) / g B / ({nvlink:.0f} GB/s) + 2 (n - 1) / n (B / g) / ({infiniband:.0f} GB/s) + latency
    gradients   max(0, ring - {hidden} compute)
    latency     {launch:.0f} us, between nodes + {hop:.0f} us x 2 log2(n)
    norms       2 L latency + (N - 1) x bytes forward / bandwidth + ring of the bytes backward
    scalars     2 latency: [weight, wrong labels] before the passes, [loss, kept pixels] after them
    efficiency  compute / (compute + gradients + norms + scalars)

FLOP, bytes and norms are counted from the presets' models; rates and latencies are assumptions (`Cluster`). Efficiency
at a constant number of images a GPU, and the cores that load for one GPU:

{modelled}

What breaks first:

- Synchronised norms. Their messages are small and lie one after the other in both passes: nothing hides them, and
  their time does not fall with the batch. With {images} images of 513 x 513 a GPU, {layers} norms cost
  {norms_ms:.1f} ms on 8 GPUs and {norms_far_ms:.1f} ms on 512, beside {compute_ms:.1f} ms of computing;
  the gradients take {gradients_ms:.1f} ms on 512, and are hidden.
  `--norm batch` sends nothing for norms, where a GPU has images enough for statistics of its own.
- Loading. Nodes have some 8 to 16 cores a GPU; the last column above that starves the GPUs.
- The batch. 512 GPUs with 4 images each are a batch of 2,048, of which VOC's 10,582 images are five steps an epoch. No
  recipe here has been trained beyond a batch of 16.
- Shares. `--batch-size` is that of all processes; with uneven shares those with fewer images wait for the others.
"""


def report() -> str:
    """The text of scaling.md."""
    cluster, about = Cluster(), json.loads((RESULTS / "scaling.json").read_text())
    preset, size, images, _ = MODELLED["ResNet-101, 513 x 513, synchronised"]
    sent = messages(model_of(PRESETS[preset]()), synchronised=True)
    compute = compute_seconds(PRESETS[preset](), size, images, cluster)
    one, _, shared, own = about["cases"].values()
    return TEXT.format(
        own=2 * one["seconds"] / own["seconds"],
        shared=2 * one["seconds"] / shared["seconds"],
        collective=(shared["seconds"] - own["seconds"]) / (2 * shared["messages"]["norms"]) * 1e3,
        machine=f"{about['device']}, torch {about['versions']['torch']}",
        measured="\n".join(measured(about)),
        modelled="\n".join(modelled(cluster, about["loading_seconds"])),
        loading=", ".join(f"{1e3 * s:.1f} ms ({name})" for name, s in about["loading_seconds"].items()),
        compute_ms=compute * 1e3,
        flops=cluster.flops / 1e12,
        memory=cluster.memory / 1e12,
        hidden=cluster.hidden,
        nvlink=cluster.nvlink / 1e9,
        infiniband=cluster.infiniband / 1e9,
        launch=cluster.launch * 1e6,
        hop=cluster.hop * 1e6,
        images=images,
        layers=sent.norms,
        norms_ms=step(sent, compute, 8, cluster).norms * 1e3,
        norms_far_ms=step(sent, compute, 512, cluster).norms * 1e3,
        gradients_ms=large_message(sent.gradients, 512, cluster) * 1e3,
    )


def main(*arguments: str) -> None:
    if arguments[:1] == ("work",):
        return work(*arguments[1:])
    if arguments == ("measure",):
        measure()
    Path(FOLDER / "scaling.md").write_text(report())


if __name__ == "__main__":
    main(*sys.argv[1:])
