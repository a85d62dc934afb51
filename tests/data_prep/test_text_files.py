"""Text files as people have them: captions and JSON beside images and in tar files, whatever editor saved them."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_prep.listing.base import Entries, Item
from data_prep.listing.reading import Reading
from data_prep.listing.tar_samples import samples_of
from data_prep.sources import open_source
from data_prep.sources.image_text import ImageText
from data_prep.sources.shards import Shards
from data_prep.writing import account
from tests.data_prep.test_several_captions import png, run
from tests.data_prep.test_sources import add
from tests.support.foreign_shards import captions

DOG = "ein Bär 🐻"
SAVED = {
    "plain": DOG.encode(),
    "mark": DOG.encode("utf-8-sig"),
    "utf16": DOG.encode("utf-16"),
    "utf16be": b"\xfe\xff" + DOG.encode("utf-16-be"),
    "utf32": DOG.encode("utf-32"),
    "blanks": f" \n\n{DOG}  \r\n\r\n".encode(),
}
"""How a text was saved -> its bytes; all of them are DOG."""
NOT_TEXT = {"latin": "ein Bär".encode("latin-1"), "no mark": "a dog".encode("utf-16-le")}
NO_WORDS = ["null", "NaN", "7", "0.5", "true", '""', '" \\t\\n "', "[]", "[null, NaN, 7]"]


def folder_of(out: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    return out


def tar_of(out: Path, files: dict[str, bytes]) -> Path:
    out.mkdir()
    with tarfile.open(out / "a.tar", "w") as tar:
        for name, data in files.items():
            add(tar, name, data)
    return out


def found(source: Any) -> dict[str, Item]:
    return {Path(item.name).stem: item for item in source.items}


def beside(texts: dict[str, bytes], ending: str) -> dict[str, bytes]:
    """Images with such a file beside each."""
    files = {}
    for number, (key, data) in enumerate(texts.items()):
        files |= {f"{key}.png": png(number), f"{key}.{ending}": data}
    return files


@pytest.mark.parametrize("make", [folder_of, tar_of])
def test_texts_of_any_editor(make: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path) -> None:
    texts = found(open_source(make(tmp_path / "txt", beside(SAVED | NOT_TEXT, "txt"))))
    assert {key: texts[key].caption for key in SAVED} == dict.fromkeys(SAVED, DOG)
    assert not any(texts[key].fault for key in SAVED)
    assert "byte 5 is not UTF-8 text; expected UTF-8, or UTF-16 with a byte order mark" in texts["latin"].fault
    assert "it holds zero bytes, as UTF-16 without a byte order mark does" in texts["no mark"].fault
    encodings = {"plain": "utf-8", "mark": "utf-8-sig", "utf16": "utf-16", "utf32": "utf-32"}
    written = {key: json.dumps({"caption": f" {DOG}\n"}, ensure_ascii=False).encode(e) for key, e in encodings.items()}
    about = found(open_source(make(tmp_path / "json", beside(written, "json"))))
    assert {key: item.caption for key, item in about.items()} == dict.fromkeys(encodings, DOG)


@pytest.mark.parametrize("make", [folder_of, tar_of])
def test_what_is_no_words_is_no_caption(
    make: Callable[[Path, dict[str, bytes]], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As pandas, numpy and json.dump write what is missing. It is empty, and said with a count."""
    texts = {f"n{number}": f'{{"caption": {value}}}'.encode() for number, value in enumerate(NO_WORDS)}
    texts |= {"a": b'{"caption": "a \\u0000 dog"}', "b": b'{"captions": [NaN, "a cat", 7, null]}'}
    path = make(tmp_path / "source", beside(texts, "json"))
    expected = {key: "" for key in texts} | {"a": "a \0 dog", "b": "a cat"}
    assert {key: item.caption for key, item in found(open_source(path)).items()} == expected
    said = f"data_prep: {len(NO_WORDS)} of {len(texts)} images have no caption: it is empty there"
    assert run("write", path, tmp_path / "out", "--size", 16, "--workers", 1) == 0
    assert said in capsys.readouterr().out.splitlines()
    assert sorted(captions(tmp_path / "out")) == sorted(expected.values())
    assert run("inspect", tmp_path / "out") == 0
    assert said.removeprefix("data_prep: ") in capsys.readouterr().out
    assert run("write", path, tmp_path / "none", "--size", 16, "--dry-run") == 0
    assert said in capsys.readouterr().out.splitlines()
    if make is tar_of:
        assert run("index", path, "--out", tmp_path / "index", "--size", 16, "--workers", 1) == 0
        assert said in capsys.readouterr().out.splitlines()
        assert captions(tmp_path / "index") == list(expected.values())
        assert run("verify", tmp_path / "index", "--workers", 1) == 0


def test_damaged_json_rejects_its_image_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = {f"{number:03d}": b'{"caption": "a dog"}' for number in range(8)}
    damaged = {"cut": b'{"caption": "a d', "list": b'["a dog"]', "empty": b"", "long": b" " * ((1 << 20) + 1)}
    path = folder_of(tmp_path / "pairs", beside(good | damaged, "json"))
    command = ["write", path, tmp_path / "out", "--size", 16, "--workers", 1]
    assert run(*command) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "4 of 12 samples cannot be used, --max-rejected allows 0.001 of them; the latest is 'long.png': " in error
    assert not (tmp_path / "out").exists(), "before any work"
    assert run(*command, "--max-rejected", 0.4) == 0
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {one["source"]: one["reason"] for one in rejected}
    assert reasons["cut.png"].startswith(f"{path / 'cut.json'} is not JSON: Unterminated string")
    assert reasons["list.png"] == f"{path / 'list.json'} is a list, expected a JSON object"
    assert reasons["empty.png"].startswith(f"{path / 'empty.json'} is not JSON: Expecting value")
    assert reasons["long.png"] == f"{path / 'long.json'}: it has 1048577 bytes, at most 1048576 are read"
    counted = account.load(tmp_path / "out")
    assert counted
    assert (counted.listed, counted.used, counted.rejected, counted.parts) == (24, 8, 4, 12)


# ---------------------------------------------------------------------------------------------------------------------
# Where texts lie
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["first", "last"])
def test_the_order_of_a_folder_decides_nothing(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One image of four has no text: it comes first, or last, in the order in which the system lists them."""
    import os

    files = {f"album/{n}.png": png(n) for n in range(4)} | {f"album/{n}.txt": b"fox %d" % n for n in range(3)}
    path = folder_of(tmp_path / "in", files)
    scan = os.scandir

    class Ordered:
        def __init__(self, folder: Any) -> None:
            found = sorted(scan(folder), key=lambda entry: (entry.name != "3.png", entry.name))
            self.found = found if order == "first" else found[::-1]

        def __enter__(self) -> list[Any]:
            return self.found

        def __exit__(self, *_: object) -> None:
            pass

        def __iter__(self) -> Any:
            return iter(self.found)

    monkeypatch.setattr(os, "scandir", Ordered)
    source = open_source(path)
    assert isinstance(source, ImageText)
    assert [(item.name, item.caption) for item in source.items] == [
        ("album/0.png", "fox 0"),
        ("album/1.png", "fox 1"),
        ("album/2.png", "fox 2"),
        ("album/3.png", ""),
    ]
    assert run("write", path, tmp_path / "none", "--size", 16, "--dry-run") == 0
    assert "data_prep: 1 of 4 images have no caption: it is empty there" in capsys.readouterr().out


def test_endings_and_folders_of_texts(tmp_path: Path) -> None:
    files = {
        "IMG.JPG": b"upper",
        "a.PNG": b'{"caption": "json"}',
        "x.y.png": b"dots",
        "b.png": b"whole name",
        "images/c.png": b"sibling",
        "images/train/d.png": b"sibling of the first folder",
        "e.png": b"folder in it",
        "f.png": b'{"captions": ["a", "b"]}',
        "none.png": b"",
    }
    texts = {
        "IMG.JPG": "IMG.TXT",
        "a.PNG": "a.Json",
        "x.y.png": "x.y.txt",
        "b.png": "b.png.txt",
        "images/c.png": "Captions/c.txt",
        "images/train/d.png": "Captions/train/d.txt",
        "e.png": "texts/e.txt",
        "f.png": "json/f.json",
    }
    strangers = {"readme.txt": b"x", "Captions/g.txt": b"x", "0_stats.json": b"{}", "a.csv": b"x"}
    images = {name: png(n) for n, name in enumerate(files)}
    path = folder_of(tmp_path / "in", images | {texts[name]: files[name] for name in texts} | strangers)
    source = open_source(path)
    assert isinstance(source, ImageText)
    expected = {name: data.decode() for name, data in files.items()}
    expected |= {"a.PNG": "json", "f.png": "a\x1eb"}
    assert {item.name: item.caption for item in source.items} == expected
    assert (source.entries.listed, source.entries.parts) == (9 + 8 + 4, 8)
    assert source.entries.passed == {"text without an image": 2, "_stats.json": 1, ".csv": 1}
    (path / "IMG.txt").write_text("lower")
    assert found(open_source(path))["IMG"].caption == "upper", "the first by name"


def test_a_text_for_images_of_several_folders_is_nobodys(tmp_path: Path) -> None:
    names = ("cat/1.png", "dog/1.png", "dog/2.png")
    texts = {"captions/1.txt": b"which?", "captions/2.txt": b"a dog"}
    source = open_source(folder_of(tmp_path / "in", {n: png(0) for n in names} | texts))
    assert [(item.caption, item.fault) for item in source.items] == [
        ("", "captions/1.txt could belong to images of several folders"),
        ("", "captions/1.txt could belong to images of several folders"),
        ("a dog", ""),
    ]


def test_boxes_of_a_detector_are_no_captions(tmp_path: Path) -> None:
    files = {"images/a.png": png(0), "labels/a.txt": b"0 0.5 0.5 0.25 0.25\n17 0.1 0.2 0.3 4e-1\n"}
    source = open_source(folder_of(tmp_path / "yolo", files))
    assert [(item.name, item.caption, item.fault) for item in source.items] == [("images/a.png", "", "")]
    assert source.entries.captioned, "so that it is said"


def test_captions_in_class_folders(tmp_path: Path) -> None:
    """Captions win over classes, and a set of which some lack one says what to do for classes."""
    files = {f"{name}/{n}.png": png(n) for name in ("cat", "dog") for n in range(2)}
    path = folder_of(tmp_path / "in", files | {"cat/0.txt": b"a cat"})
    source = open_source(path)
    assert source.classes == ("images",)
    assert [item.caption for item in source.items] == ["a cat", "", "", ""]
    assert source.entries.remarks == [
        "2 folders of images are no classes beside captions; with --source image-folder they are"
    ]
    assert open_source(path, "image-folder").classes == ("cat", "dog")


# ---------------------------------------------------------------------------------------------------------------------
# What else is known of a sample
# ---------------------------------------------------------------------------------------------------------------------

JSON = b'{"caption": "a dog", "aesthetic": 5.5, "nsfw": false, "tags": ["x"], "similarity": NaN, "other": 1}'
READING = Reading(columns=("aesthetic", "nsfw", "tags", "similarity", "missing"))
KEPT = {"aesthetic": 5.5, "nsfw": False}


@pytest.mark.parametrize(("make", "kind"), [(folder_of, ImageText), (tar_of, Shards)])
def test_chosen_keys_of_json(make: Callable[[Path, dict[str, bytes]], Path], kind: type, tmp_path: Path) -> None:
    path = make(tmp_path / "source", beside({"a": JSON, "b": b"{}"}, "json"))
    assert [item.about for item in open_source(path).items] == ["", ""]
    source = open_source(path, reading=READING)
    assert type(source) is kind
    about = [item.about for item in source.items]
    assert json.loads(about[0]) == KEPT
    assert "NaN" not in about[0]
    assert about[1] == ""


def test_a_sample_of_a_tar_file_has_them_too(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "source", beside({"a": JSON}, "json"))
    (sample,) = samples_of(path / "a.tar", Entries(), READING)
    assert json.loads(sample.about) == KEPT
