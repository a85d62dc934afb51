"""A port of PixelDiT a second time: how ComfyUI and diffusers' ports call the network, and their samplers, from what is
written of them. It reads exported files alone, and knows nothing of this program's network, samplers and encoders.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support import second_network


def shifted_sigmas(steps: int, shift: float) -> list[float]:
    """Noise levels of flow matching from 1 to 0, where sigma becomes shift·sigma / (1 + (shift - 1)·sigma)."""
    plain = [1.0 - n / steps for n in range(steps)]
    return [*(shift * sigma / (1 + (shift - 1) * sigma) for sigma in plain), 0.0]


def text_to_image(
    state: dict[str, Tensor], patch: int, noise: Tensor, text: Tensor, empty: Tensor, steps: int, guidance: float,
    shift: float,
) -> Tensor:  # fmt: skip
    """Flow-matching Euler: the network is called with 1000·sigma and all text tokens, and predicts noise - image; every
    step is guided."""
    x, sigmas = noise.double(), shifted_sigmas(steps, shift)
    attended = torch.ones(text.shape[:2], dtype=torch.bool)
    for sigma, following in pairwise(sigmas):
        time = torch.full((len(x),), 1000 * sigma)
        with_text, without = (
            second_network.pixeldit(state, patch, x, time, told, attended) for told in (text, empty.expand_as(text))
        )
        x = x + (following - sigma) * (without + guidance * (with_text - without))
    return x.float()


def comfyui(file: Path) -> dict[str, Tensor]:
    """The network in a file, as it is found there: behind the prefix of `pixel_embedder.proj.weight`."""
    found, anchor = load_file(file), "pixel_embedder.proj.weight"
    (prefix,) = [prefix for prefix in ("core.", "net.") if prefix + anchor in found]
    return {name.removeprefix(prefix): tensor for name, tensor in found.items() if name.startswith(prefix)}


def instructed(folder: Path, captions: list[str], instruction: str, most: int) -> Tensor:
    """Text as the ports make it: [B, most, width]. Padded on the right by the tokenizer to the instruction's tokens and
    most - 2 more (the empty caption, without it, to most), of which the first and the last most - 1 stay."""
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    model = transformers.AutoModel.from_pretrained(folder).eval()
    rows = []
    for caption in captions:
        length = len(tokenizer.encode(instruction)) + most - 2 if caption else most
        words = instruction + caption if caption else ""
        shown = tokenizer(words, max_length=length, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            hidden = model(shown["input_ids"], attention_mask=shown["attention_mask"]).last_hidden_state[0]
        rows.append(torch.cat([hidden[:1], hidden[-(most - 1) :]]))
    return torch.stack(rows)


def diffusers(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Any]]:
    """Configuration and tensors of the network of a folder in diffusers' layout, and its scheduler's configuration."""
    transformer = folder / "transformer"
    index = transformer / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        places = json.loads(index.read_text())["weight_map"]
        files = {file: load_file(transformer / file) for file in set(places.values())}
        tensors = {name: files[file][name] for name, file in places.items()}
    else:
        tensors = load_file(transformer / "diffusion_pytorch_model.safetensors")
    config, scheduler = (
        json.loads((folder / name).read_text())
        for name in ("transformer/config.json", "scheduler/scheduler_config.json")
    )
    return config, tensors, scheduler


def class_conditional(
    state: dict[str, Tensor], config: dict[str, Any], noise: Tensor, classes: list[int], steps: int, guidance: float,
    shift: float,
) -> Tensor:  # fmt: skip
    """The port's loop: time from 0 (noise) to 1, image - noise, Adams–Bashforth steps after an Euler one, guidance in
    the open interval (0, 1); the null class is number num_classes."""
    grid = torch.cat([torch.linspace(0, 1 - 1 / steps, steps), torch.ones(1)])
    grid = (grid / (grid + (1 - grid) * shift)).tolist()
    x, before = noise.double(), None
    null = torch.full((len(classes),), config["num_classes"])
    for time, following in pairwise(grid):
        t = torch.full((len(x),), time)
        wanted, without = (
            second_network.pixeldit(state, config["patch_size"], x, t, y) for y in (torch.tensor(classes), null)
        )
        velocity = without + guidance * (wanted - without) if 0 < time < 1 else wanted
        x = x + (following - time) * (velocity if before is None else 1.5 * velocity - 0.5 * before)
        before = velocity
    return x.float()
