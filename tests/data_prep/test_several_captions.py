"""Several captions of a sample, from real files of every kind that has them to `captions.bin`, and what is refused."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from data_prep import cli
from data_prep.listing.captions import CaptionKeys, parse_keys
from data_prep.listing.reading import Reading
from data_prep.passes.verify import verify
from data_prep.sources import open_source
from data_prep.sources.image_text import ImageText
from data_prep.sources.parquet import Parquet
from data_prep.sources.shards import Shards
from megapix.errors import InputError
from megapix.files import sha256_of
from megapix.shards.captions import Caption, unpack
from megapix.shards.index import CAPTIONS_NAME, INDEX_NAME, TABLE_NAME, read_index
from megapix.shards.storage import Access
from megapix.shards.table import RECORD, Captions
from tests.data_prep.test_sources import add
from tests.shards.test_images import encoded
from tests.support.foreign_shards import captions
from tests.support.version_2 import make_listed

SEVERAL = {"captions": ["a dog", {"text": "a brown dog – ü", "weight": 0.25}, None, {"text": "dog"}], "url": "…"}
PACKED = "a dog\x1ea brown dog – ü\x1f0.25\x1edog"


def png(number: int) -> bytes:
    return encoded(Image.fromarray(np.full((16, 16, 3), number, np.uint8)))


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command ends with code 2."""
    capsys.readouterr()
    assert run(*arguments) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("data_prep:")]
    return line


# ---------------------------------------------------------------------------------------------------------------------
# Pairs and tar files: the same texts beside the images, as files or as members
# ---------------------------------------------------------------------------------------------------------------------

BESIDE: dict[str, dict[str, Any]] = {
    "a": {"txt": "alt", "json": SEVERAL},
    "b": {"txt": "alt", "json": {"caption": "no", "captions": []}},
    "c": {"json": {"caption": "one"}},
    "d": {"txt": "alt"},
    "e": {"json": {"caption": None, "long": ["l1", "l2"], "short": "s"}},
    "f": {"json": {"captions": "one text", "short": {"text": "s", "weight": 4}}},
}
EXPECTED = {"a": PACKED, "b": "alt", "c": "one", "d": "alt", "e": "", "f": "one text"}
CHOSEN = {"a": "", "b": "", "c": "", "d": "", "e": "l1\x1f0.75\x1el2\x1f0.75\x1es\x1f0.5", "f": "s"}
"""With --captions long=0.75,short=0.5."""


def pairs(out: Path, beside: dict[str, dict[str, Any]] = BESIDE) -> Path:
    out.mkdir()
    for number, (key, texts) in enumerate(beside.items()):
        (out / f"{key}.png").write_bytes(png(number))
        for ending, content in texts.items():
            (out / f"{key}.{ending}").write_text(content if ending == "txt" else json.dumps(content), "utf-8")
    return out


def tars(out: Path, beside: dict[str, dict[str, Any]] = BESIDE) -> Path:
    """Two tar files, laid out as img2dataset's."""
    out.mkdir()
    for tar_number in range(2):
        with tarfile.open(out / f"{tar_number:05d}.tar", "w") as tar:
            for number, (key, texts) in list(enumerate(beside.items()))[tar_number::2]:
                add(tar, f"{key}.png", png(number))
                for ending, content in texts.items():
                    add(tar, f"{key}.{ending}", (content if ending == "txt" else json.dumps(content)).encode())
    return out


def keyed(source: Any) -> dict[str, str]:
    return {Path(item.name).stem: item.caption for item in source.items}


@pytest.mark.parametrize(("make", "kind"), [(pairs, ImageText), (tars, Shards)])
def test_texts_beside_the_images(make: Callable[[Path], Path], kind: type, tmp_path: Path) -> None:
    path = make(tmp_path / "source")
    source = open_source(path)
    assert type(source) is kind
    assert keyed(source) == EXPECTED
    assert "captions" not in source.about
    chosen = open_source(path, reading=Reading(parse_keys("long=0.75,short=0.5")))
    assert keyed(chosen) == CHOSEN
    assert chosen.about["captions"] == "long=0.75,short=0.5"


def test_an_index_has_the_same_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = tars(tmp_path / "theirs")
    command = ["index", theirs, "--size", 16, "--workers", 1, "--out"]
    assert run(*command, tmp_path / "plain") == 0
    assert dict(zip("acebdf", captions(tmp_path / "plain"), strict=True)) == EXPECTED
    assert run(*command, tmp_path / "chosen", "--captions", "long=0.75,short=0.5") == 0
    assert dict(zip("acebdf", captions(tmp_path / "chosen"), strict=True)) == CHOSEN
    for name, recorded in (("plain", None), ("chosen", "long=0.75,short=0.5")):
        for file in ("plan.json", INDEX_NAME):
            data = json.loads((tmp_path / name / file).read_text())
            assert data.get("source", data).get("captions") == recorded
        assert run("verify", tmp_path / name, "--workers", 1) == 0, "by the keys of the index"
    line = refused(capsys, *command, tmp_path / "plain", "--captions", "long")
    assert "begun with captions = None, this command has 'long'" in line
    line = refused(capsys, *command, tmp_path / "chosen")
    assert "begun with captions = 'long=0.75,short=0.5', this command has None" in line
    assert run(*command, tmp_path / "chosen", "--captions", "long=0.75, short=0.5") == 0, "the same option"
    (tmp_path / "chosen" / INDEX_NAME).unlink()
    assert run(*command, tmp_path / "chosen", "--captions", "long=0.75,short=0.5") == 0, "from the receipts"


def test_keys_that_no_sample_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files, members = pairs(tmp_path / "pairs"), tars(tmp_path / "tars")
    for source in (files, members):
        line = refused(capsys, "write", source, tmp_path / "out", "--size", 16, "--captions", "short,blip")
        assert f"source '{source}': --captions names 'blip', but not one sample has this key in its JSON" in line
        left = [path.name for path in (tmp_path / "out").iterdir()] if (tmp_path / "out").exists() else []
        assert left == ([".lists"] if source == members else []), "what is listed is not listed again"
    command = ["index", members, "--out", tmp_path / "index", "--size", 16, "--workers", 1, "--captions", "blip"]
    for _ in range(2):  # from the tar files, and then from the receipts
        line = refused(capsys, *command)
        assert f"{str(members)!r}: --captions names 'blip', but not one sample has this key in its JSON" in line
        assert not (tmp_path / "index" / INDEX_NAME).exists()
    (tmp_path / "classes" / "dog").mkdir(parents=True)
    (tmp_path / "classes" / "dog" / "a.png").write_bytes(png(0))
    line = refused(capsys, "write", tmp_path / "classes", tmp_path / "out", "--size", 16, "--captions", "text")
    assert "which --source image-folder has not; expected parquet, image-text, shards" in line
    line = refused(capsys, "write", files, tmp_path / "out", "--size", 16, "--captions", "long=none")
    assert "--captions 'long=none': the weight of 'long' is 'none', expected a finite number above 0" in line


@pytest.mark.parametrize("weight", ['"heavy"', "0", "-2", "NaN", "Infinity", "true", "1" + "0" * 400])
def test_bad_weights(weight: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In a pair an error that names the file; in a tar file the sample is rejected."""
    bad = f'{{"captions": ["fine", {{"text": "bad dog", "weight": {weight}}}]}}'
    files = pairs(tmp_path / "pairs")
    (files / "c.json").write_text(bad)
    line = refused(capsys, "write", files, tmp_path / "out", "--size", 16)
    assert f"{files / 'c.json'}: the weight of caption 'bad dog' is " in line
    assert line.endswith(", expected a finite number above 0")
    members = tars(tmp_path / "tars", {"a": BESIDE["a"]})
    with tarfile.open(members / "00001.tar", "w") as tar:
        add(tar, "bad.png", png(7))
        add(tar, "bad.json", bad.encode())
    index = ["index", members, "--out", tmp_path / "index", "--size", 16, "--workers", 1]
    write = ["write", members, tmp_path / "out", "--size", 16, "--workers", 1]
    for command, out in ((index, tmp_path / "index"), (write, tmp_path / "out")):
        assert "'00001.tar/bad.png': the weight of caption 'bad dog' is" in refused(capsys, *command)
        assert run(*command, "--max-rejected", 0.5) == 0
        assert captions(out) == [PACKED]
        rejected = json.loads((out / "rejected.jsonl").read_text())
        assert rejected["source"] == "00001.tar/bad.png"
        assert rejected["reason"].startswith("the weight of caption 'bad dog' is")


# ---------------------------------------------------------------------------------------------------------------------
# Parquet
# ---------------------------------------------------------------------------------------------------------------------


def table(path: Path, **columns: Any) -> Path:
    """A parquet file of two rows, each a row group."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pyarrow.table({"image": [png(0), png(1)], **columns}), path, row_group_size=1)
    return path


def texts(path: Path, keys: CaptionKeys = ()) -> list[str]:
    source = open_source(path, reading=Reading(keys))
    assert isinstance(source, Parquet)
    return [item.caption for item in source.items]


def test_parquet_columns(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    lists = pyarrow.array([["a dog", "", None, "dog"], ["a cat"]], pyarrow.list_(pyarrow.string()))
    structs = pyarrow.array(
        [[{"text": "a dog", "weight": 0.5}, {"text": "dog", "weight": None}], None],
        pyarrow.list_(pyarrow.struct([("text", pyarrow.string()), ("weight", pyarrow.float64())])),
    )
    weights = pyarrow.array([[0.5, 9.0, -1.0, 2.0], None], pyarrow.list_(pyarrow.float32()))
    assert texts(table(path, caption=["a dog", None])) == ["a dog", ""]
    assert texts(table(path, text=lists)) == ["a dog\x1edog", "a cat"]
    assert texts(table(path, captions=structs)) == ["a dog\x1f0.5\x1edog", ""]
    assert texts(table(path, captions=lists, caption=["one", "two"])) == ["one", "two"], "as before"
    assert texts(table(path, captions=lists, caption_weights=weights)) == ["a dog\x1f0.5\x1edog\x1f2.0", "a cat"]
    assert texts(table(path, caption=["one", "two"], caption_weights=weights)) == ["one", "two"]
    large = lists.cast(pyarrow.large_list(pyarrow.large_string()))
    assert texts(table(path, caption=large, caption_weights=weights))[0] == "a dog\x1f0.5\x1edog\x1f2.0"
    path = table(path, alts=lists, caption_weights=weights, long=["l1", "l2"], own=structs, caption=["no", "no"])
    keys = parse_keys("long=0.75,alts=0.5,own")
    assert texts(path, keys) == [
        "l1\x1f0.75\x1ea dog\x1f0.25\x1edog\x1ea dog\x1f0.5\x1edog",
        "l2\x1f0.75\x1ea cat\x1f0.5",
    ]
    assert open_source(path, reading=Reading(keys)).about["captions"] == "long=0.75,alts=0.5,own"


def test_bad_parquet_captions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow")
    path = tmp_path / "a.parquet"
    command = ["write", path, tmp_path / "out", "--size", 16]
    table(path, long=["a", "b"])
    line = refused(capsys, *command, "--captions", "long,short=0.5")
    assert line.endswith(f"{path}: --captions names column 'short', which is not there; it has ['image', 'long']")
    two = [["a", "b"], ["c"]]
    for columns, words in (
        (
            {"caption": two, "caption_weights": [[1.0, 2.0], [0.0]]},
            "row group 1, row 0: caption: the weight of caption 'c' is 0.0, exp",
        ),
        (
            {"caption": two, "caption_weights": [[1.0, float("nan")], [1.0]]},
            "row 0: caption: the weight of caption 'b' is nan, exp",
        ),
        ({"caption": two, "caption_weights": [["1", "heavy"], ["1"]]}, "the weight of caption 'a' is '1', expected a"),
        ({"caption": two, "caption_weights": [[1.0], [1.0]]}, "2 captions, but 1 in caption_weights; expected as many"),
        ({"caption": [{"name": "a"}, None]}, "row group 0, row 0: caption: a caption is \"{'name': 'a'}\", expected"),
        ({"caption": [[b"a"], [b"b"]]}, "row group 0, row 0: caption: a caption is \"b'a'\", expected a text"),
        ({"caption": [b"a", b"b"]}, "row group 0, row 0: caption: a caption is \"b'a'\", expected a text"),
    ):
        table(path, **columns)
        line = refused(capsys, *command)
        assert f"{path}: row group " in line
        assert words in line
    table(path, a=two, b=two, caption_weights=[[1.0, 2.0], [1.0]])
    line = refused(capsys, *command, "--captions", "a,b")
    assert "column 'caption_weights' gives the weights of one column of lists, but --captions names ['a', 'b']" in line


# ---------------------------------------------------------------------------------------------------------------------
# Our own shards
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    """Shards of the pairs, with several captions, one, and none."""
    command = ["write", pairs(tmp_path / "pairs"), tmp_path / "ours", "--size", 16, "--samples-per-shard", 4]
    assert run(*command, "--workers", 1) == 0
    return tmp_path / "ours"


def test_our_own_shards_come_back(ours: Path, tmp_path: Path) -> None:
    urls = [str(path) for path in sorted(ours.glob("shard-*.tar"))]
    members = [sample["json"] for sample in webdataset.WebDataset(urls, shardshuffle=False).decode()]
    assert {member["source"]: member for member in members} == {
        "a.png": {
            "source": "a.png",
            "captions": [
                {"text": "a dog", "weight": 1.0},
                {"text": "a brown dog – ü", "weight": 0.25},
                {"text": "dog", "weight": 1.0},
            ],
        },
        **{f"{key}.png": {"source": f"{key}.png", "caption": EXPECTED[key]} for key in "bcdef"},
    }
    assert captions(ours) == [EXPECTED[member["source"][0]] for member in members]
    assert "captions" not in json.loads((ours / "plan.json").read_text())
    assert run("verify", ours, "--workers", 1) == 0
    assert run("index", ours, "--out", tmp_path / "index", "--size", 16, "--workers", 1) == 0
    assert (tmp_path / "index" / CAPTIONS_NAME).read_bytes() == (ours / CAPTIONS_NAME).read_bytes()
    assert run("verify", tmp_path / "index", "--workers", 1) == 0
    assert run("write", ours, tmp_path / "again", "--size", 16, "--workers", 1) == 0
    assert sorted(captions(tmp_path / "again")) == sorted(EXPECTED.values())
    chosen = [
        "write",
        tmp_path / "pairs",
        tmp_path / "chosen",
        "--size",
        16,
        "--workers",
        1,
        "--captions",
        "short,long",
    ]
    assert run(*chosen) == 0
    assert json.loads((tmp_path / "chosen" / "plan.json").read_text())["captions"] == "short,long"
    assert sorted(captions(tmp_path / "chosen")) == ["", "", "", "", "s", "s\x1el1\x1el2"]
    assert run("verify", tmp_path / "chosen", "--workers", 1) == 0, "by its own keys, not those of its source"


def test_the_reader_gives_several_captions(ours: Path) -> None:
    reader = Captions(ours, read_index(ours))
    found = [reader.of(sample) for sample in range(6)]
    assert found == [unpack(text) for text in captions(ours)]
    assert (Caption("a dog"), Caption("a brown dog – ü", 0.25), Caption("dog")) in found
    assert (Caption(""),) in found


def change(folder: Path, captions_bin: bytes, **fields: int) -> None:
    """Put in other captions (and other fields into the first record), with an index that lists their hashes."""
    (folder / CAPTIONS_NAME).write_bytes(captions_bin)
    data = (folder / TABLE_NAME).read_bytes()
    record = list(RECORD.unpack_from(data))
    for name, value in fields.items():
        record[("caption_offset", "caption_size").index(name) + 5] = value
    (folder / TABLE_NAME).write_bytes(RECORD.pack(*record) + data[RECORD.size :])
    index = json.loads((folder / INDEX_NAME).read_text())
    index["captions_sha256"], index["table_sha256"] = (sha256_of(folder / n) for n in (CAPTIONS_NAME, TABLE_NAME))
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_captions_that_cannot_be_read(ours: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Verify, inspect and the reader each name file and sample."""
    whole = (ours / CAPTIONS_NAME).read_bytes()
    bad = captions(ours).index(PACKED)
    for weight, reason in ((b"-.25", "is '-.25', expected a finite number above 0"), (b"many", "to float: 'many'")):
        change(ours, whole.replace(b"0.25", weight))
        reader = Captions(ours, read_index(ours))
        with pytest.raises(InputError, match=rf"{CAPTIONS_NAME}: the captions of sample {bad}: .*{reason}"):
            reader.of(bad)
        assert f"{CAPTIONS_NAME}: the captions of sample {bad}: " in refused(capsys, "inspect", ours)
        faults = [fault.partition(": sample ")[2] for fault in verify(ours, 1, Access(30.0, 5), progress=False)]
        assert faults[0] == f"{bad:09d}: the caption differs from captions.bin"
        assert faults[1].startswith(f"{bad:09d}: its captions in captions.bin cannot be told apart: ")
        assert faults[1].endswith(reason)
        assert len(faults) == 2
    change(ours, whole, caption_offset=len(whole) - 1, caption_size=2)
    reader = Captions(ours, read_index(ours))
    with pytest.raises(InputError, match=r"captions of sample 0: 2 bytes at byte \d+ are past its end"):
        reader.of(0)
    empty = tmp_path / "empty"
    assert run("write", pairs(tmp_path / "none", {"e": BESIDE["e"]}), empty, "--size", 16, "--workers", 1) == 0
    assert Captions(empty, read_index(empty)).of(0) == (Caption(""),)


def spoil(folder: Path, old: bytes, new: bytes) -> None:
    """Put other bytes into the shards, with an index that lists their hashes."""
    assert len(old) == len(new)
    if (folder / "shards.bin").exists():
        make_listed(folder)
    index = json.loads((folder / INDEX_NAME).read_text())
    for entry in index["shards"]:
        path = folder / entry["name"]
        path.write_bytes(path.read_bytes().replace(old, new))
        entry["sha256"] = sha256_of(path)
    (folder / INDEX_NAME).write_text(json.dumps(index))


def test_verify_reads_the_json_of_the_samples(ours: Path) -> None:
    several, one = (f"{captions(ours).index(text):09d}" for text in (PACKED, "one text"))

    def faults() -> list[str]:
        return sorted(fault.partition(": sample ")[2] for fault in verify(ours, 1, Access(30.0, 5), progress=False))

    spoil(ours, b'"weight": 0.25', b'"weight": 0.75')
    spoil(ours, b'"one text"', b'"one word"')
    assert faults() == sorted(f"{key}: the caption differs from captions.bin" for key in (several, one))
    spoil(ours, b'"one word"', b'"one text"')
    spoil(ours, b'"weight": 0.75', b'"weight": -.75')
    (fault,) = faults()
    assert fault.startswith(f"{several}: its json member is not JSON: Expecting value")
    spoil(ours, b'"weight": -.75', b'"weight": -7.5')
    assert faults() == [f"{several}: the weight of caption 'a brown dog – ü' is -7.5, expected a finite number above 0"]


def test_inspect_counts_captions(ours: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert run("inspect", ours) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("  captions "))
    order = captions(ours)
    place = order.index(PACKED)
    distinct = dict.fromkeys(caption.text for text in order for caption in unpack(text) if caption.text)
    assert (
        lines[start : start + 6]
        == [
            "  captions     7 in 6 samples: 0 fewest, 1 median, 3 most of a sample; 1 samples without any",
            "               6 different, 1 duplicates",
            "               characters: 3 shortest, 3 median, 15 95th percentile, 15 longest",  # 3 3 3 3 5 8 15
            "               words: 1 shortest, 1 median, 5 95th percentile, 5 longest",  # 1 1 1 1 2 2 5
            f"               longest: sample {place} in shard-{place // 4:06d}.tar, 'a brown dog – ü'",
            f"               such as {', '.join(map(repr, list(distinct)[:3]))}",
        ]
    )
