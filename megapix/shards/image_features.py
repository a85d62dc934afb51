"""A frozen encoder's features of every image of a data set: `data_prep features` writes them, REPA reads them.

A folder of features holds

    features-000000.safetensors, …   one file for each entry of the index, numbered by its place in the list
    features-files.bin               the counts of each file (`tables/files.py`)
    features.json                    the manifest; written last, so its presence means "complete"

and plan.json, which only `data_prep` reads. A file is two tensors:

    crc32      int64 [samples, forms]                                    of each image's features, as they lie here
    features   bf16 or fp32 [samples, forms, rows, columns, width]       form 0 is the image, form 1 its mirror image

Samples are in the order of the index. Rows and columns are the encoder's grid, the same for all images of an entry. The
numbers are stored in the dtype that the encoder computes in, so nothing is lost: one read gives an image's features.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megapix.errors import InputError
from megapix.files import read_bytes, safetensors_header, size_of, whole_file, write_atomic
from megapix.shards.feature_file import (
    VERSION,
    EntryFiles,
    StoredFeatures,
    check_files,
    check_format,
    check_name,
    check_size,
    listed_table,
    listing,
    write_table,
)
from megapix.shards.index import Index, as_count, as_sha256, as_text
from megapix.shards.tables.files import Kind, file_name

FORMAT = "megapix-features"
MANIFEST_NAME = "features.json"

Dtype = Literal["bf16", "fp32"]
DTYPES: dict[str, tuple[str, np.dtype[Any]]] = {"bf16": ("BF16", np.dtype("<i2")), "fp32": ("F32", np.dtype("<f4"))}
"""dtype -> safetensors' name, and the NumPy type of its numbers; those of bf16 are bit patterns."""
CRC = np.dtype("<i8")


class FeatureFile(NamedTuple):
    """The features of one entry of the index."""

    name: str
    samples: int
    rows: int
    columns: int


KIND = Kind("features", FeatureFile, FeatureFile._fields[1:], ("rows", "columns"), MANIFEST_NAME, "data_prep features")


@dataclass(frozen=True)
class Features(StoredFeatures):
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
    """What the encoder computed in, and what is stored."""
    flip: bool
    """Whether there are features of the mirror images too."""
    files: Sequence[FeatureFile]
    kind: ClassVar = KIND

    @property
    def origin(self) -> str:
        """SHA-256 of what the features are of."""
        about = [self.digest, self.data_digest, self.width, self.dtype, self.flip]
        return hashlib.sha256(json.dumps(about).encode()).hexdigest()

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
        about = {"format": FORMAT, "encoder": self.digest, "data": self.data_digest, "name": file.name}
        rows = (*shape, file.rows, file.columns, self.width)
        return safetensors_header({"crc32": ("I64", shape), "features": (DTYPES[self.dtype][0], rows)}, about)

    def bytes_behind(self, file: FeatureFile) -> int:
        """Bytes of a file behind its header."""
        return file.samples * self.forms * (CRC.itemsize + self.row_bytes(file))


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
    header, crcs = features.header(file), list[int]()
    with whole_file(features.folder / file.name) as out:
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


def write_manifest(features: Features) -> None:
    """Write the table of files and the manifest; call it last, after every file."""
    write_table(features.folder, features.table)
    write_atomic(features.folder / MANIFEST_NAME, manifest(features))


def manifest(features: Features) -> bytes:
    """The manifest's bytes."""
    about = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": features.encoder,
        "encoder_digest": features.digest,
        "data_digest": features.data_digest,
        "width": features.width,
        "dtype": features.dtype,
        "flip": features.flip,
        "files": listing(features.table),
    }
    return (json.dumps(about, indent=1) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def read_manifest(folder: str | Path) -> Features:
    """What the manifest in a folder says; of the table of files the first bytes are read.

    Raises:
        InputError: no such folder, no manifest in it, or a damaged one, or the table is missing.
    """
    folder = Path(folder)
    shown = f"repa.features = {str(folder)!r}"
    path = folder / MANIFEST_NAME
    there = size_of(path) is not None
    if not there and not folder.is_dir():
        raise InputError(
            f"{shown}: no such folder; 'data_prep features SHARDS --encoder ENCODER --out {folder}' makes it"
        )
    if not there:
        raise InputError(f"{shown} has no {MANIFEST_NAME}: run its 'data_prep features' command again until it is done")
    try:
        return _of_manifest(folder, json.loads(read_bytes(path)))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: not such a manifest, a key is missing or has a wrong value: {error}") from error


def read_features(folder: str | Path, index: Index) -> Features:
    """The features in a folder, if they are of that index and each file is there in its size (`check_files`); reads no
    numbers.

    Raises:
        InputError: what `read_manifest` raises, features of another data set, or a file that is missing, cut short or
            of other features.
    """
    features = read_manifest(folder)
    if features.data_digest != index.digest:
        raise InputError(
            f"repa.features = {str(folder)!r} are of the data set {features.data_digest[:16]}…, but the shards are "
            f"{index.digest[:16]}…; compute them from these shards"
        )
    check_files(features, index)
    return features


def _of_manifest(folder: Path, data: Any) -> Features:
    listed = data["files"] if check_format(data, FORMAT) else None
    if data["dtype"] not in DTYPES or not isinstance(data["flip"], bool):
        raise ValueError(f"dtype and flip are {data['dtype']!r} and {data['flip']!r}")
    features = Features(
        folder,
        encoder=as_text(data["encoder"]),
        digest=as_sha256(data["encoder_digest"]),
        data_digest=as_sha256(data["data_digest"]),
        width=as_count(data["width"], 1),
        dtype=data["dtype"],
        flip=data["flip"],
        files=[_file(entry, file_name(KIND.name, place)) for place, entry in enumerate(listed or ())],
    )
    if listed is None:
        return replace(features, files=listed_table(folder, KIND, features.origin, data["files"]))
    for file, entry in zip(features.files, listed, strict=True):
        check_size(entry, features.bytes_of(file), f"width {features.width} makes")
    return features


def _file(entry: Any, name: str) -> FeatureFile:
    """A file of that name, as a manifest lists it."""
    check_name(entry, name)
    rows, columns = entry["grid"]
    return FeatureFile(name, as_count(entry["samples"]), as_count(rows, 1), as_count(columns, 1))


class FeatureReader:
    """Reads the features of any sample; each process needs its own."""

    def __init__(self, features: Features) -> None:
        self.features = features
        self._files = EntryFiles(features.folder, KIND)

    def read(self, sample: int, mirrored: bool) -> NDArray[Any]:
        """Features of a sample or of its mirror image: [rows, columns, width], float32, or bf16's bit patterns (int16).

        Raises:
            InputError: they cannot be read, or are not those that were written.
        """
        f, (place, row) = self.features, self.features.table.find(sample)
        crcs = len(f.header(file := f.files[place]))
        row, size = row * f.forms + int(mirrored), f.row_bytes(file)
        crc = int.from_bytes(self._files.read(file.name, crcs + row * CRC.itemsize, CRC.itemsize), "little")
        start = crcs + file.samples * f.forms * CRC.itemsize + row * size
        data = self._files.read_checked(file.name, start, size, crc, f"the features of sample {sample}")
        return np.frombuffer(data, DTYPES[f.dtype][1]).reshape(file.rows, file.columns, f.width)
