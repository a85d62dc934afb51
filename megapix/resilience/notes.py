"""What a rank notes of itself: where it is, and how long it may stay there before that is a hang.

note("backward")   the training loop goes on to this
news("save")       long work of this phase goes on: bytes were written
compiling(), compiled()   a phase of its own, within whichever phase it comes in, at any step
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from megapix.resilience.heartbeat import Word

LONG = ("start", "lock", "save", "load", "score", "profile", "close")
"""Phases that are long and say nothing new meanwhile: building and loading; waiting for the run lock; writing a
checkpoint; rolling back to one; scoring images on rank 0; writing a trace; ending."""
PATIENCE = 10.0
"""`seconds` times this may pass without news in the phases of LONG, in the first step, and in every other phase the
first time that it is seen after that, which shows how long it takes."""
USUAL = 3.0
"""What a phase took then, times this, may pass later on, where that is more than `seconds`."""
SLOW = {"start": 1800.0, "save": 1800.0, "load": 1800.0, "compile": 1800.0}
"""Seconds that these may take without news, however small `seconds` is: a disk may sync a file in a call that says
nothing until it ends, and so may a compiler."""


class Notes:
    """The last word of this rank.

    Args:
        seconds: as the watchdog's.
        longer: phase -> seconds that may pass there beyond what is allowed otherwise; `waiting` is news there.
    """

    def __init__(self, seconds: float, longer: Mapping[str, float]) -> None:
        self._seconds, self._longer = seconds, longer
        self._first: int | None = None
        self._begun = False
        self._took: dict[str, float] = {}  # phase -> seconds, the first time after the first step
        self._news: dict[str, float] = {}
        self._within: Word | None = None  # what was noted before compilation began
        self.word = Word(patience=self._allowed("start", long=True))
        """Assigned as a whole: another thread never sees half a word."""
        self.waiting: Callable[[], float] = lambda: 0.0
        """When storage was last waited for, by any thread or worker."""
        self.resumed = 0.0
        """When this process was last found to have been stopped for a while."""

    def note(self, step: int, phase: str, begins: bool = False) -> None:
        """This rank is at this step (0 before the first), and does this next.

        Args:
            begins: the phase begins with something else than what is noted in it later on, and what that takes is not
                what the phase usually takes.
        """
        now = time.monotonic()
        last = self._outside(now)
        if self._first is None:
            self._first = step or None
        elif last.step != self._first and not self._begun:
            self._took.setdefault(last.phase, self._idle(last, now))
        turn = 0 if step != last.step else last.turn + (phase != last.phase)
        long = phase in LONG or step in (0, self._first) or phase not in self._took
        self._begun, self._within = begins, None
        self.word = Word(step, phase, turn, self._allowed(phase, long), at=now)

    def news(self, phase: str) -> None:
        """Work of a phase goes on, in whichever thread; no news while this rank is in another."""
        self._news[phase] = time.monotonic()

    def compiling(self) -> None:
        """A compilation begins."""
        now = time.monotonic()
        outer = self._outside(now)
        self.word = replace(outer, phase="compile", patience=self._allowed("compile", True), when=time.time(), at=now)
        self._within = outer

    def compiled(self, failed: bool) -> None:
        """It ends: the phase around it goes on, as if no time had passed. One that failed is where the error is of."""
        if not failed:
            self.word, self._within = self._outside(time.monotonic()), None

    def spoken(self, now: float) -> Word:
        """The last word, as old as the news in it."""
        word = self.word
        return replace(word, at=now - self._idle(word, now))

    def _allowed(self, phase: str, long: bool) -> float:
        usual = USUAL * self._took.get(phase, 0.0)
        patience = max(self._seconds * (PATIENCE if long else 1.0), usual, SLOW.get(phase, 0.0))
        return patience + self._longer.get(phase, 0.0)

    def _outside(self, now: float) -> Word:
        """The last word but for compilation, whose time does not count."""
        word, within = self.word, self._within
        return replace(within, at=within.at + now - word.at) if within else word

    def _idle(self, word: Word, now: float) -> float:
        """Seconds without news since a word, not counting those in which this process was stopped."""
        waited = self.waiting() if word.phase in self._longer else 0.0
        return now - max(word.at, self.resumed, self._news.get(word.phase, 0.0), waited)
