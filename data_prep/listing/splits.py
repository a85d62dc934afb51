"""Splits of a set that lie in one folder: train-00000.parquet beside test-00000.parquet, or train/ beside val/.

They are taken for splits only if every data file, or every folder of a tree, has the name of one, and there are
several: a class called "test" beside "cat" and "dog" is a class. Then `train` alone is taken, unless --split names
another.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from data_prep.listing.base import Entries, ending, is_image
from data_prep.listing.files import files_below, files_in, folders_in
from megapix.errors import InputError, one_of

NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Split -> how people write it."""
CALLED = {name: split for split, names in NAMES.items() for name in names}
ALL = "all"
"""--split that takes every split together, as versions up to 0.2 did."""
_WORDS = "|".join(sorted(CALLED, key=len, reverse=True))
FILE = re.compile(rf"({_WORDS})(?=[-_.\d]|$)", re.IGNORECASE)
FOLDER = re.compile(rf"({_WORDS})[-_]?\d*", re.IGNORECASE)


def split_of(name: str, files: bool = True) -> str | None:
    """The split that a file belongs to by its outermost folder that has a split's name, or its own name; else None.

    Args:
        name: relative, with '/'.
        files: whether the file's own name counts.
    """
    *folders, base = name.split("/")
    matches = [FOLDER.fullmatch(folder) for folder in folders] + ([FILE.match(base)] if files else [])
    return next((CALLED[match[1].lower()] for match in matches if match), None)


def check_split(option: str) -> str:
    """--split as `of_split` takes it: 'val' is 'validation'; another word is a folder's name, as it is.

    Raises:
        InputError: it is not the name of a split.
    """
    if option and option not in (ALL, *CALLED):
        raise InputError(f"--split = {option!r} is not the name of a split{one_of(option, [*NAMES, ALL])}")
    return CALLED.get(option, option)


def of_split(
    names: Sequence[str], wanted: str, entries: Entries, where: str, files: bool = True
) -> tuple[list[str], dict[str, str]]:
    """(the data files to read, in their order; what plan and index record of the split, nothing where all are read).

    Files of other splits are counted in `entries` as passed over.

    Args:
        names: of all data files, relative to the source.
        wanted: --split; empty takes `train` where there are several splits.
        where: the source, for messages.
        files: whether the names of the files count, beside those of the folders they lie in.

    Raises:
        InputError: `wanted` is not there, or there are several splits and `train` is none of them.
    """
    splits = [split_of(name, files) for name in names]
    taken = _taken(splits, wanted, entries, where, "files")
    for split in splits:
        if taken and split != taken:
            entries.pass_over(f"split {split}" if split else "no split")
    chosen = [name for name, split in zip(names, splits, strict=True) if not taken or split == taken]
    return chosen, {"split": taken} if taken else {}


def tree_of_split(root: Path, wanted: str, entries: Entries) -> tuple[Path, dict[str, str]]:
    """(folder to read, what plan and index record) of a tree of images such as train/cat, val/cat; `root` itself where
    there are no splits.

    Files elsewhere below `root` are counted in `entries` as passed over.

    Raises:
        InputError: as `of_split`.
        OSError: a folder cannot be read.
    """
    folders = folders_in(root)
    splits = [CALLED[match[1].lower()] if (match := FOLDER.fullmatch(name)) else None for name in folders]
    taken = _taken(splits, wanted, entries, repr(str(root)), "folders")
    if not taken:
        return root, {}
    if splits.count(taken) > 1:
        both = [folder for folder, split in zip(folders, splits, strict=True) if split == taken]
        raise InputError(f"{str(root)!r}: {' and '.join(both)} are both split {taken}; expected one of them as SOURCE")
    beside = Entries()
    for name in files_in(root, beside):
        beside.pass_over("image outside the class folders" if is_image(name) else ending(name))
    beside.listed -= beside.passed.pop("folder", 0)  # what is in the folders is counted, here and by who reads it
    for folder, split in zip(folders, splits, strict=True):
        if split != taken:
            beside.pass_over(f"split {split}" if split else "no split", len(files_below(root / folder, beside)))
    entries.add(beside)
    return root / folders[splits.index(taken)], {"split": taken}


def _taken(splits: Sequence[str | None], wanted: str, entries: Entries, where: str, what: str) -> str:
    """The split to take; empty for all that is there."""
    found = Counter(split for split in splits if split)
    counts = ", ".join(f"{split} {found[split]:,}" for split in NAMES if split in found)
    if wanted == ALL:
        return ""
    if wanted:
        if wanted not in found:
            raise InputError(f"{where}: there is no split {wanted!r}, expected one of those there: {counts or 'none'}")
        return wanted
    if len(found) < 2:
        return ""
    if found.total() < len(splits):
        entries.remark(
            f"some {what} are named as splits are ({counts}), others are not: all are taken; --split takes one of them"
        )
        return ""
    if "train" not in found:
        raise InputError(
            f"{where} holds several splits and no train ({what}: {counts}); expected --split with one of them"
        )
    entries.remark(f"split train alone is taken ({what}: {counts}); --split takes another one")
    return "train"
