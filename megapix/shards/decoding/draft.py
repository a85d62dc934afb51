"""JPEG decoded at 1/2, 1/4 or 1/8 of its size: libjpeg leaves high frequencies of each block out of its inverse DCT.

This takes the place of all halvings but the last, up to three: 1/2 for one of two, 1/4 for two of three, 1/8 for three
of four and more. So no image is decoded below twice its target, and the box filter still does the last halving.

libjpeg rounds sizes up, halving rounds them down. Where that differs, what the picture fills is scaled, by less than a
pixel, to the size of an image that was halved: it lies where the exact one does.
"""

from __future__ import annotations

from typing import NamedTuple

from PIL import Image

LARGEST = 3
"""Halvings of libjpeg's smallest scale, 1/8."""


class Draft(NamedTuple):
    """What comes of an image that is decoded at a reduced scale."""

    halvings: int
    """Those whose place it takes."""
    size: tuple[int, int]
    """(width, height) after them."""
    extent: tuple[int, int, float, float]
    """(left, top, right, bottom) of the picture in what libjpeg gives, in pixels."""


def begun(image: Image.Image, halvings: int) -> Draft | None:
    """Have an opened image decoded at a reduced scale; None if it is decoded whole.

    Args:
        halvings: how often it is to be halved.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L") or halvings < 2:
        return None
    times = min(halvings - 1, LARGEST)
    size = image.width >> times, image.height >> times
    drafted = image.draft(None, size)
    assert drafted
    return Draft(times, size, drafted[1])


def finished(image: Image.Image, draft: Draft) -> Image.Image:
    """The decoded image in the size of the draft."""
    return image if image.size == draft.size else image.resize(draft.size, Image.Resampling.BICUBIC, draft.extent)
