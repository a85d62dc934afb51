"""The random numbers of a run against their definition in Python's integers: for every purpose, at any position."""

from __future__ import annotations

import numpy as np

from megapix.rng import Purpose, bits, permuted, uniform
from tests.support import random_numbers

SEEDS = (0, 7, 2**63 - 1)
POSITIONS = [*range(17), 97, 1_000_003, 2**40 + 9]


def test_purposes_are_frozen() -> None:
    assert {purpose.name.lower(): int(purpose) for purpose in Purpose} == random_numbers.PURPOSES


def test_bits_and_uniform_numbers_of_every_purpose() -> None:
    for seed in SEEDS:
        for purpose in Purpose:
            name = purpose.name.lower()
            expected = [random_numbers.bits(seed, name, position) for position in POSITIONS]
            assert bits(seed, purpose, np.array(POSITIONS)).tolist() == expected, (seed, name)
            fractions = [random_numbers.uniform(seed, name, position) for position in POSITIONS]
            assert uniform(seed, purpose, np.array(POSITIONS)).tolist() == fractions, (seed, name)


def test_permutations() -> None:
    for size in (1, 2, 3, 11, 64, 65, 101):
        for stream in (0, 5, 3 * 2**24 + 1):
            expected = [random_numbers.permuted(9, stream, size, index) for index in range(size)]
            assert permuted(9, stream, size, np.arange(size)).tolist() == expected, (size, stream)
