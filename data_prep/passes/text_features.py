"""A text encoder's features of every caption of a shard folder or index, stored beside it.

Each entry of the index becomes one file, whole or not at all; a file that is there is not computed again. Captions go
through the encoder in rounds that never span two entries, so an interruption does not change which of them do so
together, nor a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.writing.pool import alone_in
from megapix.errors import InputError
from megapix.shards.feature_file import file_name
from megapix.shards.index import INDEX_NAME, Index, read_index, write_index
from megapix.shards.table import Captions, check_table
from megapix.shards.text_features import (
    EMPTY_NAME,
    FILES,
    Row,
    TextFeatures,
    TextFile,
    found_file,
    listed_text_features,
    manifest,
    write_file,
)
from megapix.shards.text_recipe import Recipe

if TYPE_CHECKING:
    from megapix.encoders.text import TextEncoder

ROUND = 8
"""Batches whose captions are sorted by length together, so that little is padded."""
FLAGS = {"digest": "the digest of --encoder", "width": "the width of --encoder"} | {
    name: "--" + name.replace("_", "-") for name in ("max_tokens", "normalize", "scale", "prefix", "dtype", "padding")
}
"""What this command calls the fields of a recipe."""


def embed_text(
    folder: Path, name: str, recipe: Recipe, batch: int, overwrite: bool, progress: bool = True
) -> tuple[TextFeatures, bool, str | None]:
    """Compute the features that are missing; return all, whether they were finished already, and a line about the
    first caption that was cut in this call.

    Args:
        name: folder or hub name of the encoder.
        recipe: how to make them; without digest and width.
        batch: captions that go through the encoder together.
        overwrite: remove features of other recipes or data sets that are stored there.

    Raises:
        InputError: bad options, no such index or encoder, captions that cannot be read, or features of another recipe
            or data set, which are to stay.
        OSError: the folder cannot be written.
    """
    import torch
    from tqdm import tqdm

    from megapix.encoders.text import load

    for option, value in (("--batch", batch), ("--max-tokens", recipe.max_tokens)):
        if value < 1:
            raise InputError(f"{option} = {value}: expected at least 1")
    if not 0 < recipe.scale < float("inf"):
        raise InputError(f"--scale = {recipe.scale}: expected above 0")
    read_index(folder)  # before the encoder, which takes longer to load
    net = load(name, recipe, batch, "--encoder")
    net.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    with alone_in(folder):
        index = read_index(folder)
        check_table(folder, index)
        data_digest = index.digest
        for pattern in (FILES, INDEX_NAME):
            for leftover in folder.glob(f".{pattern}.*.tmp"):
                leftover.unlink()
        index, done = _there(folder, index, net.recipe, overwrite)
        names = [*(file_name("text", place) for place in range(len(index.shards))), EMPTY_NAME]
        captions = Captions(folder, index)
        total, initial = 1 + captions.count(), sum(file.captions for file in done.values())
        with tqdm(total=total, initial=initial, unit="cap", disable=not progress, mininterval=0.5) as bar:
            for place, file in enumerate(names):
                if file not in done:
                    samples = [[""]] if file == EMPTY_NAME else captions.texts(place)
                    rows = _rows(net, [text for some in samples for text in some], batch, bar)
                    done[file] = write_file(folder, net.recipe, data_digest, file, list(map(len, samples)), rows)
        *files, empty = (done[file] for file in names)
        whole = TextFeatures(folder, name, net.recipe, data_digest, tuple(files), empty)
        listed = _listed(folder, index)
        if listed is not None and replace(listed, encoder=name) == whole:  # the encoder may lie elsewhere now
            return listed, True, None
        write_index(folder, replace(index, text=manifest(whole)))
    return whole, False, net.first_cut


def _rows(net: TextEncoder, captions: Sequence[str], batch: int, bar: Any) -> Iterator[Row]:
    """Features of the captions in order, as they are stored."""
    import torch

    for at in range(0, len(captions), ROUND * batch):
        some = captions[at : at + ROUND * batch]
        for features, cut in net.each(some):
            yield Row(features.bfloat16().view(torch.int16).cpu().numpy(), cut)
        bar.update(len(some))


def _there(folder: Path, index: Index, recipe: Recipe, overwrite: bool) -> tuple[Index, dict[str, TextFile]]:
    """The index, and the files that need not be computed; what is of others is removed with `overwrite`.

    Raises:
        InputError: features of another recipe or data set, which are to stay.
    """
    listed, done, others, current = _listed(folder, index), dict[str, TextFile](), "", index.digest
    if listed is not None:
        others = listed.recipe.difference(recipe, str(folder), FLAGS)
    for path in sorted(folder.glob(FILES)):
        try:
            stored, data_digest, file = found_file(path)
        except ValueError:  # damaged: it is written again
            continue
        if found := stored.difference(recipe, str(folder), FLAGS):
            others = others or found
        elif data_digest != current:
            about = f"the data set {data_digest[:16]}…, but the shards are now {current[:16]}…"
            others = others or f"{path} has features of {about}"
        else:
            done[path.name] = file
    if others and not overwrite:
        raise InputError(f"{others}; --replace removes them and computes these")
    if others:
        index = replace(index, text=None)
        write_index(folder, index)  # first: an index never names what is being removed
        for path in folder.glob(FILES):
            if path.name not in done:
                path.unlink()
    return index, done


def _listed(folder: Path, index: Index) -> TextFeatures | None:
    """What the index says of features; None if that has no sense."""
    try:
        return listed_text_features(folder, index)
    except InputError:
        return None
