"""`megapix ARGUMENTS`, while the disk of one rank fails for a while (`tests/support/failing_disk.py`).

usage: RANKS_DISK=JSON python -m tests.programs.failing_disk ARGUMENTS…

The JSON is a list of objects: `rank`, and the fields of `Failing`; with `writes`, the numbers of saves that fail there.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import ExitStack
from typing import Any

from megapix.checkpoint import saver, vectors
from megapix.cli import main as cli
from tests.support.failing_disk import Failing, failing


def failing_writes(numbers: list[int]) -> None:
    """The rank's files of these saves, counted from 1, are not written."""
    write, count = vectors.write, iter(range(1, 1000))

    def sometimes(path: Any, *args: Any) -> Any:
        if next(count) in numbers:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return write(path, *args)

    vectors.write = sometimes


if __name__ == "__main__":
    saver.PAUSES = (0.1, 0.2)
    with ExitStack() as stack:
        for fault in json.loads(os.environ["RANKS_DISK"]):
            if fault.pop("rank") != int(os.environ["RANK"]):
                continue
            if "writes" in fault:
                failing_writes(fault["writes"])
            else:
                stack.enter_context(failing(Failing(**fault)))
        code = cli.main(sys.argv[1:])
    raise SystemExit(code)
