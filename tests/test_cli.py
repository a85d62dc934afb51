"""What a user sees: help, one line and code 2 for bad input, on every rank and without a hang."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import megapix
from megapix import checkpoint, cli, config, ds_config, engine, flat, weights
from megapix.checkpoint import Counters, FileRecord, Layout, State
from megapix.errors import InputError
from megapix.model import PixelDiT
from megapix.prepare import plan
from tests.launch import ROOT, start
from tests.runs import SMALL, STEP_BATCH, arguments, counters, logged


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
    _checkpoint_of(other, shards, out, ranks=2)


def _checkpoint_of(c: config.Config, shards: Path, out: Path, ranks: int) -> None:
    """A whole checkpoint at 80 images, of a network with one number."""
    from megapix.shards import read_index

    folder = out / "checkpoints" / "images-000000000080"
    folder.mkdir(parents=True)
    layout, files = Layout({"a": (1,)}, ranks), {}
    for name in layout.files:
        (folder / name).write_bytes(b"numbers")
        files[name] = FileRecord(7, hashlib.sha256(b"numbers").hexdigest())
    digest = read_index(shards).digest
    checkpoint.write_state(folder, State(Counters(80, 80), c, digest, ("a",) * 3, layout, 10, files=files))
    checkpoint.point_to(folder)


def _of_this_run(shards: Path, out: Path) -> Path:
    _checkpoint_of(config.freeze(SMALL, 40), shards, out, ranks=2)
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
    state = checkpoint.read_state(folder)
    checkpoint.write_state(folder, replace(state, counters=Counters(40, 80)))


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
    "table changed": Bad(lambda c, s, o: (s / "samples.bin").write_bytes(bytes(960)), ("samples.bin has sha256",)),
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
    "keep every": Bad(option("checkpoint.keep-every", "0"), ("checkpoint.keep_every = 0 is no image at all",)),
    "dropout": Bad(option("flow.label-dropout", "1.5"), ("flow.label_dropout = 1.5", "0 to 1")),
    "ds config": Bad(option("machine.ds-config", "zero3"), ("machine.ds_config = 'zero3'", "did you mean 'zero2'")),
    "run folder": Bad(below_a_file, ("the run folder cannot be made",)),
    "init": Bad(option("init", "nowhere"), ("'nowhere' holds no weights",)),
    "other run": Bad(other_run, ("belongs to another run", "optim.ema_decay is 0.5 there and 0.9 here")),
}


@pytest.fixture
def own_shards(shards: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(shards, tmp_path / "shards"))


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
    ranks = start(2, "tests.worker_differs", command)
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
    ranks = start(2, "tests.worker_differs", [option, value, *arguments(own_shards, tmp_path / "run")])
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
        cli.main(["train", "tiny", "--optim.learning-rate", "1"])
    assert stop.value.code == 2
    error = capsys.readouterr()
    assert "--optim.learning-rate" in error.out + error.err
    assert "Traceback" not in error.out + error.err


@pytest.mark.parametrize(
    ("knobs", "words"),
    [
        ({"train_batch_size": 8}, "'train_batch_size' does not belong here; it is set by optim.global_batch"),
        ({"activation_checkpointing": {}}, "it is set by machine.pixel_checkpointing"),
        ({"gradient_clipping": 1}, "it is set by optim.grad_clip"),
        ({"bf16": {}}, "it is set by precision"),
        ({"torch_autocast": {}}, "it is set by precision"),
        ({"zero_optimization": {"stage": 2, "load_from_fp32_weights": False}}, "refused key 'load_from_fp32_weights'"),
        ({"zero_optimization": {"stage": 2, "overlap_comm": True}}, "overlap_comm = True: expected false"),
        ({"zero_optimization": {"stage": 2, "reduce_buket_size": 1}}, "did you mean 'reduce_bucket_size'"),
        ({"zero_optimization": 2}, "expected a table with a table 'zero_optimization'"),
        ([], "expected a table with a table 'zero_optimization'"),
        ({"scheduler": {}}, "it is set by optim.lr_step_at and optim.lr_after"),
        ({"zero_optimisation": {}}, "unknown key 'zero_optimisation' (did you mean 'zero_optimization'?)"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage = 3: expected 2"),
    ],
)
def test_deepspeed_knobs_are_only_deepspeeds(knobs: dict[str, object], words: str, tmp_path: Path) -> None:
    path = tmp_path / "knobs.json"
    if isinstance(knobs, dict):
        knobs = {"zero_optimization": {"stage": 2}} | knobs
    path.write_text(json.dumps(knobs))
    with pytest.raises(InputError) as error:
        ds_config.read_knobs(str(path))
    assert words in str(error.value)
    assert str(path) in str(error.value)


def test_shipped_knobs_hold_nothing_of_ours() -> None:
    for path in ds_config.DS_CONFIGS.glob("*.json"):
        keys = json.loads(path.read_text())
        assert not set(keys) & set(ds_config.OWNED), path
        assert keys["zero_optimization"]["overlap_comm"] is False


def test_a_knob_that_deepspeed_refuses_is_bad_input(own_shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "knobs.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}))
    (rank,) = start(1, "megapix", arguments(own_shards, tmp_path / "run", "--machine.ds-config", str(path)))
    assert rank.code == 2
    assert "reduce_bucket_size: input should be a valid integer" in rank.err.splitlines()[-1]


def test_configuration_files(own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*arguments(own_shards, tmp_path / "run", "--optim.lr-step-at", "2.5ep"), "--dry-run"]
    assert cli.main(command) == 0
    resolved = json.loads(capsys.readouterr().out)
    assert resolved["optim"]["lr_step_at"] == 100, "2.5 epochs of 40 images"
    path = tmp_path / "config.json"
    path.write_text(json.dumps(resolved))
    assert cli.main(["train", "--config", str(path), "--dry-run", "--seed", "7"]) == 0
    assert json.loads(capsys.readouterr().out) == resolved | {"seed": 7}
    for text, words in (
        ("{", "cannot be read as JSON"),
        ("[]", "expected a table of options, found list"),
        ('{"optim": {"lr_after_": 1}}', "optim: unknown key 'lr_after_' (did you mean 'lr_after'?)"),
        ('{"seed": "one"}', "seed = 'one': input should be a valid integer"),
        ('{"model": {"mlp": "silu"}}', "model: mlp = 'silu': input should be 'gelu' or 'swiglu'"),
    ):
        path.write_text(text)
        assert cli.main(["train", "--config", str(path), "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert str(path) in error


def test_marks_are_complete_and_frozen() -> None:
    marks = {key: mark for key, _, mark in config.leaves(config.Config())}
    assert set(marks.values()) == {"identity", "schedule", "machine"}
    assert {key for key, mark in marks.items() if mark == "schedule"} == {
        *(f"optim.{k}" for k in ("lr", "lr_after", "lr_step_at", "end_at", "warmup", "grad_clip")),
        *(f"health.{k}" for k in config.HealthConfig.__dataclass_fields__),
        *(f"repa.{k}" for k in ("weight", "stop_at")),
    }
    assert {key for key, mark in marks.items() if mark == "identity"} == {
        "seed", "init", "init_weights", "precision", "data.image_size", "data.flip", "data.shuffle_window",
        "data.reading_groups",
        *(f"model.{k}" for k in config.ModelConfig.__dataclass_fields__),
        *(f"flow.{k}" for k in config.FlowConfig.__dataclass_fields__),
        *(f"optim.{k}" for k in ("global_batch", "beta1", "beta2", "weight_decay", "ema_decay")),
        *(f"repa.{k}" for k in ("digest", "layer", "dtype")),
        *(f"text.{k}" for k in ("digest", "max_tokens", "normalize", "scale", "prefix", "dtype")),
    }  # fmt: skip


def test_resume_reads_the_marks(own_shards: Path, tmp_path: Path) -> None:
    asked = config.replace(config.replace(SMALL, "data.path", str(own_shards)), "out", str(tmp_path / "run"))
    _checkpoint_of(config.freeze(SMALL, 40), own_shards, tmp_path / "run", ranks=2)
    assert plan(asked, 2).changes == []
    changed = config.replace(config.replace(asked, "optim.lr", 0.5), "machine.micro_batch", 1)
    assert plan(changed, 2).changes == ["optim.lr: 0.002 -> 0.5"]
    assert plan(asked, 4).changes == ["ranks: 2 -> 4"]
    for key, value in (("model.mlp", "swiglu"), ("seed", 9), ("flow.time_shift", 3.0), ("optim.global_batch", 16)):
        with pytest.raises(InputError, match=key):
            plan(config.replace(asked, key, value), 2)


def launch(folder: Path, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run launch.sh in `folder` with this interpreter."""
    return subprocess.run(
        [str(ROOT / "launch.sh"), *options],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": sys.executable} | environment,
        cwd=folder,
        timeout=300,
    )


def test_launcher_help_and_errors(own_shards: Path, tmp_path: Path) -> None:
    done = launch(tmp_path, "--help")
    assert done.returncode == 0
    assert "usage: ./launch.sh" in done.stdout
    assert launch(tmp_path).returncode == 2
    done = launch(tmp_path, "--ranks", "many", "tiny")
    assert (done.returncode, done.stderr) == (2, "launch.sh: error: --ranks = 'many': expected a number above 0\n")
    done = launch(tmp_path, *arguments(tmp_path / "none", tmp_path / "run")[1:])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "does not exist" in done.stderr


@pytest.mark.parametrize(
    ("tool", "answer", "words"),
    [
        ("g++", None, "no g++: DeepSpeed compiles its CPU communication op"),
        ("df", "echo Avail; echo 64", "/dev/shm has 64 MiB free, 2 CPU ranks need 132"),
        ("ninja", None, "no ninja beside"),
        ("pdsh", None, "no pdsh: --hostfile starts the nodes with it (Debian: apt install pdsh); or --no-ssh"),
    ],
)
def test_launcher_says_what_the_machine_lacks(
    tool: str, answer: str | None, words: str, own_shards: Path, tmp_path: Path
) -> None:
    """The PATH holds the real tools but one, which is missing or answers as on a smaller machine."""
    tools, python = tmp_path / "tools", tmp_path / "python"
    tools.mkdir()
    python.mkdir()
    for name in ("bash", "dirname", "nproc", "wc", "df", "tail", "id", "rm", "g++", "ninja", "env"):
        found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
        assert found, name
        if name != tool:
            (tools / name).symlink_to(found)
    if answer:
        (tools / tool).write_text(f"#!/bin/sh\n{answer}\n")
        (tools / tool).chmod(0o755)
    wrapper = python / "python"
    wrapper.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    wrapper.chmod(0o755)
    (tmp_path / "hostfile").write_text("node01 slots=2\nnode02 slots=2\n")
    options = ["--hostfile", "hostfile"] if tool == "pdsh" else []
    command = [*options, *arguments(own_shards, tmp_path / "run")[1:]]
    done = launch(tmp_path, *command, PATH=str(tools), PYTHON=str(wrapper))
    assert done.returncode == 2
    assert done.stderr.startswith("launch.sh: error: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "visible", "expected"),
    [
        ([], "", "--include localhost:0,1,2,3"),
        (["--ranks", "2"], "", "--include localhost:0,1"),
        ([], "2,3", "--include localhost:2,3"),
        (["--ranks=2"], "1,2,3", "--include localhost:1,2"),
        (["--ranks", "5"], "", "launch.sh: error: --ranks = 5: there are 4 GPUs (0,1,2,3)"),
        ([], "GPU-1f2e", "launch.sh: error: CUDA_VISIBLE_DEVICES = 'GPU-1f2e': expected numbers"),
        (
            ["--no-ssh", "--nnodes=1", "--node-rank=0", "--master-addr=a"],
            "2,3",
            "launch.sh: error: CUDA_VISIBLE_DEVICES = '2,3': on several nodes DeepSpeed takes the first GPUs of each",
        ),
    ],
)
def test_launcher_on_a_machine_with_gpus(
    options: list[str], visible: str, expected: str, own_shards: Path, tmp_path: Path
) -> None:
    """What launch.sh asks of DeepSpeed's launcher where nvidia-smi lists four GPUs (nothing is started on them)."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        '#!/bin/sh\nfor i in 0 1 2 3; do echo "GPU $i: a card"; echo "  MIG 1g.5gb Device 0: a slice"; done\n'
    )
    (tools / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *deepspeed.launcher*) echo "$@"; echo "visible=$CUDA_VISIBLE_DEVICES";; '
        f'*) exec "{sys.executable}" "$@";; esac\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    environment = {"PATH": f"{tools}{os.pathsep}{os.environ['PATH']}", "PYTHON": str(tools / "python")}
    if visible:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    command = [*options, *arguments(own_shards, tmp_path / "run")[1:], "--optim.global-batch", "16"]
    done = launch(tmp_path, *command, **environment)
    assert expected in done.stdout + done.stderr
    if "error" in expected:
        assert done.returncode == 2
    else:
        assert done.returncode == 0, done.stderr
        assert "--module megapix train tiny" in done.stdout
        assert "visible=\n" in done.stdout, "the launcher sets it for each rank"


@pytest.mark.parametrize("broken", [True, False])
def test_launcher_without_a_gpu_that_works(broken: bool, own_shards: Path, tmp_path: Path) -> None:
    """An nvidia-smi that finds no driver, and a user who wants none of the GPUs, give CPU ranks."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text("#!/bin/sh\n" + ("exit 9\n" if broken else 'echo "GPU 0: a card"\n'))
    (tools / "python").write_text(
        f'#!/bin/sh\ncase "$*" in *deepspeed.launcher*) echo "$@ $DS_ACCELERATOR";; '
        f'*) exec "{sys.executable}" "$@";; esac\n'
    )
    for tool in tools.iterdir():
        tool.chmod(0o755)
    path = os.pathsep.join([str(tools), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {"PATH": path, "PYTHON": "python"} | ({} if broken else {"CUDA_VISIBLE_DEVICES": ""})
    done = launch(tmp_path, *arguments(own_shards, tmp_path / "run")[1:], **environment)
    assert done.returncode == 0, done.stderr
    assert "--num_gpus 2 " in done.stdout
    assert done.stdout.endswith(" cpu\n")
    done = launch(tmp_path, "tiny", PYTHON="no-such-python")
    assert done.returncode == 2
    assert done.stderr.startswith("launch.sh: error: PYTHON = 'no-such-python': expected an interpreter")


@pytest.mark.long
def test_torchrun_starts_it_too(own_shards: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "megapix"]
    command += [*arguments(own_shards, tmp_path / "run"), "--optim.end-at", "16"]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "x ranks 2" in done.stdout
    assert counters(tmp_path / "run").images_seen == 16


def test_launch_sh_trains_and_samples(own_shards: Path, tmp_path: Path) -> None:
    """The whole way as a user goes it: launcher, two ranks, a worker each, then `megapix sample` and `export`."""
    run = tmp_path / "run"
    before = set(Path("/dev/shm").iterdir())
    # A process that was killed while it loaded DeepSpeed's op leaves this file, and torch would wait for it for ever.
    leftover = engine.extensions() / "deepspeed_shm_comm" / "lock"
    leftover.parent.mkdir(parents=True, exist_ok=True)
    leftover.touch()
    options = [*arguments(own_shards, run)[1:], "--optim.end-at", "24", "--data.workers", "1"]
    done = launch(tmp_path, *options)
    assert done.returncode == 0, done.stderr
    assert "x ranks 2" in done.stdout
    assert "finished: 24 images seen" in done.stdout
    assert not leftover.exists()
    assert set(Path("/dev/shm").iterdir()) <= before, "the run's shared-memory segments are gone"
    picture = tmp_path / "grid.png"
    singles = tmp_path / "singles"
    options = ["--per-class", "2", "--steps", "2", "--classes", "2", "0", "--singles", str(singles), "--zoom", "2"]
    assert cli.main(["sample", str(run), "--out", str(picture), *options]) == 0
    with Image.open(picture) as image:
        assert image.size == (2 * (2 + 2 * 18), 2 * (2 + 2 * 18))
        sheet = np.asarray(image)[::2, ::2]
    assert sorted(path.name for path in singles.iterdir()) == [
        "0000-000002.png", "0000-000003.png", "0002-000000.png", "0002-000001.png",
    ]  # fmt: skip
    with Image.open(singles / "0002-000001.png") as image:
        assert np.array_equal(np.asarray(image), sheet[2:18, 20:36])
    exported, again = tmp_path / "exported.safetensors", tmp_path / "again.png"
    assert cli.main(["export", str(run), "--out", str(exported)]) == 0
    assert cli.main(["sample", str(exported), "--out", str(again), *options[:4], "--classes", "2", "0"]) == 0
    with Image.open(again) as image:
        assert np.array_equal(np.asarray(image), sheet)


@pytest.mark.long
def test_launch_sh_asks_a_run_to_stop(own_shards: Path, tmp_path: Path) -> None:
    """SIGTERM to the script, which DeepSpeed's launcher would not pass on: the run saves, and code 75 comes out."""
    run = tmp_path / "run"
    command = [*arguments(own_shards, run)[1:], "--optim.end-at", "1000000000", "--checkpoint.every", "1000000000"]
    process = subprocess.Popen(
        [str(ROOT / "launch.sh"), *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHON": sys.executable},
        cwd=tmp_path,
    )
    try:
        deadline = time.monotonic() + 200
        while len(logged(run)) < 3 and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.terminate()
        out, err = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 75, err
    assert "asking the run to save and end" in err
    assert f"stopped by {run / 'stop'}" in out
    assert counters(run).images_seen >= 3 * STEP_BATCH
    assert not (run / "stop").exists()


@pytest.mark.long
def test_launch_sh_starts_the_doctor(own_shards: Path, tmp_path: Path) -> None:
    done = launch(tmp_path, "doctor", *arguments(own_shards, tmp_path / "run")[1:])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 ranks met at" in done.stdout
    assert "nothing found that would stop this run" in done.stdout
    assert not (tmp_path / "run").exists()
    assert launch(tmp_path, "doctor", *arguments(own_shards / "none", tmp_path / "run")[1:]).returncode == 1


def _exported(path: Path, c: config.ModelConfig = SMALL.model) -> Path:
    """An export of an untrained network's EMA; `c` is what its metadata says of it."""
    torch.manual_seed(0)
    tensors = {name: p.detach() for name, p in PixelDiT(SMALL.model).named_parameters()}
    about = weights.About(c, SMALL.sampling, 16, SMALL.text, ("a", "b", "c"), True, "here", 0)
    flat.write(
        path,
        {name: (tuple(tensor.shape), [tensor]) for name, tensor in tensors.items()},
        {"megapix": json.dumps(config.to_dict(about))},
    )
    return path


def test_sampling_from_python(tmp_path: Path) -> None:
    net = megapix.load_model(_exported(tmp_path / "net.safetensors"), ema=True)
    noise = torch.randn(2, 3, 16, 16)
    told = megapix.condition.classes(torch.tensor([0, 2]), num_classes=3)
    images = megapix.sample.generate(
        net, noise, told, sampler="ab2", steps=3, guidance=2.0, interval=(0.1, 0.9), shift=1.0
    )
    assert torch.equal(images, noise), "an untrained network's velocity is zero"
    with pytest.raises(InputError, match="holds EMA weights, but the raw ones were asked for"):
        megapix.load_model(tmp_path / "net.safetensors", ema=False)


def test_sample_refuses_bad_input(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = _exported(tmp_path / "net.safetensors")
    out = ["--out", str(tmp_path / "grid.png")]
    cut, foreign = tmp_path / "cut.safetensors", tmp_path / "foreign.safetensors"
    cut.write_bytes(file.read_bytes()[:1000])
    flat.write(foreign, {"x": ((1,), [torch.zeros(1)])})
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
