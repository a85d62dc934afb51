"""What the costs of a run are as functions of the ranks: the laws by hand, and the command against counts by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.rank_costs import growing, law, table
from megapix import config
from megapix.config import ModelConfig
from megapix.engine.network import build_network
from tests.support.launch import ROOT


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ([7, 7, 7], "constant"),
        ([1000, 1010, 1015], "constant"),
        ([2, 4, 8], "N; 1,024"),
        ([13, 23, 43], "5·N + 3; 5,123"),
        ([2, 6, 14], "2·N - 2; 2,046"),
        ([100, 50, 25], "shrinks"),
        ([4, 16, 64], ""),
        ([5, 9, 5], ""),
    ],
)
def test_laws_by_hand(numbers: list[int], expected: str) -> None:
    assert law([2, 4, 8], numbers) == expected


def test_too_few_points_are_no_line() -> None:
    assert law([2, 4], [2, 4]) == law([2], [2]) == ""
    assert law([2, 4], [3, 3]) == "constant"


def test_bytes_that_grow_on_rank_0_alone_are_not_said_of_every_rank() -> None:
    found = {
        n: [{"save": {"gather: bytes": 900 * n, "at a.py: one": 900 * n, "at b.py: all": 500 * n}}]
        + [{"save": {"gather: bytes": 900, "at a.py: one": 900, "at b.py: all": 500 * n}}] * (n - 1)
        for n in (2, 4, 8)
    }
    assert table(found).splitlines()[2:] == [
        "| save | gather: bytes | 1,800, 3,600, 7,200 | 900·N; 921,600 | 900, 900, 900 | constant |"
    ]
    assert growing(found).splitlines()[2:] == ["| save | 500 | 512,000 | `b.py: all` |"]


@pytest.mark.long
def test_the_command_on_two_ranks() -> None:
    """A step reduces each gradient to its owner and gathers the weights; a grid's images are sent one by one."""
    command = [sys.executable, "-m", "benchmarks.rank_costs", "--ranks", "2"]
    printed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=500).stdout
    rows = [row.strip("| ").split(" | ") for row in printed.splitlines() if row.startswith("| ")]
    found = {(part, quantity): number for part, quantity, number, *_ in rows}
    model = ModelConfig(patch_size=4, width=32, depth=2, heads=2, pixel_width=8, pixel_depth=2, num_classes=2)
    numbers = sum(p.numel() for p in build_network(model, 0, config.tiny().machine).parameters())
    assert found["step", "reduce: bytes"] == f"{4 * numbers:,}"
    assert found["grid", "broadcast: calls"] == "8"
    assert found["grid", "broadcast: bytes"] == f"{8 * 3 * 16 * 16:,}"
