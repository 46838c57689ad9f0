"""A name and a folder to a data set, and the check of all its files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from ..config import DataConfig
from ..distributed import ALONE, Processes
from ..errors import UserError
from .ade20k import Ade20k
from .base import Dataset, FileDataset
from .camvid import CamVid
from .cityscapes import Cityscapes
from .coco import Coco
from .folder import Folder
from .loader import loader_workers
from .scenes import Scenes
from .voc import Voc

__all__ = ["Dataset", "FileDataset", "check_dataset", "open_dataset", "require_truth"]

LISTED_PROBLEMS = 20
_BY_NAME = {"cityscapes": Cityscapes, "camvid": CamVid, "ade20k": Ade20k, "coco": Coco, "folder": Folder}


def open_dataset(config: DataConfig, split: str) -> Dataset:
    """The data set that `config` names. Lists files and reads no pixel.

    `split` "train" and "val" mean `config.train_split` and `config.val_split` where these are set, else the
    data set's own; any other name is taken as it is. Raises UserError for a root that does not hold the data
    set, for a file or folder that may not be read, and for an unknown split or an empty one.
    """
    chosen = {"train": config.train_split, "val": config.val_split}.get(split) or split
    if config.name == "scenes":
        return _scenes(config, chosen)
    if config.root is None:
        raise UserError(f"the data set {config.name} is read from files: give its folder with --root")
    root = Path(config.root).expanduser()
    try:
        if not root.is_dir():
            raise UserError(f"the root {root} of the data set {config.name} is not a folder")
        if config.name == "voc":
            own_default = split == "train" and config.train_split is None
            sbd = None if config.sbd is None else Path(config.sbd).expanduser()
            return Voc(root, None if own_default else chosen, config.year, sbd)
        return _BY_NAME[config.name](root, chosen)
    except OSError as error:
        raise UserError(f"{error.filename or root} cannot be read: {error.strerror or error}") from error


def _scenes(config: DataConfig, split: str) -> Dataset:
    counts = {"train": config.scene_count, "val": config.scene_val_count}
    if split not in counts:
        raise UserError(f"there is no split {split} of scenes; expected train or val")
    return Scenes(split, counts[split], size=config.scene_size)


def require_truth(dataset: Dataset) -> None:
    """Raises UserError where `dataset` is a split without masks, such as a benchmark's test split."""
    if isinstance(dataset, FileDataset) and any(pair.mask is None for pair in dataset.pairs):
        name, split = dataset.name, dataset.split
        raise UserError(f"the split {split} of the data set {name} has no masks to train on or score against")


def check_dataset(dataset: Dataset, workers: int | None = None, processes: Processes = ALONE) -> None:
    """Reads every pair and raises one UserError that lists all that is wrong, a line each. Of several processes each
    reads its share, and the main one raises.

    Missing and broken files, sizes that differ, mask values that are no label, and masks without one labelled
    pixel in the whole split. A PNG image is checked by its checksums and a JPEG is decoded at an eighth of its
    size; masks are read in full. `workers` threads: decoding releases the GIL.
    """
    count = len(dataset)
    if not count:
        raise UserError(f"the split {dataset.split} of the data set {dataset.name} is empty")
    own = processes.every(count)
    pool = ThreadPoolExecutor(max(1, loader_workers(workers)))
    try:
        results = pool.map(dataset.inspect, own)
        title = f"checking {dataset.name} {dataset.split}"
        quiet = not processes.is_main
        findings = list(tqdm(results, total=len(own), desc=title, delay=2, leave=False, disable=quiet))
    finally:
        pool.shutdown(cancel_futures=True)  # on Ctrl-C, do not read the rest first
    found = [(i, problem) for i, finding in zip(own, findings, strict=True) for problem in finding.problems]
    problems = [problem for _, problem in sorted(processes.gather(found), key=lambda pair: pair[0])]
    if not processes.any(not all(finding.blank for finding in findings)):
        problems.append("every pixel of every mask is ignored; expected some that show a class")
    if not problems or not processes.is_main:
        return
    lines = [f"  {problem}" for problem in problems[:LISTED_PROBLEMS]]
    if len(problems) > LISTED_PROBLEMS:
        lines.append(f"  ... and {len(problems) - LISTED_PROBLEMS} more")
    noun = "problem" if len(problems) == 1 else "problems"
    head = f"the split {dataset.split} of the data set {dataset.name} has {len(problems)} {noun}:"
    raise UserError("\n".join([head, *lines]))
