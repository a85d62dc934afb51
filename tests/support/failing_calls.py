"""Calls of a run that fail, by the phase that they are in."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from megapix.checkpoint.buffers import HostCopy
from megapix.data.assemble import Assembler
from megapix.diffusion import flow
from megapix.engine.zero2 import Zero2Engine
from megapix.train import run, sample_grid
from megapix.train.validation_loss import ValidationLoss

Place = tuple[Any, str, int]
"""A module or class, the name of its function, and which call of it fails."""
PLACES: dict[str, Place] = {
    "start": (run, "build_network", 1),
    "data": (Assembler, "_arrays", 3),
    "backward": (flow, "training_loss", 3),
    "step": (Zero2Engine, "step", 3),
    "save": (HostCopy, "take", 1),
    "sample": (sample_grid, "generate_as", 1),
    "validate": (ValidationLoss, "_sums", 2),
}
"""Phase -> where it fails."""


def fail(place: Place, error: BaseException) -> None:
    """From now on that call raises the error, and prints when it did."""
    owner, name, at = place
    setattr(owner, name, _failing(getattr(owner, name), at, error))


def _failing(function: Callable[..., Any], at: int, error: BaseException) -> Callable[..., Any]:
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at:
            print(f"fault {time.time()}", flush=True)
            raise error
        return function(*args, **kwargs)

    return call
