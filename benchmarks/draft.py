"""`--resize draft` beside exact: CPU time from the bytes of a JPEG to the image that is trained on, and the PSNR.

    python -m benchmarks.draft [--pictures 3] [--rounds 5]

Pictures of 12 and of 2 megapixels, the last with odd sides (`photos.py`; 4:2:0, quality 92), become squares of 256, 512
and 1024 pixels by turns in both ways, on one thread; CPU times are medians of the rounds, and the PSNR is that of the
mean squared error of all.
"""

from __future__ import annotations

import io
import math
import statistics
import time
from dataclasses import dataclass

import numpy as np
import tyro

from benchmarks.photos import photo
from megapix.shards.decoding.draft import LARGEST
from megapix.shards.image_policy import Policy
from megapix.shards.pixels import halvings

SHAPES = ((3000, 4000), (1224, 1632), (1223, 1631))
"""(height, width)."""


@dataclass(frozen=True)
class Options:
    """What to measure."""

    pictures: int = 3
    rounds: int = 5


def encoded(shape: tuple[int, int], seed: int, progressive: bool) -> bytes:
    """A picture as JPEG."""
    out = io.BytesIO()
    photo(*shape, seed).save(out, "JPEG", quality=92, progressive=progressive)
    return out.getvalue()


def main() -> None:
    """Print the table."""
    options = tyro.cli(Options)
    print("| width x height | stored | to | scale | exact, CPU ms | draft, CPU ms | exact / draft | PSNR, dB |")
    print("|---|---|---|---|---|---|---|---|")
    for shape in SHAPES:
        for progressive in (False, True):
            images = [encoded(shape, seed, progressive) for seed in range(options.pictures)]
            for size in (256, 512, 1024):
                row = measured(images, size, options.rounds)
                times = min(LARGEST, max(0, halvings(*shape, size, size) - 1))
                scale, stored = f"1/{2**times}" if times else "whole", "progressive" if progressive else "baseline"
                print(f"| {shape[1]} x {shape[0]} | {stored} | {size} | {scale} | {row} |")


def measured(images: list[bytes], size: int, rounds: int) -> str:
    """The last columns of a row."""
    exact, draft = Policy.make("crop", size), Policy.make("crop", size, resize="draft")
    times: dict[Policy, list[float]] = {exact: [], draft: []}
    errors = []
    for data in images:
        one, other = (policy.render(data, 0).pixels.astype(np.float64) for policy in (exact, draft))
        errors.append(np.square(one - other).mean())
    for _ in range(rounds):
        for policy, taken in times.items():
            start = time.process_time()
            for data in images:
                policy.render(data, 0)
            taken.append((time.process_time() - start) / len(images) * 1e3)
    ratios = [a / b for a, b in zip(times[exact], times[draft], strict=True)]
    error = float(np.mean(errors))
    psnr = f"{10 * math.log10(255**2 / error):.1f}" if error else "equal"
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"{statistics.median(times[exact]):.1f} | {statistics.median(times[draft]):.1f} | {spread} | {psnr}"


if __name__ == "__main__":
    main()
