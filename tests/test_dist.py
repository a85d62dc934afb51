"""Work in turns: which numbers a rank gets, and what the ranks have made of them back in order."""

from __future__ import annotations

from megapix import dist
from megapix.dist import World


def test_turns_and_back() -> None:
    turns = [list(dist.turns(World(rank, 3), 7)) for rank in range(3)]
    assert turns == [[0, 3, 6], [1, 4, None], [2, 5, None]]
    shares = [[f"made of {number}" for number in mine if number is not None] for mine in turns]
    assert dist.in_order(shares) == [f"made of {number}" for number in range(7)]
    assert list(dist.turns(World(), 2)) == [0, 1]
    assert list(dist.turns(World(2, 3), 2)) == [None], "more ranks than numbers"
    assert dist.in_order([[0], [1], []]) == [0, 1]
