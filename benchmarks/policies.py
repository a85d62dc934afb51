"""Memory against time: each checkpointing policy's bytes per image, and what it adds to the time of a step.

    python -m benchmarks.policies                    PixelDiT-XL, 256 x 256, bf16, one image, forward and backward
    python -m benchmarks.policies --compile          the same with compiled blocks

The policies take turns on one network; times are medians, relative to the one that keeps everything.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import torch

from benchmarks.made_up import told
from megapix.config import PRESETS, MachineConfig, PixelPolicy
from megapix.costs import activations
from megapix.dist import from_environment
from megapix.engine import checkpointing, processes
from megapix.model import build

CASES: list[tuple[PixelPolicy, str | int]] = [
    ("none", "none"),
    ("selective", "none"),
    ("selective_modulation", "none"),
    ("full", "none"),
    ("chunked", "none"),
    ("offload", "none"),
    ("none", 4),
    ("none", 2),
    ("none", "full"),
    ("full", "full"),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.policies", description=__doc__)
    parser.add_argument("--preset", default="xl-256", choices=PRESETS)
    parser.add_argument("--batch", type=int, default=1, help="images of the step")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--fp32", action="store_true")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    config = PRESETS[options.preset][0]()
    dtype = torch.float32 if options.fp32 else torch.bfloat16
    torch.manual_seed(0)
    net = build(config.model).to(dtype)
    size, device = config.data.image_size, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    net.to(device)
    if device.type == "cpu":
        processes.start(from_environment())  # memory is kept between steps, as in a run
    x = torch.randn(options.batch, 3, size, size, device=device)
    t, tokens = torch.rand(options.batch, device=device), config.text.max_tokens
    condition = [part.to(device) for part in told(config.model, options.batch, tokens)]

    def step(pixel: PixelPolicy, patch: str | int) -> float:
        checkpointing.apply(
            net, MachineConfig(pixel_checkpointing=pixel, patch_checkpointing=patch, compile=options.compile)
        )
        gc.collect()
        _wait(device)
        start = time.perf_counter()
        net(x, t, *condition).float().square().mean().backward()
        _wait(device)
        return time.perf_counter() - start

    for case in CASES:
        step(*case)  # the first compiles, and makes the gradients
    times = {case: [] for case in CASES}
    for _ in range(options.repeats):
        for case in CASES:
            times[case].append(step(*case))
    ratios = {case: [a / b for a, b in zip(times[case], times[CASES[0]], strict=True)] for case in CASES}
    print("| pixel pathway | patch pathway | pixel, MiB per image | patch, MiB per image | time | from | to |")
    print("|---|---|---|---|---|---|---|")
    for pixel, patch in CASES:
        machine, ratio = MachineConfig(pixel_checkpointing=pixel, patch_checkpointing=patch), ratios[pixel, patch]
        held = activations.per_image(config.model, size, dtype.itemsize, machine, tokens)
        mib = [f"{held[pathway] / 2**20:.1f}" for pathway in ("pixel", "patch")]
        spread = f"{statistics.median(ratio):.3f} | {min(ratio):.3f} | {max(ratio):.3f}"
        print(f"| {pixel} | {patch} | {' | '.join(mib)} | {spread} |")
    print(f"the first: {statistics.median(times[CASES[0]]):.2f} s")


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
