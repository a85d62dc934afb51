"""Sizes of images are found from their beginnings, where those decide about them."""

from __future__ import annotations

import io
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.fuzz_images import mutated
from data_prep.listing.base import HEAD, header_of
from data_prep.sources import open_source
from data_prep.writing.receipt import RECEIPTS
from data_prep.writing.survey import buckets_of
from megapix.shards.decoding.heads import decides
from megapix.shards.image_policy import Policy
from megapix.shards.pixels import size_of
from tests.data_prep.test_sources import add
from tests.shards.test_images import encoded

POLICY = Policy.make("buckets", 32, step=8)


def noise(high: int, wide: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (high, wide, 3), np.uint8))


def read_bytes() -> int:
    """Bytes that this process has read so far, whatever from."""
    return int(Path("/proc/self/io").read_text().split()[1])


def large() -> dict[str, bytes]:
    """Encoded images above 600 KB, what turns them in different places; each is wider than high, and shown upright."""
    turned = Image.Exif()
    turned[0x0112] = 6
    picture, profile = noise(600, 900), bytes(70_000)
    png = encoded(picture)
    chunk = b"eXIf" + turned.tobytes()[6:]
    late = len(chunk[4:]).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    return {
        "plain.jpg": encoded(picture, "JPEG", quality=95),
        "exif.jpg": encoded(picture, "JPEG", quality=95, exif=turned),
        "long.jpg": encoded(picture, "JPEG", quality=95, exif=turned, icc_profile=profile * 2),
        "progressive.jpg": encoded(picture, "JPEG", quality=95, progressive=True, exif=turned),
        "late.png": png[:-12] + late + png[-12:],
        "flat.png": png,
    }


@pytest.mark.parametrize("packed", [False, True])
def test_buckets_are_those_of_the_whole_files(packed: bool, tmp_path: Path) -> None:
    images = large()
    for name, data in images.items():
        assert len(data) > 4 * HEAD
        path = tmp_path / "in" / "things" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if packed:
        with tarfile.open(tmp_path / "0.tar", "w") as tar:
            for name, data in images.items():
                add(tar, name, data)
                add(tar, f"{name.partition('.')[0]}.txt", b"a thing")
    source = open_source(tmp_path / ("0.tar" if packed else "in"))
    (tmp_path / RECEIPTS).mkdir()
    whole_of = {name.partition(".")[0]: data for name, data in images.items()}
    before = read_bytes()
    heads = {Path(item.name).stem: header_of(source.reader, item, 32) for item in source.items}
    read, wholly = read_bytes() - before, sum(len(whole_of[name]) for name in ("long", "late", "flat"))
    assert len(images) * HEAD + wholly <= read < len(images) * HEAD + wholly + 10_000
    for name, head in heads.items():
        whole = whole_of[name]
        assert size_of(head) == size_of(whole) == ((600, 900) if name in ("plain", "flat") else (900, 600))
        assert len(head) == (HEAD if name in ("plain", "exif", "progressive") else len(whole)), name
    found = buckets_of(source.reader, source.items, tmp_path, POLICY, 1, progress=False)
    wide, tall = POLICY.bucket_of(600, 900), POLICY.bucket_of(900, 600)
    assert {*found} == {wide, tall}
    for item, bucket in zip(source.items, found, strict=True):
        assert bucket == (wide if "plain" in item.name or "flat" in item.name else tall)


def size(data: bytes) -> tuple[int, int] | None:
    try:
        return size_of(data)
    except ValueError:
        return None


def test_a_beginning_that_decides_says_what_the_whole_file_says() -> None:
    """Of damaged files, cut anywhere; and hardly any needs to be read whole."""
    decided = 0
    for number in range(400):
        data = mutated("jpg", number, 5)
        for cut in (len(data) // 7, len(data) // 2, len(data) - 1):
            if decides(data[:cut]):
                decided += 1
                assert size(data[:cut]) == size(data), (number, cut)
    assert decided > 400


def test_further_pictures_and_other_kinds_are_read_whole() -> None:
    out = io.BytesIO()
    noise(40, 40).save(out, "MPO", save_all=True, append_images=[noise(40, 40)])
    assert not decides(out.getvalue())
    for kind in ("PNG", "WEBP", "GIF"):
        assert not decides(encoded(noise(40, 40), kind))
    plain = encoded(noise(40, 40), "JPEG")
    scan = plain.index(b"\xff\xda")
    length = int.from_bytes(plain[scan + 2 : scan + 4], "big")
    assert [decides(plain[:cut]) for cut in (0, 1, scan, scan + 1 + length, scan + 2 + length)] == [False] * 4 + [True]
