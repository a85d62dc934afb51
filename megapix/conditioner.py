"""From what the loader has read of a micro batch, or from classes or prompts to draw, to what the network is told.

Classes      class numbers
EncodedText  captions, through a frozen text encoder beside the engine
StoredText   features that were computed before
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from megapix import condition, dist, speech
from megapix.condition import Condition, Told
from megapix.config import Config
from megapix.data.loader import Batch, padded
from megapix.dist import World
from megapix.errors import InputError
from megapix.shards import INDEX_NAME, read_index, write_atomic
from megapix.speech import Speech
from megapix.text_features import OPTIONS, Recipe, TextFeatureReader, TextFeatures, read_text_features
from megapix.weights import About

EMPTY_NAME = "empty_caption.safetensors"
"""File of the run folder with the empty caption's features: what stands for no caption, from the first step on."""


class Encode(Protocol):
    """What is needed of a text encoder (`text_encoder.TextEncoder`)."""

    first_cut: str | None

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Captions -> features [B, T, C_text] and mask [B, T]."""


class Conditioner(Protocol):
    """What the parts of a run need to condition the network."""

    def of(self, batch: Batch) -> Condition:
        """What the images of a micro batch are about."""

    def rows(self, count: int) -> Condition:
        """What the rows of a sample grid are about: `count` of them at most."""

    @property
    def subjects(self) -> int:
        """How many classes or captions there are to draw images of."""

    def told(self, subjects: Sequence[int]) -> Condition:
        """Those classes or captions, by number."""


class Classes:
    """Class numbers of a data set of `num_classes`."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes, self._device = num_classes, device

    def of(self, batch: Batch) -> Condition:
        """The batch's labels."""
        return condition.classes(batch.labels.to(self._device, non_blocking=True), self.num_classes)

    def rows(self, count: int) -> Condition:
        """The first classes."""
        return self.told(range(min(count, self.num_classes)))

    @property
    def subjects(self) -> int:
        """All classes."""
        return self.num_classes

    def told(self, subjects: Sequence[int]) -> Condition:
        """Those classes."""
        return condition.classes(torch.tensor(subjects, device=self._device), self.num_classes)


class EncodedText:
    """Captions, encoded when they are drawn; `nothing` are the features of the empty one.

    Args:
        captions: the subjects.
        say: told of the first caption that had to be cut.
        prompts: the rows of sample grids; the subjects if None.
    """

    def __init__(
        self,
        encode: Encode,
        nothing: Told,
        captions: Sequence[str],
        say: Callable[[str], None],
        prompts: Sequence[str] | None = None,
    ) -> None:
        self._encode, self._nothing, self._captions, self._say = encode, nothing, captions, say
        self._prompts = captions if prompts is None else prompts

    def of(self, batch: Batch) -> Condition:
        """Features of the batch's captions."""
        return self._features(batch.captions)

    def rows(self, count: int) -> Condition:
        """Features of the first prompts."""
        return self._features(self._prompts[:count])

    @property
    def subjects(self) -> int:
        """Captions to draw images of."""
        return len(self._captions)

    def told(self, subjects: Sequence[int]) -> Condition:
        """Features of those captions."""
        return self._features([self._captions[n] for n in subjects])

    def _features(self, captions: Sequence[str]) -> Condition:
        unsaid = self._encode.first_cut is None
        told = self._encode(captions)
        if unsaid and self._encode.first_cut:
            self._say(self._encode.first_cut)
        return Condition(told, self._nothing)


class StoredText:
    """Features that the loader has read with the images; `nothing` are those of the empty caption.

    Args:
        drawn: features of the captions to draw images of: a data set's, of which each sample's first caption is taken.
    """

    def __init__(self, nothing: Told, device: torch.device, drawn: TextFeatures | None = None) -> None:
        self._nothing, self._device, self._drawn = tuple(part.to(device) for part in nothing), device, drawn

    def of(self, batch: Batch) -> Condition:
        """The batch's features."""
        assert batch.text is not None, "read with the images"
        return Condition(tuple(part.to(self._device, non_blocking=True) for part in batch.text), self._nothing)

    def rows(self, count: int) -> Condition:
        """Features of the first captions."""
        return self.told(range(min(count, self.subjects)))

    @property
    def subjects(self) -> int:
        """Samples of that data set."""
        assert self._drawn, "given where images are drawn"
        return sum(file.samples for file in self._drawn.files)

    def told(self, subjects: Sequence[int]) -> Condition:
        """Features of the first captions of those samples."""
        text = padded([self._reader.read(sample, 0) for sample in subjects])
        return Condition(tuple(part.to(self._device) for part in text), self._nothing)

    @cached_property
    def _reader(self) -> TextFeatureReader:
        assert self._drawn, "given where images are drawn"
        return TextFeatureReader(self._drawn)


def of_run(c: Config, source: Speech, world: World, device: torch.device, folder: Path | None = None) -> Conditioner:
    """The conditioner of a run. Every rank calls it.

    Args:
        folder: the run folder, which keeps the features of the empty caption; None where nothing is kept.

    Raises:
        Agreed: they cannot be written or read.
    """
    if source.encoder:
        encode = source.encoder
        nothing = _kept(folder, lambda: encode([""]), world)
        nothing = tuple(part.to(device) for part in nothing)
        return EncodedText(encode, nothing, source.captions, world.say, source.prompts)
    if source.features:
        drawn, empty = source.held_out_features or source.features, TextFeatureReader(source.features).empty()
        return StoredText(_kept(folder, lambda: padded([empty]), world), device, drawn)
    return Classes(c.model.num_classes, device)


@dataclass(frozen=True)
class Prompted:
    """What weights that take text are told of prompts."""

    conditioner: Conditioner
    """Its subjects are the prompts."""
    recipe: Recipe
    """How their features were made."""
    stored: bool
    """Whether they were stored with a shard folder, or else are made by the encoder here."""


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
        path: where the prompts were read from. If it is a shard folder that holds their text features as the weights
            want them, these are taken, unless an encoder or a negative prompt is given.
        encoder: folder or hub name of the text encoder; empty is the run's.
        negative: what guidance leads away from; empty is the empty caption.
        batch: prompts that are encoded at once; 0 is as in the run.

    Raises:
        InputError: no encoder is named, or it is another one, or the stored features are of another one.
    """
    text, width, source = about.text, about.model.text_width, about.source
    wanted, missing = speech.recipe(text, width), f"{source} names no text encoder: give --encoder"
    if not (encoder or negative):
        stored = read_text_features(path, read_index(path), str(path)) if (path / INDEX_NAME).is_file() else None
        unlike = stored.recipe.difference(wanted, str(path), OPTIONS) if stored else None
        if stored and not unlike:
            nothing = padded([TextFeatureReader(stored).empty()])
            return Prompted(StoredText(nothing, device, stored), stored.recipe, True)
        missing += ", or --prompts with a shard folder that holds its text features"
        missing += f" ({unlike})" if unlike else ""
    if not (name := encoder or text.encoder):
        raise InputError(missing)
    encode = speech.load(replace(text, micro_batch=batch or text.micro_batch), name, "--encoder")
    speech.check_width(encode.width, width, f"--encoder = {name!r}")
    encode.to(device)
    nothing = encode([negative])
    if encode.first_cut:
        dist.warn(encode.first_cut)
    recipe = replace(wanted, digest=encode.digest)
    return Prompted(EncodedText(encode, nothing, prompts, dist.warn), recipe, False)


def _kept(folder: Path | None, compute: Callable[[], Told], world: World) -> Told:
    """The empty caption's features as the run has them; computed and written when it starts."""
    if folder is None:
        return compute()
    path = folder / EMPTY_NAME

    def write() -> None:
        if world.main and not path.is_file():
            features, mask = (part.cpu() for part in compute())
            try:
                write_atomic(path, save({"features": features, "mask": mask}))
            except OSError as error:
                raise InputError(f"{path}: cannot be written: {error.strerror}") from error

    def read() -> Told:
        try:
            found = load_file(path)
            return found["features"], found["mask"]
        except Exception as error:  # safetensors raises errors of its own, of OSErrors and of missing keys
            raise InputError(f"{path}: cannot be read: {error}; delete it to have it computed again") from error

    dist.together(world, write)
    return dist.together(world, read)
