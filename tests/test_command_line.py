"""Dataclasses as command lines."""

from dataclasses import dataclass
from typing import Optional

import pytest

from lit_gpt.command_line import parse
from lit_gpt.errors import UserError


@dataclass
class Args:
    name: str
    """A name."""
    rate: float = 1.0
    """A rate."""
    fast: bool = False
    """A flag."""
    size: Optional[int] = None
    """A size."""


def test_a_flag_may_stand_alone_or_take_a_value():
    assert parse(Args, ["--fast", "--name", "a"], "").fast
    assert parse(Args, ["--name", "a", "--fast"], "").fast
    assert not parse(Args, ["--name", "a", "--fast", "false"], "").fast
    assert parse(Args, ["--name=a", "--fast=true"], "").fast


def test_flags_win_over_files_and_files_over_presets(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("rate: 3e-4\nsize: 2\n")
    preset = lambda args: ["--rate=0.5", "--size=1", f"--name={args.name}!"]
    args = parse(Args, ["--name", "a", "--config", str(file), "--size", "3"], "", preset)
    assert args == Args(name="a", rate=3e-4, fast=False, size=3)
    assert parse(Args, ["--name", "a"], "", preset) == Args(name="a", rate=0.5, size=1)


@pytest.mark.parametrize(
    "argv",
    [["--name", "a", "--unknown", "1"], ["--name", "a", "--rate", "x"], ["--name", "a", "--config", "none.yaml"], []],
)
def test_mistakes_are_one_line(argv):
    with pytest.raises(UserError) as error:
        parse(Args, argv, "")
    assert "\n" not in str(error.value)


def test_help_is_the_docstrings(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Args, ["--help"], "What it does.")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "What it does." in text and "A rate." in text
