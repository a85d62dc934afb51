"""Stages of training: a run that is initialized from another's weights, with a fresh optimizer, position and EMA.

Between stages data, classes, image size, buckets, objective, learning rate, REPA and precision may change. Positions of
patches and pixels are computed, for any size. Classes have a row each in a table, and are known by their names
(`with_classes`). The rest of the network may not change, nor what its text input means: its encoder, and how features
are made.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from megapix import config
from megapix.checkpoint.manifest import STATE_NAME, Stage
from megapix.config import Config
from megapix.errors import InputError
from megapix.files import sha256_of
from megapix.weights import read as weights
from megapix.weights.about import About, Weights, exported_file

CLASS_TABLE = "y_embedder.embedding_table.weight"
"""Name of the parameter with a row for each class, and the null class's last."""

TEXT = ("digest", "normalize", "scale", "prefix", "padding")
"""Options of `TextConfig` that say what a text feature means."""


def kind(c: Config) -> bool | None:
    """Which weights of `init` to load, as the argument of `load_weights`: whatever a file holds, or EMA or raw ones."""
    if exported_file(Path(c.init)) and c.init_weights == "ema":
        return None
    return c.init_weights == "ema"


def check(c: Config) -> None:
    """Check that a run of this (resolved) configuration may start from the weights of its `init`; reads no weights.

    Raises:
        InputError: there are none, or network or text features differ; names each option and both values.
    """
    about = weights.about(c.init, kind(c))
    different = [
        f"model.{key} is {before!r} there and {after!r} here"
        for (key, before, _), (_, after, _) in zip(config.leaves(about.model), config.leaves(c.model), strict=True)
        if before != after and not (key == "num_classes" and before and after)
    ]
    keys = (*TEXT, "max_tokens") if c.text.padding == "attended" else TEXT  # then it says how much padding there is
    for key in keys if c.model.text_width else ():
        before, after = getattr(about.text, key), getattr(c.text, key)
        if before != after and before != "":  # imported weights do not know their encoder
            different.append(f"text.{key} is {before!r} there and {after!r} here")
    if different:
        raise InputError(f"init = {c.init!r} is another network: {'; '.join(different)}")
    weights.check_whole(c.init, kind(c))


def with_classes(initial: Weights, own: Tensor, classes: tuple[str, ...]) -> tuple[Weights, str]:
    """Weights for a run of these classes, and a line about their table if it is not simply that of `initial`.

    Rows go by the classes' names. Without a name in common, or with numbers for names (imported weights), they go by
    their numbers if there are as many, and else all start fresh. The last row, the null class, always stays.

    Args:
        own: the run's own initial table [classes + 1, D], which fresh rows are taken from.
    """
    theirs = initial.about.classes
    known = {} if theirs == tuple(map(str, range(len(theirs)))) else {name: row for row, name in enumerate(theirs)}
    rows = [known.get(name) for name in classes]
    found = sum(row is not None for row in rows)
    if theirs == classes or (not found and len(theirs) == len(classes)):
        return initial, ""
    before = initial.tensors[CLASS_TABLE]
    table = own.detach().to(before.dtype).clone()
    table[-1] = before[-1]
    for row, there in enumerate(rows):
        if there is not None:
            table[row] = before[there]
    fresh = f"{found} of {len(classes)} rows by name, the others" if found else f"all {len(classes)} rows"
    line = (
        f"class table: {fresh} start fresh, the null class stays"
        if found < len(classes)
        else (f"class table: {len(classes)} rows by name, of {len(theirs)}")
    )
    return Weights(initial.tensors | {CLASS_TABLE: table}, initial.about), line


def of(about: About) -> tuple[Stage, ...]:
    """The stages before a run that starts from these weights, oldest first."""
    source = Path(about.source).resolve()
    hashed = source / STATE_NAME if source.is_dir() else source
    return (*about.stages, Stage(str(source), sha256_of(hashed), about.kind, about.images_seen))
