"""The samples of a source that are left to be written, and what took the others."""

from __future__ import annotations

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.filters.rules import Filters, check_columns
from data_prep.filters.survey import UNREADABLE, survey
from data_prep.listing.base import Item, Reader
from data_prep.lists.items import Some
from data_prep.parts.part import WHOLE, Part
from data_prep.writing.held_out import Side
from megapix.shards.image_policy import Policy


def by_metadata(
    items: Sequence[Item], filters: Filters, keep: Sequence[str] = ()
) -> tuple[Sequence[Item], Counter[str]]:
    """The items that no filter takes for captions or metadata, and option -> how many it took.

    An item with a fault stays: it will be rejected.

    Args:
        keep: columns that are kept, which must be there, too.

    Raises:
        InputError: a column that not one sample has.
    """
    if filters.columns or keep:
        found = set[str]()
        for item in items:
            found.update(json.loads(item.about) if item.about else ())
        check_columns(filters.named(keep), found)
    if not (filters.captions or filters.where or filters.language):
        return items, Counter()
    left, taken = array("q"), Counter[str]()
    for n, item in enumerate(items):
        if not item.fault and (option := filters.of_sample(item.caption, item.about)):
            taken[option] += 1
        else:
            left.append(n)
    return Some(items, left), taken


def by_pixels(
    reader: Reader,
    items: Sequence[Item],
    filters: Filters,
    policy: Policy,
    workers: int,
    kept: Path | None = None,
    progress: bool = True,
    part: Part = WHOLE,
    side: Side | None = None,
) -> tuple[Sequence[Item], Counter[str], int]:
    """The items that no filter takes for their size or as duplicates, option -> how many it took, and how many of those
    that are left cannot be read.

    Args:
        kept: as `survey`.
        side: the folder whose items are wanted, of all that are looked at and may be the same.
    """
    verdicts = survey(reader, items, filters, policy, workers, kept, progress, part)
    options = filters.options
    if side:
        own = np.fromiter((side.has(item.name) for item in items), np.bool_, len(items))
        items, verdicts = Some(items, np.flatnonzero(own)), verdicts[own]
    left = Some(items, np.flatnonzero((verdicts == 0) | (verdicts == UNREADABLE)))
    taken = Counter({option: int((verdicts == number).sum()) for number, option in enumerate(options, 1)})
    return left, +taken, int((verdicts == UNREADABLE).sum())
