"""What the commands share: the flags of `train` made from the config, and how a command is stopped and ends."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import tyro

from . import checkpoint
from .config import Config
from .distributed import ALONE, Processes, lost_contact
from .errors import Stopped, UserError
from .presets import PRESETS, smoke

T = TypeVar("T")


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


_ONE_CTRL_C = 5.0
"""Seconds within which several signals are one request."""

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


def parse_train(argv: Sequence[str] | None, processes: Processes = ALONE) -> tuple[TrainCommand, dict[str, Any] | None]:
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
        if resumed["training"].get("processes", 1) == 1 and _value_of(argv, "--norm") != "batch":
            config = _synchronise(config, processes)
    else:
        name = preset or _value_of(argv, "--data") or "scenes"
        if preset is not None and preset not in PRESETS:
            raise UserError(f"--preset {preset}: expected one of {', '.join(PRESETS)}")
        # An unknown --data is tyro's to report.
        config = PRESETS.get(name, PRESETS["scenes"])()
        config = smoke(config) if small else config
    command = parse_flags(
        TrainCommand,
        processes,
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
    elif _value_of(argv, "--norm") is None:
        command = dataclasses.replace(command, config=_synchronise(command.config, processes))
    return dataclasses.replace(command, output_given=given), resumed


def parse_flags(command: type[T], processes: Processes = ALONE, **options: Any) -> T:
    """tyro.cli, whose message one process is enough to print."""
    with contextlib.nullcontext() if processes.is_main else contextlib.redirect_stderr(io.StringIO()):
        return tyro.cli(command, **options)


def _synchronise(config: Config, processes: Processes) -> Config:
    """Batch norm over the whole batch, as one process has it, where several share the batch."""
    model = config.model
    if processes.size == 1 or model.norm != "batch" or model.backbone.startswith("timm:"):
        return config
    return dataclasses.replace(config, model=dataclasses.replace(model, norm="sync_batch"))


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


class StopRequest:
    """Ctrl-C and SIGTERM set a flag that the loop reads between two steps; a second Ctrl-C ends the process at once.

    Several processes end after the same step: what each knows is exchanged while the next one is computed.
    """

    def __init__(self, processes: Processes = ALONE) -> None:
        self.signal = 0
        self._processes, self._largest, self._first = processes, None, 0.0
        self._previous = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}

    def _note(self, number: int, frame: Any) -> None:
        # A terminal and torchrun both pass one Ctrl-C on to each of several processes.
        if self.signal and not (self._processes.size > 1 and time.monotonic() - self._first < _ONE_CTRL_C):
            raise KeyboardInterrupt
        if not self.signal:
            self.signal, self._first = number, time.monotonic()

    def check(self) -> None:
        """Raises Stopped where this process has been asked to end."""
        if self.signal:
            raise Stopped

    def check_all(self) -> None:
        """The same for any process; called by all of them. Of several, asked one call ago or earlier."""
        if self._processes.size == 1:
            self.check()
            return
        largest, self._largest = self._largest, self._processes.post(self.signal)
        if largest is not None and (number := largest()):
            self.signal = number
            raise Stopped

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def run_command(main: Callable[..., int], start: Callable[[], Processes] | None = None) -> NoReturn:
    """End the process with the command's status: 2 after a user's mistake, told in one sentence, 130 after Ctrl-C.

    start: connects the processes of a job, which `main` then takes; one of them prints.
    """
    processes = ALONE
    try:
        if start is None:
            status = main()
        else:
            processes = start()
            with _silence(processes):
                status = _status(main, processes)
        processes.close()  # here, as another may fail after this one's last message
    except UserError as error:
        status = _fail(processes, 2, f"error: {error}")
    except KeyboardInterrupt:
        status = _fail(processes, 130, "interrupted")
    except Exception as error:
        if processes.size == 1:
            raise
        _end_job(processes, error)
    if processes.size > 1:
        processes.leave(status)
    sys.exit(status)


def _status(main: Callable[..., int], processes: Processes) -> int:
    """What main returns or exits with: all processes do so together."""
    try:
        return main(processes=processes)
    except SystemExit as done:
        if isinstance(done.code, str):
            raise UserError(done.code) from None
        return done.code or 0


def _silence(processes: Processes) -> contextlib.AbstractContextManager:
    """What one process prints is enough."""
    if processes.is_main:
        return contextlib.nullcontext()
    warnings.simplefilter("ignore")
    return contextlib.redirect_stdout(open(os.devnull, "w"))


def _fail(processes: Processes, status: int, text: str) -> int:
    if processes.first_to_fail():
        print(text, file=sys.stderr)
    if processes.size > 1:
        processes.abandon(status)
    return status


def _end_job(processes: Processes, error: Exception) -> None:
    """Of several processes: the first that fails says why, the others notice that it is gone and are silent."""
    if processes.first_to_fail():
        if lost_contact(error):
            reason = f"{error}".strip().splitlines()[0]
            print(f"error: another process of this job was killed, or its machine is gone ({reason})", file=sys.stderr)
        else:
            sys.excepthook(type(error), error, error.__traceback__)
    processes.abandon(1)
