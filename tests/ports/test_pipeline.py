"""`megapix.load`: one call, the run's own settings, and errors that say what is right."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import megapix
from megapix.cli import main as cli
from megapix.config import TextConfig
from megapix.errors import InputError
from megapix.ports.pipeline import PixelDiTPipeline
from tests.ports.test_second_implementation import CLASSES, SAMPLING, TEXT, model_folder

STORED = replace(SAMPLING, steps=4, guidance=2.5, sampler="heun")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("pipeline") / "model", CLASSES, TextConfig(), STORED)


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> PixelDiTPipeline:
    return megapix.load(folder, device="cpu")


def test_it_samples_as_the_command_with_the_stored_settings(
    pipeline: PixelDiTPipeline, folder: Path, tmp_path: Path
) -> None:
    command = ["sample", str(folder), "--per-class", "1", "--seed", "9", "--out", str(tmp_path / "grid.png")]
    assert cli.main([*command, "--classes", "2", "0", "--singles", str(tmp_path)]) == 0
    images = pipeline(classes=["a, b", 0], seed=9)
    for image, number in zip(images, (2, 0), strict=True):
        (path,) = tmp_path.glob(f"{number:04d}-*.png")
        with Image.open(path) as expected:
            assert np.array_equal(np.asarray(image), np.asarray(expected))
    plain = pipeline(classes=[2, 0], seed=9, guidance=1.0, output="tensor")
    assert (plain - pipeline(classes=[2, 0], seed=9, output="tensor")).abs().max() > 1e-3, "guidance is the run's"


def test_an_image_depends_on_its_seed_and_place_alone(pipeline: PixelDiTPipeline) -> None:
    """Not on the batch that it is in, but for rounding."""
    whole = pipeline(classes=[0, 1, 2, 1, 0], seed=2, size=(8, 20), output="tensor")
    assert whole.shape == (5, 3, 8, 20)
    torch.testing.assert_close(pipeline(classes=[0, 1, 2, 1, 0], seed=2, size=(8, 20), batch=2, output="tensor"), whole)
    first = pipeline(classes=[0], seed=2, size=(8, 20), output="tensor")
    torch.testing.assert_close(first, whole[:1])
    assert (pipeline(classes=[0], seed=3, size=(8, 20), output="tensor") - first).abs().max() > 0.1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "class too high": ({"classes": [1, 3]}, "class 3 does not exist: expected numbers from 0 to 2, or names"),
    "class below 0": ({"classes": [-1]}, "class -1 does not exist"),
    "half a class": ({"classes": [0.5]}, "class 0.5 does not exist"),
    "name": ({"classes": ["rosé"]}, "class 'rosé' does not exist (did you mean 'rose'?)"),
    "one number": ({"classes": 1}, "classes = 1: expected numbers from 0 to 2, or names of classes, in a list"),
    "none": ({}, "classes = None: expected"),
    "prompts": ({"classes": [1], "prompts": ["a"]}, "takes classes, not text (classes=[...])"),
    "size": ({"classes": [1], "size": (16, 18)}, "size = (16, 18): expected (height, width), both multiples of the"),
    "one side": ({"classes": [1], "size": 16}, "size = 16: expected (height, width)"),
    "seed": ({"classes": [1], "seed": -1}, "seed = -1: expected 0 to"),
    "batch": ({"classes": [1], "batch": 0}, "batch = 0: expected at least 1"),
    "output": ({"classes": [1], "output": "jpg"}, "output = 'jpg': expected 'pil' or 'tensor'"),
    "misspelled": ({"classes": [1], "guidence": 2}, "guidence is no argument of a pipeline (did you mean 'guidance'?)"),
    "steps": ({"classes": [1], "steps": 0}, "steps = 0: expected at least 1"),
    "sampler": ({"classes": [1], "sampler": "dpm"}, "sampler = 'dpm': expected one of euler, heun, ab2"),
    "interval": ({"classes": [1], "interval": 0.5}, "interval = 0.5: expected numbers, and two of them for interval"),
    "guidance": ({"classes": [1], "guidance": "2"}, "guidance = '2': expected numbers"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_are_one_line(name: str, pipeline: PixelDiTPipeline) -> None:
    arguments, words = BAD[name]
    with pytest.raises(InputError) as error:
        pipeline(**arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_text_network_wants_prompts_and_an_encoder(tmp_path: Path) -> None:
    pipeline = megapix.load(model_folder(tmp_path / "model", TEXT, TextConfig(max_tokens=11), STORED), device="cpu")
    for arguments, words in (
        ({"classes": [1]}, "classes = [1]: "),
        ({"prompts": "a cat"}, "prompts = 'a cat': expected a list of texts"),
        ({"prompts": []}, "prompts = []: expected at least one"),
        ({"prompts": ["a"]}, "names no text encoder: give encoder="),
        ({"prompts": ["a"], "encoder": "./nowhere"}, "encoder = './nowhere': no such folder"),
    ):
        with pytest.raises(InputError) as error:
            pipeline(**arguments)  # type: ignore[arg-type]
        assert words in str(error.value)


def test_what_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        megapix.load(tmp_path / "nothing")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(InputError, match=r"cannot be read as a folder by .*: '_megapix'"):
        megapix.load(tmp_path)
