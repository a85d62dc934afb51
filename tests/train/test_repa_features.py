"""Features computed before: against the encoder itself, through the loader, in whole runs, kills, and bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from data_prep.cli import main
from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix import config, rng
from megapix.checkpoint.folder import latest
from megapix.cli import main as cli
from megapix.config import BatchLayout, DataConfig, RepaConfig
from megapix.data import loader
from megapix.data.arrays import Extras, ReadTimes
from megapix.data.assemble import Assembler
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.encoders.image import Encoder, load
from megapix.errors import InputError
from megapix.files import sha256_of
from megapix.rng import Purpose
from megapix.shards.image_features import KIND, MANIFEST_NAME, FeatureReader, Features, read_features
from megapix.shards.image_policy import Policy
from megapix.shards.table import RECORD, SampleRecord
from tests.data_prep.test_write import hashes
from tests.support import image_encoders
from tests.support.launch import ROOT, start, succeed
from tests.support.listed_features import make_listed, records
from tests.support.small_run import SMALL, STEP_BATCH, arguments, refused, saved, scalars, shard_tensors

SIZE, SAMPLES = 32, 40


@pytest.fixture(scope="module")
def shards_32(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small images at 32 pixels in three shards: 2 x 2 of the encoder's patches."""
    out = tmp_path_factory.mktemp("shards") / "small-32"
    write(ImageFolder.open(image_folder), out, Options(Policy.make("crop", SIZE), samples_per_shard=16), 1, False)
    return out


@pytest.fixture(scope="module")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_encoders.make(tmp_path_factory.mktemp("teacher") / "dinov2")


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path) -> Encoder:
    return load(str(teacher_folder), "fp32", 0)


def compute(shards: Path, teacher: Path, out: Path, *more: str) -> int:
    """`data_prep features` in this process."""
    asked = ["features", str(shards), "--encoder", str(teacher), "--out", str(out), "--workers", "1", "--batch", "5"]
    return main([*asked, *more])


@pytest.fixture(scope="module")
def stored(shards_32: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Features in fp32, of the images and of their mirror images."""
    out = tmp_path_factory.mktemp("features") / "fp32"
    assert compute(shards_32, teacher_folder, out, "--dtype", "fp32") == 0
    return out


def reading(shards: Path, **changes: object) -> DataConfig:
    return replace(SMALL.data, path=str(shards), image_size=SIZE, **changes)


def clean(shards: Path) -> Tensor:
    """Every image of one bucket as the loader decodes it, in the index's order: uint8 [N, 3, H, W]."""
    c = reading(shards)
    data = Assembler(locate(c), c, 0, 1)
    return torch.stack([torch.from_numpy(data._image(sample, ReadTimes())[0]) for sample in range(SAMPLES)])


# ---------------------------------------------------------------------------------------------------------------------
# What is stored
# ---------------------------------------------------------------------------------------------------------------------


def test_features_are_the_encoders_of_each_image_and_its_mirror_image(
    shards_32: Path, stored: Path, teacher: Encoder
) -> None:
    images = clean(shards_32)
    reader = FeatureReader(read_features(stored, locate(reading(shards_32)).index))
    for mirrored in (False, True):
        expected = teacher(images.flip(-1) if mirrored else images)
        found = torch.from_numpy(np.stack([reader.read(sample, mirrored) for sample in range(SAMPLES)]))
        assert found.dtype == torch.float32
        assert found.shape == (SAMPLES, 2, 2, image_encoders.WIDTH)
        assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, teacher(images), atol=0.1), "mirror images have features of their own"


def test_in_bf16_they_are_the_bf16_encoders_to_rounding(shards_32: Path, teacher_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "bf16"
    assert compute(shards_32, teacher_folder, out) == 0
    features = read_features(out, locate(reading(shards_32)).index)
    assert (features.dtype, features.flip, features.width) == ("bf16", True, image_encoders.WIDTH)
    c = reading(shards_32)
    batch = MicroBatches(locate(c), c, 1, STEP_BATCH, Extras(features))[np.arange(STEP_BATCH)]
    assert batch.features is not None
    assert batch.features.dtype == torch.bfloat16
    same, exact = (load(str(teacher_folder), dtype, 0)(batch.images) for dtype in ("bf16", "fp32"))
    largest = exact.abs().max()
    assert (batch.features.float() - same).abs().max() < 0.02 * largest
    assert (batch.features.float() - exact).abs().max() < 0.1 * largest


def test_the_files_are_plain_safetensors(stored: Path, shards_32: Path, teacher: Encoder) -> None:
    names = sorted(path.name for path in stored.iterdir())
    assert names == [f"features-{n:06d}.safetensors" for n in range(3)] + [KIND.table, MANIFEST_NAME, "plan.json"]
    about = json.loads((stored / MANIFEST_NAME).read_text())
    index = locate(reading(shards_32)).index
    assert (about["encoder_digest"], about["data_digest"]) == (teacher.digest, index.digest)
    assert (about["width"], about["dtype"], about["flip"]) == (image_encoders.WIDTH, "fp32", True)
    assert about["files"] == {"count": 3, "name": KIND.table, "sha256": sha256_of(stored / KIND.table)}
    for name, counts, shard in zip(names, records(stored / KIND.table), index.shards, strict=False):
        tensors = load_file(stored / name)
        assert tensors["features"].shape == (shard.samples, 2, *counts[1:], image_encoders.WIDTH)
        assert tensors["crc32"].shape == (shard.samples, 2)
        assert counts == (shard.samples, 2, 2)


def test_without_flip_there_is_one_form(shards_32: Path, teacher_folder: Path, stored: Path, tmp_path: Path) -> None:
    out = tmp_path / "plain"
    assert compute(shards_32, teacher_folder, out, "--dtype", "fp32", "--no-flip") == 0
    one, two = (load_file(folder / "features-000001.safetensors")["features"] for folder in (out, stored))
    assert one.shape[1] == 1
    assert torch.equal(one[:, 0], two[:, 0])


def test_each_bucket_has_its_grid(teacher_folder: Path, teacher: Encoder, tmp_path: Path) -> None:
    """Wide, square and tall images; every micro batch holds one bucket, and the features of its images."""
    generator, folder = np.random.default_rng(0), tmp_path / "images" / "all"
    folder.mkdir(parents=True)
    for number in range(18):
        size = [(32, 64, 3), (48, 48, 3), (64, 32, 3)][number % 3]
        Image.fromarray(generator.integers(0, 256, size, dtype=np.uint8)).save(folder / f"{number:02d}.png")
    policy, shards, out = Policy.make("buckets", 48, step=16), tmp_path / "shards", tmp_path / "features"
    write(ImageFolder.open(folder.parent), shards, Options(policy, samples_per_shard=4), 1, False)
    assert compute(shards, teacher_folder, out, "--dtype", "fp32") == 0
    c = reading(shards)
    located = locate(c)
    data, grids = MicroBatches(located, c, 0, 4, Extras(read_features(out, located.index))), set()
    for step in range(6):
        batch = data[np.arange(4 * step, 4 * step + 4)]
        assert batch.features is not None
        assert torch.allclose(batch.features, teacher(batch.images), rtol=1e-5, atol=1e-5)
        grids.add(tuple(batch.features.shape[1:3]))
    assert len(grids) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Through the loader
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_carry_the_features_of_what_they_show(
    workers: int, shards_32: Path, stored: Path, teacher: Encoder
) -> None:
    """Mirrored or not, as the flip of each position says."""
    c = reading(shards_32, workers=workers)
    located = locate(c)
    features = read_features(stored, located.index)
    layout = BatchLayout(STEP_BATCH, 1, 1)
    assert c.flip
    for batch in islice(loader.batches(c, located, 3, layout, 0, 16, (), Extras(features)), 3):
        flips = rng.uniform(3, Purpose.FLIP, batch.positions) < 0.5
        assert 0 < flips.sum() < len(flips)
        assert batch.features is not None
        assert torch.allclose(batch.features, teacher(batch.images), rtol=1e-5, atol=1e-5)
    (plain,) = islice(loader.batches(c, located, 3, layout, 0, 16, ()), 1)
    assert plain.features is None


def test_a_replacement_brings_its_own_features(shards_32: Path, stored: Path, teacher: Encoder, tmp_path: Path) -> None:
    """The damaged sample's are there, but another image is shown."""
    damaged = Path(shutil.copytree(shards_32, tmp_path / "damaged"))
    record = SampleRecord(*RECORD.unpack((damaged / "samples.bin").read_bytes()[: RECORD.size]))
    with open(damaged / "shard-000000.tar", "r+b") as file:
        file.seek(record.offset + record.size // 2)
        file.write(b"damage")
    c = reading(damaged)
    located = locate(c)
    data = MicroBatches(located, c, 1, SAMPLES, Extras(read_features(stored, located.index)))
    batch = data[np.arange(SAMPLES)]
    assert len(batch.replaced) == 1
    assert batch.features is not None
    assert torch.allclose(batch.features, teacher(batch.images), rtol=1e-5, atol=1e-5)


def test_features_that_changed_are_found(shards_32: Path, stored: Path, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(stored, tmp_path / "changed"))
    path = changed / "features-000000.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    reader = FeatureReader(read_features(changed, locate(reading(shards_32)).index))
    reader.read(15, False)
    with pytest.raises(InputError, match=r"features-000000.*the features of sample 15 are not those that were written"):
        reader.read(15, True)


# ---------------------------------------------------------------------------------------------------------------------
# Interruptions
# ---------------------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal
from data_prep import cli
from data_prep.passes import image_features as features

write_file = features.write_file

def until(file, batches):
    for number, batch in enumerate(batches):
        if file.name == "features-000001.safetensors" and number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield batch

features.write_file = lambda whole, file, batches: write_file(whole, file, until(file, batches))
if __name__ == "__main__":
    import sys
    cli.main(sys.argv[1:])
"""
"""`data_prep`, killed within its second file."""


@pytest.mark.long
def test_a_kill_ends_in_the_same_bytes(
    shards_32: Path, teacher_folder: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, script = tmp_path / "features", tmp_path / "killed.py"
    script.write_text(KILLED)
    asked = ["features", str(shards_32), "--encoder", str(teacher_folder), "--out", str(out)]
    asked += ["--workers", "1", "--batch", "5", "--dtype", "fp32"]
    process = subprocess.Popen(
        [sys.executable, str(script), *asked],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},  # as in this process: sums in one order
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    assert process.wait(timeout=120) == -signal.SIGKILL
    with suppress(ProcessLookupError):  # its workers
        os.killpg(process.pid, signal.SIGKILL)
    named = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
    assert named == ["features-000000.safetensors", "plan.json"], "nothing half-done has a name"
    written = (out / named[0]).stat().st_mtime_ns
    assert compute(shards_32, teacher_folder, out, "--dtype", "fp32") == 0
    assert hashes(out) == hashes(stored)
    assert (out / named[0]).stat().st_mtime_ns == written, "what was done is not done again"
    capsys.readouterr()
    assert compute(shards_32, teacher_folder, out, "--dtype", "fp32") == 0
    assert "was finished already: features of 40 images and their mirror images" in capsys.readouterr().out


def test_a_file_that_is_lost_is_computed_again(
    shards_32: Path, teacher_folder: Path, stored: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(stored, tmp_path / "features"))
    (out / "features-000002.safetensors").unlink()
    os.truncate(out / "features-000000.safetensors", 1000)
    assert compute(shards_32, teacher_folder, out, "--dtype", "fp32") == 0
    assert hashes(out) == hashes(stored)


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs
# ---------------------------------------------------------------------------------------------------------------------

END, STOP_AT = 8, 6
"""Steps of a run, and those of them with REPA."""


def command(shards: Path, out: Path, *more: str, end: int = END) -> list[str]:
    images = {"optim.end-at": end, "repa.stop-at": STOP_AT, "checkpoint.every": END}
    spans = [word for name, steps in images.items() for word in (f"--{name}", str(steps * STEP_BATCH))]
    chosen = ["--data.image-size", str(SIZE), "--repa.layer", "1", "--repa.dtype", "fp32"]
    return arguments(shards, out, *chosen, *spans, *more)


@pytest.fixture(scope="module")
def online(shards_32: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with the encoder, on one rank, with flips."""
    out = tmp_path_factory.mktemp("online") / "run"
    succeed(1, "megapix", command(shards_32, out, "--repa.encoder", str(teacher_folder)))
    assert saved(out).state.config.data.flip
    return out


def assert_same_run(found: Path, expected: Path) -> None:
    for tag in ("loss/train", "loss/repa", "health/grad_norm"):
        one, other = scalars(found, tag), scalars(expected, tag)
        assert list(one) == list(other)
        assert list(one.values()) == pytest.approx(list(other.values()), rel=1e-5), tag
    assert list(scalars(found, "loss/repa")) == list(range(1, STOP_AT + 1))
    one, other = (shard_tensors(latest(run)) for run in (found, expected))
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert (one[name] - tensor).abs().max() <= 1e-5 * tensor.abs().max(), name


def test_a_run_with_features_is_the_run_with_the_encoder(
    shards_32: Path, stored: Path, online: Path, tmp_path: Path
) -> None:
    """Read by a worker, and without an import of transformers."""
    run = tmp_path / "run"
    asked = command(shards_32, run, "--repa.features", str(stored), "--data.workers", "1")
    succeed(1, "tests.programs.no_transformers", asked)
    assert_same_run(run, online)
    assert saved(run).state.config.repa.digest == saved(online).state.config.repa.digest


@pytest.mark.long
def test_a_run_goes_on_with_features(
    shards_32: Path, teacher_folder: Path, stored: Path, online: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    succeed(1, "megapix", command(shards_32, run, "--repa.encoder", str(teacher_folder), end=3))
    (rank,) = succeed(1, "megapix", command(shards_32, run, "--repa.features", str(stored)))
    assert "resuming from" in rank.out
    assert_same_run(run, online)


@pytest.mark.long
def test_from_the_step_on_at_which_repa_stops_no_features_are_read(
    shards_32: Path, stored: Path, online: Path, tmp_path: Path
) -> None:
    """Those that could not be read then do no harm, while they do one step before."""
    run, spoilt = tmp_path / "run", Path(shutil.copytree(stored, tmp_path / "spoilt"))
    for path in spoilt.glob("features-*.safetensors"):
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    succeed(1, "megapix", command(shards_32, run, "--repa.features", str(stored), end=STOP_AT - 1))
    (rank,) = start(1, "megapix", command(shards_32, run, "--repa.features", str(spoilt), end=STOP_AT))
    assert rank.code == 2
    assert "are not those that were written" in rank.err
    for end, folder in ((STOP_AT, stored), (END, spoilt)):
        succeed(1, "megapix", command(shards_32, run, "--repa.features", str(folder), end=end))
    assert_same_run(run, online)


@pytest.mark.long
def test_a_run_goes_on_with_the_encoder_on_two_ranks(
    shards_32: Path, teacher_folder: Path, stored: Path, online: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    succeed(1, "megapix", command(shards_32, run, "--repa.features", str(stored), end=3))
    succeed(2, "megapix", command(shards_32, run, "--repa.encoder", str(teacher_folder)))
    assert list(scalars(run, "loss/repa").values()) == pytest.approx(
        list(scalars(online, "loss/repa").values()), rel=1e-5
    )


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


def changed(**values: object) -> Callable[[Path], None]:
    """Give some keys of the manifest other values."""

    def change(folder: Path) -> None:
        path = folder / MANIFEST_NAME
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return change


def of_others(folder: Path) -> None:
    path = folder / "features-000000.safetensors"
    digest = json.loads((folder / MANIFEST_NAME).read_text())["encoder_digest"]
    path.write_bytes(path.read_bytes().replace(digest.encode(), b"0" * 64))


LAST = "features-000002.safetensors"
BAD: dict[str, tuple[list[str], Callable[[Path], object] | None, tuple[str, ...]]] = {
    "no such folder": (["--repa.features", "./nowhere"], None, ("repa.features = 'nowhere': no such folder",)),
    "no manifest": ([], lambda folder: (folder / MANIFEST_NAME).unlink(), ("has no features.json",)),
    "not JSON": ([], lambda folder: (folder / MANIFEST_NAME).write_text("{"), ("features.json: not such a manifest",)),
    "not a table": ([], lambda folder: (folder / MANIFEST_NAME).write_text("[]"), ("not such a manifest",)),
    "version": ([], changed(version=9), ("('megapix-features', 9), expected ('megapix-features', 2)",)),
    "a wrong name": ([], changed(version=1, files=[{"name": "/etc/passwd", "grid": [2, 2]}]), ("named '/etc/passwd'",)),
    "other shards": (
        [],
        lambda folder: changed(data_digest="0" * 64)(make_listed(folder)),
        ("are of the data set 0000000000000000…, but the shards are",),
    ),
    "missing file": ([], lambda folder: (folder / LAST).unlink(), (f"{LAST} is missing",)),
    "short file": ([], lambda folder: os.truncate(folder / LAST, 1000), (f"{LAST} has 1000 bytes, expected",)),
    "another's file": ([], of_others, ("features-000000.safetensors holds other features",)),
    "width": ([], changed(width=48), ("features-files.bin is of other features than",)),
    "another flip": ([], changed(flip=False), ("features-files.bin is of other features than",)),
    "width, version 1": ([], lambda folder: changed(width=48)(make_listed(folder)), ("but width 48 makes",)),
    "files, version 1": ([], changed(version=1, files=[]), ("features.json: 0 files for 3 entries",)),
    "both": (["--repa.encoder", "facebook/dinov2-base"], None, ("repa.encoder = ", "repa.features = ", "one of them")),
    "dtype": (["--repa.dtype", "bf16"], None, ("were computed in fp32, but repa.dtype = 'bf16'",)),
    "digest": (["--repa.digest", "abc"], None, ("are of the encoder", "repa.digest = 'abc'")),
    "micro batch": (["--repa.micro-batch", "4"], None, ("repa.micro_batch = 4 has no effect with repa.features",)),
    "layer": (["--repa.layer", "3"], None, ("repa.layer = 3: expected 1 to model.depth = 2",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(
    name: str, shards_32: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, damage, words = BAD[name]
    folder = Path(shutil.copytree(stored, tmp_path / "features"))
    if damage:
        damage(folder)
    asked = command(shards_32, tmp_path / "run", "--repa.features", str(folder), *options, "--dry-run")
    error = refused(asked, capsys)
    assert error.startswith("megapix: error: ")
    for part in words:
        assert part in error, error


def test_flips_need_mirror_images(
    shards_32: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features"
    assert compute(shards_32, teacher_folder, out, "--dtype", "fp32", "--no-flip") == 0
    asked = [*command(shards_32, tmp_path / "run", "--repa.features", str(out)), "--dry-run"]
    assert "has no features of mirror images, but data.flip = True" in refused(asked, capsys)
    assert cli.main([*asked, "--data.no-flip"]) == 0


def test_features_of_other_shards(
    shards: Path, stored: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = command(shards, tmp_path / "run", "--repa.features", str(stored), "--data.image-size", "16", "--dry-run")
    assert "are of the data set" in refused(asked, capsys)


def test_features_of_another_encoder_make_another_run(
    shards_32: Path, online: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "features"
    assert compute(shards_32, image_encoders.make(tmp_path / "other", seed=1), out, "--dtype", "fp32") == 0
    asked = [*command(shards_32, online, "--repa.features", str(out)), "--dry-run"]
    assert "repa.digest is '" in refused(asked, capsys)


def test_a_run_goes_on_with_features_of_either_version(
    shards_32: Path,
    teacher_folder: Path,
    stored: Path,
    online: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the files are listed in is no part of a run's identity; and listed ones need not be computed again."""
    old = make_listed(Path(shutil.copytree(stored, tmp_path / "old")))
    for folder in (stored, old):
        asked = command(shards_32, online, "--repa.features", str(folder), end=2 * END)
        assert cli.main([*asked, "--dry-run"]) == 0
    capsys.readouterr()
    before = hashes(old)
    assert compute(shards_32, teacher_folder, old, "--dtype", "fp32") == 0
    assert "was finished already" in capsys.readouterr().out
    assert hashes(old) == before


def test_every_rank_ends_with_code_2(shards_32: Path, tmp_path: Path) -> None:
    ranks = start(2, "megapix", command(shards_32, tmp_path / "run", "--repa.features", str(tmp_path / "nowhere")))
    assert [rank.code for rank in ranks] == [2, 2]
    (line,) = [line for line in ranks[0].err.splitlines() if line.startswith("megapix: error: ")]
    assert "nowhere': no such folder" in line
    assert all("Traceback" not in rank.err for rank in ranks)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--encoder", "./nowhere"], "--encoder = './nowhere': no such folder, nor a name on the hub"),
        (["--batch", "0"], "--batch = 0: expected at least 1"),
        (["--workers", "0"], "--workers = 0: expected at least 1"),
        (["--dtype", "bf16"], "was begun with dtype = 'fp32', this command has 'bf16'"),
        (["--dtype", "fp32", "--no-flip"], "was begun with flip = True, this command has False"),
        (["--out", "/dev/null"], "'/dev/null' is not a folder"),
    ],
)
def test_bad_input_of_the_computation(
    more: list[str],
    words: str,
    shards_32: Path,
    teacher_folder: Path,
    stored: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    asked = ["features", str(shards_32), "--encoder", str(teacher_folder), "--out", str(stored), *more]
    error = refused(asked, capsys, main)
    assert error.startswith("data_prep: error: ")
    assert words in error


def test_a_damaged_image_stops_the_computation(
    shards_32: Path, teacher_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = Path(shutil.copytree(shards_32, tmp_path / "damaged"))
    record = SampleRecord(*RECORD.unpack((damaged / "samples.bin").read_bytes()[: RECORD.size]))
    with open(damaged / "shard-000000.tar", "r+b") as file:
        file.seek(record.offset + record.size // 2)
        file.write(b"damage")
    assert compute(damaged, teacher_folder, tmp_path / "features") == 2
    assert "its bytes are not those that were indexed" in capsys.readouterr().err
    assert not list((tmp_path / "features").glob("features*"))


def test_a_manifest_says_what_it_was_made_of(stored: Path, shards_32: Path) -> None:
    found = read_features(stored, locate(reading(shards_32)).index)
    assert isinstance(found, Features)
    assert [(file.rows, file.columns) for file in found.files] == [(2, 2)] * 3
    assert config.get(RepaConfig(features="x"), "wanted")
