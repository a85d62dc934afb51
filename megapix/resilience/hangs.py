"""Which ranks hang, by the last words of all, and what is said of these words."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from megapix.resilience.heartbeat import Word

Words = Mapping[int, Word]
"""The last word of each rank that is at work."""


@dataclass
class Hangs:
    """Looks at the words once in each heartbeat.

    Args:
        every: seconds between two heartbeats.
    """

    every: float
    _stuck: frozenset[tuple[int, int, int]] = frozenset()
    _since: float = 0.0

    def found(self, now: float, words: Words, resumed: float) -> dict[int, float]:
        """Ranks that hang -> seconds without news; empty if none does.

        A rank with others ahead of it waits for nobody: its own last word decides. Equal ones may wait together. A word
        from elsewhere is as old as its heartbeat, and the others may have moved on in that time: a rank hangs if it is
        found behind with the same word for two heartbeats more.

        Args:
            resumed: no time before this moment counts.
        """
        behind = min((w.step, w.turn) for w in words.values())
        last = {rank: w for rank, w in words.items() if (w.step, w.turn) == behind}
        idle = {rank: now - max(w.at, resumed) for rank, w in last.items()}
        stale = all(idle[rank] > w.patience for rank, w in last.items())
        stuck = frozenset((rank, *behind) for rank in last) if stale else frozenset()
        if stuck != self._stuck:
            self._stuck, self._since = stuck, now
        return idle if stuck and now - self._since >= 2 * self.every else {}


def reasons(idle: Mapping[int, float], words: Words, hosts: Mapping[int, str]) -> list[str]:
    """What is said of ranks that hang."""
    if len(idle) < len(words) or len(words) == 1:
        return [
            f"rank {rank} on {hosts[rank]} hangs: nothing new for {seconds:.1f} s" for rank, seconds in idle.items()
        ]
    return [f"all ranks hang, in a collective or at a disk: nothing new for {max(idle.values()):.1f} s"]


def listed(now: float, words: Words, hosts: Mapping[int, str]) -> list[str]:
    """A line for the last word of each rank."""
    clock = {rank: time.strftime("%H:%M:%S", time.localtime(w.when)) for rank, w in words.items()}
    return [
        f"rank {rank} on {hosts[rank]}: step {w.step}, {w.phase}, {clock[rank]}, {now - w.at:.1f} s ago"
        for rank, w in sorted(words.items())
    ]
