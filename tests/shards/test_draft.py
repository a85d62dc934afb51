"""Drafts: large JPEG decoded at a reduced scale, beside Pillow's draft and the cover's steps written down again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from benchmarks import photos
from data_prep import cli
from megapix.config import DataConfig
from megapix.data.locate import locate
from megapix.data.read import Decoder, ShardReader
from megapix.errors import InputError
from megapix.shards import pixels
from megapix.shards.image_policy import Policy
from megapix.shards.index import read_index
from tests.support import icc_profiles as profiles

OLD = Path(__file__).parents[1] / "data" / "v0_1"
EXACT, DRAFT = Policy.make("crop", 32), Policy.make("crop", 32, resize="draft")
SCALES = [
    ((500, 400), 4),  # 400, 200, 100 and 50 pixels: of three halvings libjpeg makes two
    ((129, 257), 2),  # 129, 64, 32
    ((127, 300), 1),  # 127, 63: the one halving is the box filter's
    ((509, 511), 4),  # 128 pixels of which 127.25 are the picture's; as they come they would be halved twice more
    ((253, 1021), 2),  # 253, 126, 63
    ((1100, 1041), 8),  # 1041, 520, 260, 130, 65, 32: of five halvings libjpeg makes three
    ((63, 4000), 1),
    ((20, 20), 1),
]
"""(height, width) of a picture -> at which scale it is decoded for 32 × 32 pixels."""


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **({"quality": 90} if kind == "JPEG" else {}), **options)
    return out.getvalue()


def photo(height: int, width: int) -> Image.Image:
    return photos.photo(height, width, seed=height)


def made(policy: Policy, data: bytes) -> np.ndarray:
    return policy.render(data, policy.bucket_of(*policy.size_of(data))).pixels


def expected(data: bytes, scale: int, height: int = 32, width: int = 32) -> np.ndarray:
    """Pillow's draft; what the picture fills of it, in the size of a halved image; then ADM's steps."""
    with Image.open(io.BytesIO(data)) as image:
        wide, high = image.size
        if scale > 1:
            image.draft(None, (wide // scale, high // scale))
            assert image.size == (-(-wide // scale), -(-high // scale))
            fills = (0, 0, wide / scale, high / scale)
            whole = image.resize((wide // scale, high // scale), Image.Resampling.BICUBIC, fills)
        else:
            whole = image.copy()
        whole = ImageOps.exif_transpose(whole).convert("RGB")
    while whole.width >= 2 * width and whole.height >= 2 * height:
        whole = whole.resize((whole.width // 2, whole.height // 2), Image.Resampling.BOX)
    factor = max(height / whole.height, width / whole.width)
    whole = whole.resize((round(whole.width * factor), round(whole.height * factor)), Image.Resampling.BICUBIC)
    left, top = (whole.width - width) // 2, (whole.height - height) // 2
    return np.asarray(whole.crop((left, top, left + width, top + height)))


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(one.astype(float) - other).mean()))


@pytest.mark.parametrize(("size", "scale"), SCALES)
@pytest.mark.parametrize("kind", ["4:2:0", "4:4:4", "progressive", "grey"])
def test_a_draft_is_pillows_and_then_covers_as_ever(size: tuple[int, int], scale: int, kind: str) -> None:
    picture = photo(*size).convert("L" if kind == "grey" else "RGB")
    data = encoded(picture, **{"4:4:4": {"subsampling": 0}, "progressive": {"progressive": True}}.get(kind, {}))
    draft, exact = made(DRAFT, data), made(EXACT, data)
    assert np.array_equal(draft, expected(data, scale))
    assert np.array_equal(draft, exact) == (scale == 1)
    assert DRAFT.render(data, 0).size == size


@pytest.mark.parametrize("orientation", range(1, 9))
def test_turned_drafts(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(photo(509, 701), exif=exif)
    found = DRAFT.render(data, 0)
    assert np.array_equal(found.pixels, expected(data, 4))
    assert found.size == ((701, 509) if orientation > 4 else (509, 701))
    buckets = Policy.make("buckets", 32, 8, resize="draft")
    high, wide = bucket = buckets.buckets[buckets.bucket_of(*found.size)]
    assert bucket == ((40, 24) if orientation > 4 else (24, 40))
    assert np.array_equal(made(buckets, data), expected(data, 8, high, wide))


@pytest.mark.parametrize("size", [size for size, scale in SCALES if scale > 1])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_draft_lies_where_the_exact_image_does(size: tuple[int, int], axis: int) -> None:
    """A ramp and its reverse, of 8 levels a pixel: they differ by a shift in opposite ways, by rounding in the same."""
    ramp = (np.mgrid[: size[0], : size[1]][axis] + 0.5) * 255 / size[axis]
    apart = []
    for values in (ramp, 255 - ramp):
        data = encoded(Image.fromarray(values.round().astype(np.uint8)))
        apart.append(made(DRAFT, data).astype(float) - made(EXACT, data))
    shift = ((apart[0] - apart[1]) / 2 / 8)[1:-1, 1:-1]
    assert abs(shift.mean()) < 0.04
    assert np.abs(shift).max() < 0.2


@pytest.mark.parametrize(("size", "least"), [((1024, 1360), 43), ((1021, 1363), 41), ((1023, 1365), 36)])
def test_how_near_drafts_are_to_the_exact_mode(size: tuple[int, int], least: float) -> None:
    data = encoded(photo(*size))
    for side in (32, 64, 128):
        exact, draft = (made(Policy.make("crop", side, resize=way), data) for way in ("exact", "draft"))
        assert least <= psnr(exact, draft) < 60, "they are two ways"


def test_what_is_no_plain_jpeg_is_as_it_was() -> None:
    picture = photo(300, 420)
    for data in (
        encoded(picture.convert("CMYK")),
        encoded(picture, "PNG"),
        encoded(picture.convert("RGBA"), "PNG"),
        encoded(picture, "WEBP"),
        encoded(picture, "TIFF"),
        encoded(picture, "MPO", save_all=True, append_images=[picture]),
    ):
        assert np.array_equal(made(DRAFT, data), made(EXACT, data))


def test_colors_of_a_draft_are_converted() -> None:
    data = encoded(photo(500, 400), icc_profile=profiles.rgb_profile("adobe rgb"))
    found = DRAFT.render(data, 0)
    assert found.notes == ("icc converted",)
    left = made(Policy.make("crop", 32, resize="draft", icc="ignore"), data)
    assert np.array_equal(left, expected(data, 4))
    assert psnr(found.pixels, made(EXACT, data)) > 45 > psnr(found.pixels, left)


def test_sizes_are_those_of_the_whole_image() -> None:
    """At 1/4 it has 125 x 100 pixels; nothing is refused, or counted, for that."""
    data = encoded(photo(500, 400))
    assert Policy.make("crop", 32, resize="draft", min_side=400).render(data, 0).notes == ()
    with pytest.raises(ValueError, match="400x500 pixels, --min-side is 401"):
        Policy.make("crop", 32, resize="draft", min_side=401).render(data, 0)
    assert DRAFT.render(encoded(photo(31, 400)), 0).notes == ("upscaled",)


def test_damaged_jpeg_is_refused() -> None:
    data = encoded(photo(500, 400))
    for damaged in (data[: len(data) // 2], data[:100], data[:-200]):
        with pytest.raises(ValueError, match=r"."):
            DRAFT.render(damaged, 0)


def test_policies_without_drafts_are_stored_as_before() -> None:
    stored = (
        '{"mode": "crop", "size": 32, "fast": %s, "background": [255, 255, 255], "min_side": 1, '
        '"buckets": [[32, 32]], "version": 2}'
    )
    for resize, fast in (("exact", "false"), ("fast", "true")):
        policy = Policy.make("crop", 32, resize=resize)
        assert json.dumps(policy.to_dict()) == stored % fast
        assert Policy.from_dict(json.loads(stored % fast)) == policy
    found = [read_index(path.parent).image_policy for path in sorted(OLD.glob("*/index.json"))]
    assert len(found) == 5
    for old in found:
        assert old.items() >= Policy.from_dict(old).to_dict().items()
        assert Policy.from_dict(old).resize == "exact"


def test_older_releases_refuse_drafts() -> None:
    """They read versions 1 and 2, and know nothing of the key."""
    stored = DRAFT.to_dict()
    assert Policy.from_dict(json.loads(json.dumps(stored))) == DRAFT
    assert stored == EXACT.to_dict() | {"version": pixels.VERSION + 1, "draft": True}
    for wrong, message in (
        ({"version": 4}, "has version 4, this release reads 1 to 3"),
        ({"version": 2}, "damaged: version 2 with draft True"),
        ({"draft": False}, "damaged: version 3 with draft False"),
        ({"mode": "untouched", "buckets": []}, "damaged: mode 'untouched' with draft True"),
    ):
        with pytest.raises(InputError, match=message):
            Policy.from_dict(stored | wrong)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def test_preparation_and_the_loader_draft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Shards that `write` makes, and an index over JPEG of which the loader makes the same images."""
    images = [encoded(photo(500, 400)), encoded(photo(509, 511)), encoded(photo(40, 36))]
    for number, data in enumerate(images):
        path = tmp_path / "in" / "one" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    expected_of = {expected(data, scale).tobytes() for data, scale in zip(images, (4, 4, 1), strict=True)}
    draft, folders = ("--size", 32, "--resize", "draft", "--workers", 1), {}
    for name in ("whole", "written", "index", "exact"):
        folders[name] = tmp_path / name
    assert run("write", tmp_path / "in", folders["whole"], "--policy", "untouched", "--format", "original") == 0
    assert run("write", tmp_path / "in", folders["written"], *draft) == 0
    assert run("index", folders["whole"], "--out", folders["index"], *draft) == 0
    assert run("index", folders["whole"], "--out", folders["exact"], "--size", 32, "--workers", 1) == 0
    for name in ("written", "index"):
        config = DataConfig(path=str(folders[name]), image_size=32)
        located = locate(config)
        assert (located.index.image_policy["version"], located.index.image_policy["draft"]) == (3, True)
        reader, decoder = ShardReader(located, config), Decoder(located.index)
        samples = [reader.read(sample) for sample in range(3)]
        assert {decoder(one.data, one.bucket).transpose(1, 2, 0).tobytes() for one in samples} == expected_of
        assert run("verify", folders[name], "--workers", 1) == 0
        capsys.readouterr()
        assert run("inspect", folders[name]) == 0
        assert "  policy       crop, draft, applied at" in capsys.readouterr().out
    assert json.loads((folders["written"] / "plan.json").read_text())["resize"] == "draft"
    assert run("merge", folders["exact"], folders["index"], "--out", tmp_path / "both") == 2
    assert "made with draft = False, those of" in capsys.readouterr().err
    assert run("write", tmp_path / "in", tmp_path / "no", "--policy", "untouched", "--resize", "draft") == 2
    error = capsys.readouterr().err
    assert error == "data_prep: error: --resize draft has no meaning with --policy untouched\n"
