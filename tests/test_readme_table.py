"""README's table of features: each command is parsed, each function is there, and so is each test that proves a row."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import io
import pkgutil
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import tyro

from deeplab_fast import build_model
from deeplab_fast.cli import TrainCommand, parse_train
from deeplab_fast.convert import ConvertCommand
from deeplab_fast.data.folder import _FIELDS
from deeplab_fast.errors import UserError
from deeplab_fast.evaluate import EvaluateCommand
from deeplab_fast.export import ExportCommand
from deeplab_fast.predict import PredictCommand
from deeplab_fast.statistics import StatisticsCommand

ROOT = Path(__file__).resolve().parent.parent
GROUPS = (
    *("Models", "Weights", "Loss and optimisation", "Data and augmentation", "Evaluation"),
    *("Prediction and export", "Devices and processes", "Runs and engineering"),
)
# What a row without a test begins with; no other does.
WITHOUT_TEST = ("not offered", "not yet")
# Files of a run or of a data set, and keys of what is written.
NAMES = {"dataset.toml", "best.pt", "config.json", "class_iou"}
COMMANDS: dict[str, tuple[type, list[str]]] = {  # with what each cannot do without
    "evaluate": (EvaluateCommand, ["model.pt"]),
    "predict": (PredictCommand, ["model.pt", "photo.jpg", "--output", "out"]),
    "convert": (ConvertCommand, ["model.pth", "--output", "model.pt"]),
    "statistics": (StatisticsCommand, []),
    "export": (ExportCommand, ["model.pt", "--output", "model.onnx"]),
}
LAUNCHER = re.compile(r"torchrun --nproc_per_node=\d+ -m deeplab_fast\.")


class Row(NamedTuple):
    group: str
    feature: str
    how: str
    tests: str


def read_rows(text: str) -> list[Row]:
    """Of the section `## Every feature`, in which each group is folded away under its name."""
    section = text.split("\n## Every feature\n")[1].split("\n## ")[0]
    rows = []
    for block in section.split("<details><summary>")[1:]:
        group, _, content = block.partition("</summary>")
        assert content.rstrip().endswith("</details>"), f"{group} has no end"
        header, _, *lines = [line for line in content.splitlines() if line.startswith("|")]
        assert header == "| feature | how | proved by |"
        for line in lines:
            cells = [cell.strip() for cell in line.strip("|").split(" |")]
            assert len(cells) == 3, f"expected three cells: {line}"
            rows.append(Row(group, *cells))
    return rows


ROWS = read_rows((ROOT / "README.md").read_text())


def tokens(cell: str) -> list[str]:
    """What is set as code."""
    return re.findall(r"`([^`]+)`", cell)


def proofs(cell: str) -> list[str]:
    """`file::test_some_words` of each link [some words](tests/file)."""
    links = re.findall(r"\[([^]]+)\]\(tests/([^)]+)\)", cell)
    assert len(links) == cell.count("["), f"expected links to tests: {cell}"
    return [f"{path}::test_{words.replace(' ', '_')}" for words, path in links]


def fails(check: Callable[[str], None], token: str) -> str:
    """What is wrong with it, or empty."""
    try:
        check(token)
    except LookupError as error:
        return f"{token}: {error}"
    return ""


@functools.cache
def functions(path: Path) -> set[str]:
    return {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)}


def check_test(name: str) -> None:
    path, _, function = name.partition("::")
    if not (ROOT / "tests" / path).is_file():
        raise LookupError(f"tests/{path} does not exist")
    if function not in functions(ROOT / "tests" / path):
        raise LookupError("no such test")


def check_object(name: str) -> None:
    try:
        pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise LookupError(str(error)) from error


def parse(kind: type, words: list[str]) -> None:
    told = io.StringIO()
    try:
        with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
            if kind is not TrainCommand or "--resume" in words:  # it would be read
                tyro.cli(kind, args=words, config=(tyro.conf.OmitArgPrefixes,))
                return
            config = parse_train(words)[0].config
    except (SystemExit, UserError) as error:
        raise LookupError(f"{error} {told.getvalue()}") from error
    if not config.model.backbone.startswith("timm:"):
        try:
            with torch.device("meta"):
                build_model(num_classes=2, **dataclasses.asdict(config.model))
        except UserError as error:
            raise LookupError(str(error)) from error


def check_command(text: str) -> None:
    first, *words = shlex.split(LAUNCHER.sub("", text))
    if first in COMMANDS:
        kind, needed = COMMANDS[first]
        given = words and not words[0].startswith("-")  # its files are named
        parse(kind, [*words] if given else [*needed, *words])
    else:
        parse(TrainCommand, words if first == "train" else [first, *words])


def check_how(token: str) -> None:
    if token.startswith("deeplab_fast."):
        check_object(token)
    elif token.startswith("--") or LAUNCHER.match(token) or token.split()[0] in (*COMMANDS, "train"):
        check_command(token)
    else:
        known = token in NAMES or token.partition(" = ")[0] in _FIELDS or (ROOT / token).exists()
        if not known:
            raise LookupError("neither a command, an object, a file nor a field")


def problems(rows: list[Row]) -> Iterator[str]:
    for row in rows:
        where = f"{row.group}, {row.feature}"
        tests = proofs(row.tests)
        if row.how.startswith(WITHOUT_TEST) == bool(tests):
            yield f"{where}: has {len(tests)} tests, and says: {row.how}"
        if not row.how.startswith(WITHOUT_TEST):
            yield from (f"{where}: {said}" for token in tokens(row.how) if (said := fails(check_how, token)))
        yield from (f"{where}: {said}" for token in tests if (said := fails(check_test, token)))


def test_every_row_holds() -> None:
    found = list(problems(ROWS))
    assert not found, "\n".join(found)


def test_groups_and_features() -> None:
    assert tuple(dict.fromkeys(row.group for row in ROWS)) == GROUPS
    assert all(sum(row.group == group for row in ROWS) >= 5 for group in GROUPS)
    features = [row.feature for row in ROWS]
    assert all(features) and len(set(features)) == len(features)


GOOD = Row("Models", "a", "`--model deeplabv3`", "[feature sizes](tests/test_model.py)")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"tests": "[feature sizes](tests/test_models.py)"}, "tests/test_models.py does not exist"),
        ({"tests": "[features](tests/test_model.py)"}, "no such test"),
        ({"tests": ""}, "has 0 tests"),
        ({"how": "not yet"}, "has 1 tests"),
        ({"how": "`--modell deeplabv3`"}, "--modell"),
        ({"how": "`--model deeplabv4`"}, "deeplabv4"),
        ({"how": "`--flip 2`"}, "expected from 0 to 1"),
        ({"how": "`--backbone resnet19`"}, "backbone is 'resnet19'"),
        ({"how": "`evaluate --alpha 0.5`"}, "--alpha"),
        ({"how": "`predict CHECKPOINT PATH...`"}, "--output"),
        ({"how": "`torchrun --nproc_per_node=4 -m deeplab_fast.trains`"}, "trains"),
        ({"how": "`deeplab_fast.build_models`"}, "build_models"),
        ({"how": "`deeplab_fast.nothing.at_all`"}, "nothing"),
        ({"how": "`dataset.tom`"}, "neither a command"),
    ],
    ids=str,
)
def test_a_wrong_row_is_found(change: dict, said: str) -> None:
    assert not list(problems([GOOD]))
    (problem,) = problems([GOOD._replace(**change)])
    assert said in problem


README = (ROOT / "README.md").read_text()


def test_links_lead_somewhere() -> None:
    headings = {re.sub(r"[^a-z0-9 -]", "", h.lower()).replace(" ", "-") for h in re.findall(r"(?m)^#+ (.+)$", README)}
    links = re.findall(r"\]\(([^)]+)\)", README)
    wrong = {x for x in links if not (x[1:] in headings if x.startswith("#") else (ROOT / x).exists())}
    assert len(links) > 50 and not wrong


COMMAND = re.compile(r"python -m deeplab_fast\.(\w+)((?: [^`\n&;|]*)?)")


@pytest.mark.parametrize("name, rest", COMMAND.findall(README))
def test_commands_in_the_text(name: str, rest: str) -> None:
    words = rest.split("#")[0].strip()
    if name == "info" or words == "--help":
        assert (ROOT / "deeplab_fast" / f"{name}.py").is_file()
    else:
        check_command(f"{name} {words}".replace("--data NAME", "--data voc"))
