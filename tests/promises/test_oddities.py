"""A planted folder with every odd image there is: each comes out right, or is refused with the right reason."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import cli
from megapix.shards.index import read_index
from tests.data_prep.test_write import hashes
from tests.shards.test_images import encoded, photo
from tests.support.launch import start, succeed
from tests.support.programs import needs
from tests.support.small_run import arguments, scalars


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def plant(folder: Path) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Write the images; return the colour that each good one must have, and words of the reason for each bad one."""
    size = (20, 24)
    sideways = Image.Exif()
    sideways[0x0112] = 6
    two = np.zeros((24, 20, 3), np.uint8)
    two[:, 10:] = 200  # turned by 90 degrees the bright half is below, and the crop's first pixel dark
    palette = Image.new("P", size, 1)
    palette.putpalette([0, 0, 0, 9, 8, 7])
    frames = {"save_all": True, "append_images": [Image.new("RGB", size, (1, 2, 3))]}
    good_files: dict[str, tuple[bytes, tuple[int, ...]]] = {
        "plain.png": (encoded(Image.new("RGB", size, (10, 20, 30))), (10, 20, 30)),
        "UPPER.PNG": (encoded(Image.new("RGB", size, (10, 20, 31))), (10, 20, 31)),
        "exif.jpg": (encoded(Image.fromarray(two), "JPEG", exif=sideways, quality=100), (0, 0, 0)),
        "cmyk.jpeg": (encoded(Image.new("CMYK", size, (0, 255, 255, 0)), "JPEG", quality=100), (254, 0, 0)),
        "grey.jpg": (encoded(Image.new("L", size, 77), "JPEG", quality=100), (77, 77, 77)),
        "palette.png": (encoded(palette), (9, 8, 7)),
        "clear-palette.png": (encoded(palette, transparency=1), (0, 128, 0)),
        "clear.png": (encoded(Image.new("RGBA", size, (255, 0, 0, 0))), (0, 128, 0)),
        "half.png": (encoded(Image.new("LA", size, (0, 51))), (0, 102, 0)),
        "grey16.png": (encoded(Image.fromarray(np.full(size[::-1], 128 * 257, np.uint16))), (128, 128, 128)),
        "animated.webp": (
            encoded(Image.new("RGB", size, (40, 80, 160)), "WEBP", lossless=True, **frames),
            (40, 80, 160),
        ),
        "animated.png": (encoded(Image.new("RGB", size, (7, 7, 9)), "PNG", **frames), (7, 7, 9)),
        "bits.png": (encoded(Image.new("1", size, 1)), (255, 255, 255)),
        "jpeg-called.png": (encoded(Image.new("RGB", size, (50, 50, 50)), "JPEG", quality=100), (50, 50, 50)),
        "gif-called.png": (encoded(Image.new("L", size, 9), "GIF"), (9, 9, 9)),
    }
    jpeg = encoded(Image.fromarray(photo(40, 40)), "JPEG")
    bad_files: dict[str, tuple[bytes, str]] = {
        "empty.png": (b"", "not an image of a kind that is read"),
        "text.jpg": (b"<html>not found</html>", "not an image of a kind that is read"),
        "cut.jpg": (jpeg[: len(jpeg) // 2], "truncated"),
        "cut.png": (encoded(Image.fromarray(photo(40, 40)))[:900], "truncated"),
        "cut.webp": (encoded(Image.fromarray(photo(40, 40)), "WEBP")[:300], ""),
        "bomb.png": (png_header(30_000, 30_000), "exceeds limit"),
        "hollow.png": (png_header(20, 20), ""),
    }
    for name, (data, _) in (good_files | bad_files).items():
        (folder / "class").mkdir(parents=True, exist_ok=True)
        (folder / "class" / name).write_bytes(data)
    return {n: c for n, (_, c) in good_files.items()}, {n: reason for n, (_, reason) in bad_files.items()}


def test_every_oddity(tmp_path: Path) -> None:
    good, bad = plant(tmp_path / "images")
    (tmp_path / "images" / "class" / "small.png").write_bytes(encoded(Image.new("RGB", (30, 9))))
    command = ["write", tmp_path / "images", tmp_path / "out", "--size", 16, "--workers", 1, "--min-side", 16]
    assert run(*command, "--background", "#008000", "--max-rejected", 0.5) == 0
    urls = str(tmp_path / "out" / "shard-000000.tar")
    found = {}
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode("pil"):
        pixels = np.asarray(sample["png"])
        assert pixels.shape == (16, 16, 3)
        found[sample["json"]["source"].partition("/")[2]] = tuple(pixels[0, 0].tolist())
    assert {name: c for name, c in found.items() if np.abs(np.subtract(c, good[name])).max() > 2} == {}
    assert sorted(found) == sorted(good)
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert sorted(one["source"].partition("/")[2] for one in rejected) == sorted(bad)
    for one in rejected:
        assert bad[one["source"].partition("/")[2]] in one["reason"]
        assert one["reason"]
        assert one["exception"]
    assert read_index(tmp_path / "out").rejected == len(bad)
    assert json.loads((tmp_path / "out" / "entries.json").read_text())["filtered"] == {"--min-side 16": 1}
    assert run("verify", tmp_path / "out", "--workers", 1) == 0


def test_buckets_are_written_one_to_a_shard(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    shapes = [(40, 60), (60, 40), (32, 32), (90, 30), (33, 64)] * 4
    for number, shape in enumerate(shapes):
        (folder / f"{number:02d}.png").write_bytes(encoded(Image.fromarray(photo(*shape, seed=number))))
    (folder / "bad.png").write_bytes(b"")
    command = ["write", tmp_path / "images", tmp_path / "out", "--size", 16, "--policy", "buckets", "--bucket-step", 4]
    assert run(*command, "--workers", 2, "--samples-per-shard", 3, "--max-rejected", 0.1) == 0
    index = read_index(tmp_path / "out")
    sizes = [tuple(size) for size in index.image_policy["buckets"]]
    seen: dict[tuple[int, int], int] = {}
    for entry in index.shards:
        urls = str(tmp_path / "out" / entry.name)
        shapes_here = {
            np.asarray(s["png"]).shape[:2] for s in webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
        }
        assert shapes_here == {sizes[entry.bucket]}
        seen[sizes[entry.bucket]] = seen.get(sizes[entry.bucket], 0) + entry.samples
    assert seen == {(24, 12): 4, (20, 12): 4, (16, 16): 4, (12, 20): 4, (12, 24): 4}
    assert run("verify", tmp_path / "out", "--workers", 1) == 0
    assert run("inspect", tmp_path / "out", "--sheet", tmp_path / "sheet.png") == 0
    assert "12x24        4 ####" in capsys.readouterr().out
    again = tmp_path / "again"
    command[2] = again
    assert run(*command, "--workers", 1, "--samples-per-shard", 3, "--max-rejected", 0.1) == 0
    assert hashes(tmp_path / "out") == hashes(again)


@needs("mount", "umount")
@pytest.mark.long
def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """On a tmpfs with room for some of the shards; with more room the same command resumes to the same bytes."""
    if os.getuid() != 0:
        pytest.skip("mounting a tmpfs needs root")
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for number in range(24):
        (folder / f"{number:02d}.png").write_bytes(encoded(Image.fromarray(photo(96, 96, seed=number))))
    reference, small = tmp_path / "reference", tmp_path / "small"
    command = [sys.executable, "-m", "data_prep", "write", str(tmp_path / "images")]
    options = ["--size", "96", "--samples-per-shard", "4", "--workers", "2"]
    subprocess.run([*command, str(reference), *options], check=True, capture_output=True)
    whole = sum(path.stat().st_size for path in reference.rglob("*") if path.is_file())
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={whole // 2}", "tmpfs", str(small)], check=True)
    try:
        done = subprocess.run([*command, str(small / "out"), *options], capture_output=True, text=True)
        assert done.returncode == 2
        line = done.stderr.splitlines()[-1]
        assert line.startswith(f"data_prep: error: cannot write '{small}")
        assert line.endswith("No space left on device")
        assert "Traceback" not in done.stderr
        finished = sorted(path.name for path in (small / "out").glob("shard-*.tar"))
        assert finished
        for name in finished:
            assert (small / "out" / name).read_bytes() == (reference / name).read_bytes()
        assert not (small / "out" / "index.json").exists()
        subprocess.run(["mount", "-o", f"remount,size={4 * whole}", str(small)], check=True)
        subprocess.run([*command, str(small / "out"), *options], check=True, capture_output=True)
        assert hashes(small / "out") == hashes(reference)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_originals_are_kept_to_the_byte(tmp_path: Path) -> None:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    files = {
        "a.jpeg": encoded(Image.fromarray(photo(20, 30)), "JPEG"),
        "b.png": encoded(Image.fromarray(photo(31, 20))),
        "c.webp": encoded(Image.fromarray(photo(9, 20)), "WEBP"),
    }
    for name, data in files.items():
        (folder / name).write_bytes(data)
    command = ["write", tmp_path / "images", tmp_path / "out", "--policy", "untouched", "--format", "original"]
    assert run(*command, "--workers", 1) == 0
    kept = {}
    for sample in webdataset.WebDataset(str(tmp_path / "out" / "shard-000000.tar"), shardshuffle=False):
        (ending,) = {"jpg", "png", "webp"} & set(sample)
        kept[json.loads(sample["json"])["source"].partition("/")[2]] = sample[ending]
    assert kept == files
    assert run("verify", tmp_path / "out", "--workers", 1) == 0
    with Image.open(io.BytesIO(kept["c.webp"])) as image:
        assert image.size == (20, 9)


@pytest.mark.long
def test_training_on_aspect_buckets(tmp_path: Path) -> None:
    """Two ranks on images of five sizes: every step runs, and a resume at another position goes on alike."""
    for label in range(3):
        folder = tmp_path / "images" / f"class {label}"
        folder.mkdir(parents=True)
        for number, shape in enumerate([(40, 60), (60, 40), (32, 32), (90, 30), (33, 64)] * 2):
            (folder / f"{number}.png").write_bytes(encoded(Image.fromarray(photo(*shape, seed=number))))
    shards = tmp_path / "shards"
    command = ["write", tmp_path / "images", shards, "--size", 16, "--policy", "buckets", "--bucket-step", 4]
    assert run(*command, "--workers", 1) == 0
    refused = start(1, "megapix", arguments(shards, tmp_path / "whole"))[0]
    assert refused.code == 2
    assert "bucket 12x24 has 6 samples, fewer than optim.global_batch = 8" in refused.err
    assert "--bucket-min 8, or give --data.repeat-rare-buckets" in refused.err
    succeed(2, "megapix", arguments(shards, tmp_path / "whole", "--data.repeat-rare-buckets"))
    losses = scalars(tmp_path / "whole", "loss/train")
    assert sorted(losses) == list(range(1, 21))
    assert all(np.isfinite(loss) for loss in losses.values())
    succeed(2, "megapix", arguments(shards, tmp_path / "parts", "--data.repeat-rare-buckets", "--optim.end-at", "80"))
    succeed(2, "megapix", arguments(shards, tmp_path / "parts"))
    assert scalars(tmp_path / "parts", "loss/train") == losses
    assert start(1, "megapix", arguments(shards, tmp_path / "bad", "--model.patch-size", "8"))[0].code == 2
    refused = start(1, "megapix", arguments(shards, tmp_path / "bad", "--data.reading-groups", "3"))[0]
    assert refused.code == 2
    assert "data.reading_groups = 3: with aspect buckets expected a divisor" in refused.err
