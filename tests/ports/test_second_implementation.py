"""What is exported gives our samples in an independent second implementation of the ports, from the same noise."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import torch

import megapix
from megapix.cli import main as cli
from megapix.config import ModelConfig, SamplingConfig, TextConfig, released_text
from megapix.diffusion.sampler import seeded_noise
from megapix.model import build
from megapix.weights.about import About, Weights
from megapix.weights.write import write_model
from tests.support import port, text_encoders

MOST, INSTRUCTION, STEPS, GUIDANCE, SIZE = 11, "user prompt : ", 20, 3.0, (8, 12)
CLASSES = ModelConfig(4, 32, 2, 2, 8, 2, mlp="swiglu", num_classes=3)
TEXT = ModelConfig(
    4, 32, 2, 2, 8, 2, 24, 3, "swiglu", num_classes=0, text_width=text_encoders.WIDTH, text_tokens=MOST,
    convention="released",
)  # fmt: skip
SAMPLING = SamplingConfig(steps=STEPS, guidance=GUIDANCE, guidance_from=0.0, guidance_to=1.0, shift=3.0)


def model_folder(folder: Path, model: ModelConfig, text: TextConfig, sampling: SamplingConfig) -> Path:
    """An imported folder of random weights."""
    torch.manual_seed(4)
    net = build(model)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(torch.randn_like(p) * 0.05)
        for name, p in net.named_parameters():
            if name.startswith("y_embedder.embedding_table"):
                p.mul_(60.0)  # so that classes, and guidance with them, matter
    names = ("tench", "rose", "a, b") if model.num_classes else ()
    about = About(model, sampling, 16, text, names, True, "random", 7, generator="philox")
    write_model(folder, Weights({name: p.detach() for name, p in net.named_parameters()}, about))
    return folder


def export(*arguments: str | Path) -> int:
    return cli.main(["export", *map(str, arguments)])


def test_a_text_network_runs_in_comfyuis_call(tmp_path: Path) -> None:
    """Two prompts of different length, 20 steps, guidance 3, fp32: at most 1e-4 in [-1, 1]."""
    encoder = text_encoders.make(tmp_path / "encoder", "gemma2")
    text = replace(released_text(MOST), prefix=INSTRUCTION, dtype="fp32", encoder=str(encoder))
    folder = model_folder(tmp_path / "model", TEXT, text, replace(SAMPLING, sampler="euler"))
    assert export(folder, "--format", "comfyui", "--out", tmp_path / "out.safetensors") == 0
    prompts = ["red cat", "two small dog on the red mat"]
    everywhere = (-1.0, 2.0)  # ComfyUI guides the step from pure noise, too
    ours = megapix.load(folder, device="cpu")(prompts=prompts, seed=3, size=SIZE, interval=everywhere, output="tensor")

    state = port.comfyui(tmp_path / "out.safetensors")
    told = port.instructed(encoder, [*prompts, ""], INSTRUCTION, MOST)
    noise = seeded_noise(3, [0, 1], SIZE, torch.device("cpu"), "philox")
    theirs = port.text_to_image(state, 4, noise, told[:2], told[2:], STEPS, GUIDANCE, SAMPLING.shift)
    assert theirs.std() > 0.3
    assert (theirs[0] - theirs[1] - noise[0] + noise[1]).abs().max() > 0.05, "the prompts matter"
    assert (ours - theirs).abs().max() <= 1e-4


def test_a_network_with_classes_runs_in_the_diffusers_ports_loop(tmp_path: Path) -> None:
    """From the exported folder alone, in several files of weights."""
    folder = model_folder(tmp_path / "model", CLASSES, TextConfig(), SAMPLING)
    assert export(folder, "--format", "diffusers", "--shard-gib", "0.0001", "--out", tmp_path / "out") == 0
    assert len(list((tmp_path / "out" / "transformer").glob("*.safetensors"))) > 2
    config, state, scheduler = port.diffusers(tmp_path / "out")
    assert scheduler["shift"] == SAMPLING.shift
    assert json.loads((tmp_path / "out" / "model_index.json").read_text())["id2label"]["1"] == "rose"
    noise = seeded_noise(5, [0, 1, 2], SIZE, torch.device("cpu"), "philox")
    theirs = port.class_conditional(state, config, noise, [2, 0, 1], STEPS, GUIDANCE, scheduler["shift"])
    for path in (folder, tmp_path / "out"):
        ours = megapix.load(path, device="cpu")(classes=["a, b", 0, "rose"], seed=5, size=SIZE, output="tensor")
        assert (ours - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.3
    others = megapix.load(folder, device="cpu")(classes=[1, 1, 1], seed=5, size=SIZE, output="tensor")
    assert (theirs - others)[:2].abs().amax((1, 2, 3)).min() > 0.05, "the classes matter"
