"""Kinds of sources, one file each, and `open_source`, which recognises a kind.

A new source is one file with a class like these and a line in `open_source`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.source import Source
from megapix.errors import InputError, one_of


def open_source(path: Path, name: str | None = None, labels: Path | None = None) -> Source:
    """List the source at `path`; its kind is `name`, or is recognised from what is there.

    Raises:
        InputError: nothing there, of no known kind, damaged, or not readable.
    """
    try:
        return _open(path, name, labels)
    except OSError as error:
        raise InputError(f"{str(error.filename or path)!r} cannot be read: {error.strerror or error}") from error


def _open(path: Path, name: str | None, labels: Path | None) -> Source:
    from data_prep.sources.edm2_zip import Edm2Zip
    from data_prep.sources.image_folder import ImageFolder
    from data_prep.sources.image_text import ImageText
    from data_prep.sources.imagenet import SynsetTars
    from data_prep.sources.labelled import LabelledImages
    from data_prep.sources.parquet import Parquet
    from data_prep.sources.shards import Shards

    kinds: dict[str, Any] = {
        "shards": Shards,
        "imagenet": SynsetTars,
        "edm2-zip": Edm2Zip,
        "parquet": Parquet,
        "image-text": ImageText,
        "image-folder": ImageFolder,
    }
    if not path.exists():
        raise InputError(f"source {str(path)!r} does not exist")
    if labels is not None:
        if name not in (None, "labelled"):
            raise InputError(f"--labels goes with a flat set of images, not with --source {name}")
        return LabelledImages.open(path, labels)
    if name == "labelled":
        raise InputError("--source labelled needs --labels FILE")
    if name is not None:
        if name not in kinds:
            raise InputError(f"--source = {name!r} is not a kind of source{one_of(name, [*kinds, 'labelled'])}")
        return kinds[name].open(path)
    for kind in kinds.values():
        if kind.recognises(path):
            return kind.open(path)
    raise InputError(
        f"source {str(path)!r} is of no known kind ({', '.join([*kinds, 'labelled'])}); a folder needs one folder of "
        "images for each class, and flat images need --labels FILE"
    )
