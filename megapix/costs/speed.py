"""Seconds of a training step, predicted part by part. The parts add up: without `overlap_comm` nothing overlaps."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from megapix.checkpoint.layout import Layout
from megapix.config import Config
from megapix.costs import flops, memory, parameters
from megapix.costs import traffic as wire
from megapix.costs.assumptions import Machine

CLIP_PASSES = 4
"""fp32 numbers moved per gradient: read for overflow, read for its norm, read and written when it is clipped."""
FOREACH_PASSES = 18
"""fp32 numbers that torch's foreach AdamW moves per parameter: first moment 3, second 2 + 3, square root, bias and
epsilon 2 each, weights 4."""
FUSED_PASSES = 7
"""Its fused AdamW: gradient read; weights and both moments read and written."""
EMA_PASSES = 3
"""fp32 numbers moved per parameter: EMA read and written, master read."""


@dataclass(frozen=True)
class Seconds:
    """Parts of a step."""

    matmuls: float
    """Matmuls of forward and backward."""
    recomputed: float
    """Matmuls that activation checkpointing recomputes."""
    encoder: float
    """Matmuls of a frozen text encoder."""
    pixels: float
    """Memory traffic of the pixel pathway's element-wise operations."""
    moved: float
    """Bytes over PCIe: offloaded activations, gradients and weights."""
    reduced: float
    """Gradients between ranks."""
    optimizer: float
    """Memory traffic of clipping and AdamW."""
    ema: float
    gathered: float
    """Weights between ranks."""
    rest: float

    @property
    def total(self) -> float:
        """The whole step."""
        return sum(getattr(self, f.name) for f in fields(self))


def of_step(
    c: Config, knobs: dict[str, Any], ranks: int, nodes: int, micro: int, accumulation: int, m: Machine
) -> Seconds:
    """Seconds of a step of micro × accumulation × ranks images.

    Args:
        c: network, image size, tokens of a caption, precision and the two checkpointing policies.
        knobs: DeepSpeed's (`ds_config.read_knobs`).
    """
    a, zero, policies, tokens = m.assume, knobs["zero_optimization"], c.machine, c.text.max_tokens
    images, psi, width = micro * accumulation, parameters.count(c.model), memory.WIDTH[c.precision]
    share, offload = Layout({"all": (psi,)}, ranks).share, "offload_optimizer" in zero
    again = flops.recomputed(
        c.model, c.data.image_size, policies.pixel_checkpointing, policies.patch_checkpointing, tokens
    )
    traffic = memory.pixel_pathway(c) * (a.pixel_passes + 2 * (policies.pixel_checkpointing not in ("none", "offload")))
    compute, device = m.peak * a.compute_share, m.memory_bandwidth * a.memory_share
    where = a.host * 1e9 if offload else device
    over_pcie = 2 * memory.offloaded(c) * images + (offload and (4 * accumulation + width) * share)
    buckets, passes = math.ceil(psi / int(zero.get("reduce_bucket_size", 500_000_000))), wire.passes(knobs)
    # A call for each owner, whose share may be cut by a bucket's end; or an all-reduce, there and back, of each bucket.
    calls = accumulation * (ranks + buckets - 1 if passes == 1 else passes * buckets)
    sent = wire.sent(c.model, c.precision, ranks, accumulation, passes)
    return Seconds(
        matmuls=images * flops.of_run(c) / compute,
        recomputed=images * again / compute,
        # A multiply-add of each token and parameter, as if the embedding table were a matmul, too.
        encoder=images * 2 * tokens * m.text_encoder / compute,
        pixels=images * traffic / device,
        moved=over_pcie / (a.pcie * 1e9),
        reduced=wire.seconds(sent.gradients, calls, ranks, nodes, m),
        optimizer=4 * share * (CLIP_PASSES + adamw_passes(c, m)) / where,
        ema=4 * share * EMA_PASSES / where,
        gathered=wire.seconds(sent.weights, 1, ranks, nodes, m),
        rest=a.overhead,
    )


def adamw_passes(c: Config, m: Machine) -> float:
    """fp32 numbers that AdamW moves through memory per parameter."""
    return m.assume.optimizer_passes or (FUSED_PASSES if c.machine.fused_adamw else FOREACH_PASSES)
