"""TensorBoard: rows, images and texts on one global step, and event files without the steps that a resume takes again.

A process that dies leaves rows of steps after its last checkpoint, which its successor takes again. TensorBoard's own
mark for that, which `SummaryWriter(purge_step=…)` writes, is ignored by its default reader, and then a row stays that
no later row of the same step replaces. So `purge` takes those rows out of the files, and every reader shows one line.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megapix.dist import warn
from megapix.monitoring.meters import QUARTERS

LAYOUT = {
    "loss": {
        "loss": ["Multiline", ["^loss/train$"]],
        "validation loss": ["Multiline", ["^validation/loss_(raw|ema)$"]],
        "validation loss of the EMA by t": ["Multiline", [r"^validation/ema_t_[\d.]+$"]],
        "Fréchet distance of a few samples": ["Multiline", [r"^evaluation/(fid|fd_\w+)$"]],
        "inception score of a few samples": ["Multiline", [r"^evaluation/(inception_score|is)(_\w+)?$"]],
        "KID of a few samples": ["Multiline", [r"^evaluation/kid(_\w+)?$"]],
        "precision and recall of a few samples": ["Multiline", [r"^evaluation/(precision|recall)(_\w+)?$"]],
        "alignment loss (REPA)": ["Multiline", ["^loss/repa$"]],
        "loss by quarter of t": ["Multiline", [rf"^loss/t_\d_of_{QUARTERS}$"]],
    },
    "health": {
        "gradient norm, before clipping": ["Multiline", ["^health/grad_norm$"]],
        "skipped steps, spikes, rollbacks": ["Multiline", ["^health/(skipped_steps|spikes|rollbacks)$"]],
        "replaced samples": ["Multiline", ["^health/replaced_samples$"]],
        "gradient norm per patch block": ["Multiline", [r"^blocks/grad_norm/patch_\d+$"]],
        "gradient norm per PiT block": ["Multiline", [r"^blocks/grad_norm/pit_\d+$"]],
        "gradient norm of embedders and output": ["Multiline", [r"^blocks/grad_norm/\w+(embedder|layer)$"]],
        "gradient norm of REPA's projector": ["Multiline", ["^blocks/grad_norm/projector$"]],
        "modulation of the patch blocks, RMS": ["Multiline", [r"^blocks/modulation_rms/patch_\d+$"]],
        "modulation of the PiT blocks, RMS": ["Multiline", [r"^blocks/modulation_rms/pit_\d+/\w+$"]],
    },
    "speed": {
        "images/s": ["Multiline", ["^speed/images_per_s$"]],
        "MFU": ["Multiline", ["^speed/mfu$"]],
        "TFLOP/s per rank": ["Multiline", ["^speed/tflops_per_rank$"]],
        "share of time waited for data": ["Multiline", ["^speed/data_wait_share$"]],
        "save stall, s": ["Multiline", ["^speed/save_stall_s$"]],
        "reading and decoding, worker ms per image": ["Multiline", ["^data/(read|decode)_ms$"]],
    },
    "memory": {"peak, GiB": ["Multiline", ["^memory/"]]},
}
"""TensorBoard's page "Custom Scalars": group -> chart -> tags, as regular expressions."""
NAME = "*tfevents*"
"""What TensorBoard takes for an event file."""
PREFIX = "events.out.tfevents."
STAMP = re.compile(rf"{re.escape(PREFIX)}(\d+)")
HEAD, FOOT = 12, 4
"""Bytes of a record before and after its event."""


class Writer:
    """TensorBoard events of one run, written by one rank; on the others `enabled` is false and nothing happens.

    The global step counts steps taken, applied or not, so it survives a resume.
    """

    def __init__(self, folder: Path, first_step: int, enabled: bool) -> None:
        """Open `folder`; events that an earlier process has logged after `first_step` are dropped."""
        self._folder, self._first_step, self._enabled = folder, first_step, enabled
        self._board: Any = None
        self._purged = False
        self._write(lambda board: board.add_custom_scalars(LAYOUT))

    def scalars(self, step: int, row: dict[str, float]) -> None:
        """Write one row of scalars; NaN stands for a missing value and is left out."""

        def add(board: Any) -> None:
            for name, value in row.items():
                if not math.isnan(value):
                    board.add_scalar(name, value, step)

        self._write(add)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Write a uint8 image [H, W, 3]."""
        self._write(lambda board: board.add_image(name, image, step, dataformats="HWC"))

    def event(self, step: int, text: str) -> None:
        """Write an event, under the text tag `events`."""
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
            warn(f"{where}: TensorBoard's rows are lost, they cannot be written: {error.strerror or error}")

    def _open(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        if self._purged:
            return SummaryWriter(str(self._folder))
        put_before(self._folder, int(time.time()))
        purge(self._folder, self._first_step)
        self._purged = True
        # For a TensorBoard that has read those files already: its own mark.
        return SummaryWriter(str(self._folder), purge_step=self._first_step + 1)


def put_before(folder: Path, now: int) -> None:
    """Rename the event files that would come after one of the time `now`: a host's clock was ahead, or this one's is
    behind. Readers take files in the order of their names, and drop what has the step of an earlier row.

    Args:
        now: seconds since 1970, which a new file has in its name.
    """
    files = sorted(folder.glob(NAME))
    later = [path for path in files if (found := STAMP.match(path.name)) and int(found[1]) >= now]
    before = [path for path in files if path not in later]
    last = before[-1].name if before else f"{PREFIX}{now - 1:010d}" if later else ""
    for number, path in enumerate(later):
        os.replace(path, path.with_name(f"{last}.{number:06d}"))


def purge(folder: Path, after: int) -> None:
    """Drop all events of steps above `after` from the files of `folder`; a file that has none stays untouched.

    A file is replaced at once, so that a reader or a crash meets the old one or the new one. A record that was cut off
    in the middle of writing, or cannot be read, is dropped too, with what follows it.
    """
    for path in sorted(folder.glob(NAME)):
        if any(record is None or step > after for step, record in _records(path)):
            _purge_file(path, after)


def _purge_file(path: Path, after: int) -> None:
    shorter = path.with_name("purging.tmp")  # no name of an event file
    with open(shorter, "wb") as file:
        for step, record in _records(path):
            if record is not None and step <= after:
                file.write(record)
        file.flush()
        os.fsync(file.fileno())
    os.replace(shorter, path)


def _records(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Each record's step and its bytes as they lie in the file; None, and no more, for one that is damaged.

    TensorBoard's own reader and writer go through every byte in Python to check its CRC: minutes for a run's images.
    A record is its length (uint64), a CRC of that, the event, and a CRC of it.
    """
    from google.protobuf.message import DecodeError
    from tensorboard.compat.proto.event_pb2 import Event

    with open(path, "rb") as file:
        while head := file.read(HEAD):
            length = int.from_bytes(head[:8], "little")
            if len(head) < HEAD or length > path.stat().st_size:
                yield 0, None
                return
            body = file.read(length + FOOT)
            try:
                step = Event.FromString(body[:-FOOT]).step
            except DecodeError:
                step, body = 0, b""
            if len(body) < length + FOOT:
                yield 0, None
                return
            yield step, head + body
