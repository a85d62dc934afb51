"""An encoder's features of every image of a shard folder or index, for `megapix train --repa.features`.

Each entry of the index becomes one file, whole or not at all; a file that is there is not computed again. Batches never
span two entries, so an interruption does not change which images go through the encoder together, nor a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.parts import gpus
from data_prep.parts.folder import Parts, join
from data_prep.parts.part import WHOLE, clear_own
from data_prep.parts.part import Part as Share
from data_prep.passes.decoded import Part, Shards, in_order, open_sized
from data_prep.writing import plan as planning
from data_prep.writing.pool import alone_in, check_workers
from data_prep.writing.write import WHOLE_NAME
from megapix.errors import InputError
from megapix.files import write_new
from megapix.shards.feature_file import faults
from megapix.shards.image_features import (
    KIND,
    MANIFEST_NAME,
    Dtype,
    FeatureFile,
    Features,
    read_manifest,
    write_file,
    write_manifest,
)
from megapix.shards.image_policy import Policy
from megapix.shards.index import Index
from megapix.shards.storage import Access
from megapix.shards.tables.files import Files

if TYPE_CHECKING:
    from megapix.encoders.image import Encoder


def features(
    folder: Path,
    name: str,
    out: Path,
    dtype: Dtype,
    flip: bool,
    batch: int,
    workers: int,
    access: Access,
    progress: bool = True,
    part: Share = WHOLE,
) -> tuple[Features, bool]:
    """Compute the features that are missing in `out`; return all, and whether they were finished already.

    Args:
        name: folder or hub name of the encoder.
        dtype: what it computes in, and what its features are stored in.
        flip: of the mirror images, too.
        batch: images that go through the encoder together.
        part: the share of the files that this process computes, on all GPUs of its machine.

    Raises:
        PartDone: this part is finished, and others are not.
        InputError: bad options, no such index or encoder, an image that cannot be read or decoded, an `out` of other
            features or something else, or one that cannot be written.
    """
    import torch
    from tqdm import tqdm

    from megapix.encoders import image as encoder

    check_workers(workers)
    if batch < 1:
        raise InputError(f"--batch = {batch}: expected at least 1")
    shards, places = open_sized(folder, access), gpus.devices()
    net = encoder.load(name, dtype, batch, "--encoder")
    index = shards.index
    whole = Features(out, name, net.digest, index.digest, net.width, dtype, flip, ())
    whole = replace(whole, files=_files(index, encoder.grid_of, whole.origin))
    files = whole.table
    plan = {"kind": "features", "encoder_digest": whole.digest, "data_digest": whole.data_digest}
    try:
        planning.settle(out, plan | {"width": whole.width, "dtype": dtype, "flip": flip})
        with alone_in(out, part):
            if _finished(whole, index):
                return whole, True
            parts = join(out, part, "features", {})
            if parts:
                found = {"encoder": name, "digest": net.digest, "data": whole.data_digest, "width": net.width}
                found |= {"dtype": dtype, "flip": flip, "files": files.sha256}
                parts.agree(WHOLE_NAME, found, free=("encoder",))
                write_new(parts.path(KIND.table), b"".join(files.blocks()))
            clear_own(out, ".*.tmp", part)
            (out / MANIFEST_NAME).unlink(missing_ok=True)
            mine = list(part.mine(range(len(files))))
            missing = [place for place in mine if whole.fault(files[place])]
            absent, total = (sum(files[place].samples for place in some) for some in (missing, mine))
            with tqdm(total=total, initial=total - absent, unit="img", disable=not progress, mininterval=0.5) as bar:
                if len(places) == 1:
                    net.to(torch.device(places[0]))
                    _fill(whole, shards, net, batch, workers, missing, bar.update)
                else:
                    work = partial(_fill_on, whole, shards, batch, max(1, workers // len(places)))
                    gpus.on_each(work, missing, places, bar.update)
            if parts:
                return parts.leave({}, close), False
            write_manifest(whole)
    except OSError as error:
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror or error}") from error
    return whole, False


def close(parts: Parts) -> Features:
    """Put the files of all parts together: write the manifest.

    Raises:
        InputError: a file is not as its part has written it.
    """
    found = parts.read(WHOLE_NAME)
    try:
        files = Files(KIND, path := parts.path(KIND.table))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is gone or damaged; give one of the parts again") from error
    of = found["encoder"], found["digest"], found["data"], found["width"], found["dtype"], found["flip"]
    whole = Features(parts.out, *of, files)
    for place, file in enumerate(files):
        if fault := whole.fault(file):
            raise InputError(f"{fault}; give its part again: --part {place % parts.count}/{parts.count}")
    clear_own(parts.out, ".*.tmp", WHOLE)
    write_manifest(whole)
    return whole


def _fill_on(
    whole: Features,
    shards: Shards,
    batch: int,
    workers: int,
    device: str,
    missing: Sequence[int],
    update: Callable[[int], object],
) -> None:
    """As `_fill`, in a process of its own."""
    import torch

    from megapix.encoders import image as encoder

    net = encoder.load(whole.encoder, whole.dtype, batch, "--encoder")
    net.to(torch.device(device))
    _fill(whole, shards, net, batch, workers, missing, update)


def _fill(
    whole: Features,
    shards: Shards,
    net: Encoder,
    batch: int,
    workers: int,
    missing: Sequence[int],
    update: Callable[[int], object],
) -> None:
    """Compute the missing files, by their places."""
    parts = _parts(shards.index, missing, batch)
    images = in_order(shards, [part for some in parts.values() for part in some], workers)
    for place, some in parts.items():
        write_file(whole, whole.files[place], _computed(net, whole, islice(images, len(some)), update))


def _finished(whole: Features, index: Index) -> bool:
    """Whether all is there, but for the encoder's name, which may be another one now."""
    try:
        found = read_manifest(whole.folder)
    except InputError:
        return False
    return replace(found, encoder=whole.encoder) == whole and not any(faults(found, index))


def _files(index: Index, grid_of: Callable[[int, int], tuple[int, int]], origin: str) -> Files[FeatureFile]:
    grids = np.array([grid_of(*size) for size in Policy.from_dict(index.image_policy).buckets])
    return Files.made_of(KIND, origin, [index.table.samples, *grids[index.table.buckets].T])


def _parts(index: Index, places: Sequence[int], batch: int) -> dict[int, list[Part]]:
    """Place of each of these entries -> its samples, up to `batch` at a time."""
    first = index.table.first.tolist()
    return {
        place: [(start, min(start + batch, end)) for start in range(first[place], end, batch)]
        for place in places
        for end in [first[place + 1]]
    }


def _computed(
    net: Encoder, whole: Features, images: Iterator[tuple[Part, NDArray[np.uint8]]], update: Callable[[int], object]
) -> Iterator[NDArray[Any]]:
    """Features [B, forms, rows, columns, width] of each part's images."""
    import torch

    device = net.parameters()[0].device
    for (start, stop), pixels in images:
        shown = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
        forms = torch.stack([net(shown.flip(-1) if form else shown) for form in range(whole.forms)], 1)
        stored = forms.bfloat16().view(torch.int16) if whole.dtype == "bf16" else forms
        yield stored.cpu().numpy()
        update(stop - start)
