"""Standard normal noise of images: each a pure function of its own 64-bit key, whatever batch it is drawn in.

    philox   Philox4x32-10 (Salmon et al. 2011), then an inverse normal distribution function; for a whole micro batch
             at once, and the same bits on CPUs and on any GPU
    torch    torch's own generators, image by image: CPUs and GPUs have different streams, and above some 200,000
             numbers an image GPUs of different sizes, too

With philox, number v of an image is word v % 4 of block v // 4: the counter is the block, the key is the image's 64
bits. Words become normal numbers by single operations that IEEE 754 or integers define to the last bit, one kernel
each, so nothing is left to a device's logarithm, a library's cosine, or a compiler's fused multiply-add.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from statistics import NormalDist
from typing import get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapix.config import Generator

GENERATORS = get_args(Generator)

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
"""What the halves of the key grow by in each round."""
ROUNDS = 10
LOW = 0xFFFFFFFF

BINADES, PIECES = 32, 512
"""The table has PIECES lines for each binade of [1, 2^31], the last of which is 2^31 alone."""
REST = 23 - 9
"""Bits of a float32's mantissa below those that choose among PIECES."""
BLOCKS = {"cpu": 2**15, "cuda": 2**21}
"""Philox blocks, of 4 numbers and some 40 bytes a number, that are computed at once: what stays in a core's cache, and
what bounds the memory on a GPU."""


def keys_of(bits: NDArray[np.uint64]) -> Tensor:
    """Random bits (`rng.bits`) as keys: uint64 [B] -> int64 [B], on the host."""
    return torch.from_numpy(bits.view(np.int64))


def normal(
    keys: Tensor,
    shape: Sequence[int],
    device: torch.device,
    generator: Generator,
    random: Callable[[Tensor, int, int], Tensor] | None = None,
) -> Tensor:
    """Standard normal noise, an image for each key: float32 [len(keys), *shape] on `device`.

    Philox's numbers lie between -6.24 and 6.24 and are 0 on average to the last bit: the number of a word and of its
    complement are each other's negatives.

    Args:
        keys: int64 [B], on the host; from page-locked memory they are copied without a wait.
        generator: 'philox', or 'torch', whose CPU generator takes the low 32 bits of a key as its seed.
        random: `words`, compiled: the same integers, in one kernel.
    """
    if generator == "torch":
        return _torch_normal(keys, shape, device)
    random = random or words
    keys, count = keys.to(device, non_blocking=True), math.prod(shape)
    blocks, at_once = -(-count // 4), max(1, BLOCKS[device.type] // max(1, len(keys)))
    parts = [
        to_normal(random(keys, start, min(start + at_once, blocks)))[:, : count - 4 * start]
        for start in range(0, blocks, at_once)
    ]
    return (parts[0] if len(parts) == 1 else torch.cat(parts, 1)).reshape(len(keys), *shape)


def words(keys: Tensor, start: int, stop: int) -> Tensor:
    """Words of the blocks `start` to `stop`, with each of the keys: int64 [B] -> int32 [B, 4 (stop - start)]."""
    counter = torch.zeros(4, 1, stop - start, dtype=torch.int32, device=keys.device)
    torch.arange(start, stop, dtype=torch.int32, device=keys.device, out=counter[0, 0])
    halves = keys[:, None].view(torch.int32)  # the low one first
    return torch.stack(philox(counter, halves.T.unsqueeze(-1)), -1).view(len(keys), 4 * (stop - start))


def philox(counter: Tensor, key: Tensor) -> list[Tensor]:
    """Philox4x32-10 of counters and keys, which are broadcast: int32 [4, …] and [2, …] -> four words, int32 […] each.

    A word's bits are those of the unsigned number. Each round has five kernels, which move 28 bytes for each number.
    """
    rounds = torch.arange(ROUNDS, device=key.device).view(-1, *[1] * (key.dim() - 1))
    keys = torch.stack([key[half] + rounds * WEYL[half] for half in (0, 1)], 1).to(torch.int32)
    low = torch.full((1,), LOW, device=key.device)
    multipliers = torch.full((2, *[1] * (counter.dim() - 1)), MULTIPLIERS[0], device=key.device)
    multipliers[1] = MULTIPLIERS[1]
    even, odd = counter[::2], [counter[1], counter[3]]
    for round_key in keys:
        products = torch.bitwise_and(even, low)  # int64, without the sign
        products *= multipliers
        parts = products.view(torch.int32).view(*products.shape, 2)  # the low word first, as above
        lower, higher = parts[..., 0], parts[..., 1]
        even = torch.empty_like(products, dtype=torch.int32)
        torch.bitwise_xor(higher[1], odd[0], out=even[0])
        torch.bitwise_xor(higher[0], odd[1], out=even[1])
        even = even ^ round_key  # the first key makes a row of it for each image
        odd = [lower[1], lower[0]]
    return [even[0], odd[0].expand_as(even[0]), even[1], odd[1].expand_as(even[1])]


def to_normal(words: Tensor) -> Tensor:
    """The normal number of each word: int32 [B, N] -> float32 [B, N].

    An odd number n from -(2^31 - 1) to 2^31 - 1 stands for the probability |n| / 2^32 of one tail, in the middle of the
    two words' share that it comes from. Its float32 chooses a line by exponent and leading mantissa bits; what is left
    of the mantissa is the place on it. Off by 5.2e-7 at most, about the last bit of the largest numbers, and by 2.5e-7
    below 2 (`tests/diffusion/test_noise.py`).
    """
    signed = (words | 1).float()
    bits = signed.view(torch.int32)
    lines = (bits >> REST).bitwise_and_(BINADES * PIECES - 1).flatten()
    offset, slope = _table(words.device)
    out = (bits & (2**REST - 1)).float()
    out *= slope.index_select(0, lines).view_as(out)
    out += offset.index_select(0, lines).view_as(out)
    return out.copysign_(signed)


@cache
def _table(device: torch.device) -> tuple[Tensor, Tensor]:
    return tuple(torch.from_numpy(part).to(device) for part in table())  # type: ignore[return-value]


def table() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Lines in place of x = -Φ⁻¹(n / 2^32) on the pieces of [1, 2^31]: offsets, and slopes for each unit of the
    mantissa's rest, float32 [BINADES · PIECES] each, where the float32's index wants them.

    x is convex on each piece: the line is the chord, lowered by half of the arc's height. x is computed to about 1e-15,
    and no number lies closer to where it would be rounded to another one (`tests/diffusion/test_noise.py`), so a
    library's last bit has no part in it.
    """
    inverse = NormalDist().inv_cdf
    x = np.array([-inverse(n * 2.0**-32) for n in _half_pieces()])
    start, middle, end = x[:-1:2], x[1::2], x[2::2]
    offsets, slopes = np.zeros((2, BINADES * PIECES))
    offsets[: len(start)] = start - ((start + end) / 2 - middle) / 2
    slopes[: len(start)] = np.rint((end - start) * 2.0**28) * 2.0 ** -(28 + REST)
    # The exponent of 1.0 is 127, which is 31 modulo BINADES. The last line is 2^31, the probability 1/2: x = 0.
    return tuple(np.roll(part, -PIECES).astype(np.float32) for part in (offsets, slopes))  # type: ignore[return-value]


def _half_pieces() -> Iterator[float]:
    """Ends and middles of the pieces, in order, up to 2^31."""
    for half in range(2 * PIECES * (BINADES - 1)):
        yield math.ldexp(2 * PIECES + half % (2 * PIECES), half // (2 * PIECES) - 1) / PIECES
    yield 2.0**31


def _torch_normal(keys: Tensor, shape: Sequence[int], device: torch.device) -> Tensor:
    out = torch.empty(len(keys), *shape, device=device)
    generator = torch.Generator(device)
    for image, key in zip(out, keys.tolist(), strict=True):
        generator.manual_seed(key & (2**63 - 1))
        image.normal_(generator=generator)
    return out
