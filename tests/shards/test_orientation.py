"""How images are turned: all eight orientations, in every place that says so, for pixels and for sizes alike."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps
from PIL.PngImagePlugin import PngInfo

from megapix.shards import pixels
from megapix.shards.image_policy import Policy
from megapix.shards.pixels import decode, size_of
from tests.shards.test_images import encoded, photo

BY_HAND: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda p: p,
    2: lambda p: p[:, ::-1],
    3: lambda p: p[::-1, ::-1],
    4: lambda p: p[::-1],
    5: lambda p: p.transpose(1, 0, 2),
    6: lambda p: np.rot90(p, -1),
    7: lambda p: np.rot90(p, 2).transpose(1, 0, 2),
    8: lambda p: np.rot90(p),
}
"""What stands first in the file, and how it is to be shown (EXIF 2.3, table 6)."""


def exif(orientation: int) -> bytes:
    made = Image.Exif()
    made[0x0112] = orientation
    return made.tobytes()


def xmp(orientation: int, attribute: bool = True) -> bytes:
    about = (
        f'tiff:Orientation="{orientation}"/>'
        if attribute
        else (f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>")
    )
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {about}</rdf:RDF></x:xmpmeta>'
    ).encode()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def with_chunk(image: Image.Image, kind: bytes, data: bytes, late: bool) -> bytes:
    """A PNG with a chunk behind its header, or behind its pixels."""
    png = encoded(image)
    at = len(png) - 12 if late else 33
    return png[:at] + chunk(kind, data) + png[at:]


def itxt(text: bytes, compressed: bool) -> bytes:
    body = zlib.compress(text) if compressed else text
    return b"XML:com.adobe.xmp\0" + bytes((compressed, 0)) + b"\0\0" + body


def raw_profile(orientation: int) -> PngInfo:
    """As ImageMagick wrote EXIF data into a PNG before there was a chunk for it."""
    data, info = exif(orientation), PngInfo()
    info.add_text("Raw profile type exif", f"\nexif\n{len(data):8}\n{data.hex()}\n", zip=True)
    return info


def tiff(image: Image.Image, orientation: int, **options: Any) -> bytes:
    return encoded(image, "TIFF", tiffinfo={0x0112: orientation}, **options)


PLACES: dict[str, Callable[[Image.Image, int], bytes]] = {
    "JPEG EXIF": lambda im, n: encoded(im, "JPEG", exif=exif(n)),
    "JPEG XMP": lambda im, n: encoded(im, "JPEG", xmp=xmp(n)),
    "JPEG XMP element": lambda im, n: encoded(im, "JPEG", xmp=xmp(n, attribute=False)),
    "JPEG progressive XMP": lambda im, n: encoded(im, "JPEG", progressive=True, xmp=xmp(n)),
    "JPEG EXIF before XMP": lambda im, n: encoded(im, "JPEG", exif=exif(n), xmp=xmp(n % 8 + 1)),
    "PNG eXIf": lambda im, n: with_chunk(im, b"eXIf", exif(n)[6:], late=False),
    "PNG eXIf late": lambda im, n: with_chunk(im, b"eXIf", exif(n)[6:], late=True),
    "PNG XMP": lambda im, n: with_chunk(im, b"iTXt", itxt(xmp(n), False), late=False),
    "PNG XMP late": lambda im, n: with_chunk(im, b"iTXt", itxt(xmp(n), False), late=True),
    "PNG XMP late compressed": lambda im, n: with_chunk(im, b"iTXt", itxt(xmp(n), True), late=True),
    "PNG raw profile": lambda im, n: encoded(im, pnginfo=raw_profile(n)),
    "WebP EXIF": lambda im, n: encoded(im, "WEBP", lossless=True, exif=exif(n)),
    "WebP XMP": lambda im, n: encoded(im, "WEBP", lossless=True, xmp=xmp(n)),
    "TIFF": tiff,
    "TIFF LZW": lambda im, n: tiff(im, n, compression="tiff_lzw"),
    "TIFF XMP": lambda im, n: encoded(im, "TIFF", tiffinfo={700: xmp(n)}),
    "TIFF tag before XMP": lambda im, n: encoded(im, "TIFF", tiffinfo={700: xmp(n % 8 + 1), 0x0112: n}),
    "AVIF": lambda im, n: encoded(im, "AVIF", exif=exif(n)),
}


@pytest.mark.parametrize("place", PLACES)
def test_all_orientations(place: str) -> None:
    """Against the same bytes without an orientation, turned by hand; and Pillow's own answer."""
    picture = Image.fromarray(photo(21, 34))
    stored = decode(PLACES[place](picture, 1))
    assert stored.shape == (21, 34, 3)
    for orientation, by_hand in BY_HAND.items():
        data = PLACES[place](picture, orientation)
        expected = by_hand(stored)
        assert np.array_equal(decode(data), expected), orientation
        assert size_of(data) == expected.shape[:2], orientation
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(ImageOps.exif_transpose(image).convert("RGB")), expected), orientation


def test_plugins_give_upright_pixels_once() -> None:
    """HEIC and JPEG XL say themselves how they are turned, and their readers turn them."""
    wide = Image.fromarray(np.repeat(np.array([[250] * 20 + [9] * 28], np.uint8), 32, 0))
    pytest.importorskip("pillow_heif").register_heif_opener()
    for orientation in (1, 6, 8):
        data = encoded(wide.convert("RGB"), "HEIF", exif=exif(orientation), quality=100)
        found = decode(data)
        expected = BY_HAND[orientation](np.repeat(np.asarray(wide)[..., None], 3, 2))
        assert size_of(data) == found.shape[:2] == expected.shape[:2]
        assert np.abs(found.astype(int) - expected).max() <= 12
    pytest.importorskip("pillow_jxl")
    data = encoded(wide.convert("RGB"), "JXL", exif=exif(6), lossless=True)
    assert decode(data).shape == (*size_of(data), 3)


def test_orientation_does_not_keep_simplejpeg_from_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """EXIF data that say nothing of it, or that it is upright, are no reason to decode slowly."""
    used = []
    plain = pixels._plain_jpeg
    monkeypatch.setattr(pixels, "_plain_jpeg", lambda data: used.append(1) or plain(data))
    pytest.importorskip("simplejpeg")
    picture = Image.fromarray(photo(21, 34))
    for n in (1, 3):
        decode(encoded(picture, "JPEG", exif=exif(n)))
        decode(encoded(picture, "JPEG", xmp=xmp(n)))
        assert len(used) == 2


def test_values_that_are_no_orientation() -> None:
    picture = Image.fromarray(photo(21, 34))
    for value in (0, 9, 255):
        data = encoded(picture, "PNG", exif=exif(value))
        assert decode(data).shape == (21, 34, 3)
        assert size_of(data) == (21, 34)


def test_the_first_version_looks_as_it_did() -> None:
    """XMP was honored in pixels alone, so that the bucket was another image's; what it gave, it gives."""
    data = with_chunk(Image.fromarray(photo(21, 34)), b"iTXt", itxt(xmp(6), False), late=True)
    assert size_of(data, version=1) == (21, 34)
    assert decode(data, version=1).shape == (34, 21, 3)
    old, new = (Policy.make("buckets", 16, 4, version=version) for version in (1, 2))
    assert old.size_of(data) == (21, 34)
    assert new.size_of(data) == (34, 21)
