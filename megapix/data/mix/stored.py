"""What is stored beside the samples of a run's data, for each set of a mix: features and captions, by sample number."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megapix.data.locate import Located
from megapix.data.mix.located import Data, LocatedMix
from megapix.errors import InputError
from megapix.shards.captions import Caption
from megapix.shards.image_features import FeatureReader, Features
from megapix.shards.table import Captions
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import TextFeatures
from megapix.shards.text_recipe import Recipe


@dataclass(frozen=True)
class MixedFeatures:
    """An image encoder's features of each set of a mix: of one encoder, in one dtype."""

    mix: LocatedMix
    parts: tuple[Features, ...]

    @property
    def digest(self) -> str:
        """The encoder's."""
        return self.parts[0].digest

    @property
    def width(self) -> int:
        """Channels."""
        return self.parts[0].width

    @property
    def dtype(self) -> str:
        """As of `Features`."""
        return self.parts[0].dtype

    @property
    def flip(self) -> bool:
        """Whether mirror images have theirs, in all sets."""
        return all(part.flip for part in self.parts)


@dataclass(frozen=True)
class MixedText:
    """A text encoder's features of the captions of each set of a mix; None of a set that shows the empty caption."""

    mix: LocatedMix
    parts: tuple[TextFeatures | None, ...]

    @property
    def leading(self) -> TextFeatures:
        """Those of the first set that has some."""
        return next(part for part in self.parts if part is not None)

    @property
    def recipe(self) -> Recipe:
        """How they are made."""
        return self.leading.recipe

    @property
    def encoder(self) -> str:
        """Its name."""
        return self.leading.encoder


class _MixedFeatureReader:
    def __init__(self, features: MixedFeatures) -> None:
        self._mix, self._parts = features.mix, [FeatureReader(part) for part in features.parts]
        self.features = features

    def read(self, sample: int, mirrored: bool) -> NDArray[Any]:
        number, inside = self._mix.place(sample)
        return self._parts[number].read(inside, mirrored)


class _MixedTextReader:
    def __init__(self, features: MixedText) -> None:
        self._mix, self.features = features.mix, features
        self._parts = [None if part is None else TextFeatureReader(part) for part in features.parts]
        self._leading = next(part for part in self._parts if part)

    def read(self, sample: int, caption: int) -> NDArray[np.int16]:
        number, inside = self._mix.place(sample)
        part = self._parts[number]
        return self._leading.empty() if part is None else part.read(inside, caption)


class _MixedCaptions:
    def __init__(self, mix: LocatedMix) -> None:
        self._mix = mix
        self._parts = [Captions(one.folder, one.index) for one in mix.sets]

    def of(self, sample: int) -> tuple[Caption, ...]:
        number, inside = self._mix.place(sample)
        shown = self._mix.mixed[number].captions
        if shown == "none":
            return (Caption(""),)
        found = self._parts[number].of(inside)
        return found[:1] if shown == "first" else found


def feature_reader(features: Features | MixedFeatures) -> FeatureReader | _MixedFeatureReader:
    """Reads the features of any sample; each process needs its own."""
    return _MixedFeatureReader(features) if isinstance(features, MixedFeatures) else FeatureReader(features)


def text_reader(features: TextFeatures | MixedText) -> TextFeatureReader | _MixedTextReader:
    """Reads the features of any caption; each process needs its own."""
    return _MixedTextReader(features) if isinstance(features, MixedText) else TextFeatureReader(features)


def caption_reader(data: Data) -> Captions | _MixedCaptions:
    """Reads the captions of any sample; each process needs its own."""
    return Captions(data.folder, data.index) if isinstance(data, Located) else _MixedCaptions(data)


def captioned(data: Data) -> Sequence[tuple[str, Located]]:
    """(how messages call it, set) of each set whose captions are shown.

    Raises:
        InputError: no set of a mix shows captions.
    """
    if isinstance(data, Located):
        return (("", data),)
    found = [(one.path, place) for one, place in zip(data.mixed, data.sets, strict=True) if one.captions != "none"]
    if not found:
        raise InputError("data.path: every set of the mix has captions: none, and the network takes text")
    return found
