"""What a run reports: losses kept on the device, throughput and waiting time, TensorBoard on one global step."""

from __future__ import annotations

import json
import math
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed
from torch import Tensor

from megapix import dist, events

QUARTERS = 4
LAYOUT = {
    "loss": {
        "loss": ["Multiline", ["^loss/train$"]],
        "held-out loss": ["Multiline", ["^validation/loss_(raw|ema)$"]],
        "held-out loss of the EMA by t": ["Multiline", [r"^validation/ema_t_[\d.]+$"]],
        "Fréchet distance of a few images": ["Multiline", [r"^evaluation/(fid|fd_\w+)$"]],
        "inception score of a few images": ["Multiline", [r"^evaluation/(inception_score|is)(_\w+)?$"]],
        "KID of a few images": ["Multiline", [r"^evaluation/kid(_\w+)?$"]],
        "precision and recall of a few images": ["Multiline", [r"^evaluation/(precision|recall)(_\w+)?$"]],
        "distance from REPA's teacher": ["Multiline", ["^loss/repa$"]],
        "loss by quarter of t": ["Multiline", [rf"^loss/t_\d_of_{QUARTERS}$"]],
    },
    "health": {
        "gradient norm, before clipping": ["Multiline", ["^health/grad_norm$"]],
        "skipped steps, spikes, rollbacks": ["Multiline", ["^health/(skipped_steps|spikes|rollbacks)$"]],
        "replaced samples": ["Multiline", ["^health/replaced_samples$"]],
        "gradient norm by patch block": ["Multiline", [r"^blocks/grad_norm/patch_\d+$"]],
        "gradient norm by PiT block": ["Multiline", [r"^blocks/grad_norm/pit_\d+$"]],
        "gradient norm of embedders and output": ["Multiline", [r"^blocks/grad_norm/\w+(embedder|layer)$"]],
        "gradient norm of REPA's projector": ["Multiline", ["^blocks/grad_norm/projector$"]],
        "modulation of the patch blocks, RMS": ["Multiline", [r"^blocks/modulation_rms/patch_\d+$"]],
        "modulation of the PiT blocks, RMS": ["Multiline", [r"^blocks/modulation_rms/pit_\d+/\w+$"]],
    },
    "speed": {
        "images/s": ["Multiline", ["^speed/images_per_s$"]],
        "MFU": ["Multiline", ["^speed/mfu$"]],
        "TFLOP/s of a rank": ["Multiline", ["^speed/tflops_per_rank$"]],
        "share of time waited for data": ["Multiline", ["^speed/data_wait_share$"]],
        "save stall, s": ["Multiline", ["^speed/save_stall_s$"]],
        "reading and decoding, ms of a worker an image": ["Multiline", ["^data/(read|decode)_ms$"]],
    },
    "memory": {"peak, GiB": ["Multiline", ["^memory/"]]},
}
"""TensorBoard's page "Custom Scalars": group -> chart -> tags, as regular expressions."""


class LossMeter:
    """Sums of the loss over a window, in all and by quarter of t, on the device until they are read."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, QUARTERS, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, t: Tensor) -> None:
        """Add a micro batch: loss [B] and t [B] float32. Does not wait for the device.

        Losses that are not finite are left out: they belong to skipped steps, which are counted by themselves.
        """
        quarter = (t * QUARTERS).long().clamp(max=QUARTERS - 1)
        loss = loss.detach().double()
        finite = loss.isfinite()
        self._sums.index_add_(1, quarter, torch.stack([loss.where(finite, 0.0), finite.double()]))

    def read(self, ranks: int) -> dict[str, float]:
        """Means over all ranks since the last call, and start again. A quarter without samples is left out."""
        if ranks > 1:
            torch.distributed.all_reduce(self._sums)
        sums, counts = self._sums.tolist()
        self._sums.zero_()
        means = {f"loss/t_{i}_of_{QUARTERS}": s / n for i, (s, n) in enumerate(zip(sums, counts, strict=True), 1) if n}
        return {"loss/train": sum(sums) / sum(counts)} | means if means else {}


class DeviceMean:
    """Mean over a window of what each sample has, on the device until it is read."""

    def __init__(self, device: torch.device) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, values: Tensor) -> None:
        """Add a micro batch [B]; values that are not finite are left out. Does not wait for the device."""
        values = values.detach().double()
        finite = values.isfinite()
        self._sums += torch.stack([values.where(finite, 0.0).sum(), finite.double().sum()])

    def read(self, ranks: int) -> float | None:
        """Mean over all ranks since the last call, None without a value, and start again."""
        if ranks > 1:
            torch.distributed.all_reduce(self._sums)
        total, count = self._sums.tolist()
        self._sums.zero_()
        return total / count if count else None


class Mean:
    """A running mean of plain numbers."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    @property
    def value(self) -> float | None:
        """The mean, or None without a number."""
        return self._sum / self._count if self._count else None

    def add(self, value: float) -> None:
        """Take a number; one that is not finite is left out."""
        if math.isfinite(value):
            self._sum += value
            self._count += 1


class Clock:
    """Wall time of a window, and the part of it spent waiting for data."""

    def __init__(self) -> None:
        self._start, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside as waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    def read(self, images: int) -> dict[str, float]:
        """images/s and the share of time waited for data since the last call, and start again."""
        elapsed = time.perf_counter() - self._start
        row = {"speed/images_per_s": images / elapsed, "speed/data_wait_share": self._waited / elapsed}
        self._start, self._waited = time.perf_counter(), 0.0
        return row


def memory(device: torch.device) -> dict[str, float]:
    """Peak memory of this process in GiB: resident on the host, allocated on a GPU."""
    row = {"memory/host_peak_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if device.type == "cuda":
        row["memory/gpu_peak_GiB"] = torch.cuda.max_memory_allocated(device) / 2**30
    return row


class Writer:
    """TensorBoard events of one run, written by one rank; on the others `enabled` is false and nothing happens.

    The global step counts steps drawn, applied or not, so it survives a resume.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool) -> None:
        """Open `folder`; what an earlier process has logged after `first_step` is dropped."""
        self._folder, self._first_step, self._enabled = folder, first_step, enabled
        self._board: Any = None
        self._purged = False
        self._write(lambda board: board.add_custom_scalars(LAYOUT))

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Write one row of scalars; NaN stands for a value that there is not, and is left out."""

        def add(board: Any) -> None:
            for name, value in row.items():
                if not math.isnan(value):
                    board.add_scalar(name, value, step)

        self._write(add)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 image [H, W, 3]."""
        self._write(lambda board: board.add_image(name, image, step, dataformats="HWC"))

    def event(self, step: int, text: str) -> None:
        """Write something that happened, under the text tag `events`."""
        self.text(step, "events", text)

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text, in Markdown."""
        self._write(lambda board: board.add_text(name, text, step))

    def configuration(self, step: int, config: dict[str, Any]) -> None:
        """Write the resolved configuration as text."""
        text = "\n".join("    " + line for line in json.dumps(config, indent=2).splitlines())
        self._write(lambda board: board.add_text("config", text, step))

    def close(self) -> None:
        """Flush and close."""
        if self._board:
            self._write(lambda board: board.flush())
        if self._board:
            self._board.close()

    def _write(self, add: Callable[[Any], None]) -> None:
        """Add something and flush. A run does not end because of its log: what cannot be written is warned about."""
        if not self._enabled:
            return
        try:
            self._board = self._board or self._open()
            add(self._board)
            self._board.flush()
        except OSError as error:
            self._board = None  # its thread is dead; the next row opens another file
            where = error.filename or self._folder
            dist.warn(f"{where}: TensorBoard's rows are lost, they cannot be written: {error.strerror or error}")

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if self._purged:
            return SummaryWriter(str(self._folder))
        events.purge(self._folder, self._first_step)
        self._purged = True
        # A TensorBoard that has read those files already is told by its own mark.
        return SummaryWriter(str(self._folder), purge_step=self._first_step + 1)
