"""What a run reports: the progress bar, TensorBoard, trackers, and the numbers between two rows of scalars."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from megapix import config as configuration
from megapix.checkpoint.manifest import Counters, State
from megapix.checkpoint.saver import Saver
from megapix.config import BatchLayout, Config
from megapix.costs import flops
from megapix.dist import World, gather
from megapix.monitoring import meters
from megapix.monitoring.tensorboard import Writer
from megapix.trackers.tracker import Tracker


class Report:
    """Collects the next row of scalars on every rank, and writes it on rank 0. Close it at the end.

    Args:
        config: resolved.
        state: where the run stands when it starts to collect; later events are purged from TensorBoard.
    """

    def __init__(
        self,
        config: Config,
        layout: BatchLayout,
        world: World,
        device: torch.device,
        saver: Saver,
        state: State,
    ) -> None:
        self._config, self._layout, self._world, self._device, self._saver = config, layout, world, device, saver
        self._cost, self._peak = flops.of_run(config), flops.peak_of(config, device)
        self._losses = meters.LossMeter(device)
        self._alignment = meters.DeviceMean(device) if config.repa.wanted else None
        self._take_up(state.window)
        counters = state.counters
        self._stall, self._first = saver.stall, counters.drawn // layout.total
        self._seen, end = counters.images_seen, int(config.optim.end_at)
        self._bar = tqdm(total=end, initial=self._seen, unit="img", disable=not world.main, **_bar_style())
        folder, names = Path(config.out), config.log.trackers if world.main else ()
        board = Writer(folder / "tensorboard", self._first, enabled=world.main)
        self._boards: list[Writer | Tracker] = [board, *(Tracker(name, folder, self._first) for name in names)]

    def begin(self, prompts: Sequence[str], happened: str) -> None:
        """Write the configuration, the sample grid's prompts, and what has `happened` before."""
        for board in self._boards:
            board.configuration(self._first, configuration.to_dict(self._config))
            if prompts:
                board.text(self._first, "samples/prompts", "\n".join(f"1. {row}" for row in prompts))
        if happened:
            self.event(self._first, happened)

    def add(self, loss: Tensor, t: Tensor, alignment: Tensor | None) -> None:
        """Take a micro batch's losses, times and alignment losses, [B] each; does not wait for the device."""
        self._losses.add(loss, t)
        if alignment is not None:
            assert self._alignment, "only with REPA"
            self._alignment.add(alignment)

    def window(self) -> tuple[tuple[float, ...], ...]:
        """Every rank's sums of losses since the last row, for a checkpoint. Every rank calls it."""
        mine = torch.cat([sums.flatten() for sums in self._sums()])
        return tuple(map(tuple, gather(self._world, mine.tolist())))

    def _take_up(self, window: tuple[tuple[float, ...], ...]) -> None:
        """Go on from the sums of a checkpoint: this rank's own, or with other ranks all of them on rank 0."""
        numbers = sum(sums.numel() for sums in self._sums())
        of_ranks = np.array([sums for sums in window if len(sums) == numbers])  # REPA may have begun since
        if len(of_ranks) == self._world.size:
            mine = of_ranks[self._world.rank]
        elif len(of_ranks) and self._world.main:
            mine = of_ranks.sum(0)
        else:
            return
        for sums in self._sums():
            part, mine = np.split(mine, [sums.numel()])
            sums += torch.from_numpy(part).view_as(sums).to(sums.device)

    def _sums(self) -> list[Tensor]:
        return [self._losses.sums, *([self._alignment.sums] if self._alignment else [])]

    def row(self, step: int, counters: Counters, more: Mapping[str, float], keep: bool = False) -> None:
        """Write the scalars of the steps since the last row, up to `counters`, beside those of `more`. Every rank calls
        it.

        Args:
            keep: this row is only of the run's end: a longer run has none there, so the losses stay in the next row.
        """
        row = self._losses.read(self._world.size, keep) | meters.memory(self._device) | dict(more)
        if self._alignment and (alignment := self._alignment.read(self._world.size, keep)) is not None:
            row["loss/repa"] = alignment
        row |= flops.speed(row["speed/images_per_s"], self._cost, self._world.size, self._peak)
        row["schedule/images_seen"] = counters.images_seen
        row["health/skipped_steps"] = (counters.drawn - counters.images_seen) // self._layout.total
        row["speed/save_stall_s"] = self._saver.stall - self._stall
        self._stall = self._saver.stall
        self.scalars(step, row)

    def scalars(self, step: int, row: Mapping[str, float]) -> None:
        """Write a row of other scalars."""
        for board in self._boards:
            board.scalars(step, dict(row))

    def image(self, step: int, tag: str, picture: np.ndarray) -> None:
        """Write a picture, uint8 [H, W, 3]."""
        for board in self._boards:
            board.image(step, tag, picture)

    def event(self, step: int, text: str) -> None:
        """Write what has happened."""
        for board in self._boards:
            board.event(step, text)

    def advance(self, counters: Counters) -> None:
        """Move the bar to `counters`."""
        self._bar.update(counters.images_seen - self._seen)
        self._seen = counters.images_seen

    def show(self, loss: float, lr: float) -> None:
        """Put the last step's loss and learning rate beside the bar."""
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}", refresh=False)

    def close(self) -> None:
        """End TensorBoard's file, the trackers and the bar."""
        for board in self._boards:
            board.close()
        self._bar.close()


def _bar_style() -> dict[str, Any]:
    """A line every half second on a terminal, every ten seconds in a log file."""
    terminal = os.isatty(2)
    return {"mininterval": 0.5 if terminal else 10.0, "dynamic_ncols": terminal, "unit_scale": True, "smoothing": 0.1}
