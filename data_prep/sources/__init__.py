"""Kinds of sources, one file each, and `open_source`, which recognises a kind.

A new source is one file with a class like these and a line in `open_source`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.listing.base import Source
from data_prep.listing.files import each_walked_once
from data_prep.listing.reading import PLAIN, Reading
from megapix.errors import InputError, one_of

CAPTIONED = ("parquet", "image-text", "shards", "metadata")
"""Kinds that have captions under names, for --captions."""
CLASSED = ("shards", "imagenet", "edm2-zip", "parquet", "image-folder", "labelled", "metadata")
"""Kinds that have labels, for --classes FILE."""
SPLIT = ("parquet", "shards", "edm2-zip", "image-folder", "image-text", "metadata")
"""Kinds that know splits, for --split."""


def open_source(path: Path, name: str | None = None, reading: Reading = PLAIN) -> Source:
    """List the source at `path`; its kind is `name`, or is recognised from what is there.

    Raises:
        InputError: nothing there, of no known kind, damaged, not readable, or without one of the keys of --captions.
    """
    try:
        with each_walked_once():
            return _open(path, name, reading)
    except OSError as error:
        raise InputError(f"{str(error.filename or path)!r} cannot be read: {error.strerror or error}") from error


def _open(path: Path, name: str | None, reading: Reading) -> Source:
    from data_prep.sources.edm2_zip import Edm2Zip
    from data_prep.sources.image_folder import ImageFolder
    from data_prep.sources.image_text import ImageText
    from data_prep.sources.imagenet import SynsetTars
    from data_prep.sources.labelled import LabelledImages
    from data_prep.sources.metadata import Metadata
    from data_prep.sources.parquet import Parquet
    from data_prep.sources.shards import Shards

    kinds: dict[str, Any] = {
        "shards": Shards,
        "imagenet": SynsetTars,
        "edm2-zip": Edm2Zip,
        "metadata": Metadata,
        "parquet": Parquet,
        "image-text": ImageText,
        "image-folder": ImageFolder,
    }
    if not path.exists():
        raise InputError(f"source {str(path)!r} does not exist")
    if reading.labels is not None:
        if name not in (None, "labelled"):
            raise InputError(f"--labels goes with a flat set of images, not with --source {name}")
        _check(reading, "labelled")
        return LabelledImages.open(path, reading)
    if name == "labelled":
        raise InputError("--source labelled needs --labels FILE")
    if name is not None and name not in kinds:
        raise InputError(f"--source = {name!r} is not a kind of source{one_of(name, [*kinds, 'labelled'])}")
    name = name or next((name for name, kind in kinds.items() if kind.recognises(path)), None)
    if name is None:
        raise InputError(
            f"source {str(path)!r} is of no known kind ({', '.join([*kinds, 'labelled'])}); expected images, "
            "such as one folder of them for each class"
        )
    _check(reading, name)
    opened: Source = kinds[name].open(path, reading)
    return opened


def _check(reading: Reading, name: str) -> None:
    if reading.keys and name not in CAPTIONED:
        raise InputError(
            f"--captions names columns or JSON keys, which --source {name} has not; expected {', '.join(CAPTIONED)}"
        )
    for option, given, kinds in (
        ("--split", reading.split, SPLIT),
        ("--image-key", reading.image_keys, ("shards",)),
        ("--class-order", reading.class_order, ("image-folder", "edm2-zip")),
        ("--classes FILE", reading.classes and reading.classes.numbers is not None, CLASSED),
    ):
        if given and name not in kinds:
            raise InputError(f"{option} has no meaning with --source {name}; expected {', '.join(kinds)}")
