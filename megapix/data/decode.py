"""Decoding through webdataset's decoder interface, with handlers that never unpickle and bound the image's size.

The stock decoders would unpickle `.pyd` and `.pth` members and decode an image of any size; shards may come from
strangers, so only the two handlers below are used.
"""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import webdataset.autodecode
from PIL import Image, UnidentifiedImageError

from megapix.errors import InputError
from megapix.shards import IMAGE_EXTENSIONS

FORMATS = ("PNG", "JPEG", "WEBP")


class BoundedImage:
    """webdataset handler: encoded PNG, JPEG or WebP of exactly size × size pixels -> uint8 [3, size, size]."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, key: str, data: bytes) -> Any:
        if key.rpartition(".")[2].lower() not in IMAGE_EXTENSIONS:
            return None
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
            if image.size != (self.size, self.size):
                raise ValueError(f"image is {image.size[0]}x{image.size[1]} pixels, expected {self.size}x{self.size}")
            pixels = np.asarray(image.convert("RGB"))
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def class_number(key: str, data: bytes) -> int | None:
    """webdataset handler: the ASCII number of a `cls` member."""
    return int(data) if key.endswith(".cls") else None


class Decoder:
    """Decodes the samples of `ShardReader.read`."""

    def __init__(self, image_size: int) -> None:
        self._decode = webdataset.autodecode.Decoder([BoundedImage(image_size), class_number], pre=[], post=[])

    def __call__(self, sample: dict[str, bytes | str], extension: str) -> tuple[np.ndarray[Any, Any], int]:
        """Return (uint8 image [3, H, W], label).

        Raises:
            InputError: not an image, of another size, or damaged; names shard and key.
        """
        try:
            decoded = self._decode(sample)
        except webdataset.autodecode.DecodingError as error:
            cause = error.__cause__
            reason = "not a PNG, JPEG or WebP image" if isinstance(cause, UnidentifiedImageError) else cause
            raise InputError(f"{error.url}: sample {error.key}: member {error.k}: {reason}") from error
        return decoded[extension], decoded["cls"]
