"""Conditioners: from a micro batch, or from numbers of classes or captions, to the network's condition.

Classes      class labels
EncodedText  captions, through a frozen text encoder beside the engine
StoredText   text features that were computed before
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import load, save
from torch import Tensor

from megapix.conditioning.text_source import TextSource
from megapix.config import Config
from megapix.data.batch import Batch, padded
from megapix.data.mix.stored import MixedText
from megapix.diffusion.condition import Cond, Condition, classes
from megapix.dist import World, on_all_ranks
from megapix.errors import InputError, StorageError
from megapix.files import read_bytes, size_of, write_atomic
from megapix.outage import error_of
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import TextFeatures

EMPTY_NAME = "empty_caption.safetensors"
"""File of the run folder with the empty caption's features: the null condition from the first step on."""


class Encode(Protocol):
    """What is needed of a text encoder (`encoders.text.TextEncoder`)."""

    first_cut: str | None

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Captions -> features [B, T, C_text], and mask [B, T] unless padding is attended to."""


class Conditioner(Protocol):
    """Makes conditions for training, validation, sample grids and evaluation."""

    def of(self, batch: Batch) -> Condition:
        """Condition of a micro batch."""

    def rows(self, count: int) -> Condition:
        """Condition of the rows of a sample grid: `count` of them at most."""

    @property
    def subjects(self) -> int:
        """How many classes or captions there are to sample."""

    def of_subjects(self, subjects: Sequence[int]) -> Condition:
        """Condition on these classes or captions, by number."""


class Classes:
    """Class labels of a data set of `num_classes`."""

    def __init__(self, num_classes: int, device: torch.device) -> None:
        self.num_classes, self._device = num_classes, device

    def of(self, batch: Batch) -> Condition:
        """The batch's labels."""
        return classes(batch.labels.to(self._device, non_blocking=True), self.num_classes)

    def rows(self, count: int) -> Condition:
        """The first classes."""
        return self.of_subjects(range(min(count, self.num_classes)))

    @property
    def subjects(self) -> int:
        """All classes."""
        return self.num_classes

    def of_subjects(self, subjects: Sequence[int]) -> Condition:
        """These classes."""
        return classes(torch.tensor(subjects, device=self._device), self.num_classes)


class EncodedText:
    """Captions, encoded on the fly.

    Args:
        null: features of the empty caption, or of a negative prompt.
        captions: the subjects.
        say: called with a message about the first caption that had to be cut.
        prompts: the rows of sample grids; the subjects if None.
    """

    def __init__(
        self,
        encode: Encode,
        null: Cond,
        captions: Sequence[str],
        say: Callable[[str], None],
        prompts: Sequence[str] | None = None,
    ) -> None:
        self._encode, self._null, self._captions, self._say = encode, null, captions, say
        self._prompts = captions if prompts is None else prompts

    def of(self, batch: Batch) -> Condition:
        """Features of the batch's captions."""
        return self._features(batch.captions)

    def rows(self, count: int) -> Condition:
        """Features of the first prompts."""
        return self._features(self._prompts[:count])

    @property
    def subjects(self) -> int:
        """Captions to sample."""
        return len(self._captions)

    def of_subjects(self, subjects: Sequence[int]) -> Condition:
        """Features of these captions."""
        return self._features([self._captions[n] for n in subjects])

    def _features(self, captions: Sequence[str]) -> Condition:
        none_cut = self._encode.first_cut is None
        cond = self._encode(captions)
        if none_cut and self._encode.first_cut:
            self._say(self._encode.first_cut)
        return Condition(cond, self._null)


class StoredText:
    """Features that the loader has read with the images.

    Args:
        null: features of the empty caption.
        captions: features of the captions to sample: a data set's, of which each sample's first caption is taken.
    """

    def __init__(self, null: Cond, device: torch.device, captions: TextFeatures | None = None) -> None:
        self._null, self._device, self._captions = tuple(part.to(device) for part in null), device, captions

    def of(self, batch: Batch) -> Condition:
        """The batch's features."""
        assert batch.text is not None, "read with the images"
        return Condition(tuple(part.to(self._device, non_blocking=True) for part in batch.text), self._null)

    def rows(self, count: int) -> Condition:
        """Features of the first captions."""
        return self.of_subjects(range(min(count, self.subjects)))

    @property
    def subjects(self) -> int:
        """Samples of that data set."""
        assert self._captions, "given where images are sampled"
        return sum(file.samples for file in self._captions.files)

    def of_subjects(self, subjects: Sequence[int]) -> Condition:
        """Features of the first captions of these samples."""
        assert self._captions, "given where images are sampled"
        text = padded([self._reader.read(sample, 0) for sample in subjects], self._captions.recipe.attended)
        return Condition(tuple(part.to(self._device) for part in text), self._null)

    @cached_property
    def _reader(self) -> TextFeatureReader:
        assert self._captions, "given where images are sampled"
        return TextFeatureReader(self._captions)


def of_run(
    c: Config, source: TextSource, world: World, device: torch.device, folder: Path | None = None
) -> Conditioner:
    """The conditioner of a run. Every rank calls it.

    Args:
        folder: the run folder, which stores the features of the empty caption; None stores nothing.

    Raises:
        CollectiveInputError: these features cannot be written or read.
    """
    if source.encoder:
        encode = source.encoder
        null = _stored_null(folder, lambda: encode([""]), world, c.text.padding == "attended")
        null = tuple(part.to(device) for part in null)
        return EncodedText(encode, null, source.captions, world.say, source.prompts)
    if source.features:
        training = source.features.leading if isinstance(source.features, MixedText) else source.features
        captions, empty = source.validation_features or training, TextFeatureReader(training).empty()
        attended = training.recipe.attended
        null = _stored_null(folder, lambda: padded([empty], attended), world, attended)
        return StoredText(null, device, captions)
    return Classes(c.model.num_classes, device)


def _stored_null(folder: Path | None, compute: Callable[[], Cond], world: World, attended: bool) -> Cond:
    """The empty caption's features as the run folder has them; computed and written when the run starts."""
    if folder is None:
        return compute()
    path = folder / EMPTY_NAME

    def write() -> None:
        if world.main and size_of(path) is None:
            tensors = {name: part.cpu() for name, part in zip(("features", "mask"), compute(), strict=False)}
            try:
                write_atomic(path, save(tensors))
            except OSError as error:
                raise error_of(error, f"{path}: cannot be written: {error.strerror}") from error

    def read() -> Cond:
        try:
            null = load(read_bytes(path))
            if attended == ("mask" in null):
                raise InputError(f"{path} is of another text.padding; delete it to have it computed again")
            return (null["features"],) if attended else (null["features"], null["mask"])
        except (InputError, StorageError):
            raise
        except Exception as error:  # safetensors raises errors of its own, of OSErrors and of missing keys
            raise InputError(f"{path}: cannot be read: {error}; delete it to have it computed again") from error

    on_all_ranks(world, write)
    return on_all_ranks(world, read)
