"""What became of every entry that a source listed: a file, a tar or zip member, a parquet row."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megapix.errors import InputError
from megapix.files import write_atomic

ACCOUNT_NAME = "entries.json"
SHOWN = 6
"""Kinds that the closing line names."""


@dataclass(frozen=True)
class Account:
    """Counts that add up to `listed`."""

    listed: int
    used: int
    rejected: int
    """`rejected.jsonl` has the reason of each."""
    filtered: dict[str, int]
    """Option -> samples that it took."""
    parts: int
    """Captions, labels and metadata of samples."""
    passed: dict[str, int]
    """Kind -> entries that belong to no sample."""
    remarks: list[str] = field(default_factory=list)
    """What else is to be known of the whole set, a sentence each."""
    notes: dict[str, int] = field(default_factory=dict)
    """What is said of used samples besides -> how many: 'icc converted', 'icc unusable', 'upscaled', …"""

    def save(self, out: Path) -> None:
        """Write it beside the index, whose identity it is no part of."""
        write_atomic(out / ACCOUNT_NAME, (json.dumps(self._data(), indent=1, ensure_ascii=False) + "\n").encode())

    def __str__(self) -> str:
        return ", ".join(self._counts())

    def noted(self, size: int) -> Iterator[str]:
        """A line for each thing that is to be known of used images of that size.

        Args:
            size: pixels, as in the image policy.
        """
        left = dict(self.notes)
        if count := left.pop("upscaled", 0):
            yield f"{count:,} of {self.used:,} images are smaller than {size} pixels and were upscaled"
        if count := left.pop("icc converted", 0):
            yield f"{count:,} images were converted to sRGB by their ICC profiles"
        if count := left.pop("icc unusable", 0):
            yield f"{count:,} images have an ICC profile that cannot be used: their colors are as they are stored"
        for what, count in left.items():
            yield f"{count:,} images were {what}"

    def _data(self) -> dict[str, Any]:
        data = asdict(self)
        for key in ("remarks", "notes"):
            if not data[key]:
                del data[key]
        return data

    def _counts(self) -> Iterator[str]:
        yield f"{self.used:,} used"
        yield f"{self.rejected:,} rejected"
        yield f"{sum(self.filtered.values()):,} filtered{_kinds(self.filtered)}"
        yield f"{self.parts:,} part of a sample"
        yield f"{sum(self.passed.values()):,} passed over{_kinds(self.passed)}"


def load(out: Path) -> Account | None:
    """The account of a prepared folder; None where an older version made it.

    Raises:
        InputError: it is damaged.
    """
    path = out / ACCOUNT_NAME
    try:
        return Account(**json.loads(path.read_bytes()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise InputError(f"{path} is damaged: {error}") from error


def _kinds(counts: dict[str, int]) -> str:
    """' (.bmp 12, hidden 3)', the most frequent first."""
    shown = [f"{kind} {count:,}" for kind, count in Counter(counts).most_common(SHOWN)]
    more = [f"{len(counts) - SHOWN} more kinds"] if len(counts) > SHOWN else []
    return f" ({', '.join(shown + more)})" if counts else ""
