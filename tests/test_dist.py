"""Work in turns: which numbers a rank gets, and what the ranks have made of them back in order."""

from __future__ import annotations

from megapix.dist import World, merge_round_robin, round_robin


def test_turns_and_back() -> None:
    turns = [list(round_robin(World(rank, 3), 7)) for rank in range(3)]
    assert turns == [[0, 3, 6], [1, 4, None], [2, 5, None]]
    shares = [[f"made of {number}" for number in mine if number is not None] for mine in turns]
    assert merge_round_robin(shares) == [f"made of {number}" for number in range(7)]
    assert list(round_robin(World(), 2)) == [0, 1]
    assert list(round_robin(World(2, 3), 2)) == [None], "more ranks than numbers"
    assert merge_round_robin([[0], [1], []]) == [0, 1]
