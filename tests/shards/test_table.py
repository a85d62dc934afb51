"""`samples.bin` against its description: records of 36 bytes, little endian, written and read."""

from __future__ import annotations

from pathlib import Path

from megapix.shards.index import TABLE_NAME, ClassEntry, Index, ShardEntry
from megapix.shards.table import PART, SampleRecord, Table

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
