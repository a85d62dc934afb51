"""Every kind of source, made here as it ships, comes out as the same shards as the image folder it was made from."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset
from PIL import Image

from data_prep.listing.base import Item, Source
from data_prep.listing.reading import Reading
from data_prep.sources import open_source
from data_prep.sources.edm2_zip import Edm2Zip
from data_prep.sources.image_folder import ImageFolder
from data_prep.sources.image_text import ImageText
from data_prep.sources.imagenet import SynsetTars
from data_prep.sources.labelled import LabelledImages
from data_prep.sources.metadata import Metadata
from data_prep.sources.parquet import Parquet
from data_prep.sources.shards import Shards
from data_prep.writing import plan as planning
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.errors import InputError
from megapix.shards.image_policy import Policy
from megapix.shards.storage import Access
from tests.support.made_shards import OPTIONS
from tests.support.version_2 import make_listed

SYNSETS = ("n01440764", "n01443537", "n02085620")


def files(image_folder: Path) -> list[tuple[int, Path]]:
    """(class number, file) of every image of the fixture."""
    classes = sorted(entry.name for entry in image_folder.iterdir())
    return [(classes.index(p.relative_to(image_folder).parts[0]), p) for p in sorted(image_folder.rglob("*.png"))]


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def synset_tars(image_folder: Path, out: Path) -> Path:
    out.mkdir()
    for label, synset in enumerate(SYNSETS):
        with tarfile.open(out / f"{synset}.tar", "w") as tar:
            for number, path in files(image_folder):
                if number == label:
                    add(tar, f"{synset}_{path.stem}.JPEG", path.read_bytes())
    (out / "README.txt").write_text("not a tar")
    return out


def tar_of_tars(image_folder: Path, out: Path) -> Path:
    folder = synset_tars(image_folder, out.parent / "synsets")
    with tarfile.open(out.with_suffix(".tar"), "w") as tar:
        for path in sorted(folder.glob("*.tar"), reverse=True):
            tar.add(path, path.name)
    return out.with_suffix(".tar")


def edm2_zip(image_folder: Path, out: Path) -> Path:
    path = out.with_suffix(".zip")
    labels = []
    with zipfile.ZipFile(path, "w") as archive:
        for label, file in files(image_folder):
            name = f"00000/img{file.stem}.png"
            archive.write(file, name)
            labels.append([name, label])
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return path


def existing_shards(image_folder: Path, out: Path) -> Path:
    out.mkdir()
    chosen = files(image_folder)
    for number in range(2):
        with open(out / f"{number:05d}.tar", "wb") as file, webdataset.TarWriter(file) as tar:
            for label, path in chosen[number::2]:
                sample = {"__key__": f"sub/{path.stem}", "png": path.read_bytes(), "cls": label, "txt": f"no {label}"}
                tar.write(sample)
    return out


def flat_folder(image_folder: Path, out: Path) -> Path:
    out.mkdir()
    for _, path in files(image_folder):
        (out / path.name).write_bytes(path.read_bytes())
    (out.parent / "labels.txt").write_text(
        "".join(f"{path.name} {SYNSETS[label]}\n" for label, path in files(image_folder))
    )
    return out


def flat_tar(image_folder: Path, out: Path) -> Path:
    ordered = sorted(files(image_folder), key=lambda pair: pair[1].name)
    with tarfile.open(out.with_suffix(".tar"), "w") as tar:
        for _, path in reversed(ordered):
            add(tar, path.name, path.read_bytes())
    (out.parent / "labels.txt").write_text("".join(f"{label}\n" for label, _ in ordered))
    return out.with_suffix(".tar")


def image_text(image_folder: Path, out: Path) -> Path:
    for place, (label, path) in enumerate(files(image_folder)):
        folder = out / f"{place % 2:05d}"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / path.name).write_bytes(path.read_bytes())
        if place % 3:
            (folder / f"{path.stem}.txt").write_text(f"no {label}\n", "utf-8")
        else:
            (folder / f"{path.stem}.json").write_text(json.dumps({"caption": f"no {label}", "sha256": "…"}), "utf-8")
    return out


def metadata(image_folder: Path, out: Path) -> Path:
    lines = ["file_name,text,label"]
    for place, (label, path) in enumerate(files(image_folder)):
        (out / f"part{place % 2}").mkdir(parents=True, exist_ok=True)
        (out / f"part{place % 2}" / path.name).write_bytes(path.read_bytes())
        lines.append(f"part{place % 2}/{path.name},no {label},{SYNSETS[label]}")
    (out / "metadata.csv").write_text("\n".join(lines))
    return out


def parquet(image_folder: Path, out: Path) -> Path:
    """Two files as `datasets` writes them: a struct of bytes and path, a ClassLabel, small row groups."""
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    out.mkdir()
    features = {"image": {"_type": "Image"}, "label": {"names": list(SYNSETS), "_type": "ClassLabel"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    chosen = files(image_folder)
    for number in range(2):
        rows = chosen[number::2]
        table = pyarrow.table(
            {
                "image": [{"bytes": path.read_bytes(), "path": path.name} for _, path in rows],
                "label": pyarrow.array([label for label, _ in rows], pyarrow.int64()),
                "text": [f"no {label}" for label, _ in rows],
            }
        )
        name = out / f"train-{number:05d}-of-00002.parquet"
        pq.write_table(table.replace_schema_metadata(about), name, row_group_size=6)
    return out


KINDS: dict[str, tuple[Callable[[Path, Path], Path], type, tuple[str, ...]]] = {
    "synset tars": (synset_tars, SynsetTars, SYNSETS),
    "tar of tars": (tar_of_tars, SynsetTars, SYNSETS),
    "edm2 zip": (edm2_zip, Edm2Zip, ("0", "1", "2")),
    "shards": (existing_shards, Shards, ("0", "1", "2")),
    "flat folder": (flat_folder, LabelledImages, SYNSETS),
    "parquet": (parquet, Parquet, SYNSETS),
    "image-text": (image_text, ImageText, ("images",)),
    "metadata": (metadata, Metadata, SYNSETS),
    "flat tar": (flat_tar, LabelledImages, ("0", "1", "2")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_sources(kind: str, image_folder: Path, tmp_path: Path) -> None:
    make, expected_type, classes = KINDS[kind]
    path = make(image_folder, tmp_path / "source")
    labels = tmp_path / "labels.txt"
    source: Source = open_source(path, reading=Reading(labels=labels if labels.exists() else None))
    assert type(source) is expected_type, "recognised"
    assert tuple(source.classes) == classes
    assert len(pickle.dumps(source.reader)) < 1000, "the list does not travel with every shard"
    out = tmp_path / "out"
    write(source, out, OPTIONS, workers=1, progress=False)
    urls = [str(shard) for shard in sorted(out.glob("shard-*.tar"))]
    found = sorted(
        (s["cls"], s["png"].tobytes()) for s in webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    )
    folder = ImageFolder.open(image_folder)
    direct = tmp_path / "direct"
    write(folder, direct, OPTIONS, workers=1, progress=False)
    urls = [str(shard) for shard in sorted(direct.glob("shard-*.tar"))]
    expected = sorted(
        (s["cls"], s["png"].tobytes()) for s in webdataset.WebDataset(urls, shardshuffle=False).decode("pil")
    )
    if kind == "image-text":
        expected = [(0, data) for data in sorted(data for _, data in expected)]
    assert found == expected
    if kind in ("shards", "parquet", "image-text", "metadata"):
        assert {item.caption for item in source.items} == {"no 0", "no 1", "no 2"}


def test_our_own_shards_are_a_source_with_class_names(shards: Path, tmp_path: Path) -> None:
    source = open_source(shards)
    assert isinstance(source, Shards)
    assert source.classes == ("blue", "green", "red")
    assert {item.caption for item in source.items} == {"blue", "green", "red"}


def test_bad_sources(image_folder: Path, tmp_path: Path) -> None:
    flat = flat_folder(image_folder, tmp_path / "flat")
    labels = tmp_path / "labels.txt"
    lines = labels.read_text().splitlines()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a.png", b"")
        archive.writestr("dataset.json", "{}")
    hollow = tmp_path / "hollow"
    hollow.mkdir()
    loop = tmp_path / "loop" / "class"
    loop.mkdir(parents=True)
    (loop / "again").symlink_to(tmp_path / "loop")
    cases: list[tuple[Callable[[], object], str]] = [
        (lambda: open_source(tmp_path / "none"), "does not exist"),
        (lambda: open_source(hollow), "of no known kind .* expected images, such as one folder of them for each class"),
        (lambda: open_source(flat, name="edm-zip"), "'edm-zip' is not a kind of source .did you mean 'edm2-zip'"),
        (lambda: open_source(flat, name="shards", reading=Reading(labels=labels)), "not with --source shards"),
        (lambda: open_source(tmp_path / "other.zip"), "dataset.json holds no list 'labels'"),
        (lambda: open_source(tmp_path / "loop"), "class' holds no image"),
        (lambda: open_source(Path("a" * 300)), "cannot be read: File name too long"),
        (lambda: open_source(flat, reading=Reading(labels=tmp_path / "none.txt")), "none.txt: cannot be read"),
    ]
    for call, message in cases:
        with pytest.raises(InputError, match=message):
            call()
    for text, message in (
        ("\n".join(["n01440764"] * 39), "has 39 lines, but there are 40 images"),
        ("\n".join(["other.png n01440764"] * 40), "not one line names an image such as '00.png'"),
        ("\n".join([*lines[:-1], "a b c"]), "expected LABEL, or NAME LABEL"),
    ):
        labels.write_text(text)
        with pytest.raises(InputError, match=message):
            open_source(flat, reading=Reading(labels=labels))


def test_what_may_not_be_read_is_named(image_folder: Path, tmp_path: Path) -> None:
    """As another user than root, whom no mode keeps out."""
    import os
    import shutil

    source = tmp_path / "images"
    shutil.copytree(image_folder, source)
    (source / "red").chmod(0)
    try:
        if os.getuid() == 0:
            for folder in (source, tmp_path, *tmp_path.parents):
                if "pytest" in str(folder):
                    folder.chmod(0o755)
            os.seteuid(65534)
        with pytest.raises(InputError, match=r"/red' cannot be read: Permission denied"):
            open_source(source)
    finally:
        if os.getuid() == 0:
            os.seteuid(0)
        (source / "red").chmod(0o755)


def test_a_shard_reads_few_row_groups(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shuffled sample by sample, each shard would read from nearly all of the groups."""
    source = open_source(parquet(image_folder, tmp_path / "source"))
    jobs = list(planning.jobs(source.items, Options(Policy.make("crop", 16), samples_per_shard=10)))
    assert sorted(item.name for job in jobs for item in job.items) == sorted(item.name for item in source.items)
    groups = [{item.chunk for item in job.items} for job in jobs]
    assert len({item.chunk for item in source.items}) == 8
    assert max(len(some) for some in groups) <= 4
    from data_prep.sources import parquet as source_file

    loads: list[object] = []
    load = source_file._load
    monkeypatch.setattr(source_file, "_load", lambda *key: loads.append(key) or load(*key))
    source_file._held.clear()
    monkeypatch.setattr(
        source_file, "HELD_BYTES", 4 * max(load(*item.place[:2], "image").nbytes for item in source.items)
    )
    for job in jobs:
        for item in job.items:
            source.reader.read(item, 16)
    assert len(loads) <= 2 * 8, "each group about once, with room for a shard's groups"
    labels = [item.label for item in jobs[0].items]
    assert labels != sorted(labels), "shuffled inside"


def test_bad_parquet_files(image_folder: Path, tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    png = next(image_folder.rglob("*.png")).read_bytes()

    def table(name: str, **columns: object) -> Path:
        pq.write_table(pyarrow.table(columns), tmp_path / f"{name}.parquet")
        return tmp_path / f"{name}.parquet"

    (tmp_path / "damaged.parquet").write_bytes(b"PAR1 and nothing")
    named = table("named", image=[png], label=[1])
    named.write_bytes(named.read_bytes().replace(b"label", b"l\xffbel"))
    for path, message in (
        (table("bare", label=[1]), "no column of images"),
        (named, "cannot be read as a parquet file: .*can't decode byte 0xff"),
        (tmp_path / "damaged.parquet", "cannot be read as a parquet file"),
    ):
        with pytest.raises(InputError, match=message):
            open_source(path)
    text = open_source(table("text", image=["not bytes"], label=[0]))
    with pytest.raises(ValueError, match="the row holds no image bytes"):
        text.reader.read(text.items[0], 16)
    few = text.items[0]._replace(place=(str(tmp_path / "text.parquet"), 0, 1, "image"))
    with pytest.raises(ValueError, match="column 'image' of row group 0 has 1 rows, fewer than the file says"):
        text.reader.read(few, 16)
    source = open_source(table("holes", image=[png, None, png], label=[0, 1, 0]))
    index, _ = write(source, tmp_path / "out", OPTIONS, workers=1, max_rejected=0.5, progress=False)
    assert (index.samples, index.rejected) == (2, 1)
    assert "the row holds no image bytes" in (tmp_path / "out" / "rejected.jsonl").read_text()


def test_bad_image_text_pairs(image_folder: Path, tmp_path: Path) -> None:
    """What cannot be read rejects its image; what is not there leaves its caption empty."""
    pairs = image_text(image_folder, tmp_path / "pairs")
    (text, cut, gone), about = sorted(pairs.rglob("*.txt"))[:3], sorted(pairs.rglob("*.json"))[:4]
    text.write_bytes(b"caf\xe9")
    cut.write_text("a dog", "utf-16-le")
    gone.unlink()
    about[0].write_text('{"title": "no caption"}')
    about[1].write_text('{"caption": ')
    about[2].write_text('["a dog"]')
    about[3].write_text("null")
    source = open_source(pairs)
    found = {item.name: item for item in source.items}

    def of(path: Path) -> Item:
        return found[path.relative_to(pairs).with_suffix(".png").as_posix()]

    assert [of(path).caption for path in (gone, about[0], about[3])] == ["", "", ""]
    assert not any(of(path).fault for path in (gone, about[0], about[3]))
    assert of(text).fault == f"{text}: byte 3 is not UTF-8 text; expected UTF-8, or UTF-16 with a byte order mark"
    assert of(cut).fault.startswith(f"{cut}: it holds zero bytes, as UTF-16 without a byte order mark does")
    assert of(about[1]).fault.startswith(f"{about[1]} is not JSON: Expecting value")
    assert of(about[2]).fault == f"{about[2]} is a list, expected a JSON object"
    assert sum(bool(item.fault) for item in source.items) == 4
    index, _ = write(source, tmp_path / "out", OPTIONS, workers=1, max_rejected=0.1, progress=False)
    assert (index.samples, index.rejected) == (36, 4)


def test_samples_that_are_none_are_rejected(tmp_path: Path) -> None:
    """In existing shards: no image, or a class that is no number; the others are written."""
    png = io.BytesIO()
    Image.new("RGB", (16, 16)).save(png, "PNG")
    with tarfile.open(tmp_path / "odd.tar", "w") as tar:
        for name, data in (("a.cls", b"1"), ("b.cls", b"cat"), ("b.png", png.getvalue()), ("c.cls", b"1")):
            add(tar, name, data)
        add(tar, "c.png", png.getvalue())
    index, _ = write(open_source(tmp_path / "odd.tar"), tmp_path / "out", OPTIONS, 1, max_rejected=0.7, progress=False)
    assert (index.samples, index.rejected) == (1, 2)
    reasons = (tmp_path / "out" / "rejected.jsonl").read_text()
    assert "expected one image (png, jpg, webp, gif, bmp, tif, avif, jp2, heic, jxl), found ['cls']" in reasons
    assert "the class is 'cat', expected a number, as most labels are, such as 1" in reasons


def test_one_process_at_a_time(image_folder: Path, tmp_path: Path) -> None:
    from data_prep.writing.pool import alone_in

    (tmp_path / "out").mkdir()
    with alone_in(tmp_path / "out"), pytest.raises(InputError, match="another data_prep is at work in"):
        write(ImageFolder.open(image_folder), tmp_path / "out", OPTIONS, workers=1, progress=False)
    write(ImageFolder.open(image_folder), tmp_path / "out", OPTIONS, workers=1, progress=False)


def test_names_must_be_unique(image_folder: Path, tmp_path: Path) -> None:
    folder = ImageFolder.open(image_folder)
    twice = ImageFolder(folder.classes, [*folder.items, folder.items[0]], folder.reader)
    with pytest.raises(InputError, match=r"the source holds 'blue/\S+' twice"):
        write(twice, tmp_path / "out", Options(Policy.make("crop", 16)), workers=1, progress=False)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda f: (f / "shard-000001.tar").unlink(), "shard-000001.tar is missing"),
        (lambda f: _flip(f / "shard-000001.tar", 700), "shard-000001.tar: sha256 differs from the index"),
        (lambda f: _flip(f / "samples.bin", 30), "samples.bin has sha256"),
    ],
)
def test_verify_finds_damage(
    damage: Callable[[Path], None], words: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import shutil

    from data_prep import cli

    out = tmp_path / "out"
    shutil.copytree(shards, out)
    assert cli.main(["verify", str(out), "--workers", "1"]) == 0
    assert "everything is as the index says" in capsys.readouterr().out
    damage(out)
    assert cli.main(["verify", str(out), "--workers", "1"]) == 2
    assert words in capsys.readouterr().err


def _flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_verify_looks_into_the_samples(shards: Path, tmp_path: Path) -> None:
    """A shard whose hash was brought up to date after its samples were spoilt."""
    import shutil

    from data_prep.passes.verify import verify
    from megapix.files import sha256_of

    out = tmp_path / "out"
    shutil.copytree(shards, out)
    with tarfile.open(out / "shard-000000.tar") as tar:
        image, label = tar.getmember("000000003.png"), tar.getmember("000000005.cls")
    data = bytearray((out / "shard-000000.tar").read_bytes())
    data[image.offset_data : image.offset_data + 8] = bytes(8)
    data[label.offset_data : label.offset_data + 1] = b"9"
    (out / "shard-000000.tar").write_bytes(data)
    captions = bytearray((out / "captions.bin").read_bytes())
    captions[0:1] = b"?"
    (out / "captions.bin").write_bytes(captions)
    index = json.loads((make_listed(out) / "index.json").read_text())
    index["shards"][0]["sha256"] = sha256_of(out / "shard-000000.tar")
    index["captions_sha256"] = sha256_of(out / "captions.bin")
    index["classes"][0]["samples"] += 1
    (out / "index.json").write_text(json.dumps(index))
    faults = list(verify(out, 1, Access(30.0, 5), progress=False))
    assert faults.pop(0) == "class 'blue' has another number of samples than the 15 that the index lists"
    assert [fault.rpartition("sample ")[2] for fault in faults] == [
        "000000000: the caption differs from captions.bin",
        "000000003: its bytes are not those that were indexed",
        "000000003: cannot be decoded: not an image of a kind that is read (png, jpg, webp, gif, bmp, tif, avif, jp2, "
        "heic, jxl)",
        "000000005: the class differs from samples.bin",
    ]


def test_inspect(shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import numpy as np
    from PIL import Image

    from data_prep import cli

    sheet = tmp_path / "sheet.png"
    assert cli.main(["inspect", str(shards), "--sheet", str(sheet), "--columns", "4", "--rows", "2"]) == 0
    out = capsys.readouterr().out
    assert "40 images of 16 pixels in 3 shards" in out
    assert "0 blue        14 ########################################" in out
    assert "8 images" in out
    with Image.open(sheet) as image:
        pixels = np.asarray(image)
    assert pixels.shape == (2 + 2 * 18, 2 + 4 * 18, 3)
    blue, green = pixels[2:18, 2:18].mean((0, 1)), pixels[20:36, 2:18].mean((0, 1))
    assert blue.argmax() == 2
    assert green.argmax() == 1


def test_a_tree_is_walked_once(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many kinds look whether it is theirs: over a network a walk of millions of files takes minutes."""
    tree = Path(shutil.copytree(image_folder, tmp_path / "tree"))
    walked, scandir = Counter[str](), os.scandir

    def counted(folder: Any) -> Any:
        walked[os.fspath(folder)] += 1
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", counted)
    source = open_source(tree)
    inside = {name: count for name, count in walked.items() if Path(name).parent == tree}
    assert set(inside.values()) == {1}, inside
    first = tree / source.items[0].name
    first.with_name("new.png").write_bytes(first.read_bytes())
    assert len(open_source(tree).items) == len(source.items) + 1, "and again by the next command"
