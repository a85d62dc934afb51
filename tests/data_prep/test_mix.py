"""`data_prep mix`: a mix file of folders and weights; `inspect` of one; what is refused, in one line each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from megapix.shards.index import INDEX_NAME
from megapix.shards.mix.file import MixedSet, read_mix, write_mix
from tests.data_prep.test_index import run
from tests.data_prep.test_merge import folder


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders a (cat, dog), b (ant, cat), numbers (0, 1); one of another size, and one of another policy."""
    root = tmp_path_factory.mktemp("sets")
    for name, classes in (("a", ("cat", "dog")), ("b", ("ant", "cat")), ("numbers", ("0", "1"))):
        folder(root, name, *classes)
    assert run("write", root / "src" / "a", root / "large", "--size", 32, "--workers", 1) == 0
    assert run("write", root / "src" / "a", root / "wide", "--size", 16, "--policy", "buckets", "--workers", 1) == 0
    return root


def test_a_mix_is_written_and_inspected(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("mix", f"{sets / 'a'}=0.7", f"{sets / 'b'}=0.1", "--out", sets / "mix.json") == 0
    said = capsys.readouterr().out
    assert json.loads((sets / "mix.json").read_text())["sets"] == [
        {"path": "a", "weight": 0.7, "name": "a"},
        {"path": "b", "weight": 0.1, "name": "b"},
    ]
    assert "2 sets, 12 images and 3 classes; 1ep is 12 images" in said
    assert "weight 0.7, 87.50% of the samples, 6 images: 1.75 of its epochs in 1ep" in said
    assert run("inspect", sets / "mix.json") == 0
    assert capsys.readouterr().out == said.replace("data_prep: ", "")
    assert run("mix", f"{sets / 'a'}=2", f"{sets / 'b'}=0", "--out", tmp_path / "mix.yaml") == 0
    assert [one["path"] for one in yaml.safe_load((tmp_path / "mix.yaml").read_text())["sets"]] == [
        str(sets / "a"),
        str(sets / "b"),
    ]
    assert [(one.path, one.name, one.weight) for one in read_mix(str(tmp_path / "mix.yaml"))] == [
        (str(sets / "a"), "a", 2),
        (str(sets / "b"), "b", 0),
    ]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    asked = (
        MixedSet("https://host/x/train", 0.25, "far", 2.5, {"tabby": "cat"}, "first"),
        MixedSet(str(tmp_path / "y" / "train"), 3, captions="none"),
        MixedSet("/z/train", 0),
    )
    for name in ("mix.json", "mix.yml"):
        write_mix(tmp_path / name, asked)
        found = read_mix(str(tmp_path / name))
        assert [one.name for one in found] == ["far", "y/train", "z/train"]
        assert [(o.path, o.weight, o.repeat, o.classes, o.captions) for o in found] == [
            (o.path, o.weight, o.repeat, o.classes, o.captions) for o in asked
        ]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["{a}=much", "{b}=1"], "weight 'much' of '{a}': expected SET=WEIGHT with a number, 0 or more"),
        (["{a}=nan", "{b}=1"], "weight 'nan'"),
        (["{a}=-1"], "weight '-1'"),
        (["{a}"], "'{a}': expected SET=WEIGHT"),
        (["{a}=1", "{a}/=2"], "is there twice; give each set once"),
        (["{a}=0", "{b}=0"], "all weights are 0; expected one above 0"),
        (["{a}=1", "{large}=1"], "'{a}' were made with size = 16, those of '{large}' with 32"),
        (["{a}=1", "{wide}=1"], "'{a}' were made with mode = 'crop', those of '{wide}' with 'buckets'"),
        (["{a}=1", "{numbers}=1"], "the classes of '{a}' are names ('cat', 'dog'), those of '{numbers}' numbers"),
        (["{none}=1"], "does not exist"),
    ],
)
def test_sets_that_cannot_be_mixed(
    sets: Path, tmp_path: Path, words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {name: sets / name for name in ("a", "b", "numbers", "large", "wide", "none")}
    assert run("mix", *(word.format(**places) for word in words), "--out", tmp_path / "mix.json") == 2
    said = capsys.readouterr().err
    assert expected.format(**places) in said
    assert said.count("\n") == 1
    assert not (tmp_path / "mix.json").exists()


def test_the_same_set_in_two_folders(sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "again").mkdir()
    for path in (sets / "a").iterdir():
        if path.is_file():
            (tmp_path / "again" / path.name).symlink_to(path)
    assert (tmp_path / "again" / INDEX_NAME).is_file()
    assert run("mix", f"{sets / 'a'}=1", f"{tmp_path / 'again'}=1", "--out", tmp_path / "mix.json") == 2
    assert "is the same data set as" in capsys.readouterr().err


A = '"path": "a", "weight": 1'


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "cannot be read"),
        ("[]", "format is 'list', expected 'megapix-mix'"),
        ('{"format": "megapix-mix", "version": 2}', "version is 2, this release reads version 1"),
        ("", "sets = None: expected a list"),
        ('"a"', "set 1 is 'a'; expected a table with path and weight"),
        ('{"path": "a", "weight": "1"}', "set 1 ('a'): weight = '1': expected a number, 0 or more"),
        ('{"path": "a", "weight": true}', "weight = True: expected a number"),
        ('{"path": "a", "weight": NaN}', "weight = nan: expected a number"),
        ('{"path": "a"}', "weight = None: expected a number"),
        ('{"weight": 1}', "path = None: expected a shard folder or its URL"),
        (f'{{{A}, "repeat": 0}}', "repeat = 0: expected epochs, a number above 0"),
        (f'{{{A}, "repaet": 2}}', "unknown key 'repaet' (did you mean 'repeat'?)"),
        (f'{{{A}, "classes": ["cat"]}}', "classes = ['cat']: expected a table"),
        (f'{{{A}, "captions": "all"}}', "captions = 'all' (one of: first, none, weighted)"),
        (f'{{{A}, "name": "two words"}}', "name = 'two words': expected a word"),
        (f'{{{A}}}, {{"path": "./a", "weight": 2}}', "is there twice"),
        (f'{{{A}, "name": "x"}}, {{"path": "b", "weight": 2, "name": "x"}}', "two sets have the name 'x'"),
        (f'{{{A}, "classes": {{"lion": "cat"}}}}', "classes names 'lion', which is no class of it"),
    ],
)
def test_files_that_are_no_mix(
    sets: Path, tmp_path: Path, text: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = sets / f"{abs(hash(text))}.json"
    if text and "format" not in text and text not in ("{", "[]"):
        text = f'{{"format": "megapix-mix", "version": 1, "sets": [{text}]}}'
    path.write_text(text or '{"format": "megapix-mix", "version": 1}')
    assert run("inspect", path) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1
