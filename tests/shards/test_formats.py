"""Every kind of image that is read: right values, within bounds, or refused with what is missing."""

from __future__ import annotations

import io
import re
import struct
import sys
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from megapix.shards import pixels
from megapix.shards.decoding import formats, jxl, png
from megapix.shards.pixels import decode, kind_of, size_of
from tests.shards.test_images import encoded, photo

RED = (250, 10, 20)


def plugins() -> None:
    pytest.importorskip("pillow_heif").register_heif_opener()
    pytest.importorskip("pillow_jxl")


def tiff(values: np.ndarray, photometric: int, bits: int, kind: int = 1, order: str = "<") -> bytes:
    """An uncompressed TIFF of one channel, written by hand (TIFF 6.0): kind 1 is unsigned, 2 signed, 3 float."""
    data, (height, width) = values.astype(values.dtype.newbyteorder(order)).tobytes(), values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(data)}
    tags[339] = kind
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in sorted(tags.items()):
        directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", 8 + len(data))
    return head + data + directory + bytes(4)


def test_kinds_that_keep_every_value() -> None:
    picture = photo(21, 34)
    image = Image.fromarray(picture)
    for kind, ending, options in (
        ("PNG", "png", {}),
        ("BMP", "bmp", {}),
        ("TIFF", "tif", {}),
        ("TIFF", "tif", {"compression": "tiff_lzw"}),
        ("TIFF", "tif", {"compression": "tiff_adobe_deflate"}),
        ("WEBP", "webp", {"lossless": True}),
        ("JPEG2000", "jp2", {}),
        ("JPEG2000", "jp2", {"no_jp2": True}),
    ):
        data = encoded(image, kind, **options)
        assert kind_of(data) == ending
        assert size_of(data) == (21, 34)
        assert np.array_equal(decode(data), picture), (kind, options)
    few = image.quantize(64)
    assert np.array_equal(decode(encoded(few, "GIF")), np.asarray(few.convert("RGB")))


def test_kinds_that_lose_something() -> None:
    plugins()
    red = Image.new("RGB", (48, 32), RED)
    for kind, ending in (("JPEG", "jpg"), ("AVIF", "avif"), ("HEIF", "heic"), ("JXL", "jxl"), ("MPO", "jpg")):
        data = encoded(red, kind, quality=95)
        assert kind_of(data) == ending
        assert size_of(data) == (32, 48)
        assert np.abs(decode(data)[16, 24].astype(int) - RED).max() <= 6, kind


def test_the_first_frame_or_page() -> None:
    frames = [Image.new("RGB", (8, 6), color) for color in (RED, (0, 99, 0), (0, 0, 99))]
    for kind in ("GIF", "WEBP", "TIFF", "PNG", "AVIF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode(data)[3, 4].astype(int) - RED).max() <= 6, kind
        assert decode(data).shape == (6, 8, 3)


def test_transparent_gif() -> None:
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    palette.putpixel((0, 0), 0)
    found = decode(encoded(palette, "GIF", transparency=1), (1, 200, 3))
    assert found[0, 0].tolist() == [0, 0, 0]
    assert found[1, 1].tolist() == [1, 200, 3]


def test_16_bits_and_floats_are_scaled() -> None:
    values = np.array([[0, 257, 128 * 257, 65535]] * 3, np.uint16)
    grey = np.array([0, 1, 128, 255])
    for order in "<>":
        assert decode(tiff(values, 1, 16, order=order))[0, :, 0].tolist() == grey.tolist()
    assert decode(tiff(values, 0, 16))[0, :, 0].tolist() == (255 - grey).tolist(), "white is zero"
    floats = np.array([[0.0, 1 / 255, 128 / 255, 1.0]] * 3, np.float32)
    assert decode(tiff(floats, 1, 32, 3))[0, :, 0].tolist() == grey.tolist()
    assert decode(tiff(floats, 0, 32, 3))[0, :, 0].tolist() == (255 - grey).tolist()
    assert decode(encoded(Image.fromarray(values), "JPEG2000"))[0, :, 0].tolist() == grey.tolist()
    for bad in (
        tiff(floats * 2, 1, 32, 3),
        tiff(floats - 1, 1, 32, 3),
        tiff(np.full((2, 2), np.nan, np.float32), 1, 32, 3),
        tiff(values.astype(np.int32), 1, 32, 2),
        tiff(values.astype(np.int16), 1, 16, 2),
    ):
        assert size_of(bad) in ((3, 4), (2, 2))
        with pytest.raises(ValueError, match="its samples are"):
            decode(bad)


def test_other_modes_of_tiff() -> None:
    size = (4, 4)
    assert decode(encoded(Image.new("CMYK", size, (0, 255, 255, 0)), "TIFF"))[0, 0].tolist() == [255, 0, 0]
    assert decode(encoded(Image.new("1", size, 1), "TIFF"))[0, 0].tolist() == [255] * 3
    assert decode(encoded(Image.new("LA", size, (0, 51)), "TIFF"))[0, 0].tolist() == [204] * 3
    assert decode(encoded(Image.new("RGBA", size, (0, 0, 0, 51)), "TIFF"))[0, 0].tolist() == [204] * 3
    assert decode(encoded(Image.new("PA", size, 0), "TIFF", compression=None))[0, 0].shape == (3,)


def test_bytes_count_and_not_names() -> None:
    assert kind_of(b"\0\0\0\x1cftypmif1\0\0\0\0mif1avif") == "avif"
    assert kind_of(b"\0\0\0\x1cftypmif1\0\0\0\0mif1heic") == "heic"
    assert kind_of(b"\0\0\0\x1cftypisom\0\0\0\0isommp41") is None, "a film"
    assert kind_of(b"") is None
    assert formats.FORMATS.keys() >= {*formats.MAGIC.values(), "webp", "avif", "heic"}


@pytest.mark.parametrize("kind", ["HEIF", "JXL"])
def test_a_plug_in_that_is_missing_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins()
    data = encoded(Image.new("RGB", (8, 8)), kind)
    package = {"HEIF": "pillow_heif", "JXL": "pillow_jxl"}[kind]
    monkeypatch.setitem(sys.modules, package, None)
    expected = {"HEIF": r"pillow-heif.*megapix\[heic\]", "JXL": r"pillow-jxl-plugin.*megapix\[jxl\]"}[kind]
    for look in (decode, size_of):
        with pytest.raises(ValueError, match=expected):
            look(data)


def test_sizes_of_jpeg_xl_are_known_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small ones by multiples of 8, ratios, and any; bare and in a container: as the plug-in says."""
    plugins()
    for width, height in ((8, 8), (256, 256), (300, 200), (640, 480), (1, 1), (1000, 3), (33, 700), (512, 1024)):
        data = encoded(Image.new("RGB", (width, height)), "JXL", lossless=True)
        assert jxl.size_of(data) == (width, height)
        boxed = encoded(Image.new("RGB", (width, height)), "JXL", exif=Image.Exif(), use_container=True)
        assert jxl.size_of(boxed) == (width, height)
    for bad in (jxl.CODESTREAM, jxl.CONTAINER, jxl.CONTAINER + b"\0\0\0\0abcd", jxl.CONTAINER + b"\0\0\0\x09jxlcx"):
        with pytest.raises(ValueError, match="a JPEG XL image without"):
            size_of(bad)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="exceeds limit of 1000"):
        decode(data)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF", "JXL"])
def test_bombs_are_refused_by_their_header(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plugins()
    data = encoded(Image.new("RGB", (64, 48)), kind)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 48 - 1)
    for look in (decode, size_of):
        with pytest.raises(ValueError, match="exceeds limit"):
            look(data)


def test_large_texts_and_profiles_of_a_png() -> None:
    """A generator's workflow in it, however large, is left alone; memory for what is looked at is bounded."""
    image, info = Image.fromarray(photo(21, 34)), PngImagePlugin.PngInfo()
    info.add_text("workflow", "node " * 8_000_000, zip=True)
    info.add_text("parameters", "p" * 100_000)
    info.add_itxt("prompt", "x" * 30_000_000, zip=True)
    info.add_itxt("XML:com.adobe.xmp", "x" * 30_000_000, zip=True)
    data = encoded(image, pnginfo=info, icc_profile=bytes(1_500_000))
    limit = PngImagePlugin.MAX_TEXT_CHUNK
    assert np.array_equal(decode(data), np.asarray(image))
    assert size_of(data) == (21, 34)
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK, "nobody else's limit is changed"
    with pytest.raises(ValueError, match="too large"):
        decode(data, version=1)
    plain = encoded(image)
    assert png.tidied(plain) is plain
    tidy = png.tidied(data)
    assert len(tidy) < len(plain) + 4000
    assert re.findall(b"IHDR|IDAT|IEND|iCCP|[tzi][ETX][tX][Xt]t?", tidy) == [b"IHDR", b"iCCP", b"IDAT", b"IEND"]


JPEGS: dict[str, dict[str, Any]] = {
    "4:4:4": {"subsampling": 0},
    "4:2:2": {"subsampling": 1},
    "4:2:0": {"subsampling": 2},
    "4:1:1": {"subsampling": "4:1:1"},
    "progressive": {"progressive": True},
    "optimized": {"optimize": True},
    "stored as RGB": {"keep_rgb": True},
    "restart markers": {"restart_marker_blocks": 3},
    "low quality": {"quality": 3},
    "comment": {"comment": b"x" * 1000},
}


@pytest.mark.parametrize("name", JPEGS)
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_simplejpeg_gives_pillows_pixels(name: str, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd sizes of each kind of JPEG, with and without it."""
    pytest.importorskip("simplejpeg")
    if mode != "RGB" and name in ("4:1:1", "stored as RGB", "4:2:2"):
        pytest.skip("no such JPEG")
    whole = photo(97, 200)
    for height, width in ((97, 131), (1, 1), (8, 16), (17, 33), (3, 200)):
        data = encoded(Image.fromarray(whole[:height, :width]).convert(mode), "JPEG", **{"quality": 90, **JPEGS[name]})
        found = decode(data)
        with Image.open(io.BytesIO(data)) as image:
            assert np.array_equal(np.asarray(image.convert("RGB")), found), (height, width)


def test_another_libjpeg_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A simplejpeg whose pixels differ from Pillow's by one is found out at first use."""
    simplejpeg = pytest.importorskip("simplejpeg")
    data = encoded(Image.fromarray(photo(21, 34)), "JPEG")
    expected = decode(data)
    assert pixels._agrees(simplejpeg)

    class Other:
        def decode_jpeg(self, data: bytes, mode: str) -> np.ndarray:
            found = simplejpeg.decode_jpeg(data, mode).copy()
            found[-1, -1, 2] ^= 1
            return found

    monkeypatch.setattr(pixels, "_simplejpeg", Other().__class__)
    assert np.array_equal(decode(data), expected)
