"""Bytes of activations that one image holds between forward and backward, for each activation checkpointing policy."""

from __future__ import annotations

from megapix.config import ModelConfig

PIXEL_POLICIES = ("none", "full")
"""What `machine.pixel_checkpointing` may be, from the fastest to the smallest."""
PATCH_POLICIES: tuple[str | int, ...] = ("none", "full")
"""Values of `machine.patch_checkpointing` that are worth planning with, from the fastest to the smallest."""

PIT_BLOCK = 26.0
"""Numbers that a PiT block keeps for each number of the pixel tokens [L, P, d] (bench/activation_memory.py)."""
PATCH_BLOCK = 28.2
"""Numbers that a patch block keeps for each number of the patch tokens [L, D] (bench/activation_memory.py)."""


def bytes_per_image(
    model: ModelConfig, size: int, precision: str, pixel_policy: str = "none", patch_policy: str | int = "none"
) -> int:
    """Bytes that one image of size × size pixels holds when the forward pass is over.

    Args:
        precision: 'bf16' or 'fp32', that of weights and activations.
        pixel_policy: one of `PIXEL_POLICIES`.
        patch_policy: one of `PATCH_POLICIES`.
    """
    width = {"bf16": 2, "fp32": 4}[precision]
    pixels = size**2 * model.pixel_width * width
    tokens = (size // model.patch_size) ** 2 * model.width * width
    pixel = model.pixel_depth * (PIT_BLOCK if pixel_policy == "none" else 1.0) + 1
    patch = model.depth * (PATCH_BLOCK if patch_policy == "none" else 1.0) + 2
    return round(pixel * pixels + patch * tokens)
