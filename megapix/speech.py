"""Where the text of a run comes from: a frozen encoder and captions, or features stored with the shards.

Everything that can be wrong with it is found here, before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megapix.config import Config, TextConfig
from megapix.data.captions import FirstCaptions
from megapix.data.loader import Beside
from megapix.data.locate import Located
from megapix.errors import InputError
from megapix.features import Features
from megapix.shards import CAPTIONS_NAME, INDEX_NAME, check_table, read_index
from megapix.text_features import Recipe, TextFeatures, read_text_features

if TYPE_CHECKING:
    import torch

    from megapix.text_encoder import TextEncoder


@dataclass(frozen=True)
class Speech:
    """The source of text; neither encoder nor features where the network takes classes."""

    encoder: TextEncoder | None = None
    features: TextFeatures | None = None
    """Of the training set, in place of an encoder."""
    held_out_features: TextFeatures | None = None
    """Of the held-out images, if there are any."""
    captions: Sequence[str] = ()
    """The first captions of the held-out images, or of the training set if there are none."""
    prompts: Sequence[str] = ()
    """What the rows of the sample grids are about: those, or log.prompts."""

    @property
    def digest(self) -> str:
        """The encoder's; empty with classes."""
        if self.encoder:
            return self.encoder.digest
        return self.features.recipe.digest if self.features else ""

    @property
    def about(self) -> str:
        """In words, for the first line of a run; empty with classes."""
        if self.features:
            return f"with stored text features ({self.features.encoder})"
        return "with captions" if self.encoder else ""

    def to(self, device: torch.device) -> None:
        """Move the encoder to a device."""
        if self.encoder:
            self.encoder.to(device)

    def beside(self, features: Features | None) -> Beside:
        """What the loader reads of the training set, with REPA's `features`."""
        return Beside(features, captions=self.encoder is not None, text=self.features)

    @property
    def held_out(self) -> Beside:
        """What is read of the held-out images."""
        return Beside(captions=self.encoder is not None, text=self.held_out_features)


def text_of(asked: Config, located: Located, validation: Located | None) -> Speech:
    """The text of a run over a data set, and over its held-out images.

    Raises:
        InputError: no captions, no encoder and no features, or features of another encoder, width or options.
    """
    width, shown = asked.model.text_width, asked.data.path
    if not width:
        return Speech()
    for place, key in ((located, "data.path"), (validation, "validation.path")):
        if place and not (place.folder / CAPTIONS_NAME).stat().st_size:
            raise InputError(f"{key} = {str(place.folder)!r} has no captions, and the network takes text")
    place = validation or located
    captions = FirstCaptions(place.folder, place.index)
    if asked.text.encoder:
        encoder = load(asked.text, asked.text.encoder)
        check_width(encoder.width, width, f"text.encoder = {asked.text.encoder!r}")
        prompts = read_prompts(Path(asked.log.prompts), "log.prompts") if asked.log.prompts else captions
        return Speech(encoder, captions=captions, prompts=prompts)
    found = read_text_features(located.folder, located.index, shown)
    if found is None:
        raise InputError(
            f"data.path = {shown!r} holds no text features: give text.encoder, or store them with "
            f"'data_prep embed-text {shown} --encoder ENCODER'"
        )
    found.require(recipe(asked.text, width))
    if asked.log.prompts:
        raise InputError(f"log.prompts = {asked.log.prompts!r}: prompts of your own need text.encoder")
    held_out = read_text_features(validation.folder, validation.index, asked.validation.path) if validation else None
    if validation and held_out is None:
        raise InputError(
            f"validation.path = {asked.validation.path!r} holds no text features: store them with "
            f"'data_prep embed-text {asked.validation.path} --encoder ENCODER'"
        )
    if held_out:
        held_out.require(found.recipe)
    return Speech(None, found, held_out, captions, captions)


def load(text: TextConfig, name: str, option: str = "text.encoder") -> TextEncoder:
    """The frozen encoder of that folder or hub name, with a run's options.

    Raises:
        InputError: no such encoder, or another one than text.digest.
    """
    from megapix import text_encoder  # late: torch and transformers, which no other check needs

    encoder = text_encoder.load(name, recipe(text), text.micro_batch, option)
    if text.digest not in ("", encoder.digest):
        raise InputError(
            f"{option} = {name!r} has the digest {encoder.digest[:16]}…, but text.digest = {text.digest!r}"
        )
    return encoder


def recipe(text: TextConfig, width: int = 0) -> Recipe:
    """How a run's features are made; of any width if none is given."""
    return Recipe(
        digest=text.digest,
        width=width,
        max_tokens=text.max_tokens,
        normalize=text.normalize,
        scale=text.scale,
        prefix=text.prefix,
        dtype=text.dtype,
    )


def check_width(found: int, wanted: int, shown: str) -> None:
    """Refuse features of another width than the network takes; `shown` is what has them."""
    if found != wanted:
        raise InputError(f"{shown} has {found} channels, but model.text_width = {wanted}")


def read_prompts(path: Path, option: str) -> Sequence[str]:
    """The first captions of a shard folder, or the lines of a text file that are not blank.

    Raises:
        InputError: it cannot be read, is damaged, or has none.
    """
    shown = f"{option} = {str(path)!r}"
    try:
        if (path / INDEX_NAME).is_file():
            check_table(path, index := read_index(path))
            if not (path / CAPTIONS_NAME).stat().st_size:
                raise InputError(f"{shown} has no captions")
            return FirstCaptions(path, index)
        lines = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown}: cannot be read: {error}; expected a file of UTF-8 text, a prompt a line, or a shard folder"
        ) from error
    if not lines:
        raise InputError(f"{shown} holds no prompt")
    return lines
