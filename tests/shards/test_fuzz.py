"""A part of `python -m benchmarks.fuzz_images`: damaged images of every kind are decoded or refused."""

from __future__ import annotations

import os
import signal
import time

import pytest

from benchmarks.fuzz_images import Fault, fault_of, fuzz, kinds_here, mutated
from megapix.shards import pixels


@pytest.mark.long
@pytest.mark.parametrize("kind", kinds_here())
def test_damaged_images(kind: str) -> None:
    """Other files than the last time's in `--seed`; 6 seconds of each kind."""
    *faults, (seen, decoded) = fuzz(kind, 20_000, seed=1, until=time.monotonic() + 6)
    assert not faults
    assert seen > 200
    assert 0 < decoded < seen


def test_some_damaged_images() -> None:
    for kind in kinds_here():
        for number in range(30):
            assert fault_of(mutated(kind, number, 2))[1] == "", (kind, number)


def test_files_are_a_function_of_their_number() -> None:
    assert mutated("png", 7, 0) == mutated("png", 7, 0) != mutated("png", 8, 0)


def test_faults_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another exception, another size."""
    whole = next(data for number in range(99) if fault_of(data := mutated("jpg", number, 0))[0])
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "size_of", lambda _: (1, 1))
        assert fault_of(whole)[1].startswith("size_of is (1, 1), but its pixels are")
    with monkeypatch.context() as patch:
        patch.setattr(pixels, "read", lambda _: {}["no"])
        assert fault_of(whole) == (False, "KeyError: 'no'")


def dies_of_some(data: bytes) -> tuple[bool, str]:
    """Ends its process at file 2 of the test below, finds a fault in file 4, and decodes all others."""
    if data == mutated("bmp", 2, 0):
        os.kill(os.getpid(), signal.SIGSEGV)
    return True, "odd" if data == mutated("bmp", 4, 0) else ""


def test_a_process_that_dies_is_seen_and_the_others_are_looked_at() -> None:
    *faults, counts = fuzz("bmp", 6, 0, look=dies_of_some)
    assert faults == [Fault("bmp", 2, "the process died (exit code -11)"), Fault("bmp", 4, "odd")]
    assert counts == (6, 5)
