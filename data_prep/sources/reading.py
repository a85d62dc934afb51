"""How a source is read: what the options of `write` and `index` say of it, in one value that all kinds take."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.sources.captions import CaptionKeys, option_of


@dataclass(frozen=True)
class Reading:
    """Options of reading a source; small, and pickled into worker processes."""

    keys: CaptionKeys = ()
    """JSON keys or parquet columns that hold the captions (--captions)."""
    labels: Path | None = None
    """Label file of a flat set (--labels)."""
    columns: tuple[str, ...] = ()
    """JSON keys or columns that go into `Item.about`, where a sample has them: filters ask for them, or they are
    kept."""

    def recorded(self) -> dict[str, Any]:
        """What plan and index record of it, besides what the list of samples shows; nothing without options."""
        return {"captions": option_of(self.keys)} if self.keys else {}


PLAIN = Reading()
"""Without any option."""
