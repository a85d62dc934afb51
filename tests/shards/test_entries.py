"""`shards.bin` against its description, the digest against that of version 2, and tables that a stranger wrote."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapix.errors import InputError
from megapix.shards.index import ClassEntry, Index, ShardEntry, read_index, write_index
from megapix.shards.table import SampleRecord, check_table
from megapix.shards.tables import entries, stored
from megapix.shards.tables.entries import SHARDS_NAME, Shards
from tests.support.version_2 import listed

NAMES = ("a.tar", "täglich/ü b.tar", 'sub/c".tar')


def made(count: int) -> list[ShardEntry]:
    """Entries of three tar files and several buckets, in the order of these."""
    generator = np.random.default_rng(count)
    hashes = [hashlib.sha256(name.encode()).hexdigest() for name in NAMES]
    return [
        ShardEntry(NAMES[n % 3], int(generator.integers(1, 9)), 10**12 + n % 3, hashes[n % 3], n // 3)
        for n in range(count)
    ]


def index_of(shards: list[ShardEntry], **other: Any) -> Index:
    samples, policy = sum(e.samples for e in shards), {"applied": "preparation", "buckets": [[8, 8]] * 50}
    about = {"kind": "made", "nested": {"shards": []}, "name": "ü"}
    return replace(
        Index(samples, "", (ClassEntry("a", samples),), shards, "1" * 64, "2" * 64, policy, about, 3), **other
    )


def listed_digest(index: Index) -> str:
    data = listed(index)
    del data["base"]
    return hashlib.sha256((json.dumps(data, indent=1, sort_keys=True) + "\n").encode()).hexdigest()


def by_hand(some: list[ShardEntry]) -> bytes:
    files = list(dict.fromkeys((e.name, e.bytes, e.sha256) for e in some))
    names, end, table = b"".join(name.encode() for name, _, _ in files), 0, b""
    for name, size, sha256 in files:
        table += struct.pack("<QQ", end := end + len(name.encode()), size) + bytes.fromhex(sha256)
    for e in some:
        table += struct.pack("<QII", e.samples, files.index((e.name, e.bytes, e.sha256)), e.bucket)
    return struct.pack("<8sQQQ", b"MPXSHRD1", len(files), len(some), len(names)) + table + names


@pytest.mark.parametrize("small", [True, False], ids=["held", "read in place"])
@pytest.mark.parametrize("count", [1, 2, 7, 31])
def test_a_table_is_read_as_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, small: bool
) -> None:
    monkeypatch.setattr(entries, "PART", 3)
    monkeypatch.setattr(stored, "SMALL", 1 << 20 if small else 100)
    some = made(count)
    (tmp_path / SHARDS_NAME).write_bytes(by_hand(some))
    for table in (Shards.of(some), Shards(tmp_path / SHARDS_NAME)):
        assert list(table) == [table[n] for n in range(count)] == some == list(pickle.loads(pickle.dumps(table)))
        assert b"".join(table.blocks()) == by_hand(some)
        assert table[-1] == some[-1]
        assert table[1:3] == tuple(some[1:3])
        assert table.samples.tolist() == [e.samples for e in some]
        assert table.tar_bytes.tolist() == [e.bytes for e in some]
        assert table.first.tolist() == [sum(e.samples for e in some[:n]) for n in range(count + 1)]
        assert table.buckets.tolist() == [e.bucket for e in some]
        assert list(table.bucket_samples().items()) == [
            (bucket, sum(e.samples for e in some if e.bucket == bucket)) for bucket in sorted({e.bucket for e in some})
        ]
        assert [file.name for file in table.files] == [table.files[n].name for n in range(len(table.files))]
        assert [tuple(file) for file in table.files] == list(dict.fromkeys((e.name, e.bytes, e.sha256) for e in some))
        table.check(sum(e.samples for e in some), 50)


def test_the_digest_is_that_of_version_2(tmp_path: Path) -> None:
    """An index is the same data set in either version: what was made of it stays valid, and runs resume."""
    index = index_of(made(31), base="s3://bucket/set")
    assert index.digest == listed_digest(index)
    write_index(tmp_path, index)
    read = read_index(tmp_path)
    assert (read, read.digest, read.known) == (index, index.digest, (index.identity, index.digest))
    assert replace(read, base="", text={"a": 1}).digest == index.digest
    assert (changed := replace(read, rejected=4)).digest == listed_digest(changed) != index.digest
    old = tmp_path / "old"
    old.mkdir()
    (old / "index.json").write_text(json.dumps(listed(index)))
    assert (read_index(old), read_index(old).digest) == (index, index.digest)
    write_index(old, read_index(old))
    assert [(old / n).read_bytes() == (tmp_path / n).read_bytes() for n in ("index.json", SHARDS_NAME)] == [True, True]


def table_of(folder: Path, index: Index) -> Index:
    """The tables of an index whose records are of no interest."""
    records = b"".join(SampleRecord(0, 1, 512, 0, 0, 0, 0).to_bytes() for _ in range(index.samples))
    (folder / "samples.bin").write_bytes(records)
    (folder / "captions.bin").write_bytes(b"")
    hashes = [hashlib.sha256(data).hexdigest() for data in (records, b"")]
    return replace(index, table_sha256=hashes[0], captions_sha256=hashes[1])


SOME = made(6)
STRANGE: dict[str, tuple[Callable[[], Shards], str]] = {
    "leads up": (lambda: Shards.of([replace(SOME[0], name="a/../../b.tar")]), "leads out of the folder"),
    "absolute": (lambda: Shards.of([SOME[0], replace(SOME[0], name="/etc/b.tar")]), "leads out of the folder"),
    "no name": (lambda: Shards.of([SOME[0], replace(SOME[0], name="")]), "names or sizes of tar files have no sense"),
    "order": (lambda: Shards.of(SOME[::-1]), "not in the order of their buckets"),
    "bucket": (lambda: Shards.of([replace(SOME[0], bucket=50)]), "a shard has bucket 50, but the image policy has 50"),
    "no file": (lambda: Shards(by_hand(SOME)[:-50][:176] + b"\x07" * 16 + by_hand(SOME)[192:]), "has no tar file"),
}


@pytest.mark.parametrize(("make", "words"), STRANGE.values(), ids=STRANGE)
def test_a_strange_table_is_refused_in_one_line(tmp_path: Path, make: Callable[[], Shards], words: str) -> None:
    index = index_of(SOME)
    strange = table_of(tmp_path, replace(index, shards=(shards := make()), known=("", "")))
    strange = replace(strange, samples=int(min(shards.samples.sum(), 100)))
    strange = table_of(tmp_path, strange)
    object.__setattr__(strange, "known", (strange.identity, "3" * 64))
    object.__setattr__(strange, "digest", "3" * 64)
    write_index(tmp_path, strange)
    with pytest.raises(InputError, match=words) as caught:
        check_table(tmp_path, read_index(tmp_path))
    assert "\n" not in str(caught.value)


def test_another_digest_than_the_contents_is_found(tmp_path: Path) -> None:
    """A stranger's index cannot pass for a data set that it is not."""
    index = table_of(tmp_path, index_of(SOME))
    write_index(tmp_path, replace(index, known=(index.identity, "3" * 64)))
    assert read_index(tmp_path).digest == "3" * 64
    with pytest.raises(InputError, match=f"its digest is {index.digest[:16]}…, but it lists 3333333333333333…"):
        check_table(tmp_path, read_index(tmp_path))


DAMAGE: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "short": (lambda data: data[:-1], "shards.bin: it has 303 bytes, expected 304 .3 tar files, 6 entries"),
    "empty": (lambda data: b"", "shards.bin: it does not begin as a table of shards does"),
    "another's": (lambda data: by_hand(SOME[:3]), "shards.bin has 3 tar files and 3 entries, but .* lists 3 and 6"),
    "flipped": (
        lambda data: data[:300] + bytes([data[300] ^ 1]) + data[301:],
        "shards.bin has sha256 .*, but .* lists",
    ),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_table_is_named(tmp_path: Path, damage: Callable[[bytes], bytes], words: str) -> None:
    write_index(tmp_path, table_of(tmp_path, index_of(SOME)))
    (tmp_path / SHARDS_NAME).write_bytes(damage((tmp_path / SHARDS_NAME).read_bytes()))
    with pytest.raises(InputError, match=words):
        check_table(tmp_path, read_index(tmp_path))
    (tmp_path / SHARDS_NAME).unlink()
    with pytest.raises(InputError, match=r"shards.bin is missing, but .*index.json needs it"):
        read_index(tmp_path)


def test_a_table_that_is_written_again_while_it_is_in_use(tmp_path: Path) -> None:
    """A worker that starts later does not take the new set's tar files for those of the index that its run has."""
    write_index(tmp_path, index_of(SOME))
    sent = pickle.dumps(read_index(tmp_path))
    write_index(tmp_path, index_of(SOME[:5]))
    with pytest.raises(InputError, match=r"shards.bin was written again while it is in use"):
        pickle.loads(sent).shards[0]
