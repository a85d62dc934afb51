"""A text encoder's features of every caption of a shard folder or index, stored beside it.

Each entry of the index becomes one file, whole or not at all; a file that is there is not computed again. Captions go
through the encoder in rounds that never span two entries, so an interruption does not change which of them do so
together, nor a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.parts import gpus
from data_prep.parts.folder import Parts, join
from data_prep.parts.part import WHOLE, Part, clear_own
from data_prep.writing.pool import alone_in
from data_prep.writing.write import WHOLE_NAME
from megapix.errors import InputError
from megapix.shards.feature_file import faults
from megapix.shards.index import INDEX_NAME, Index, read_index, write_index
from megapix.shards.table import Captions, check_table
from megapix.shards.tables.files import file_name
from megapix.shards.text_features import (
    EMPTY_NAME,
    FILES,
    TENSORS,
    Row,
    TextFeatures,
    TextFile,
    found_file,
    listed_text_features,
    write_file,
    write_manifest,
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
    folder: Path, name: str, recipe: Recipe, batch: int, overwrite: bool, progress: bool = True, part: Part = WHOLE
) -> tuple[TextFeatures, bool, str | None]:
    """Compute the features that are missing; return all, whether they were finished already, and a line about the
    first caption that was cut in this call.

    Args:
        name: folder or hub name of the encoder.
        recipe: how to make them; without digest and width.
        batch: captions that go through the encoder together.
        overwrite: remove features of other recipes or data sets that are stored there.
        part: the share of the files that this process computes, on all GPUs of its machine.

    Raises:
        PartDone: this part is finished, and others are not.
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
    net, places = load(name, recipe, batch, "--encoder"), gpus.devices()
    recipe = net.recipe
    with alone_in(folder, part):
        index = read_index(folder)
        check_table(folder, index)
        names = _names(index)
        listed = _listed(folder, index)
        if listed is not None and listed.recipe == recipe and not any(faults(listed, index)):
            return listed, True, None  # the encoder may lie elsewhere now
        parts = join(folder, part, "embed-text", {})
        if parts:
            parts.agree(
                WHOLE_NAME, {"encoder": name, "recipe": asdict(recipe), "data": index.digest}, free=("encoder",)
            )
        for pattern in (FILES, INDEX_NAME) if part.whole else ():
            clear_own(folder, f".{pattern}.*.tmp", part)
        index, done = _there(folder, index, recipe, overwrite)
        captions = Captions(folder, index)
        missing = [place for place in part.mine(range(len(names))) if names[place] not in done]
        total, initial = 1 + captions.count(), sum(file.captions for file in done.values())
        with tqdm(total=total, initial=initial, unit="cap", disable=not progress, mininterval=0.5) as bar:
            if len(places) == 1:
                net.to(torch.device(places[0]))
                cut = [_fill(folder, index, net, batch, missing, bar.update)]
            else:
                cut = gpus.on_each(partial(_fill_on, folder, name, recipe, batch), missing, places, bar.update)
        made = parts.leave({}, close) if parts else _put_together(folder, name, recipe)
    return made, False, next(filter(None, cut), None)


def close(parts: Parts) -> TextFeatures:
    """Put the files of all parts together: list them in the index.

    Raises:
        InputError: a file is not as its part has written it.
    """
    found = parts.read(WHOLE_NAME)
    return _put_together(parts.out, found["encoder"], Recipe.from_dict(found["recipe"]), parts.count)


def _put_together(folder: Path, name: str, recipe: Recipe, of: int = 1) -> TextFeatures:
    index, files = read_index(folder), list[TextFile]()
    for place, file in enumerate(_names(index)):
        try:
            *about, found = found_file(folder / file)
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / file}: {error}; give its part again: --part {place % of}/{of}") from error
        if about != [recipe, index.digest]:
            raise InputError(f"{folder / file} has other features; give its part again: --part {place % of}/{of}")
        files.append(found)
    for pattern in (FILES, INDEX_NAME):
        clear_own(folder, f".{pattern}.*.tmp", WHOLE)
    whole = TextFeatures(folder, name, recipe, index.digest, tuple(files[:-1]), files[-1])
    write_manifest(whole, index)
    return whole


def _names(index: Index) -> list[str]:
    """Names of all files, that of the empty caption last."""
    return [*(file_name("text", place) for place in range(len(index.shards))), EMPTY_NAME]


def _fill_on(
    folder: Path,
    name: str,
    recipe: Recipe,
    batch: int,
    device: str,
    missing: Sequence[int],
    update: Callable[[int], object],
) -> str | None:
    """As `_fill`, in a process of its own."""
    import torch

    from megapix.encoders.text import load

    net = load(name, recipe, batch, "--encoder")
    net.to(torch.device(device))
    return _fill(folder, read_index(folder), net, batch, missing, update)


def _fill(
    folder: Path, index: Index, net: TextEncoder, batch: int, missing: Sequence[int], update: Callable[[int], object]
) -> str | None:
    """Compute the missing files, by their places; returns a line about the first caption that was cut."""
    names, captions, digest = _names(index), Captions(folder, index), index.digest
    for place in missing:
        samples = [[""]] if names[place] == EMPTY_NAME else captions.texts(place)
        rows = _rows(net, [text for some in samples for text in some], batch, update)
        write_file(folder, net.recipe, digest, names[place], list(map(len, samples)), rows)
    return net.first_cut


def _rows(net: TextEncoder, captions: Sequence[str], batch: int, update: Callable[[int], object]) -> Iterator[Row]:
    """Features of the captions in order, as they are stored."""
    import torch

    for at in range(0, len(captions), ROUND * batch):
        some = captions[at : at + ROUND * batch]
        for features, cut in net.each(some):
            yield Row(features.bfloat16().view(torch.int16).cpu().numpy(), cut)
        update(len(some))


def _there(folder: Path, index: Index, recipe: Recipe, overwrite: bool) -> tuple[Index, dict[str, TextFile]]:
    """The index, and the files that need not be computed; what is of others is removed with `overwrite`.

    Raises:
        InputError: features of another recipe or data set, which are to stay.
    """
    listed, done, others, current = _listed(folder, index), dict[str, TextFile](), "", index.digest
    if listed is not None:
        others = listed.recipe.difference(recipe, str(folder), FLAGS)
    for path in sorted(folder.glob(TENSORS)):
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
