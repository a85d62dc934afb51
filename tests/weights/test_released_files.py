"""Released weights as safetensors: one file, several, an index, a folder; what we export comes back bit for bit."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from megapix.cli import main as cli
from megapix.config import TextConfig, released_text
from megapix.weights.read import stored_weights
from tests.ports.test_second_implementation import CLASSES, SAMPLING, TEXT, model_folder
from tests.support.small_run import refused
from tests.weights.test_nvlabs import assert_identical, only, run, small, tensors

DTYPES = [torch.bfloat16, torch.float32]
NAME = "weights-{:05d}-of-00003.safetensors"


def split(state: dict[str, Tensor], folder: Path) -> dict[str, str]:
    """The state in three files; returns the place of each name."""
    folder.mkdir()
    places = {name: NAME.format(1 + number % 3) for number, name in enumerate(state)}
    for file in sorted(set(places.values())):
        save_file({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    return places


@pytest.mark.parametrize("prefix", ["ema_denoiser.", "core.", ""])
@pytest.mark.parametrize("given", ["one file", "a shard", "the index", "a folder", "diffusers' folder"])
def test_it_is_read_whatever_names_it(
    given: str, prefix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = tensors(small(kind="text"), prefix, 3, DTYPES)
    if given == "one file":
        path = tmp_path / "theirs.safetensors"
        save_file(state, path)
    else:
        folder = tmp_path / "theirs" / ("transformer" if given == "diffusers' folder" else "")
        folder.parent.mkdir(exist_ok=True)
        places = split(state, folder)
        if given != "a shard":
            (folder / "weights.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        path = {"a shard": folder / NAME.format(2), "the index": folder / "weights.safetensors.index.json"}.get(
            given, tmp_path / "theirs"
        )
    assert run("import", path, "--out", tmp_path / "model") == 0
    behind = f"behind {prefix!r}" if prefix else "without a prefix"
    assert f"megapix: taken from the file itself, {behind}\n" in capsys.readouterr().out
    found = stored_weights(tmp_path / "model")
    assert found.about.ema == (prefix == "ema_denoiser.")
    assert_identical(found.tensors, {name.removeprefix(prefix): tensor for name, tensor in state.items()})


def test_both_kinds_in_one_file(tmp_path: Path) -> None:
    both = tensors(small(), "denoiser.", 1, DTYPES) | tensors(small(), "ema_denoiser.", 2, DTYPES)
    save_file(both, tmp_path / "theirs.safetensors")
    for options, prefix in (([], "ema_denoiser."), (["--raw"], "denoiser.")):
        out = tmp_path / prefix
        assert run("import", tmp_path / "theirs.safetensors", "--out", out, *options) == 0
        expected = {name.removeprefix(prefix): tensor for name, tensor in only(both, prefix).items()}
        assert_identical(stored_weights(out).tensors, expected)


def test_what_is_exported_comes_back(tmp_path: Path) -> None:
    text = model_folder(tmp_path / "text", TEXT, released_text(11), SAMPLING)
    classes = model_folder(tmp_path / "classes", CLASSES, TextConfig(), SAMPLING)
    assert run("export", text, "--format", "comfyui", "--out", tmp_path / "comfy.safetensors") == 0
    options = ["--format", "diffusers", "--shard-gib", "0.0001"]
    assert run("export", classes, *options, "--out", tmp_path / "folder") == 0
    for path, source in ((tmp_path / "comfy.safetensors", text), (tmp_path / "folder", classes)):
        out = tmp_path / f"again-{source.name}"
        assert run("import", path, "--out", out, "--image-size", "16") == 0
        before, after = stored_weights(source), stored_weights(out)
        assert_identical(after.tensors, before.tensors)
        assert after.about.model == before.about.model
        assert replace(after.about.text, dtype="bf16") == before.about.text


def test_what_is_missing_or_damaged_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = tensors(small(), "", 3, DTYPES)
    folder, out = tmp_path / "theirs", str(tmp_path / "model")
    places = split(state, folder)
    index = folder / "weights.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}))
    (folder / NAME.format(2)).unlink()
    for path in (index, folder / NAME.format(3), folder):
        assert NAME.format(2) in refused(["import", str(path), "--out", out], capsys, cli.main)
    (folder / NAME.format(2)).write_bytes((folder / NAME.format(1)).read_bytes()[:300])
    assert "cannot be read as safetensors" in refused(["import", str(folder), "--out", out], capsys, cli.main)
    (folder / NAME.format(2)).write_bytes((folder / NAME.format(1)).read_bytes())
    assert "is in another of the files" in refused(["import", str(folder), "--out", out], capsys, cli.main)
    index.write_text("[]")
    assert "cannot be read as an index" in refused(["import", str(index), "--out", out], capsys, cli.main)
    (tmp_path / "empty").mkdir()
    assert "expected the file to import" in refused(["import", str(tmp_path / "empty"), "--out", out], capsys, cli.main)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    error = refused(["import", str(tmp_path / "other.safetensors"), "--out", out], capsys, cli.main)
    assert "has no state_dict with tensors: its keys are a" in error
