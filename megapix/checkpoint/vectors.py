"""Flat fp32 vectors in safetensors files, written as a stream and read by range.

The library writes only tensors that are all in memory, and reads from mapped memory, where an error of the disk ends
the process by SIGBUS. Saving, loading, resharding and exporting hold one chunk at a time, and a read is tried again, so
both are ours: 8 bytes of length, a JSON header, the numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from megapix.checkpoint.layout import FileRecord, Layout
from megapix.errors import InputError
from megapix.files import read_range, safetensors_header

CHUNK = 2**22
"""Numbers moved at a time: 16 MiB."""
LARGEST_HEADER = 100 << 20
"""Bytes of a header that is read; the library has the same bound."""
DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
"""The dtypes of weights, by safetensors' names."""


def chunks(vector: Tensor) -> Iterator[Tensor]:
    """A flat vector on any device in pieces on the host."""
    for start in range(0, len(vector), CHUNK):
        yield vector[start : start + CHUNK].cpu()


def write(
    path: Path,
    tensors: Mapping[str, tuple[tuple[int, ...], Iterable[Tensor]]],
    metadata: dict[str, str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> FileRecord:
    """Write a safetensors file of tensors, each given as its shape and pieces of its flat numbers in order.

    They are fp32, but for those that `dtypes` names. The file is synced to disk. Returns its size and hash.

    Raises:
        OSError: it cannot be written.
        ValueError: the pieces of a tensor do not add up to its shape.
    """
    kinds = {name: (dtypes or {}).get(name, torch.float32) for name in tensors}
    # Wide dtypes first, so that each tensor is aligned for a view of the file.
    ordered = sorted(tensors, key=lambda name: -kinds[name].itemsize)
    header = safetensors_header({name: (DTYPES[kinds[name]], tensors[name][0]) for name in ordered}, metadata)
    digest = hashlib.sha256()
    with open(path, "wb") as file:

        def put(data: bytes | memoryview) -> None:
            file.write(data)
            digest.update(data)

        put(header)
        for name in ordered:
            shape, pieces = tensors[name]
            count = 0
            for piece in pieces:
                numbers = piece.detach().to(kinds[name]).flatten().contiguous()
                put(numbers.view(torch.uint8).numpy().data)
                count += piece.numel()
            if count != math.prod(shape):
                raise ValueError(f"{name}: {count} numbers for the shape {shape}")
        file.flush()
        os.fsync(file.fileno())
        return FileRecord(file.tell(), digest.hexdigest())


def read(folder: Path, layout: Layout, part: str, start: int, stop: int) -> Iterator[tuple[int, Tensor]]:
    """Pieces of a part's numbers [start, stop) from all files that hold some: (position in the vector, numbers).

    Raises:
        InputError: a file is not what the layout says. StorageError: it cannot be read now.
    """
    for rank in range(layout.ranks):
        first, last = layout.range_of(rank)
        low, high = max(start, first), min(stop, last)
        if low >= high:
            continue
        path = folder / layout.file_of(rank)
        try:
            begin = _begin(path, part, last - first)
            for at in range(low, high, CHUNK):
                count = min(CHUNK, high - at)
                data = read_range(path, begin + 4 * (at - first), 4 * count)
                if len(data) != 4 * count:
                    raise ValueError(f"it ends within {part}")
                yield at, torch.frombuffer(bytearray(data), dtype=torch.float32)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: cannot be read as safetensors: {error}") from error


def _begin(path: Path, part: str, count: int) -> int:
    """Where the numbers of a part begin in a file; InputError if they are not `count` in fp32."""
    size = int.from_bytes(read_range(path, 0, 8), "little")
    if not 0 < size <= LARGEST_HEADER:
        raise ValueError(f"its header would have {size} bytes")
    about = json.loads(read_range(path, 8, size))[part]
    if about["shape"] != [count] or about["dtype"] != "F32":
        raise InputError(f"{path}: {part} is {about['shape']}, expected {[count]} fp32 numbers")
    return 8 + size + int(about["data_offsets"][0])


def fill(vector: Tensor, folder: Path, layout: Layout, part: str, start: int) -> None:
    """Copy a part's numbers from `start` on into a flat vector on any device; errors as in `read`."""
    for at, piece in read(folder, layout, part, start, start + len(vector)):
        vector[at - start : at - start + len(piece)].copy_(piece)


def tensor(folder: Path, layout: Layout, part: str, name: str) -> Tensor:
    """One parameter's numbers of a part, fp32 in its shape; errors as in `read`."""
    start, stop = layout.spans[name]
    flat = torch.empty(stop - start)
    fill(flat, folder, layout, part, start)
    return flat.view(layout.shapes[name])
