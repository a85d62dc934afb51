"""Reference statistics of a shard folder or index: every image once through an extractor, added up in blocks.

Images go through the extractor in batches, in the table's order, and so many batches in a row are a block that there
are BLOCKS of them at most. A block's sums become a file, whole or not at all, in a folder beside the output whose name
holds a hash of what is computed; a file that is there is not computed again. At the end the blocks are added in their
order. What goes through the extractor together, and in which order it is added, depends on the index and --batch alone:
not on processes, parts or interruptions.
"""

from __future__ import annotations

import glob
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice, tee
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from data_prep.parts import gpus
from data_prep.parts.folder import Parts, join
from data_prep.parts.part import WHOLE, clear_own
from data_prep.parts.part import Part as Share
from data_prep.passes.decoded import Part, Shards, in_order, open_sized
from data_prep.writing.pool import alone_in, check_workers
from data_prep.writing.write import WHOLE_NAME
from megapix.errors import InputError
from megapix.files import check_writable, write_atomic
from megapix.shards.index import Index
from megapix.shards.statistics import Reference, Sums, read_reference, write_reference
from megapix.shards.storage import Access

if TYPE_CHECKING:
    from megapix.encoders.scoring import Extractor

BLOCKS = 128
"""At most; each takes width² · 8 bytes for as long as the statistics are not finished."""


@dataclass(frozen=True)
class Whole:
    """What is computed, the same for all parts and processes."""

    extractor: str
    sha256: str
    """Hash of its weights."""
    width: int
    data: str
    """Digest of the data set."""
    samples: int
    features: int
    """Samples whose features are kept, evenly spread."""
    batch: int
    """Images that go through the extractor together."""
    block: int
    """Batches in a block, of which the last may have fewer."""
    blocks: int

    def folder(self, out: Path) -> Path:
        """Where the blocks lie until they are put together."""
        digest = hashlib.sha256(json.dumps(asdict(self)).encode()).hexdigest()
        return out.with_name(f".{out.name}.{digest[:16]}.blocks")


def stats(
    folder: Path,
    out: Path,
    extractor: str,
    weights: Path | None,
    kept: int,
    batch: int,
    workers: int,
    access: Access,
    progress: bool = True,
    part: Share = WHOLE,
) -> tuple[Reference, bool]:
    """Compute the statistics and write them to `out`; return them, and whether they were there already.

    Args:
        extractor: its name.
        weights: its file, where the user brings it.
        kept: features to keep for KID, precision and recall, evenly spread over the samples.
        batch: images that go through the extractor together.
        part: the share of the blocks that this process computes, on all GPUs of its machine.

    Raises:
        PartDone: this part is finished, and others are not.
        InputError: bad options, no such index, an image that cannot be read or decoded, or `out` cannot be written.
    """
    from tqdm import tqdm

    from megapix.encoders.scoring import open_extractor

    check_workers(workers)
    for option, value, least in (("--features", kept, 0), ("--batch", batch, 1)):
        if value < least:
            raise InputError(f"{option} = {value}: expected at least {least}")
    check_writable("--out", out)
    shards, places = open_sized(folder, access), gpus.devices()
    if shards.index.samples < 2:
        raise InputError(f"{str(folder)!r} holds one image: expected at least 2")
    net = open_extractor(extractor, weights)
    whole = _whole(shards.index, net, kept, batch)
    if there := _finished(out, whole):
        return there, True
    blocks = whole.folder(out)
    try:
        parts = join(out, part, "stats", {"extractor": extractor, "features": kept, "batch": batch})
        if parts:
            parts.agree(WHOLE_NAME, asdict(whole))
        blocks.mkdir(exist_ok=True)
        with alone_in(blocks, part):
            clear_own(blocks, ".*.tmp", part)
            mine = list(part.mine(range(whole.blocks)))
            samples = {block: some[-1][1] - some[0][0] for block, some in _batches_of(shards.index, whole, mine)}
            missing = [block for block in mine if not _file(blocks, block).is_file()]
            absent, total = (sum(samples[block] for block in some) for some in (missing, mine))
            with tqdm(total=total, initial=total - absent, unit="img", disable=not progress, mininterval=0.5) as bar:
                if len(places) == 1:
                    _fill(whole, blocks, shards, net, workers, places[0], missing, bar.update)
                else:
                    work = partial(_fill_on, whole, blocks, shards, weights, max(1, workers // len(places)))
                    gpus.on_each(work, missing, places, bar.update)
            return parts.leave({}, close) if parts else _put_together(out, whole), False
    except OSError as error:
        if there := _finished(out, whole):  # by another process with the same part
            return there, True
        raise InputError(f"cannot write {str(error.filename or out)!r}: {error.strerror or error}") from error


def close(parts: Parts) -> Reference:
    """Put the blocks of all parts together; return the statistics.

    Raises:
        InputError: a block is not as its part has written it.
    """
    whole = Whole(**parts.read(WHOLE_NAME))
    return _finished(parts.out, whole) or _put_together(parts.out, whole, parts.count)


def _whole(index: Index, net: Extractor, kept: int, batch: int) -> Whole:
    batches = sum(-(-samples // batch) for samples in index.bucket_samples.values())
    block = -(-batches // BLOCKS)
    about = net.name, net.sha256, net.width, index.digest, index.samples, min(kept, index.samples)
    return Whole(*about, batch, block, -(-batches // block))


def _finished(out: Path, whole: Whole) -> Reference | None:
    """The statistics that are at `out`, if they are those."""
    try:
        there, _ = read_reference(out)
    except InputError:  # none, or something else
        return None
    of = there.extractor, there.extractor_sha256, there.data_digest, there.moments.count, len(there.features)
    return there if of == (whole.extractor, whole.sha256, whole.data, whole.samples, whole.features) else None


def _fill_on(
    whole: Whole,
    blocks: Path,
    shards: Shards,
    weights: Path | None,
    workers: int,
    device: str,
    missing: Sequence[int],
    update: Callable[[int], object],
) -> None:
    """As `_fill`, in a process of its own."""
    from megapix.encoders.scoring import open_extractor

    _fill(whole, blocks, shards, open_extractor(whole.extractor, weights), workers, device, missing, update)


def _fill(
    whole: Whole,
    blocks: Path,
    shards: Shards,
    net: Extractor,
    workers: int,
    device: str,
    missing: Sequence[int],
    update: Callable[[int], object],
) -> None:
    """Compute the missing blocks, by their numbers."""
    import torch

    net.to(torch.device(device))
    chosen = np.arange(whole.features) * whole.samples // max(1, whole.features)
    ahead, own = tee(_batches_of(shards.index, whole, set(missing)))
    images = in_order(shards, (batch for _, some in ahead for batch in some), workers)
    for block, some in own:
        sums, kept = Sums(whole.width), []
        for (start, stop), pixels in islice(images, len(some)):
            found = net(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device))[0].cpu().numpy()
            sums.add(found)
            kept.append(found[chosen[(chosen >= start) & (chosen < stop)] - start])
            update(stop - start)
        data = io.BytesIO()
        np.savez(data, features=np.concatenate(kept), **sums.counted())
        write_atomic(_file(blocks, block), data.getvalue())


def _put_together(out: Path, whole: Whole, of: int = 1) -> Reference:
    """Add the blocks up and write the statistics; the folder of the blocks goes."""
    sums, features = Sums(whole.width), []
    for block in range(whole.blocks):
        path = _file(whole.folder(out), block)
        try:
            with np.load(path, allow_pickle=False) as file:
                sums.merge(file)
                features.append(file["features"])
        except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
            again = f"its part again: --part {block % of}/{of}" if of > 1 else "the same command again"
            raise InputError(f"{path} is gone or damaged; delete it, and give {again}") from error
    made = Reference(sums.moments(), np.concatenate(features), whole.extractor, whole.sha256, whole.data)
    write_reference(out, made)
    for folder in out.parent.glob(f".{glob.escape(out.name)}.*.blocks"):  # also of other options, killed before
        shutil.rmtree(folder, ignore_errors=True)
    return made


def _file(blocks: Path, block: int) -> Path:
    return blocks / f"block-{block:06d}.npz"


def _batches_of(index: Index, whole: Whole, blocks: Collection[int]) -> Iterator[tuple[int, list[Part]]]:
    """(number, batches) of each of these blocks, in order."""
    batches = _batches(index, whole.batch)
    for block in range(whole.blocks):
        some = list(islice(batches, whole.block))
        if block in blocks:
            yield block, some


def _batches(index: Index, batch: int) -> Iterator[Part]:
    """Ranges of up to `batch` samples; entries of one bucket lie together, and a batch never spans two buckets."""
    end = 0
    for samples in index.bucket_samples.values():
        first, end = end, end + samples
        yield from ((start, min(start + batch, end)) for start in range(first, end, batch))
