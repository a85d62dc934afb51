"""From what the loader has read of a micro batch to what the network is told, on the device.

Classes      class numbers
EncodedText  captions, through a frozen text encoder beside the engine
StoredText   features that were computed before
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from megapix import condition, dist
from megapix.condition import Condition, Told
from megapix.config import Config
from megapix.data.loader import Batch, padded
from megapix.dist import World
from megapix.errors import InputError
from megapix.shards import write_atomic
from megapix.speech import Speech
from megapix.text_features import TextFeatureReader, TextFeatures

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


class Classes:
    """Class numbers of a data set of `num_classes`."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes, self._device = num_classes, device

    def of(self, batch: Batch) -> Condition:
        """The batch's labels."""
        return condition.classes(batch.labels.to(self._device, non_blocking=True), self.num_classes)

    def rows(self, count: int) -> Condition:
        """The first classes."""
        return condition.classes(torch.arange(count, device=self._device), self.num_classes)


class EncodedText:
    """Captions, encoded when they are drawn; `nothing` are the features of the empty one.

    Args:
        say: told of the first caption that had to be cut.
    """

    def __init__(self, encode: Encode, nothing: Told, prompts: Sequence[str], say: Callable[[str], None]) -> None:
        self._encode, self._nothing, self._prompts, self._say = encode, nothing, prompts, say

    def of(self, batch: Batch) -> Condition:
        """Features of the batch's captions."""
        return self._told(batch.captions)

    def rows(self, count: int) -> Condition:
        """Features of the first prompts."""
        return self._told(self._prompts[:count])

    def _told(self, captions: Sequence[str]) -> Condition:
        unsaid = self._encode.first_cut is None
        told = self._encode(captions)
        if unsaid and self._encode.first_cut:
            self._say(self._encode.first_cut)
        return Condition(told, self._nothing)


class StoredText:
    """Features that the loader has read with the images; `nothing` are those of the empty caption.

    Args:
        shown: the features of what the sample grid shows, the first captions of a data set.
    """

    def __init__(self, nothing: Told, device: torch.device, shown: TextFeatures | None = None) -> None:
        self._nothing, self._device, self._shown = tuple(part.to(device) for part in nothing), device, shown

    def of(self, batch: Batch) -> Condition:
        """The batch's features."""
        assert batch.text is not None, "read with the images"
        return Condition(tuple(part.to(self._device, non_blocking=True) for part in batch.text), self._nothing)

    def rows(self, count: int) -> Condition:
        """Features of the first captions."""
        assert self._shown, "given where a grid is drawn"
        reader = TextFeatureReader(self._shown)
        samples = sum(file.samples for file in self._shown.files)
        text = padded([reader.read(sample, 0) for sample in range(min(count, samples))])
        return Condition(tuple(part.to(self._device) for part in text), self._nothing)


def of_run(c: Config, speech: Speech, world: World, device: torch.device, folder: Path | None = None) -> Conditioner:
    """The conditioner of a run. Every rank calls it.

    Args:
        folder: the run folder, which keeps the features of the empty caption; None where nothing is kept.

    Raises:
        Agreed: they cannot be written or read.
    """
    if speech.encoder:
        encode = speech.encoder
        nothing = _kept(folder, lambda: encode([""]), world)
        return EncodedText(encode, tuple(part.to(device) for part in nothing), speech.prompts, world.say)
    if speech.features:
        shown, empty = speech.held_out_features or speech.features, TextFeatureReader(speech.features).empty()
        return StoredText(_kept(folder, lambda: padded([empty]), world), device, shown)
    return Classes(c.model.num_classes, device)


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
