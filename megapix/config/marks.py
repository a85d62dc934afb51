"""The marks of options, of which resume reads one for each (`fields.compare`), and the words that their values are.

identity   what the run is: must match the checkpoint's value
schedule   may change on resume; old and new value are logged
machine    free: where and how the run is executed, never what it computes
"""

from __future__ import annotations

from dataclasses import field
from typing import Any, Literal, TypeVar

IMAGENET_IMAGES = 1_281_167
"""Training images of ImageNet-1k (ILSVRC2012)."""

Images = int | str
"""Images seen, epochs such as '160ep', or 'never'."""

Sampler = Literal["euler", "heun", "ab2"]

PixelPolicy = Literal["none", "selective", "selective_modulation", "full", "chunked", "offload"]
"""What the pixel pathway keeps for its backward pass (`engine/checkpointing.py`)."""

Auto = Literal["auto"]
"""Left to a run's start, which knows its GPUs (`costs/automatic.py`)."""

Attention = Literal["auto", "flash", "cudnn", "efficient", "math"]
"""Kernels of scaled dot product attention that torch has for GPUs."""

Generator = Literal["torch", "philox"]
"""Where noise comes from (`diffusion/noise.py`)."""

Convention = Literal["paper", "released"]
"""Time and sign at the network's door (`model/door.py`)."""

Padding = Literal["masked", "attended"]
"""What stands behind a caption shorter than others (`shards/text_recipe.py`)."""

T = TypeVar("T")


def identity(default: Any) -> Any:
    """A field of this default with the mark 'identity'."""
    return field(default=default, metadata={"mark": "identity"})


def schedule(default: Any) -> Any:
    """A field of this default with the mark 'schedule'."""
    return field(default=default, metadata={"mark": "schedule"})


def machine(default: Any) -> Any:
    """A field of this default with the mark 'machine'."""
    return field(default=default, metadata={"mark": "machine"})
