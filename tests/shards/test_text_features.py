"""Text features stored with the shards: against the encoder, kills, damage, other recipes, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data_prep import cli
from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.conditioning.conditioner import StoredText
from megapix.config import DataConfig, preset
from megapix.data.arrays import Extras
from megapix.data.batch import padded
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.encoders.text import TextEncoder, load
from megapix.errors import InputError
from megapix.shards.captions import Caption, pack
from megapix.shards.image_policy import Policy
from megapix.shards.index import CAPTIONS_NAME, INDEX_NAME, TABLE_NAME, read_index, write_index
from megapix.shards.storage.local import MAX_OPEN
from megapix.shards.table import RECORD, Captions, SampleRecord
from megapix.shards.tables.files import file_name
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import (
    EMPTY_NAME,
    KIND,
    Row,
    TextFeatures,
    read_text_features,
    write_file,
    write_manifest,
)
from megapix.shards.text_recipe import Recipe, recipe_of
from tests.data_prep.test_write import hashes
from tests.support import text_encoders
from tests.support.launch import ROOT
from tests.support.listed_features import make_listed
from tests.support.small_run import refused
from tests.support.text_encoders import CAPTIONS, WIDTH, WORDS

SAMPLES, MAX = 40, 12
RECIPE = Recipe(max_tokens=MAX, normalize="rms", scale=0.5, prefix="", dtype="fp32")
FIRST, LAST = "text-000000.safetensors", "text-000002.safetensors"


def captions_by_name(name: str) -> list[str]:
    """One to three captions of an image, or an empty one now and then, and one that is too long."""
    number = int(Path(name).stem)
    words = [WORDS[(number * 7 + n) % len(WORDS)] for n in range(5)]
    several = [" ".join(words[: 1 + number % 5]), CAPTIONS[number % 5], "the same of all"]
    return several[: 1 + number % 3] if number % 10 else [""]


@pytest.fixture(scope="module")
def plain(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small images in three shards, with captions, and without features."""
    source = ImageFolder.open(image_folder)
    items = [
        item._replace(caption=pack([Caption(text, 1.0 + n) for n, text in enumerate(captions_by_name(item.name))]))
        for item in source.items
    ]
    out = tmp_path_factory.mktemp("shards") / "captions"
    write(replace(source, items=items), out, Options(Policy.make("crop", 16), samples_per_shard=16), 1, False)
    return out


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_encoders.make(tmp_path_factory.mktemp("text") / "t5", "t5")


@pytest.fixture(scope="module")
def encoder(encoder_folder: Path) -> TextEncoder:
    return load(str(encoder_folder), RECIPE)


def command(shards: Path, encoder: Path, *more: str) -> list[str]:
    options = ["--max-tokens", str(MAX), "--scale", "0.5", "--dtype", "fp32", "--batch", "3"]
    options += ["--padding", "masked", "--normalize", "rms", "--prefix", ""]
    return ["embed-text", str(shards), "--encoder", str(encoder), *options, *more]


@pytest.fixture(scope="module")
def stored(plain: Path, encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shards with features."""
    folder = Path(shutil.copytree(plain, tmp_path_factory.mktemp("stored") / "shards"))
    assert cli.main(command(folder, encoder_folder)) == 0
    return folder


@pytest.fixture
def copy(stored: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stored, tmp_path / "shards"))


def opened(folder: Path) -> TextFeatures:
    features = read_text_features(folder, read_index(folder))
    assert features is not None
    return features


def samples_of(folder: Path) -> Iterator[tuple[int, list[str]]]:
    """Number and captions of every sample in the index's order, from the tar files' own members."""
    import tarfile

    number = 0
    for shard in sorted(folder.glob("shard-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                if member.name.endswith(".json"):
                    about = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    yield number, captions_by_name(about["source"])
                    number += 1


# ---------------------------------------------------------------------------------------------------------------------
# What is stored
# ---------------------------------------------------------------------------------------------------------------------


def test_stored_are_the_encoders_features_rounded_to_bf16(stored: Path, encoder: TextEncoder) -> None:
    """Bit for bit, when the same captions go through the encoder together; else to rounding."""
    reader, seen = TextFeatureReader(opened(stored)), 0
    for sample, captions in samples_of(stored):
        assert reader.captions(sample) == len(captions)
        for n, caption in enumerate(captions):
            found = reader.read(sample, n)
            assert found.dtype == np.int16
            expected = encoder([caption])[0][0]
            bits = torch.from_numpy(found.copy()).view(torch.bfloat16)
            assert bits.shape == expected.shape
            assert torch.allclose(bits.float(), expected, rtol=2**-8, atol=1e-4)
            seen += 1
    assert sample == SAMPLES - 1
    assert seen > SAMPLES
    assert torch.equal(torch.from_numpy(reader.empty().copy()).view(torch.bfloat16), encoder([""])[0][0].bfloat16())


def test_rounding_is_to_the_nearest(plain: Path, encoder_folder: Path, encoder: TextEncoder, tmp_path: Path) -> None:
    """A caption at a time, in the command and here: exactly what torch makes of the fp32 numbers."""
    folder = Path(shutil.copytree(plain, tmp_path / "shards"))
    assert cli.main([*command(folder, encoder_folder), "--batch", "1"]) == 0
    reader = TextFeatureReader(opened(folder))
    for sample, captions in samples_of(folder):
        for n, caption in enumerate(captions):
            expected = encoder([caption])[0][0].bfloat16().view(torch.int16).numpy()
            assert np.array_equal(reader.read(sample, n), expected)


def test_attended_padding_is_stored_with_each_caption(
    plain: Path, stored: Path, encoder_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MAX tokens each, as the encoder gives them; the same in a run, without a mask; and old files are refused."""
    folder = Path(shutil.copytree(plain, tmp_path / "shards"))
    assert cli.main([*command(folder, encoder_folder), "--padding", "attended"]) == 0
    features, recipe = opened(folder), replace(RECIPE, padding="attended")
    encoder = load(str(encoder_folder), recipe)
    assert features.recipe == encoder.recipe
    for file in features.all_files:
        assert file.tokens == file.captions * MAX
        assert (folder / file.name).stat().st_size == features.bytes_of(file)
    reader = TextFeatureReader(features)
    (sample, captions) = next(pair for pair in samples_of(folder) if len(pair[1]) > 1)
    of_sample = [torch.from_numpy(reader.read(sample, n).copy()).view(torch.bfloat16) for n in range(len(captions))]
    assert torch.allclose(torch.stack(of_sample).float(), encoder(captions)[0], rtol=2**-8, atol=1e-4)

    batch = MicroBatches(locate(c := DataConfig(path=str(folder), image_size=16)), c, 1, 4, Extras(text=features))
    (text,) = batch[np.arange(4)].text  # type: ignore[union-attr]
    assert text.shape == (4, MAX, WIDTH)
    told = StoredText(padded([reader.empty()], True), torch.device("cpu"), features)
    for condition in (told.of_subjects([sample]), told.rows(2)):
        assert [len(condition.cond), len(condition.null)] == [1, 1]
        assert condition.with_null()[0].shape[1:] == (MAX, WIDTH)
    assert torch.equal(told.of_subjects([sample]).cond[0][0], of_sample[0])

    with pytest.raises(InputError, match=r"text\.padding = 'attended', but the features stored with .* with 'masked'"):
        opened(stored).require(recipe)
    error = refused([*command(stored, encoder_folder), "--padding", "attended"], capsys, cli.main)
    assert "--padding = 'attended', but the features stored with" in error
    assert "padding" not in (stored / INDEX_NAME).read_text(), "masked ones are byte for byte what they were"


def test_captions_of_attended_padding_have_one_length(plain: Path, encoder_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "shards"))
    assert cli.main([*command(folder, encoder_folder), "--padding", "attended"]) == 0
    features = opened(folder)
    entry = read_index(folder).shards[0]
    rows = [Row(np.zeros((MAX - (n == 3), WIDTH), np.int16), False) for n in range(entry.samples)]
    file = write_file(folder, features.recipe, features.data_digest, FIRST, [1] * entry.samples, rows)
    with pytest.raises(InputError, match="its tables"):
        TextFeatureReader(replace(features, files=(file, *features.files[1:]))).read(0, 0)


def test_the_files_are_plain_safetensors(stored: Path, plain: Path, encoder: TextEncoder) -> None:
    index, features = read_index(stored), opened(stored)
    names = {path.name for path in stored.iterdir()} - {path.name for path in plain.iterdir()}
    assert names == {FIRST, "text-000001.safetensors", LAST, EMPTY_NAME, KIND.table}
    captions, cut, tokens = [list(texts) for _, texts in samples_of(stored)], 0, 0
    for file, entry in zip(features.files, index.shards, strict=True):
        tensors = load_file(stored / file.name)
        mine, captions = captions[: entry.samples], captions[entry.samples :]
        assert tensors["first"].tolist() == np.cumsum([0, *map(len, mine)]).tolist()
        lengths = [int(encoder([text])[1].sum()) for texts in mine for text in texts]
        assert tensors["starts"].tolist() == np.cumsum([0, *lengths]).tolist()
        assert tensors["features"].dtype == torch.bfloat16
        assert tensors["features"].shape == (sum(lengths), WIDTH)
        assert (file.samples, file.captions, file.tokens) == (entry.samples, len(lengths), sum(lengths))
        assert features.bytes_of(file) == (stored / file.name).stat().st_size
        tokens, cut = tokens + file.tokens, cut + file.cut
    assert load_file(stored / EMPTY_NAME)["features"].shape == (1, WIDTH)
    assert 0 < cut < tokens


def test_the_index_says_what_they_are_and_stays_the_same_data_set(
    stored: Path, plain: Path, encoder: TextEncoder, encoder_folder: Path
) -> None:
    with_text, without = read_index(stored), read_index(plain)
    assert with_text.digest == without.digest
    assert replace(with_text, text=None) == without
    assert "text" not in json.loads((plain / INDEX_NAME).read_text())
    about = json.loads((stored / INDEX_NAME).read_text())["text"]
    assert (about["encoder"], about["recipe"]["digest"]) == (str(encoder_folder), encoder.digest)
    assert about["data_digest"] == with_text.digest
    assert opened(stored).recipe == encoder.recipe
    assert read_text_features(plain, without) is None


def test_the_commands_defaults_are_the_presets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes without an option but for the encoder is what a run of the preset wants."""
    wanted, asked = recipe_of(preset("t2i-512").text), list[Recipe]()

    def embed(folder: Path, name: str, recipe: Recipe, batch: int, overwrite: bool, **_: Any) -> None:
        asked.append(recipe)
        raise InputError("seen")

    monkeypatch.setattr("data_prep.passes.text_features.embed_text", embed)
    assert cli.main(["embed-text", "SHARDS", "--encoder", "ENCODER"]) == 2
    assert cli.main(["embed-text", "SHARDS", "--encoder", "ENCODER", "--prefix", ""]) == 2
    assert asked == [wanted, replace(wanted, prefix="")]
    assert wanted.attended
    assert wanted.prefix.endswith("\nUser Prompt: ")


def test_the_end_says_how_much_there_is(
    plain: Path, encoder_folder: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "shards"))
    assert cli.main(command(folder, encoder_folder)) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("data_prep: a caption of ")
    assert f" tokens was cut to max_tokens = {MAX}" in first
    files, features = opened(stored).files, opened(stored)
    captions, tokens, cut = (sum(getattr(f, key) for f in files) for key in ("captions", "tokens", "cut"))
    size = sum(path.stat().st_size for path in stored.glob("text-*.safetensors"))
    assert size == sum(map(features.bytes_of, features.all_files))
    said = f"text features of {captions:,} captions, {tokens:,} tokens of width {WIDTH}, {size:,} bytes; {cut} captions"
    assert said in last
    assert hashes(folder) == hashes(stored)
    assert cli.main(command(folder, Path(shutil.copytree(encoder_folder, tmp_path / "moved")))) == 0
    assert "was finished already: text features" in capsys.readouterr().out
    assert hashes(folder) == hashes(stored), "the encoder's name is no part of what they are"


def test_verify_and_inspect_know_them(stored: Path, plain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", str(stored), "--workers", "1"]) == 0
    assert "everything is as the index says" in capsys.readouterr().out
    assert cli.main(["inspect", str(stored)]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  text ")]
    assert f"of width {WIDTH}" in line
    assert f"{MAX} tokens at most" in line
    assert cli.main(["inspect", str(plain)]) == 0
    assert "  text " not in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal
from data_prep import cli
from data_prep.passes import text_features

write_file = text_features.write_file

def until(name, rows):
    for number, row in enumerate(rows):
        if name == "text-000001.safetensors" and number == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

def killed(folder, recipe, data_digest, name, captions, rows):
    return write_file(folder, recipe, data_digest, name, captions, until(name, rows))

text_features.write_file = killed
import sys
cli.main(sys.argv[1:])
"""
"""`data_prep`, killed within its second file."""


@pytest.mark.long
def test_a_kill_ends_in_the_same_bytes(plain: Path, encoder_folder: Path, stored: Path, tmp_path: Path) -> None:
    folder, script = Path(shutil.copytree(plain, tmp_path / "shards")), tmp_path / "killed.py"
    script.write_text(KILLED)
    process = subprocess.run(
        [sys.executable, str(script), *command(folder, encoder_folder)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
        timeout=120,
    )
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in folder.glob("text-*")] == [FIRST], "nothing half-done has a name"
    assert list(folder.glob(".text-*.tmp"))
    assert hashes(folder)[INDEX_NAME] == hashes(plain)[INDEX_NAME], "the index does not promise what is not there"
    written = (folder / FIRST).stat().st_mtime_ns
    assert cli.main(command(folder, encoder_folder)) == 0
    assert (folder / FIRST).stat().st_mtime_ns == written, "what was done is not done again"
    assert hashes(folder) == hashes(stored)


def test_files_that_are_lost_or_cut_short_are_computed_again(copy: Path, encoder_folder: Path, stored: Path) -> None:
    (copy / LAST).unlink()
    (copy / EMPTY_NAME).unlink()
    os.truncate(copy / FIRST, 1000)
    (copy / "text-000001.safetensors").write_bytes(b"\x08" + bytes(7) + b"[[[[[[[[")
    assert cli.main(command(copy, encoder_folder)) == 0
    assert hashes(copy) == hashes(stored)


# ---------------------------------------------------------------------------------------------------------------------
# Other recipes
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_wants_its_own_recipe(stored: Path, encoder: TextEncoder) -> None:
    features = opened(stored)
    features.require(encoder.recipe)
    features.require(replace(encoder.recipe, digest="", width=0))
    for name, value, words in (
        ("digest", "ab" * 32, "text.digest = 'abababababababab…', but the features stored with"),
        (
            "width",
            2304,
            f"model.text_width = 2304, but the features stored with {str(stored)!r} were made with {WIDTH};",
        ),
        ("max_tokens", 300, f"text.max_tokens = 300, but the features stored with {str(stored)!r} were made with 12;"),
        ("normalize", "none", "text.normalize = 'none', but"),
        ("scale", 0.01, "text.scale = 0.01, but"),
        ("prefix", "x: ", "text.prefix = 'x: ', but"),
        ("dtype", "bf16", "text.dtype = 'bf16', but"),
        ("padding", "attended", "text.padding = 'attended', but"),
    ):
        with pytest.raises(InputError) as error:
            features.require(replace(encoder.recipe, **{name: value}))
        assert str(error.value).startswith(words)
        assert "\n" not in str(error.value)


def test_features_of_another_recipe_stay_until_they_are_to_be_replaced(
    copy: Path, encoder_folder: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command(copy, encoder_folder)
    for more, words in (
        (["--max-tokens", "5"], "--max-tokens = 5, but the features stored with"),
        (["--prefix", "user:"], "--prefix = 'user:', but the features"),
        (["--encoder", str(text_encoders.make(tmp_path / "other", "t5", seed=1))], "the digest of --encoder = '"),
    ):
        error = refused([*asked, *more], capsys, cli.main)
        assert words in error
        assert "--replace removes them" in error
        assert hashes(copy) == hashes(stored)
    other = [*asked, "--max-tokens", "5", "--replace"]
    assert cli.main(other) == 0
    assert opened(copy).recipe.max_tokens == 5
    changed, written = hashes(copy), (copy / FIRST).stat().st_mtime_ns
    (copy / LAST).unlink()
    assert cli.main(other) == 0
    assert (copy / FIRST).stat().st_mtime_ns == written, "--replace goes on, too"
    assert hashes(copy) == changed
    write_index(copy, replace(read_index(copy), text=None))  # as an interrupted command leaves it
    assert "--max-tokens = 12, but the features" in refused(asked, capsys, cli.main)
    assert cli.main([*asked, "--replace"]) == 0
    assert hashes(copy) == hashes(stored)


def test_features_of_other_shards(copy: Path, encoder_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder was prepared again, and its captions may be others."""
    index = read_index(copy)
    write_index(copy, replace(index, text=None, rejected=1))
    asked = command(copy, encoder_folder)
    assert "has features of the data set" in refused(asked, capsys, cli.main)
    assert cli.main([*asked, "--replace"]) == 0
    assert opened(copy).data_digest == read_index(copy).digest != index.digest


# ---------------------------------------------------------------------------------------------------------------------
# Damage
# ---------------------------------------------------------------------------------------------------------------------


def flipped(name: str, at: int) -> Callable[[Path], None]:
    """Change a bit of a file, `at` bytes from its end (or its beginning)."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[at] ^= 1
        (folder / name).write_bytes(data)

    return damage


def changed(**values: Any) -> Callable[[Path], None]:
    """Give some keys of what the index says other values."""

    def damage(folder: Path) -> None:
        index = read_index(folder)
        write_index(folder, replace(index, text={**(index.text or {}), **values}))

    return damage


def tables_of(folder: Path) -> int:
    """Where the tables begin in the first file."""
    return 8 + int.from_bytes((folder / FIRST).read_bytes()[:8], "little")


def of_recipe(**values: Any) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        recipe = (read_index(folder).text or {})["recipe"]
        changed(recipe=recipe | values)(folder)

    return damage


def of_file(**values: Any) -> Callable[[Path], None]:
    """Give some keys of the first file other values, where version 1 lists the files."""

    def damage(folder: Path) -> None:
        first, *rest = (read_index(make_listed(folder)).text or {})["files"]
        changed(files=[first | values, *rest])(folder)

    return damage


WRONG = "its text features are not described as they should be"
OPENED: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "missing": (lambda folder: (folder / LAST).unlink(), (f"{LAST} is missing; run its 'data_prep embed-text'",)),
    "the empty one's": (lambda folder: (folder / EMPTY_NAME).unlink(), (f"{EMPTY_NAME} is missing",)),
    "short": (lambda folder: os.truncate(folder / FIRST, 1000), (f"{FIRST} has 1000 bytes, expected",)),
    "another's": (flipped(FIRST, 100), (f"{FIRST} holds other features than index.json says",)),
    "version": (changed(version=9), (WRONG, "('megapix-text', 9), expected ('megapix-text', 2)")),
    "not a table": (changed(recipe=[]), (WRONG,)),
    "no encoder": (changed(encoder=None), (WRONG, "None is not a text")),
    "other shards": (changed(data_digest="0" * 64), (WRONG, "are of the data set 0000000000000000…")),
    "too few files": (
        changed(version=1, files=[]),
        ("index.json: 0 files for 3 entries; run its 'data_prep embed-text'",),
    ),
    "a wrong name": (of_file(name="/etc/passwd"), (WRONG, "named '/etc/passwd'")),
    "samples": (of_file(samples=17), (WRONG, "but its counts make")),
    "tokens": (of_file(tokens=3), (WRONG, "but its counts make")),
    "a negative count": (of_file(captions=-1), (WRONG, "-1 is not a count")),
    "no count": (of_file(tables="x"), (WRONG, "'x' is not a count")),
    "width": (of_recipe(width=48), (f"{KIND.table} is of other features than",)),
    "digest": (of_recipe(digest="x"), (WRONG, "'x' is not a SHA-256")),
    "normalize": (of_recipe(normalize="no"), (WRONG, "'no' and 'fp32'")),
    "scale": (of_recipe(scale=float("nan")), (WRONG, "scale is nan")),
    "max_tokens": (of_recipe(max_tokens="12"), (WRONG, "max_tokens is '12'")),
}


@pytest.mark.parametrize("name", OPENED)
def test_what_is_wrong_is_found_before_anything_is_read(
    name: str, copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damage, words = OPENED[name]
    damage(copy)
    with pytest.raises(InputError) as error:
        opened(copy)
    assert "\n" not in str(error.value)
    for part in words:
        assert part in str(error.value), error.value


def test_a_key_of_the_index_that_is_no_table(copy: Path) -> None:
    data = json.loads((copy / INDEX_NAME).read_text())
    (copy / INDEX_NAME).write_text(json.dumps(data | {"text": 3}))
    with pytest.raises(InputError, match=r"index.json: a key is missing or of the wrong type"):
        read_index(copy)


def test_changed_numbers_are_found_when_they_are_read(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flipped(FIRST, -1)(copy)
    flipped(EMPTY_NAME, -1)(copy)
    flipped(LAST, tables_of(copy) + 8)(copy)
    reader = TextFeatureReader(opened(copy))
    last = reader.captions(15) - 1
    reader.read(14, 0)
    with pytest.raises(InputError, match=rf"{FIRST}: the features of sample 15, caption {last} are not those that"):
        reader.read(15, last)
    with pytest.raises(InputError, match=rf"{FIRST}: sample 15 has {last + 1} captions there, but caption {last + 1}"):
        reader.read(15, last + 1)
    with pytest.raises(InputError, match=rf"{EMPTY_NAME}: the features of the empty caption are not those that were"):
        reader.empty()
    with pytest.raises(InputError, match=rf"{LAST}: its tables are not those that were written; delete the file"):
        reader.read(39, 0)
    capsys.readouterr()
    assert cli.main(["verify", str(copy), "--workers", "1"]) == 2
    faults = [line for line in capsys.readouterr().err.splitlines() if "fault: " in line]
    assert sum(f"sample 15, caption {last} are not" in line for line in faults) == 1
    assert sum("the empty caption are not" in line for line in faults) == 1
    assert any(f"{LAST}: its tables are not" in line for line in faults)


def test_verify_names_a_missing_file_and_a_wrong_description(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / LAST).unlink()
    assert cli.main(["verify", str(copy), "--workers", "1"]) == 2
    assert f"{LAST} is missing" in capsys.readouterr().err
    changed(version=9)(copy)
    assert cli.main(["verify", str(copy), "--workers", "1"]) == 2
    assert WRONG in capsys.readouterr().err


def rewritten(folder: Path, counts: Callable[[list[int]], list[int]], longest: int = 1) -> None:
    """Write the first file again with other counts of captions, the first caption `longest` times as long, and have the
    index say so: each check of its own then passes."""
    features, reader = opened(folder), TextFeatureReader(opened(folder))
    file = features.files[0]
    there = [reader.captions(sample) for sample in range(file.samples)]
    rows = [Row(reader.read(sample, n), False) for sample, count in enumerate(there) for n in range(count)]
    rows[0] = Row(np.concatenate([rows[0].bits] * longest), False)
    made = write_file(folder, features.recipe, features.data_digest, FIRST, counts(there), rows)
    index = read_index(folder)
    write_manifest(replace(features, files=(made, *features.files[1:])), index)


def test_captions_that_belong_to_other_samples_are_found(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewritten(copy, lambda counts: counts[::-1])
    assert cli.main(["verify", str(copy), "--workers", "1"]) == 2
    faults = [line for line in capsys.readouterr().err.splitlines() if "captions, but features of" in line]
    assert faults
    assert all(f"{FIRST}: sample " in line for line in faults)


def test_tables_of_a_stranger_lead_nowhere_else(copy: Path) -> None:
    """Their CRC is right, and so is the index."""
    again = Path(shutil.copytree(copy, copy.with_name("again")))
    rewritten(copy, lambda counts: [-1, counts[0] + counts[1] + 1, *counts[2:]])
    rewritten(again, lambda counts: counts, longest=MAX + 1)
    for folder in (copy, again):
        with pytest.raises(InputError, match=rf"{FIRST}: its tables are not those that were written"):
            TextFeatureReader(opened(folder)).read(0, 0)


def test_captions_that_are_none(plain: Path, encoder_folder: Path, tmp_path: Path) -> None:
    """Of an index from a stranger, whose hashes are right."""
    for number, (data, words) in enumerate(
        {
            b"\xff": "the captions of sample 0: 'utf-8' codec can't decode",
            b"x\x1fnan": "the captions of sample 0: the weight of caption 'x' is 'nan'",
            b"x\x1fmuch": "the captions of sample 0: could not convert string to float",
        }.items()
    ):
        folder = Path(shutil.copytree(plain, tmp_path / str(number)))
        packed = bytearray((folder / CAPTIONS_NAME).read_bytes())
        packed[: len(data)] = data
        (folder / CAPTIONS_NAME).write_bytes(packed)
        table = bytearray((folder / TABLE_NAME).read_bytes())
        first = SampleRecord(*RECORD.unpack_from(table))
        RECORD.pack_into(table, 0, *first._replace(caption_size=len(data)))
        RECORD.pack_into(table, RECORD.size, *first._replace(caption_offset=1 << 40))
        (folder / TABLE_NAME).write_bytes(table)
        with pytest.raises(InputError) as error:
            Captions(folder, read_index(folder)).texts(0)
        assert words in str(error.value)
    RECORD.pack_into(table, 0, *first._replace(caption_size=0))
    (folder / TABLE_NAME).write_bytes(table)
    with pytest.raises(InputError, match=r"the captions of sample 1: \d+ bytes at byte 1099511627776 are past its end"):
        Captions(folder, read_index(folder)).texts(0)


def test_a_file_that_is_cut_while_it_is_used(copy: Path) -> None:
    reader = TextFeatureReader(opened(copy))
    os.truncate(copy / FIRST, 1000)
    with pytest.raises(InputError, match=rf"{FIRST} has 1000 bytes, expected"):
        reader.read(0, 0)


def test_any_number_of_files_takes_a_bounded_number_of_descriptors_and_maps(tmp_path: Path) -> None:
    """They would run out: 1024 descriptors or 65530 maps are common limits. Read forth and back."""
    count, digest = MAX_OPEN + 30, "0" * 64
    recipe = replace(RECIPE, digest=digest, width=4)
    bits = np.arange(4 * 3 * count, dtype=np.int16).reshape(count, 3, 4)
    files = [
        write_file(tmp_path, recipe, digest, file_name("text", n), [1, 1], [Row(rows[:1], False), Row(rows[1:], False)])
        for n, rows in enumerate(bits)
    ]
    empty = write_file(tmp_path, recipe, digest, EMPTY_NAME, [1], [Row(bits[0], False)])
    reader = TextFeatureReader(TextFeatures(tmp_path, "x", recipe, digest, tuple(files), empty))
    before = [len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(str(tmp_path))]
    for sample in [*range(2 * count), *reversed(range(2 * count))]:
        rows = bits[sample // 2]
        assert (reader.read(sample, 0) == (rows[1:] if sample % 2 else rows[:1])).all()
    after = [len(os.listdir("/proc/self/fd")), Path("/proc/self/maps").read_text().count(str(tmp_path))]
    assert after[0] <= before[0] + MAX_OPEN < before[0] + count
    assert after[1] == before[1] == 0


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def test_features_cannot_be_read_from_a_url(stored: Path) -> None:
    with pytest.raises(InputError, match=r"data.path = 'https://host/set': text features are read from a local folder"):
        read_text_features(stored, read_index(stored), "https://host/set")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--encoder", "./nowhere"], "--encoder = './nowhere': no such folder, nor a name on the hub"),
        (["--batch", "0"], "--batch = 0: expected at least 1"),
        (["--max-tokens", "0"], "--max-tokens = 0: expected at least 1"),
        (["--max-tokens", "1"], "max_tokens = 1: the caption '' has 1 tokens already"),
        (["--scale", "0"], "--scale = 0.0: expected above 0"),
        (["--scale", "inf"], "--scale = inf: expected above 0"),
    ],
)
def test_bad_input_is_one_line(
    more: list[str], words: str, plain: Path, encoder_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    error = refused([*command(plain, encoder_folder), *more], capsys, cli.main)
    assert error.startswith("data_prep: error: ")
    assert words in error
    assert not list(plain.glob("text-*"))


def test_a_folder_without_an_index(tmp_path: Path, encoder_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "has no index.json" in refused(command(tmp_path, encoder_folder), capsys, cli.main)
