"""One rank of `python -m benchmarks.rank_costs`: a command of `megapix` in which the parts of the training loop are
wrapped, so that the collectives, process groups, connections and descriptors of each are noted.

After each part a file holds {part: {quantity: number}} as JSON, each part as it was the last time: the first step and
the first save set something up.
"""

from __future__ import annotations

import json
import linecache
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.distributed import distributed_c10d
from torch.utils._pytree import tree_leaves

from benchmarks.bytes_sent import Collectives
from megapix.cli.main import main as megapix
from megapix.train import loop

ROOT = Path(__file__).resolve().parents[1]
PARTS = {"take_step": "step", "log": "row of the log", "save": "save", "ema_grid": "grid"}
"""Function of megapix/train/loop.py -> what the table calls it."""
AT = "at "
"""Before the line of code, in the name of the bytes that it asks for."""


class Notes(Collectives):
    """Notes what this rank does in each part of a run."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        self._found: dict[str, dict[str, int]] = {}
        self._now: Counter[str] = Counter()
        self._groups = 0

    def note(self, name: str, args: Any) -> None:
        """A call, and the bytes of its outputs or of its inputs, whichever are more: what this rank has to hold."""
        sizes = [sum(x.nbytes for x in tree_leaves(a) if isinstance(x, torch.Tensor)) for a in args[:2]]
        name = name.strip("_")
        self._now[f"{name}: calls"] += 1
        self._now[f"{name}: bytes"] += max(sizes)
        self._now[f"{AT}{_asker()}"] += max(sizes)

    def begin(self) -> None:
        """A part begins."""
        self._now.clear()
        self._groups = len(distributed_c10d._world.pg_map)

    def end(self, part: str) -> None:
        """It has ended: write what was found."""
        process = psutil.Process()
        connections = [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]
        state = {
            "new process groups": len(distributed_c10d._world.pg_map) - self._groups,
            "TCP connections, after it": len(connections),
            "open descriptors, after it": process.num_fds(),
        }
        self._found[part] = dict(self._now) | state
        self._file.write_text(json.dumps(self._found))

    def around(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, as a part. Whatever comes before the first of all is the start."""

        def noted(*args: Any, **kwargs: Any) -> Any:
            if not self._found:
                self.end("start")
            self.begin()
            value = work(*args, **kwargs)
            self.end(part)
            return value

        return noted


def _asker() -> str:
    """File and text of the line of megapix that asks for the collective; `dist` only hands on what is asked of it."""
    frame = sys._getframe()
    ours, through = str(ROOT / "megapix"), str(ROOT / "megapix" / "dist.py")
    while frame.f_back and (frame.f_code.co_filename == through or not frame.f_code.co_filename.startswith(ours)):
        frame = frame.f_back
    path = Path(frame.f_code.co_filename)
    return f"{path.relative_to(ROOT)}: {linecache.getline(str(path), frame.f_lineno).strip()}"


def run(file: Path, environment: dict[str, str], command: list[str]) -> None:
    """In a process of its own: run a command of `megapix` and note in `file` what it does; what it says goes beside."""
    os.environ.update(environment)
    said = os.open(file.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.close(said)
    notes = Notes(file)
    for function, part in PARTS.items():
        setattr(loop, function, notes.around(part, getattr(loop, function)))
    notes.begin()
    with notes:
        raise SystemExit(megapix(command))
