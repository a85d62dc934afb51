"""A run that resumes on a mix: why it cannot, and what has changed."""

from __future__ import annotations

from collections.abc import Sequence

from megapix.data.locate import Located
from megapix.data.mix.located import Data, LocatedMix, Weights
from megapix.data.mix.order import Stretch


def other_sets(sets: Sequence[str], digest: str, data: Data, folder: str, path: str) -> str:
    """Why a run cannot resume on another mix than it began with, or on a mix where it had none.

    Args:
        sets: digests of the sets that it began with; none for one set.
        digest: of all its data.
        folder: its checkpoint.
        path: data.path now.
    """
    init = f"a run on other sets is one of its own, which begins with its weights: --init {folder} and another --out"
    before, was = tuple(sets) or (digest,), f"a mix of {len(sets)} sets" if sets else "one set"
    if isinstance(data, Located):
        return f"{folder} was trained on {was}, but {path!r} is no mix file; {init}"
    if not sets:
        return f"{folder} was trained on {was}, but {path!r} is a mix file; {init}"
    if before == data.digests:
        return f"{folder} was trained with other classes or captions of the sets than {path!r} says; {init}"
    if sorted(before) == sorted(data.digests):
        names = dict(zip(data.digests, (one.name for one in data.mixed), strict=True))
        order = ", ".join(names[one] for one in before)
        return f"{folder} was trained on the sets of {path!r} in another order: {order}; give them so"
    added = [one.path for one, now in zip(data.mixed, data.digests, strict=True) if now not in before]
    what = f"{added[0]!r} in {path!r} is none of them" if added else f"{path!r} has {len(data.sets)} of them"
    return f"{folder} was trained on {was}, and {what}; {init}"


def other_weights(weights: Weights, data: Data, position: int) -> list[str]:
    """A line for each weight or limit that changes with the position of the resume."""
    if not isinstance(data, LocatedMix) or weights == data.weights:
        return []
    before, now, lines = Stretch(*weights[-1]), data.weights[-1], list[str]()
    for number, one in enumerate(data.mixed):
        shares = (part.weights[number] / sum(part.weights) for part in (before, now))
        for key, (old, new) in (("weight", shares), ("repeat", (before.repeats[number], now.repeats[number]))):
            if old != new:
                was, will = (f"{n:.4g}" if n is not None else "none" for n in (old, new))
                lines.append(f"{key} of {one.name}: {was} -> {will}, from position {position:,} on")
    return lines
