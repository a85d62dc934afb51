"""The data of a run, one set or a mix of several: what `data.path` names."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from megapix.config import DataConfig
from megapix.data.locate import Located, locate, locate_version
from megapix.data.mix.order import MixOrder, Stretch, extended
from megapix.data.mix.turns import parts_of
from megapix.data.order import Order
from megapix.shards.mix import alike
from megapix.shards.mix.file import FORMAT, MixedSet, is_mix, read_mix

Weights: TypeAlias = tuple[tuple[int, tuple[int, ...], tuple[float | None, ...]], ...]
"""A schedule as checkpoints hold it: rows of a `Stretch`. Empty for one set."""


@dataclass(frozen=True)
class MixIndex:
    """What the indexes of a mix say together."""

    samples: int
    """Of all sets."""
    digest: str
    """Of the sets' digests in order, with the classes that are renamed and the choice of captions."""
    class_names: tuple[str, ...]
    image_policy: dict[str, Any]
    bucket_samples: dict[int, int]
    """Bucket -> samples of all sets."""

    @property
    def classes(self) -> tuple[str, ...]:
        """As of an index: one for each class."""
        return self.class_names


@dataclass(frozen=True)
class LocatedMix:
    """A mix and the places of its files; its samples are numbered through the sets in order."""

    mixed: tuple[MixedSet, ...]
    """What the mix file says of each set."""
    sets: tuple[Located, ...]
    labels: tuple[tuple[int, ...], ...]
    """Class of the mix for each class of each set."""
    index: MixIndex
    weights: tuple[Stretch, ...] = ()
    """The schedule of the run; until there is one, the file's own weights from 0 on."""

    @property
    def remote(self) -> bool:
        """Whether the tar files of some set lie below a URL."""
        return any(one.remote for one in self.sets)

    @property
    def faults(self) -> tuple[str, ...]:
        """Those of the sets."""
        return tuple(fault for one in self.sets for fault in one.faults)

    @property
    def newer(self) -> str:
        """Digest of the newest index of the first set of which an older version is used."""
        return next((one.newer for one in self.sets if one.newer), "")

    @property
    def digests(self) -> tuple[str, ...]:
        """Those of the sets, in order."""
        return tuple(one.index.digest for one in self.sets)

    @cached_property
    def first(self) -> NDArray[np.int64]:
        """The first sample number of each set: int64 [S]."""
        return np.cumsum([0, *(one.index.samples for one in self.sets)])[:-1]

    def say(self) -> list[str]:
        """Lines about the mix: weight, size and limit of each set."""
        now, whole = self.weights[-1], self.index.samples
        lines = [f"mix of {len(self.sets)} sets; an epoch ('1ep') is all their samples, {whole:,} images"]
        for one, place, part, repeat in zip(self.mixed, self.sets, now.weights, now.repeats, strict=True):
            limit = "" if repeat is None else f", leaves after {repeat:g} epochs"
            share = part / sum(now.weights)
            lines.append(f"  {one.name}: {share:.2%} of the samples, {place.index.samples:,} images{limit}")
        return lines

    def row(self, order: MixOrder, before: int, position: int) -> dict[str, float]:
        """Scalars: share of each set between two positions, and how many epochs of it lie before the second."""
        drawn = order.drawn(position)
        shares = (drawn - order.drawn(before)) / max(1, position - before)
        row = {f"data/share/{one.name}": float(share) for one, share in zip(self.mixed, shares, strict=True)}
        epochs = drawn / np.array(order.totals)
        return row | {f"data/epoch/{one.name}": float(epoch) for one, epoch in zip(self.mixed, epochs, strict=True)}

    def place(self, sample: int) -> tuple[int, int]:
        """(set, number of the sample in it)."""
        number = int(np.searchsorted(self.first, sample, "right")) - 1
        return number, sample - int(self.first[number])

    def stretch(self, position: int) -> Stretch:
        """The weights of the file, from a position on."""
        return Stretch(position, parts_of([one.share for one in self.mixed]), tuple(one.repeat for one in self.mixed))


Data: TypeAlias = Located | LocatedMix
"""What a run trains on."""


def find(config: DataConfig, kept: Sequence[str] = (), labelled: bool = True) -> Data:
    """Find and check the data set of `data.path`, or those of the mix file there.

    Args:
        kept: digests of the sets that a run began with: of those that have grown, these versions are taken.
        labelled: whether the classes of a mix count.

    Raises:
        InputError: as `locate`; or what is wrong with the mix file or its sets. StorageError: cannot be read now.
    """
    if not is_mix(config.path):
        return locate_version(config, kept[0]) if len(kept) == 1 else locate(config)
    mixed = read_mix(config.path)
    places = [replace(config, path=one.path) for one in mixed]
    sets = tuple(map(locate, places))
    if len(kept) == len(sets):
        digests = zip(places, sets, kept, strict=True)
        sets = tuple(one if one.index.digest == digest else locate_version(at, digest) for at, one, digest in digests)
    classes, labels = alike.check([(one, place.index) for one, place in zip(mixed, sets, strict=True)], labelled)
    buckets = Counter[int]()
    for place in sets:
        buckets.update(place.index.bucket_samples)
    index = MixIndex(
        sum(place.index.samples for place in sets),
        _digest(mixed, sets),
        classes,
        sets[0].index.image_policy,
        dict(sorted(buckets.items())),
    )
    found = LocatedMix(mixed, sets, tuple(map(tuple, labels)), index)
    return replace(found, weights=(found.stretch(0),))


def scheduled(data: Data, weights: Weights, position: int) -> Data:
    """The data with the schedule of a run that has `weights` behind it, and goes on at a position."""
    if isinstance(data, Located):
        return data
    schedule = extended([Stretch(*row) for row in weights], data.stretch(position if weights else 0))
    return replace(data, weights=schedule)


def with_weights(data: Data, weights: Weights) -> Data:
    """The data with that schedule, of one set none."""
    return data if isinstance(data, Located) else replace(data, weights=tuple(Stretch(*row) for row in weights))


def order_of(data: Data, config: DataConfig, seed: int, batch: int) -> Order | MixOrder:
    """What stands at each position of a run over it."""
    window, groups = config.shuffle_window, config.reading_groups
    if isinstance(data, Located):
        return Order(seed, data.index.shards, window, groups, batch)
    sets = [(one.index.digest, one.index.shards) for one in data.sets]
    return MixOrder(seed, sets, data.weights, window, groups, batch)


def _digest(mixed: Sequence[MixedSet], sets: Sequence[Located]) -> str:
    entries = []
    for one, place in zip(mixed, sets, strict=True):
        entry: dict[str, Any] = {"digest": place.index.digest}
        if one.classes:
            entry["classes"] = one.classes
        if one.captions != "weighted":
            entry["captions"] = one.captions
        entries.append(entry)
    return hashlib.sha256(json.dumps({"format": FORMAT, "sets": entries}, sort_keys=True).encode()).hexdigest()
