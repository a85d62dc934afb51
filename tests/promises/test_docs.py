"""What the documents name exists: files, modules, commands, targets of make, and links from one to another."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
from pathlib import Path

import pytest

from tests.support.launch import ROOT

DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / ".github").rglob("*.md")])
OTHERS = {
    "compute_dpg_bench.py": "DPG-Bench's",
    "evaluate_images.py": "GenEval's",
    "pipeline.py": "an exported folder's",
    "runtime/utils.py": "DeepSpeed's",
    "runtime/zero/stage_1_and_2.py": "DeepSpeed's",
    "stage_1_and_2.py": "DeepSpeed's",
}
"""Python files that are not ours."""

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


@documents
def test_files(path: Path) -> None:
    """Python files are named from the top, or from the top of a package; other files of ours from the top."""
    text = path.read_text()
    python = set(re.findall(r"(?<![\w./…-])[\w./-]+\.py\b", text)) - set(OTHERS)
    tops = (ROOT, ROOT / "megapix", ROOT / "data_prep")
    assert not {name for name in python if not any((top / name).is_file() for top in tops)}
    others = r"(?<![\w./…-])(?:megapix|data_prep|tests|benchmarks|docs|ds_configs|\.ci|\.github)/[\w./-]*\w"
    assert not {name for name in re.findall(others, text) if not (ROOT / name).exists()}


@documents
def test_modules(path: Path) -> None:
    """Those that are started, and dotted names of our own: modules, or what is in them."""
    text = path.read_text()
    ours = set(re.findall(r"(?<![\w./-])(?:megapix|data_prep|tests|benchmarks)(?:\.[A-Za-z_]\w*)+", text))
    started = set(re.findall(r"python -m ([\w.]+)", text)) | set(re.findall(r"torchrun .*-m ([\w.]+)", text))
    assert not {name for name in started | ours if not name.endswith((".py", ".md", ".json")) and not exists(name)}


@documents
def test_links(path: Path) -> None:
    """To files beside a document, and to headings in them, by the anchors that GitHub makes of these."""
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        other = (path.parent / name).resolve() if name else path
        if target.startswith(("http:", "https:")):
            continue
        if not other.exists() or (anchor and anchor not in anchors(other)):
            wrong.append(target)
    assert not wrong


@documents
def test_targets_of_make(path: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"`make ([\w-]+)`|^make ([\w-]+)", path.read_text(), re.M))
    assert {a or b for a, b in named} <= targets


@documents
def test_tests(path: Path) -> None:
    """Tests that are named without their file."""
    source = "".join(test.read_text() for test in (ROOT / "tests").rglob("test_*.py"))
    named = set(re.findall(r"(?<![\w./])test_\w+(?![\w.])", path.read_text()))
    assert not {name for name in named if f"def {name}(" not in source}


def test_hooks_before_a_commit() -> None:
    """They are those of `make checks`."""
    checks = (ROOT / "Makefile").read_text().partition("\nchecks:")[2].partition("\n\n")[0]
    hooks = re.findall(r"entry: \.venv/bin/(.+)", (ROOT / ".pre-commit-config.yaml").read_text())
    assert len(hooks) == 3
    assert all(f"$(BIN)/{hook} " in checks for hook in hooks)


def exists(name: str) -> bool:
    """Whether a dotted name is a module, which is not imported, or something in one, which is."""
    try:
        return importlib.util.find_spec(name) is not None or pkgutil.resolve_name(name) is not None
    except ModuleNotFoundError:  # its parent is no package
        try:
            return pkgutil.resolve_name(name) is not None
        except (ImportError, AttributeError):
            return False
    except AttributeError:
        return False


def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
