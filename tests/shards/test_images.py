"""The image policy: ADM's crop step by step, fast mode, buckets, every kind of image, PNG."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from benchmarks import photos
from data_prep.writing.encode import encode
from megapix.errors import InputError
from megapix.shards import image_policy, pixels
from megapix.shards.image_policy import Policy, bucket_sizes
from megapix.shards.pixels import _plain_jpeg, cover, decode, decode_exactly, kind_of, size_of


def test_the_crop_is_central() -> None:
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 4:12] = 200
    assert (cover(wide, 8, 8) == 200).all()
    tall = wide.transpose(1, 0, 2).copy()
    assert (cover(tall, 8, 8) == 200).all()


def test_large_images_are_halved_with_a_box_filter_first() -> None:
    # Four 2x2 blocks of four values each: halving twice averages 4x4 pixels exactly, with no bicubic step left.
    values = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    image = Image.fromarray(np.repeat(values[..., None], 3, 2))
    halved = values.reshape(4, 2, 4, 2).mean((1, 3))
    expected = np.floor(np.floor(halved + 0.5).reshape(2, 2, 2, 2).mean((1, 3)) + 0.5)
    assert cover(np.asarray(image), 2, 2)[..., 0].tolist() == expected.tolist()


def test_the_policy_against_pillow_step_by_step() -> None:
    generator = np.random.default_rng(0)
    image = Image.fromarray(generator.integers(0, 256, (75, 131, 3), dtype=np.uint8))
    expected = image.resize((65, 37), Image.Resampling.BOX)  # 37 < 2·20 ends the halving
    expected = expected.resize((round(65 * 20 / 37), 20), Image.Resampling.BICUBIC).crop((7, 0, 27, 20))
    assert np.array_equal(cover(np.asarray(image), 20, 20), np.asarray(expected))


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def colour(data: bytes) -> tuple[int, ...]:
    pixels = decode(data)
    assert (pixels.dtype, pixels.shape[2]) == (np.uint8, 3)
    return tuple(pixels[0, 0].tolist())


def test_every_mode_comes_out_as_rgb() -> None:
    size = (4, 4)
    assert colour(encoded(Image.new("RGB", size, (10, 20, 30)))) == (10, 20, 30)
    assert colour(encoded(Image.new("L", size, 77))) == (77, 77, 77)
    assert colour(encoded(Image.new("1", size, 1))) == (255, 255, 255)
    assert colour(encoded(Image.new("RGBA", size, (255, 0, 0, 0)))) == (255, 255, 255), "transparent is white"
    assert colour(encoded(Image.new("RGBA", size, (0, 0, 0, 51)))) == (204, 204, 204), "a fifth black on white"
    assert colour(encoded(Image.new("LA", size, (0, 51)))) == (204, 204, 204)
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    assert colour(encoded(palette)) == (9, 8, 7)
    assert colour(encoded(palette, transparency=1)) == (255, 255, 255), "a transparent palette entry"
    grey16 = Image.fromarray(np.full(size, 128 * 257, np.uint16))
    assert colour(encoded(grey16)) == (128, 128, 128), "16 bits are scaled, not clipped"
    assert colour(encoded(Image.new("LA", size, (0, 0)))) == (255, 255, 255)
    green = decode(encoded(Image.new("RGBA", size, (255, 0, 0, 0))), background=(0, 200, 0))
    assert green[0, 0].tolist() == [0, 200, 0], "the stated colour"
    cmyk = colour(encoded(Image.new("CMYK", size, (0, 255, 255, 0)), "JPEG", quality=100))
    assert np.abs(np.array(cmyk) - (255, 0, 0)).max() <= 2


def test_exif_orientation_is_applied() -> None:
    pixels = np.zeros((2, 4, 3), np.uint8)
    pixels[:, 0] = 250  # a bright left column
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated clockwise by 90 degrees
    image = decode(encoded(Image.fromarray(pixels), exif=exif))
    assert image.shape == (4, 2, 3)
    assert (image[0] == 250).all()
    assert not image[1:].any()


def test_unusable_images_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    good = encoded(Image.effect_noise((64, 64), 50), "JPEG")
    exif = Image.Exif()
    exif[0x0112] = 6
    broken_exif = encoded(Image.new("RGB", (4, 4)), "WEBP", exif=exif).replace(b"MM\x00*", b"XX\x00*")
    animated = encoded(
        Image.new("RGB", (4, 4), (9, 0, 0)),
        "WEBP",
        save_all=True,
        lossless=True,
        append_images=[Image.new("RGB", (4, 4), (0, 9, 0))],
    )
    assert colour(animated) == (9, 0, 0), "the first frame"
    for bad in (b"", b"not an image", good[:200], encoded(Image.new("L", (4, 4)), "PPM"), broken_exif):
        with pytest.raises(ValueError, match=r"."):
            decode(bad)
    with pytest.raises(ValueError, match=r"256000000x256 pixels it exceeds the limit"):
        cover(np.asarray(Image.new("RGB", (1_000_000, 1))), 256, 256)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="exceeds limit"):
        decode(good)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """The benchmarks' picture with a photograph's spectrum: uint8 [H, W, 3]."""
    return np.asarray(photos.photo(height, width, seed))


@pytest.mark.parametrize(
    "size", [(375, 500), (500, 333), (256, 256), (300, 290), (1200, 1600), (1201, 1601), (120, 90)]
)
def test_fast_mode_is_within_50_db_of_the_exact_one(size: tuple[int, int]) -> None:
    picture = photo(*size)
    exact, fast = (cover(picture, 256, 256, fast).astype(np.float64) for fast in (False, True))
    error = np.square(exact - fast).mean()
    assert error == 0 or 10 * np.log10(255**2 / error) >= 50
    assert size == (256, 256) or error > 0, "they are two ways"


def test_whatever_a_decoder_raises_is_a_value_error() -> None:
    """EXIF data of which Pillow's parser makes a struct.error and a TypeError, and a broken PNG chunk.

    Pillow fails where it writes such EXIF data again, which version 2 of decoding does not ask for.
    """
    start, middle = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01", b"\0\x02\0\0\0\x15\0\0\0&\x01\x12\0\x03\0\0\0\x01\0\x06"
    for tag, rest in ((b")", b"xxxxxxxxxxxxx\xe9xxx\x02xx\0\0"), (b"\x1a", b"xx\0xxxxxxxxxxxxxxxx\x8d\0\0")):
        exif = start + tag + middle + b"\0\0\0\0\0\0" + rest
        with pytest.raises(ValueError, match=r"."):
            decode(encoded(Image.new("RGB", (4, 4)), "JPEG", exif=exif), version=1)
        assert decode(encoded(Image.new("RGB", (4, 4)), "JPEG", exif=exif)).shape == (4, 4, 3)
    broken = encoded(Image.new("RGB", (4, 4))).replace(b"IHDR", b"IHDX")
    for look in (decode, size_of):
        with pytest.raises(ValueError, match=r"header cannot be read|broken PNG"):
            look(broken)


def test_turned_images_are_refused_where_prepared_ones_are_expected() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(Image.new("RGB", (8, 4)), "JPEG", exif=exif)
    with pytest.raises(ValueError, match=r"to be turned to 4x8 pixels \(EXIF\)"):
        decode_exactly(data, 4, 8)


def test_transparent_16_bit_grey() -> None:
    values = np.full((4, 4), 128 * 257, np.uint16)
    values[0, 0] = 7
    data = encoded(Image.fromarray(values), transparency=7)
    assert decode(data, (0, 200, 0))[0].tolist() == [[0, 200, 0]] + [[128] * 3] * 3


@pytest.mark.parametrize("kind", ["RGB", "L", "progressive", "4:4:4"])
def test_simplejpeg_and_pillow_decode_the_same(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(photo(97, 131))
    image = image.convert("L") if kind == "L" else image
    options = {"progressive": {"progressive": True}, "4:4:4": {"subsampling": 0}}.get(kind, {})
    data = encoded(image, "JPEG", quality=90, **options)
    pytest.importorskip("simplejpeg")
    assert _plain_jpeg(data) is not None
    through_simplejpeg = decode(data)
    monkeypatch.setattr(pixels, "_simplejpeg", lambda: None)
    assert np.array_equal(decode(data), through_simplejpeg)
    with Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(np.asarray(opened.convert("RGB")), through_simplejpeg)


def test_bucket_sizes() -> None:
    found = bucket_sizes(512, 64, 2.0)
    assert found == ((704, 384), (640, 384), (576, 448), (512, 512), (448, 576), (384, 640), (384, 704))
    for height, width in found:
        assert (height % 64, width % 64) == (0, 0)
        assert 0.9 < height * width / 512**2 < 1.1
        assert max(height / width, width / height) <= 2
    assert bucket_sizes(64, 8, 1.0) == ((64, 64),)
    for step, ratio, message in ((48, 2.0, "--bucket-step = 48"), (8, 0.5, "--bucket-ratio = 0.5")):
        with pytest.raises(InputError, match=message):
            bucket_sizes(512, step, ratio)


def test_the_step_of_buckets_is_64_pixels_at_most_where_that_divides() -> None:
    """By hand at 1024: the shorter side is the multiple of 64 that is nearest to 1024 * 1024 / the longer one.

    For 1088 that is 963.8, 15.06 steps, so 960; then 14.22, 13.47, 12.80, 12.19 and 11.64 steps for 1152, 1216, 1280,
    1344 and 1408; for 1472 11.13 steps, but 1472 / 704 is above 2.
    """
    wide = [(960, 1088), (896, 1152), (832, 1216), (832, 1280), (768, 1344), (768, 1408)]
    tall = [(width, height) for height, width in reversed(wide)]
    assert Policy.make("buckets", 1024).buckets == (*tall, (1024, 1024), *wide)
    wide = [(448, 576), (384, 640), (384, 704)]
    tall = [(width, height) for height, width in reversed(wide)]
    assert Policy.make("buckets", 512).buckets == (*tall, (512, 512), *wide)
    for size, worst in ((512, 0.0625), (1024, 0.0353)):
        for height, width in Policy.make("buckets", size).buckets:
            assert (height % 16, width % 16) == (0, 0)
            assert abs(height * width / size**2 - 1) <= worst
    for size, step in ((64, 8), (256, 32), (512, 64), (600, 75), (768, 64), (1000, 125), (2048, 64), (7, 1)):
        assert image_policy.default_step(size) == step
        if size % step == 0:
            assert Policy.make("buckets", size) == Policy.make("buckets", size, step)


def test_every_image_goes_to_the_bucket_nearest_in_aspect() -> None:
    policy = Policy.make("buckets", 64, 16)
    assert policy.buckets == ((96, 48), (80, 48), (64, 64), (48, 80), (48, 96))
    chosen = {size: policy.buckets[policy.bucket_of(*size)] for size in ((10, 10), (300, 100), (100, 180), (99, 100))}
    assert chosen == {(10, 10): (64, 64), (300, 100): (96, 48), (100, 180): (48, 80), (99, 100): (64, 64)}
    for height, width in ((100, 180), (1000, 30), (64, 64), (65, 64), (50, 49)):
        bucket = policy.bucket_of(height, width)
        out = policy.apply(np.full((height, width, 3), 77, np.uint8), bucket)
        assert out.shape == (*policy.buckets[bucket], 3)
        assert (out == 77).all()


def test_a_bucket_is_covered_and_cut_evenly() -> None:
    """100 x 220 into 48 x 96: halved to 50 x 110, scaled to 48 x 106, and five columns cut from either side."""
    picture = photo(100, 220)
    halved = Image.fromarray(picture).resize((110, 50), Image.Resampling.BOX)
    expected = halved.resize((round(110 * 0.96), 48), Image.Resampling.BICUBIC).crop((5, 0, 101, 48))
    assert np.array_equal(cover(picture, 48, 96), np.asarray(expected))


def test_sizes_are_read_from_headers_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    assert size_of(encoded(Image.new("RGB", (7, 5)), "PNG")) == (5, 7)
    assert size_of(encoded(Image.new("RGB", (7, 5)), "JPEG", exif=exif)) == (7, 5)
    assert decode(encoded(Image.new("RGB", (7, 5)), "JPEG", exif=exif)).shape == (7, 5, 3)
    with pytest.raises(ValueError, match="not an image of a kind that is read"):
        size_of(b"P6 1 1 255 abc")


def test_the_size_is_compared_before_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(Image.new("RGB", (64, 64)))
    monkeypatch.setattr(pixels, "decode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="image is 64x64 pixels, expected 16x16"):
        decode_exactly(data, 16, 16)


def test_encoding() -> None:
    for picture in (photo(37, 53), np.full((5, 3, 3), 250, np.uint8), photo(1, 90), photo(2, 300), photo(90, 1)):
        for kind, name in (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP")):
            data = encode(picture, kind, 95)
            assert (kind_of(data), data) == (kind, encode(picture, kind, 95))
            with Image.open(io.BytesIO(data)) as image:
                image.load()  # Pillow checks the PNG's checksums
                assert (image.format, image.mode, image.size) == (name, "RGB", picture.shape[1::-1])
                if kind == "png":
                    assert np.array_equal(np.asarray(image), picture)
    assert len(encode(photo(256, 256), "png", 95)) < 1.02 * len(encoded(Image.fromarray(photo(256, 256))))
    assert kind_of(b"P6 1 1 255 abc") is None
