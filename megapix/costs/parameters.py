"""Parameters of PixelDiT, counted by hand, so that a plan does not build the network.

Letters: P pixels of a patch, D patch width, A attention width of the PiT blocks, d pixel width, C = 3 colours.
"""

from __future__ import annotations

from megapix.config import ModelConfig
from megapix.costs.flops import CHANNELS, TIMESTEP_CHANNELS, ffn_width, modulation_width


def count(model: ModelConfig) -> int:
    """Parameters of the network (without REPA's projector); `tests/costs/test_plan.py` compares it with the network."""
    P, D, d, A = model.patch_size**2, model.width, model.pixel_width, model.attention_width
    # Norms, attention, FFN and modulation; a text block has them twice, once for each stream.
    patch_block = 2 * D + _attention(D, model.heads) + _ffn(model) + _linear(D, 6 * D)
    patch_block *= 2 if model.text_width else 1
    compaction = _linear(P * d, A) + _linear(A, P * d)
    mlp = _linear(d, 4 * d) + _linear(4 * d, d)
    pit_block = 2 * d + _attention(A, model.attention_heads) + compaction + mlp + _linear(D, modulation_width(model))
    embedders = _linear(CHANNELS * P, D) + _linear(TIMESTEP_CHANNELS, D) + _linear(D, D) + _linear(CHANNELS, d)
    output = d + _linear(d, CHANNELS)
    return embedders + _condition(model) + model.depth * patch_block + model.pixel_depth * pit_block + output


def without_gradient(model: ModelConfig) -> int:
    """Those of the last block's text stream after attention, whose output nothing reads: projection, norm, FFN."""
    return _linear(model.width, model.width) + model.width + _ffn(model) if model.text_width else 0


def largest(model: ModelConfig) -> int:
    """Numbers of the largest parameter: a matrix of a block, the class table, or the text's embedder or positions."""
    P, D, d, A = model.patch_size**2, model.width, model.pixel_width, model.attention_width
    patch_block = D * max(6 * D, ffn_width(model))
    pit_block = max(D * modulation_width(model), A * P * d, 3 * A * A)
    condition = D * (max(model.text_width, model.text_tokens) if model.text_width else model.num_classes + 1)
    return max(patch_block, pit_block, condition)


def _condition(model: ModelConfig) -> int:
    """The class table; or the text's embedder with its norm, and its positions."""
    if not model.text_width:
        return (model.num_classes + 1) * model.width
    return _linear(model.text_width, model.width) + (1 + model.text_tokens) * model.width


def _attention(width: int, heads: int) -> int:
    # qkv without bias, the norms of q and k, proj
    return 3 * width * width + 2 * (width // heads) + _linear(width, width)


def _ffn(model: ModelConfig) -> int:
    D, hidden = model.width, ffn_width(model)
    return _linear(D, hidden) + _linear(hidden, D) if model.mlp == "gelu" else 3 * D * hidden


def _linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs
