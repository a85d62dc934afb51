"""A part of `python -m benchmarks.fuzz_sources`: damaged sources are listed or refused, each entry accounted for."""

from __future__ import annotations

import time
from functools import partial

import pytest

from benchmarks.fuzz_images import fuzz
from benchmarks.fuzz_sources import KINDS, fault_of, mutated
from data_prep.listing.base import Entries

pytest.importorskip("pyarrow")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_damaged_sources(kind: str) -> None:
    """Other files than the last time's in `--seed`; 4 seconds of each kind."""
    *faults, (seen, read) = fuzz(kind, 20_000, 1, time.monotonic() + 4, partial(fault_of, kind), mutated)
    assert not faults
    assert seen > 50
    assert 0 < read <= seen


def test_some_damaged_sources() -> None:
    for kind in KINDS:
        for number in range(25):
            assert fault_of(kind, mutated(kind, number, 2))[1] == "", (kind, number)


def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """An entry that is not accounted for, and another exception than those of bad input."""
    whole = next(data for number in range(99) if fault_of("csv", data := mutated("csv", number, 0))[0])
    with monkeypatch.context() as patch:
        patch.setattr(Entries, "part", lambda self, count=1: setattr(self, "listed", self.listed + count))
        assert fault_of("csv", whole)[1] == "6 entries are listed, 5 accounted for"
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.sources.metadata.files_below", lambda *_: {}["no"])
        assert fault_of("csv", whole) == (False, "KeyError: 'no'")
