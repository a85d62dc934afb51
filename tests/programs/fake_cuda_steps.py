"""Training steps and samplers on a CUDA device that computes nothing: for each, what the host waits for.

usage: python -m tests.programs.fake_cuda_steps CASE...

A line of JSON for each case: its name, kernels, the copies and reads that wait, and the parameters without a gradient
on the device. That tensors of two devices meet is an error of torch's, as on a GPU.
"""

# ruff: noqa: E402

from __future__ import annotations

from benchmarks.fake_cuda import guard

guard.load()

import dataclasses
import json
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from benchmarks.fake_cuda import attention
from benchmarks.fake_cuda.recorder import Recorder
from benchmarks.fake_cuda.subjects import DEVICE, on_device
from megapix import config, model
from megapix.conditioning.conditioner import Classes, StoredText
from megapix.config import MachineConfig, ModelConfig
from megapix.data.batch import Batch
from megapix.diffusion import flow, sampler
from megapix.diffusion.condition import classes
from megapix.dist import World
from megapix.engine import checkpointing
from megapix.engine.clipping import ClippedMean
from megapix.model import Alignment
from megapix.resilience import agreement
from megapix.train import loop

IMAGES, HEIGHT, WIDTH, TOKENS = 3, 32, 64, 7
CLASSES = ModelConfig(patch_size=8, width=32, depth=2, heads=2, pixel_width=16, pixel_depth=1, num_classes=5)
TEXT = dataclasses.replace(CLASSES, num_classes=0, text_width=24, text_tokens=9, mlp="swiglu")
POST = dataclasses.replace(CLASSES, modulation="post")
POLICIES = ("none", "selective", "selective_modulation", "full", "chunked", "offload")
SIZES = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}


def built(made: ModelConfig, alignment: Alignment | None = None, pixel: Any = "none", patch: Any = "none") -> Any:
    network = on_device(lambda: model.build(made, alignment))
    checkpointing.apply(network, MachineConfig(pixel_checkpointing=pixel, patch_checkpointing=patch))  # type: ignore[arg-type]
    return network


def batch(made: ModelConfig, masked: bool, features: bool) -> Batch:
    """What the loader gives, in memory of the host."""
    images = torch.zeros(IMAGES, 3, HEIGHT, WIDTH, dtype=torch.uint8)
    text = None
    if made.text_width:
        mask = torch.ones(IMAGES, TOKENS, dtype=torch.bool)
        mask[0, 3:] = not masked
        text = torch.zeros(IMAGES, TOKENS, made.text_width, dtype=torch.bfloat16), mask
    stored = torch.zeros(IMAGES, 2, 4, 48) if features else None
    labels, positions = torch.zeros(IMAGES, dtype=torch.long), np.arange(IMAGES)
    draws = flow.draw(positions, 0, config.preset("b-256").flow)
    return Batch(images, labels, positions, features=stored, text=text, draws=draws)


def training(made: ModelConfig, masked: bool = False, repa: str = "", pixel: Any = "none", patch: Any = "none") -> Any:
    """A micro batch through the loop's own functions, and its backward pass; then the agreement after a step."""
    network = built(made, Alignment(1, 48) if repa else None, pixel, patch)
    run: Any = SimpleNamespace(
        config=config.replace(config.preset("b-256"), "model", made),
        device=DEVICE,
        engine=network,
        objective=flow.PLAIN,
        resolved=SimpleNamespace(teacher=teacher() if repa == "online" else None),
    )
    null = torch.zeros(1, 2, made.text_width, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bool)
    run.conditioner = StoredText(null, DEVICE) if made.text_width else Classes(made.num_classes, DEVICE)
    with unset_fake_temporarily():
        host = batch(made, masked, repa == "stored")
    pinned = (host.images, host.labels, host.features, *(host.text or ()), *host.draws)

    def step() -> list[str]:
        losses = loop.losses_of(run, host, bool(repa))
        loop.total(losses, 0.5).backward()
        mean = ClippedMean(1, 1.0)
        mean.beside = agreement.word(World(0, 1, 0), losses.flow.detach().mean(), stop=False, save_failed=False)
        mean.divisor(torch.zeros(5000, device=DEVICE))
        return [name for name, p in network.named_parameters() if p.grad is None or p.grad.device != DEVICE]

    return step, [tensor for tensor in pinned if tensor is not None]


def teacher() -> Any:
    """A small DINOv2 on the device, with no weights in particular."""
    import transformers

    from megapix.encoders.image import Encoder

    with unset_fake_temporarily():
        encoder = Encoder(transformers.Dinov2Model(transformers.Dinov2Config(**SIZES)))
    return encoder.to(DEVICE)


def sampling(made: ModelConfig, name: Any) -> Any:
    network = built(made).eval()

    def step() -> list[str]:
        noise = sampler.seeded_noise(0, [0, 1, 2], (HEIGHT, WIDTH), DEVICE)
        told = classes(torch.zeros(IMAGES, dtype=torch.long, device=DEVICE), made.num_classes)
        out = sampler.generate(network, noise, told, name, steps=3, guidance=2.0)
        return [] if out.device == DEVICE and out.shape == (IMAGES, 3, HEIGHT, WIDTH) else ["samples"]

    return step, []


CASES: dict[str, Callable[[], tuple[Callable[[], list[str]], list[Tensor]]]] = {
    "classes": lambda: training(CLASSES),
    "classes, post": lambda: training(POST),
    "text": lambda: training(TEXT),
    "text, masked": lambda: training(TEXT, masked=True),
    "repa, stored": lambda: training(CLASSES, repa="stored"),
    "repa, online": lambda: training(CLASSES, repa="online"),
    **{f"sampler, {name}": lambda name=name: sampling(CLASSES, name) for name in sampler.SAMPLERS},
    **{
        f"policies, {pixel}, {patch}": lambda pixel=pixel, patch=patch: training(CLASSES, pixel=pixel, patch=patch)
        for pixel in POLICIES
        for patch in ("none", "full", 2)
    },
}  # fmt: skip
"""Name -> what makes a case: what is to be recorded, and what the loader has pinned of it."""


def main(names: list[str]) -> None:
    attention.choose()
    for name in names or CASES:
        with FakeTensorMode(allow_non_fake_inputs=True):
            step, pinned = CASES[name]()
            with Recorder():
                step()  # position tables are made once
            with Recorder(pinned) as recorder:
                wrong = step()
        waits = [f"{copy.name}: {copy.line}" for copy in recorder.waits]
        print(json.dumps({"case": name, "kernels": len(recorder.kernels), "waits": waits, "wrong": wrong}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)
