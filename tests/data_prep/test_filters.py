"""Filters: what each takes, in which order, the same bytes whatever the workers and interruptions; hostile input."""

from __future__ import annotations

import io
import json
import pickle
import random
import tarfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from data_prep import cli
from data_prep.filters import duplicates
from data_prep.filters.expression import parse
from data_prep.filters.rules import Duplicates
from data_prep.parts.chunks import Chunk
from data_prep.writing import account
from megapix.errors import InputError
from megapix.shards.index import read_index
from megapix.shards.table import Captions
from tests.data_prep.test_sources import add
from tests.data_prep.test_write import hashes
from tests.shards.test_images import encoded, photo


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


# ---------------------------------------------------------------------------------------------------------------------
# Expressions
# ---------------------------------------------------------------------------------------------------------------------

ROW: dict[str, Any] = {"a": 5, "b": 0.5, "lang": "en", "text": "7.5", "safe-ish": "yes", "flag": True, "none": None}


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        ("a > 4", True),
        ("a > 5", False),
        ("a >= 5 and b < 1", True),
        ("a > 9 or b < 1", True),
        ("not a > 9", True),
        ("-1 < b <= 0.5", True),
        ("0.5 < b < 1", False),
        ("lang == 'en'", True),
        ("lang in ('de', 'en')", True),
        ("lang not in ['de', 'en']", False),
        ("'e' in lang", True),
        ("a in (1, 5)", True),
        ("text > 7", True),  # a number written as a text, as CSV has it
        ("text > 8", False),
        ("lang > 7", False),  # neither true nor false
        ("not lang > 7", False),
        ("lang != 7", True),
        ("flag == True", True),
        ("`safe-ish` == 'yes'", True),
        ("lang == 'a `quoted` text'", False),
        ("gone > 1", False),
        ("not gone > 1", False),  # it is not known, and so not true
        ("gone > 1 or a > 1", True),
        ("gone > 1 and a > 9", False),
        ("not (gone > 1 and a > 9)", True),
        ("gone is missing", True),
        ("none is missing", True),
        ("a is missing", False),
        ("a is not missing and gone is missing", True),
        ("gone is missing or gone > 5", True),
        ("gone not in (1, 2)", False),
        ("a > b", True),
        ("a < 1e999", True),
    ],
)
def test_expressions(text: str, keeps: bool) -> None:
    assert pickle.loads(pickle.dumps(parse(text))).keeps(ROW) is keeps


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "5 > 4",
        "a = 5",
        "a > 5 &&",
        "a.b > 5",
        "a.__class__ == 5",
        "().__class__.__bases__[0] == a",
        "__import__('os').system('true') == a",
        "print(a) == 5",
        "a > (lambda: 5)()",
        "[x for x in a] == 5",
        "a[0] > 5",
        "9 ** 9 ** 9 ** 9 > a",
        "a * 999999999 > 5",
        "'x' * 999999999 == a",
        "a > 5 if b else 3",
        "(a := 5) > 3",
        "f'{a}' == 'x'",
        "a > b'bytes'",
        "a == None",
        "a is None",
        "a is b",
        "a > 5j",
        "safe-ish > 5",
        "a in 5",
        "a in (b, 5)",
        "a > ...",
        "a > 5\nimport os",
        "(" * 500 + "a" + ")" * 500 + " > 5",
        "not " * 240 + "a > 5 " + "and a",
        "9" * 990 + " > a.b",
        "a > " + "1" * 2000,
    ],
)
def test_hostile_expressions_are_refused_in_one_line(text: str) -> None:
    start = time.perf_counter()
    with pytest.raises(InputError, match="--where ") as refused:
        parse(text)
    assert len(str(refused.value).splitlines()) == 1
    assert time.perf_counter() - start < 2
    parse("not " * 200 + "a > 5").keeps(ROW)  # deep, but bounded by the length


def test_random_expressions_end_and_touch_nothing() -> None:
    """What is accepted gives a truth value for any metadata; everything else is an InputError."""
    plain = ["a > 5", "lang in ('en', 5)", "gone is missing", "lang < a", "`b` == 'x'", "and", "or", "not", "and not"]
    words = [*plain, *"(),5.[]:-+", "**", "lambda", "x()", "None", "True", "==", "is", "not"]
    rng, accepted = random.Random(0), 0
    for _ in range(5000):
        text = " ".join(rng.choices(words, k=rng.randint(1, 7)))
        try:
            expression = parse(text)
        except InputError:
            continue
        accepted += 1
        for row in (ROW, {}, {"a": "x", "lang": 3, "b": []}):
            assert expression.keeps(row) in (True, False)
    assert accepted > 50


# ---------------------------------------------------------------------------------------------------------------------
# Duplicates
# ---------------------------------------------------------------------------------------------------------------------


def greedy(hashes_: list[int], threshold: int) -> list[bool]:
    """Every pair compared, in order."""
    stay, taken = list[int](), []
    for one in hashes_:
        taken.append(any(bin(one ^ other).count("1") <= threshold for other in stay))
        stay += [] if taken[-1] else [one]
    return taken


@pytest.mark.parametrize("threshold", [1, 3, 4, 8])
@pytest.mark.parametrize("block", [32, 4096])
def test_near_hashes_are_found_as_by_comparing_all(threshold: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "BLOCK", block)
    monkeypatch.setattr(duplicates, "PAIRS", 1 << 10)
    rng = np.random.default_rng(threshold)
    cluster = [int(rng.integers(0, 2**63))]
    while len(cluster) < 150:  # a tangle of chains, in which it matters which ones stay
        cluster.append(cluster[rng.integers(len(cluster))] ^ (1 << int(rng.integers(64))))
    every = [*cluster, *(int(one) for one in rng.integers(0, 2**63, 150)), *cluster[:20]]
    every = [every[n] for n in rng.permutation(len(every))]
    prints = np.array(every, ">u8").view(np.uint8).reshape(-1, 8)
    assert duplicates.duplicates_of(prints, Duplicates(threshold)).tolist() == greedy(every, threshold)


def test_no_duplicates_of_nothing() -> None:
    for width, kind in ((32, Duplicates()), (8, Duplicates(4))):
        assert duplicates.duplicates_of(np.empty((0, width), np.uint8), kind).tolist() == []


# ---------------------------------------------------------------------------------------------------------------------
# write and index
# ---------------------------------------------------------------------------------------------------------------------

PHOTO = Image.fromarray(photo(96, 96, seed=3))
IMAGES: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
    "00": (PHOTO, "a photo of a field", {"aesthetic": 6.5, "similarity": 0.3, "lang": "en"}),
    "01": (Image.fromarray(photo(40, 200, seed=1)), "a wide one", {"aesthetic": 7, "lang": "EN"}),
    "02": (Image.fromarray(photo(30, 30, seed=2)), "a small one", {"aesthetic": 8, "lang": "de"}),
    "03": (Image.fromarray(photo(64, 64, seed=4)), "dull here", {"aesthetic": 4.5, "lang": "en"}),
    "04": (Image.fromarray(photo(64, 64, seed=5)), "no score here", {"lang": "en"}),
    "05": (PHOTO, "a copy of the field", {"aesthetic": 6.5, "lang": "en"}),
    "06": (PHOTO.filter(ImageFilter.GaussianBlur(0.6)), "a blurred field", {"aesthetic": 6, "lang": "en"}),
    "07": (Image.fromarray(photo(300, 300, seed=6)), "a large one", {"aesthetic": 6, "lang": "en"}),
    "08": (Image.fromarray(photo(64, 64, seed=7)), "short", {"aesthetic": 9, "lang": "en"}),
    "09": (Image.fromarray(photo(64, 64, seed=8)), "un beau champ", {"aesthetic": 9, "lang": "fr"}),
    "10": (Image.fromarray(photo(64, 72, seed=9)), "one that stays", {"aesthetic": 9, "lang": "de"}),
}


def tars(folder: Path, images: dict[str, tuple[Image.Image, str, dict[str, Any]]] = IMAGES, a_tar: int = 4) -> Path:
    """Tar files of PNG, text and JSON; one more sample has no image that can be read."""
    folder.mkdir()
    keys = [*images, "99"]
    for start in range(0, len(keys), a_tar):
        with tarfile.open(folder / f"{start:05d}.tar", "w") as tar:
            for key in keys[start : start + a_tar]:
                image, caption, about = images.get(key, (None, "a broken one", {"aesthetic": 9, "lang": "en"}))
                add(tar, f"{key}.png", encoded(image) if image else b"not an image")
                add(tar, f"{key}.txt", caption.encode())
                add(tar, f"{key}.json", json.dumps(about).encode())
    return folder


OPTIONS = [
    *("--size", 16, "--max-rejected", 0.1, "--caption-min", "2words", "--where", "aesthetic > 5"),
    *("--language", "lang=en,de", "--min-side", 32, "--max-side", 250, "--max-aspect", 4),
]
TAKEN = {
    "--caption-min 2words": 1,
    "--where aesthetic > 5": 2,
    "--language lang=en,de": 1,
    "--min-side 32": 1,
    "--max-side 250": 1,
    "--max-aspect 4": 1,
}
"""08; 03 and 04, which has no score; 09; 02; 07; 01."""


def captions_of(out: Path) -> list[str]:
    index = read_index(out)
    reader = Captions(out, index)
    return sorted(reader.of(sample)[0].text for sample in range(index.samples))


@pytest.mark.parametrize(
    ("dedupe", "left", "taken"),
    [
        ([], ["a blurred field", "a copy of the field", "a photo of a field", "one that stays"], {}),
        (["--dedupe", "exact"], ["a blurred field", "a photo of a field", "one that stays"], {"--dedupe exact": 1}),
        (["--dedupe", "near=6"], ["a photo of a field", "one that stays"], {"--dedupe near=6": 2}),
    ],
    ids=["none", "exact", "near"],
)
@pytest.mark.parametrize("command", ["write", "index"])
def test_each_filter_counts_what_it_takes(
    command: str,
    dedupe: list[str],
    left: list[str],
    taken: dict[str, int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "near=6" in dedupe:
        pytest.importorskip("imagehash")
    source, out = tars(tmp_path / "tars"), tmp_path / "out"
    where = ["--out", out] if command == "index" else [out]
    arguments = [command, source, *where, *OPTIONS, *dedupe, "--workers", 1]
    if "exact" in dedupe:
        assert run(*arguments, "--dry-run") == 0
        assert not out.exists()
        lines = dict(line.strip().rsplit(None, 1) for line in capsys.readouterr().out.splitlines()[:-1])
        counts = {"samples": 12, **TAKEN, **taken, "cannot be read": 1, "left": 3}
        assert {name: int(count) for name, count in lines.items()} == counts
    assert run(*arguments) == 0
    counted = account.load(out)
    assert counted is not None
    assert counted.filtered == TAKEN | taken
    assert (counted.used, counted.rejected, counted.listed) == (len(left), 1, 36)
    assert counted.listed == counted.used + counted.rejected + sum(counted.filtered.values()) + counted.parts
    assert captions_of(out) == left
    recorded = [option for option in [*TAKEN, *taken] if option != "--min-side 32"]
    assert json.loads((out / "plan.json").read_text())["filters"] == recorded
    assert read_index(out).source["filters"] == recorded
    assert run("verify", out, "--workers", 1) == 0
    capsys.readouterr()
    assert run("inspect", out) == 0
    assert f"{7 + sum(taken.values())} filtered" in capsys.readouterr().out


def test_without_filters_nothing_is_recorded(tmp_path: Path) -> None:
    source = tars(tmp_path / "tars")
    for arguments in (["write", source, tmp_path / "a"], ["index", source, "--out", tmp_path / "b"]):
        assert run(*arguments, "--size", 16, "--max-rejected", 0.1, "--min-side", 32, "--workers", 1) == 0
    for out in (tmp_path / "a", tmp_path / "b"):
        assert not {"filters", "keep"} & json.loads((out / "plan.json").read_text()).keys()
        assert not {"filters", "keep"} & read_index(out).source.keys()
        assert read_index(out).image_policy["min_side"] == 32


def test_filtered_images_use_up_no_budget(tmp_path: Path) -> None:
    """Half of the set is too small, at the default budget."""
    small = {f"{n:02d}": (Image.new("RGB", (20 + 30 * (n % 2),) * 2, (n, 0, 0)), "text", {}) for n in range(10)}
    folder = tmp_path / "tars"
    folder.mkdir()
    with tarfile.open(folder / "a.tar", "w") as tar:
        for key, (image, caption, _) in small.items():
            add(tar, f"{key}.png", encoded(image))
            add(tar, f"{key}.txt", caption.encode())
    for arguments in (["write", folder, tmp_path / "a"], ["index", folder, "--out", tmp_path / "b"]):
        assert run(*arguments, "--size", 16, "--min-side", 48, "--workers", 1) == 0
    for out in (tmp_path / "a", tmp_path / "b"):
        assert (read_index(out).samples, read_index(out).rejected) == (5, 0)
        assert not (out / "rejected.jsonl").exists()


def test_sizes_are_those_of_the_upright_image(tmp_path: Path) -> None:
    """40 wide and 20 high as stored, and turned: the longer side is the height, and so is the ratio."""
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images" / "class").mkdir(parents=True)
    for name, options in (("turned", {"exif": exif}), ("plain", {})):
        Image.new("RGB", (40, 20), (9, 9, 9)).save(tmp_path / "images" / "class" / f"{name}.jpg", **options)
    for option, value, used in (("--min-side", 20, 2), ("--max-side", 40, 2), ("--max-aspect", 2, 2)):
        out = tmp_path / f"out{option}"
        assert run("write", tmp_path / "images", out, "--size", 8, option, value, "--workers", 1) == 0
        assert read_index(out).samples == used
    assert run("write", tmp_path / "images", tmp_path / "none", "--size", 8, "--max-aspect", 1.9, "--workers", 1) == 2
    out = tmp_path / "same"
    assert run("write", tmp_path / "images", out, "--size", 8, "--dedupe", "exact", "--workers", 1) == 0
    assert read_index(out).samples == 2, "equal bytes of pixels, but 40x20 and 20x40"


@pytest.mark.parametrize("command", ["write", "index"])
def test_duplicates_do_not_depend_on_workers_or_interruptions(command: str, tmp_path: Path) -> None:
    """A quarter of the images are copies; the folder of an interrupted command keeps what was looked at."""
    same = {f"{n:02d}": (Image.fromarray(photo(24, 24, seed=n % 15)), f"no. {n}", {"n": n}) for n in range(20)}
    source = tars(tmp_path / "tars", same, a_tar=3)

    def make(out: Path, *options: object) -> int:
        where = ["--out", out] if command == "index" else [out]
        return run(command, source, *where, "--size", 16, "--dedupe", "exact", *options)

    assert make(tmp_path / "one", "--max-rejected", 0.5, "--workers", 1) == 0
    assert captions_of(tmp_path / "one") == sorted(f"no. {n}" for n in range(15))
    assert make(tmp_path / "two", "--max-rejected", 0, "--workers", 2) == 2, "the broken one is more than allowed"
    assert make(tmp_path / "two", "--max-rejected", 0.5, "--workers", 2) == 0
    assert hashes(tmp_path / "two") == hashes(tmp_path / "one")


def test_a_survey_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from data_prep.filters import survey
    from data_prep.filters.rules import Filters
    from data_prep.listing.base import Item
    from megapix.shards.image_policy import Policy

    class Counting:
        reads = 0

        def read(self, item: Item, size: int) -> bytes:
            Counting.reads += 1
            return encoded(Image.new("RGB", (8, 8), (int(item.name) % 4, 0, 0)))

    filters, policy = Filters(duplicates=Duplicates()), Policy.make("crop", 8)
    (tmp_path / ".receipts").mkdir()
    some = Chunk(0, tuple(Item(str(n), 0, "") for n in range(6)))
    first = survey._look_at(Counting(), filters, policy, tmp_path, some)
    assert Counting.reads == 6
    assert survey._look_at(Counting(), filters, policy, tmp_path, some) == first
    assert Counting.reads == 6
    assert survey.resolved(first, filters).tolist() == [0, 0, 0, 0, 1, 1]


def test_columns_are_kept_as_they_are(tmp_path: Path) -> None:
    source, out = tars(tmp_path / "tars"), tmp_path / "out"
    keep = ["--keep", "aesthetic,similarity", "--size", 16, "--max-rejected", 0.1, "--workers", 1]
    assert run("write", source, out, *keep) == 0
    with tarfile.open(out / "shard-000000.tar") as tar:
        found = [
            json.loads(tar.extractfile(name).read())  # type: ignore[union-attr]
            for name in tar.getnames()
            if name.endswith(".json")
        ]
    kept = {about.pop("source"): about for about in found}
    assert kept["00000.tar/00.png"] == {"caption": "a photo of a field", "aesthetic": 6.5, "similarity": 0.3}
    assert kept["00000.tar/01.png"] == {"caption": "a wide one", "aesthetic": 7}
    assert kept["00004.tar/04.png"] == {"caption": "no score here"}
    assert read_index(out).source["keep"] == ["aesthetic", "similarity"]
    again = tmp_path / "again"
    assert run("write", out, again, "--where", "similarity is not missing", "--size", 16, "--workers", 1) == 0
    assert captions_of(again) == ["a photo of a field"]


def test_parquet_columns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [(n, 4.0 + n, None if n == 2 else f"t{n}", float("nan") if n == 3 else 1.5) for n in range(5)]
    table = {
        "image": [{"bytes": encoded(Image.new("RGB", (9, 9), (n, 0, 0)))} for n, *_ in rows],
        "text": [f"caption {n}" for n, *_ in rows],
        "score": [score for _, score, *_ in rows],
        "tag": [tag for *_, tag, _ in rows],
        "odd": [odd for *_, odd in rows],
    }
    source, out = tmp_path / "rows", tmp_path / "out"
    source.mkdir()
    pq.write_table(pa.table(table), source / "a.parquet", row_group_size=2)
    where = ["--where", "score > 4", "--where", "tag in ('t1', 't2', 't3')", "--where", "odd == 1.5"]
    assert run("write", source, out, "--size", 8, *where, "--keep", "score,tag", "--workers", 1) == 0
    counted = account.load(out)
    assert counted is not None
    assert counted.filtered == {
        "--where score > 4": 1,
        "--where tag in ('t1', 't2', 't3')": 2,
        "--where odd == 1.5": 1,
    }
    with tarfile.open(out / "shard-000000.tar") as tar:
        (name,) = [name for name in tar.getnames() if name.endswith(".json")]
        about = json.load(io.TextIOWrapper(tar.extractfile(name)))  # type: ignore[arg-type]
    assert about == {"source": "a.parquet/0/1", "caption": "caption 1", "score": 5.0, "tag": "t1"}
    assert run("write", source / "a.parquet", tmp_path / "o", "--size", 8, "--where", "scroe > 4") == 2
    assert "--where scroe > 4: not one sample has 'scroe' in its metadata" in capsys.readouterr().err


def test_another_score_is_another_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a filter reads belongs to the plan: a score that has changed is refused, and not mixed in. Here the tar file
    counts as another one."""
    for value in (6.5, 6.6):
        images = {"00": (PHOTO, "a field", {"score": value})}
        source = tars(tmp_path / f"tars-{value}", images)
        code = run("write", source, tmp_path / "out", "--size", 16, "--keep", "score", "--max-rejected", 0.5)
        assert code == (0 if value == 6.5 else 2)
    assert "00000.tar': has changed: it holds other samples" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--where", "aesthetics > 5"], "--where aesthetics > 5: not one sample has 'aesthetics' in its metadata"),
        (["--where", "aesthetic > 50"], "not one sample can be used; --where aesthetic > 50 takes 11"),
        (["--keep", "caption"], "--keep 'caption': column 'caption' is there anyway"),
        (["--keep", "a,,b"], "--keep 'a,,b': column '' is empty"),
        (["--keep", "gone"], "--keep gone: not one sample has 'gone' in its metadata"),
        (["--caption-min", "3 apples"], "--caption-min = '3 apples': expected characters, such as 20, or words"),
        (["--language", "en"], "--language = 'en': expected COLUMN=LANGUAGE"),
        (["--language", "lang="], "--language = 'lang=': expected COLUMN=LANGUAGE"),
        (["--dedupe", "fuzzy"], "--dedupe = 'fuzzy': expected exact, near, or near=BITS"),
        (["--dedupe", "near=64"], "--dedupe = 'near=64': expected exact, near, or near=BITS"),
        (["--dedupe", "near="], "--dedupe = 'near=': expected exact, near, or near=BITS"),
        (["--max-aspect", "0.5"], "--max-aspect = 0.5: expected at least 1, or 0 for any"),
        (["--max-aspect", "nan"], "--max-aspect = nan: expected at least 1"),
        (["--max-side", "-1"], "--max-side = -1: expected at least 0"),
    ],
)
def test_bad_options(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tars(tmp_path / "tars", {key: IMAGES[key] for key in list(IMAGES)[:10]})
    command = ["write", source, tmp_path / "out", "--size", 16, "--max-rejected", 0.5, "--workers", 1]
    assert run(*command, *options) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("data_prep: error: ")
    assert message in line


def test_a_missing_package_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from data_prep.filters import rules

    find = rules.importlib.util.find_spec
    monkeypatch.setattr(
        rules.importlib.util, "find_spec", lambda name, *rest: None if name == "imagehash" else find(name, *rest)
    )
    assert run("write", tars(tmp_path / "tars"), tmp_path / "out", "--size", 16, "--dedupe", "near") == 2
    assert "pip install 'megapix[dedupe]'" in capsys.readouterr().err
