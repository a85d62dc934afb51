"""`megapix ARGUMENTS`, but rank 1's disk is full when it writes its share of a checkpoint, and every rank waits for a
save before its next step, so that it is known which step hears of it.

usage: python -m tests.programs.full_disk ARGUMENTS…
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from pathlib import Path
from typing import Any

from megapix.checkpoint import saver as saving
from megapix.checkpoint import vectors
from megapix.checkpoint.saver import Saver
from megapix.cli import main as cli


def full(path: Path, *args: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


if __name__ == "__main__":
    saving.PAUSES = (0.0, 0.0)
    save = Saver.save

    def save_and_wait(saver: Saver, *args: Any, **kwargs: Any) -> None:
        save(saver, *args, **kwargs)
        for thread in threading.enumerate():
            if thread.name == "save":
                thread.join()

    Saver.save = save_and_wait  # type: ignore[method-assign]
    if os.environ["RANK"] == "1":
        vectors.write = full  # type: ignore[assignment]
    raise SystemExit(cli.main(sys.argv[1:]))
