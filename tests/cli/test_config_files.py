"""Configuration files over presets, in YAML and JSON; printed ones; and the option that a wrong name meant."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from megapix import config
from megapix.cli import main as cli
from megapix.cli import names
from megapix.cli.parse import gives_classes, left_to_defaults, parse_run
from megapix.config import Config, preset
from megapix.dist import World
from tests.support.small_run import arguments, refused


def parsed(*arguments: str | Path) -> Config:
    return parse_run([str(argument) for argument in arguments], World())


PART = """\
# a part of a configuration
optim:
  lr: 3e-4        # a number in YAML 1.2, a text in PyYAML
  end_at: 12ep
data: {path: off, image_size: 512}
out: no
model:
  num_classes: 7
machine: {compile: false}
"""


def test_a_partial_file_goes_over_the_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In either order; options of the command go over both."""
    path, base = tmp_path / "part.yaml", preset("b-512")
    path.write_text(PART)
    expected = replace(
        base,
        out="no",
        optim=replace(base.optim, lr=3e-4, end_at="12ep"),
        data=replace(base.data, path="off"),
        model=replace(base.model, num_classes=7),
        machine=replace(base.machine, compile=False),
    )
    assert parsed("b-512", "--config", path) == parsed("--config", path, "b-512") == expected
    assert parsed("b-512", f"--config={path}", "--optim.lr", "0.5").optim == replace(expected.optim, lr=0.5)
    assert parsed("b-512", "--optim.lr", "0.5", "--config", path).optim.lr == 0.5
    assert gives_classes(["b-512", "--config", str(path)])
    assert capsys.readouterr().err == ""
    same = {"out": "no", "optim": {"lr": 3e-4, "end_at": "12ep"}, "data": {"path": "off"}, "model": {"num_classes": 7}}
    path.with_suffix(".json").write_text(json.dumps(same | {"machine": {"compile": False}}))
    assert parsed("b-512", "--config", path.with_suffix(".json")) == expected


def test_a_file_alone_means_what_it_meant(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The options that it leaves out keep their own defaults, which is said; of a whole one nothing is said."""
    path = tmp_path / "part.json"
    path.write_text(json.dumps({"flow": {"time_shift": 2.0}, "seed": 3}))
    assert parsed("--config", path) == Config(seed=3, flow=config.FlowConfig(time_shift=2.0))
    total = len(list(config.leaves(Config())))
    said = left_to_defaults(["--config", str(path)])
    assert f"{path} leaves {total - 4} of {total} options to their defaults (init, init_weights, resume, …)" in said
    assert left_to_defaults(["tiny", "--config", str(path)]) == ""
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(config.to_dict(preset("t2i-512"))))
    assert parsed("--config", whole) == preset("t2i-512")
    assert left_to_defaults(["--config", str(whole)]) == ""
    assert parsed("tiny", "--config", whole) == preset("t2i-512")
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", config.PRESETS)
def test_what_is_printed_is_read_back(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Texts that look like numbers or switches, too; and nothing else is needed to print it."""
    path = tmp_path / "printed.yaml"
    options = ["--out", "1e-4", "--text.prefix" if name.startswith("t2i") else "--log.prompts", "off", "--seed", "11"]
    assert cli.main(["train", name, "--print-config", *options]) == 0
    path.write_text(capsys.readouterr().out)
    assert parsed("--config", path) == parsed(name, *options)
    assert set(yaml.safe_load(path.read_text())) == set(config.to_dict(Config()))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("optim: {lr: [1", "cannot be read as YAML: while parsing a flow sequence"),
        ("- 1", "expected a table of options, found list"),
        ("seed: 1\nseed: 2", "cannot be read as YAML: 'seed' is there twice, in line 2"),
        ("optim: {learning_rate: 1}", "optim.learning_rate: no such option (did you mean 'optim.lr'?)"),
        ("lr: 1", "lr: no such option (did you mean 'optim.lr'?)"),
        ("optim.lr: 1e-3\nsede: 1", "sede: no such option (did you mean 'seed'?)"),
        ("optim: 3", "optim: expected a table of options"),
        ("seed: {a: 1}", "seed.a: no such option"),
        ("seed: 0.5", "seed = 0.5: input should be a valid integer"),
        ("data: {flip: yes}", "data: flip = 'yes': input should be a valid boolean"),
        ("out: !!python/name:os.system", "cannot be read as YAML"),
        ("1: 2", "1: no such option"),
    ],
)
def test_a_wrong_file_is_refused_in_one_line(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "wrong.yml"
    path.write_text(text)
    line = refused(["train", "tiny", "--config", str(path), "--print-config"], capsys)
    assert f"--config {path}: " in line
    assert words in line


def test_dotted_keys_are_options(tmp_path: Path) -> None:
    path = tmp_path / "dotted.yaml"
    path.write_text("optim.lr: 2.5e-3\noptim: {beta1: 0.8}\nmachine.compile: true\n")
    found = parsed("tiny", "--config", path)
    assert (found.optim.lr, found.optim.beta1, found.machine.compile) == (2.5e-3, 0.8, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny", "--optim.learning-rate", "1"], "'--optim.learning-rate' does not exist (did you mean '--optim.lr'?)"),
        (["tiny", "--optim.learning_rate=1"], "'--optim.learning_rate' does not exist (did you mean '--optim.lr'?)"),
        (["tiny", "--batch-size", "1"], "(did you mean '--optim.global-batch'?)"),
        (["tiny", "--lr", "1"], "(did you mean '--optim.lr'?)"),
        (["tiny", "--data-path", "x"], "(did you mean '--data.path'?)"),
        (["tiny", "--flow.seed", "1"], "(did you mean '--seed'?)"),
        (["tiny", "--model.depht", "1"], "(did you mean '--model.depth'?)"),
        (["tiny", "--machine.no-compil"], "(did you mean '--machine.compile'?)"),
        (["tiny", "--qqq", "1"], "option '--qqq' does not exist; 'megapix train tiny --help' lists the options"),
        (["tiny", "--config"], "--config needs a YAML or JSON file"),
        (["tiny", "--config", "--seed", "1"], "--config needs a YAML or JSON file"),
        (["tiny", "--config", "a.json", "--config", "b.json"], "--config is there twice, with 'a.json' and 'b.json'"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: cannot be read as YAML"),
        (["--print-config"], "--print-config needs a preset or --config FILE"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert words in refused(["train", *arguments], capsys)


def test_names_of_other_trainers_are_those_of_no_option_of_ours() -> None:
    known = {key for key, _, _ in config.leaves(Config())}
    assert set(names.ELSEWHERE.values()) <= known
    assert not set(names.ELSEWHERE) & known
    for name, meant in names.ELSEWHERE.items():
        near = names.nearest(name, sorted(known))
        assert near == f" (did you mean {meant!r}?)", name


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--machine.attention", "cudnn"], "machine.attention = 'cudnn' does not take the attention of"),
        (["--machine.pixel-kernels", "triton", "--model.pixel-width", "16"], "Triton compiles for GPUs only"),
        (["--machine.ds-config", "KNOBS"], "zero_optimization.reduce_bucket_size = 'many': expected a number of"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would(
    options: list[str], words: str, own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    knobs = tmp_path / "knobs.json"
    knobs.write_text(json.dumps({"zero_optimization": {"stage": 2, "reduce_bucket_size": "many"}}))
    options = [str(knobs) if option == "KNOBS" else option for option in options]
    assert words in refused([*arguments(own_shards, tmp_path / "run", *options), "--dry-run"], capsys)
