"""Which kinds of images are opened, by their first bytes and never by a name, and by what.

Pillow's other readers are never reached. Each kind's size is known, and bounded, before a pixel is decoded.
"""

from __future__ import annotations

import io
import struct
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, PngImagePlugin, UnidentifiedImageError, features

from megapix.shards.decoding import jxl, png

FORMATS = {
    "png": "PNG",
    "jpg": "JPEG",
    "webp": "WEBP",
    "gif": "GIF",
    "bmp": "BMP",
    "tif": "TIFF",
    "avif": "AVIF",
    "jp2": "JPEG2000",
    "heic": "HEIF",
    "jxl": "JXL",
}
"""Kind -> Pillow's name of its reader."""
PLUGINS = {"heic": "pillow-heif", "jxl": "pillow-jxl-plugin"}
"""Kind -> the package that reads it, an extra of that kind's name."""
MAGIC = {
    b"\x89PNG\r\n\x1a\n": "png",
    b"\xff\xd8\xff": "jpg",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"BM": "bmp",
    b"II*\0": "tif",
    b"MM\0*": "tif",
    b"II+\0": "tif",
    b"MM\0+": "tif",
    b"\0\0\0\x0cjP  \r\n\x87\n": "jp2",
    b"\xff\x4f\xff\x51": "jp2",
    jxl.CONTAINER: "jxl",
    jxl.CODESTREAM: "jxl",
}
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
AVIF_BRANDS = {b"avif", b"avis"}


def kind_of(data: bytes) -> str | None:
    """The usual ending for encoded bytes, a key of FORMATS, from their first bytes; None if they are none of these."""
    for magic, kind in MAGIC.items():
        if data.startswith(magic):
            return kind
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    if data[4:8] == b"ftyp":  # ISO 14496-12: size, 'ftyp', major brand, version, compatible brands
        end = min(struct.unpack(">I", data[:4])[0], 256)
        brands = {data[at : at + 4] for at in (8, *range(16, end, 4))}
        return "avif" if brands & AVIF_BRANDS else "heic" if brands & HEIC_BRANDS else None
    return None


def opened(data: bytes) -> Image.Image:
    """The image with its header read: size, mode, and all metadata, wherever in the file they stand.

    Raises:
        ValueError: not an image of a kind that is read, one that needs a plug-in, damaged, or as large as a
            decompression bomb.
    """
    kind = kind_of(data)
    if kind is None:
        raise ValueError(f"not an image of a kind that is read ({', '.join(FORMATS)})") from UnidentifiedImageError()
    with decoding():
        _check_reader(kind)
        if kind == "png":
            data = png.tidied(data)
        if kind == "jxl":  # whose plug-in decodes all of it when it opens it
            _check_size(*jxl.size_of(data))
        return Image.open(io.BytesIO(data), formats=(FORMATS[kind],))


@contextmanager
def decoding() -> Iterator[None]:
    """`refusing`, with all text chunks of a PNG that is `png.tidied`."""
    text_chunk = PngImagePlugin.MAX_TEXT_CHUNK
    PngImagePlugin.MAX_TEXT_CHUNK = png.LARGEST_TEXT
    try:
        with refusing("damaged: its header cannot be read"):
            yield
    finally:
        PngImagePlugin.MAX_TEXT_CHUNK = text_chunk


@contextmanager
def refusing(unidentified: str) -> Iterator[None]:
    """Whatever a decoder makes of damaged or hostile bytes is a ValueError: Pillow's parsers raise all kinds.

    An image that Pillow warns of as a bomb is refused; its other warnings (odd EXIF data) change nothing.

    Args:
        unidentified: what is said of bytes that no reader takes for its own.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(unidentified) from error
    except Exception as error:
        raise ValueError(str(error) or type(error).__name__) from error


def _check_reader(kind: str) -> None:
    """Have the kind's reader ready, or say what is to be installed."""
    if kind == "heic":
        try:
            from pillow_heif import register_heif_opener
        except ImportError as error:
            raise _missing(kind) from error
        register_heif_opener()
    elif kind == "jxl":
        try:
            import pillow_jxl  # noqa: F401  # registers itself
        except ImportError as error:
            raise _missing(kind) from error
    elif kind == "avif" and not ("avif" in features.modules and features.check("avif")):
        raise ValueError("an AVIF image: expected Pillow 11.3 or later, built with AVIF")


def _missing(kind: str) -> ValueError:
    return ValueError(
        f"a {kind.upper()} image, which {PLUGINS[kind]} reads; it is not installed: pip install 'megapix[{kind}]'"
    )


def _check_size(width: int, height: int) -> None:
    if Image.MAX_IMAGE_PIXELS and width * height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"image size ({width * height} pixels) exceeds limit of {Image.MAX_IMAGE_PIXELS} pixels")
