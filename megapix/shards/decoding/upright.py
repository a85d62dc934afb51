"""How an image is turned: one answer, for its size before it is decoded and for its pixels after that.

Orientation is read wherever Pillow reads it: EXIF data (JPEG, WebP, AVIF, a PNG's eXIf or text), XMP's
tiff:Orientation where EXIF data say nothing, and a TIFF's own tag.
"""

from __future__ import annotations

from typing import Any

from PIL import Image

ORIENTATION = 0x0112
"""EXIF and TIFF tag: how the camera was held."""
WIDTH, HEIGHT = 0x0100, 0x0101
"""TIFF tags."""
TURNED = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""Orientation -> what turns the image upright."""
SIDEWAYS = (5, 6, 7, 8)


def turn_of(image: Image.Image) -> Image.Transpose | None:
    """What turns an image that `formats.opened` has opened upright; None if it is."""
    return TURNED.get(_orientation(image))


def size_upright(image: Image.Image, turn: Image.Transpose | None) -> tuple[int, int]:
    """(height, width) that an opened image has when it is turned; no pixel is decoded."""
    width, height = image.size
    if image.format == "TIFF":  # whose size Pillow has turned, or not, depending on its version and the tag's place
        tags: Any = image.tag_v2  # type: ignore[attr-defined]
        width, height = tags[WIDTH], tags[HEIGHT]
    return (width, height) if turn in [TURNED[n] for n in SIDEWAYS] else (height, width)


def turned(image: Image.Image, kind: str | None, turn: Image.Transpose | None) -> Image.Image:
    """A decoded image of Pillow's format `kind`, upright."""
    if turn is None or kind == "TIFF":  # Pillow turns a TIFF as it decodes it
        return image
    return image.transpose(turn)


def _orientation(image: Image.Image) -> Any:
    # libheif and libjxl give upright pixels, and Exif does not count beside what these formats say themselves. But a
    # JPEG within JPEG XL comes as it was.
    if image.format == "HEIF" or (image.format == "JXL" and not getattr(image, "jpeg", False)):
        return 1
    # PngImageFile.getexif would decode a whole PNG, for what may follow the pixels: `png.tidied` has moved it ahead.
    return Image.Image.getexif(image).get(ORIENTATION, 1)
