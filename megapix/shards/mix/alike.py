"""What data sets must have in common to be used as one, and their classes joined by name: for mixes and for merging."""

from __future__ import annotations

from collections.abc import Sequence

from megapix.errors import InputError, one_of
from megapix.shards.index import Index
from megapix.shards.mix.file import MixedSet

UNCLASSED = "images"
"""The one class of a set without classes."""
MADE = ("format", "quality")
"""Keys of the image policy that say how `data_prep write` stored the images: not what they are."""
UNITED = ("bucket_min", "merged")
"""Keys of the image policy that say what was done to rare buckets, in each set by itself."""
DEFAULTS = {"draft": False, "version": 1, "icc": "convert"}
"""What an image policy means that does not have the key."""


def check(sets: Sequence[tuple[MixedSet, Index]], classes: bool = True) -> tuple[tuple[str, ...], list[list[int]]]:
    """Check that sets can be mixed; `joined` classes of them.

    Args:
        classes: whether their classes count: a network that takes text knows of none.

    Raises:
        InputError: they cannot, naming two of them.
    """
    named = [renamed(index.class_names, one.classes, f"set {one.name!r}") for one, index in sets]
    for number, (other, theirs) in enumerate(sets):
        (first, index), earlier = sets[0], sets[:number]
        check_policies(index, theirs, first.path, other.path, free=("applied",))
        if classes:
            check_classes(named[0], named[number], first.path, other.path)
        for one, before in earlier:
            if before.digest == theirs.digest:
                raise InputError(f"{other.path!r} is the same data set as {one.path!r}; give each set once")
    return joined(named)


def check_policies(mine: Index, theirs: Index, folder: str, other: str, free: Sequence[str] = ()) -> None:
    """Check that the images of two sets were made in the same way; `free` are keys that may differ.

    Raises:
        InputError: naming both folders, the key and both values.
    """
    first, second = DEFAULTS | mine.image_policy, DEFAULTS | theirs.image_policy
    for key in sorted(first | second, key="buckets".__eq__):  # these follow from the others
        if key not in (*MADE, *UNITED, *free) and first.get(key) != second.get(key):
            raise InputError(
                f"the images of {folder!r} were made with {key} = {first.get(key)!r}, those of "
                f"{other!r} with {second.get(key)!r}; expected the same image policy"
            )


def check_classes(mine: Sequence[str], theirs: Sequence[str], folder: str, other: str) -> None:
    """Check that the classes of two sets can be told apart by name.

    Raises:
        InputError: naming both folders, what their classes are, and some of them.
    """
    if _kind(mine) != _kind(theirs):
        raise InputError(
            f"the classes of {folder!r} are {_kind(mine)} ({_shown(mine)}), those of {other!r} "
            f"{_kind(theirs)} ({_shown(theirs)}); they cannot be joined by name"
        )


def renamed(classes: Sequence[str], names: dict[str, str], where: str) -> tuple[str, ...]:
    """The classes with the names that they have in a mix.

    Raises:
        InputError: one of `names` is no class of the set.
    """
    if missing := [name for name in names if name not in classes]:
        raise InputError(
            f"{where}: classes names {missing[0]!r}, which is no class of it{one_of(missing[0], [*classes])}"
        )
    return tuple(names.get(name, name) for name in classes)


def joined(classes: Sequence[Sequence[str]]) -> tuple[tuple[str, ...], list[list[int]]]:
    """(class names in the order in which they appear, number there of each class of each set)."""
    names = list(dict.fromkeys(name for some in classes for name in some))
    numbers = {name: number for number, name in enumerate(names)}
    return tuple(names), [[numbers[name] for name in some] for some in classes]


def _kind(classes: Sequence[str]) -> str:
    if tuple(classes) == (UNCLASSED,):
        return "none"
    return "numbers" if tuple(classes) == tuple(map(str, range(len(classes)))) else "names"


def _shown(classes: Sequence[str]) -> str:
    return ", ".join(map(repr, classes[:3])) + ", …" * (len(classes) > 3)
