"""The packages: which may import which, what they may import of others, and how large they may be.

docs/architecture.md shows ALLOWED as a table, and docs/decisions.md says why a line is as it is.
"""

from __future__ import annotations

import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from benchmarks import house
from tests.conftest import SLOWEST

ROOT = Path(__file__).resolve().parent.parent

EVERYBODYS = ("errors", "rng", "files", "dist", "outage", "text", "console", "allocator", "config")
"""What every package of megapix may import."""
TRAIN = (
    "shards encoders data model diffusion conditioning engine checkpoint weights costs resilience trackers monitoring "
    "evaluation"
)
ALLOWED = {
    "errors": "",
    "rng": "",
    "files": "errors outage",
    "dist": "errors",
    "outage": "errors dist",
    "text": "",
    "console": "",
    "allocator": "",
    "config": "errors rng files dist text",
    "shards": "",
    "encoders": "shards",
    "data": "shards",
    "model": "",
    "diffusion": "",
    "checkpoint": "",
    "costs": "checkpoint.layout",
    "weights": "checkpoint model",
    "conditioning": "shards data encoders weights diffusion",
    "engine": "checkpoint model",
    "resilience": "",
    "trackers": "",
    "monitoring": "checkpoint costs model engine trackers",
    "evaluation": "conditioning diffusion weights shards encoders resilience",
    "train": TRAIN,
    "sample": "conditioning diffusion weights",
    "ports": "checkpoint diffusion encoders model monitoring shards weights",
    "parity": "engine model diffusion",
    "launch": "",
    "doctor": f"train {TRAIN}".replace(" evaluation", ""),
    "bench": f"train {TRAIN}".replace(" evaluation", ""),
    "report": "checkpoint monitoring resilience",
    "cli": f"train {TRAIN} sample ports parity launch doctor bench report",
    "__main__": "cli",
    "data_prep": "errors files outage text console allocator shards encoders",
}
"""Room (a package or module of megapix, or data_prep) -> what it may import of megapix, besides EVERYBODYS and itself.

The order is that of the sentence: options, shards, data, network, objective, checkpoint, engine, training, tools.
"""
ONE_DOOR = {
    "deepspeed": "engine",
    "transformers": "encoders",
    "huggingface_hub": "encoders ports",
    "triton": "model",
    "wandb": "trackers",
    "trackio": "trackers",
    "mlflow": "trackers",
}
"""Library -> the package that imports it; the hub's client has two, one for encoders and one for weights."""
MOST_MODULES = 12
"""Modules that a package may have besides its __init__."""
WITHOUT_TORCH = ("config", "shards", "costs", "launch", "report", "cli.parse")
NEEDS_TORCH = "shards.statistics"
HELP = [
    "megapix --help",
    "megapix --version",
    "megapix launch --help",
    "megapix train tiny --help",
    "megapix doctor tiny --help",
    "megapix plan tiny --help",
    "megapix plan xl-256",
    "megapix import --help",
    "megapix sample --help",
    "megapix evaluate --help",
    "megapix bench step tiny --help",
    "megapix runs --help",
    "megapix diff --help",
    "megapix report --help",
    "data_prep --help",
    "data_prep --version",
]

IMPORTS = house.imports(ROOT)
OURS = (*house.PACKAGES, "tests", "benchmarks")


def allowed(room: str) -> list[str]:
    """Modules and packages that a room may import, itself among them."""
    if room == "data_prep":
        return ["data_prep", *(f"megapix.{name}" for name in ALLOWED[room].split())]
    everybodys = EVERYBODYS if room not in EVERYBODYS else ()
    return [f"megapix.{name}" for name in (room, *everybodys, *ALLOWED[room].split())]


def test_every_room_is_in_the_table() -> None:
    assert set(house.arrows(IMPORTS)) == set(ALLOWED)


@pytest.mark.parametrize("room", ALLOWED)
def test_imports_point_the_right_way(room: str) -> None:
    """`megapix` itself, which everybody may import, is its version: it imports nothing before it is asked for it."""
    wrong = [
        f"{module} imports {target}"
        for module, targets in IMPORTS.items()
        for target in sorted(targets - {"megapix"})
        if house.room(module) == room
        and target.split(".")[0] in OURS
        and not any(f"{target}.".startswith(f"{name}.") for name in allowed(room))
    ]
    assert not wrong, f"{room} may import {', '.join(allowed(room))}"


def test_one_door_to_each_library() -> None:
    """So a release of it can break one package, and the other ones do without it."""
    wrong = [
        f"{module} imports {target}"
        for module, targets in sorted(IMPORTS.items())
        for target in sorted(targets)
        if (doors := ONE_DOOR.get(target.split(".")[0])) and house.room(module) not in doors.split()
    ]
    assert not wrong


def test_no_circles() -> None:
    """Neither between packages nor between modules: a module can be read, and tested, after those that it imports."""
    house.floors(house.arrows(IMPORTS))
    ours = {module: targets & set(IMPORTS) - {"megapix"} for module, targets in IMPORTS.items() if module != "megapix"}
    try:
        TopologicalSorter(ours).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_sizes() -> None:
    large = {folder: n for folder, n in house.sizes(ROOT).items() if n > MOST_MODULES}
    assert not large, "modules in a package, besides its __init__"
    long = {name: n for name, n in house.lines(ROOT).items() if n > 400}
    assert not long, "lines of a file"


def test_the_slowest_files_of_tests_are_there() -> None:
    assert [name for name in SLOWEST if not (ROOT / "tests" / name).is_file()] == []


def test_the_documented_table() -> None:
    """docs/architecture.md shows ALLOWED, row by row."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = [
        f"| `{room}` | {', '.join(f'`{name}`' for name in names.split()) or 'nothing more'} |"
        for room, names in ALLOWED.items()
    ]
    assert "\n".join(rows) in text, "expected in docs/architecture.md:\n" + "\n".join(rows)


def test_what_loads_without_torch() -> None:
    """Help, plans and versions answer at once; options and the contract on disk can be read where there is no torch."""
    modules = [
        module
        for module in IMPORTS
        if any(f"{module}.".startswith(f"megapix.{name}.") for name in WITHOUT_TORCH)
        and module != f"megapix.{NEEDS_TORCH}"
    ]
    assert len(modules) > 20
    code = f"""
import sys
from importlib import import_module
def check(what, *heavy):
    loaded = sorted(set(heavy) & set(sys.modules))
    assert not loaded, f"{{what}} loads {{', '.join(loaded)}}"
for command in {HELP}:
    program, *arguments = command.split()
    module = "megapix.cli.main" if program == "megapix" else "data_prep.cli"
    try:
        code = import_module(module).main(arguments)
    except SystemExit as end:
        code = end.code
    assert not code, command
    check(command, "torch", "deepspeed", "webdataset", "PIL", "transformers", "tensorboard")
for module in {modules}:
    import_module(module)
    check(module, "torch", "deepspeed", "transformers")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    """Those that the README shows, wherever they lie."""
    import megapix
    from megapix.diffusion import condition, sampler
    from megapix.ports import load

    assert megapix.condition is condition
    assert megapix.sample.generate is sampler.generate
    assert megapix.load_model is load.load_model
    assert megapix.load is load.load
