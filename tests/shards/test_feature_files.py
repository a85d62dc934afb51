"""The table of files of features: against its description, in either version of a manifest, damaged, and large."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data_prep import cli
from megapix.errors import InputError
from megapix.shards import image_features, text_features
from megapix.shards.image_features import FeatureFile, FeatureReader, read_features, read_manifest, write_manifest
from megapix.shards.index import read_index, write_index
from megapix.shards.tables import files, stored
from megapix.shards.tables.files import Files
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import TextFile, listed_text_features, read_text_features
from tests.data_prep.test_write import hashes
from tests.support.launch import ROOT
from tests.support.listed_features import make_listed

OLD = ROOT / "tests/data/v0_1"
ORIGIN = "ab" * 32
TABLE, FIRST, SECOND = "text-files.bin", "text-000000.safetensors", "text-000001.safetensors"


def made(count: int) -> list[TextFile]:
    """Files of 0 to 4 samples."""
    generator = np.random.default_rng(count)
    rows = generator.integers(0, 5, (count, 5)).tolist()
    return [TextFile(f"text-{n:06d}.safetensors", *row) for n, row in enumerate(rows)]


def by_hand(some: list[TextFile]) -> bytes:
    head = struct.pack("<8sQ", b"MPXTEXT1", len(some)) + bytes.fromhex(ORIGIN)
    return head + b"".join(struct.pack("<5Q", *file[1:]) for file in some)


@pytest.mark.parametrize("small", [True, False], ids=["held", "read in place"])
@pytest.mark.parametrize("count", [1, 2, 7, 31])
def test_a_table_is_read_as_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, small: bool
) -> None:
    monkeypatch.setattr(files, "STEP", 3)
    monkeypatch.setattr(files, "PART", 6)
    monkeypatch.setattr(stored, "SMALL", 1 << 20 if small else 100)
    some = made(count)
    (tmp_path / TABLE).write_bytes(by_hand(some))
    where = [(place, row) for place, file in enumerate(some) for row in range(file.samples)]
    for table in (Files.of(text_features.KIND, ORIGIN, some), Files(text_features.KIND, tmp_path / TABLE)):
        assert list(table) == [table[n] for n in range(count)] == some == list(pickle.loads(pickle.dumps(table)))
        assert b"".join(table.blocks()) == by_hand(some)
        assert (table[-1], table[1:3]) == (some[-1], tuple(some[1:3]))
        assert [table.find(sample) for sample in range(len(where))] == where
        assert table.total("tokens") == sum(file.tokens for file in some)
        assert table.origin == ORIGIN


# ---------------------------------------------------------------------------------------------------------------------
# Versions of the manifest
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def text(text_shards: Path, tmp_path: Path) -> Path:
    return aged(Path(shutil.copytree(text_shards, tmp_path / "text")))


def aged(folder: Path) -> Path:
    """As if it had been written a minute ago: what is younger is not stamped."""
    then = time.time() - 60
    for path in (*folder.iterdir(), folder):
        os.utime(path, (then, then))
    return folder


def opened(folder: Path) -> text_features.TextFeatures:
    found = read_text_features(folder, read_index(folder))
    assert found is not None
    return found


def test_text_features_of_version_1_are_the_same(text: Path, tmp_path: Path) -> None:
    old = make_listed(Path(shutil.copytree(text, tmp_path / "old")))
    one, other = opened(text), opened(old)
    assert replace(other, folder=text) == one
    assert read_index(old).digest == read_index(text).digest
    reader, others = TextFeatureReader(one), TextFeatureReader(other)
    for sample in range(read_index(text).samples):
        for caption in range(others.captions(sample)):
            assert (reader.read(sample, caption) == others.read(sample, caption)).all()
    text_features.write_manifest(other, read_index(old))
    assert hashes(old) == hashes(text), "what is written is the newest version"


def test_text_features_of_release_0_1(tmp_path: Path) -> None:
    """A file of that release, which lists its files."""
    folder = Path(shutil.copytree(OLD / "text", tmp_path / "text"))
    assert json.loads((folder / "index.json").read_text())["text"]["version"] == 1
    found = opened(folder)
    assert [file.samples for file in found.files] == [entry.samples for entry in read_index(folder).shards]
    expected = [TextFeatureReader(found).read(sample, 0).tolist() for sample in range(read_index(folder).samples)]
    text_features.write_manifest(found, read_index(folder))
    assert (folder / TABLE).stat().st_size == 48 + 40 * len(found.files)
    assert [TextFeatureReader(opened(folder)).read(n, 0).tolist() for n in range(len(expected))] == expected


def test_image_features_of_release_0_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, index = Path(shutil.copytree(OLD / "features-fp32", tmp_path / "features")), read_index(OLD / "classes")
    listed = json.loads((folder / "features.json").read_text())
    assert listed["version"] == 1
    found = read_features(folder, index)
    assert [[file.name, file.samples, [file.rows, file.columns]] for file in found.files] == [
        [file["name"], file["samples"], file["grid"]] for file in listed["files"]
    ]
    expected = [FeatureReader(found).read(sample, True).tolist() for sample in range(index.samples)]
    write_manifest(found)
    again = read_features(folder, index)
    assert (again, again.digest) == (found, listed["encoder_digest"])
    assert again.table.path == folder / "features-files.bin"
    assert [FeatureReader(again).read(sample, True).tolist() for sample in range(index.samples)] == expected
    make_listed(folder)
    assert json.loads((folder / "features.json").read_text()) == listed


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def changed(at: int) -> Callable[[Path], None]:
    """Another byte at that place of the table."""

    def damage(table: Path) -> None:
        data = bytearray(table.read_bytes())
        data[at] ^= 1
        table.write_bytes(data)

    return damage


def listed_as(**values: object) -> Callable[[Path], None]:
    """Other values of what the index says of the table."""

    def damage(table: Path) -> None:
        index = read_index(table.parent)
        assert index.text
        write_index(table.parent, replace(index, text=index.text | {"files": index.text["files"] | values}))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (Path.unlink, r"text-files.bin is missing, but \S+index.json needs it; run its 'data_prep embed-text'"),
    "short": (
        lambda table: os.truncate(table, table.stat().st_size - 1),
        r"text-files.bin: it has \d+ bytes, exp",
    ),
    "empty": (lambda table: table.write_bytes(b""), "text-files.bin: it does not begin as a table of files of"),
    "another kind": (changed(3), "text-files.bin: it does not begin as a table of files of"),
    "another's": (changed(20), r"text-files.bin is of other features than \S+index.json says; run its"),
    "flipped": (changed(-1), r"text-files.bin has sha256 \w+…, but index.json lists \w+…; run its 'data_prep embed"),
    "another name": (listed_as(name="/etc/passwd"), "named '/etc/passwd', expected 'text-files.bin'"),
    "another count": (listed_as(count=1), "text-files.bin is of other features than"),
    "no hash": (listed_as(sha256="x"), "'x' is not a SHA-256 hash"),
    "no table": (listed_as(name=3), "named 3"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_table_is_named_in_one_line(
    text: Path, text_encoder: Path, damage: Callable[[Path], object], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, recipe = hashes(text), opened(text).recipe.to_dict()
    damage(text / TABLE)
    with pytest.raises(InputError, match=words) as caught:
        opened(text)
    assert "\n" not in str(caught.value)
    assert cli.main(["verify", str(text), "--workers", "1"]) == 2
    assert str(caught.value).split("; run")[0] in capsys.readouterr().err
    keys = ("max_tokens", "normalize", "scale", "prefix", "dtype")
    options = [f"--{key.replace('_', '-')}={recipe[key]}" for key in keys]
    assert cli.main(["embed-text", str(text), "--encoder", str(text_encoder), *options, "--padding", "masked"]) == 0
    assert {**hashes(text), "index.json": ""} == {**whole, "index.json": ""}, "but for the encoder's name"
    assert opened(text).table.path


def test_counts_of_a_stranger_are_refused(text: Path) -> None:
    """Their hash is right."""
    features, index = opened(text), read_index(text)
    first, *rest = features.files
    for odd, words in (
        (
            [first._replace(samples=first.samples + 1), *rest],
            rf"{FIRST} has {first.samples + 1} samples, but its entry",
        ),
        ([first._replace(tokens=1 << 60), *rest], rf"{TABLE}: {FIRST} has {1 << 60} tokens"),
        ([first], rf"{TABLE}: 1 files for {len(rest) + 1} entries"),
    ):
        text_features.write_manifest(replace(features, files=odd), index)
        with pytest.raises(InputError, match=words):
            opened(text)


def test_an_empty_grid_is_refused(tmp_path: Path) -> None:
    folder, index = Path(shutil.copytree(OLD / "features-fp32", tmp_path / "features")), read_index(OLD / "classes")
    first, *rest = read_manifest(folder).files
    write_manifest(replace(read_manifest(folder), files=[first._replace(rows=0), *rest]))
    with pytest.raises(InputError, match=r"features-files.bin: features-000000.safetensors has 0 rows"):
        read_features(folder, index)


# ---------------------------------------------------------------------------------------------------------------------
# Once on a node
# ---------------------------------------------------------------------------------------------------------------------


def test_files_are_looked_at_once(text: Path) -> None:
    """One that is cut in its place later is found when it is read, and one that goes, at the next start."""
    opened(text)
    os.truncate(text / SECOND, 100)
    features = opened(text)  # nobody looks at it
    reader, first = TextFeatureReader(features), features.files[0].samples
    reader.read(first - 1, 0)
    with pytest.raises(InputError, match=rf"{SECOND} has 100 bytes, expected \d+; run its 'data_prep embed-text'"):
        reader.read(first, 0)
    (text / FIRST).unlink()
    with pytest.raises(InputError, match=rf"{FIRST} cannot be read|{FIRST} is missing; run its 'data_prep embed-text'"):
        TextFeatureReader(features).read(0, 0)
    with pytest.raises(InputError, match=rf"{FIRST} is missing; run its 'data_prep embed-text' command again"):
        opened(text)


def test_image_features_are_looked_at_once(tmp_path: Path) -> None:
    index = read_index(OLD / "classes")
    folder = aged(Path(shutil.copytree(OLD / "features-fp32", tmp_path / "features")))
    read_features(folder, index)
    os.truncate(folder / "features-000001.safetensors", 100)
    reader = FeatureReader(read_features(folder, index))
    with pytest.raises(InputError, match=r"features-000001.safetensors: the features of sample 9 are not those that"):
        reader.read(9, False)
    (folder / "features-000001.safetensors").unlink()
    with pytest.raises(InputError, match=r"features-000001.safetensors: cannot be read: No such file or directory"):
        FeatureReader(reader.features).read(9, False)
    with pytest.raises(InputError, match=r"features-000001.safetensors is missing; run its 'data_prep features' comm"):
        read_features(folder, index)


# ---------------------------------------------------------------------------------------------------------------------
# Many files
# ---------------------------------------------------------------------------------------------------------------------

MANY = 200_000
OPEN = """
import sys
from pathlib import Path
from megapix.shards.index import read_index
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import listed_text_features

def private():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))

folder = Path(sys.argv[1])
index = read_index(folder)
before = private()
reader = TextFeatureReader(listed_text_features(folder, index))
found = [reader.read(sample, 0).tolist() for sample in map(int, sys.argv[2:])]
print(private() - before)
print(found)
"""


def test_many_files_take_little_memory(text: Path, tmp_path: Path) -> None:
    """Opened and read by a process of its own; two of the files are there."""
    index, features = read_index(text), opened(text)
    entry = index.shards[0]
    many = replace(index, samples=2 * MANY, shards=[replace(entry, samples=2)] * MANY, known=("", ""), text=None)
    folder, digest = tmp_path / "many", many.digest
    folder.mkdir()
    rows = [text_features.Row(np.full((2, features.recipe.width), n, np.int16), False) for n in range(2)]
    written = {
        place: text_features.write_file(folder, features.recipe, digest, f"text-{place:06d}.safetensors", [1, 1], rows)
        for place in (5, MANY - 1)
    }
    counts = [np.full(MANY, count) for count in written[5][1:]]
    table = Files.made_of(text_features.KIND, text_features.origin_of(features.recipe, digest), counts)
    empty = text_features.write_file(folder, features.recipe, digest, "text-empty.safetensors", [1], rows[:1])
    text_features.write_manifest(replace(features, folder=folder, data_digest=digest, files=table, empty=empty), many)
    assert (folder / TABLE).stat().st_size > 8e6, "what would be held"
    command = [sys.executable, "-c", OPEN, str(folder), "11", str(2 * MANY - 2)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    private, found = done.stdout.splitlines()
    assert json.loads(found) == [rows[1].bits.tolist(), rows[0].bits.tolist()]
    assert int(private) < 4_000, "KiB, where the table alone has 8 MB"
    assert listed_text_features(folder, read_index(folder)) is not None


def test_a_table_that_is_written_again_while_it_is_in_use(text: Path) -> None:
    """A worker that starts later does not take other features' counts for those that its run has."""
    features = opened(text)
    sent = pickle.dumps(features)
    other = replace(features.recipe, scale=3.0)
    text_features.write_manifest(replace(features, recipe=other, files=tuple(features.files)), read_index(text))
    with pytest.raises(InputError, match=r"text-files.bin was written again while it is in use"):
        pickle.loads(sent).files[0]


def test_kinds_are_told_apart() -> None:
    file = FeatureFile("features-000000.safetensors", 3, 2, 5)
    table = Files.of(image_features.KIND, ORIGIN, [file])
    expected = struct.pack("<8sQ", b"MPXFEAT1", 1) + bytes.fromhex(ORIGIN) + struct.pack("<3Q", 3, 2, 5)
    assert b"".join(table.blocks()) == expected
    with pytest.raises(ValueError, match="a table of files of features"):
        Files(text_features.KIND, b"".join(table.blocks()))
