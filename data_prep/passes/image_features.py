"""An encoder's features of every image of a shard folder or index, for `megapix train --repa.features`.

Each entry of the index becomes one file, whole or not at all; a file that is there is not computed again. Batches never
span two entries, so an interruption does not change which images go through the encoder together, nor a byte.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from data_prep.passes.decoded import Part, in_order, open_sized
from data_prep.writing import plan as planning
from data_prep.writing.pool import alone_in, check_workers
from megapix.errors import InputError
from megapix.shards.feature_file import file_name
from megapix.shards.image_features import (
    MANIFEST_NAME,
    Dtype,
    FeatureFile,
    Features,
    manifest,
    write_file,
    write_manifest,
)
from megapix.shards.image_policy import Policy
from megapix.shards.index import Index
from megapix.shards.storage import Access

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
) -> tuple[Features, bool]:
    """Compute the features that are missing in `out`; return all, and whether they were finished already.

    Args:
        name: folder or hub name of the encoder.
        dtype: what it computes in, and what its features are stored in.
        flip: of the mirror images, too.
        batch: images that go through the encoder together.

    Raises:
        InputError: bad options, no such index or encoder, an image that cannot be read or decoded, an `out` of other
            features or something else, or one that cannot be written.
    """
    import torch
    from tqdm import tqdm

    from megapix.encoders import image as encoder

    check_workers(workers)
    if batch < 1:
        raise InputError(f"--batch = {batch}: expected at least 1")
    shards = open_sized(folder, access)
    net = encoder.load(name, dtype, batch, "--encoder")
    net.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    index = shards.index
    files = _files(index, encoder.grid_of)
    whole = Features(out, name, net.digest, index.digest, net.width, dtype, flip, files)
    plan = {"kind": "features", "encoder_digest": whole.digest, "data_digest": whole.data_digest}
    try:
        planning.settle(out, plan | {"width": whole.width, "dtype": dtype, "flip": flip})
        with alone_in(out):
            for leftover in out.glob(".*.tmp"):
                leftover.unlink()
            missing = [place for place, file in enumerate(files) if whole.fault(file)]
            if not missing and _finished(whole):
                return whole, True
            (out / MANIFEST_NAME).unlink(missing_ok=True)
            parts = _parts(index, missing, batch)
            images = in_order(shards, [part for some in parts.values() for part in some], workers)
            absent = sum(files[place].samples for place in missing)
            initial = index.samples - absent
            with tqdm(total=index.samples, initial=initial, unit="img", disable=not progress, mininterval=0.5) as bar:
                for place, some in parts.items():
                    write_file(whole, files[place], _computed(net, whole, islice(images, len(some)), bar))
            write_manifest(whole)
    except OSError as error:
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror or error}") from error
    return whole, False


def _finished(whole: Features) -> bool:
    """Whether the manifest is there, but for the encoder's name, which may be another one now."""
    path = whole.folder / MANIFEST_NAME
    return path.is_file() and _nameless(path.read_bytes()) == _nameless(manifest(whole))


def _nameless(data: bytes) -> list[bytes]:
    return [line for line in data.splitlines() if not line.startswith(b' "encoder":')]


def _files(index: Index, grid_of: Any) -> tuple[FeatureFile, ...]:
    sizes = Policy.from_dict(index.image_policy).buckets
    return tuple(
        FeatureFile(file_name("features", place), entry.samples, *grid_of(*sizes[entry.bucket]))
        for place, entry in enumerate(index.shards)
    )


def _parts(index: Index, places: Sequence[int], batch: int) -> dict[int, list[Part]]:
    """Place of each of these entries -> its samples, up to `batch` at a time."""
    first = index.table.first.tolist()
    return {
        place: [(start, min(start + batch, end)) for start in range(first[place], end, batch)]
        for place in places
        for end in [first[place + 1]]
    }


def _computed(
    net: Encoder, whole: Features, images: Iterator[tuple[Part, NDArray[np.uint8]]], bar: Any
) -> Iterator[NDArray[Any]]:
    """Features [B, forms, rows, columns, width] of each part's images."""
    import torch

    device = net.parameters()[0].device
    for (start, stop), pixels in images:
        shown = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device)
        forms = torch.stack([net(shown.flip(-1) if form else shown) for form in range(whole.forms)], 1)
        stored = forms.bfloat16().view(torch.int16) if whole.dtype == "bf16" else forms
        yield stored.cpu().numpy()
        bar.update(stop - start)
