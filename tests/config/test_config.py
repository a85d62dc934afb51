"""Options: DeepSpeed's knobs beside ours, configuration files, and the marks that a resume reads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megapix import config
from megapix.cli import main as cli
from megapix.config import ds_config
from megapix.errors import InputError
from megapix.train.resolve import resolve
from tests.support.launch import start
from tests.support.made_run import checkpoint_of
from tests.support.small_run import SMALL, arguments


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
    assert "reduce_bucket_size = 'many': expected a number of elements" in rank.err.splitlines()[-1]


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
        ('{"optim": {"lr_after_": 1}}', "optim.lr_after_: no such option (did you mean 'optim.lr_after'?)"),
        ('{"seed": "one"}', "seed = 'one': input should be a valid integer"),
        ('{"model": {"mlp": "silu"}}', "model: mlp = 'silu': input should be 'gelu' or 'swiglu'"),
    ):
        path.write_text(text)
        assert cli.main(["train", "--config", str(path), "--dry-run"]) == 2
        error = capsys.readouterr().err
        assert words in error
        assert str(path) in error


def test_a_runs_own_noise_is_kept_when_the_preset_has_another(own_shards: Path, tmp_path: Path) -> None:
    """And no other identity option; nor is torch's noise put in the place of Philox's."""
    asked = config.replace(config.replace(SMALL, "data.path", str(own_shards)), "out", str(tmp_path / "run"))
    philox = config.replace(asked, "flow.generator", "philox")
    checkpoint_of(config.freeze(SMALL, 40), own_shards, tmp_path / "run", ranks=2)
    resumed = resolve(philox, 2)
    assert resumed.kept == ("flow.generator: 'torch' of the checkpoint is kept",)
    assert (resumed.config.flow.generator, resumed.changes) == ("torch", [])
    assert resolve(asked, 2).kept == ()
    with pytest.raises(InputError, match=r"flow\.time_shift is 1\.0 there and 3\.0 here"):
        resolve(config.replace(philox, "flow.time_shift", 3.0), 2)
    other = config.replace(philox, "out", str(tmp_path / "other"))
    assert resolve(other, 2).config.flow.generator == "philox"
    checkpoint_of(config.freeze(philox, 40), own_shards, tmp_path / "other", ranks=2)
    assert (resolve(other, 2).config.flow.generator, resolve(other, 2).kept) == ("philox", ())
    with pytest.raises(InputError, match=r"flow\.generator is 'philox' there and 'torch' here"):
        resolve(config.replace(other, "flow.generator", "torch"), 2)


def test_presets_have_philox_and_what_lacks_the_key_has_torch() -> None:
    assert {config.preset(name).flow.generator for name in config.PRESETS} == {"philox"}
    assert config.from_dict(config.Config, {"flow": {"time_shift": 2.0}}, "x").flow.generator == "torch"


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
        *(f"optim.{k}" for k in ("global_batch", "beta1", "beta2", "weight_decay", "ema_decay", "ema_warmup")),
        *(f"repa.{k}" for k in ("digest", "layer", "dtype")),
        *(f"text.{k}" for k in ("digest", "max_tokens", "normalize", "scale", "prefix", "dtype", "padding")),
    }  # fmt: skip


def test_resume_reads_the_marks(own_shards: Path, tmp_path: Path) -> None:
    asked = config.replace(config.replace(SMALL, "data.path", str(own_shards)), "out", str(tmp_path / "run"))
    checkpoint_of(config.freeze(SMALL, 40), own_shards, tmp_path / "run", ranks=2)
    assert resolve(asked, 2).changes == []
    changed = config.replace(config.replace(asked, "optim.lr", 0.5), "machine.micro_batch", 1)
    assert resolve(changed, 2).changes == ["optim.lr: 0.002 -> 0.5"]
    assert resolve(asked, 4).changes == ["ranks: 2 -> 4"]
    for key, value in (("model.mlp", "swiglu"), ("seed", 9), ("flow.time_shift", 3.0), ("optim.global_batch", 16)):
        with pytest.raises(InputError, match=key):
            resolve(config.replace(asked, key, value), 2)


def test_old_names_are_read_and_have_no_effect(
    own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the command line, in a file, and in what a run has written: there without a word if nobody had chosen them."""
    command = [*arguments(own_shards, tmp_path / "run"), "--dry-run"]
    said = {}
    for name, options in {
        "none": [],
        "two": ["--data.retries", "2"],
        "joined": ["--data.retries=3", "--data.timeout", "7"],
    }.items():
        assert cli.main([*command, *options]) == 0
        printed = capsys.readouterr()
        resolved, said[name] = json.loads(printed.out), printed.err
        assert "retries" not in resolved["data"]
        assert (resolved["data"]["outage_minutes"], resolved["data"]["timeout"]) == (10, 7 if name == "joined" else 30)
    assert said["none"] == ""
    assert (
        said["two"]
        == "megapix: warning: --data.retries has no effect any more: --data.outage-minutes takes its place\n"
    )
    for value, warned in (
        (5, ""),
        (6, "data: retries = 6 has no effect any more: data.outage_minutes takes its place"),
    ):
        path = tmp_path / f"{value}.json"
        path.write_text(json.dumps({"data": {"retries": value, "timeout": 4.0}}))
        read = config.from_dict(config.Config, json.loads(path.read_text()), str(path))
        assert (read.data.timeout, read.data.outage_minutes) == (4.0, 10.0)
        assert warned in (err := capsys.readouterr().err)
        assert bool(err) == bool(warned)
    with pytest.raises(InputError, match="unknown key 'retries'"):
        config.from_dict(config.Config, {"optim": {"retries": 5}}, "x")
