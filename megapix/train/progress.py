"""What changes in a run: counters, the spike sentinel's window, and the loss since the last checkpoint."""

from __future__ import annotations

from dataclasses import replace

from megapix.checkpoint.manifest import Counters, State
from megapix.config import BatchLayout, Config, Images
from megapix.data import order
from megapix.data.mix.located import Weights
from megapix.engine.zero2 import Zero2Engine
from megapix.monitoring.meters import Mean
from megapix.resilience.agreement import StepOutcome
from megapix.resilience.health import Sentinel, Skips


class Progress:
    """Advances at every step (`count`); between two steps `state()` is what a checkpoint holds.

    Args:
        start: the state that the run starts or resumes from.
        config: resolved.
        layout: the global batch.
        engine: counts the images of applied steps.
        data_end: the position at which the last set of a mix leaves, if there is one.
    """

    def __init__(
        self, start: State, config: Config, layout: BatchLayout, engine: Zero2Engine, data_end: int | None = None
    ) -> None:
        self._engine, self._total, self._end = engine, layout.total, int(config.optim.end_at)
        self._start = self._saved = start
        self._data_end = data_end
        self.counters = self.before = start.counters
        """Now, and before the last step."""
        self.sentinel = Sentinel(config.health, start.recent, start.standing_out)
        self.skips = Skips(config.health.max_skipped, start.skipped_in_a_row)
        self.spikes, self.rollbacks = start.spikes, start.rollbacks
        self._loss = Mean()
        self._unsaved = self._saved, self._loss

    @property
    def step(self) -> int:
        """Steps taken, applied or not: the global step of every log."""
        return self.counters.drawn // self._total

    @property
    def finished(self) -> bool:
        """Whether the run is at its end."""
        return self.counters.images_seen >= self._end or self.used_up

    @property
    def used_up(self) -> bool:
        """Whether the data have no whole step left."""
        if self._data_end is None:
            return False
        return order.take(self.counters.position, self._total, self.counters.skipped)[1] > self._data_end

    @property
    def weights(self) -> Weights:
        """The schedule of the mix that the run is on."""
        return self._start.weights

    def due(self, every: Images) -> bool:
        """Whether the last step has reached a multiple of `every` images, or the end."""
        end = self.counters.images_seen if self.used_up else self._end
        return due(every, self.before.images_seen, self.counters.images_seen, end)

    def passed(self, every: Images) -> bool:
        """Whether the last step has reached a multiple of `every` images, wherever the end is."""
        return due(every, self.before.images_seen, self.counters.images_seen, self.counters.images_seen + 1)

    def next_due(self, every: Images) -> bool:
        """The same for the next step, if it is applied."""
        seen = self.counters.images_seen
        return due(every, seen, seen + self._total, self._end)

    def count(self) -> None:
        """Count a step: the position always advances, the images seen only if it was applied."""
        self.before = self.counters
        _, position = order.take(self.counters.position, self._total, self.counters.skipped)
        self.counters = Counters(position, self._engine.schedule.images_seen, self.counters.skipped)

    def add_loss(self, outcome: StepOutcome) -> None:
        """Take a step's loss into the mean that goes with the next checkpoint."""
        self._loss.add(outcome.loss)

    def state(self) -> State:
        """The state to save. With no more images seen than the last saved one, it replaces that one."""
        again = self._saved.counters.images_seen == self.counters.images_seen
        return replace(
            self._start,
            counters=self.counters,
            adam_steps=self._engine.adam_steps,
            previous=self._saved.previous if again else self._saved.counters.images_seen,
            loss=self._saved.loss if again else self._loss.value,
            recent=tuple(self.sentinel.recent),
            spikes=self.spikes,
            standing_out=tuple(self.sentinel.outliers),
            skipped_in_a_row=self.skips.in_a_row,
        )

    @property
    def saved(self) -> bool:
        """Whether the last checkpoint is of this very moment."""
        return self._saved.counters == self.counters

    def save(self) -> State:
        """`state()`, which is the last checkpoint's from now on."""
        self._unsaved = self._saved, self._loss
        self._saved, self._loss = self.state(), Mean()
        return self._saved

    def not_saved(self) -> None:
        """Take back the last `save`: it failed, so the next checkpoint follows the one before."""
        self._saved, before = self._unsaved
        self._loss = before + self._loss


def due(every: Images, before: int, now: int, end: int) -> bool:
    """Whether a multiple of `every` images, or the end, was reached between `before` and `now` images seen."""
    if every == "never" or now <= before:
        return False
    return now // int(every) > before // int(every) or now >= end
