"""A frozen text encoder's features of every caption: `data_prep embed-text` stores them with the shards.

They lie in the shard folder, beside index.json:

    text-000000.safetensors, …   one file for each entry of the index, numbered by its place in the list
    text-empty.safetensors       of the caption "", which stands in where a caption is dropped
    text-files.bin               the counts of each entry's file (`tables/files.py`)

and under "text" in index.json, written last, stands what they are: the encoder's name and hash, how they were made, the
data set's digest, and the table of files with its hash. This key is no part of `Index.digest`: a data set stays what it
is. A file is

    first      int64 [samples + 1]       number of the first caption of each sample, counted in this file
    starts     int64 [captions + 1]      first token of each caption, counted in this file
    crc32      int64 [captions]          of each caption's features, as they lie here
    features   bf16 [tokens, width]      of the tokens themselves; nothing is padded, but where the network attends to
                                         padding: there each caption has max_tokens (`Recipe.padding`)

Samples are in the order of the index, and captions in that of `megapix.shards.captions.unpack`. The first three are the
tables, whose CRC-32 stands in text-files.bin; a process checks them once, and then few reads give a caption's features.

NumPy and no torch: bf16 numbers are bit patterns, int16.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from megapix.errors import InputError
from megapix.files import safetensors_header, whole_file
from megapix.shards.feature_file import (
    VERSION,
    StoredFeatures,
    check_files,
    check_format,
    check_name,
    check_size,
    listed_table,
    listing,
    write_table,
)
from megapix.shards.index import INDEX_NAME, LARGEST_COUNT, Index, as_count, as_sha256, as_text, write_index
from megapix.shards.storage import is_url
from megapix.shards.tables.files import Kind, file_name
from megapix.shards.text_recipe import OPTIONS, Recipe

FORMAT = "megapix-text"
EMPTY_NAME = "text-empty.safetensors"
TENSORS, FILES = "text-*.safetensors", "text-*"
"""The files of features, and with their table."""
INT, BF16 = np.dtype("<i8"), np.dtype("<i2")
LARGEST_HEADER = 1 << 20
"""Bytes of a file's header that are read at most."""


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


KIND = Kind("text", TextFile, TextFile._fields[1:], (), INDEX_NAME, "data_prep embed-text")


@dataclass(frozen=True)
class TextFeatures(StoredFeatures):
    """What is stored with a shard folder."""

    folder: Path
    encoder: str
    """Folder or hub name of the encoder, as it was given."""
    recipe: Recipe
    data_digest: str
    """The data set's (`Index.digest`)."""
    files: Sequence[TextFile]
    empty: TextFile
    """The caption "" alone."""
    kind: ClassVar = KIND

    @property
    def origin(self) -> str:
        """SHA-256 of what the features are of."""
        return origin_of(self.recipe, self.data_digest)

    @property
    def all_files(self) -> Iterator[TextFile]:
        """Those of the entries, and that of the empty caption."""
        return chain(self.files, [self.empty])

    def header(self, file: TextFile) -> bytes:
        """The first bytes of a file, which say whose features it holds."""
        return header(self.recipe, self.data_digest, file)

    def bytes_behind(self, file: TextFile) -> int:
        """Bytes of a file behind its header."""
        return table_bytes(file) + file.tokens * self.row

    @property
    def row(self) -> int:
        """Bytes of a token's features."""
        return self.recipe.width * BF16.itemsize

    def require(self, wanted: Recipe) -> None:
        """Refuse features that were made otherwise than a run wants them; names the first option that differs.

        Raises:
            InputError: naming the option and both values.
        """
        if found := self.recipe.difference(wanted, str(self.folder), OPTIONS):
            raise InputError(
                f"{found}; give that value, or compute others: data_prep embed-text {self.folder} --replace"
            )


def origin_of(recipe: Recipe, data_digest: str) -> str:
    """SHA-256 of what features are of."""
    return hashlib.sha256(json.dumps([recipe.to_dict(), data_digest]).encode()).hexdigest()


def header(recipe: Recipe, data_digest: str, file: TextFile) -> bytes:
    """The first bytes of a file, which say whose features it holds. They have room for the largest tokens, cut and
    tables, which are known when the features are written: so their number is known before."""
    largest = file._replace(tokens=LARGEST_COUNT, cut=LARGEST_COUNT, tables=2**32 - 1)
    return _header(recipe, data_digest, file, room=len(_header(recipe, data_digest, largest)))


def _header(recipe: Recipe, data_digest: str, file: TextFile, room: int = 0) -> bytes:
    about = {"format": FORMAT, "recipe": json.dumps(recipe.to_dict()), "data": data_digest, "name": file.name}
    tensors = {
        "first": ("I64", [file.samples + 1]),
        "starts": ("I64", [file.captions + 1]),
        "crc32": ("I64", [file.captions]),
        "features": ("BF16", [file.tokens, recipe.width]),
    }
    return safetensors_header(tensors, about | {"cut": str(file.cut), "tables": str(file.tables)}, room)


def table_bytes(file: TextFile) -> int:
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
    starts, crcs, cut = [0], list[int](), 0
    with whole_file(folder / name) as out:
        out.write(bytes(len(header(recipe, data_digest, file)) + table_bytes(file)))
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
    return file


def write_manifest(features: TextFeatures, index: Index) -> None:
    """Write the table of files, and what the index says of them; call it last, after every file. OSError if that
    fails."""
    write_table(features.folder, features.table)
    write_index(features.folder, replace(index, text=manifest(features)))


def manifest(features: TextFeatures) -> dict[str, Any]:
    """What stands under "text" in the index."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "encoder": features.encoder,
        "recipe": features.recipe.to_dict(),
        "data_digest": features.data_digest,
        "files": listing(features.table),
        "empty": {**features.empty._asdict(), "bytes": features.bytes_of(features.empty)},
    }


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def listed_text_features(folder: Path, index: Index) -> TextFeatures | None:
    """What an index says of text features stored with it; None if there are none. Looks at no file but the table's
    first bytes.

    Raises:
        InputError: what it says has no sense, or is of another data set, or the table of files is missing.
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
    """The text features stored with an index, if each file is there in its size (`check_files`); None if there are
    none. Reads no numbers.

    Args:
        folder: the local folder of the index.
        path: the folder or URL of the data set, as the user gave it.

    Raises:
        InputError: what `listed_text_features` raises, a file that is missing, cut short or of other features, or an
            index that was copied here from a URL, without the files.
    """
    if index.text is None:
        return None
    if is_url(path):
        raise InputError(
            f"data.path = {path!r}: text features are read from a local folder alone; make a local index over these "
            "shards with 'data_prep index' and give it to 'data_prep embed-text', or name an encoder: text.encoder"
        )
    features = listed_text_features(Path(folder), index)
    assert features is not None
    check_files(features, index)
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
        recipe, digest = Recipe.from_dict(json.loads(about["recipe"])), as_sha256(about["data"])
        samples, captions = (int(tensors[name]["shape"][0]) - 1 for name in ("first", "starts"))
        tokens, cut, tables = tensors["features"]["shape"][0], int(about["cut"]), int(about["tables"])
        counts = [as_count(value) for value in (samples, captions, tokens, cut, tables)]
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        raise ValueError(f"its header is not that of text features: {error}") from error
    file = TextFile(path.name, *counts)
    if fault := TextFeatures(path.parent, "", recipe, digest, (), file).fault(file):
        raise ValueError(fault)
    return recipe, digest, file


def _of_manifest(folder: Path, index: Index) -> TextFeatures:
    data: Any = index.text
    listed = data["files"] if check_format(data, FORMAT) else None
    if (digest := as_sha256(data["data_digest"])) != index.digest:
        raise ValueError(f"they are of the data set {digest[:16]}…, but this is {index.digest[:16]}…")
    recipe, empty = Recipe.from_dict(data["recipe"]), _file(data["empty"], EMPTY_NAME)
    if (empty.samples, empty.captions) != (1, 1):
        raise ValueError(f"{empty.name} has {empty.samples} samples and {empty.captions} captions, expected one")
    files: Sequence[TextFile]
    if listed is None:
        files = listed_table(folder, KIND, origin_of(recipe, digest), data["files"])
    else:
        files = [_file(entry, file_name(KIND.name, place)) for place, entry in enumerate(listed)]
    features = TextFeatures(folder, as_text(data["encoder"]), recipe, digest, files, empty)
    for entry, file in [*zip(listed or (), files, strict=False), (data["empty"], empty)]:
        check_size(entry, features.bytes_of(file), "its counts make")
    return features


def _file(entry: Any, name: str) -> TextFile:
    """A file of that name, as a manifest lists it."""
    check_name(entry, name)
    return TextFile(name, *(as_count(entry[count]) for count in KIND.counts))
