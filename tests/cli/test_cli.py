"""What a user sees: help, one line and code 2 for bad input, on every rank and without a hang."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

import megapix
from megapix import config
from megapix.checkpoint import vectors
from megapix.checkpoint.manifest import Counters, read_state, write_state
from megapix.cli import main as cli
from megapix.errors import InputError
from megapix.model import PixelDiT
from megapix.weights.about import About
from tests.support.launch import start
from tests.support.made_run import checkpoint_of
from tests.support.small_run import SMALL, arguments


@dataclass
class Bad:
    """A command that must fail: changes to the arguments, perhaps to the shards, and words of the message."""

    change: Callable[[list[str], Path, Path], None]
    words: tuple[str, ...]


def option(name: str, value: str) -> Callable[[list[str], Path, Path], None]:
    return lambda command, shards, out: command.extend([f"--{name}", value])


def cut_shard(command: list[str], shards: Path, out: Path) -> None:
    victim = shards / "shard-000001.tar"
    victim.write_bytes(victim.read_bytes()[:-512])


def other_run(command: list[str], shards: Path, out: Path) -> None:
    other = config.replace(config.freeze(SMALL, 40), "optim.ema_decay", 0.5)
    checkpoint_of(other, shards, out, ranks=2)


def _of_this_run(shards: Path, out: Path) -> Path:
    checkpoint_of(config.freeze(SMALL, 40), shards, out, ranks=2)
    return out / "checkpoints" / "images-000000000080"


def cut_state(command: list[str], shards: Path, out: Path) -> None:
    os.truncate(_of_this_run(shards, out) / "state.json", 100)


def old_version(command: list[str], shards: Path, out: Path) -> None:
    state = _of_this_run(shards, out) / "state.json"
    state.write_text(state.read_text().replace('"version": 2', '"version": 1'))


def cut_checkpoint(command: list[str], shards: Path, out: Path) -> None:
    (_of_this_run(shards, out) / "rank-00001-of-00002.safetensors").write_bytes(b"cut")


def lost_file(command: list[str], shards: Path, out: Path) -> None:
    (_of_this_run(shards, out) / "rank-00000-of-00002.safetensors").unlink()


def wrong_counters(command: list[str], shards: Path, out: Path) -> None:
    folder = _of_this_run(shards, out)
    state = read_state(folder)
    write_state(folder, replace(state, counters=Counters(40, 80)))


def stale_latest(command: list[str], shards: Path, out: Path) -> None:
    (out / "checkpoints").mkdir(parents=True)
    (out / "checkpoints" / "latest").write_text("images-999")


def below_a_file(command: list[str], shards: Path, out: Path) -> None:
    (out.parent / "file").write_text("")
    command.extend(["--out", str(out.parent / "file" / "run")])


BAD = {
    "missing shards": Bad(option("data.path", "nowhere"), ("shard folder 'nowhere' does not exist",)),
    "empty shards": Bad(lambda c, s, o: (s / "index.json").unlink(), ("has no index.json", "run the same")),
    "shard missing": Bad(lambda c, s, o: (s / "shard-000001.tar").unlink(), ("shard-000001.tar is missing",)),
    "shard cut": Bad(cut_shard, ("shard-000001.tar has", "the index does not match its shards")),
    "table changed": Bad(lambda c, s, o: (s / "samples.bin").write_bytes(bytes(40 * 36)), ("samples.bin has sha256",)),
    "class count": Bad(option("model.num-classes", "5"), ("model.num_classes = 5", "holds 3 classes")),
    "image size": Bad(option("data.image-size", "32"), ("data.image_size = 32", "are 16 pixels")),
    "patch size": Bad(option("model.patch-size", "5"), ("data.image_size = 16", "not divisible", "patch_size = 5")),
    "global batch": Bad(option("optim.global-batch", "9"), ("optim.global_batch = 9", "4 x 1.125 x 2")),
    "micro batch": Bad(option("machine.micro-batch", "3"), ("3 x 1.33333 x 2", "divisible by 2 x")),
    "heads": Bad(option("model.heads", "3"), ("model.heads = 3", "a divisor of model.width = 32")),
    "span": Bad(option("optim.end-at", "12epochs"), ("optim.end_at = '12epochs'", "'160ep'")),
    "no end": Bad(option("optim.end-at", "never"), ("optim.end_at = 'never'",)),
    "seed": Bad(option("seed", str(2**63)), ("seed = 9223372036854775808", "0 to 2^63 - 1")),
    "counters": Bad(wrong_counters, ("state.json: cannot be read", "no more images seen than samples drawn")),
    "guidance": Bad(option("sampling.guidance", "nan"), ("sampling.guidance = nan", "a finite number")),
    "infinite": Bad(option("optim.lr", "inf"), ("optim.lr = inf", "a finite number")),
    "not a number": Bad(option("flow.t-mean", "nan"), ("flow.t_mean = nan", "a finite number")),
    "state cut": Bad(cut_state, ("no checkpoint in", "state.json: cannot be read", "another --out")),
    "state of another version": Bad(old_version, ("version is 1, this release reads version 2",)),
    "checkpoint cut": Bad(cut_checkpoint, ("rank-00001-of-00002.safetensors has 3 bytes, but 7 were saved",)),
    "checkpoint file gone": Bad(lost_file, ("rank-00000-of-00002.safetensors is missing",)),
    "latest": Bad(stale_latest, ("latest names 'images-999'", "is missing")),
    "resume": Bad(option("resume", "require"), ("resume = 'require'", "holds no checkpoint")),
    "spike window": Bad(option("health.window", "2"), ("health.window = 2", "at least 4 steps")),
    "outage": Bad(option("data.outage-minutes", "-1"), ("data.outage_minutes = -1.0", "0 (no waiting) or more")),
    "max failed": Bad(option("checkpoint.max-failed", "0"), ("checkpoint.max_failed = 0", "at least 1")),
    "keep every": Bad(option("checkpoint.keep-every", "0"), ("checkpoint.keep_every = 0 is no image at all",)),
    "dropout": Bad(option("flow.label-dropout", "1.5"), ("flow.label_dropout = 1.5", "0 to 1")),
    "ds config": Bad(option("machine.ds-config", "zero3"), ("machine.ds_config = 'zero3'", "did you mean 'zero2'")),
    "run folder": Bad(below_a_file, ("the run folder cannot be made",)),
    "init": Bad(option("init", "nowhere"), ("'nowhere' holds no weights",)),
    "other run": Bad(
        other_run, ("belongs to another run", "optim.ema_decay is 0.5 there and 0.9 here", "run/config.json gives")
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_code_2(
    name: str, own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check that launch.sh makes before it starts any rank."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "run"
    command = [*arguments(own_shards, out), "--dry-run"]
    BAD[name].change(command, own_shards, out)
    assert cli.main(command) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("megapix: error: ")
    assert captured.err.count("\n") == 1
    for words in BAD[name].words:
        assert words in captured.err, captured.err


@pytest.mark.parametrize("name", ["shard cut", "other run", "init"])
def test_bad_input_ends_every_rank(name: str, own_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = arguments(own_shards, out)
    BAD[name].change(command, own_shards, out)
    ranks = start(2, "megapix", command)
    assert [rank.code for rank in ranks] == [2, 2]
    lines = [line for line in ranks[0].err.splitlines() if line.startswith("megapix: error: ")]
    assert len(lines) == 1
    assert all(words in lines[0] for words in BAD[name].words)
    assert all("Traceback" not in rank.err for rank in ranks)
    assert "megapix: error" not in ranks[1].err, "the message comes once"


def test_one_ranks_problem_reaches_every_rank(own_shards: Path, tmp_path: Path) -> None:
    """A shard folder that only rank 1 cannot see."""
    command = ["--data.path", "gone", *arguments(own_shards, tmp_path / "run")]
    ranks = start(2, "tests.programs.other_option", command)
    assert [rank.code for rank in ranks] == [2, 2]
    assert "megapix: error: rank 1 on " in ranks[0].err
    assert "shard folder 'gone' does not exist" in ranks[0].err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--seed", "7", "rank 1 has seed = 7, but rank 0 has 1"),
        ("--optim.lr", "0.5", "rank 1 has optim.lr = 0.5, but rank 0 has 0.002"),
        ("--checkpoint.every", "24", "rank 1 has checkpoint.every = 24, but rank 0 has 80"),
        ("--out", "elsewhere", "config.json is not what rank 0 wrote: the run folder (--out) must be on a file system"),
    ],
)
def test_ranks_must_agree_on_the_run(option: str, value: str, words: str, own_shards: Path, tmp_path: Path) -> None:
    """Ranks started with different commands, or with run folders that are not the same folder."""
    value = str(tmp_path / value) if option == "--out" else value
    ranks = start(2, "tests.programs.other_option", [option, value, *arguments(own_shards, tmp_path / "run")])
    assert [rank.code for rank in ranks] == [2, 2]
    assert words in ranks[0].err
    assert "Traceback" not in ranks[0].err
    assert not (tmp_path / "run" / "checkpoints" / "latest").exists()


def test_a_sample_that_turns_bad_in_mid_run_ends_with_its_name(own_shards: Path, tmp_path: Path) -> None:
    """Same size, so the check at the start passes; the CRC tells when the sample is read."""
    for shard in own_shards.glob("shard-*.tar"):
        shard.write_bytes(bytes(shard.stat().st_size))
    (rank,) = start(1, "megapix", arguments(own_shards, tmp_path / "run"))
    assert rank.code == 2
    line = rank.err.splitlines()[-1]
    assert line.startswith("megapix: error: "), "on a line of its own, below the progress bar"
    assert "are not those that were indexed" in line
    assert "Traceback" not in rank.err


def test_a_broken_environment_is_bad_input(
    own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert cli.main([*arguments(own_shards, tmp_path / "run"), "--dry-run"]) == 2
    assert capsys.readouterr().err == "megapix: error: environment variable WORLD_SIZE = 'two': expected a number\n"


def test_a_dry_run_writes_nothing(own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments(own_shards, tmp_path / "deep" / "run"), "--dry-run"]) == 0
    assert not (tmp_path / "deep").exists()


def test_wrong_presets_options_and_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "xl-265", "--data.path", "x"]) == 2
    assert "preset 'xl-265' does not exist (did you mean 'xl-256'?)" in capsys.readouterr().err
    assert cli.main(["trian"]) == 2
    assert "command 'trian' does not exist (did you mean 'train'?)" in capsys.readouterr().err
    assert cli.main(["train", "--data.path", "x"]) == 2
    assert "expected a preset" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        cli.main(["train", "tiny", "--optim.lr", "high"])
    assert stop.value.code == 2
    error = capsys.readouterr()
    assert "error parsing --optim.lr: could not convert string to float: 'high'" in error.err
    assert error.err.count("\n") == 1


def _exported(path: Path, c: config.ModelConfig = SMALL.model) -> Path:
    """An export of an untrained network's EMA; `c` is what its metadata says of it."""
    torch.manual_seed(0)
    tensors = {name: p.detach() for name, p in PixelDiT(SMALL.model).named_parameters()}
    about = About(c, SMALL.sampling, 16, SMALL.text, ("a", "b", "c"), True, "here", 0)
    vectors.write(
        path,
        {name: (tuple(tensor.shape), [tensor]) for name, tensor in tensors.items()},
        {"megapix": json.dumps(config.to_dict(about))},
    )
    return path


def test_sampling_from_python(tmp_path: Path) -> None:
    net = megapix.load_model(_exported(tmp_path / "net.safetensors"), ema=True)
    noise = torch.randn(2, 3, 16, 16)
    labels = torch.tensor([0, 2])
    images = megapix.sample.generate(
        net, noise, labels, sampler="ab2", steps=3, guidance=2.0, interval=(0.1, 0.9), shift=1.0
    )
    assert torch.equal(images, noise), "an untrained network's velocity is zero"
    with pytest.raises(InputError, match="holds EMA weights, but the raw ones were asked for"):
        megapix.load_model(tmp_path / "net.safetensors", ema=False)


def test_sample_refuses_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _exported(tmp_path / "net.safetensors")
    out = ["--out", str(tmp_path / "grid.png")]
    cut, foreign = tmp_path / "cut.safetensors", tmp_path / "foreign.safetensors"
    cut.write_bytes(file.read_bytes()[:1000])
    vectors.write(foreign, {"x": ((1,), [torch.zeros(1)])})
    wide = _exported(tmp_path / "wide.safetensors", replace(SMALL.model, width=64))
    for options, words in (
        ([str(tmp_path / "none")], "holds no weights"),
        ([str(file), "--classes", "0", "3"], "class 3 does not exist: expected 0 to 2"),
        ([str(file), "--size", "18", "16"], "size 18x16: expected multiples of the patch size 4"),
        ([str(file), "--size", "0", "0"], "size 0x0: expected multiples of the patch size 4"),
        ([str(file), "--guidance", "nan"], "--guidance = nan: expected a finite number"),
        ([str(file), "--out", str(tmp_path)], "is a folder; expected a file"),
        ([str(file), "--out", str(file / "x.png")], "nothing can be written there"),
        ([str(file), "--singles", str(file)], "is not a folder"),
        ([str(cut)], "cut.safetensors: cannot be read as exported weights"),
        ([str(foreign)], "has no 'megapix' in its metadata"),
        ([str(wide)], "s_embedder.proj.weight has shape (32, 48), but the network needs (64, 48)"),
        ([str(file), "--per-class", "0"], "--per-class = 0: expected at least 1"),
        ([str(file), "--steps", "0"], "steps"),
        ([str(file), "--raw"], "holds EMA weights"),
    ):
        assert cli.main(["sample", *out, *options]) == 2, options
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "grid.png").exists()
    assert cli.main(["export", str(file), "--out", str(file / "below")]) == 2
    error = capsys.readouterr().err
    assert "nothing can be written there" in error
    assert error.count("\n") == 1
