"""A frozen text encoder's features of every caption: `data_prep embed-text` stores them with the shards.

They lie in the shard folder, beside index.json:

    text-000000.safetensors, …   one file for each entry of the index, numbered by its place in the list
    text-empty.safetensors       of the caption "", which stands in where a caption is dropped

and under "text" in index.json, written last, stands what they are: the encoder's name and hash, how they were made, the
data set's digest, and the files. This key is no part of `Index.digest`: a data set stays what it is. A file is

    first      int64 [samples + 1]       number of the first caption of each sample, counted in this file
    starts     int64 [captions + 1]      first token of each caption, counted in this file
    crc32      int64 [captions]          of each caption's features, as they lie here
    features   bf16 [tokens, width]      of the tokens themselves; nothing is padded

Samples are in the order of the index, and captions in that of `megapix.captions.unpack`. The first three are the
tables, whose CRC-32 stands in index.json; a process maps them once, and then one read gives a caption's features.

NumPy and no torch: bf16 numbers are bit patterns, int16.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megapix.errors import InputError
from megapix.shards import INDEX_NAME, Index, features_fault
from megapix.storage import Local, is_url

FORMAT, VERSION = "megapix-text", 1
EMPTY_NAME = "text-empty.safetensors"
FILES = "text-*.safetensors"
INT, BF16 = np.dtype("<i8"), np.dtype("<i2")
LARGEST_HEADER = 1 << 20
"""Bytes of a file's header that are read at most."""
LARGEST = 10**15
"""A number that no count of a file exceeds: a header has room for it, so that it can be written after the features."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How features are made; equal recipes make equal features, but for rounding.

    A wanted recipe may leave `digest` and `width` out: any encoder is right.
    """

    digest: str = ""
    """The encoder's (`text_encoder.digest`)."""
    width: int = 0
    """Numbers of a token's features."""
    max_tokens: int
    """Tokens of a caption that are kept."""
    normalize: str
    """'rms' (of each token) or 'none'."""
    scale: float
    """Factor of the features, after that."""
    prefix: str
    """Instruction before each caption that is not empty."""
    dtype: str
    """Number format that the encoder computes in, 'bf16' or 'fp32'; stored is always bf16."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", float(self.scale))  # 1 and 1.0 are one recipe, and the same bytes

    def difference(self, wanted: Recipe, folder: str, options: Mapping[str, str]) -> str:
        """The first difference between these stored features and what is wanted, as half a sentence; empty if none.

        Args:
            folder: where they are stored.
            options: what the user calls each field.
        """
        for field in dataclasses.fields(self):
            stored, asked = getattr(self, field.name), getattr(wanted, field.name)
            if stored == asked or (field.name in ("digest", "width") and not asked):
                continue
            if field.name == "digest":
                stored, asked = f"{stored[:16]}…", f"{asked[:16]}…"
            return (
                f"{options[field.name]} = {asked!r}, but the features stored with {folder!r} were made with {stored!r}"
            )
        return ""


OPTIONS = {field.name: f"text.{field.name}" for field in dataclasses.fields(Recipe)} | {"width": "model.text_width"}
"""What a run calls the fields of a recipe."""


class TextFile(NamedTuple):
    """The features of one entry of the index, or of the empty caption."""

    name: str
    samples: int
    captions: int
    tokens: int
    cut: int
    """Captions that had more tokens than are kept."""
    tables: int
    """CRC-32 of the tables."""


@dataclass(frozen=True)
class TextFeatures:
    """What is stored with a shard folder."""

    folder: Path
    encoder: str
    """Folder or hub name of the encoder, as it was given."""
    recipe: Recipe
    data_digest: str
    """The data set's (`Index.digest`)."""
    files: tuple[TextFile, ...]
    """One for each entry of the index."""
    empty: TextFile
    """The caption "" alone."""

    @property
    def all_files(self) -> tuple[TextFile, ...]:
        """Those of the entries, and that of the empty caption."""
        return (*self.files, self.empty)

    def bytes_of(self, file: TextFile) -> int:
        """Size of a whole file."""
        return len(header(self.recipe, self.data_digest, file)) + _tables(file) + file.tokens * self.row

    @property
    def row(self) -> int:
        """Bytes of a token's features."""
        return self.recipe.width * BF16.itemsize

    def fault(self, file: TextFile) -> str:
        """What is wrong with a file, by its size and its first bytes; empty if nothing is."""
        expected = header(self.recipe, self.data_digest, file)
        return features_fault(self.folder / file.name, expected, self.bytes_of(file), INDEX_NAME)

    def require(self, wanted: Recipe) -> None:
        """Refuse features that were made otherwise than a run wants them; names the first option that differs.

        Raises:
            InputError: naming the option and both values.
        """
        if found := self.recipe.difference(wanted, str(self.folder), OPTIONS):
            raise InputError(
                f"{found}; give that value, or compute others: data_prep embed-text {self.folder} --replace"
            )


def file_name(place: int) -> str:
    """Name of the file of an entry, by its place in the index's list."""
    return f"text-{place:06d}.safetensors"


def header(recipe: Recipe, data_digest: str, file: TextFile) -> bytes:
    """The first bytes of a file, which say whose features it holds. Their number does not depend on tokens, cut and
    tables, which are known last."""
    text = _described(recipe, data_digest, file)
    room = len(_described(recipe, data_digest, file._replace(tokens=LARGEST, cut=LARGEST, tables=2**32 - 1)))
    room += -room % 8
    return room.to_bytes(8, "little") + text.ljust(room)


def _described(recipe: Recipe, data_digest: str, file: TextFile) -> bytes:
    about = {"format": FORMAT, "recipe": json.dumps(asdict(recipe)), "data": data_digest, "name": file.name}
    tensors: dict[str, Any] = {"__metadata__": about | {"cut": str(file.cut), "tables": str(file.tables)}}
    at = 0
    for name, dtype, shape, size in (
        ("first", "I64", [file.samples + 1], INT.itemsize),
        ("starts", "I64", [file.captions + 1], INT.itemsize),
        ("crc32", "I64", [file.captions], INT.itemsize),
        ("features", "BF16", [file.tokens, recipe.width], BF16.itemsize),
    ):
        end = at + math.prod(shape) * size
        tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, end]}
        at = end
    return json.dumps(tensors, separators=(",", ":")).encode()


def _tables(file: TextFile) -> int:
    """Bytes of the tables."""
    return (file.samples + 1 + file.captions + 1 + file.captions) * INT.itemsize


# ---------------------------------------------------------------------------------------------------------------------
# Writing
# ---------------------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The features of one caption."""

    bits: NDArray[np.int16]
    """bf16 numbers as bit patterns, [tokens, width]."""
    cut: bool
    """Whether the caption had more tokens than these."""


def write_file(
    folder: Path, recipe: Recipe, data_digest: str, name: str, captions: Sequence[int], rows: Iterable[Row]
) -> TextFile:
    """Write a file beside its name, and rename it when it is whole and synced to disk.

    Args:
        captions: how many each sample has.
        rows: of all of them, in order.

    Raises:
        OSError: it cannot be written.
        ValueError: there are not as many rows, or one has no token or another width.
    """
    first = np.cumsum([0, *captions], dtype=INT)
    file = TextFile(name, len(captions), int(first[-1]), 0, 0, 0)
    path, starts, crcs, cut = folder / name, [0], list[int](), 0
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as out:
        out.write(bytes(len(header(recipe, data_digest, file)) + _tables(file)))
        for bits, was_cut in rows:
            if bits.ndim != 2 or not len(bits) or bits.shape[1] != recipe.width:
                raise ValueError(f"{name}: the features of caption {len(crcs)} are {bits.shape}")
            data = np.ascontiguousarray(bits, BF16).tobytes()
            crcs.append(zlib.crc32(data))
            starts.append(starts[-1] + len(bits))
            cut += was_cut
            out.write(data)
        if len(crcs) != file.captions:
            raise ValueError(f"{name}: {len(crcs)} captions for {file.captions}")
        tables = b"".join(np.array(table, INT).tobytes() for table in (first, starts, crcs))
        file = file._replace(tokens=starts[-1], cut=cut, tables=zlib.crc32(tables))
        out.seek(0)
        out.write(header(recipe, data_digest, file) + tables)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
    return file


def manifest(features: TextFeatures) -> dict[str, Any]:
    """What stands under "text" in the index."""

    def listed(file: TextFile) -> dict[str, Any]:
        return {**file._asdict(), "bytes": features.bytes_of(file)}

    return {
        "format": FORMAT,
        "version": VERSION,
        "encoder": features.encoder,
        "recipe": asdict(features.recipe),
        "data_digest": features.data_digest,
        "files": [listed(file) for file in features.files],
        "empty": listed(features.empty),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def listed_text_features(folder: Path, index: Index) -> TextFeatures | None:
    """What an index says of text features stored with it; None if there are none. Looks at no file.

    Raises:
        InputError: what it says has no sense, or is of another data set.
    """
    if index.text is None:
        return None
    try:
        return _of_manifest(folder, index)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{folder / INDEX_NAME}: its text features are not described as they should be, a key is missing or has a "
            f"wrong value: {error}"
        ) from error


def read_text_features(folder: str | Path, index: Index, path: str = "") -> TextFeatures | None:
    """The text features stored with an index, if each file is there in its size; None if there are none. Reads no
    numbers.

    Args:
        folder: the local folder of the index.
        path: the folder or URL of the data set, as the user gave it.

    Raises:
        InputError: what `listed_text_features` raises, a file that is missing, cut short or of other features, or an
            index that was copied here from a URL, without the files.
    """
    features = listed_text_features(Path(folder), index)
    if features is None:
        return None
    if is_url(path):
        raise InputError(
            f"data.path = {path!r}: text features are read from a local folder alone; make a local index over these "
            "shards with 'data_prep index' and give it to 'data_prep embed-text', or name an encoder: text.encoder"
        )
    for file in features.all_files:
        if fault := features.fault(file):
            raise InputError(f"{fault}; run its 'data_prep embed-text' command again")
    return features


def found_file(path: Path) -> tuple[Recipe, str, TextFile]:
    """(recipe, data digest, file) that the header of a file says, if it is a whole one.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, or something else.
    """
    with open(path, "rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        if not 0 < size <= LARGEST_HEADER:
            raise ValueError(f"its header would have {size} bytes")
        text = opened.read(size)
    try:
        tensors = json.loads(text)
        about = tensors["__metadata__"]
        recipe, digest = _recipe(json.loads(about["recipe"])), _digest(about["data"])
        samples, captions = (int(tensors[name]["shape"][0]) - 1 for name in ("first", "starts"))
        tokens, cut, tables = tensors["features"]["shape"][0], int(about["cut"]), int(about["tables"])
        counts = [_count(value) for value in (samples, captions, tokens, cut, tables)]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise ValueError(f"its header is not that of text features: {error}") from error
    file = TextFile(path.name, *counts)
    if fault := TextFeatures(path.parent, "", recipe, digest, (), file).fault(file):
        raise ValueError(fault)
    return recipe, digest, file


def _of_manifest(folder: Path, index: Index) -> TextFeatures:
    data: Any = index.text
    if (found := (data["format"], data["version"])) != (FORMAT, VERSION):
        raise ValueError(f"format and version are {found}, expected {(FORMAT, VERSION)}")
    if not isinstance(data["encoder"], str):
        raise ValueError(f"encoder is {data['encoder']!r}")
    if (digest := _digest(data["data_digest"])) != index.digest:
        raise ValueError(f"they are of the data set {digest[:16]}…, but this is {index.digest[:16]}…")
    if len(data["files"]) != len(index.shards):
        raise ValueError(f"{len(data['files'])} files for {len(index.shards)} entries")
    files = []
    for place, entry in enumerate([*data["files"], data["empty"]]):
        file = TextFile(entry["name"], *(_count(entry[field]) for field in TextFile._fields[1:]))
        last = place == len(index.shards)
        name, samples = (EMPTY_NAME, 1) if last else (file_name(place), index.shards[place].samples)
        if file.name != name:  # it lies in the folder, and nowhere else
            raise ValueError(f"file {place} is named {file.name!r}, expected {name!r}")
        if file.samples != samples or (last and file.captions != 1):
            raise ValueError(f"{name} has {file.samples} samples and {file.captions} captions, but {samples} samples")
        files.append(file)
    features = TextFeatures(folder, data["encoder"], _recipe(data["recipe"]), digest, tuple(files[:-1]), files[-1])
    for file, entry in zip(files, [*data["files"], data["empty"]], strict=True):
        if entry["bytes"] != features.bytes_of(file):
            raise ValueError(f"{file.name} has {entry['bytes']!r} bytes, but its counts make {features.bytes_of(file)}")
    return features


def _recipe(data: Any) -> Recipe:
    types = {"max_tokens": int, "width": int, "scale": float}
    for field in dataclasses.fields(Recipe):
        if not isinstance(data[field.name], types.get(field.name, str)):
            raise ValueError(f"{field.name} is {data[field.name]!r}")
    recipe = Recipe(**data)
    if recipe.normalize not in ("rms", "none") or recipe.dtype not in ("bf16", "fp32"):
        raise ValueError(f"normalize and dtype are {recipe.normalize!r} and {recipe.dtype!r}")
    if not 0 < recipe.scale < math.inf:
        raise ValueError(f"scale is {recipe.scale!r}")
    _digest(recipe.digest), _count(recipe.width, 1), _count(recipe.max_tokens, 1)
    return recipe


def _digest(value: Any) -> str:
    if not re.fullmatch("[0-9a-f]{64}", value):
        raise ValueError(f"{value!r} is not a SHA-256 hash")
    return str(value)


def _count(value: Any, least: int = 0) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= LARGEST:
        raise ValueError(f"{value!r} is not a count")
    return value


class _Tables(NamedTuple):
    """The tables of a file, and where its features begin."""

    first: NDArray[np.int64]
    starts: NDArray[np.int64]
    crc32: NDArray[np.int64]
    begin: int


class TextFeatureReader:
    """Reads the features of any caption; each process needs its own."""

    def __init__(self, features: TextFeatures) -> None:
        self.features = features
        self._files = Local(features.folder)
        self._first = np.cumsum([0, *(file.samples for file in features.files)])
        self._mapped: dict[str, _Tables] = {}
        self._empty: NDArray[np.int16] | None = None

    def captions(self, sample: int) -> int:
        """How many captions of a sample there are.

        Raises:
            InputError: the file's tables cannot be read, or are not those that were written.
        """
        place, row = self._place(sample)
        first = self._tables(self.features.files[place]).first
        return int(first[row + 1] - first[row])

    def read(self, sample: int, caption: int) -> NDArray[np.int16]:
        """Features of a sample's caption, counted from 0: bf16's bit patterns [tokens, width], read-only.

        Raises:
            InputError: they cannot be read, or are not those that were written.
        """
        place, row = self._place(sample)
        file = self.features.files[place]
        tables = self._tables(file)
        there = int(tables.first[row + 1] - tables.first[row])
        if not 0 <= caption < there:
            raise InputError(
                f"{self._files.where(file.name)}: sample {sample} has {there} captions there, but caption {caption} "
                "was asked for"
            )
        return self._read(file, tables, int(tables.first[row]) + caption, f"sample {sample}, caption {caption}")

    def empty(self) -> NDArray[np.int16]:
        """Features of the caption "": bf16's bit patterns [tokens, width], read-only.

        Raises:
            InputError: they cannot be read, or are not those that were written.
        """
        if self._empty is None:
            file = self.features.empty
            self._empty = self._read(file, self._tables(file), 0, "the empty caption")
        return self._empty

    def _place(self, sample: int) -> tuple[int, int]:
        place = int(np.searchsorted(self._first, sample, "right")) - 1
        return place, sample - int(self._first[place])

    def _read(self, file: TextFile, tables: _Tables, caption: int, shown: str) -> NDArray[np.int16]:
        start, end = (int(number) for number in tables.starts[caption : caption + 2])
        size, row = (end - start) * self.features.row, self.features.row
        try:
            data = self._files.read(file.name, tables.begin + start * row, size)
        except OSError as error:
            raise InputError(f"{self._files.where(file.name)}: cannot be read: {error.strerror or error}") from error
        if len(data) != size or zlib.crc32(data) != tables.crc32[caption]:
            raise InputError(f"{self._files.where(file.name)}: the features of {shown} {NOT_WRITTEN}")
        return np.frombuffer(data, BF16).reshape(end - start, self.features.recipe.width)

    def _tables(self, file: TextFile) -> _Tables:
        """Those of a file, mapped: the pages are shared by all processes of a machine."""
        if file.name not in self._mapped:
            path = self.features.folder / file.name
            begin = len(header(self.features.recipe, self.features.data_digest, file))
            try:
                if path.stat().st_size != self.features.bytes_of(file):
                    raise InputError(f"{self.features.fault(file)}; run its 'data_prep embed-text' command again")
                mapped = np.asarray(np.memmap(path, INT, "r", begin, (_tables(file) // INT.itemsize,)))
            except OSError as error:
                raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
            first, starts, crcs = np.split(mapped, np.cumsum([file.samples + 1, file.captions + 1]))
            if zlib.crc32(mapped.data) != file.tables or not self._sound(file, first, starts):
                raise InputError(f"{path}: its tables {NOT_WRITTEN}")
            self._mapped[file.name] = _Tables(first, starts, crcs, begin + _tables(file))
        return self._mapped[file.name]

    def _sound(self, file: TextFile, first: NDArray[np.int64], starts: NDArray[np.int64]) -> bool:
        """Whether each caption is a few tokens of this file: an index may come from a stranger."""
        ends = first[0] == starts[0] == 0 and first[-1] == file.captions and starts[-1] == file.tokens
        lengths = np.diff(starts)
        limited = (lengths >= 1) & (lengths <= self.features.recipe.max_tokens)
        return bool(ends and (np.diff(first) >= 0).all() and limited.all())


NOT_WRITTEN = "are not those that were written; delete the file and run its 'data_prep embed-text' command again"
