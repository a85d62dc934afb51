"""Links, and archives as they are found: what lies in them is read, or its loss is said."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from megapix.config import DataConfig
from megapix.data.locate import locate
from megapix.data.read import ShardReader
from megapix.shards.index import read_index
from tests.data_prep.test_index import index_of, run
from tests.data_prep.test_sources import add
from tests.shards.test_images import encoded
from tests.support.foreign_shards import captions, make


def png(value: int) -> bytes:
    return encoded(Image.new("RGB", (20, 20), (value, 0, 0)))


def account(folder: Path) -> dict[str, Any]:
    """The counts of a prepared folder; they add up."""
    counts: dict[str, Any] = json.loads((folder / "entries.json").read_text())
    others = sum(counts["filtered"].values()) + sum(counts["passed"].values())
    assert counts["listed"] == counts["used"] + counts["rejected"] + counts["parts"] + others
    return counts


def images(folder: Path) -> list[bytes]:
    """The encoded images of an index in the order of its samples."""
    config = DataConfig(path=str(folder), image_size=16)
    reader = ShardReader(locate(config), config)
    return [reader.read(number).data for number in range(read_index(folder).samples)]


def link(tar: tarfile.TarFile, name: str, target: str, kind: bytes = tarfile.LNKTYPE) -> None:
    """Add a link to a tar file."""
    about = tarfile.TarInfo(name)
    about.type, about.linkname = kind, target
    tar.addfile(about)


def test_links_in_a_tar_are_their_targets(tmp_path: Path) -> None:
    """Hard links as GNU tar writes them for files with several names; symbolic ones may come before their target."""
    (tmp_path / "theirs").mkdir()
    with tarfile.open(tmp_path / "theirs" / "0.tar", "w") as tar:
        for name, data in (("./a/0.png", png(10)), ("./a/0.txt", b"caption 0")):
            add(tar, name, data)
        link(tar, "./a/1.png", "./a/0.png")
        add(tar, "./a/1.txt", b"caption 1")
        link(tar, "./a/2.png", "0.png", tarfile.SYMTYPE)
        link(tar, "./a/2.txt", "../b/3.txt", tarfile.SYMTYPE)
        add(tar, "./b/3.png", png(30))
        add(tar, "./b/3.txt", b"caption 3")
        link(tar, "./b/4.png", "../a/1.png", tarfile.SYMTYPE)
        add(tar, "./b/4.txt", b"caption 4")
        link(tar, "./b/5.png", "../../elsewhere/5.png", tarfile.SYMTYPE)
        add(tar, "./b/5.txt", b"caption 5")
        link(tar, "./b/6.png", "/data/6.png", tarfile.SYMTYPE)
        link(tar, "./b/README", "/data/README", tarfile.SYMTYPE)
        link(tar, "./b/7.png", "8.png", tarfile.SYMTYPE)
        link(tar, "./b/8.png", "7.png", tarfile.SYMTYPE)
        link(tar, "./b/alias.png", "3.png", tarfile.SYMTYPE)
    out = tmp_path / "index"
    index_of(tmp_path / "theirs", out, "--max-rejected", 0.5)
    assert images(out) == [png(10), png(10), png(10), png(30), png(10)]
    assert captions(out) == ["caption 0", "caption 1", "caption 3", "caption 3", "caption 4"]
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert {line["source"]: line["reason"] for line in rejected} == {
        "0.tar/./b/5.png": "it is a link to '../elsewhere/5.png', which is not in the tar file",
        "0.tar/./b/6.png": "it is a link to '/data/6.png', which is not in the tar file",
        "0.tar/./b/7.png": "it is a link to 'b/8.png', which is not in the tar file",
        "0.tar/./b/8.png": "it is a link to 'b/7.png', which is not in the tar file",
    }
    assert account(out)["passed"] == {"link": 2}, "README, and the alias of another sample's image"
    assert run("verify", out, "--workers", 1) == 0
    command = ["write", tmp_path / "theirs", tmp_path / "written", "--size", 16, "--workers", 1, "--max-rejected", 0.5]
    assert run(*command) == 0
    assert account(tmp_path / "written") == account(out) | {"parts": account(out)["parts"]}
    assert sorted(captions(tmp_path / "written")) == captions(out)


def test_every_source_follows_symbolic_links(tmp_path: Path) -> None:
    """Folders and files on another disk, as /data on a node often has them."""
    disk, theirs = tmp_path / "disk", tmp_path / "theirs"
    make(disk / "tars", 2)
    theirs.mkdir()
    os.symlink(disk / "tars" / "00000.tar", theirs / "00000.tar")
    os.symlink(disk / "tars" / "gone.tar", theirs / "gone.tar")
    shutil.copy(disk / "tars" / "00001.tar", theirs / "00001.tar")
    index_of(theirs, tmp_path / "index")
    assert [entry.name for entry in read_index(tmp_path / "index").files] == ["00000.tar", "00001.tar"]
    assert account(tmp_path / "index")["passed"] == {"broken link": 1}
    assert run("write", theirs, tmp_path / "written", "--size", 16, "--workers", 1) == 0
    assert read_index(tmp_path / "written").samples == 16
    os.symlink(theirs, tmp_path / "linked")
    assert run("write", tmp_path / "linked", tmp_path / "again", "--size", 16, "--workers", 1) == 0
    for name in ("index.json", "samples.bin", "plan.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "written" / name).read_bytes()


def test_parquet_files_in_a_linked_folder(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "theirs").mkdir()
    (tmp_path / "disk").mkdir()
    for folder, first in (("theirs", 0), ("disk", 3)):
        rows = [{"image": {"bytes": png(n)}, "text": f"picture {n}"} for n in range(first, first + 3)]
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / folder / f"{first}.parquet")
    os.symlink(tmp_path / "disk", tmp_path / "theirs" / "more")
    os.symlink(tmp_path / "theirs", tmp_path / "disk" / "loop")
    assert run("write", tmp_path / "theirs", tmp_path / "out", "--size", 16, "--workers", 1) == 0
    assert sorted(captions(tmp_path / "out")) == [f"picture {n}" for n in range(6)]
    assert account(tmp_path / "out")["passed"] == {"link to a folder above it": 1}


def test_an_index_finds_tar_files_under_the_path_that_was_given(tmp_path: Path) -> None:
    """/data is a link, and leads to another disk later."""
    make(tmp_path / "disk1" / "shards", 2)
    os.symlink(tmp_path / "disk1", tmp_path / "data")
    index_of(tmp_path / "data" / "shards", tmp_path / "home" / "index")
    assert read_index(tmp_path / "home" / "index").base == str(tmp_path / "data" / "shards")
    (tmp_path / "disk1").rename(tmp_path / "disk2")
    (tmp_path / "data").unlink()
    os.symlink(tmp_path / "disk2", tmp_path / "data")
    assert run("verify", tmp_path / "home" / "index", "--workers", 1) == 0


@pytest.mark.parametrize(
    ("tars", "index", "base"),
    [
        ("set/tars", "set/index", "../tars"),
        ("set", "set/index", ".."),
        ("set/tars", "set/meta/index", "/set/tars"),
        ("set", "set/meta/index", "../.."),
        ("index/tars", "index", "tars"),
        ("set/raw/tars", "set/index", "../raw/tars"),
        ("raw/tars", "set/index", "/raw/tars"),
    ],
)
def test_what_lies_together_is_moved_together(
    tars: str, index: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    make(root / tars, 1)
    if index == "index":  # the folder of the index must be new
        (root / "index" / "tars").rename(root / "tars")
        index_of(root / "tars", root / "index")
        (root / "tars").rename(root / "index" / "tars")
        about = json.loads((root / "index" / "index.json").read_text())
        (root / "index" / "index.json").write_text(json.dumps(about | {"base": base}))
    else:
        index_of(root / tars, root / index)
    recorded = read_index(root / index).base
    assert recorded == (f"{root}{base}" if base.startswith("/") else base)
    if base.startswith("/"):
        return
    root.rename(tmp_path / "moved")
    os.symlink(tmp_path / "moved" / index, tmp_path / "linked")
    monkeypatch.chdir(tmp_path / "moved")
    for place in (tmp_path / "moved" / index, Path(index), tmp_path / "linked"):
        assert run("verify", place, "--workers", 1) == 0
        assert len(images(place)) == 8


def packed(tar: Path, ending: str, kind: str = "") -> Path:
    """Put a compressed tar file in the place of a plain one."""
    data, to = tar.read_bytes(), tar.with_name(tar.name.removesuffix(".tar") + ending)
    tar.unlink()
    kind = kind or ending.rpartition(".")[2]
    pack: dict[str, Callable[[bytes], bytes]] = {"gz": gzip.compress, "tgz": gzip.compress, "bz2": bz2.compress}
    if kind == "zst":
        pack["zst"] = pytest.importorskip("zstandard").ZstdCompressor().compress
    to.write_bytes((pack | {"xz": lzma.compress})[kind](data))
    return to


def test_compressed_tars_are_read_by_write(tmp_path: Path) -> None:
    """In one folder with a plain one, and a gzip file under the name of a tar file: the same samples."""
    theirs = tmp_path / "theirs"
    make(theirs, 6, samples=4)
    assert run("write", theirs, tmp_path / "plain", "--size", 16, "--workers", 1) == 0
    for number, ending in enumerate((".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")):
        packed(theirs / f"{number:05d}.tar", ending)
    command = ["write", theirs, tmp_path / "out", "--size", 16, "--workers", 2]
    assert run(*command, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    assert run(*command) == 0
    assert sorted(captions(tmp_path / "out")) == sorted(captions(tmp_path / "plain"))
    assert sorted(images(tmp_path / "out")) == sorted(images(tmp_path / "plain"))
    assert account(tmp_path / "out") == account(tmp_path / "plain")
    assert not (tmp_path / "out" / ".unpacked").exists()
    shutil.rmtree(theirs)
    make(theirs, 1)
    packed(theirs / "00000.tar", ".tar", "gz")
    assert run("write", theirs / "00000.tar", tmp_path / "named", "--size", 16, "--workers", 1) == 0
    assert read_index(tmp_path / "named").samples == 8


def test_an_interrupted_write_unpacks_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    make(theirs, 2)
    tar = packed(theirs / "00001.tar", ".tar.gz")
    command = ["write", theirs, out, "--size", 16, "--workers", 1]
    with monkeypatch.context() as patched:
        patched.setattr("data_prep.writing.write.in_processes", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(*command)
    (unpacked,) = (out / ".unpacked").iterdir()
    with gzip.open(tar) as file:
        assert unpacked.read_bytes() == file.read()
    monkeypatch.setattr("data_prep.listing.archives._opened", lambda *_: 1 / 0)
    assert run(*command) == 0
    assert read_index(out).samples == 16


def test_archives_that_cannot_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "theirs"
    make(theirs, 3)
    whole = packed(theirs / "00001.tar", ".tar.gz")
    for pattern in (theirs, whole, f"{theirs}/0000{{0,1}}.tar.gz"):
        assert run("index", pattern, "--out", tmp_path / "index", "--size", 16) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert ".tar.gz' is compressed, so its samples cannot be read by offset; unpack it, or give data_prep" in error
    whole.write_bytes(whole.read_bytes()[:5000])
    command = ["write", theirs, tmp_path / "out", "--size", 16, "--workers", 1]
    assert run(*command, "--max-rejected-tars", 0) == 2
    assert "'00001.tar.gz': " in (error := capsys.readouterr().err.splitlines()[-1])
    assert "cannot be unpacked (gzip): Compressed file ended before the end-of-stream marker was reached" in error
    assert run(*command) == 0
    assert (account(tmp_path / "out")["used"], account(tmp_path / "out")["rejected"]) == (16, 1)
    assert read_index(tmp_path / "out").rejected == 1
    (line,) = map(json.loads, (tmp_path / "out" / "rejected.jsonl").read_text().splitlines())
    assert line["source"] == "00001.tar.gz"
    whole.unlink()
    packed(theirs / "00002.tar", ".tar", "gz")
    index_of(theirs, tmp_path / "index")
    (line,) = map(json.loads, (tmp_path / "index" / "rejected.jsonl").read_text().splitlines())
    assert line["reason"] == f"{theirs}/00002.tar is compressed (gzip): data_prep write unpacks it for its work"
    (theirs / "00002.tar").unlink()
    packed(theirs / "00000.tar", ".tar.zst")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("write", theirs, tmp_path / "zstd", "--size", 16) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"data_prep: error: {theirs / '00000.tar.zst'} needs zstandard: pip install 'megapix[zstd]'"


def test_a_tar_that_became_unreadable_after_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, out = tmp_path / "theirs", tmp_path / "out"
    make(theirs, 3)
    whole = (theirs / "00001.tar").read_bytes()
    command = ["write", theirs, out, "--size", 16, "--workers", 1]
    assert run(*command) == 0
    (theirs / "00001.tar").write_bytes(whole[:3000])
    shutil.rmtree(out / ".lists")  # as of an older version
    before = (out / "index.json").read_bytes()
    assert run(*command) == 2
    assert "Among its tar files '00001.tar' cannot be read now: " in capsys.readouterr().err.splitlines()[-1]
    assert (out / "index.json").read_bytes() == before
    (theirs / "00001.tar").write_bytes(whole)
    assert run(*command) == 0


def zipped(path: Path, *members: tuple[str, bytes], labels: object = ...) -> Path:
    """A zip file of these members, and dataset.json unless `labels` is left out."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members:
            archive.writestr(name, data)
        if labels is not ...:
            archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def written(source: Path, out: Path, *options: object) -> list[tuple[str, int]]:
    """(class, samples) of what `write` makes of a source."""
    assert run("write", source, out, "--size", 16, "--workers", 1, *options) == 0
    account(out)
    return [(entry.name, entry.samples) for entry in read_index(out).classes]


def test_zips_without_labels(tmp_path: Path) -> None:
    """One class where dataset.json says so, or the images lie flat; else the class is the folder."""
    edm = [(f"00000/img{n:08d}.png", png(n)) for n in range(3)]
    assert written(zipped(tmp_path / "null.zip", *edm, labels=None), tmp_path / "null") == [("images", 3)]
    flat = [(f"{n}.png", png(n)) for n in range(3)]
    assert written(zipped(tmp_path / "flat.zip", *flat), tmp_path / "flat") == [("images", 3)]
    folders = [(f"{folder}/deep/{n}.png", png(n)) for folder in ("a_cat", "dog") for n in range(2)]
    others = [("loose.png", png(9)), ("__MACOSX/dog/._0.png", b"junk"), ("dog/.DS_Store", b"x"), ("dog/", b"")]
    assert written(zipped(tmp_path / "f.zip", *folders, *others), tmp_path / "f") == [("a_cat", 2), ("dog", 2)]
    assert sorted(captions(tmp_path / "f")) == ["a cat", "a cat", "dog", "dog"]
    assert account(tmp_path / "f")["passed"] == {"hidden": 2, "image outside the class folders": 1}
    wrapped = [(f"set/train/{name}", data) for name, data in folders]
    assert written(zipped(tmp_path / "w.zip", *wrapped), tmp_path / "w") == [("a_cat", 2), ("dog", 2)]
    assert read_index(tmp_path / "w").source["kind"] == "image folder in a zip"


def test_zips_of_class_folders_are_image_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Folders that are numbers are in the order of these, and splits are not mixed."""
    numbers = [(f"{name}/{n}.png", png(10 * n)) for name in ("2", "10", "1") for n in range(2)]
    source = zipped(tmp_path / "n.zip", *numbers)
    assert written(source, tmp_path / "n") == [("1", 2), ("2", 2), ("10", 2)]
    assert "class folders are in the order of their numbers: 1, 2, 10" in capsys.readouterr().out
    assert written(source, tmp_path / "name", "--class-order", "name") == [("1", 2), ("10", 2), ("2", 2)]
    assert written(source, tmp_path / "one", "--classes", "none") == [("images", 6)]
    splits = [(f"data/{split}/{name}/0.png", png(9)) for split in ("train", "val") for name in ("cat", "dog")]
    source = zipped(tmp_path / "s.zip", *splits, ("data/train/notes.txt", b"x"))
    assert written(source, tmp_path / "s") == [("cat", 1), ("dog", 1)]
    assert account(tmp_path / "s")["passed"] == {".txt": 1, "split validation": 2}
    assert read_index(tmp_path / "s").source == read_index(tmp_path / "s").source | {"split": "train"}
    assert written(source, tmp_path / "v", "--split", "val") == [("cat", 1), ("dog", 1)]
    labelled = zipped(tmp_path / "l.zip", ("0.png", png(1)), labels=[["0.png", 0]])
    assert run("write", labelled, tmp_path / "no", "--size", 16, "--class-order", "name") == 2
    assert "--class-order has no meaning for" in capsys.readouterr().err


def test_members_of_a_zip_that_cannot_be_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [f"{n}.png" for n in range(4)]
    path = zipped(tmp_path / "d.zip", *((name, png(1)) for name in names), labels=[[name, 0] for name in names])
    data = bytearray(path.read_bytes())
    for name, at, value in (("1.png", 6, 1), ("2.png", 8, 9)):  # encrypted; deflate64
        header, entry = data.index(name.encode()) - 30, data.rindex(name.encode()) - 46
        data[header + at] = data[entry + at + 2] = value
    path.write_bytes(data)
    assert run("write", path, tmp_path / "out", "--size", 16, "--workers", 1, "--max-rejected", 0.5) == 0
    reasons = [json.loads(line)["reason"] for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    assert sorted(reasons) == [
        "it is compressed by method 9 (deflate64), which is not read; expected deflate",
        "it is encrypted; expected a zip file without a password",
    ]
    assert account(tmp_path / "out")["used"] == 2
    wrong = zipped(tmp_path / "wrong.zip", ("0.png", png(1)), labels=7)
    assert run("write", wrong, tmp_path / "no", "--size", 16) == 2
    assert "dataset.json holds no list 'labels' of [name, class], or null where" in capsys.readouterr().err


@pytest.mark.long
def test_a_zip64_archive(tmp_path: Path) -> None:
    """More than 65,535 entries, folders, and macOS's leftovers."""
    names = [f"00000/img{n}.png" for n in range(3)]
    empty = ((f"x/{n}.txt", b"") for n in range(66_000))
    left = [(f"__MACOSX/00000/._img{n}.png", b"junk") for n in range(3)]
    labels = [[name, n] for n, name in enumerate(names)]
    path = zipped(tmp_path / "d.zip", *empty, *((name, png(9)) for name in names), *left, labels=labels)
    assert written(path, tmp_path / "out") == [("0", 1), ("1", 1), ("2", 1)]
    assert account(tmp_path / "out")["passed"] == {".txt": 66_000, "hidden": 3}
