"""Where the text of a run comes from: a frozen encoder and captions, or features stored with the shards.

It is checked here as a whole, before the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megapix.config import Config, TextConfig
from megapix.data.arrays import Extras
from megapix.data.locate import Located, have_captions
from megapix.data.mix.located import Data
from megapix.data.mix.stored import MixedFeatures, MixedText, captioned
from megapix.data.read import FirstCaptions
from megapix.errors import InputError
from megapix.files import read_bytes, size_of
from megapix.shards.image_features import Features
from megapix.shards.index import CAPTIONS_NAME, INDEX_NAME, read_index
from megapix.shards.mix.file import FORMAT, is_mix
from megapix.shards.table import check_table
from megapix.shards.text_features import TextFeatures, read_text_features
from megapix.shards.text_recipe import recipe_of
from megapix.text import text_of as read_text

if TYPE_CHECKING:
    import torch

    from megapix.encoders.text import TextEncoder


@dataclass(frozen=True)
class TextSource:
    """The source of text; a network that takes classes has neither encoder nor features."""

    encoder: TextEncoder | None = None
    features: TextFeatures | MixedText | None = None
    """Of the training set, in place of an encoder."""
    validation_features: TextFeatures | None = None
    """Of the validation set, if there is one."""
    captions: Sequence[str] = ()
    """The first captions of the validation set, or without one of the training set; of a mix, of the first set with
    captions."""
    prompts: Sequence[str] = ()
    """Rows of the sample grids: those captions, or log.prompts."""

    @property
    def digest(self) -> str:
        """The encoder's; empty with classes."""
        if self.encoder:
            return self.encoder.digest
        return self.features.recipe.digest if self.features else ""

    @property
    def about(self) -> str:
        """A phrase for the first line of a run; empty with classes."""
        if self.features:
            return f"with stored text features ({self.features.encoder})"
        return "with captions" if self.encoder else ""

    def to(self, device: torch.device) -> None:
        """Move the encoder to a device."""
        if self.encoder:
            self.encoder.to(device)

    def extras(self, features: Features | MixedFeatures | None) -> Extras:
        """What the loader reads of the training set, with REPA's `features`."""
        return Extras(features, captions=self.encoder is not None, text=self.features)

    @property
    def validation(self) -> Extras:
        """What the loader reads of the validation set."""
        return Extras(captions=self.encoder is not None, text=self.validation_features)


def text_of(requested: Config, data: Data, validation: Located | None) -> TextSource:
    """The text of a run over a training set, and over its validation set.

    Raises:
        InputError: no captions, neither encoder nor features, or features of another encoder, width or options.
    """
    width = requested.model.text_width
    if not width:
        return TextSource()
    sets = captioned(data)
    for place, key in (*((each, "data.path") for _, each in sets), (validation, "validation.path")):
        if not place:
            continue
        have_captions(place, requested.data)
        if not (place.folder / CAPTIONS_NAME).stat().st_size:
            alone = isinstance(data, Located) or place is validation
            instead = "" if alone else '; with "captions": "none" in the mix file it has the empty one'
            raise InputError(f"{key} = {str(place.folder)!r} has no captions, and the network takes text{instead}")
    place = validation or sets[0][1]
    captions = FirstCaptions(place.folder, place.index)
    if requested.text.encoder:
        encoder = load(requested.text, requested.text.encoder)
        check_width(encoder.width, width, f"text.encoder = {requested.text.encoder!r}")
        prompts = read_prompts(Path(requested.log.prompts), "log.prompts") if requested.log.prompts else captions
        return TextSource(encoder, captions=captions, prompts=prompts)
    features = _stored(requested, data, sets)
    if requested.log.prompts:
        raise InputError(f"log.prompts = {requested.log.prompts!r}: prompts of your own need text.encoder")
    validation_features = None
    if validation:
        validation_features = read_text_features(validation.folder, validation.index, requested.validation.path)
    if validation and validation_features is None:
        raise InputError(
            f"validation.path = {requested.validation.path!r} holds no text features: store them with "
            f"'data_prep embed-text {requested.validation.path} --encoder ENCODER'"
        )
    if validation_features:
        validation_features.require(features.recipe)
    return TextSource(None, features, validation_features, captions, captions)


def _stored(requested: Config, data: Data, sets: Sequence[tuple[str, Located]]) -> TextFeatures | MixedText:
    """The text features of the training set, or of each set of a mix that shows captions."""
    found = dict[str, TextFeatures]()
    for path, place in sets:
        shown = path or requested.data.path
        features = read_text_features(place.folder, place.index, shown)
        if features is None:
            raise InputError(
                f"data.path = {shown!r} holds no text features: give text.encoder, or store them with "
                f"'data_prep embed-text {shown} --encoder ENCODER'"
            )
        features.require(recipe_of(requested.text, requested.model.text_width))
        if found:
            features.require(next(iter(found.values())).recipe)
        found[path] = features
    if isinstance(data, Located):
        return found[""]
    return MixedText(data, tuple(found.get(one.path) for one in data.mixed))


def load(text: TextConfig, name: str, option: str = "text.encoder") -> TextEncoder:
    """The frozen encoder of that folder or hub name, with a run's options.

    Raises:
        InputError: no such encoder, or another one than text.digest.
    """
    from megapix.encoders import text as text_encoder  # late: torch and transformers, which no other check needs

    encoder = text_encoder.load(name, recipe_of(text), text.micro_batch, option)
    if text.digest not in ("", encoder.digest):
        raise InputError(
            f"{option} = {name!r} has the digest {encoder.digest[:16]}…, but text.digest = {text.digest!r}"
        )
    return encoder


def check_width(width: int, wanted: int, shown: str) -> None:
    """Refuse features of another width than the network takes; `shown` is what has them."""
    if width != wanted:
        raise InputError(f"{shown} has {width} channels, but model.text_width = {wanted}")


def read_prompts(path: Path, option: str) -> Sequence[str]:
    """The first captions of a shard folder, or the lines of a text file that are not blank.

    Raises:
        InputError: it cannot be read, is damaged, or has none.
    """
    shown = f"{option} = {str(path)!r}"
    try:
        if size_of(path / INDEX_NAME) is not None:
            check_table(path, index := read_index(path))
            if not size_of(path / CAPTIONS_NAME):
                raise InputError(f"{shown} has no captions")
            return FirstCaptions(path, index)
        lines = tuple(line.strip() for line in read_text(read_bytes(path)).split("\n") if line.strip())
        if is_mix(str(path)) and FORMAT in "".join(lines[:5]):
            raise InputError(f"{shown} is a mix file: expected a text file of prompts, or one shard folder")
    except (OSError, ValueError) as error:
        raise InputError(
            f"{shown}: cannot be read: {error}; expected a file of UTF-8 text, one prompt per line, or a shard folder"
        ) from error
    if not lines:
        raise InputError(f"{shown} holds no prompt")
    return lines
