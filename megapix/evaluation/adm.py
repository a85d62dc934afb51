"""All images in one .npz, as ADM's evaluator reads them, written a block at a time."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from megapix.evaluation.blocks import Blocks
from megapix.weights import appearing


def write_npz(path: Path, blocks: Blocks) -> None:
    """Write arr_0, uint8 [N, height, width, 3], from the blocks' images; the file appears whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": (blocks.images.count, *blocks.images.size, 3)}
    with appearing(path, "--npz") as temporary, open(temporary, "wb") as file:
        with zipfile.ZipFile(file, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as member:
            npy.write_array_header_1_0(member, header)
            for block in range(blocks.images.blocks):
                member.write(np.load(blocks.pixels(block), allow_pickle=False).tobytes())
        file.flush()
        os.fsync(file.fileno())
