"""Model FLOPs of one image, counted by hand, and the share of a machine's peak that a run makes of them (MFU).

A multiply-add is two FLOPs; only matrix products count, as everywhere in the field. Backward costs twice the forward
pass, and what activation checkpointing computes again is work of the machine, not of the model, so it isn't counted.

Letters: L patches, P pixels of a patch, D patch width, d pixel width, C = 3 colours.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megapix.config import Config, ModelConfig

if TYPE_CHECKING:
    import torch  # late: `megapix plan` counts without it

CHANNELS = 3
TIMESTEP_CHANNELS = 256
"""Sinusoids of t; `tests/test_flops.py` compares this and everything below with the network itself."""

PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "B200": 2250.0,
}
"""Part of a GPU's name -> its dense bf16 peak in TFLOP/s (NVIDIA's data sheets, half of the figures with sparsity)."""


def forward(model: ModelConfig, size: int) -> int:
    """FLOPs of one forward pass of one image of size × size pixels."""
    P, D, d = model.patch_size**2, model.width, model.pixel_width
    L = (size // model.patch_size) ** 2
    # The class table is looked up, which costs no product.
    embedders = _linear(L, CHANNELS * P, D) + _linear(1, TIMESTEP_CHANNELS, D) + _linear(1, D, D)
    embedders += _linear(L * P, CHANNELS, d)
    patch = model.depth * _patch_block(model, L)
    return embedders + patch + model.pixel_depth * _pit_block(model, L) + _linear(L * P, d, CHANNELS)


def training(model: ModelConfig, size: int) -> int:
    """FLOPs of forward and backward for one image."""
    return 3 * forward(model, size)


def recomputed(model: ModelConfig, size: int, pixel_policy: str, patch_policy: str | int) -> int:
    """FLOPs that activation checkpointing computes again for one image: work of the machine that no MFU counts.

    Args:
        pixel_policy: 'full' repeats the PiT blocks, 'selective_modulation' its modulation; the others no product.
        patch_policy: 'full' repeats the patch blocks, a number k every k-th of them.
    """
    L = (size // model.patch_size) ** 2
    pixel = {
        "selective_modulation": model.pixel_depth * _modulation(model, L),
        "full": model.pixel_depth * _pit_block(model, L),
    }.get(pixel_policy, 0)
    every = {"none": 0, "full": 1}[patch_policy] if isinstance(patch_policy, str) else patch_policy
    return pixel + (model.depth // every * _patch_block(model, L) if every else 0)


def _patch_block(model: ModelConfig, L: int) -> int:
    D = model.width
    ffn = 2 * _linear(L, D, 4 * D) if model.mlp == "gelu" else 3 * _linear(L, D, int(2 / 3 * 4 * D))
    return _linear(1, D, 6 * D) + _attention(L, D) + ffn


def _pit_block(model: ModelConfig, L: int) -> int:
    P, D, d = model.patch_size**2, model.width, model.pixel_width
    compaction = 2 * _linear(L, P * d, D)  # from the pixels of a patch to one token, and back
    return _modulation(model, L) + compaction + _attention(L, D) + 2 * _linear(L * P, d, 4 * d)


def _modulation(model: ModelConfig, L: int) -> int:
    chunks = 6 if model.modulation == "pre" else 4
    return _linear(L, model.width, model.patch_size**2 * chunks * model.pixel_width)


def _attention(L: int, D: int) -> int:
    return _linear(L, D, 3 * D) + 2 * _linear(L, D, L) + _linear(L, D, D)  # qkv, q·kᵀ and its product with v, proj


def _linear(rows: int, inputs: int, outputs: int) -> int:
    return 2 * rows * inputs * outputs


def peak_of(config: Config, device: torch.device) -> float | None:
    """Peak of one rank in TFLOP/s: `machine.peak_tflops` if it is set, else what is known of its GPU.

    None where it is not known: another device, or fp32, whose peak is not the table's. A guess would make every MFU
    wrong without a word.
    """
    if config.machine.peak_tflops:
        return config.machine.peak_tflops
    if config.precision != "bf16" or device.type != "cuda":
        return None
    import torch

    return peak_by_name(torch.cuda.get_device_name(device))


def peak_by_name(device_name: str) -> float | None:
    """Dense bf16 peak in TFLOP/s of a GPU of that name, as its driver gives it; None if the table lacks it."""
    words = device_name.replace("-", " ").split()
    known = [name for name in PEAK_TFLOPS if set(name.split()) <= set(words)]
    if not known or "MIG" in words:  # a MIG device is a slice of the GPU that it is named after
        return None
    return PEAK_TFLOPS[max(known, key=len)]


def speed(images_per_s: float, flops: int, ranks: int, peak: float | None) -> dict[str, float]:
    """Scalars: TFLOP/s of the model on each rank, and the share of the peak [TFLOP/s] if that is known.

    Args:
        images_per_s: of all ranks together.
        flops: `training` of one image.
    """
    achieved = images_per_s * flops / ranks / 1e12
    return {"speed/tflops_per_rank": achieved} | ({"speed/mfu": achieved / peak} if peak else {})
