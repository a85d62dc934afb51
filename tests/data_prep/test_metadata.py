"""Metadata beside images: Hugging Face's metadata.jsonl, .csv and .parquet, and img2dataset's tables beside shards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_prep.listing.captions import parse_keys
from data_prep.listing.reading import Reading
from data_prep.passes.verify import verify
from data_prep.sources import metadata, open_source
from data_prep.sources.image_text import ImageText
from data_prep.sources.metadata import Metadata
from data_prep.sources.parquet import Parquet
from data_prep.sources.shards import Shards
from data_prep.writing import account
from megapix.errors import InputError
from megapix.shards.storage import Access
from tests.data_prep.test_several_captions import png, run
from tests.data_prep.test_text_files import folder_of, tar_of
from tests.support.foreign_shards import captions

ROWS: list[dict[str, Any]] = [
    {"file_name": "images/a.png", "text": 'a "big" dog, sleeping', "label": "dog", "aesthetic": 5.25, "id": 7},
    {"file_name": "images/B.PNG", "text": "two\nlines", "label": "cat", "aesthetic": None, "id": 8},
    {"file_name": "c.png", "text": None, "label": "dog", "aesthetic": 4, "id": 9},
]
CAPTIONS = {"images/a.png": 'a "big" dog, sleeping', "images/B.PNG": "two\nlines", "c.png": ""}
ABOUT = [{"aesthetic": 5.25, "id": 7}, {"id": 8}, {"aesthetic": 4, "id": 9}]


def table_of(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def separated(delimiter: str, end: str = "\r\n") -> str:
    lines = [
        ["file_name", "text", "label", "aesthetic", "id"],
        ["images/a.png", '"a ""big"" dog, sleeping"', "dog", "5.25", "7"],
        ["images/B.PNG", f'"two{end}lines"', "cat", "", "8"],
        ["c.png", "NaN", "dog", "4", "9"],
    ]
    return end.join(delimiter.join(line) for line in lines) + end


WRITTEN = {
    "jsonl": ("metadata.jsonl", "\n".join(json.dumps(row) for row in ROWS).encode()),
    "jsonl of Windows": ("Metadata.JSONL", ("\r\n\r\n".join(map(json.dumps, ROWS)) + "\r\n").encode("utf-8-sig")),
    "csv": ("metadata.csv", separated(",", "\n").encode()),
    "csv of Excel": ("metadata.csv", separated(";").encode("utf-8-sig")),
    "tabs in UTF-16": ("metadata.csv", ("\r\n" + separated("\t")).encode("utf-16")),
    "parquet": ("metadata.parquet", b""),
}
IMAGES = {name: png(number) for number, name in enumerate(CAPTIONS)}


def with_metadata(out: Path, rows: list[dict[str, Any]], images: dict[str, bytes] = IMAGES) -> Path:
    written = "\n".join(json.dumps(row) for row in rows)
    return folder_of(out, images | {"metadata.jsonl": written.encode()})


@pytest.mark.parametrize("form", WRITTEN)
def test_every_form_says_the_same(form: str, tmp_path: Path) -> None:
    name, data = WRITTEN[form]
    path = folder_of(tmp_path / "in", IMAGES | ({name: data} if data else {}) | {"readme.md": b"x"})
    if not data:
        table_of(path / name, ROWS)
    source = open_source(path)
    assert isinstance(source, Metadata)
    assert source.classes == ("cat", "dog")
    found = {item.name: item for item in source.items}
    assert {name: item.caption for name, item in found.items()} == CAPTIONS
    assert [found[name].label for name in CAPTIONS] == [1, 0, 1]
    assert [json.loads(found[name].about) for name in CAPTIONS] == ABOUT
    assert not any(item.fault for item in source.items)
    entries = source.entries
    assert (entries.listed, entries.parts, entries.passed) == (5, 1, {".md": 1})
    (about,) = {
        item.about for item in open_source(path, reading=Reading(columns=("id",))).items if item.name == "c.png"
    }
    assert json.loads(about) == {"id": 9}
    chosen = open_source(path, reading=Reading(parse_keys("label")))
    assert {item.name: item.caption for item in chosen.items}["c.png"] == "dog"


def test_what_has_no_partner_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"file_name": "a.png", "text": "a dog"},
        {"file_name": "gone.png", "text": "nobody"},
        {"text": "no name"},
        {"file_name": "../a.png", "text": "outside"},
        {"file_name": "a.png", "text": "the same dog"},
        {"file_name": "sub\\b.png", "text": "of Windows"},
        {"file_name": "C.PNG", "text": "another case"},
    ]
    images = {"a.png": png(0), "sub/b.png": png(1), "c.png": png(2), "d.png": png(3)}
    path = with_metadata(tmp_path / "in", rows, images)
    with open(path / "metadata.jsonl", "a") as file:
        file.write('\n{"file_name": "d.png", "te\n')
    command = ["write", path, tmp_path / "out", "--size", 16, "--workers", 1]
    assert run(*command) == 2
    assert run(*command, "--max-rejected", 0.5) == 0
    said = capsys.readouterr().out
    for line in (
        "1 of 4 images have no line of metadata",
        "1 images have several lines of metadata: all captions count",
        "4 lines of metadata name no image, or cannot be read: they are rejected",
        "1 of 4 images have no caption: it is empty there",
    ):
        assert f"data_prep: {line}\n" in said
    assert sorted(captions(tmp_path / "out")) == ["", "a dog\x1ethe same dog", "another case", "of Windows"]
    rejected = [json.loads(line) for line in (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()]
    reasons = {one["source"]: one["reason"] for one in rejected}
    assert reasons.pop("metadata.jsonl, line 8").startswith("is not JSON: Unterminated string")
    assert reasons == {
        "metadata.jsonl, line 2": "there is no file 'gone.png' beside it",
        "metadata.jsonl, line 3": "names no image in 'file_name'",
        "metadata.jsonl, line 4": "there is no file '../a.png' beside it",
    }
    counted = account.load(tmp_path / "out")
    assert counted
    assert (counted.listed, counted.used, counted.rejected, counted.parts) == (9, 4, 4, 1)


def test_numbers_and_labels(tmp_path: Path) -> None:
    """Numbers as JSON writes them are numbers, other texts stay; a label that is missing rejects its image."""
    lines = ["file_name,label,text,a,b,c", "1.png,2,7,007,1.5e3,yes", "2.png,0.0,2 dogs,1,x,", "3.png,,a cat,,,,,"]
    images = {f"{n}.png": png(n) for n in (1, 2, 3)}
    source = open_source(folder_of(tmp_path / "in", images | {"metadata.csv": "\n".join(lines).encode()}))
    assert source.classes == ("0", "1", "2")
    assert [item.label for item in source.items] == [2, 0, 0]
    assert [item.caption for item in source.items] == ["", "2 dogs", "a cat"]
    assert [json.loads(item.about or "{}") for item in source.items] == [
        {"a": "007", "b": 1500.0, "c": "yes"},
        {"a": 1, "b": "x"},
        {},
    ]
    assert [bool(item.fault) for item in source.items] == [False, False, True]
    assert "it has no class, but others have one" in source.items[2].fault


def test_class_names_are_captions_where_there_are_no_others(tmp_path: Path) -> None:
    rows = [{"file_name": name, "label": "brown_bear"} for name in IMAGES]
    source = open_source(with_metadata(tmp_path / "in", rows))
    assert {item.caption for item in source.items} == {"brown bear"}
    assert not source.entries.captioned


def test_metadata_files_in_folders(tmp_path: Path) -> None:
    """Names are relative to the file that has them; a column may be called image_file_name."""
    path = folder_of(
        tmp_path / "in",
        {f"{folder}/x/{n}.png": png(n) for folder in ("one", "two") for n in range(2)}
        | {"one/metadata.csv": b"image_file_name,text\nx/0.png,one 0\n./x/1.png,one 1\n"}
        | {"two/metadata.jsonl": b'{"file_name": "x/0.png", "text": "two 0"}\n'}
        | {"two/x/metadata.csv": b"id,what\n1,stranger\n"},
    )
    source = open_source(path)
    assert [(item.name, item.caption) for item in source.items] == [
        ("one/x/0.png", "one 0"),
        ("one/x/1.png", "one 1"),
        ("two/x/0.png", "two 0"),
        ("two/x/1.png", ""),
    ]
    assert (source.entries.parts, source.entries.passed) == (2, {".csv": 1})


def test_splits_are_not_mixed(tmp_path: Path) -> None:
    images = {f"{split}/{n}.png": png(n) for split in ("train", "test") for n in range(2)}
    rows = [{"file_name": name, "text": name} for name in images]
    path = with_metadata(tmp_path / "in", rows, images)
    assert [item.caption for item in open_source(path).items] == ["train/0.png", "train/1.png"]
    source = open_source(path, reading=Reading(split="test"))
    assert [item.caption for item in source.items] == ["test/0.png", "test/1.png"]
    assert source.about["split"] == "test"


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("metadata.csv", b"file_name,text\n1.png,caf\xe9\n", "metadata.csv: byte 24 is not UTF-8 text"),
        ("metadata.csv", b'file_name,text\n1.png,"never\nends\n', "metadata.csv: line 2: unexpected end of data"),
        ("metadata.parquet", b"PAR1", "metadata.parquet: cannot be read as a parquet file"),
        ("metadata.csv", b"name,text\n1.png,a\n", r"with a column 'file_name'; metadata.csv has \['name', 'text'\]"),
    ],
)
def test_damaged_metadata(name: str, data: bytes, words: str, tmp_path: Path) -> None:
    path = folder_of(tmp_path / "in", {"1.png": png(1), name: data})
    with pytest.raises(InputError, match=words):
        open_source(path, "metadata")


def test_columns_that_are_not_there(tmp_path: Path) -> None:
    path = with_metadata(tmp_path / "in", ROWS)
    with pytest.raises(InputError, match=r"column 'long'.* not there; it has \['file_name', 'text', 'label',"):
        open_source(path, reading=Reading(parse_keys("long")))


# ---------------------------------------------------------------------------------------------------------------------
# Parquet files that hold the images, and img2dataset's that lie beside them
# ---------------------------------------------------------------------------------------------------------------------


def test_chosen_columns_of_parquet_files(tmp_path: Path) -> None:
    from datetime import date
    from decimal import Decimal

    rows = [
        {"image": png(0), "text": "a dog", "score": Decimal("1.50"), "day": date(2024, 2, 29), "tags": ["x"]},
        {"image": png(1), "text": " a cat\n", "score": None, "day": None, "tags": []},
    ]
    path = table_of(tmp_path / "in" / "a.parquet", rows)
    assert {item.about for item in open_source(path).items} == {""}
    source = open_source(path, reading=Reading(columns=("score", "day", "tags", "text")))
    assert [item.caption for item in source.items] == ["a dog", "a cat"]
    assert [json.loads(item.about) for item in source.items] == [
        {"score": 1.5, "day": "2024-02-29", "text": "a dog"},
        {"text": " a cat\n"},
    ]
    assert {item.about for item in open_source(path, reading=Reading(columns=("long",))).items} == {""}


TABLE = [
    {"key": "000000000", "status": "success", "caption": "of the table", "similarity": 0.25},
    {"key": "000000001", "status": "success", "caption": "not this", "similarity": 0.5},
    {"key": "000000002", "status": "failed_to_download", "caption": "no image", "similarity": 0.75},
    {"key": "000000003", "status": "success", "caption": None, "similarity": float("nan")},
]
SHARD = {
    "000000000.jpg": png(0),
    "000000001.jpg": png(1),
    "000000001.json": b'{"caption": "of the JSON", "similarity": 1}',
    "000000003.jpg": png(3),
}
OF_TABLE = ["of the table", "of the JSON", ""]


def img2dataset_tars(out: Path) -> Path:
    tar_of(out, SHARD)
    (out / "a.tar").rename(out / "00000.tar")
    table_of(out / "00000.parquet", TABLE)
    (out / "00000_stats.json").write_text("{}")
    return out


def img2dataset_files(out: Path) -> Path:
    folder_of(out, {f"00000/{name}": data for name, data in SHARD.items()} | {"00000_stats.json": b"{}"})
    table_of(out / "00000.parquet", TABLE)
    return out


@pytest.mark.parametrize(
    ("make", "kind", "parts"), [(img2dataset_tars, Shards, 2), (img2dataset_files, ImageText, 2)], ids=["tars", "files"]
)
def test_img2datasets_tables(make: Any, kind: type, parts: int, tmp_path: Path) -> None:
    path = make(tmp_path / "in")
    source = open_source(path, reading=Reading(columns=("similarity",)))
    assert type(source) is kind
    assert [item.caption for item in source.items] == OF_TABLE
    assert [item.about for item in source.items] == ['{"similarity": 0.25}', '{"similarity": 1}', ""]
    assert (source.entries.listed, source.entries.parts) == (6, parts)
    assert source.entries.passed == {"_stats.json": 1}
    for file in path.rglob("*.json"):
        file.unlink()
    (path / "00000.parquet").write_bytes(b"PAR1 and nothing")
    assert "00000.parquet cannot be read as a parquet file" in open_source(path).items[0].fault


def test_a_table_beside_images_alone(tmp_path: Path) -> None:
    """No text and no JSON at all: the folder is not mistaken for parquet files with images inside."""
    files = folder_of(tmp_path / "files", {"00000/000000000.png": png(0)})
    table_of(files / "00000.parquet", TABLE)
    assert isinstance(open_source(files), ImageText)
    members = tar_of(tmp_path / "tars", {"000000000.png": png(0)})
    table_of(members / "a.parquet", TABLE)
    source = open_source(members)
    assert isinstance(source, Shards)
    assert source.items[0].caption == "of the table"
    inside = tmp_path / "inside"
    table_of(inside / "train.parquet", [{"image": png(0), "text": "a dog"}])
    (inside / "train").mkdir()
    assert isinstance(open_source(inside), Parquet)


def test_an_index_reads_the_tables(tmp_path: Path) -> None:
    path = img2dataset_tars(tmp_path / "in")
    assert run("index", path, "--out", tmp_path / "index", "--size", 16, "--workers", 1) == 0
    assert captions(tmp_path / "index") == OF_TABLE
    assert list(verify(tmp_path / "index", 1, Access(30.0, 5), progress=False)) == []


def test_a_metadata_file_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,a dog\n")
    seen: list[Path] = []
    read = metadata.read
    monkeypatch.setattr(metadata, "read", lambda path: (seen.append(path), read(path))[1])
    for times in (1, 2):
        assert [item.caption for item in open_source(tmp_path).items] == ["a dog"]
        assert len(seen) == times
