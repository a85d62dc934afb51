"""The local copy of a remote index: a fetch that is broken off or killed goes on where it was, in another process."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megapix.shards.index import TABLE_NAME, read_index, write_index
from megapix.shards.storage import PART
from tests.support.launch import ROOT
from tests.support.servers import Faults, faulty

SIZE = 2 * PART + 1000
"""Bytes of a table: three requests."""
FETCH = """
import sys
from megapix.config import DataConfig
from megapix.data.mirror import mirrored
from megapix.errors import StorageError
from megapix.shards.index import TABLE_NAME
config = DataConfig(path=sys.argv[1], cache=sys.argv[2], timeout=float(sys.argv[3]), outage_minutes=0.02)
try:
    print(mirrored(config, (TABLE_NAME,)))
except StorageError as error:
    sys.exit(f"{error}")
"""


@pytest.fixture
def served(own_shards: Path) -> Path:
    """An index with a table of several parts, whose bytes are of no interest."""
    table = np.random.default_rng(0).bytes(SIZE)
    (own_shards / TABLE_NAME).write_bytes(table)
    index = read_index(own_shards)
    write_index(own_shards, replace(index, table_sha256=hashlib.sha256(table).hexdigest(), known=("", "")))
    return own_shards


def begun(url: str, cache: Path, timeout: float = 0.5) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", FETCH, url, str(cache), str(timeout)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def went_on(url: str, cache: Path, served: Path) -> None:
    """Another process has fetched the rest."""
    process = begun(url, cache)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert (Path(out.strip()) / TABLE_NAME).read_bytes() == (served / TABLE_NAME).read_bytes()
    assert not list(cache.glob("**/*.part"))


def asked(faults: Faults) -> Counter[int]:
    """Offset -> how often the table's bytes from there on were asked for."""
    return Counter(offset for name, offset, _ in faults.sent if name == TABLE_NAME)


def test_answers_that_break_off_end_a_fetch_and_the_next_one_goes_on(served: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    faults, cache = Faults(after=3, breaks=10**6), tmp_path / "cache"  # index.json, shards.bin, the first part
    with faulty(served, faults) as url:
        process = begun(url, cache)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 1
        assert f"{url}/{TABLE_NAME}: " in err
        assert "tried again for 0.02 minutes" in err
        (part,) = cache.glob(f"*/{TABLE_NAME}.part")
        assert part.stat().st_size == PART
        tries, faults.breaks = asked(faults)[PART], 0
        went_on(url, cache, served)
    assert asked(faults) == {0: 1, PART: tries + 1, 2 * PART: 1}, "what was whole is not fetched again"
    halves = [size for name, offset, size in faults.sent if (name, offset) == (TABLE_NAME, PART)]
    assert halves == [PART // 2] * tries + [PART]
    twice = sum(size for name, _, size in faults.sent if name == TABLE_NAME) - SIZE
    assert twice == tries * PART // 2


def test_a_fetch_that_is_killed_is_gone_on_with(served: Path, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    faults, cache = Faults(after=3, stalls=1), tmp_path / "cache"
    with faulty(served, faults) as url:
        process = begun(url, cache, timeout=60)
        while faults.stalls:
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
        process.communicate()
        (part,) = cache.glob(f"*/{TABLE_NAME}.part")
        assert part.stat().st_size == PART
        assert not (part.with_suffix("")).exists(), "half a table has no name"
        went_on(url, cache, served)
    assert asked(faults) == {0: 1, PART: 2, 2 * PART: 1}


@pytest.mark.parametrize("spoil", [b"x", b"x" * (2 * SIZE)], ids=["a byte", "longer"])
def test_a_part_of_something_else_is_fetched_anew(served: Path, tmp_path: Path, spoil: bytes) -> None:
    """Its hash tells, once all of it is there."""
    pytest.importorskip("aiohttp")
    faults, cache = Faults(after=3, breaks=10**6), tmp_path / "cache"
    with faulty(served, faults) as url:
        begun(url, cache).communicate(timeout=60)
        (part,) = cache.glob(f"*/{TABLE_NAME}.part")
        part.write_bytes(spoil + part.read_bytes()[len(spoil) :])
        before, faults.breaks = asked(faults), 0
        went_on(url, cache, served)
    again = {0: 1, PART: 1, 2 * PART: 1}
    rest = {PART: 1, 2 * PART: 1} if len(spoil) == 1 else {}
    assert asked(faults) == before + Counter(again) + Counter(rest)
