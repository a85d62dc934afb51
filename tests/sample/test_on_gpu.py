"""`megapix sample` on a GPU: weights, noise and what the network is told lie there, and the picture is written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from megapix.cli import main as cli
from megapix.weights.read import load_model
from tests.support.fake_cuda import FakeCuda
from tests.support.small_network import class_network, imported
from tests.support.trained import text_model


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("kind", ["classes", "text", "stored"])
def test_a_grid_is_drawn_on_the_gpu(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU plays it, with the same random numbers: the same picture."""
    command = ["--steps", "2", "--guidance", "2", "--batch", "3", "--per-class", "2"]
    if kind == "classes":
        net = imported(tmp_path / "net", class_network())
    else:
        net = text_model(tmp_path / "net", request.getfixturevalue("text_encoder"), stored=kind == "stored")
        prompts = request.getfixturevalue("text_shards") if kind == "stored" else tmp_path / "prompts.txt"
        (tmp_path / "prompts.txt").write_text("a red mat\ntwo small dog\n")
        command += ["--prompts", str(prompts), "--count", "2"] if kind == "stored" else ["--prompts", str(prompts)]
    command = ["sample", str(net), *command, "--out"]
    assert cli.main([*command, str(tmp_path / "cpu.png")]) == 0
    with FakeCuda(monkeypatch.setattr) as cuda:
        assert cli.main([*command, str(tmp_path / "gpu.png")]) == 0
    assert np.array_equal(pixels(tmp_path / "gpu.png"), pixels(tmp_path / "cpu.png"))
    drawn = [copy for copy in cuda.copies if copy.target == "cpu" and copy.dtype == torch.uint8]
    assert sum(copy.shape[0] for copy in drawn) == (6 if kind == "classes" else 4)
    noise = [copy for copy in cuda.copies if copy.shape == (1, 3, 16, 16)]
    assert noise == [], "drawn where it is used"


def test_a_model_is_loaded_onto_the_device_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = imported(tmp_path / "net", class_network())
    with FakeCuda(monkeypatch.setattr) as cuda:
        loaded = load_model(net, device="cuda:2")
        assert {cuda.place(p) for p in loaded.parameters()} == {torch.device("cuda", 2)}
