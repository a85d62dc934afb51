"""Pixels of every mode that Pillow decodes to, as 8-bit RGB."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

BITS, PHOTOMETRIC, WHITE_IS_ZERO = 0x0102, 0x0106, 0
"""TIFF tags, and a value of the latter."""


def eight_bits(image: Image.Image) -> Image.Image:
    """A decoded image of grey with 12 or 16 bits, or of floats from 0 to 1, as L (LA where a grey is transparent).

    `convert` would clip them instead of scaling. Images of other modes are returned as they are.

    Raises:
        ValueError: numbers of which nobody knows what is white: 32-bit or signed integers, floats beyond 0 to 1.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    tags: Any = getattr(image, "tag_v2", {})
    inverted = tags.get(PHOTOMETRIC) == WHITE_IS_ZERO
    if image.mode == "F":
        values = np.asarray(image)
        if not (values.size and np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("its samples are floats, expected 0 to 1")
        grey = np.rint(255 * (1 - values if inverted else values)).astype(np.uint8)
        return Image.fromarray(grey)
    if image.mode == "I" and image.format == "TIFF":
        raise ValueError("its samples are 32-bit or signed integers; expected 8 or 16 bits without a sign, or floats")
    values = np.asarray(image.convert("I"))
    bits = tags.get(BITS, (16,))[0]
    grey = (values >> (bits - 8)).clip(0, 255).astype(np.uint8)
    out = Image.fromarray(255 - grey if inverted else grey)
    if (clear := image.info.get("transparency")) is not None:
        out.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return out


def on_background(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """An image with 8 bits a channel as RGB, composited on `background` where it is transparent."""
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")
