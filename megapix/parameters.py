"""Parameters of PixelDiT, counted by hand: what a plan needs to know of the network without building it.

Letters: P pixels of a patch, D patch width, d pixel width, h channels of one head, C = 3 colours.
"""

from __future__ import annotations

from megapix.config import ModelConfig
from megapix.flops import CHANNELS, TIMESTEP_CHANNELS


def count(model: ModelConfig) -> int:
    """Parameters of the network (without REPA's projector); `tests/test_sizing.py` compares it with the network."""
    P, D, d = model.patch_size**2, model.width, model.pixel_width
    attention = 3 * D * D + 2 * (D // model.heads) + _linear(D, D)  # qkv without bias, the norms of q and k, proj
    hidden = int(2 / 3 * 4 * D)
    ffn = _linear(D, 4 * D) + _linear(4 * D, D) if model.mlp == "gelu" else 3 * D * hidden
    patch_block = 2 * D + attention + ffn + _linear(D, 6 * D)
    compaction = _linear(P * d, D) + _linear(D, P * d)
    mlp = _linear(d, 4 * d) + _linear(4 * d, d)
    pit_block = 2 * d + attention + compaction + mlp + _modulation(model)
    embedders = _linear(CHANNELS * P, D) + _linear(TIMESTEP_CHANNELS, D) + _linear(D, D)
    embedders += (model.num_classes + 1) * D + _linear(CHANNELS, d)
    output = d + _linear(d, CHANNELS)
    return embedders + model.depth * patch_block + model.pixel_depth * pit_block + output


def largest(model: ModelConfig) -> int:
    """Numbers of the largest parameter: the pixel-wise modulation, a matrix of an FFN, or the class table."""
    D = model.width
    ffn = 4 * D * D if model.mlp == "gelu" else int(2 / 3 * 4 * D) * D
    modulation = _modulation(model) * D // (D + 1)  # without its bias
    return max(modulation, ffn, 6 * D * D, (model.num_classes + 1) * D)


def _modulation(model: ModelConfig) -> int:
    chunks = 6 if model.modulation == "pre" else 4
    return _linear(model.width, model.patch_size**2 * chunks * model.pixel_width)


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs
