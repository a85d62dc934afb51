"""`data_prep index`: WebDataset shards of strangers, trained on without rewriting a byte."""

from __future__ import annotations

import hashlib
import json
import re
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
from megapix.errors import InputError
from megapix.shards.index import read_index
from megapix.shards.table import RECORD
from tests.data_prep.test_sources import add as add_member
from tests.data_prep.test_write import hashes
from tests.shards.test_images import encoded
from tests.support.foreign_shards import Foreign, captions, make
from tests.support.version_2 import make_listed


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
    assert batch.times.decode > 0
    reader = ShardReader(located, config)
    assert captions(tmp_path / "index") == [s.caption for s in samples]
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
    for number, caption in enumerate(captions(tmp_path / "index")):
        found.setdefault(sizes[reader.read(number).bucket], set()).add(caption)
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
    assert "24 different, 0 duplicates" in out
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
                add_member(tar, name, content)
    command = ["index", tmp_path / "theirs", "--out", tmp_path / "index", "--size", 16, "--workers", 1]
    assert run(*command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "1 of 26 samples cannot be used, --max-rejected allows 0.001" in error
    assert "'00003.tar/bad.PNG': not an image of a kind that is read" in error
    assert not (tmp_path / "index" / "index.json").exists()
    assert run(*command, "--max-rejected", 0.05) == 0, "the same command resumes"
    index = read_index(tmp_path / "index")
    assert (index.samples, index.rejected) == (25, 1)
    assert json.loads((tmp_path / "index" / "rejected.jsonl").read_text())["source"] == "00003.tar/bad.PNG"
    assert run(*command) == 0
    assert "was finished already" in capsys.readouterr().out


def add(folder: Path, *members: tuple[str, bytes]) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for name, data in members:
            add_member(tar, name, data)
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
        ([add(tmp_path / "two", ("a.png", png), ("a.jpg", png))], "'0.tar/a.png': expected one image"),
        ([add(tmp_path / "half", ("a.png", png), ("a.json", b'{"label": 3.7}'))], "json: the class is 3.7"),
        ([add(tmp_path / "inf", ("a.png", png), ("a.json", b'{"label": Infinity}'))], "json: the class is inf"),
        ([add(tmp_path / "long", ("a.png", png), ("a.json", b" " * (1 << 21)))], "its json member has 2097152 bytes"),
        ([add(tmp_path / "deep", ("a.png", png), ("a.json", b"[" * 100_000))], "recursion"),
        (
            [add(tmp_path / "mixed", ("a.png", png), ("b.png", png), ("b.cls", b"1"))],
            "'0.tar/a.png': it has no class, but others have one",
        ),
        ([add(tmp_path / "minus", ("a.png", png), ("a.cls", b"-1"))], "cls: the class is '-1', expected a name, or"),
        ([add(tmp_path / "odd", ("a.png", png), ("a.json", b"{"))], "its json member is not JSON"),
        (
            [some],
            "1 of 2 samples cannot be used, --max-rejected allows 0.001 of them; the latest is '1.tar/a.png': it has",
        ),
        ([cut], "0.tar: cannot be read as an uncompressed tar file: unexpected end of data"),
        ([add(tmp_path / "fine", ("a.png", png)), "--outage-minutes", -1], "--outage-minutes = -1"),
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


def test_what_is_no_part_of_a_sample_is_passed_over(tmp_path: Path) -> None:
    """As webdataset does: names without a dot, hidden files, folders; a mask beside an image is not the image."""
    png = encoded(Image.new("RGB", (20, 20)))
    members = (("README", b"hello"), ("._a.png", b"x"), ("a.seg.png", b"mask"), ("a.PNG", png), ("a.cls", b"0"))
    odd = b'{"caption": "\\ud800 and more"}'
    folder = add(
        tmp_path / "theirs",
        *members,
        (f"{'d' * 90}/{'e' * 60}/b.jpeg", png),
        (f"{'d' * 90}/{'e' * 60}/b.cls", b"0"),
        (f"{'d' * 90}/{'e' * 60}/b.json", odd),
    )
    index_of(folder, tmp_path / "index")
    assert captions(tmp_path / "index") == ["", "\\ud800 and more"]
    assert run("verify", tmp_path / "index", "--workers", 1) == 0


def test_damaged_tar_files_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tarfile itself takes each of these for an archive that ends early."""
    png = encoded(Image.new("RGB", (20, 20)))
    whole = add(tmp_path / "whole", *((f"{n}.{e}", d) for n in range(3) for e, d in (("png", png), ("cls", b"0"))))
    data = (whole / "0.tar").read_bytes()
    with tarfile.open(whole / "0.tar") as tar:
        starts = [member.offset for member in tar]
    middle = starts[2]
    damaged = {
        "header": (data[:middle] + b"\xff" * 20 + data[middle + 20 :], f"the tar header at byte {middle} is damaged"),
        "cut": (data[:middle], f"cut short at byte {middle}"),
        "joined": (data + data, "there is something after the end mark"),
    }
    for name, (content, words) in damaged.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / "0.tar").write_bytes(content)
        for command in (["index", folder, "--out"], ["write", folder, "--source", "shards"]):
            assert run(*command, tmp_path / f"{name}-{command[0]}", "--size", 16) == 2
            assert words in capsys.readouterr().err.splitlines()[-1]
    backwards = tarfile.TarInfo("._hidden")
    header = bytearray(backwards.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\xff" * 10 + (2**16 - 512).to_bytes(2, "big")  # base-256: minus 512 bytes
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:512]))
    (tmp_path / "back").mkdir()
    (tmp_path / "back" / "0.tar").write_bytes(bytes(header) + data)
    assert run("index", tmp_path / "back", "--out", tmp_path / "back-index", "--size", 16) == 2
    assert "has a size of -512" in capsys.readouterr().err


def test_the_budget_holds_in_whatever_order_shards_come(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    png = encoded(Image.new("RGB", (20, 20)))
    folder = add(tmp_path / "theirs", *((f"{n}.png", b"bad") for n in range(5)))
    (add(tmp_path / "good", *((f"{n}.png", png) for n in range(5))) / "0.tar").rename(folder / "1.tar")
    command = ["index", folder, "--out", tmp_path / "index", "--size", 16, "--workers", 1]
    assert run(*command) == 2
    assert "5 of 10 samples cannot be used" in capsys.readouterr().err
    assert run(*command, "--max-rejected", 0) == 2
    assert run(*command, "--max-rejected", 0.5) == 0


def test_an_index_belongs_to_one_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make(tmp_path / "a")
    make(tmp_path / "b")
    index_of(tmp_path / "a", tmp_path / "index")
    assert run("index", tmp_path / "b", "--out", tmp_path / "index", "--size", 16) == 2
    assert "begun with base = " in capsys.readouterr().err
    (tmp_path / "b" / "index.json").write_text('{"of": "somebody else"}')
    index_of(tmp_path / "b", tmp_path / "other")


def test_a_strangers_index_leads_nowhere_else(tmp_path: Path) -> None:
    """Hashes, names, counts and records are checked before anything is opened by them."""
    make(tmp_path / "theirs", tars=1)
    index_of(tmp_path / "theirs", tmp_path / "index")
    make_listed(tmp_path / "index")
    path, table = tmp_path / "index" / "index.json", tmp_path / "index" / "samples.bin"
    good, records = json.loads(path.read_text()), table.read_bytes()
    config = DataConfig(path=str(tmp_path / "index"), image_size=16)

    def shard(**values: object) -> dict[str, object]:
        return {"shards": [good["shards"][0] | values]}

    def policy(**values: object) -> dict[str, object]:
        return {"image_policy": good["image_policy"] | values}

    for change, words in (
        (shard(name="../theirs/00000.tar"), "leads out of the folder"),
        (shard(name="/etc/passwd"), "leads out of the folder"),
        (shard(sha256="../victim"), "is not a SHA-256 hash"),
        (shard(bytes=-1), "-1 is not a count"),
        (shard(bucket=7), "a shard has bucket 7, but the image policy has 1"),
        ({"samples": "24"}, "'24' is not a count"),
        ({"classes": []}, "there are no classes"),
        ({"image_policy": {}}, "'applied'"),
        (policy(mode="melt"), "image_policy is damaged"),
        (policy(buckets=[[16, 10**9]]), "image_policy is damaged"),
        (policy(background=[1]), "image_policy is damaged"),
    ):
        path.write_text(json.dumps(good | change))
        with pytest.raises(InputError, match=re.escape(words)):
            locate(config)
    for field, value in ((0, 5), (1, 1 << 31), (2, 2**63), (2, 2**64 - 1), (2, 0), (3, -1), (3, 3)):
        fields = list(RECORD.unpack_from(records, 3 * RECORD.size))
        fields[field] = value
        bad = records[: 3 * RECORD.size] + RECORD.pack(*fields) + records[4 * RECORD.size :]
        table.write_bytes(bad)
        path.write_text(json.dumps(good | {"table_sha256": hashlib.sha256(bad).hexdigest()}))
        with pytest.raises(InputError, match=r"samples.bin: record 3 points outside its shard or at no class"):
            locate(config)


def test_an_index_never_names_a_command(tmp_path: Path) -> None:
    make(tmp_path / "theirs", tars=1)
    index_of(tmp_path / "theirs", tmp_path / "index")
    path = tmp_path / "index" / "index.json"
    data = json.loads(path.read_text())
    data["base"] = f"pipe:touch {tmp_path / 'ran'}; cat "
    path.write_text(json.dumps(data))
    config = DataConfig(path=str(tmp_path / "index"), image_size=16, workers=0)
    with pytest.raises(InputError, match="'pipe' is not read"):
        next(batches(config, locate(config), 0, BatchLayout(2, 1, 1), 0, 0, ()))
    assert not (tmp_path / "ran").exists()


def test_made_samples_are_as_they_were_meant(tmp_path: Path) -> None:
    samples: list[Foreign] = make(tmp_path / "theirs")
    assert len({sample.data for sample in samples}) == 24
    assert {sample.pixels.shape[:2] for sample in samples} >= {(40, 60), (60, 40)}
