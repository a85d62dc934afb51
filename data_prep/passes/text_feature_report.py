"""What `verify` and `inspect` say of the text features that are stored with a shard folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from data_prep.parts.part import WHOLE, Part
from megapix.errors import InputError
from megapix.shards.feature_file import table_fault
from megapix.shards.index import Index
from megapix.shards.table import Captions
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import TextFeatures, listed_text_features


def text_faults(folder: Path, index: Index, progress: bool = True, part: Part = WHOLE) -> Iterator[str]:
    """Yield every fault of a part's files of features: sizes, headers, tables, captions of each sample, CRCs."""
    from tqdm import tqdm

    try:
        features = listed_text_features(folder, index)
    except InputError as error:
        yield str(error)
        return
    if features is None:
        return
    if fault := table_fault(features, index):
        yield from [fault] if not part.number else ()
        return
    reader, total = TextFeatureReader(features), features.table.total("captions") + features.empty.captions
    with tqdm(total=total, unit="cap", disable=not progress, mininterval=0.5) as bar:
        first = 0
        for place, file in enumerate(features.all_files):
            is_empty = place == len(features.files)
            reads = [reader.empty] if is_empty else _reads(folder, index, features, reader, place, first)
            first += file.samples
            if place % part.of != part.number:
                continue
            faults = [features.fault(file)] if features.fault(file) else map(_fault, reads)
            yield from filter(None, faults)
            bar.update(file.captions)


def _reads(
    folder: Path, index: Index, features: TextFeatures, reader: TextFeatureReader, place: int, first: int
) -> Iterator[Callable[[], object]]:
    """What must go well for an entry, whose samples are numbered from `first`: as many captions as each sample has, and
    each caption's features."""

    def counted(sample: int, captions: int) -> None:
        if (there := reader.captions(sample)) != captions:
            where = folder / features.files[place].name
            raise InputError(f"{where}: sample {sample} has {captions} captions, but features of {there}")

    for sample, captions in enumerate(Captions(folder, index).texts(place), first):
        yield partial(counted, sample, len(captions))
        for caption in range(len(captions)):
            yield partial(reader.read, sample, caption)


def _fault(read: Callable[[], Any]) -> str:
    try:
        read()
    except InputError as error:
        return str(error)
    return ""


def text_line(folder: Path, index: Index) -> Iterator[str]:
    """A line about the features, if there are any; reads only the index.

    Raises:
        InputError: what the index says of them has no sense.
    """
    features = listed_text_features(folder, index)
    if features is not None:
        recipe, captions, tokens = features.recipe, features.table.total("captions"), features.table.total("tokens")
        size = sum(map(features.bytes_of, features.all_files))
        yield (
            f"  text         features of {captions:,} captions, {tokens:,} tokens of width {recipe.width}, {size:,} "
            f"bytes; by {features.encoder!r} ({recipe.digest[:16]}…), {recipe.max_tokens} tokens at most"
        )
