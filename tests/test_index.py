"""`data_prep index`: WebDataset shards of strangers, trained on without rewriting a byte."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep import cli
from megapix.config import BatchLayout, DataConfig
from megapix.data.loader import batches
from megapix.data.locate import locate
from megapix.data.read import ShardReader
from megapix.shards import read_index
from tests.foreign import Foreign, make
from tests.test_data_prep import hashes
from tests.test_images import encoded


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def index_of(shards: Path | str, out: Path, *options: object) -> None:
    assert run("index", shards, "--out", out, "--size", 16, "--workers", 1, *options) == 0


def adm(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's centre crop, written down again with Pillow alone."""
    image = Image.fromarray(pixels)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    array = np.asarray(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def test_the_loader_applies_the_policy(tmp_path: Path) -> None:
    samples = make(tmp_path / "theirs")
    before = hashes(tmp_path / "theirs")
    index_of(tmp_path / "theirs", tmp_path / "index")
    assert hashes(tmp_path / "theirs") == before, "not one byte was rewritten"
    config = DataConfig(path=str(tmp_path / "index"), image_size=16, flip=False, workers=0)
    located = locate(config)
    assert [shard.name for shard in located.index.shards] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [(entry.name, entry.samples) for entry in located.index.classes] == [("0", 8), ("1", 8), ("2", 8)]
    batch = next(batches(config, located, 0, BatchLayout(24, 1, 1), 0, 0, ()))
    found = {(image.numpy().tobytes(), label) for image, label in zip(batch.images, batch.labels.tolist(), strict=True)}
    assert found == {(adm(s.pixels, 16).transpose(2, 0, 1).tobytes(), s.label) for s in samples}
    assert batch.spent.decode > 0
    reader = ShardReader(located, config)
    assert [reader.caption(n) for n in range(24)] == [s.caption for s in samples]
    assert [reader.read(n).data for n in range(24)] == [s.data for s in samples]
    assert run("verify", tmp_path / "index", "--workers", 1) == 0


def test_each_bucket_has_its_own_batches(tmp_path: Path) -> None:
    samples = make(tmp_path / "theirs", tars=4, samples=9)
    index_of(tmp_path / "theirs", tmp_path / "index", "--policy", "buckets", "--bucket-step", 4)
    config = DataConfig(path=str(tmp_path / "index"), image_size=16, flip=False, workers=0)
    located = locate(config)
    sizes = [tuple(bucket) for bucket in located.index.image_policy["buckets"]]
    assert sizes == [(24, 12), (20, 12), (16, 16), (12, 20), (12, 24)]
    expected: dict[tuple[int, int], set[str]] = {}
    for sample in samples:
        height, width = sample.pixels.shape[:2]
        nearest = min(sizes, key=lambda hw: abs(np.log(width / height) - np.log(hw[1] / hw[0])))
        expected.setdefault(nearest, set()).add(sample.caption)
    reader, found = ShardReader(located, config), dict[tuple[int, int], set[str]]()
    for number in range(36):
        found.setdefault(sizes[reader.read(number).bucket], set()).add(reader.caption(number))
    assert found == expected
    assert sum(entry.samples for entry in located.index.shards) == 36
    assert len(located.index.files) == 4 < len(located.index.shards)
    streams = [batches(config, located, 0, BatchLayout(2, 1, 2), rank, 0, ()) for rank in range(2)]
    shapes = []
    for _ in range(18):
        first, second = (next(stream) for stream in streams)
        assert first.images.shape == second.images.shape
        shapes.append(tuple(first.images.shape[2:]))
    assert {shape: shapes.count(shape) for shape in set(shapes)} == pytest.approx(
        {size: len(names) * 2 / 4 for size, names in expected.items()}, abs=1
    )
    assert run("verify", tmp_path / "index", "--workers", 1) == 0


def test_captions_alone_make_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "theirs", labelled=False)
    index_of(tmp_path / "theirs", tmp_path / "index")
    assert read_index(tmp_path / "index").class_names == ("images",)
    assert run("inspect", tmp_path / "index", "--sheet", tmp_path / "sheet.png") == 0
    out = capsys.readouterr().out
    assert "24 different, 0 empty" in out
    assert "applied at loading" in out


def test_our_own_shards_keep_their_class_names(shards: Path, tmp_path: Path) -> None:
    index_of(shards, tmp_path / "index")
    ours, again = read_index(shards), read_index(tmp_path / "index")
    assert again.classes == ours.classes
    assert again.shards == ours.shards


def test_untouched_shards_are_trained_on_through_an_index(
    image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["write", image_folder, tmp_path / "raw", "--policy", "untouched", "--format", "original"]
    assert run(*command, "--workers", 1) == 0
    originals = {hashlib.sha256(path.read_bytes()).hexdigest() for path in image_folder.rglob("*.png")}
    with tarfile.open(tmp_path / "raw" / "shard-000000.tar") as tar:
        images = [tar.extractfile(member) for member in tar if member.name.endswith(".png")]
        assert {hashlib.sha256(file.read()).hexdigest() for file in images if file} == originals
    assert run("verify", tmp_path / "raw", "--workers", 1) == 0
    index_of(tmp_path / "raw", tmp_path / "index")
    assert locate(DataConfig(path=str(tmp_path / "index"))).index.samples == 40


def test_bad_samples_are_listed_and_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "theirs")
    with tarfile.open(tmp_path / "theirs" / "00003.tar", "w") as tar:
        for key, data in (("bad", b"not an image"), ("good", encoded(Image.new("RGB", (20, 20))))):
            for name, content in ((f"{key}.PNG", data), (f"{key}.cls", b"1")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    command = ["index", tmp_path / "theirs", "--out", tmp_path / "index", "--size", 16, "--workers", 1]
    assert run(*command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 26 samples cannot be used, --max-rejected allows 0.001" in error
    assert "'00003.tar/bad.PNG': not a PNG, JPEG or WebP image" in error
    assert not (tmp_path / "index" / "index.json").exists()
    assert run(*command, "--max-rejected", 0.05) == 0, "the same command goes on"
    index = read_index(tmp_path / "index")
    assert (index.samples, index.rejected) == (25, 1)
    assert json.loads((tmp_path / "index" / "rejected.jsonl").read_text())["source"] == "00003.tar/bad.PNG"
    assert run(*command) == 0
    assert "was finished already" in capsys.readouterr().out


def add(folder: Path, *members: tuple[str, bytes]) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return folder


def test_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = encoded(Image.new("RGB", (20, 20)))
    (tmp_path / "empty").mkdir()
    cut = add(tmp_path / "cut", ("a.png", png), ("a.cls", b"1"))
    (cut / "0.tar").write_bytes((cut / "0.tar").read_bytes()[:700])
    some = add(tmp_path / "some", ("a.png", png), ("a.cls", b"0"))
    (add(tmp_path / "other", ("a.png", png)) / "0.tar").rename(some / "1.tar")
    cases: list[tuple[list[object], str]] = [
        ([tmp_path / "missing"], "missing' is not a folder or a tar file"),
        ([tmp_path / "missing.tar"], "missing.tar does not exist"),
        ([tmp_path / "empty"], "empty' holds no tar file"),
        ([tmp_path / "a{0..1.tar"], "braces are not closed"),
        (["pipe:cat 0.tar"], "'pipe' is not read; expected a local path or http, https, s3, gs"),
        (["ftp://host/a.tar"], "'ftp' is not read"),
        ([add(tmp_path / "twice", ("a.png", png), ("a.cls", b"1"), ("a.png", png))], "key 'a' occurs twice"),
        ([add(tmp_path / "two", ("a.png", png), ("a.jpg", png))], "sample 'a': expected one image"),
        ([add(tmp_path / "mixed", ("a.png", png), ("b.png", png), ("b.cls", b"1"))], "sample 'a' has no class"),
        ([add(tmp_path / "minus", ("a.png", png), ("a.cls", b"-1"))], "its class is -1, expected 0 or more"),
        ([add(tmp_path / "odd", ("a.png", png), ("a.json", b"{"))], "its json member is not JSON"),
        ([some], "1 samples have no class (cls), but 1 have one"),
        ([cut], "0.tar: cannot be read as an uncompressed tar file"),
        ([add(tmp_path / "fine", ("a.png", png)), "--retries", -1], "--retries = -1"),
        ([tmp_path / "fine", "--workers", 0], "--workers = 0"),
    ]
    for number, (arguments, message) in enumerate(cases):
        out = tmp_path / f"index-{number}"
        assert run("index", *arguments, "--out", out, "--size", 8) == 2, arguments
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith("data_prep: error: ")
        assert message in error
        assert not (out / "index.json").exists()
    index_of(tmp_path / "fine", tmp_path / "good")
    assert run("index", tmp_path / "fine", "--out", tmp_path / "good", "--size", 8) == 2
    assert "begun with size = 16, this command has 8" in capsys.readouterr().err


def test_an_index_never_names_a_command(tmp_path: Path) -> None:
    make(tmp_path / "theirs", tars=1)
    index_of(tmp_path / "theirs", tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    data = json.loads(path.read_text())
    data["base"] = f"pipe:touch {tmp_path / 'ran'}; cat "
    path.write_text(json.dumps(data))
    from megapix.errors import InputError

    config = DataConfig(path=str(tmp_path / "index"), image_size=16, workers=0)
    with pytest.raises(InputError, match="'pipe' is not read"):
        next(batches(config, locate(config), 0, BatchLayout(2, 1, 1), 0, 0, ()))
    assert not (tmp_path / "ran").exists()


def test_made_samples_are_as_they_were_meant(tmp_path: Path) -> None:
    samples: list[Foreign] = make(tmp_path / "theirs")
    assert len({sample.data for sample in samples}) == 24
    assert {sample.pixels.shape[:2] for sample in samples} >= {(40, 60), (60, 40)}
