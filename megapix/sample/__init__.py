"""`megapix sample`, and `generate` for programs of one's own: images from trained weights."""

from __future__ import annotations

from typing import Any

__all__ = ["generate"]


def __getattr__(name: str) -> Any:  # late: torch, which the command line does not need
    if name == "generate":
        from megapix.diffusion.sampler import generate

        return generate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
