"""A text network's weights as ComfyUI takes them: one safetensors file in its folder of diffusion models."""

from __future__ import annotations

from pathlib import Path

from megapix.checkpoint import vectors
from megapix.config import unlike_released
from megapix.errors import InputError
from megapix.files import appearing
from megapix.weights.about import About, Weights

PREFIX = "core."
"""What stands before each name, as in the released file: ComfyUI knows the network by `core.pixel_embedder.proj.weight`
(or `net.`)."""


def write(weights: Weights, out: Path) -> About:
    """Write one file, dtypes kept.

    Raises:
        InputError: the network is not one that ComfyUI runs as it is, naming each option; or `out` cannot be written.
    """
    about = weights.about
    if not about.model.text_width:
        raise InputError(f"--format comfyui: {about.source} takes classes, and ComfyUI knows the text network alone")
    different = unlike_released(about.model, about.text)
    if about.model.modulation != "pre":
        different = (*different, f"model.modulation = {about.model.modulation!r}, not 'pre'")
    if different:
        raise InputError(f"--format comfyui: {about.source} would be sampled in another way: {'; '.join(different)}")
    tensors = {PREFIX + name: (tuple(t.shape), vectors.chunks(t.flatten())) for name, t in weights.tensors.items()}
    dtypes = {PREFIX + name: t.dtype for name, t in weights.tensors.items()}
    with appearing(out) as temporary:
        vectors.write(temporary, tensors, {"format": "pt"}, dtypes)
    return about
