"""What was checked is not checked again until it changes, by real processes and files."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megapix.errors import InputError
from megapix.shards.index import read_index
from megapix.shards.table import check_table
from megapix.shards.tables.stamps import once

TABLES = ("shards.bin", "samples.bin", "captions.bin")


@pytest.fixture
def folder(own_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set whose tables are a minute old."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in TABLES:
        aged(own_shards / name)
    return own_shards


def aged(path: Path, seconds: float = 60.0) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def flip(path: Path) -> None:
    """Change a byte, and nothing that a look at the file tells."""
    about = path.stat()
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))


@pytest.mark.parametrize("name", TABLES)
def test_a_table_is_read_once(folder: Path, name: str) -> None:
    index = read_index(folder)
    check_table(folder, index, records=True)
    flip(folder / name)
    check_table(folder, index, records=True)  # nobody looks into it
    aged(folder / name, 50.0)
    with pytest.raises(InputError, match=f"{name} has sha256 .* the index does not match its shards"):
        check_table(folder, index, records=True)


def test_what_was_checked_for_less_is_checked_for_more(folder: Path) -> None:
    """Captions that nobody asked for, records of samples."""
    index = read_index(folder)
    check_table(folder, index, captions=False)
    flip(folder / "captions.bin")
    check_table(folder, index, captions=False, records=True)
    with pytest.raises(InputError, match=r"captions.bin has sha256"):
        check_table(folder, index)


def test_what_has_just_been_written_is_not_stamped(folder: Path) -> None:
    """It may change once more within the tick of the file system's clock, which no later look would tell."""
    (folder / "samples.bin").touch()
    index = read_index(folder)
    check_table(folder, index)
    flip(folder / "samples.bin")
    with pytest.raises(InputError, match=r"samples.bin has sha256"):
        check_table(folder, index)


@pytest.mark.parametrize("spoil", [lambda path: path.write_text("{"), lambda path: path.write_text("[3]")])
def test_a_damaged_stamp_is_none(folder: Path, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    index = read_index(folder)
    check_table(folder, index)
    (stamp,) = (tmp_path / "cache" / "megapix" / "checked").glob("*.json")
    spoil(stamp)
    flip(folder / "samples.bin")
    with pytest.raises(InputError, match=r"samples.bin has sha256"):
        check_table(folder, index)


def test_nowhere_to_keep_a_stamp(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then each process checks for itself; a folder in /tmp that others may write to is not used."""
    (tmp_path / "file").write_text("")
    shared = tmp_path / f"megapix-{os.getuid()}"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    index = read_index(folder)
    check_table(folder, index)
    flip(folder / "samples.bin")
    with pytest.raises(InputError, match=r"samples.bin has sha256"):
        check_table(folder, index)
    assert not list(shared.iterdir())
    shared.chmod(0o700)
    flip(folder / "samples.bin")
    check_table(folder, index)
    assert [path.suffix for path in sorted((shared / "checked").iterdir())] == [".json", ".lock"]


RANK = """
import sys
from pathlib import Path
from megapix.shards.tables.stamps import once
folder = Path(sys.argv[1])
def check():
    with open(folder / "checks", "a") as file:
        file.write("x")
print("ready", flush=True)
sys.stdin.readline()
once(folder, "what", check, [folder / "samples.bin"])
"""


def test_ranks_of_a_node_check_once_between_them(folder: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for _ in range(5)
    ]
    for rank in ranks:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "ready\n"
    for rank in ranks:
        rank.communicate("\n")
        assert rank.returncode == 0
    assert (folder / "checks").read_text() == "x"


def test_what_a_check_has_seen_counts_too(folder: Path) -> None:
    """A folder in which a file has come or gone."""
    from megapix.shards.tables.stamps import state_of

    seen: list[int] = []
    tars = folder / "tars"
    tars.mkdir()
    aged(tars)
    for expected in (1, 1):
        once(folder, "tars", lambda: seen.append(1) or state_of([tars]))  # type: ignore[func-returns-value]
        assert len(seen) == expected
    (tars / "new").write_text("")
    once(folder, "tars", lambda: seen.append(1) or state_of([tars]))  # type: ignore[func-returns-value]
    assert len(seen) == 2
