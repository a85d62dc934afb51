"""Embedded ICC profiles: colors against the published matrices, what is left bit for bit, and what is counted."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from data_prep import cli
from megapix.shards.image_policy import Policy, decode_indexed
from megapix.shards.index import read_index
from megapix.shards.pixels import decode, read, size_of
from tests.shards.test_images import encoded
from tests.support import icc_profiles as profiles

SPACES = ("display p3", "adobe rgb", "prophoto")
LOSSLESS = {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}


def colors() -> np.ndarray:
    """uint8 [16, 32, 3]: saturated and dark ones, greys, and any."""
    generator = np.random.default_rng(3)
    picture = generator.integers(0, 256, (16, 32, 3), dtype=np.uint8)
    picture[0] = np.linspace(0, 255, 32).astype(np.uint8)[:, None]
    picture[1, :6] = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (234, 51, 35)]
    return picture


@pytest.mark.parametrize("kind", LOSSLESS)
@pytest.mark.parametrize("name", SPACES)
def test_wide_gamut_becomes_srgb(name: str, kind: str) -> None:
    picture = colors()
    data = encoded(Image.fromarray(picture), kind, icc_profile=profiles.rgb_profile(name), **LOSSLESS[kind])
    found, _, notes = read(data)
    expected = profiles.in_srgb(picture, name)
    assert np.abs(found - expected).max() <= 3
    assert np.abs(picture - expected).max() > 20, "they are other numbers"
    assert notes == ("icc converted",)
    assert np.array_equal(read(data, convert=False).pixels, picture)
    assert read(data, convert=False).notes == ()
    assert size_of(data) == (16, 32)


def test_known_colors() -> None:
    """sRGB's red is (234, 51, 35) in Display P3; its own red, which sRGB does not have, becomes the reddest."""
    picture = np.array([[(234, 51, 35), (255, 0, 0), (128, 128, 128), (255, 255, 255)]], np.uint8)
    found = decode(encoded(Image.fromarray(picture), icc_profile=profiles.rgb_profile("display p3")))[0].astype(int)
    expected = [(255, 0, 0), (255, 0, 0), (128, 128, 128), (255, 255, 255)]
    assert np.abs(found - expected).max() <= 2


@pytest.mark.parametrize("kind", ["JPEG", "AVIF"])
def test_formats_that_lose_something(kind: str) -> None:
    picture = np.full((32, 32, 3), (40, 200, 90), np.uint8)
    data = encoded(Image.fromarray(picture), kind, quality=100, icc_profile=profiles.rgb_profile("adobe rgb"))
    found, _, notes = read(data)
    assert np.abs(found - profiles.in_srgb(picture, "adobe rgb")).max() <= 4
    assert notes == ("icc converted",)


@pytest.mark.parametrize("mode", ["L", "LA", "I;16", "1"])
def test_grey(mode: str) -> None:
    ramp = np.tile(np.arange(0, 256, 3, dtype=np.uint8), (4, 1))
    ramp = np.where(ramp > 127, 255, 0).astype(np.uint8) if mode == "1" else ramp
    image = Image.fromarray(ramp.astype(np.uint16) * 257) if mode == "I;16" else Image.fromarray(ramp).convert(mode)
    found, _, notes = read(encoded(image, icc_profile=profiles.grey_profile(1.0)))
    assert np.abs(found - profiles.grey_in_srgb(ramp, 1.0)[..., None]).max() <= 1
    assert notes == ("icc converted",)
    # Many grey JPEGs have the profile of a color image: three equal channels.
    found = read(encoded(Image.fromarray(ramp), icc_profile=profiles.rgb_profile("prophoto"))).pixels
    assert np.abs(found - profiles.in_srgb(np.repeat(ramp[..., None], 3, 2), "prophoto")).max() <= 2


def test_print() -> None:
    """Full inks, whose Lab values the profile gives; a TIFF keeps them exactly, a JPEG (Adobe's, inverted) nearly."""
    inks = np.array([list(profiles.INKS)], np.uint8) * 255
    expected = profiles.lab_in_srgb(np.array([list(profiles.INKS.values())], float))
    profile = profiles.cmyk_profile()
    found, _, notes = read(encoded(Image.fromarray(inks, "CMYK"), "TIFF", icc_profile=profile))
    assert np.abs(found - expected).max() <= 3
    assert notes == ("icc converted",)
    large = Image.fromarray(np.repeat(np.repeat(inks, 16, 0), 16, 1), "CMYK")
    found = decode(encoded(large, "JPEG", quality=100, icc_profile=profile))
    assert np.abs(found[8:9, 8::16] - expected).max() <= 6


def test_transparency_is_composited_in_srgb() -> None:
    picture = colors()
    rgba = np.dstack([picture, np.full(picture.shape[:2], 51, np.uint8)])
    rgba[0, 0, 3] = 0
    data = encoded(Image.fromarray(rgba), icc_profile=profiles.rgb_profile("adobe rgb"))
    expected = 0.2 * profiles.in_srgb(picture, "adobe rgb") + 0.8 * np.array((0, 200, 0))
    expected[0, 0] = (0, 200, 0)
    assert np.abs(decode(data, (0, 200, 0)) - expected).max() <= 2
    palette = Image.fromarray(picture).quantize(8)
    plain = np.asarray(palette.convert("RGB"))
    data = encoded(palette, icc_profile=profiles.rgb_profile("prophoto"), transparency=0)
    clear = np.asarray(palette) == 0
    found = decode(data, (1, 2, 3))
    assert (found[clear] == (1, 2, 3)).all()
    assert np.abs(found - profiles.in_srgb(plain, "prophoto"))[~clear].max() <= 2


def test_srgb_itself_is_left_bit_for_bit() -> None:
    """Whatever it is called: by what it does to colors."""
    picture = colors()
    own = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (own, profiles.rgb_profile("srgb"), profiles.rgb_profile("srgb", "my monitor")):
        found, _, notes = read(encoded(Image.fromarray(picture), icc_profile=profile))
        assert np.array_equal(found, picture)
        assert notes == ()
        jpeg = encoded(Image.fromarray(picture), "JPEG", icc_profile=profile)
        assert np.array_equal(decode(jpeg), decode(encoded(Image.fromarray(picture), "JPEG")))
    lying = read(encoded(Image.fromarray(picture), icc_profile=profiles.rgb_profile("adobe rgb", "sRGB IEC61966-2.1")))
    assert lying.notes == ("icc converted",)


def test_profiles_that_cannot_be_used() -> None:
    """Nonsense, cut short, of another color space, of a device link: the colors stay, and it is counted."""
    picture, good = colors(), profiles.rgb_profile("adobe rgb")
    link = good[:12] + b"link" + good[16:]
    for profile in (b"\0" * 1000, good[:200], b"x", profiles.cmyk_profile(), profiles.grey_profile(1.0), link):
        found, _, notes = read(encoded(Image.fromarray(picture), icc_profile=profile))
        assert np.array_equal(found, picture)
        assert notes == ("icc unusable",)
    found, _, notes = read(encoded(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "TIFF", icc_profile=good))
    assert (found[0, 0].tolist(), notes) == ([255, 0, 0], ("icc unusable",))
    noise = np.random.default_rng(0).bytes(20 << 20)  # larger than any profile: it is not even unpacked
    assert read(encoded(Image.fromarray(picture), icc_profile=bytes(20 << 20))).notes == ("icc unusable",)
    assert np.array_equal(decode(encoded(Image.fromarray(picture), icc_profile=noise)), picture)


def test_an_index_says_what_it_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Converted, ignored, and as it was before: what is written and what is counted."""
    folder = tmp_path / "in" / "a"
    folder.mkdir(parents=True)
    picture = Image.new("RGB", (16, 16), (40, 200, 90))
    picture.save(folder / "plain.png")
    picture.save(folder / "wide.png", icc_profile=profiles.rgb_profile("adobe rgb"))
    picture.save(folder / "broken.png", icc_profile=b"nonsense")
    picture.resize((8, 16)).save(folder / "small.png")

    def run(*arguments: object) -> None:
        assert cli.main([str(argument) for argument in arguments]) == 0

    write = ("write", tmp_path / "in", tmp_path / "out", "--size", 16, "--workers", 1)
    run(*write)
    said = capsys.readouterr().out
    for line in (
        "1 of 4 images are smaller than 16 pixels and were upscaled",
        "1 images were converted to sRGB by their ICC profiles",
        "1 images have an ICC profile that cannot be used: their colors are as they are stored",
    ):
        assert f"data_prep: {line}\n" in said
        run("inspect", tmp_path / "out")
        assert f" {line}\n" in capsys.readouterr().out
    account = json.loads((tmp_path / "out" / "entries.json").read_text())
    assert account["notes"] == {"icc converted": 1, "icc unusable": 1, "upscaled": 1}
    assert account["listed"] == account["used"] == 4, "they are no fates"
    policy = read_index(tmp_path / "out").image_policy
    assert (policy["version"], "icc" in policy) == (2, False)
    assert cli.main([*map(str, write), "--icc", "ignore"]) == 2
    assert "was begun with icc = None, this command has 'ignore'" in capsys.readouterr().err
    run("write", tmp_path / "in", tmp_path / "left", "--size", 16, "--workers", 1, "--icc", "ignore")
    assert read_index(tmp_path / "left").image_policy["icc"] == "ignore"
    assert "converted" not in capsys.readouterr().out


def test_an_index_without_a_version_decodes_as_before() -> None:
    new = Policy.make("crop", 16)
    old = Policy.from_dict({key: value for key, value in new.to_dict().items() if key != "version"})
    assert (new.version, old.version) == (2, 1)
    assert "version" not in old.to_dict(), "so its digest is what it was"
    picture = colors()[:16, :16]
    data = encoded(Image.fromarray(picture), icc_profile=profiles.rgb_profile("adobe rgb"))
    assert np.array_equal(decode_indexed(data, old, 0, prepared=False), picture)
    assert not np.array_equal(decode_indexed(data, new, 0, prepared=False), picture)
    with pytest.raises(ValueError, match="not a PNG, JPEG or WebP image"):
        decode_indexed(encoded(Image.fromarray(picture), "GIF"), old, 0, prepared=False)
    with Image.open(io.BytesIO(data)) as image:
        assert image.info["icc_profile"], "it was there"
