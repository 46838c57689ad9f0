"""What the commands share: the flags of `train` made from the config, and how a command is stopped and ends."""

from __future__ import annotations

import dataclasses
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import tyro

from . import checkpoint
from .config import Config
from .errors import UserError
from .presets import PRESETS, smoke


@dataclass(frozen=True)
class TrainCommand:
    """Train DeepLabv3 or DeepLabv3+. Without a flag: on the built-in street scenes, in a few minutes on two CPU cores.

    A preset gives every flag its value and the other flags change it; `--data NAME` alone takes the preset NAME.
    """

    preset: str | None = None
    """start from this preset"""
    resume: Path | None = None
    """go on with the run in this folder"""
    smoke: bool = False
    """the preset at a tiny size, for a trial on a CPU: 20 steps, small crops, narrow heads, random weights"""
    config: Annotated[Config, tyro.conf.arg(name="")] = dataclasses.field(default_factory=PRESETS["scenes"])
    output_given: tyro.conf.Suppress[bool] = False


# What a resumed run may change: nothing that the numbers depend on.
_FREE_ON_RESUME = {"data.root", "data.workers", "data.check"} | {
    f"run.{name}"
    for name in (
        "device",
        "compile",
        "recompute",
        "threads",
        "log_every",
        "val_every",
        "save_every",
        "sample_count",
        "tensorboard",
    )
}


def parse_train(argv: Sequence[str] | None) -> tuple[TrainCommand, dict[str, Any] | None]:
    """The command, and the content of the checkpoint that it goes on from, if any."""
    argv = list(sys.argv[1:] if argv is None else argv)
    resume, preset = _value_of(argv, "--resume"), _value_of(argv, "--preset")
    small = "--smoke" in argv
    resumed = None
    if resume is not None and small:
        raise UserError(f"--smoke and --resume {resume}: a run goes on with its own settings; give one of them")
    if resume is not None and preset is not None:
        raise UserError(
            f"--preset {preset} and --resume {resume}: a run goes on with its own settings; give one of them"
        )
    if resume is not None:
        resumed, config = _read_run(Path(resume))
    else:
        name = preset or _value_of(argv, "--data") or "scenes"
        if preset is not None and preset not in PRESETS:
            raise UserError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
        # An unknown --data is tyro's to report.
        config = PRESETS.get(name, PRESETS["scenes"])()
        config = smoke(config) if small else config
    command = tyro.cli(
        TrainCommand,
        prog="python -m deeplab_fast.train",
        default=TrainCommand(preset=preset, smoke=small, config=config),
        args=argv,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    command.config.check()
    given = _value_of(argv, "--output") is not None
    if resumed is not None:
        _check_unchanged(config, command.config, resume)
        given = False
    return dataclasses.replace(command, output_given=given), resumed


def _value_of(argv: Sequence[str], flag: str) -> str | None:
    """The last value of a flag, as `--flag value` or `--flag=value`."""
    value = None
    for position, word in enumerate(argv):
        if word == flag and position + 1 < len(argv):
            value = argv[position + 1]
        elif word.startswith(flag + "="):
            value = word.partition("=")[2]
    return value


def _read_run(path: Path) -> tuple[dict[str, Any], Config]:
    path = path / "last.pt" if path.is_dir() else path
    content = checkpoint.load(path)
    if "training" not in content:
        raise UserError(f"{path}: holds a model but no training state; go on from last.pt")
    config = Config.from_dict(content["config"])
    # The folder may have been moved since, and "auto" could mean another precision on this machine.
    precision = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[content["training"]["precision"]]
    run = dataclasses.replace(config.run, output=str(path.parent), precision=precision)
    return content, dataclasses.replace(config, run=run)


def _check_unchanged(saved: Config, asked: Config, resume: str) -> None:
    before, after = saved.to_dict(), asked.to_dict()
    for group, values in before.items():
        for name, value in values.items():
            if after[group][name] != value and f"{group}.{name}" not in _FREE_ON_RESUME:
                flag = group if name == "name" else name.replace("_", "-")
                raise UserError(
                    f"--resume {resume}: --{flag} was {value!r} and cannot become {after[group][name]!r}; "
                    "a run goes on as it began (to start anew from its weights: --weights with its best.pt)"
                )


class Stopped(Exception):
    """The user or the system asked the run to end; the state is saved."""


class StopRequest:
    """Ctrl-C and SIGTERM set a flag that the loop reads between two steps; a second Ctrl-C ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number

    def check(self) -> None:
        if self.signal:
            raise Stopped

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def run_command(main: Callable[[], int]) -> NoReturn:
    """End the process with the command's status: 2 after a user's mistake, told in one sentence, 130 after Ctrl-C."""
    try:
        status = main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    sys.exit(status)
