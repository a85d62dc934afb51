"""Time and memory of `--dedupe near` once the perceptual hashes are there.

    python -m benchmarks.near_duplicates [--images 1000000] [--bits 4]

Hashes are random, and a tenth of them copies of others with up to `bits` bits turned. Computing them, which takes
longer, is decoding all images once; the third line times a hash of one image.
"""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import numpy as np
import tyro

from data_prep.filters.duplicates import duplicates_of
from data_prep.filters.fingerprints import fingerprint
from data_prep.filters.rules import Duplicates


@dataclass(frozen=True)
class Options:
    """What to measure."""

    images: int = 1_000_000
    bits: int = 4


def made_up(images: int, bits: int) -> np.ndarray:
    """Fingerprints, uint8 [images, 8]."""
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, images, dtype=np.uint64)
    copies = rng.choice(images, images // 10, replace=False)
    turned = hashes[rng.integers(0, images, len(copies))]
    for _ in range(bits):
        turned ^= np.uint64(1) << rng.integers(0, 64, len(copies)).astype(np.uint64)
    hashes[copies] = turned
    return hashes.view(np.uint8).reshape(images, 8)


def main() -> None:
    """Print three lines."""
    options = tyro.cli(Options)
    prints, before = made_up(options.images, options.bits), _peak()
    start, cpu = time.perf_counter(), time.process_time()
    taken = int(duplicates_of(prints, Duplicates(options.bits)).sum())
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    print(
        f"{options.images:,} hashes, {options.bits} bits: {taken:,} duplicates in {seconds:.0f} s, {cpu:.0f} s of CPU"
    )
    print(f"peak of the process: {_peak():,} MiB, {before:,} MiB before")
    image = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    fingerprint(image, Duplicates(options.bits))
    start = time.perf_counter()
    for _ in range(20):
        fingerprint(image, Duplicates(options.bits))
    print(f"hash of 512x512 pixels: {(time.perf_counter() - start) / 20 * 1e3:.1f} ms")


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
