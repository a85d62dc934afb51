"""The condition of prompts, for weights that take text, outside a run: `megapix sample` and `evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from megapix.conditioning import text_source
from megapix.conditioning.conditioner import Conditioner, EncodedText, StoredText
from megapix.data.batch import padded
from megapix.dist import warn
from megapix.errors import InputError
from megapix.shards.index import INDEX_NAME, read_index
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import read_text_features
from megapix.shards.text_recipe import OPTIONS, Recipe, recipe_of
from megapix.weights.about import About


@dataclass(frozen=True)
class Prompted:
    """Prompts as a network's condition."""

    conditioner: Conditioner
    """Its subjects are the prompts."""
    recipe: Recipe
    """How their features were made."""
    stored: bool
    """Whether they are stored in a shard folder; else the encoder computes them here."""


def of_prompts(
    about: About,
    path: Path,
    prompts: Sequence[str],
    device: torch.device,
    encoder: str = "",
    negative: str = "",
    batch: int = 0,
) -> Prompted:
    """The conditioner of weights that take text, for prompts.

    Args:
        path: where the prompts were read from. If it is a shard folder with stored text features as the weights
            want them, these are taken, unless an encoder or a negative prompt is given.
        encoder: folder or hub name of the text encoder; empty is the run's.
        negative: the negative prompt; empty is the empty caption.
        batch: prompts per forward pass of the encoder; 0 is the run's.

    Raises:
        InputError: no encoder is named, or it is another one, or the stored features are of another one.
    """
    text, width, source = about.text, about.model.text_width, about.source
    wanted, missing = recipe_of(text, width), f"{source} names no text encoder: give --encoder"
    if not (encoder or negative):
        stored = read_text_features(path, read_index(path), str(path)) if (path / INDEX_NAME).is_file() else None
        unlike = stored.recipe.difference(wanted, str(path), OPTIONS) if stored else None
        if stored and not unlike:
            null = padded([TextFeatureReader(stored).empty()], stored.recipe.attended)
            return Prompted(StoredText(null, device, stored), stored.recipe, True)
        missing += ", or --prompts with a shard folder that holds its text features"
        missing += f" ({unlike})" if unlike else ""
    if not (name := encoder or text.encoder):
        raise InputError(missing)
    encode = text_source.load(replace(text, micro_batch=batch or text.micro_batch), name, "--encoder")
    text_source.check_width(encode.width, width, f"--encoder = {name!r}")
    encode.to(device)
    null = encode([negative])
    if encode.first_cut:
        warn(encode.first_cut)
    recipe = replace(wanted, digest=encode.digest)
    return Prompted(EncodedText(encode, null, prompts, warn), recipe, False)
