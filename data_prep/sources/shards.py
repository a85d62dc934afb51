"""Existing WebDataset shards, to be written again: an image under each key, with its class number or captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_prep.sources.base import UNCLASSED, Entries, Item, ending
from data_prep.sources.captions import check_found
from data_prep.sources.files import files_in
from data_prep.sources.reading import PLAIN, Reading
from data_prep.sources.tar_samples import TarSample, labels_of, samples_of
from data_prep.sources.tars import TarReader, members
from megapix.errors import InputError
from megapix.shards.index import read_index

KIND = "WebDataset shards"


@dataclass(frozen=True)
class Shards:
    """Tar files of samples; class names are taken from an index beside them if there is one, else they are numbers."""

    classes: tuple[str, ...]
    items: Sequence[Item]
    reader: TarReader = field(default_factory=TarReader)
    about: dict[str, Any] = field(default_factory=lambda: {"kind": KIND})
    entries: Entries = field(default_factory=Entries)

    @staticmethod
    def recognises(path: Path) -> bool:
        """Whether there is a tar file that holds a `cls`, `txt` or `json` member."""
        tars = _tars(path, Entries())
        return bool(tars) and any(
            name.lower().endswith((".cls", ".txt", ".json")) for name, _, _ in members(tars[0], Entries())
        )

    @classmethod
    def open(cls, path: Path, reading: Reading = PLAIN) -> Shards:
        """List the samples of a shard, or of a folder of shards.

        Raises:
            InputError: no tar file, a damaged one, a sample without a class where others have one, or a key that no
                sample has.
        """
        entries = Entries()
        tars = _tars(path, entries)
        if not tars:
            raise InputError(f"source {str(path)!r} holds no tar file")
        found: list[tuple[Path, TarSample]] = [
            (tar, sample) for tar in tars for sample in samples_of(tar, entries, reading)
        ]
        if not found:
            raise InputError(f"source {str(path)!r} holds no sample")
        samples = [sample for _, sample in found]
        check_found(reading.keys, {key for sample in samples for key in sample.caption_keys}, f"source {str(path)!r}")
        items = [
            Item(
                f"{tar.name}/{sample.name}",
                label,
                sample.caption,
                (str(tar), sample.offset, sample.size),
                fault=sample.fault,
            )
            for (tar, sample), label in zip(found, labels_of(samples, str(path)), strict=True)
        ]
        about = {"kind": KIND, **reading.recorded()}
        if all(sample.label is None for sample in samples):
            return cls((UNCLASSED,), items, about=about, entries=entries)
        count = 1 + max(item.label for item in items)
        names = names_beside(path)
        return cls(
            names if len(names) >= count else tuple(str(n) for n in range(count)), items, about=about, entries=entries
        )


def names_beside(folder: Path) -> tuple[str, ...]:
    """Class names in our index beside the shards; none if there is no such index (or a stranger's)."""
    try:
        return read_index(folder).class_names
    except InputError:
        return ()


def _tars(path: Path, entries: Entries) -> list[Path]:
    """The tar files; other files of the folder are counted as passed over."""
    if not path.is_dir():
        return [path] if path.suffix == ".tar" else []
    tars = []
    for name in files_in(path, entries):
        if name.endswith(".tar"):
            tars.append(path / name)
        else:
            entries.pass_over(ending(name))
    return tars
