"""Pixels of an encoded image, and bicubic scaling to cover a size.

Decoding has versions, which the image policy of an index names, so that a run sees the same pixels to its end:

    1  PNG, JPEG and WebP; turned upright by EXIF data; the colours as they are stored
    2  all of `decoding.formats`; turned upright by EXIF data, XMP and TIFF's tag; ICC profiles converted to sRGB

It goes through Pillow, or for plain JPEG through simplejpeg where it is installed: the same library underneath, and the
same pixels. `fast` replaces the bicubic step by torch's antialiased one on 8-bit integers; results differ by rounding
(tests/shards/test_images.py holds them to 50 dB). A draft (`decoding.draft`) replaces all halvings but one.
"""

from __future__ import annotations

import importlib.util
import io
import warnings
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from megapix.shards.decoding import draft, icc, rgb, upright
from megapix.shards.decoding.formats import decoding, kind_of, opened, refusing

__all__ = ["Decoded", "Pixels", "cover", "decode", "decode_exactly", "header", "kind_of", "read", "scaled", "size_of"]

VERSION = 2
"""Of decoding, for new indexes."""
WHITE = (255, 255, 255)
FORMATS = ("PNG", "JPEG", "WEBP")
"""Formats that version 1 opens."""
UNIDENTIFIED = "not a PNG, JPEG or WebP image"
ORIENTATION = 0x0112
"""EXIF tag: how the camera was held."""

Pixels: TypeAlias = NDArray[np.uint8]
"""uint8 [H, W, 3], RGB."""


class Decoded(NamedTuple):
    """An image, and what is to be counted of how it came about."""

    pixels: Pixels
    size: tuple[int, int]
    """(height, width) of the whole image, upright: that of `pixels`, unless they are halved or cut."""
    notes: tuple[str, ...] = ()
    """`icc.CONVERTED` or `icc.UNUSABLE`, and of an image that a policy has made `UPSCALED`."""


def size_of(data: bytes, version: int = VERSION) -> tuple[int, int]:
    """(height, width) of an encoded image when it is upright, from its header; that of `decode`, wherever it stands.

    Raises:
        ValueError: not an image of a kind that is read, damaged, or as large as a decompression bomb.
    """
    return header(data, version, convert=False)[0]


def header(data: bytes, version: int = VERSION, convert: bool = True) -> tuple[tuple[int, int], tuple[str, ...]]:
    """(height, width) as `size_of`, and the notes that `read` would give; no pixel is decoded. ValueError as there."""
    if version == 1:
        return _size_1(data), ()
    with opened(data) as image, decoding():
        size = upright.size_upright(image, upright.turn_of(image))
        note = icc.asked(image)[1] if convert else None
    return size, (note,) if note else ()


def decode(data: bytes, background: tuple[int, int, int] = WHITE, version: int = VERSION) -> Pixels:
    """The pixels of `read`, uint8 [H, W, 3]; its errors."""
    return read(data, background, version).pixels


def read(
    data: bytes,
    background: tuple[int, int, int] = WHITE,
    version: int = VERSION,
    convert: bool = True,
    stored: tuple[int, int] | None = None,
    covered: tuple[int, int] | None = None,
) -> Decoded:
    """Decode a whole image (the first frame or page of several) to 8-bit RGB, upright.

    Transparency is composited on `background`; grey of 12 and 16 bits, and floats from 0 to 1, are scaled to 8 bits.

    Args:
        convert: whether colours are converted to sRGB by an embedded ICC profile.
        stored: the (height, width) that the file must have; compared before any pixel is decoded.
        covered: the (height, width) that the image is to cover: a JPEG then comes as a draft, halved some of the
            times that `cover` would halve it.

    Raises:
        ValueError: not an image of a kind that is read, one that needs a plug-in, truncated, with broken EXIF data, of
            another size than asked for, or as large as a decompression bomb.
    """
    if version == 1:
        pixels = _decode_1(data, background, stored)
        return Decoded(pixels, (pixels.shape[0], pixels.shape[1]))
    with opened(data) as image, decoding():
        _check_stored(image, stored)
        turn = upright.turn_of(image)
        conversion, note = icc.asked(image) if convert else (None, None)
        size = upright.size_upright(image, turn)
        drafted = draft.begun(image, halvings(*size, *covered)) if covered else None
        decoded = None
        if image.format == "JPEG" and image.mode in ("RGB", "L") and (turn, conversion, drafted) == (None, None, None):
            decoded = _plain_jpeg(data) if _agrees(_simplejpeg()) else None
        if decoded is None:
            image.load()
            whole = rgb.eight_bits(image)
            if conversion is not None:
                whole = icc.to_srgb(whole, conversion)
            if drafted:
                whole = draft.finished(whole, drafted)
            decoded = np.asarray(rgb.on_background(upright.turned(whole, image.format, turn), background))
    times = drafted.halvings if drafted else 0
    if decoded.shape[:2] != (size[0] >> times, size[1] >> times):
        raise ValueError(f"its header says {size[1]}x{size[0]} pixels, but {decoded.shape[1]}x{decoded.shape[0]} came")
    return Decoded(decoded, size, (note,) if note else ())


def decode_exactly(data: bytes, height: int, width: int, version: int = VERSION) -> Pixels:
    """Decode an image that is already RGB of that size; its size is compared before any pixel is decoded.

    Raises:
        ValueError: another size, or what `decode` raises.
    """
    pixels = read(data, version=version, stored=(height, width)).pixels
    if pixels.shape[:2] != (height, width):
        raise ValueError(f"image is to be turned to {pixels.shape[1]}x{pixels.shape[0]} pixels (EXIF)")
    return pixels


def _check_stored(image: Image.Image, stored: tuple[int, int] | None) -> None:
    if stored and (image.height, image.width) != stored:
        raise ValueError(f"image is {image.width}x{image.height} pixels, expected {stored[1]}x{stored[0]}")


@lru_cache(maxsize=1)
def _simplejpeg() -> Any:
    if importlib.util.find_spec("simplejpeg") is None:
        return None
    import simplejpeg

    return simplejpeg


def _plain_jpeg(data: bytes) -> Pixels | None:
    """The pixels through simplejpeg; None where it is not installed, or objects: Pillow then has the last word."""
    library = _simplejpeg()
    if library is None:
        return None
    try:
        return np.asarray(library.decode_jpeg(data, "RGB"))
    except ValueError:
        return None


@lru_cache(maxsize=4)
def _agrees(library: Any) -> bool:
    """Whether simplejpeg's copy of libjpeg-turbo gives the pixels of Pillow's copy: they may be of different releases.

    Seen on a small picture, as it is stored with every subsampling, and progressively.
    """
    if library is None:
        return False
    y, x = np.mgrid[:43, :61]
    probe = Image.fromarray(np.stack([x * 7 % 256, y * 11 % 256, (x * y) % 256], -1).astype(np.uint8))
    kinds: tuple[tuple[Image.Image, dict[str, Any]], ...] = (
        *((probe, {"subsampling": subsampling}) for subsampling in (0, 1, 2)),
        (probe, {"progressive": True}),
        (probe.convert("L"), {}),
    )
    for picture, options in kinds:
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=80, **options)
        with Image.open(out, formats=("JPEG",)) as image:
            expected = np.asarray(image.convert("RGB"))
        try:
            if not np.array_equal(library.decode_jpeg(out.getvalue(), "RGB"), expected):
                return False
        except ValueError:
            return False
    return True


def cover(pixels: Pixels, height: int, width: int, fast: bool = False) -> Pixels:
    """Scale an image so that it covers height × width, and cut that from its centre. A square is ADM's centre crop.

    Raises:
        ValueError: so long and thin that scaling it would pass Pillow's limit on pixels.
    """
    high, wide = scaled(pixels.shape[0], pixels.shape[1], height, width)
    for _ in range(halvings(pixels.shape[0], pixels.shape[1], height, width)):
        half = pixels.shape[1] // 2, pixels.shape[0] // 2
        pixels = np.asarray(Image.fromarray(pixels).resize(half, Image.Resampling.BOX))
    out = (_torch_bicubic if fast else _pillow_bicubic)(pixels, high, wide)
    top, left = (high - height) // 2, (wide - width) // 2
    return out[top : top + height, left : left + width]


def halvings(high: int, wide: int, height: int, width: int) -> int:
    """How often `cover` halves an image of high × wide pixels: while it has twice what it covers, height × width."""
    times = 0
    while high >> times >= 2 * height and wide >> times >= 2 * width:
        times += 1
    return times


def scaled(high: int, wide: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) to which `cover` scales an image of high × wide pixels before it cuts height × width from it.

    Raises:
        ValueError: as `cover`.
    """
    times = halvings(high, wide, height, width)
    high, wide = high >> times, wide >> times
    scale = max(height / high, width / wide)
    high, wide = round(high * scale), round(wide * scale)
    if Image.MAX_IMAGE_PIXELS and high * wide > Image.MAX_IMAGE_PIXELS:  # 1 × 50,000,000 pixels decode, but grow
        raise ValueError(f"scaled to {wide}x{high} pixels it exceeds the limit of {Image.MAX_IMAGE_PIXELS}")
    return high, wide


def _pillow_bicubic(pixels: Pixels, height: int, width: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _torch_bicubic(pixels: Pixels, height: int, width: int) -> Pixels:
    import torch

    if pixels.shape[:2] == (height, width):
        return pixels
    with warnings.catch_warnings():  # Pillow's arrays are read-only; nothing is written to them
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        image = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scaled = torch.nn.functional.interpolate(image, (height, width), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------------------
# Version 1, of indexes without a version: what comes out of it never changes
# ---------------------------------------------------------------------------------------------------------------------


def _size_1(data: bytes) -> tuple[int, int]:
    with _opened(data) as image, refusing(UNIDENTIFIED):
        exif = Image.Exif()
        exif.load(image.info.get("exif", b""))  # image.getexif() would decode a whole PNG
        turned = exif.get(ORIENTATION, 1) in (5, 6, 7, 8)
        return (image.width, image.height) if turned else (image.height, image.width)


def _decode_1(data: bytes, background: tuple[int, int, int], stored: tuple[int, int] | None) -> Pixels:
    with _opened(data) as image:
        _check_stored(image, stored)
        if image.format == "JPEG" and image.mode in ("RGB", "L") and "exif" not in image.info:
            pixels = _plain_jpeg(data)
            if pixels is not None:
                return pixels
        with refusing(UNIDENTIFIED):
            image.load()
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image), background))


def _opened(data: bytes) -> Image.Image:
    with refusing(UNIDENTIFIED):
        return Image.open(io.BytesIO(data), formats=FORMATS)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255 instead of scaling
        values = np.asarray(image.convert("I"))
        pixels = np.repeat((values >> 8).clip(0, 255).astype(np.uint8)[..., None], 3, axis=2)
        pixels[values == image.info.get("transparency", -1)] = background
        return Image.fromarray(pixels)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*background, 255))
        return Image.alpha_composite(canvas, rgba).convert("RGB")
    return image.convert("RGB")
