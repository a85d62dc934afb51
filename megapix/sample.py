"""Sampling: integrate the velocity from noise (t = 0) to the image (t = 1), with classifier-free guidance."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor

from megapix import draws, flow
from megapix.condition import Condition
from megapix.config import Sampler, SamplingConfig
from megapix.draws import Purpose
from megapix.errors import InputError
from megapix.flow import Network
from megapix.shards import write_atomic

SAMPLERS = get_args(Sampler)
METADATA = "megapix"
"""Text chunk of a PNG that says what it was drawn from."""


def time_grid(steps: int, shift: float) -> list[float]:
    """The steps + 1 times t_k = shift(linspace(0, 1 - 1/n, n)) and 1, each an exact float32 value."""
    t = flow.time_shift(torch.linspace(0.0, 1.0 - 1.0 / steps, steps), shift)
    return [*t.tolist(), 1.0]


@torch.no_grad()
def generate(
    net: Network,
    noise: Tensor,
    condition: Condition,
    sampler: Sampler = "ab2",
    steps: int = 50,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    shift: float = 1.0,
    each_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Images from noise.

    `euler` is x += dt·v_k, dt = t_{k+1} - t_k, and first order. `heun` steps with the mean of v_k and of the velocity
    at t_{k+1} on Euler's point; its last step is plain Euler, so that nothing is evaluated at t = 1. `ab2` is the
    two-step Adams–Bashforth method that the authors released as FlowDPMSolver: after an Euler step,
    x += dt·(1.5 v_k - 0.5 v_{k-1}), as if the grid's steps were equal.

    Heun and ab2 are second order all the same: one Euler step costs an error of dt² once, and the steps of a shifted
    grid differ from their neighbours by a part of dt. That holds where the velocity is smooth. At the edges of the
    guidance interval it jumps, which leaves every sampler an error of order dt.

    Args:
        net: velocity network in eval mode, called as net(x, t, *told).
        noise: float32 [B, 3, H, W], standard normal.
        condition: what the images shall show, on the same device; a negative prompt takes the place of its `nothing`.
        steps: steps on the grid. Each evaluates the velocity once, of heun twice but for the last.
        guidance: w in v_u + w (v_c - v_u), used where interval[0] < t < interval[1] for the t of that evaluation;
            elsewhere, and for w = 1, v_c alone is evaluated, at half the cost.
        shift: time shift of the grid.
        each_step: called before each of the steps, whatever they evaluate; an exception from it ends the sampling.

    Returns:
        float32 [B, 3, H, W], images in about [-1, 1].

    Raises:
        ValueError: unknown sampler, or steps below 1.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if steps < 1:
        raise ValueError(f"steps = {steps}: expected at least 1")
    low, high = torch.tensor(interval, dtype=torch.float32).tolist()  # compared in fp32, as t is

    def velocity(x: Tensor, t: float) -> Tensor:
        guided = guidance != 1.0 and low < t < high
        return _velocity(net, x, t, condition, guidance if guided else None)

    x, previous = noise.float(), None
    for t, following in pairwise(time_grid(steps, shift)):
        each_step()
        dt, v = following - t, velocity(x, t)
        slope = v
        if sampler == "heun" and following < 1.0:
            slope = 0.5 * (v + velocity(x + dt * v, following))
        elif sampler == "ab2" and previous is not None:
            slope = 1.5 * v - 0.5 * previous
        x = x + dt * slope
        previous = v
    return x


def draw(
    net: Network,
    noise: Tensor,
    condition: Condition,
    config: SamplingConfig,
    each_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """`generate` with a run's sampling options."""
    interval = (config.guidance_from, config.guidance_to)
    return generate(
        net, noise, condition, config.sampler, config.steps, config.guidance, interval, config.shift, each_step
    )


def _velocity(net: Network, x: Tensor, t: float, condition: Condition, guidance: float | None) -> Tensor:
    times = torch.full((len(x),), t, device=x.device)
    if guidance is None:
        return net(x, times, *condition.given).float()
    both = net(torch.cat([x, x]), torch.cat([times, times]), *condition.with_nothing())
    conditional, unconditional = both.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def seeded_noise(seed: int, numbers: list[int], size: tuple[int, int], device: torch.device) -> Tensor:
    """Noise of images number `numbers` under `seed`: float32 [B, 3, H, W]; each depends on its own number alone."""
    keys = draws.bits(seed, Purpose.SAMPLE_NOISE, np.asarray(numbers, np.int64))
    return flow.noise(keys, (3, *size), device)


def not_finite(source: str) -> str:
    """What is said where a network draws something else than numbers."""
    return f"{source}: its images are not finite: the weights have diverged, or are too large for this precision"


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] -> uint8 [B, H, W, 3] on the CPU, rounded to the nearest."""
    pixels = ((images + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
    """Lay uint8 images [B, H, W, 3] out row by row on white: uint8 [rows·(H+gap)+gap, columns·(W+gap)+gap, 3]."""
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    sheet = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + (i // columns) * (height + gap), gap + (i % columns) * (width + gap)
        sheet[top : top + height, left : left + width] = image
    return sheet


def write_png(path: Path, image: np.ndarray, zoom: int = 1, about: Mapping[str, Any] | None = None) -> None:
    """Write a uint8 image [H, W, 3] as PNG, each pixel `zoom` × `zoom`; the file appears whole or not at all.

    Args:
        about: what is said of it, as JSON in its text chunk METADATA.

    Raises:
        InputError: the file cannot be written.
    """
    import io

    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    png, said = io.BytesIO(), PngInfo()
    if about is not None:
        said.add_itxt(METADATA, json.dumps(about, ensure_ascii=False))
    Image.fromarray(image.repeat(zoom, 0).repeat(zoom, 1)).save(png, format="PNG", pnginfo=said)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, png.getvalue())
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror}") from error
