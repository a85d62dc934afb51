"""Kernels of a training step and the bytes they move, from a table that was counted without a GPU.

`kernels.json` holds, for each kind of block, way to run it and checkpointing policy, the kernels of a forward and a
backward pass and the bytes that they move per number of the block's stream: tokens × width in the patch pathway,
pixels × pixel width in the pixel pathway, where PiT blocks have more for each number of their attention's tokens
(`compact`). `python -m benchmarks.step_cost --write` makes it: eager blocks operation by
operation, compiled ones from Inductor's code for an H100, in bf16.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

from megapix.config import ModelConfig, recomputed_blocks
from megapix.costs.flops import CHANNELS


@dataclass(frozen=True)
class Moved:
    """Kernels of a micro batch but for what bounds matmuls, recomputation included. Bytes are those of one image."""

    elementwise: float
    """Bytes read and written by element-wise kernels, and by norms and sums that are part of them."""
    sums: float
    """Bytes read and written by kernels that only sum up, which are slower."""
    narrow: float
    """Bytes read and written by matmuls of so few channels that memory bounds them: the pixel MLP, colours."""
    launches: int
    """Kernels of a micro batch, matmuls among them."""
    matmuls: int
    """Of these, matmuls and attention."""
    small: int
    """Of these, kernels that take no longer than their launch: ends of sums, the condition, casts of gradients."""

    def __add__(self, other: Moved) -> Moved:
        return Moved(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))


def moved(
    model: ModelConfig,
    size: int,
    tokens: int,
    compiled: bool,
    kernels: str,
    pixel_policy: str,
    patch_policy: str | int,
    width: int,
) -> Moved:
    """Of forward and backward of the network and the objective; AdamW, ZeRO-2 and input are not in it.

    Args:
        size: images of size × size pixels.
        tokens: text tokens of an image, padding included; ignored with classes.
        kernels: 'plain' or 'triton', `machine.pixel_kernels`.
        pixel_policy: 'chunked' counts as 'full', 'offload' as 'none'; neither has been counted.
        width: bytes of a number, 2 for bf16. For 4 the bytes of bf16 are doubled, more than fp32 moves.
    """
    numbers = _numbers(model, size, tokens)
    total = Moved(0, 0, 0, 0, 0, 0)
    for times, kind, policy in _blocks(model, pixel_policy, patch_policy):
        way = kernels if kind.startswith("pit") else "plain"
        row = row_of(kind, f"{way} compiled" if compiled else way, policy, model)
        stream = "pixels" if kind.startswith(("pit", "final")) else "tokens"
        for part in ("forward", "backward"):
            total += _moved(row[part], numbers[stream], times)
    outside = table()["between"]["text" if model.text_width else "classes"]
    for stream, row in outside["compiled" if compiled else "eager"].items():
        times = {"each patch block": model.depth - 1, "each pit block": model.pixel_depth - 1}.get(stream, 1)
        unit = {"each patch block": "small", "each pit block": "patches"}.get(stream, stream)
        total += _moved(row, numbers[unit], times)
    wider = width / 2
    return Moved(
        total.elementwise * wider, total.sums * wider, total.narrow * wider, total.launches, total.matmuls, total.small
    )


def _blocks(model: ModelConfig, pixel_policy: str, patch_policy: str | int) -> list[tuple[int, str, str]]:
    """How often, which kind of the table, and its policy."""
    again = recomputed_blocks(patch_policy, model.depth)
    pixel = {"chunked": "full", "offload": "none"}.get(pixel_policy, pixel_policy)
    last = model.depth if model.text_width else 0
    found: dict[tuple[str, str], int] = {}
    for number in range(1, model.depth + 1):
        kind = "last" if number == last else "text" if last else "patch"
        key = f"{kind} {model.mlp}", "full" if number in again else "none"
        found[key] = found.get(key, 0) + 1
    blocks = [(times, *key) for key, times in found.items()]
    return [*blocks, (model.pixel_depth, f"pit {model.modulation}", pixel), (1, "final", pixel)]


def _numbers(model: ModelConfig, size: int, tokens: int) -> dict[str, int]:
    """Of one image, in each stream."""
    patches = (size // model.patch_size) ** 2 * model.width
    text = tokens * model.width if model.text_width else 0
    pixels = size**2 * model.pixel_width
    images, tokens = CHANNELS * size**2, patches + text
    streams = {"images": images, "noise": images, "pixels": pixels, "patches": patches, "text": text, "tokens": tokens}
    return streams | {"small": 0}


def row_of(kind: str, way: str, policy: str, model: ModelConfig) -> dict[str, Any]:
    """A block's row of the table, for the widths of a network: `forward` and `backward` per number of its stream, and
    `kept`, the bytes between the two, if it is compiled."""
    found = table()["blocks"][kind][way][policy]
    if "compact" not in found:
        return found
    share, more = model.attention_width / (model.patch_size**2 * model.pixel_width), found["compact"]
    row: dict[str, Any] = {
        part: [a + share * b for a, b in zip(found[part], more[part], strict=True)] for part in ("forward", "backward")
    }
    return row | ({"kept": found["kept"] + share * more["kept"]} if "kept" in found else {})


def _moved(row: list[float], unit: float, times: int) -> Moved:
    launches, matmuls, small, *moved = row
    elementwise, sums, narrow = (times * one * unit for one in moved)
    return Moved(elementwise, sums, narrow, times * int(launches), times * int(matmuls), times * int(small))


@cache
def table() -> dict[str, Any]:
    """What `kernels.json` holds: blocks[kind][way][policy] and between[classes or text][way][stream]."""
    return json.loads(Path(__file__).with_name("kernels.json").read_text())
