"""`python -m benchmarks.house` on a tree whose imports are counted by hand."""

from __future__ import annotations

from graphlib import CycleError
from pathlib import Path

import pytest

from benchmarks import house

FILES = {
    "megapix/__init__.py": "import megapix.roof\n",  # no room of its own
    "megapix/ground.py": "import torch\nimport os.path\n",
    "megapix/wall/__init__.py": "from megapix import ground\n",
    "megapix/wall/left.py": "from megapix.ground import stone\nfrom megapix.wall import right\n",
    "megapix/wall/right.py": "def late():\n    from megapix.ground import stone\n",
    "megapix/wall/top.py": "",
    "megapix/wall/deep/window.py": "",
    "megapix/roof.py": "import megapix.wall.left, megapix.ground\nfrom megapix import wall\n",
    "data_prep/cellar/pump.py": "from data_prep.cellar import pipe\nfrom megapix.wall.left import brick\n" + 7 * "\n",
    "data_prep/cellar/pipe.py": "",
    "tests/test_roof.py": "from megapix import roof\n",
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_counts(root: Path) -> None:
    imported = house.imports(root)
    assert imported["megapix.wall.left"] == {"megapix.ground", "megapix.wall.right"}
    assert imported["megapix.roof"] == {"megapix.wall.left", "megapix.ground", "megapix.wall"}
    rooms = house.arrows(imported)
    assert rooms == {
        "ground": set(),
        "wall": {"ground"},
        "roof": {"wall", "ground"},
        "data_prep": {"wall"},
    }
    assert house.floors(rooms) == 3
    assert house.sizes(root) == {"megapix": 2, "megapix/wall": 3, "megapix/wall/deep": 1, "data_prep/cellar": 2}
    assert house.lines(root).most_common(2)[0] == ("data_prep/cellar/pump.py", 9)


def test_the_table(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert house.main(["--of", str(root)], Path.cwd()) == 0
    *_, row = capsys.readouterr().out.splitlines()
    about = "10 | 4 | 4 | 3 | `megapix/wall`, 3 modules | `data_prep/cellar/pump.py`, 9 lines"
    assert row == f"| {root} | {about} |"


def test_a_circle_has_no_floors(root: Path) -> None:
    (root / "megapix" / "ground.py").write_text("from megapix.roof import tile\n")
    with pytest.raises(CycleError):
        house.floors(house.arrows(house.imports(root)))
