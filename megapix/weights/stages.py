"""Stages of training: a run that is initialized from another's weights, with a fresh optimizer, position and EMA.

Between stages data, image size, buckets, objective, learning rate, REPA and precision may change. The network may not,
nor what its text input means: its encoder, and how features are made.
"""

from __future__ import annotations

from pathlib import Path

from megapix import config
from megapix.checkpoint.manifest import STATE_NAME, Stage
from megapix.config import Config
from megapix.errors import InputError
from megapix.files import sha256_of
from megapix.weights import read as weights
from megapix.weights.about import About, exported_file

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
        if before != after
    ]
    keys = (*TEXT, "max_tokens") if c.text.padding == "attended" else TEXT  # then it says how much padding there is
    for key in keys if c.model.text_width else ():
        before, after = getattr(about.text, key), getattr(c.text, key)
        if before != after and before != "":  # imported weights do not know their encoder
            different.append(f"text.{key} is {before!r} there and {after!r} here")
    if different:
        raise InputError(f"init = {c.init!r} is another network: {'; '.join(different)}")


def of(about: About) -> tuple[Stage, ...]:
    """The stages before a run that starts from these weights, oldest first."""
    source = Path(about.source).resolve()
    hashed = source / STATE_NAME if source.is_dir() else source
    return (*about.stages, Stage(str(source), sha256_of(hashed), about.kind, about.images_seen))
