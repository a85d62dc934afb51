"""Samplers: integrate the velocity from noise (t = 0) to the image (t = 1), with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from megapix import rng
from megapix.config import Generator, Sampler, SamplingConfig
from megapix.diffusion import flow, noise
from megapix.diffusion.condition import Condition, classes
from megapix.diffusion.flow import Network
from megapix.rng import Purpose

SAMPLERS = get_args(Sampler)


def time_grid(steps: int, shift: float) -> list[float]:
    """The steps + 1 times t_k = shift(linspace(0, 1 - 1/n, n)) and 1, each an exact float32 value."""
    t = flow.time_shift(torch.linspace(0.0, 1.0 - 1.0 / steps, steps), shift)
    return [*t.tolist(), 1.0]


@torch.no_grad()
def generate(
    net: Network,
    noise: Tensor,
    condition: Condition | Tensor,
    sampler: Sampler = "ab2",
    steps: int = 50,
    guidance: float = 1.0,
    interval: tuple[float, float] = (0.0, 1.0),
    shift: float = 1.0,
    each_step: Callable[[], None] = lambda: None,
) -> Tensor:
    """Sample images from noise.

    `euler` is x += dt·v_k, dt = t_{k+1} - t_k, and first order. `heun` steps with the mean of v_k and of the velocity
    at t_{k+1} on Euler's point; its last step is plain Euler, so that nothing is evaluated at t = 1. `ab2` is the
    two-step Adams–Bashforth method that the authors released as FlowDPMSolver: after an Euler step,
    x += dt·(1.5 v_k - 0.5 v_{k-1}), as if the grid's steps were equal.

    Heun and ab2 are second order all the same: one Euler step costs an error of dt² once, and the steps of a shifted
    grid differ from their neighbours by a part of dt. That holds where the velocity is smooth. At the edges of the
    guidance interval it jumps, which leaves every sampler an error of order dt.

    Args:
        net: velocity network in eval mode, called as net(x, t, *cond).
        noise: float32 [B, 3, H, W], standard normal.
        condition: class labels, int64 [B], or a `Condition`, on the same device. Labels need a network with a `config`,
            whose num_classes is the null class. The null condition may be a negative prompt.
        steps: steps on the grid. Each evaluates the velocity once, of heun twice but for the last.
        guidance: w in v_u + w (v_c - v_u), used where interval[0] < t < interval[1] for the t of that evaluation;
            elsewhere, and for w = 1, only v_c is evaluated, at half the cost.
        shift: time shift of the grid.
        each_step: called before each of the steps, whatever they evaluate; an exception from it ends the sampling.

    Returns:
        float32 [B, 3, H, W], images in about [-1, 1].

    Raises:
        TypeError: labels for a network that has no classes in its `config`.
        ValueError: unknown sampler, or steps below 1.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r}: expected one of {', '.join(SAMPLERS)}")
    if steps < 1:
        raise ValueError(f"steps = {steps}: expected at least 1")
    c = classes(condition, _num_classes(net)) if isinstance(condition, Tensor) else condition
    low, high = torch.tensor(interval, dtype=torch.float32).tolist()  # compared in fp32, as t is

    def velocity(x: Tensor, t: float) -> Tensor:
        guided = guidance != 1.0 and low < t < high
        return _velocity(net, x, t, c, guidance if guided else None)

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


def generate_as(
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
        return net(x, times, *condition.cond).float()
    both = net(torch.cat([x, x]), torch.cat([times, times]), *condition.with_null())
    conditional, unconditional = both.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


def _num_classes(net: Network) -> int:
    """Classes of a network, from its own configuration."""
    found: int = getattr(getattr(net, "config", None), "num_classes", 0)
    if not found:
        raise TypeError(
            "class labels need a network whose config.num_classes is above 0, such as load_model returns; expected a "
            "Condition (megapix.condition) for a network that takes text, or for another callable"
        )
    return found


def seeded_noise(
    seed: int, numbers: list[int], size: tuple[int, int], device: torch.device, generator: Generator = "torch"
) -> Tensor:
    """Noise of the images with these numbers: float32 [B, 3, H, W]; each depends on `seed` and its own number alone.

    Args:
        generator: the run's `flow.generator`.
    """
    keys = noise.keys_of(rng.bits(seed, Purpose.SAMPLE_NOISE, np.asarray(numbers, np.int64)))
    return noise.normal(keys, (3, *size), device, generator)


def not_finite(source: str) -> str:
    """The message for samples with NaN or infinite pixels."""
    return f"{source}: its images are not finite: the weights have diverged, or are too large for this precision"
