"""A frozen encoder's features of every image of a data set: `data_prep features` writes them, REPA reads them.

A folder of features holds

    features-000000.safetensors, …   one file for each entry of the index, numbered by its place in the list
    features.json                    the manifest; written last, so its presence means "complete"

and plan.json, which only `data_prep` reads. A file is two tensors:

    crc32      int64 [samples, forms]                                    of each image's features, as they lie here
    features   bf16 or fp32 [samples, forms, rows, columns, width]       form 0 is the image, form 1 its mirror image

Samples are in the order of the index. Rows and columns are the encoder's grid, the same for all images of an entry. The
numbers are stored in the format that the encoder computes in, so nothing is lost: one read gives an image's features.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megapix.errors import InputError
from megapix.shards import Index, features_fault, write_atomic
from megapix.storage import Local

FORMAT, VERSION = "megapix-features", 1
MANIFEST_NAME = "features.json"

Dtype = Literal["bf16", "fp32"]
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {"bf16": ("BF16", np.dtype("<i2")), "fp32": ("F32", np.dtype("<f4"))}
"""Number format -> safetensors' name, and the NumPy type of its numbers; those of bf16 are bit patterns."""
CRC = np.dtype("<i8")


@dataclass(frozen=True)
class FeatureFile:
    """The features of one entry of the index."""

    name: str
    samples: int
    rows: int
    columns: int


@dataclass(frozen=True)
class Features:
    """What a folder of features holds."""

    folder: Path
    encoder: str
    """Folder or hub name of the encoder, as it was given."""
    digest: str
    """The encoder's (`encoder.digest`)."""
    data_digest: str
    """The data set's (`Index.digest`)."""
    width: int
    """Numbers of a cell of the grid."""
    dtype: Dtype
    """Number format that the encoder computed in, and that is stored."""
    flip: bool
    """Whether there are features of the mirror images too."""
    files: tuple[FeatureFile, ...]
    """One for each entry of the index."""

    @property
    def forms(self) -> int:
        """Forms of each image: itself, and its mirror image."""
        return 2 if self.flip else 1

    def row_bytes(self, file: FeatureFile) -> int:
        """Bytes of the features of one image in one form."""
        return file.rows * file.columns * self.width * DTYPES[self.dtype][1].itemsize

    def header(self, file: FeatureFile) -> bytes:
        """The first bytes of a file, which say whose features it holds."""
        shape = (file.samples, self.forms)
        crcs = CRC.itemsize * file.samples * self.forms
        end = crcs + file.samples * self.forms * self.row_bytes(file)
        about = {"format": FORMAT, "encoder": self.digest, "data": self.data_digest, "name": file.name}
        tensors = {
            "__metadata__": about,
            "crc32": {"dtype": "I64", "shape": shape, "data_offsets": (0, crcs)},
            "features": {
                "dtype": DTYPES[self.dtype][0],
                "shape": (*shape, file.rows, file.columns, self.width),
                "data_offsets": (crcs, end),
            },
        }
        text = json.dumps(tensors, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def bytes_of(self, file: FeatureFile) -> int:
        """Size of a whole file."""
        return len(self.header(file)) + file.samples * self.forms * (CRC.itemsize + self.row_bytes(file))

    def fault(self, file: FeatureFile) -> str:
        """What is wrong with a file, by its size and its first bytes; empty if nothing is."""
        return features_fault(self.folder / file.name, self.header(file), self.bytes_of(file), MANIFEST_NAME)


def file_name(place: int) -> str:
    """Name of the file of an entry, by its place in the index's list."""
    return f"features-{place:06d}.safetensors"


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


def write_file(features: Features, file: FeatureFile, batches: Iterable[NDArray[Any]]) -> None:
    """Write a file from batches [B, forms, rows, columns, width] in order, beside its name, and rename it when it is
    whole and synced to disk.

    Raises:
        OSError: it cannot be written.
        ValueError: there are not `file.samples` of them.
    """
    path, header, crcs = features.folder / file.name, features.header(file), list[int]()
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as out:
        out.write(header + bytes(CRC.itemsize * file.samples * features.forms))
        for batch in batches:
            for row in np.ascontiguousarray(batch, DTYPES[features.dtype][1]).reshape(-1, *batch.shape[2:]):
                data = row.tobytes()
                crcs.append(zlib.crc32(data))
                out.write(data)
        if len(crcs) != file.samples * features.forms or out.tell() != features.bytes_of(file):
            raise ValueError(f"{file.name}: {len(crcs)} images for {file.samples} in {features.forms} forms")
        out.seek(len(header))
        out.write(np.array(crcs, CRC).tobytes())
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)


def write_manifest(features: Features) -> None:
    """Write the manifest; call it last, after every file."""
    write_atomic(features.folder / MANIFEST_NAME, manifest(features))


def manifest(features: Features) -> bytes:
    """The manifest's bytes."""
    files = [
        {
            "name": file.name,
            "samples": file.samples,
            "grid": [file.rows, file.columns],
            "bytes": features.bytes_of(file),
        }
        for file in features.files
    ]
    about = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": features.encoder,
        "encoder_digest": features.digest,
        "data_digest": features.data_digest,
        "width": features.width,
        "dtype": features.dtype,
        "flip": features.flip,
        "files": files,
    }
    return (json.dumps(about, indent=1) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> Features:
    """What the manifest in a folder says.

    Raises:
        InputError: no such folder, no manifest in it, or a damaged one.
    """
    folder = Path(folder)
    shown = f"repa.features = {str(folder)!r}"
    if not folder.is_dir():
        raise InputError(
            f"{shown}: no such folder; 'data_prep features SHARDS --encoder ENCODER --out {folder}' makes it"
        )
    path = folder / MANIFEST_NAME
    if not path.is_file():
        raise InputError(f"{shown} has no {MANIFEST_NAME}: run its 'data_prep features' command again until it is done")
    try:
        return _of_manifest(folder, json.loads(path.read_bytes()))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not such a manifest, a key is missing or has a wrong value: {error}") from error


def read_features(folder: str | Path, index: Index) -> Features:
    """The features in a folder, if they are of that index and each file is there in its size; reads no numbers.

    Raises:
        InputError: what `read_manifest` raises, features of another data set, or a file that is missing, cut short or
            of other features.
    """
    features = read_manifest(folder)
    shown, path = f"repa.features = {str(folder)!r}", features.folder / MANIFEST_NAME
    if features.data_digest != index.digest:
        raise InputError(
            f"{shown} are of the data set {features.data_digest[:16]}…, but the shards are {index.digest[:16]}…; "
            "compute them from these shards"
        )
    if [file.samples for file in features.files] != [entry.samples for entry in index.shards]:
        raise InputError(f"{path}: its files have other samples than the shards")
    for file in features.files:
        if fault := features.fault(file):
            raise InputError(f"{shown}: {fault}; run its 'data_prep features' command again")
    return features


def _of_manifest(folder: Path, data: Any) -> Features:
    if (found := (data["format"], data["version"])) != (FORMAT, VERSION):
        raise ValueError(f"format and version are {found}, expected {(FORMAT, VERSION)}")
    files, sizes = list[FeatureFile](), list[int]()
    for place, entry in enumerate(data["files"]):
        rows, columns = entry["grid"]
        if entry["name"] != file_name(place):  # it lies in the folder, and nowhere else
            raise ValueError(f"file {place} is named {entry['name']!r}")
        files.append(FeatureFile(entry["name"], _count(entry["samples"], 0), _count(rows), _count(columns)))
        sizes.append(_count(entry["bytes"]))
    if data["dtype"] not in DTYPES or not isinstance(data["flip"], bool) or not isinstance(data["encoder"], str):
        raise ValueError(f"dtype, flip and encoder are {data['dtype']!r}, {data['flip']!r} and {data['encoder']!r}")
    for key in ("encoder_digest", "data_digest"):
        if not re.fullmatch("[0-9a-f]{64}", data[key]):
            raise ValueError(f"{key} is {data[key]!r}")
    digests = data["encoder_digest"], data["data_digest"]
    width, dtype, flip = _count(data["width"]), data["dtype"], data["flip"]
    features = Features(folder, data["encoder"], *digests, width, dtype, flip, tuple(files))
    for file, size in zip(files, sizes, strict=True):
        if size != features.bytes_of(file):
            raise ValueError(f"{file.name} has {size} bytes, but width {width} makes {features.bytes_of(file)}")
    return features


def _count(value: Any, least: int = 1) -> int:
    if not isinstance(value, int) or value < least:
        raise ValueError(f"{value!r} is not a count")
    return value


class FeatureReader:
    """Reads the features of any sample; each process needs its own."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self._files = Local(features.folder)
        self._first = np.cumsum([0, *(file.samples for file in features.files)])
        self._starts = [len(features.header(file)) for file in features.files]

    def read(self, sample: int, mirrored: bool) -> NDArray[Any]:
        """Features of a sample or of its mirror image: [rows, columns, width], float32, or bf16's bit patterns (int16).

        Raises:
            InputError: they cannot be read, or are not those that were written.
        """
        f, place = self.features, int(np.searchsorted(self._first, sample, "right")) - 1
        file, start = f.files[place], self._starts[place]
        row = (sample - int(self._first[place])) * f.forms + int(mirrored)
        size = f.row_bytes(file)
        try:
            crc = self._files.read(file.name, start + row * CRC.itemsize, CRC.itemsize)
            data = self._files.read(file.name, start + file.samples * f.forms * CRC.itemsize + row * size, size)
        except OSError as error:
            raise InputError(f"{self._files.where(file.name)}: cannot be read: {error.strerror or error}") from error
        if len(data) != size or zlib.crc32(data) != int.from_bytes(crc, "little"):
            raise InputError(
                f"{self._files.where(file.name)}: the features of sample {sample} are not those that were written; "
                "delete the file and run its 'data_prep features' command again"
            )
        return np.frombuffer(data, DTYPES[f.dtype][1]).reshape(file.rows, file.columns, f.width)
