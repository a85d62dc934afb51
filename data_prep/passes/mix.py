"""Mix files: written from folders and weights, and what is in the sets of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from megapix.errors import InputError
from megapix.shards.index import read_index
from megapix.shards.mix import alike
from megapix.shards.mix.file import ENDINGS, MixedSet, checked, is_mix, read_mix, weight_of, write_mix
from megapix.shards.storage import is_url, shown


def mix(words: Sequence[str], out: Path) -> Iterator[str]:
    """Write a mix file from words SET=WEIGHT; lines about it.

    Raises:
        InputError: a word without a weight, a weight that is no number, a set that is there twice or is no data set,
            sets of different policies, sizes or kinds of classes.
    """
    if out.suffix not in ENDINGS:
        raise InputError(f"--out = {str(out)!r}: expected a name that ends with one of {', '.join(ENDINGS)}")
    if not words:
        raise InputError("mix mixes data sets, but none is given; expected SET=WEIGHT SET=WEIGHT… --out MIX.json")
    sets = checked([_of_word(word) for word in words], "mix")
    lines = list(_lines(sets, str(out)))
    try:
        write_mix(out, sets)
    except OSError as error:
        raise InputError(f"--out = {str(out)!r} cannot be written: {error.strerror or error}") from error
    yield from lines


def report(path: str) -> Iterator[str]:
    """Lines about a mix file: the share of each set, and how often it is gone through while all samples are drawn once.

    Raises:
        InputError: as `read_mix`; or sets that cannot be mixed.
    """
    yield from _lines(read_mix(path), path)


def _of_word(word: str) -> MixedSet:
    path, equals, written = word.rpartition("=")
    try:
        weight = weight_of(float(written)) if equals else None
    except ValueError:
        weight = None
    if weight is None or not path:
        found = f"weight {written!r}" if path else f"{word!r}"
        raise InputError(f"mix: {found} of {shown(path or word)!r}: expected SET=WEIGHT with a number, 0 or more")
    if is_mix(path):
        raise InputError(f"mix: {path!r} is a mix file; give its sets one by one")
    return MixedSet(path, int(weight) if weight.is_integer() else weight)


def _lines(sets: Sequence[MixedSet], path: str) -> Iterator[str]:
    local = [(one, read_index(one.path)) for one in sets if not is_url(one.path)]
    classes, _ = alike.check(local)
    whole = sum(one.share for one in sets)
    known = {one.name: index.samples for one, index in local}
    total, of = sum(known.values()), "" if len(known) == len(sets) else " in its local sets"
    yield f"{path}: {len(sets)} sets, {total:,} images and {len(classes)} classes{of}; 1ep is {total:,} images"
    width = max(len(one.name) for one in sets)
    for one in sets:
        share = float(one.share / whole)
        about = f"  {one.name:{width}}  weight {one.weight:g}, {share:.2%} of the samples"
        if one.name in known:
            about += f", {known[one.name]:,} images: {share * total / known[one.name]:.3g} of its epochs in 1ep"
        else:
            about += ", remote"
        if one.repeat is not None:
            about += f"; leaves after {one.repeat:g}"
        if one.captions != "weighted":
            about += f"; captions: {one.captions}"
        yield about + f"; {shown(one.path)}"
