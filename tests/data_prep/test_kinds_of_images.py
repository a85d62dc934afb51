"""Images of every kind through `write` and `index`: what is in the shards, what a run gets, what is said."""

from __future__ import annotations

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import cli
from data_prep.sources import open_source
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.config import DataConfig
from megapix.data.locate import locate
from megapix.data.read import Decoder, ShardReader
from megapix.shards.image_policy import Policy
from megapix.shards.index import read_index
from tests.data_prep.test_sources import add
from tests.shards.test_images import encoded
from tests.support import icc_profiles as profiles

KINDS = {"PNG": "png", "JPEG": "jfif", "GIF": "GIF", "BMP": "bmp", "TIFF": "tif", "WEBP": "webp", "JPEG2000": "jp2"}
EXACT = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}
COLORS = {kind: (40 * n, 250 - 30 * n, 7) for n, kind in enumerate(KINDS)}


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def picture(kind: str) -> bytes:
    return encoded(Image.new("RGB", (20, 20), COLORS[kind]), kind, **EXACT.get(kind, {}))


def loaded(folder: Path) -> list[np.ndarray]:
    """The images [H, W, 3] as a run reads them."""
    config = DataConfig(path=str(folder))
    located = locate(config)
    reader, decoder = ShardReader(located, config), Decoder(located.index)
    read = [reader.read(sample) for sample in range(located.index.samples)]
    return [decoder(encoded.data, encoded.bucket).transpose(1, 2, 0) for encoded in read]


def members(folder: Path) -> dict[str, bytes]:
    """Source -> its image's ending, of a folder that `write` made."""
    found = {}
    with tarfile.open(folder / "shard-000000.tar") as tar:
        for member in tar:
            if member.name.endswith(".json"):
                file = tar.extractfile(member)
                assert file
                source = json.loads(file.read())["source"]
                found[source] = next(
                    n.name for n in tar if n.name[:9] == member.name[:9] and n.name[9:] not in (".json", ".cls")
                )[10:]
    return found


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    for kind, ending in KINDS.items():
        (folder / f"{kind}.{ending}").write_bytes(picture(kind))
    return tmp_path / "images"


def test_write_reads_every_kind(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (images / "class" / "film.mp4").write_bytes(b"\0\0\0\x1cftypisom")
    (images / "class" / "lies.heic").write_bytes(picture("PNG"))
    assert run("write", images, tmp_path / "out", "--size", 16, "--workers", 1) == 0
    assert "of 9 entries: 8 used, 0 rejected, 0 filtered, 0 part of a sample, 1 passed over" in capsys.readouterr().out
    found = sorted(image[0, 0].tolist() for image in loaded(tmp_path / "out"))
    expected = sorted([*map(list, COLORS.values()), list(COLORS["PNG"])])
    assert np.abs(np.subtract(found, expected)).max() <= 2
    assert set(members(tmp_path / "out").values()) == {"png"}


def test_original_keeps_what_everybody_reads(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--policy", "untouched", "--format", "original", "--workers", 1)
    assert run("write", images, tmp_path / "out", *options) == 0
    assert "4 images were transcoded to PNG" in capsys.readouterr().out
    endings = members(tmp_path / "out")
    kept = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}
    assert endings == {f"class/{kind}.{ending}": kept.get(kind, "png") for kind, ending in KINDS.items()}
    found = sorted(image[0, 0].tolist() for image in loaded(tmp_path / "out"))
    assert np.abs(np.subtract(found, sorted(map(list, COLORS.values())))).max() <= 2
    assert run("verify", tmp_path / "out", "--workers", 1) == 0


def test_index_reads_every_kind(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars" / "0.tar", "w") as tar:
        for kind, ending in KINDS.items():
            add(tar, f"{kind}.{ending}", picture(kind))
            add(tar, f"{kind}.cls", b"0")
    assert run("index", tmp_path / "tars", "--out", tmp_path / "index", "--size", 16, "--workers", 1) == 0
    found = [image[0, 0].tolist() for image in loaded(tmp_path / "index")]
    assert np.abs(np.subtract(found, list(COLORS.values()))).max() <= 2
    assert run("verify", tmp_path / "index", "--workers", 1) == 0


@pytest.mark.parametrize("buckets", [False, True])
def test_an_older_versions_folder_is_finished_as_it_was_begun(
    buckets: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What that version wrote is a plan without `policy_version`: the bytes of its shards are those of its decoder."""
    folder = tmp_path / "images" / "class"
    folder.mkdir(parents=True)
    image = Image.new("RGB", (20, 20), (40, 200, 90))
    for number in range(4):
        image.save(folder / f"{number}.png", icc_profile=profiles.rgb_profile("prophoto"))
    policy = Policy.make("buckets" if buckets else "crop", 16, version=1)
    begun, whole = tmp_path / "begun", tmp_path / "whole"
    for out in (begun, whole):
        write(open_source(tmp_path / "images"), out, Options(policy, samples_per_shard=2), 1, progress=False)
    assert "policy_version" not in json.loads((begun / "plan.json").read_text())
    for name in ("index.json", "shard-000001.tar"):
        (begun / name).unlink()
    shutil.rmtree(begun / ".receipts")
    capsys.readouterr()
    options = ("--policy", "buckets") if buckets else ()
    command = ("write", tmp_path / "images", begun, "--size", 16, "--workers", 1, "--samples-per-shard", 2, *options)
    assert run(*command, "--seed", 1) == 2
    assert "was begun with seed = 0, this command has 1" in capsys.readouterr().err
    assert run(*command) == 0
    assert f"{begun} was begun by an older version: images are decoded as it did" in capsys.readouterr().out
    for path in sorted(whole.glob("[a-z]*.*")):
        assert (begun / path.name).read_bytes() == path.read_bytes(), path.name
    assert "version" not in read_index(begun).image_policy
    assert all((image == (40, 200, 90)).all() for image in loaded(begun))
