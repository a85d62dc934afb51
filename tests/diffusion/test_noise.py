"""The noise of images: Philox's words against published vectors, normal numbers against SciPy's, and what they are as a
sample of a distribution."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy import special, stats
from torch import Tensor

from megapix import rng
from megapix.diffusion import noise
from megapix.diffusion.noise import keys_of, normal, philox, to_normal, words
from megapix.rng import Purpose
from tests.support import random_numbers

CPU = torch.device("cpu")
VECTORS = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)
"""Counter, key and output of philox4x32 with 10 rounds: `kat_vectors` of Random123 (D. E. Shaw Research)."""
FROZEN = "d83e09eedfd518ab1cfd791a9fc0f8d023bb619fb08f9237f27aa448cfcaf6e2"
WORST = 5.2e-7
"""What `to_normal` is off by at most: one unit in the last place of the largest numbers."""


def signed(numbers: Sequence[int]) -> Tensor:
    """Unsigned words as int32."""
    return torch.from_numpy(np.array(numbers, np.uint32).view(np.int32))


def unsigned(found: Tensor) -> list[int]:
    return list((found.long() & 0xFFFFFFFF).tolist())


def keys(seed: int, positions: Sequence[int], purpose: Purpose = Purpose.NOISE) -> Tensor:
    return keys_of(rng.bits(seed, purpose, np.array(positions)))


def test_published_vectors_all_at_once() -> None:
    counters, keys, expected = (
        torch.stack([signed([int(word, 16) for word in row[part].split()]) for row in VECTORS], 1) for part in range(3)
    )
    for found, word in zip(philox(counters, keys), expected, strict=True):
        assert torch.equal(found, word)


def test_words_are_those_of_all_64_bits_of_the_key() -> None:
    whole = [0, 1, 2**32, 2**63, 2**64 - 1, 0x0123456789ABCDEF]
    found = words(keys_of(np.array(whole, np.uint64)), 3, 8)
    for row, key in zip(found, whole, strict=True):
        expected = [word for block in range(3, 8) for word in random_numbers.philox(block, key)]
        assert unsigned(row) == expected, key


@pytest.mark.long
def test_compiled_words_are_the_same_bits() -> None:
    """As GPUs make them where the network is compiled; here by the compiler for CPUs."""
    torch._dynamo.reset()
    given = keys(3, [0, 7, 2**50])
    assert torch.equal(torch.compile(words, fullgraph=True)(given, 5, 1005), words(given, 5, 1005))


def test_the_bits_are_frozen() -> None:
    """They define runs: on any device, with any version of torch and any number of threads."""
    found = normal(keys(7, [0, 5, 2**40]), (3, 50, 49), CPU, "philox")
    assert hashlib.sha256(found.numpy().tobytes()).hexdigest() == FROZEN
    assert [number.hex() for number in found[1, 0, 0, :3].tolist()] == [
        "-0x1.0be3e20000000p-3",
        "0x1.994f440000000p-2",
        "-0x1.d8e1fe0000000p-2",
    ]


def test_an_image_depends_on_its_own_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the batch, its order, nor on how many blocks are computed at once; odd sizes leave words over."""
    for generator in noise.GENERATORS:
        positions, shape = [9, 4, 4, 2**40 + 1, 6], (3, 7, 5)
        together = normal(keys(7, positions), shape, CPU, generator)
        assert together.dtype == torch.float32
        assert torch.equal(together[1], together[2])
        for image, position in zip(together, positions, strict=True):
            assert torch.equal(image, normal(keys(7, [position]), shape, CPU, generator)[0])
        backwards = normal(keys(7, positions[::-1]), shape, CPU, generator)
        assert torch.equal(backwards.flip(0), together)
        assert not torch.equal(together, normal(keys(8, positions), shape, CPU, generator))
        for blocks in (1, 7, 15):
            monkeypatch.setitem(noise.BLOCKS, "cpu", blocks)
            assert torch.equal(normal(keys(7, positions), shape, CPU, generator), together)
        assert normal(keys(7, []), shape, CPU, generator).shape == (0, *shape)


def test_a_smaller_image_has_the_first_numbers() -> None:
    small, large = (normal(keys(3, [1]), (count,), CPU, "philox") for count in (101, 1000))
    assert torch.equal(small[0], large[0, :101])


def test_numbers_are_the_inverse_of_the_normal_distribution() -> None:
    """At both ends of each line, beside them and between, in the tails and at random; and with either sign."""
    edges = np.array([2.0**binade * (1 + n / 512) for binade in range(31) for n in range(512)])
    places = np.concatenate(
        [edges + d for d in (-1, 0, 1)] + [edges + edges * f / 512 for f in (0.25, 0.5, 0.75, 0.99)]
    )
    random = np.random.default_rng(0).integers(0, 2**31, 300_000)
    magnitudes = np.concatenate([np.arange(40_000), 2**31 - 1 - np.arange(40_000), places.astype(np.int64), random])
    chosen = torch.from_numpy(np.clip(magnitudes, 0, 2**31 - 1)).int()
    odd = (chosen | 1).numpy().astype(np.float64)
    found = to_normal(torch.stack([chosen, ~chosen]))
    assert torch.equal(found[0], -found[1]), "a word's complement is the other side"
    expected = -special.ndtri(odd * 2.0**-32)
    assert np.abs(found[0].numpy() - expected).max() < WORST
    assert np.abs(found[0].numpy() + special.ndtri(odd * 2.0**-32))[expected < 2].max() < 2.5e-7
    assert found.max().item() == pytest.approx(6.2303, abs=1e-4)
    theirs = torch.special.ndtri(torch.from_numpy(odd) * 2.0**-32)
    assert (found[1].double() - theirs).abs().max() < WORST
    assert to_normal(signed([2**31 - 1, 2**31])[None]).abs().max() == 0.0, "in the middle"


def test_no_library_can_round_a_number_of_the_table_to_another() -> None:
    """SciPy's inverse gives the same table, and with an error 30 times that of either there still is none other."""
    half = 2.0 ** np.repeat(np.arange(31), 1024) * (1 + np.tile(np.arange(1024) / 1024, 31))
    x = -special.ndtri(np.append(half, 2.0**31) * 2.0**-32)
    offsets = x[:-1:2] - ((x[:-1:2] + x[2::2]) / 2 - x[1::2]) / 2
    rises = (x[2::2] - x[:-1:2]) * 2.0**28
    found = [np.roll(part, 512) for part in noise.table()]
    assert all(part[-512:].tolist() == [0.0] * 512 for part in found)
    for off in (-1e-14, 0.0, 1e-14):
        np.testing.assert_array_equal(found[0][:-512], (offsets + off).astype(np.float32))
        np.testing.assert_array_equal(found[1][:-512], np.rint(rises + off * 2.0**28) * 2.0**-42)


def test_positions_are_independent_and_normal() -> None:
    """Moments, Kolmogorov and Smirnov's distance, tails, and correlations of neighbours in an image and in a run."""
    count, images = 3 * 64 * 64, 96
    found = normal(keys(0, range(images)), (count,), CPU, "philox").double()
    total, every = images * count, found.flatten()
    for power, expected, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((every**power).mean().item() - expected) < 4.5 * (variance / total) ** 0.5, power
    assert stats.kstest(every.numpy(), "norm").pvalue > 0.01
    for bound in (1.0, 2.0, 3.0, 4.0):
        for side in (every, -every):
            expected = total * float(special.ndtr(-bound))
            assert abs(int((side > bound).sum()) - expected) < 4.5 * expected**0.5
    between = np.corrcoef(found.numpy())  # each image with each
    assert np.abs(between - np.eye(images)).max() < 5.5 * count**-0.5
    for distance in (1, 2, 3, 4, 64, 4096):
        shifted = (found[:, :-distance] * found[:, distance:]).mean().item()
        assert abs(shifted) < 4.5 * total**-0.5, distance
    for other in (keys(1, range(images)), keys(0, range(images), Purpose.SAMPLE_NOISE)):
        product = (found * normal(other, (count,), CPU, "philox").double()).mean().item()
        assert abs(product) < 4.5 * total**-0.5


def test_torchs_generator_is_standard_normal() -> None:
    found = normal(keys(0, range(64)), (3, 32, 32), CPU, "torch")
    assert found.mean().item() == pytest.approx(0.0, abs=0.01)
    assert found.std().item() == pytest.approx(1.0, abs=0.01)
    assert np.abs(np.corrcoef(found.flatten(1).numpy()) - np.eye(64)).max() < 0.1
