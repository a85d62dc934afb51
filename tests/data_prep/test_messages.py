"""What a newcomer types, and the one line that says what to type instead."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from data_prep import cli as data_prep
from megapix.cli import main as megapix
from megapix.console import EXIT_PIPE, in_one_line
from megapix.shards.index import read_index
from tests.data_prep.test_sources import add
from tests.shards.test_images import encoded

ROOT = Path(__file__).resolve().parents[2]
PNG = encoded(Image.new("RGB", (32, 32)))


def prepare(*arguments: object) -> int:
    return data_prep.main([str(argument) for argument in arguments])


def train(*arguments: object) -> int:
    return megapix.main(["train", *map(str, arguments), "--dry-run"])


def line_of(capsys: pytest.CaptureFixture[str]) -> str:
    """What was said on stderr: one line."""
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "Traceback" not in said
    return said.strip()


def images(folder: Path, classes: int = 2, each: int = 2) -> Path:
    for number in range(classes):
        (folder / f"class {number}").mkdir(parents=True)
        for n in range(each):
            Image.new("RGB", (32, 32), (number, n, 0)).save(folder / f"class {number}" / f"{n}.png")
    return folder


def tar(path: Path, classes: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for n in range(2 * classes):
            add(file, f"{n}.png", PNG)
            add(file, f"{n}.cls", str(n % classes).encode())
    return path


def flat(folder: Path) -> Path:
    folder.mkdir()
    for n in range(3):
        (folder / f"{n}.png").write_bytes(PNG)
    return folder


def parquet(folder: Path) -> Path:
    folder.mkdir()
    (folder / "train-00000-of-00001.parquet").write_bytes(b"PAR1")
    return folder


def unfinished(folder: Path) -> Path:
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    (folder / "shard-000000.tar").write_bytes(b"")
    return folder


def empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


PLACES = {
    "image folder": (images, "it holds images; make shards with: data_prep write {there} {there}-shards --size 32"),
    "flat folder": (flat, "it holds images; make shards with: data_prep write {there} {there}-shards --size 32"),
    "tars": (
        lambda place: tar(place / "a.tar").parent,
        "it holds tar files; make an index with: data_prep index {there} --out {there}-index --size 32",
    ),
    "one tar": (
        lambda place: tar(place.with_suffix(".tar")),
        "it holds tar files; make an index with: data_prep index {there}.tar --out {there}-index --size 32",
    ),
    "synset tars": (
        lambda place: tar(place / "n01440764.tar").parent,
        "it holds ImageNet's synset tars; make shards with: data_prep write {there} {there}-shards --size 32",
    ),
    "parquet": (parquet, "it holds parquet files; make shards with: data_prep write {there} {there}-shards --size 32"),
    "empty": (empty, "it is empty; make shards with 'data_prep write SOURCE OUT --size 32'"),
    "unfinished": (unfinished, "its preparation did not finish; run the same 'data_prep' command again"),
}


@pytest.mark.parametrize("name", PLACES)
def test_training_on_what_is_not_prepared(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = PLACES[name]
    place = make(tmp_path / "my data")
    assert train("tiny", "--data.path", place, "--out", tmp_path / "run") == 2
    line = line_of(capsys)
    quoted = shlex.quote(str(tmp_path / "my data"))
    expected = message.replace("{there}-shards", shlex.quote(f"{tmp_path / 'my data'}-shards"))
    expected = expected.replace("{there}-index", shlex.quote(f"{tmp_path / 'my data'}-index"))
    expected = expected.replace("{there}.tar", shlex.quote(f"{tmp_path / 'my data'}.tar")).replace("{there}", quoted)
    assert expected in line
    assert ("did not finish" in line) == (name == "unfinished")


@pytest.mark.parametrize("kind", ["image folder", "one tar"])
def test_the_command_that_is_proposed_works(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = PLACES[kind][0](tmp_path / "my data")
    out = ["--out", tmp_path / "run", "--data.image-size", 16]
    assert train("tiny", "--data.path", place, *out) == 2
    proposed = shlex.split(line_of(capsys).partition(" with: ")[2])
    assert proposed[0] == "data_prep"
    assert prepare(*proposed[1:], "--workers", 1) == 0
    made = proposed[proposed.index("--size") - 1]
    capsys.readouterr()
    assert train("tiny", "--data.path", made, *out) == 0


def test_the_network_takes_the_classes_of_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """tiny has 5 classes and the data 3; a number that is asked for is kept, and refused with both."""
    assert prepare("index", tar(tmp_path / "a.tar"), "--out", tmp_path / "i", "--size", 32, "--workers", 1) == 0
    run = ["--data.path", tmp_path / "i", "--out", tmp_path / "run"]

    def classes(*arguments: object) -> int:
        capsys.readouterr()
        assert train(*arguments, *run) == 0
        found: int = json.loads(capsys.readouterr().out)["model"]["num_classes"]
        return found

    assert classes("tiny") == 3
    assert classes("tiny", "--model.num-classes", 3) == 3
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"data": {"image_size": 32}}))
    assert classes("--config", file) == 3
    for given in (["tiny", "--model.num-classes", 5], ["tiny", "--model.num_classes=5"], ["--config", file]):
        file.write_text(json.dumps({"data": {"image_size": 32}, "model": {"num_classes": 5}}))
        capsys.readouterr()
        assert train(*given, *run) == 2
        assert "model.num_classes = 5, but" in (line := line_of(capsys))
        assert "holds 3 classes" in line


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("write in out", "--size is needed: height and width of the images in pixels"),
        ("write in out", "such as: data_prep write in out --size 256"),
        ("index in --out out", "such as: data_prep index in --out out --size 256"),
        ("index https://h/a.tar?sig=secret --out out", "data_prep index 'https://h/a.tar?…' --out out --size 256"),
        ("demo openmoji out", "such as: data_prep demo openmoji out --size 256"),
        ("write in out --policy buckets", "of aspect buckets the square root of their area"),
        ("wirte in out", "command 'wirte' does not exist (did you mean 'write'?)"),
        (
            "",
            "expected a command (one of: demo, embed-text, features, finish, index, inspect, merge, mix, "
            "stats, verify, write)",
        ),
    ],
)
def test_what_is_missing_is_named(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare(*command.split()) == 2
    assert message in line_of(capsys)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("data_prep write in out --sise 256", "option '--sise' does not exist (did you mean '--size'?)"),
        ("data_prep write in out --sise=256", "option '--sise' does not exist (did you mean '--size'?)"),
        ("data_prep write in out --polcy crop", "option '--polcy' does not exist (did you mean '--policy'?)"),
        ("data_prep index in --out out --kepe a", "option '--kepe' does not exist"),
        ("data_prep index in --out out --keep a", "option '--keep' does not exist"),
        ("data_prep write in out more", "'more' is one argument too many"),
        ("data_prep write in", "missing from data_prep write: OUT"),
        ("data_prep write in out --size big", "error parsing --size: invalid literal for int() with base 10: 'big'"),
        ("data_prep write in out --size", "missing value for argument '--size'"),
        ("data_prep write in out --policy square", "invalid choice 'square' for argument '--policy'"),
        ("data_prep write in out --resize foo", "invalid choice 'foo' for argument '--resize'"),
        ("megapix train tiny --optm.lr 1", "option '--optm.lr' does not exist (did you mean '--optim.lr'?)"),
        ("megapix train tiny --optim.lr fast", "error parsing --optim.lr: could not convert string to float: 'fast'"),
        ("megapix sample run --sede 3", "option '--sede' does not exist (did you mean '--seed'?)"),
        ("megapix export run", "missing from megapix export: --out"),
    ],
)
def test_options_that_are_refused(command: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    program, *arguments = command.split()
    try:
        code = {"data_prep": data_prep, "megapix": megapix}[program].main(arguments)
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    line = line_of(capsys)
    assert line.startswith(f"{program}: error: {message}")
    assert "--help' lists the options" in line


def test_a_box_without_words() -> None:
    """A release of tyro that draws something else still leaves a line."""
    assert in_one_line("", "megapix sample") == (
        "the arguments are not understood; 'megapix sample --help' lists the options"
    )
    assert in_one_line("something is wrong.\n", "a").startswith("something is wrong; ")


def test_index_says_what_is_for_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert prepare("index", images(tmp_path / "in"), "--out", tmp_path / "out", "--size", 16) == 2
    assert f"data_prep write {tmp_path / 'in'} OUT --size N" in line_of(capsys)


def test_a_flat_folder_is_one_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = flat(tmp_path / "flat")
    (source / "notes").mkdir()
    (source / "notes" / "readme.md").write_text("words")
    assert prepare("write", source, tmp_path / "out", "--size", 16, "--workers", 1) == 0
    assert "has no class folders: its 3 images are one class, 'images', without captions" in capsys.readouterr().out
    index = read_index(tmp_path / "out")
    assert [(entry.name, entry.samples) for entry in index.classes] == [("images", 3)]
    assert prepare("inspect", tmp_path / "out") == 0
    assert "has no class folders" in capsys.readouterr().out
    (source / "class").mkdir()
    (source / "class" / "a.png").write_bytes(PNG)
    (source / "notes" / "readme.md").rename(source / "class" / "readme.md")
    (source / "notes").rmdir()
    assert prepare("write", source, tmp_path / "folders", "--size", 16, "--workers", 1) == 0
    assert read_index(tmp_path / "folders").class_names == ("class",), "with a class folder it is as it was"


@pytest.mark.parametrize(
    "command",
    ["megapix --help", "megapix train tiny --help", "data_prep --help", "data_prep write --help", "data_prep inspect"],
)
def test_a_reader_that_goes_away(command: str, tmp_path: Path) -> None:
    """The pipe has no reader from the start, which is `| head` at its quickest."""
    program, *arguments = command.split()
    if "inspect" in arguments:
        assert prepare("write", images(tmp_path / "in"), tmp_path / "out", "--size", 16, "--workers", 1) == 0
        arguments.append(str(tmp_path / "out"))
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", program, *arguments], stdout=writing, stderr=subprocess.PIPE, text=True, cwd=ROOT
        )
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (EXIT_PIPE, "")
