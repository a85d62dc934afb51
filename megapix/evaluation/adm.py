"""All images in one .npz, as ADM's evaluator reads them, written a block at a time."""

from __future__ import annotations

import os
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from megapix.errors import InputError
from megapix.evaluation.blocks import Blocks


def write_npz(path: Path, blocks: Blocks) -> None:
    """Write arr_0, uint8 [N, height, width, 3], from the blocks' images; the file appears whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    header = {"descr": "|u1", "fortran_order": False, "shape": (blocks.images.count, *blocks.images.size, 3)}
    try:
        with zipfile.ZipFile(temporary, "w") as archive, archive.open("arr_0.npy", "w", force_zip64=True) as file:
            npy.write_array_header_1_0(file, header)
            for block in range(blocks.images.blocks):
                file.write(np.load(blocks.pixels(block), allow_pickle=False).tobytes())
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"--npz {str(path)!r} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()
