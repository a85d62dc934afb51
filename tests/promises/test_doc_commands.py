"""Commands in the documents: their options exist, and those of "Your own images" run as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import data_prep.cli
import megapix.cli.main
from data_prep.options import COMMANDS
from megapix import console
from megapix.cli import weights
from megapix.cli.parse import parse, parse_run, parse_step
from megapix.cli.tools import Planned
from megapix.config import preset
from megapix.costs.assumptions import PlanOptions
from megapix.dist import World
from megapix.evaluation.options import EvaluateOptions
from megapix.launch import options as launcher
from megapix.sample.options import SampleOptions
from tests.support.launch import ROOT
from tests.support.text_encoders import make

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OF_MEGAPIX = {
    "sample": SampleOptions,
    "evaluate": EvaluateOptions,
    "export": weights.ExportOptions,
    "import": weights.ImportOptions,
    "push": weights.PushOptions,
    "reshard": weights.ReshardOptions,
}
PROGRAMS = ("megapix", "data_prep", "launch.sh")
MAINS: dict[str, Callable[[list[str]], int]] = {"megapix": megapix.cli.main.main, "data_prep": data_prep.cli.main}
SMALL = {
    "--size 256": "--size 32",
    "--size 512": "--size 64",
    "b-256": "tiny",
    "t2i-512": "t2i-tiny",
    "--optim.global-batch 64 --optim.end-at 2000000": "--optim.global-batch 8 --optim.end-at 32",
}
"""What stands in a document -> what a test runs of it on two cores."""


def blocks(path: Path) -> list[str]:
    """The shell blocks of a document."""
    return re.findall(r"^```sh\n(.*?)^```", path.read_text(), re.M | re.S)


def commands(block: str) -> list[str]:
    """The commands of a block, one each, without comments."""
    lines = re.sub(r"\\\n\s*", " ", block).splitlines()
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


OURS = [
    (path.name, command)
    for path in DOCUMENTS
    for block in blocks(path)
    for command in commands(block)
    if Path(shlex.split(command)[0]).name in PROGRAMS and "…" not in command
]


def test_commands_are_found() -> None:
    assert len(OURS) > 40


@pytest.mark.parametrize(("document", "command"), OURS)
def test_options_exist(document: str, command: str) -> None:
    program, *words = shlex.split(command)
    if program.endswith("launch.sh"):
        asked = launcher.parse(words)
        words = [asked.command, *asked.arguments]
    elif program.endswith("data_prep"):
        console.parse(COMMANDS[words[0]], words[1:], "data_prep")
        return
    if ">" in words:
        words = words[: words.index(">")]
    name, arguments = words[0], [word for word in words[1:] if word != "--print-config"]
    if name in OF_MEGAPIX:
        console.parse(OF_MEGAPIX[name], arguments, f"megapix {name}")
        return
    if "--parity" in arguments:
        return
    if "--config" in arguments:  # a file that is not here
        at = arguments.index("--config")
        arguments = [*([] if at else ["xl-256"]), *arguments[:at], *arguments[at + 2 :]]
    if name == "bench":
        parse_step(arguments[1:], World())
    elif name == "plan":
        default = Planned(preset(arguments[0]), PlanOptions())
        parse(Planned, default, "megapix plan", arguments[1:], World())
    else:
        assert name in ("train", "doctor")
        parse_run(arguments, World())


def test_extras_are_those_of_the_package() -> None:
    tomllib = pytest.importorskip("tomllib")
    table = (ROOT / "docs" / "compatibility.md").read_text().partition("## Extras")[2]
    named = {name for cell in re.findall(r"^\| (`.*?) \|", table, re.M) for name in re.findall(r"`(\w+)`", cell)}
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert named == set(extras)


def test_messages_are_those_of_the_program() -> None:
    """What "Troubleshooting" quotes of a message stands in the source."""
    rows = re.findall(r"^\| `([^`|]*)` \|", (ROOT / "docs" / "troubleshooting.md").read_text(), re.M)
    quoted = [part.strip() for row in rows for part in row.split("…") if part.strip()]
    source = " ".join(path.read_text() for top in ("megapix", "data_prep") for path in (ROOT / top).rglob("*.py"))
    plain = re.sub(r'"\s*\n\s*f?"', "", source)
    assert len(quoted) > 5
    assert not [part for part in quoted if part not in plain and not part.startswith("health/")]


@pytest.mark.long
@pytest.mark.parametrize("heading", ["Faces", "Ten classes", "Images with captions"])
def test_own_images(heading: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commands of a section run one after the other, on a small set and with a small network."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "own-images.md").read_text()
    block = re.search(rf"^## {heading}.*?^```sh\n(.*?)^```", text, re.M | re.S)
    assert block
    MADE[heading](tmp_path)
    more = "--optim.global-batch 8 --optim.end-at 32 --data.workers 1"
    for command in commands(block[1]):
        for long, short in SMALL.items():
            command = command.replace(long, short)
        command = command.replace("google/gemma-2-2b-it", "ENCODER").replace("--hold-out 0.02", "--hold-out 0.3")
        command = re.sub(r"^data_prep embed-text.*", r"\g<0> --max-tokens 32 --prefix '' --dtype fp32", command)
        if command.startswith("./launch.sh"):
            command = command.replace("./launch.sh", f"{ROOT}/launch.sh --ranks 1")
            command += "" if "--optim.end-at" in command else f" {more}"
        command = command.replace("megapix sample RUN", "megapix sample RUN --steps 2 --per-class 1")
        if "launch.sh" in command:
            command += " --log.samples-every never --machine.no-compile"
        program, *words = shlex.split(command)
        if program in MAINS:
            assert MAINS[program](words) == 0, command
            continue
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        ours = {"PATH": path, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "DS_ACCELERATOR": "cpu"}
        environment = os.environ | ours
        done = subprocess.run([program, *words], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    with Image.open(tmp_path / "samples.png") as grid:
        assert grid.size[0] >= 32


def draw(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (70, 90, 3), np.uint8)
    Image.fromarray(pixels).save(path)


def faces(folder: Path) -> None:
    for number in range(13):
        draw(folder / "FACES" / f"{number // 5:05}" / f"{number:05}.png", number)


def animals(folder: Path) -> None:
    for number in range(50):
        draw(folder / "ANIMALS" / f"animal-{number % 10}" / f"{number}.png", number)


def pairs(folder: Path) -> None:
    for number in range(11):
        draw(folder / "PAIRS" / f"{number:04}.png", number)
        (folder / "PAIRS" / f"{number:04}.txt").write_text(f"picture {number}")
    (folder / "prompts.txt").write_text("picture 1\npicture 2\n")
    make(folder / "ENCODER", "gemma2", hidden_size=384)


MADE: dict[str, Callable[[Path], Any]] = {"Faces": faces, "Ten classes": animals, "Images with captions": pairs}
