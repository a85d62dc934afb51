"""Existing WebDataset shards, to be written again: an image under each key, with its class number or captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.listing.archives import DamagedTar, check_installed, is_tar, names_in, plain_tar
from data_prep.listing.base import Entries, Item, is_image
from data_prep.listing.captions import check_found
from data_prep.listing.classes import settle
from data_prep.listing.files import files_in
from data_prep.listing.img2dataset import Rows, beside, count_others
from data_prep.listing.reading import PLAIN, Reading
from data_prep.listing.splits import of_split
from data_prep.listing.tar_samples import TarSample, samples_of
from data_prep.listing.tars import TarBudget, TarReader
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
        """Whether the first tar file that is neither empty nor damaged holds a `cls`, `txt` or `json` member, or has a
        table beside.

        Raises:
            DamagedTar: all are empty or damaged.
        """
        damage: DamagedTar | None = None
        for tar in _tars(path, Entries()):
            images: list[bool] = []
            try:
                for name in names_in(tar):
                    if name.lower().endswith((".cls", ".txt", ".json")):
                        return True
                    images.append(is_image(name))
            except DamagedTar as error:
                damage = damage or error
                continue
            if images:
                return beside(tar) is not None and any(images)
        if damage:
            raise damage
        return False

    @classmethod
    def open(cls, path: Path, reading: Reading = PLAIN) -> Shards:
        """List the samples of a shard, or of a folder of shards.

        Raises:
            InputError: no tar file, more damaged ones than allowed, several splits without train, more names than
                classes have, or a key that no sample has.
        """
        entries = Entries()
        tars = _tars(path, entries)
        if not tars:
            raise InputError(f"source {str(path)!r} holds no tar file")
        names, split = of_split([tar.name for tar in tars], reading.split, entries, f"source {str(path)!r}")
        chosen = set(names)
        found = list(_samples([tar for tar in tars if tar.name in chosen], entries, reading))
        if not found:
            raise InputError(f"source {str(path)!r} holds no sample")
        samples = [sample for *_, sample in found]
        check_found(reading.keys, {key for sample in samples for key in sample.caption_keys}, f"source {str(path)!r}")
        whole = [sample for sample in samples if not sample.fault]
        captioned = bool(reading.keys) or any(sample.caption for sample in whole)
        classes, labels = settle([sample.label for sample in whole], reading.classes, captioned, names_beside(path))
        entries.remark(classes.remark)
        settled = iter(labels)
        items = []
        for tar, plain, sample in found:
            label, fault = (0, sample.fault) if sample.fault else next(settled)
            place = (str(plain), sample.offset, sample.size)
            items.append(
                Item(f"{tar.name}/{sample.name}", label, sample.caption, place, about=sample.about, fault=fault)
            )
        return cls(classes.names, items, about={"kind": KIND, **reading.recorded(), **split}, entries=entries)


def _samples(tars: list[Path], entries: Entries, reading: Reading) -> Iterator[tuple[Path, Path, TarSample]]:
    """(tar file, the plain one with its bytes, sample) of each sample; tar files that cannot be read are rejected."""
    budget = TarBudget(reading.max_rejected_tars, len(tars))
    for tar in tars:
        check_installed(tar)
        counted = Entries()
        try:
            plain = plain_tar(tar, reading.unpacked)
            listed = samples_of(plain, counted, reading, Rows(partial(beside, tar), reading), str(tar))
        except DamagedTar as error:
            entries.reject(tar.name, str(error))
            budget.spend(tar.name, str(error))
            continue
        entries.add(counted)
        yield from ((tar, plain, sample) for sample in listed)


def names_beside(folder: Path) -> tuple[str, ...]:
    """Class names in our index beside the shards; none if there is no such index (or a stranger's)."""
    try:
        return read_index(folder).class_names
    except InputError:
        return ()


def _tars(path: Path, entries: Entries) -> list[Path]:
    """The tar files; other files of the folder are counted as parts (img2dataset's tables) or passed over."""
    if not path.is_dir():
        return [path] if is_tar(path.name) else []
    names = files_in(path, entries)
    tars = [name for name in names if is_tar(name)]
    count_others(names, tars, entries)
    return [path / name for name in tars]
