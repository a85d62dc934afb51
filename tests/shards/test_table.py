"""`samples.bin` against its description: records of 36 bytes, little endian, written and read."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest

from megapix.errors import InputError
from megapix.shards import table as tables
from megapix.shards.index import TABLE_NAME, ClassEntry, Index, ShardEntry, read_index, write_index
from megapix.shards.table import PART, SampleRecord, Table, check_table

WIDTHS = (4, 4, 8, 4, 4, 8, 4)
"""Bytes of each field of a record."""


def index_of(samples: int) -> Index:
    shards = (ShardEntry("shard-000000.tar", samples, 512, "0" * 64),)
    return Index(
        samples, "", (ClassEntry("a", samples),), shards, "0" * 64, "0" * 64, {"applied": "preparation"}, {}, 0
    )


def by_hand(record: SampleRecord) -> bytes:
    fields = zip(record._fields, record, WIDTHS, strict=True)
    return b"".join(value.to_bytes(width, "little", signed=name == "label") for name, value, width in fields)


def test_a_record_holds_the_largest_numbers() -> None:
    record = SampleRecord(2**32 - 1, 2**31 + 3, 2**40 + 5, -1, 2**32 - 7, 2**63 + 9, 2**32 - 11)
    assert record.to_bytes() == by_hand(record)
    assert len(record.to_bytes()) == 36


def test_records_are_read_by_number_range_and_column(tmp_path: Path) -> None:
    """The range begins and ends within a part that is read in one go, and holds a whole one."""
    count = 2 * PART + 5
    records = [SampleRecord(n % 3, n + 1, 2**33 + 7 * n, n % 5, 2**32 - 1 - n, 2**34 + n, n % 11) for n in range(count)]
    (tmp_path / TABLE_NAME).write_bytes(b"".join(map(by_hand, records)))
    table = Table(tmp_path, index_of(count))
    assert len(table) == count
    assert [table[n] for n in (0, PART, count - 1)] == [records[n] for n in (0, PART, count - 1)]
    assert list(table.rows(PART - 3, count - 1)) == records[PART - 3 : count - 1]
    assert list(table.rows()) == records
    assert table.columns["offset"].tolist() == [record.offset for record in records]


def test_each_record_is_checked_against_its_own_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts that end within shards and between them; an image may end where its tar file does, and no byte later."""
    monkeypatch.setattr(tables, "PART", 4)
    counts = (3, 6, 1, 8, 2)
    shards = [ShardEntry(f"{n}.tar", count, 1024 * (n + 2), "0" * 64) for n, count in enumerate(counts)]
    good = [
        SampleRecord(n, shard.bytes - 512, 512, 0, 0, 0, 0)
        for n, shard in enumerate(shards)
        for _ in range(shard.samples)
    ]

    def check(records: list[SampleRecord]) -> None:
        data = b"".join(map(by_hand, records))
        (tmp_path / TABLE_NAME).write_bytes(data)
        policy = {"applied": "preparation", "buckets": [[8, 8]]}
        index = replace(
            index_of(len(good)), shards=shards, image_policy=policy, table_sha256=hashlib.sha256(data).hexdigest()
        )
        write_index(tmp_path, index)
        check_table(tmp_path, read_index(tmp_path), captions=False, records=True)

    check(good)
    for n, record in enumerate(good):
        for wrong in (record._replace(size=record.size + 1), record._replace(shard=(record.shard + 1) % 5)):
            with pytest.raises(InputError, match=rf"samples.bin: record {n} points outside its shard"):
                check([*good[:n], wrong, *good[n + 1 :]])
