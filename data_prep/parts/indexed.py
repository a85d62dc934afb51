"""What `index` counts as it reads tar files, and how the index is put together from what all parts have read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.filters.rules import Duplicates, check_columns
from data_prep.listing.base import Entries
from data_prep.listing.captions import check_found
from data_prep.listing.classes import Found, Given
from data_prep.listing.tars import TarBudget
from data_prep.parts.folder import Parts
from data_prep.writing import receipt, versions
from data_prep.writing.finish import finish
from data_prep.writing.held_out import folder_beside, parse_hold_out
from data_prep.writing.pool import Budget, Outcome
from data_prep.writing.survey import Rare
from data_prep.writing.write import WHOLE_NAME, clear, finished_in
from megapix.shards.image_policy import Policy
from megapix.shards.index import Index, read_index

UNFINISHED = "unfinished"
"""File among the receipts while these may be newer than the index."""


@dataclass
class Tally:
    """What is counted of tar files that are read, and held against the budgets."""

    budget: Budget
    tars: TarBudget
    """Its files are all tar files of the set."""
    by_label: bool
    """Whether classes are found among the labels."""
    done: int = 0
    seen: int = 0
    keys: set[str] = field(default_factory=set)
    """Keys of --captions that are there."""
    columns: set[str] = field(default_factory=set)
    """Columns of filters that are there."""
    unreadable: list[tuple[str, str]] = field(default_factory=list)
    labels: Found = field(default_factory=Found)

    def count(self, outcome: Outcome) -> None:
        """Count a tar file.

        Raises:
            InputError: a budget is used up, or there are more names than classes have.
        """
        self.done += 1
        if outcome.unreadable:
            self._reject(outcome.rejected[0].source, outcome.rejected[0].reason)
            return
        self.seen += outcome.samples
        self.budget.samples = self.seen * self.tars.files // self.done  # if the others are like these; exact at the end
        self.budget.spend(outcome.rejected)
        self.keys.update(outcome.caption_keys)
        self.columns.update(outcome.columns)
        for label in outcome.names if self.by_label else ():
            self.labels.add(label)  # too many end the command here, and not when all is read

    def spent(self) -> dict[str, Any]:
        """What was counted, for `add` of another process."""
        found = {"seen": self.seen, "keys": sorted(self.keys), "columns": sorted(self.columns)}
        return found | {"unreadable": self.unreadable, "budget": self.budget.spent()}

    def add(self, spent: Mapping[str, Any]) -> None:
        """Count what another process has counted; errors as in `count`, once the budget knows all samples."""
        for name, reason in spent["unreadable"]:
            self._reject(name, reason)
        self.keys.update(spent["keys"])
        self.columns.update(spent["columns"])
        self.budget.add(spent["budget"])

    def _reject(self, name: str, reason: str) -> None:
        self.unreadable.append((name, reason))
        self.tars.spend(name, reason)


def close(parts: Parts, say: Callable[[str], None] = lambda _: None) -> Index:
    """Put what all parts have read together; return the index.

    Raises:
        InputError: as `put_together`.
    """
    whole, counts = parts.read(WHOLE_NAME), parts.counts()
    budget = Budget(parts.options["max_rejected"], sum(counted["seen"] for counted in counts))
    tars = TarBudget(parts.options["max_rejected_tars"], len(whole["names"]))
    tally = Tally(budget, tars, by_label=False)
    for counted in counts:
        tally.add(counted)
    folders = [parts.out, folder_beside(parts.out)] if whole["hold"] else [parts.out]
    for folder in folders:
        clear(folder)
    there = {folder: index for folder in folders if (index := finished_in(folder))}
    return put_together(parts.out, whole, tally, there, say)


def put_together(
    out: Path, whole: Mapping[str, Any], tally: Tally, there: Mapping[Path, Index], say: Callable[[str], None]
) -> Index:
    """The index of tar files that are all read; that of before is kept as a version.

    Args:
        whole: what is known of them beside their receipts, as JSON has it.
        tally: of all tar files.
        there: folder -> the index that it has.

    Raises:
        InputError: a key of --captions or a column that no sample has, more rejected samples than allowed, or not one
            that can be used.
    """
    check_found(whole["keys"], tally.keys, whole["shown"])
    check_columns(whole["columns"], tally.columns)
    given = Given(**whole["classes"] | {"names": tuple(whole["classes"]["names"])}) if whole["classes"] else None
    policy = Policy.from_dict(whole["policy"])
    make = partial(
        finish,
        out,
        whole["names"],
        lambda labels: given or labels.classes(tuple(whole["known"])),
        whole["base"],
        whole["policy"],
        whole["source"],
        Entries(**whole["listed"]),
        budget=tally.budget,
        hold=parse_hold_out(whole["hold"]),
        captioned=bool(whole["keys"]),
        merge=partial(Rare.below, whole["bucket_min"], policy=policy) if whole["bucket_min"] else None,
        duplicates=Duplicates(*whole["duplicates"]) if whole["duplicates"] else None,
        say=say,
    )
    versions.replaced(there, make)
    with suppress(FileNotFoundError):
        (out / receipt.RECEIPTS / UNFINISHED).unlink()
    return read_index(out)
