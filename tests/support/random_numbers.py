"""The random numbers of a run a second time: Python's integers, one number at a time, written from their definition.

The 64 bits of (seed, purpose, position) are the finaliser of SplitMix64, taken of the seed, then the purpose, then the
position. Uniform numbers are their upper 53 bits, permutations six Feistel rounds keyed by them, and noise is what
torch's CPU generator makes of them as its seed, or Philox4x32-10 with them as its key (Salmon et al. 2011). It shares
no code with `megapix`.
"""

from __future__ import annotations

import math
from statistics import NormalDist

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
    "set": 11,
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


def philox(counter: int, key: int) -> list[int]:
    """The four words of a 128-bit counter and a 64-bit key."""
    c0, c1, c2, c3 = (counter >> 32 * n & 0xFFFFFFFF for n in range(4))
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        one, other = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = other >> 32 ^ c1 ^ k0, other & 0xFFFFFFFF, one >> 32 ^ c3 ^ k1, one & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [c0, c1, c2, c3]


def philox_normal(seed: int, purpose: str, position: int, count: int) -> list[float]:
    """Standard normal numbers of an image, to double precision: each word's upper tail, of odd numbers alone."""
    key, numbers = bits(seed, purpose, position), list[float]()
    for word in (word for block in range(-(-count // 4)) for word in philox(block, key)):
        odd = (word | 1) - (2**32 if word >= 2**31 else 0)
        numbers.append(math.copysign(-NormalDist().inv_cdf(abs(odd) / 2**32), odd))
    return numbers[:count]


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
