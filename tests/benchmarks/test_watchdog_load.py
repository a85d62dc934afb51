"""Rank 0 of a world that is played: it hears all, at little cost, and finds the one rank that is lost."""

from __future__ import annotations

import pytest

from benchmarks import watchdog_load

RANKS = 150
SECONDS = 2.0
"""The watchdog's."""
SLACK = 4.0
"""Seconds of a loaded machine."""


def test_what_it_costs() -> None:
    figures = watchdog_load.play(RANKS, 60.0, 3.0)
    assert figures["% of a core"] < 5.0
    assert figures["open files of rank 0"] < RANKS + 50
    for way in ("to", "from"):
        assert RANKS * 0.5 < figures[f"beats {way} rank 0 a second"] < RANKS * 1.5


@pytest.mark.parametrize(
    ("fault", "after"),
    [
        ("gone", 0.0),
        pytest.param("silent", SECONDS, marks=pytest.mark.long),
        pytest.param("hangs", SECONDS, marks=pytest.mark.long),
    ],
)
def test_a_lost_rank_is_found(fault: str, after: float, capfd: pytest.CaptureFixture[str]) -> None:
    figures = watchdog_load.play(RANKS, SECONDS, 0.0, fault)
    assert after * 0.9 < figures["seconds to find"] < after + SLACK
    assert f"megapix: error: rank {RANKS - 1} on node{(RANKS - 1) // 8} " in capfd.readouterr().err
