"""Trackers beside TensorBoard: Weights & Biases, Trackio and MLflow.

Each works in a process of its own (`process.py`), which gets a run's rows through a pipe and ends when that closes. So
whatever a tracker does, its threads, an outage that it waits for, a crash, costs rows and never the run; and after
`kill -9` of the run, what it has handed over is still written.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from megapix.errors import InputError


def check(names: Sequence[str]) -> None:
    """Check that the trackers' libraries are installed.

    Raises:
        InputError: one is missing; the line says how to install it.
    """
    for name in names:
        if find_spec(name) is None:
            raise InputError(
                f"log.tracker = {name!r}: the package {name} is not installed: pip install 'megapix[{name}]'"
            )
