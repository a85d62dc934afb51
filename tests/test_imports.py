"""Which file may import which: the arrows of docs/architecture.md, checked on every import statement."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

CONTRACT = {"megapix.captions", "megapix.errors", "megapix.shards", "megapix.images", "megapix.storage"}
"""What preparation and loading share."""
STATISTICS = {"megapix.extractors", "megapix.reference"}
"""What preparation and evaluation share."""
FEATURES = {"megapix.encoder", "megapix.features"}
"""What preparation and REPA share."""
TEXT = {"megapix.captions", "megapix.text_encoder", "megapix.text_features"}
"""What preparation and text-to-image training share."""
ALLOWED = {
    "megapix": {"megapix.condition", "megapix.weights", "megapix.sample"},
    "megapix.errors": set(),
    "megapix.shards": {"megapix.errors"},
    "megapix.config": {"megapix.errors"},
    "megapix.dist": {"megapix.errors"},
    "megapix.draws": set(),
    "megapix.ds_config": {"megapix.config", "megapix.errors"},
    "megapix.model": {"megapix.model", "megapix.config"},
    "megapix.condition": set(),
    "megapix.flow": {"megapix.condition", "megapix.config", "megapix.draws"},
    "megapix.pretrained": {"megapix.errors"},
    "megapix.encoder": {"megapix.errors", "megapix.pretrained"},
    "megapix.features": {"megapix.errors", "megapix.shards", "megapix.storage"},
    "megapix.captions": set(),
    "megapix.text_encoder": {"megapix.errors", "megapix.pretrained", "megapix.text_features"},
    "megapix.text_features": {"megapix.errors", "megapix.shards", "megapix.storage"},
    "megapix.repa": {"megapix.condition", "megapix.config", "megapix.flow"},
    "megapix.schedule": {"megapix.config"},
    "megapix.optim": {"megapix.config"},
    "megapix.health": {"megapix.config", "megapix.errors"},
    "megapix.stopping": {"megapix.dist"},
    "megapix.checkpoint": {"megapix.config", "megapix.dist", "megapix.errors", "megapix.shards"},
    "megapix.flat": {"megapix.checkpoint", "megapix.errors"},
    "megapix.nvlabs": {"megapix.config", "megapix.errors", "megapix.flat", "megapix.model", "megapix.weights"},
    "megapix.retention": {"megapix.checkpoint", "megapix.config", "megapix.dist", "megapix.errors"},
    "megapix.claim": {"megapix.dist", "megapix.errors"},
    "megapix.plain": {"megapix.condition", "megapix.config", "megapix.flow", "megapix.model", "megapix.schedule"},
    "megapix.cover": set(),
    "megapix.metrics": {"megapix.config", "megapix.dist", "megapix.events"},
    "megapix.events": set(),
    "megapix.flops": {"megapix.config"},
    "megapix.activations": {"megapix.config", "megapix.flops"},
    "megapix.offload": set(),
    "megapix.chunked": {"megapix.config", "megapix.model"},
    "megapix.recompute": {"megapix.chunked", "megapix.config", "megapix.model", "megapix.offload"},
    "megapix.profiling": {"megapix.dist"},
    "megapix.parameters": {"megapix.config", "megapix.flops"},
    "megapix.sizing": {
        "megapix.sizing",
        *(f"megapix.{name}" for name in ("activations", "checkpoint", "config", "ds_config", "errors", "flops")),
        "megapix.parameters",
    },
    "megapix.blocks": {"megapix.config", "megapix.model"},
    "megapix.images": {"megapix.errors"},
    "megapix.storage": {"megapix.errors"},
    "megapix.extractors": {"megapix.errors", "megapix.shards"},
    "megapix.reference": {"megapix.errors", "megapix.shards"},
    "megapix.evaluation": {
        "megapix.evaluation",
        *(f"megapix.{name}" for name in ("claim", "config", "dist", "errors", "flow", "sample", "shards", "weights")),
        *("megapix.condition", "megapix.conditioner", "megapix.speech"),
        *STATISTICS,
    },
    "megapix.watchdog": {"megapix.dist", "megapix.errors", "megapix.stopping"},
    "megapix.doctor": {
        "megapix",
        *(
            f"megapix.{name}"
            for name in ("checkpoint", "config", "data", "dist", "doctor", "ds_config", "engine", "model", "prepare")
        ),
        "megapix.errors",
        "megapix.features",
    },
    "megapix.bench": {
        *(f"megapix.{name}" for name in ("bench", "checkpoint", "config", "consensus", "data", "dist", "ds_config")),
        *(f"megapix.{name}" for name in ("engine", "errors", "flops", "flow", "prepare", "saver", "shards")),
        "megapix.conditioner",
    },
    "megapix.data": {"megapix.data", "megapix.config", "megapix.draws", "megapix.features", *CONTRACT, *TEXT},
    "data_prep": {"data_prep", *CONTRACT, *STATISTICS, *FEATURES, *TEXT},
}
"""Part -> what it may import of ours; a part not listed may import whatever does not make a circle."""
FORBIDDEN = ("tests", "bench")


def part_of(module: str) -> str:
    """megapix.model.layers -> megapix.model; data_prep.write -> data_prep."""
    names = module.split(".")
    return names[0] if names[0] != "megapix" else ".".join(names[:2])


def modules() -> dict[str, Path]:
    found = {}
    for package in ("megapix", "data_prep"):
        for path in sorted((ROOT / package).rglob("*.py")):
            names = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(names[:-1] if names[-1] == "__init__" else names)] = path
    return found


def imports_of(path: Path, known: set[str]) -> set[str]:
    """Modules of ours (and deepspeed, tests, bench) that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found |= {
                f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in known else node.module
                for alias in node.names
            }
    return {name for name in found if name.split(".")[0] in ("megapix", "data_prep", "deepspeed", *FORBIDDEN)}


GRAPH = {module: imports_of(path, set(modules())) for module, path in modules().items()}


@pytest.mark.parametrize("module", sorted(GRAPH))
def test_arrows_point_the_right_way(module: str) -> None:
    allowed = ALLOWED.get(part_of(module))
    for target in GRAPH[module]:
        root = target.split(".")[0]
        assert root not in FORBIDDEN, f"{module} imports {target}"
        assert root != "deepspeed" or module == "megapix.engine", f"{module} imports deepspeed; engine is the one door"
        assert not (root == "data_prep" and module.startswith("megapix")), f"{module} imports {target}"
        if allowed is not None and root in ("megapix", "data_prep"):
            assert part_of(target) in allowed, f"{module} may not import {target}"


def test_no_circles() -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path, module))
        if module not in done:
            for target in GRAPH.get(module, ()):
                # A package's __init__ names its own public members; that is not an arrow between parts.
                if target in GRAPH and target != "megapix":
                    visit(target, (*path, module))
            done.add(module)

    for module in GRAPH:
        if module != "megapix":
            visit(module, ())


@pytest.mark.parametrize(
    "command",
    [
        ["megapix", "--help"],
        ["megapix", "train", "tiny", "--help"],
        ["megapix", "doctor", "tiny", "--help"],
        ["megapix", "plan", "tiny", "--help"],
        ["megapix", "plan", "xl-256"],
        ["megapix", "import", "--help"],
        ["megapix", "evaluate", "--help"],
        ["megapix", "bench", "step", "tiny", "--help"],
        ["data_prep", "--help"],
    ],
)
def test_help_and_plan_import_nothing_heavy(command: list[str]) -> None:
    code = (
        "import sys; from importlib import import_module; "
        f"main = import_module('{command[0]}.cli').main\n"
        f"try: main({command[1:]})\nexcept SystemExit as e: assert not e.code\n"
        "heavy = {'torch', 'deepspeed', 'webdataset', 'PIL', 'transformers', 'tensorboard'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)
