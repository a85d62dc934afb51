"""A folder in diffusers' layout: it samples alone, and what it says is what was trained."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import megapix
from megapix.cli import main as cli
from megapix.config import TextConfig, released_text
from megapix.ports.bundle import bundle
from megapix.weights.read import stored_weights
from tests.ports.test_second_implementation import CLASSES, SAMPLING, TEXT, export, model_folder
from tests.support import text_encoders
from tests.support.launch import ROOT
from tests.support.small_run import refused

SHORT = replace(SAMPLING, steps=3)


def alone(folder: Path, program: str) -> subprocess.CompletedProcess[str]:
    """A program in an interpreter that finds the folder and its requirements alone."""
    return subprocess.run(
        [sys.executable, "-I", str(ROOT / "tests/programs/only_requirements.py"), str(folder), program],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"},
    )


SAMPLE = """
import sys
from pipeline import PixelDiTPipeline
pipeline = PixelDiTPipeline.from_pretrained({folder!r})
for number, image in enumerate(pipeline(classes=[2, "rose"], seed=7)):
    image.save(f"{out}/{{number}}.png")
for name in ("megapix", "deepspeed", "transformers", "diffusers", "tyro", "pydantic"):
    assert name not in sys.modules
    try:
        __import__(name)
        raise SystemExit(f"{{name}} can be imported")
    except ModuleNotFoundError:
        pass
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("ports") / "model", CLASSES, TextConfig(), SHORT)


@pytest.fixture(scope="module")
def exported(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ports") / "out"
    assert export(model, "--format", "diffusers", "--out", out) == 0
    return out


@pytest.mark.long
def test_it_samples_with_its_requirements_alone(exported: Path, model: Path, tmp_path: Path) -> None:
    """The same pictures, to the last bit, as the program that it came from."""
    done = alone(exported, SAMPLE.format(folder=str(exported), out=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    ours = megapix.load(model, device="cpu")(classes=[2, "rose"], seed=7)
    for number, image in enumerate(ours):
        with Image.open(tmp_path / f"{number}.png") as theirs:
            assert np.array_equal(np.asarray(theirs), np.asarray(image))


@pytest.mark.long
def test_prompts_need_transformers_alone(tmp_path: Path) -> None:
    """A text network, with and without the library that reads prompts."""
    encoder = text_encoders.make(tmp_path / "encoder", "gemma2")
    text = replace(released_text(11), prefix="user prompt : ", dtype="fp32", encoder=str(encoder))
    folder = model_folder(tmp_path / "model", TEXT, text, SHORT)
    assert export(folder, "--format", "diffusers", "--out", tmp_path / "out") == 0
    program = (
        "from pipeline import PixelDiTPipeline\n"
        f"pipeline = PixelDiTPipeline.from_pretrained({str(tmp_path / 'out')!r})\n"
        f"pipeline(prompts=['red cat'], encoder={str(encoder)!r}, seed=1)[0].save({str(tmp_path / 'a.png')!r})"
    )
    without = alone(tmp_path / "out", program)
    assert without.returncode == 1
    assert "InputError: prompts need a text encoder: pip install transformers (No module" in without.stderr
    with open(tmp_path / "out" / "requirements.txt", "a") as file:
        file.write("transformers\n")
    done = alone(tmp_path / "out", program)
    assert done.returncode == 0, done.stderr
    (ours,) = megapix.load(folder, device="cpu")(prompts=["red cat"], seed=1)
    with Image.open(tmp_path / "a.png") as theirs:
        assert np.array_equal(np.asarray(theirs), np.asarray(ours))


def test_the_one_file_is_what_the_program_is() -> None:
    """It imports what its requirements name, and Python's own library, and no function of it uses an unknown name."""
    text = bundle("megapix.ports.pipeline", "about")
    imports = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imports - set(sys.stdlib_module_names) == {"torch", "numpy", "einops", "safetensors", "PIL"}
    found = subprocess.run(
        [Path(sys.executable).parent / "ruff", "check", "--isolated", "--select", "F821", "-"],
        input=text, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout


def test_what_the_folder_says(exported: Path, model: Path) -> None:
    index = json.loads((exported / "model_index.json").read_text())
    assert index["id2label"] == {"0": "tench", "1": "rose", "2": "a, b"}
    assert index["_megapix"]["sampling"]["guidance"] == SHORT.guidance
    config = json.loads((exported / "transformer" / "config.json").read_text())
    assert (config["_class_name"], config["num_classes"], config["num_groups"]) == ("PixelDiTTransformer2DModel", 3, 2)
    assert json.loads((exported / "scheduler" / "scheduler_config.json").read_text())["shift"] == SHORT.shift
    card = (exported / "README.md").read_text()
    assert "EMA, 7 images seen" in card
    assert "3: tench, rose, a, b" in card
    found = load_file(exported / "transformer" / "diffusion_pytorch_model.safetensors")
    expected = stored_weights(model).tensors
    assert sorted(found) == sorted(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_files_above_a_size_are_several(model: Path, tmp_path: Path) -> None:
    most = 0.0001
    assert export(model, "--format", "diffusers", "--shard-gib", most, "--out", tmp_path / "out") == 0
    folder = tmp_path / "out" / "transformer"
    index = json.loads((folder / "diffusion_pytorch_model.safetensors.index.json").read_text())
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert set(files) == set(index["weight_map"].values())
    assert files[0] == f"diffusion_pytorch_model-00001-of-{len(files):05d}.safetensors"
    held = {name: load_file(folder / name) for name in files}
    for tensors in held.values():
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= most * 2**30
    expected = stored_weights(model).tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert all(torch.equal(held[index["weight_map"][name]][name], tensor) for name, tensor in expected.items())


def test_what_ports_would_not_run_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """GELU loads in no port; a text network of another convention would be called otherwise than it was trained."""
    gelu = model_folder(tmp_path / "gelu", replace(CLASSES, mlp="gelu"), TextConfig(), SHORT)
    for form in ("nvlabs", "diffusers"):
        assert export(gelu, "--format", form, "--out", tmp_path / form) == 0
        said = capsys.readouterr().out
        note = "do not run this network as it is: model.mlp = 'gelu', not 'swiglu'\n"
        assert said.count(note) == 1
    paper = model_folder(tmp_path / "paper", replace(TEXT, convention="paper"), TextConfig(max_tokens=11), SHORT)
    error = refused(["export", str(paper), "--format", "comfyui", "--out", str(tmp_path / "a")], capsys, cli.main)
    for words in (
        "model.convention = 'paper', not 'released'",
        "text.padding = 'masked', not 'attended'",
        "scale = 0.01",
    ):
        assert words in error
    for model, words in ((gelu, "takes classes, and ComfyUI"), (None, "post")):
        folder = model or model_folder(tmp_path / "p", replace(TEXT, modulation="post"), released_text(11), SHORT)
        error = refused(["export", str(folder), "--format", "comfyui", "--out", str(tmp_path / "a")], capsys, cli.main)
        assert words in error
    assert not (tmp_path / "a").exists()
