"""What tells images apart: a hash of all pixels, or a perceptual hash of 64 bits."""

from __future__ import annotations

import hashlib

import numpy as np

from data_prep.filters.rules import Duplicates
from megapix.shards.pixels import Pixels

EXACT_BYTES, NEAR_BYTES = 32, 8


def length_of(duplicates: Duplicates) -> int:
    """Bytes of a fingerprint."""
    return EXACT_BYTES if duplicates.threshold is None else NEAR_BYTES


def fingerprint(pixels: Pixels, duplicates: Duplicates) -> bytes:
    """SHA-256 of height, width and pixels, or ImageHash's `phash` (the signs of 8 × 8 coefficients of a DCT of the grey
    image at 32 × 32 pixels)."""
    if duplicates.threshold is None:
        shape = np.array(pixels.shape[:2], "<u4").tobytes()
        return hashlib.sha256(shape + np.ascontiguousarray(pixels).tobytes()).digest()
    import imagehash
    from PIL import Image

    return np.packbits(imagehash.phash(Image.fromarray(pixels)).hash).tobytes()
