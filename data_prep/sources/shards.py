"""Existing WebDataset shards, to be written anew: an image under each key, with its class number or caption."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.samples import TarSample, labels_of, samples_of
from data_prep.source import UNCLASSED, Item
from data_prep.sources.tars import TarReader, members
from megapix.errors import InputError


@dataclass(frozen=True)
class Shards:
    """Tar files of samples; class names are taken from an index beside them if there is one, else they are numbers."""

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: TarReader = field(default_factory=TarReader)
    about: dict[str, Any] = field(default_factory=lambda: {"kind": "WebDataset shards"})

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there is a tar file that holds a `cls`, `txt` or `json` member."""
        tars = _tars(path)
        return bool(tars) and any(name.endswith((".cls", ".txt", ".json")) for name, _, _ in members(tars[0]))

    @classmethod
    def open(cls, path: Path) -> Shards:
        """List the samples of a shard, or of a folder of shards.

        Raises:
            InputError: no tar file, a damaged one, or a sample without an image, or without a class where others have
                one.
        """
        tars = _tars(path)
        if not tars:
            raise InputError(f"source {str(path)!r} holds no tar file")
        found: list[tuple[Path, TarSample]] = [(tar, sample) for tar in tars for sample in samples_of(tar)]
        if not found:
            raise InputError(f"source {str(path)!r} holds no sample")
        samples = [sample for _, sample in found]
        items = [
            Item(f"{tar.name}/{sample.name}", label, sample.caption, (str(tar), sample.offset, sample.size))
            for (tar, sample), label in zip(found, labels_of(samples, str(path)), strict=True)
        ]
        numbers = tuple(str(n) for n in range(1 + max(item.label for item in items)))
        classes = (UNCLASSED,) if samples[0].label is None else _class_names(path) or numbers
        return cls(classes, items)


def _tars(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(entry for entry in path.iterdir() if entry.suffix == ".tar" and not entry.name.startswith("."))
    return [path] if path.suffix == ".tar" else []


def _class_names(path: Path) -> tuple[str, ...] | None:
    from megapix.shards import INDEX_NAME, read_index

    return read_index(path).class_names if (path / INDEX_NAME).is_file() else None
