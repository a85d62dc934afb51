"""What became of every entry: the counts add up, in folders, tars, zips and parquet files of any mess."""

from __future__ import annotations

import io
import json
import random
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_prep.sources import open_source
from data_prep.writing import account
from data_prep.writing.index import index
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.errors import InputError
from megapix.shards.image_policy import Policy
from megapix.shards.storage import Access

OPTIONS = Options(Policy.make("crop", 16), samples_per_shard=5)
ENDINGS = ("png", "JPG", "jpeg", "webp", "txt", "TXT", "json", "cls", "md", "bmp", "seg.png", "")
FOLDERS = ("", "a/", "b/", "a/deep/", ".hidden/", "__MACOSX/", "c d/")
STEMS = ("0", "1", "ü", "x.y", ".z", "2 3", "README")

Entry = tuple[str, bytes]


def picture(shade: int, kind: str = "PNG", side: int = 20) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (side, side + 3), (shade, 0, 255 - shade)).save(out, kind)
    return out.getvalue()


def content(name: str, chance: random.Random) -> bytes:
    """What such a file holds, now and then something else."""
    ending = name.rpartition(".")[2].lower()
    if chance.random() < 0.2:
        return chance.choice([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xfe", b"[1, 2]", picture(3)[:40]])
    made = {"txt": "a fox".encode("utf-8-sig"), "json": b'{"caption": "two foxes"}', "cls": b"1\n"}
    kinds = {"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP", "bmp": "BMP"}
    return made.get(ending) or picture(chance.randrange(256), kinds.get(ending, "PNG"))


@st.composite
def messes(draw: st.DrawFn) -> list[Entry]:
    """Names in folders, with what they hold; one image at least is whole."""
    chance = random.Random(draw(st.integers(0, 2**32)))
    count = draw(st.integers(1, 14))
    names = {"a/whole.png"}
    for _ in range(count):
        stem, ending = chance.choice(STEMS), chance.choice(ENDINGS)
        names.add(f"{chance.choice(FOLDERS)}{stem}{'.' if ending else ''}{ending}")
    return [(name, picture(9) if name == "a/whole.png" else content(name, chance)) for name in sorted(names)]


def in_folder(entries: list[Entry], out: Path) -> tuple[Path, int]:
    """A hidden folder is one entry, whatever it holds."""
    for name, data in entries:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(data)
    (out / "a" / "loop").symlink_to(out)
    (out / "b").mkdir(exist_ok=True)
    (out / "b" / "nowhere.png").symlink_to(out / "none")
    hidden = {name.split("/")[0] for name, _ in entries if name.startswith((".hidden/", "__MACOSX/"))}
    rest = [name for name, _ in entries if name.split("/")[0] not in hidden]
    return out, len(hidden) + len(rest) + 2


def in_tar(entries: list[Entry], out: Path) -> tuple[Path, int]:
    with tarfile.open(out / "s.tar", "w") as tar:
        for name, data in entries:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, kind, target in (("d", tarfile.DIRTYPE, ""), ("nowhere.png", tarfile.SYMTYPE, "none")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    (out / "notes.md").touch()
    return out, len(entries) + 2


def in_zip(entries: list[Entry], out: Path) -> tuple[Path, int]:
    with zipfile.ZipFile(out / "s.zip", "w") as archive:
        archive.mkdir("d")
        for name, data in entries:
            archive.writestr(name, data)
        labels = [[name, len(name) % 3] for name, _ in entries]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return out / "s.zip", len(entries) + 1


def in_parquet(entries: list[Entry], out: Path) -> tuple[Path, int]:
    import pyarrow
    import pyarrow.parquet

    rows = [{"image": {"bytes": data, "path": name}, "text": name} for name, data in entries]
    rows.append({"image": None, "text": "a hole"})
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), out / "rows.parquet", row_group_size=3)
    (out / "README.md").touch()
    return out, len(rows) + 1


KINDS: dict[str, Callable[[list[Entry], Path], tuple[Path, int]]] = {
    "folder": in_folder,
    "tar": in_tar,
    "zip": in_zip,
    "parquet": in_parquet,
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(entries=messes())
def test_all_that_is_listed_is_accounted_for(kind: str, entries: list[Entry]) -> None:
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    with tempfile.TemporaryDirectory() as folder:
        path, there = KINDS[kind](entries, Path(folder))
        try:
            source = open_source(path)
        except InputError:
            return  # refused in one line
        counted = source.entries
        assert counted.listed == there
        assert len(source.items) + counted.parts + sum(counted.passed.values()) == there


@pytest.mark.parametrize("kind", KINDS)
def test_the_counts_of_a_finished_folder_add_up(kind: str, tmp_path: Path) -> None:
    """Of a mess that holds everything: each image is used or has a reason, and nothing is left out."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    chance = random.Random(7)
    names = sorted({f"{f}{s}.{e}" for f in ("a/", "b/") for s in ("0", "1", "2 3") for e in ("png", "txt", "md")})
    entries = [(name, content(name, chance)) for name in names] + [("a/bad.png", b"\x89PNG\r\n\x1a\n")]
    (tmp_path / "in").mkdir()
    path, there = KINDS[kind](entries, tmp_path / "in")
    out = tmp_path / "out"
    if kind == "tar":
        made, _ = index(str(path), out, OPTIONS.policy, 1, 1.0, Access(30.0, 1.0), progress=False)
    else:
        made, _ = write(open_source(path), out, OPTIONS, 1, 1.0, progress=False)
    found = account.load(out)
    assert found
    assert found.listed == there
    assert found.used == made.samples > 0
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert found.rejected == len(rejected) > 0
    assert all(one["reason"] for one in rejected)
    total = found.used + found.rejected + found.parts
    assert total + sum(found.filtered.values()) + sum(found.passed.values()) == there
    assert f"{found.used:,} used, {found.rejected:,} rejected" in str(found)
