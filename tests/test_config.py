"""The config, its flags and its presets."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from deeplab_fast.cli import parse_train
from deeplab_fast.config import _BOUNDS, Config
from deeplab_fast.errors import UserError
from deeplab_fast.presets import PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_and_their_own_check(name):
    config = PRESETS[name]()
    config.check()
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_every_bound_names_a_field_and_every_number_has_one():
    for group in dataclasses.fields(Config):
        if group.name == "model":
            continue
        value = group.default_factory()
        for item in dataclasses.fields(value):
            number = getattr(value, item.name)
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                assert f"{group.name}.{item.name}" in _BOUNDS
    for name in _BOUNDS:
        group, _, item = name.partition(".")
        assert hasattr(getattr(Config(), group), item)


def test_unknown_field_of_a_newer_file_is_named():
    saved = Config().to_dict()
    saved["optim"]["lookahead"] = 5
    with pytest.raises(UserError, match=r"optim\.lookahead"):
        Config.from_dict(saved)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "-1"], "--lr -1.0: expected at least 0"),
        (["--lr", "nan"], "--lr nan: expected at least 0"),
        (["--scale-max", "inf"], "--scale-max inf: expected at least 0.01"),
        (["--nesterov", "--momentum", "0"], "--nesterov --momentum 0: expected a momentum above 0"),
        (["--warmup", "exponential", "--warmup-steps", "5", "--warmup-lr-mult", "0"], "expected a number above 0"),
        (["--optimizer", "adamw", "--momentum", "1"], "expected a momentum under 1"),
        (["--resume", "runs/x", "--preset", "voc"], "--preset voc and --resume runs/x"),
        (["--flip", "1.5"], "--flip 1.5: expected from 0 to 1"),
        (["--crop-size", "0", "64"], "--crop-size 0: expected at least 1"),
        (["--scale-min", "2.0", "--scale-max", "1.0"], "--scale-min 2.0 is larger"),
        (["--preset", "nothing"], "--preset nothing: expected one of scenes"),
    ],
)
def test_values_out_of_bounds_are_one_sentence(flags, message):
    with pytest.raises(UserError, match=message.replace("[", r"\[")):
        parse_train(flags)


def test_data_flag_alone_takes_the_preset_of_that_name():
    command, resumed = parse_train(["--data", "camvid", "--root", "x"])
    expected = PRESETS["camvid"]()
    assert command.config.model == expected.model
    assert command.config.optim == expected.optim
    assert command.config.data.root == "x"
    assert resumed is None and not command.output_given


def test_flags_change_the_preset():
    command, _ = parse_train(["--preset=scenes", "--steps", "7", "--crop-size", "64", "96", "--output", "here"])
    expected = PRESETS["scenes"]()
    assert command.config.optim == dataclasses.replace(expected.optim, steps=7)
    assert command.config.augment == dataclasses.replace(expected.augment, crop_size=(64, 96))
    assert command.config.run.output == "here" and command.output_given


def test_help_names_every_field(capsys):
    with pytest.raises(SystemExit) as end:
        parse_train(["--help"])
    assert end.value.code == 0
    flags = set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))
    fields = dataclasses.fields
    names = {f"--{f.name.replace('_', '-')}" for g in fields(Config) for f in fields(g.default_factory)}
    assert flags >= (names - {"--name"}) | {"--data", "--model", "--preset", "--resume", "--smoke"}
