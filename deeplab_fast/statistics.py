"""python -m deeplab_fast.statistics --data NAME --root DIR: how often each class is labelled, and class weights."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from .cli import run_command
from .config import DataConfig
from .data.class_counts import WEIGHTINGS, ClassCounts, class_weights, count_classes
from .data.datasets import open_dataset, require_truth
from .evaluate import check_json
from .files import atomic_path, make_folder


@dataclass(frozen=True)
class StatisticsCommand:
    """Count the classes of a split, and derive the weights that --class-weights enet and median stand for."""

    data: Annotated[DataConfig, tyro.conf.arg(name="")] = field(default_factory=DataConfig)
    split: str = "train"
    """the split to count; `train` is the one that training takes"""
    json: Path | None = None
    """write counts and weights to this file; only a file of an earlier run is replaced"""
    cache: bool = True
    """take counts of the same files from the user's cache folder"""


def format_counts(names: Sequence[str], counts: ClassCounts) -> str:
    """A line for each class: pixels, share of the labelled ones, images, and a column for each weighting."""
    weights = [class_weights(counts, kind) for kind in WEIGHTINGS]
    width, total = max(map(len, (*names, "class"))), sum(counts.pixels)
    heads = "".join(f"  {kind:>9}" for kind in WEIGHTINGS)
    lines = [f"{'class':<{width}}  {'pixels':>15}  {'share':>8}  {'images':>7}{heads}"]
    for index, name in enumerate(names):
        pixels = counts.pixels[index]
        cells = "".join(f"  {row[index]:9.4f}" for row in weights) if pixels else f"  {'absent':>9}" * len(weights)
        lines.append(f"{name:<{width}}  {pixels:>15,}  {pixels / total:>8.3%}  {counts.images[index]:>7}{cells}")
    return "\n".join(lines)


def run_statistics(command: StatisticsCommand) -> dict[str, Any]:
    """Run the command: prints the table, writes the file and returns what --json holds."""
    if command.json is not None:
        check_json(command.json, ("pixels", "pixels_there"), "counts")
    dataset = open_dataset(command.data, command.split)
    require_truth(dataset)
    counts = count_classes(dataset, command.data.workers, cache=command.cache)
    names = dataset.classes.names
    print(f"{dataset.name} {dataset.split}, {len(dataset)} images\n\n{format_counts(names, counts)}")
    weights = {kind: class_weights(counts, kind) for kind in WEIGHTINGS}
    result = {"data": dataset.name, "split": dataset.split, "classes": list(names), **asdict(counts), **weights}
    if command.json is not None:
        make_folder(command.json.parent)
        with atomic_path(command.json) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n")
        print(f"counts in {command.json}")
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; a user's mistake raises UserError."""
    run_statistics(
        tyro.cli(
            StatisticsCommand,
            prog="python -m deeplab_fast.statistics",
            args=argv,
            config=(tyro.conf.OmitArgPrefixes,),
        )
    )
    return 0


if __name__ == "__main__":
    run_command(main)
