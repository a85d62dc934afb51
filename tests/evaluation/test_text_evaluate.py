"""`megapix evaluate` of networks that take text: which prompt an image has, on any ranks, from any kind of features."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megapix.cli import main as cli
from megapix.conditioning import text_source
from megapix.diffusion.condition import Condition
from megapix.diffusion.pictures import to_uint8
from megapix.diffusion.sampler import generate, seeded_noise
from megapix.evaluation.manifest import Scored, read_scores
from megapix.weights.read import load_model
from tests.evaluation.test_evaluate import export, stats_of
from tests.support import text_encoders
from tests.support.launch import succeed
from tests.support.small_run import SMALL, refused
from tests.support.trained import TEXT, text_model

PROMPTS = ("a red mat", "two small dog", "the cat")
COUNT, BATCH = 7, 4


@pytest.fixture(scope="module")
def model(text_encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_model(tmp_path_factory.mktemp("model") / "t2i", text_encoder)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("\n".join(PROMPTS) + "\n")
    return path


@pytest.fixture(scope="module")
def stats(text_shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stats_of(text_shards, tmp_path_factory.mktemp("stats") / "stats.npz")


def command(model: Path, stats: Path, prompts: Path, out: Path, *more: str | Path) -> list[str]:
    found = ["evaluate", model, "--reference", stats, "--prompts", prompts, "--out", out, "--count", COUNT]
    return [str(part) for part in (*found, "--batch", BATCH, *more)]


def scored(path: Path) -> Scored:
    return read_scores(path, "--out")


@pytest.fixture(scope="module")
def first(model: Path, stats: Path, prompts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("first")
    assert cli.main(command(model, stats, prompts, folder / "score.json", "--images", folder / "png")) == 0
    return folder


def test_images_have_the_prompts_in_turns(first: Path, model: Path, text_encoder: Path) -> None:
    paths = sorted((first / "png").iterdir())
    assert [path.name for path in paths] == [f"{n:06d}-{n % 3:04d}.png" for n in range(COUNT)]
    net, encode = load_model(model), text_source.load(TEXT.text, str(text_encoder))
    for n, path in enumerate(paths):
        noise = seeded_noise(0, [n], (16, 16), torch.device("cpu"))
        condition = Condition(encode([PROMPTS[n % 3]]), encode([""]))
        expected = to_uint8(generate(net, noise, condition, "ab2", 2, 2.0, (0.0, 1.0)))[0].astype(int)
        found = np.asarray(Image.open(path)).astype(int)
        assert np.abs(found - expected).max() <= 1, "batches and padding round"
        assert found.std() > 1


@pytest.mark.long
def test_two_ranks_and_a_repetition_say_the_same(
    first: Path, model: Path, stats: Path, prompts: Path, tmp_path: Path, text_encoder: Path
) -> None:
    one = scored(first / "score.json")
    succeed(2, "megapix", command(model, stats, prompts, tmp_path / "two.json"))
    assert scored(tmp_path / "two.json") == one
    assert one.manifest.classes == ()
    assert (one.manifest.prompts.path, one.manifest.text_encoder.path) == (str(prompts), str(text_encoder))
    assert cli.main(["evaluate", "--repeat", str(first / "score.json"), "--out", str(tmp_path / "again.json")]) == 0
    assert scored(tmp_path / "again.json") == one


def test_a_repetition_with_other_prompts_is_refused(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.txt"
    other.write_text("\n".join(reversed(PROMPTS)))
    said = refused(["evaluate", "--repeat", str(first / "score.json"), "--prompts", str(other)], capsys)
    assert f"prompts {str(other)!r} with sha256" in said


def test_stored_features_say_what_the_encoder_says(
    model: Path, stats: Path, text_shards: Path, text_encoder: Path, tmp_path: Path
) -> None:
    """The captions of a shard folder, by the run's encoder, and by the features that were stored (in bf16)."""
    for name, folder in (("encoded", model), ("stored", text_model(tmp_path / "model", text_encoder, stored=True))):
        images = ["--images", tmp_path / f"{name}-png"]
        images += ["--encoder", text_encoder] if name == "encoded" else []
        assert cli.main(command(folder, stats, text_shards, tmp_path / f"{name}.json", *images)) == 0
    encoded, stored = (sorted((tmp_path / f"{name}-png").iterdir()) for name in ("encoded", "stored"))
    assert [path.name for path in encoded] == [path.name for path in stored]
    for one, other in zip(encoded, stored, strict=True):
        difference = np.asarray(Image.open(one)).astype(int) - np.asarray(Image.open(other)).astype(int)
        assert np.abs(difference).mean() < 1.5, "of 255 levels"
    one, other = (scored(tmp_path / f"{name}.json").manifest for name in ("encoded", "stored"))
    assert (one.text_features["stored"], other.text_features["stored"]) == (False, True)
    assert (one.text_encoder.path, other.text_encoder.path) == (str(text_encoder), "")
    assert one.text_encoder.sha256 == other.text_encoder.sha256 == text_source.load(TEXT.text, str(text_encoder)).digest
    assert one.key != other.key, "bf16 makes other images"


def test_bad_input(
    model: Path,
    stats: Path,
    prompts: Path,
    text_shards: Path,
    text_encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*more: str) -> str:
        start = ["evaluate", str(model), "--reference", str(stats), "--out", str(tmp_path / "x.json")]
        return refused([*start, *more], capsys)

    assert "takes text: expected --prompts, a file with one prompt per line, or a shard folder" in said()
    assert "takes text, not classes (--prompts)" in said("--classes", "1")
    assert "--prompts = 'none.txt': cannot be read" in said("--prompts", "none.txt")
    assert "cannot be read: [Errno 36] File name too long" in said("--prompts", "a cat " * 100)
    damaged = shutil.copytree(text_shards, tmp_path / "damaged")
    (damaged / "captions.bin").write_bytes(b"")
    assert "captions.bin has sha256" in said("--prompts", str(damaged))
    other = text_encoders.make(tmp_path / "other", "bert", seed=1)
    assert "has the digest" in said("--prompts", str(prompts), "--encoder", str(other))
    stored = text_model(tmp_path / "stored", text_encoder, stored=True)
    asked = ["evaluate", str(stored), "--reference", str(stats), "--out", str(tmp_path / "x.json")]
    assert "names no text encoder: give --encoder, or --prompts with a shard" in refused(
        [*asked, "--prompts", str(prompts)], capsys
    )
    assert not (tmp_path / "x.json").exists()


def test_classes_take_no_prompts(
    first: Path, stats: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(tmp_path / "net.safetensors", SMALL.model)
    said = refused(["evaluate", str(tmp_path / "net.safetensors"), "--reference", str(stats), "--prompts", "x"], capsys)
    assert "--prompts = 'x'" in said
    assert "takes classes, not text" in said
