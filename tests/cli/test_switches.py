"""Options that are on, off or 'auto': every way to write them, on the command line and in files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapix import config
from megapix.cli.parse import parse_run, parse_step
from megapix.config import Config
from megapix.dist import World
from megapix.errors import InputError


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ([], "auto"),
        (["--machine.compile"], True),
        (["--machine.no-compile"], False),
        (["--machine.no_compile"], False),
        (["--machine.compile", "auto"], "auto"),
        (["--machine.compile=auto"], "auto"),
        (["--machine.compile", "true"], True),
        (["--machine.compile", "False"], False),
        (["--machine.compile=false"], False),
        (["--machine.no-compile", "--machine.compile"], True),  # the last one counts, as everywhere
        (["--machine.compile", "--machine.no-compile"], False),
    ],
)
def test_a_switch_on_the_command_line(written: list[str], meant: object) -> None:
    for parse in (parse_run, parse_step):
        found = parse(["xl-256", *written, "--data.workers", "7"], World())
        assert (found.machine.compile, found.data.workers) == (meant, 7)


@pytest.mark.parametrize("value", ["maybe", "1"])
def test_another_word_is_refused(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_run(["xl-256", "--machine.compile", value], World())
    assert ended.value.code == 2
    assert "nvalid choice" in capsys.readouterr().err


@pytest.mark.parametrize("value", [True, False, "auto"])
def test_a_switch_in_a_file(value: object, tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(json.dumps({"machine": {"compile": value, "pixel_checkpointing": "full"}}))
    found = parse_run(["--config", str(path)], World()).machine
    assert (found.compile, found.pixel_checkpointing) == (value, "full")
    assert parse_run(["--config", str(path), "--machine.no-compile"], World()).machine.compile is False


@pytest.mark.parametrize("value", [1, "on", None])
def test_another_value_in_a_file_is_refused(value: object) -> None:
    with pytest.raises(InputError, match=r"machine: compile = .*: input should be"):
        config.from_dict(Config, {"machine": {"compile": value}}, "run.json")


def test_what_auto_stands_for_on_cpus() -> None:
    machine = config.on_cpus(config.preset("xl-256").machine)
    assert (machine.compile, machine.pixel_checkpointing) == (False, "full")
    asked = config.MachineConfig(compile=True, pixel_checkpointing="selective", micro_batch=3)
    assert config.on_cpus(asked) == asked
