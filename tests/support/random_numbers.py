"""The random numbers of a run a second time: Python's integers, one number at a time, written from their definition.

The 64 bits of (seed, purpose, position) are the finaliser of SplitMix64, taken of the seed, then the purpose, then the
position. Uniform numbers are their upper 53 bits, permutations six Feistel rounds keyed by them, and noise is what
torch's CPU generator makes of them as its seed. It shares no code with `megapix`.
"""

from __future__ import annotations

import torch
from torch import Tensor

PURPOSES = {
    "order": 1,
    "flip": 2,
    "timestep": 3,
    "label_dropout": 4,
    "noise": 5,
    "sample_noise": 6,
    "replacement": 7,
    "bucket": 8,
    "validation_noise": 9,
    "caption": 10,
}
GOLDEN, WORD = 0x9E3779B97F4A7C15, 2**64


def mix(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ x >> 27) * 0x94D049BB133111EB % WORD
    return x ^ x >> 31


def bits(seed: int, purpose: str, position: int) -> int:
    """64 bits."""
    key = mix((seed + GOLDEN) % WORD)
    key = mix((key + PURPOSES[purpose] * GOLDEN) % WORD)
    return mix((key + (position + 1) * GOLDEN) % WORD)


def uniform(seed: int, purpose: str, position: int) -> float:
    """In (0, 1)."""
    return ((bits(seed, purpose, position) >> 11) + 0.5) / 2**53


def normal(seed: int, purpose: str, position: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32."""
    generator = torch.Generator().manual_seed(bits(seed, purpose, position) % 2**63)
    return torch.randn(shape, generator=generator)


def permuted(seed: int, stream: int, size: int, index: int) -> int:
    """Where permutation number `stream` of range(size) takes `index`."""
    half = 1
    while 4**half < size:
        half += 1
    while True:
        left, right = divmod(index, 2**half)
        for turn in range(6):
            key = bits(seed, "order", 6 * stream + turn)
            left, right = right, left ^ mix((right + key) % WORD) % 2**half
        index = left * 2**half + right
        if index < size:
            return index


def epoch(seed: int, sizes: list[int], number: int) -> list[int]:
    """The samples of an epoch in order, with a perfect shuffle of shards of these sizes."""
    shards, total = range(len(sizes)), sum(sizes)
    order = [permuted(seed, number * 2**24, len(sizes), shard) for shard in shards]
    line = [sum(sizes[:shard]) + n for shard in order for n in range(sizes[shard])]
    return [line[permuted(seed, number * 2**24 + 1, total, place)] for place in range(total)]
