"""Seconds of a training step, predicted part by part. The parts add up: without `overlap_comm` nothing overlaps."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from megapix.checkpoint.layout import Layout
from megapix.config import Config, ModelConfig, recomputed_blocks
from megapix.costs import flops, kernels, memory, parameters
from megapix.costs.assumptions import Machine
from megapix.costs.kernels import Moved

ATTENTION_PASSES = 3.5
"""Forward passes that attention's forward and backward amount to: backward computes the scores again."""
CLIP_PASSES = 3
"""fp32 numbers moved per gradient of a rank's share: read for its norm, read and written when it is clipped."""
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
    """Matmuls of linear layers, forward and backward."""
    attention: float
    """Attention's kernels, forward and backward."""
    recomputed: float
    """Both, again, where activation checkpointing recomputes them."""
    encoder: float
    """Matmuls of a frozen text encoder."""
    elementwise: float
    """Memory traffic of everything else in the network and the objective, or its kernels' launches."""
    moved: float
    """Bytes over PCIe: offloaded activations, gradients and weights."""
    staged: float
    """Memory traffic of ZeRO-2's own copies: gradients into buckets, widened, added up; weights."""
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
        c: network, image size, tokens of a caption, precision, compilation, kernels and the two checkpointing policies.
        knobs: DeepSpeed's (`ds_config.read_knobs`).
    """
    a, zero, tokens = m.assume, knobs["zero_optimization"], c.text.max_tokens
    images, psi, width = micro * accumulation, parameters.count(c.model), memory.WIDTH[c.precision]
    share, offload = Layout({"all": (psi,)}, ranks).share, "offload_optimizer" in zero
    compute, device = m.peak * a.compute_share, m.memory_bandwidth * a.memory_share
    where = a.host * 1e9 if offload else device
    over_pcie = 2 * memory.offloaded(c) * images + (offload and (4 * accumulation + width) * share)
    buckets, passes = math.ceil(psi / int(zero.get("reduce_bucket_size", 500_000_000))), passes_of(knobs)
    # A call for each owner, whose share may be cut by a bucket's end; or an all-reduce, there and back, of each bucket.
    calls = accumulation * (ranks + buckets - 1 if passes == 1 else passes * buckets)
    sent = sent_by(c.model, c.precision, ranks, accumulation, passes)
    attention = flops.attention(c.model, c.data.image_size, tokens)
    again, attended_again = _recomputed(c)
    return Seconds(
        matmuls=images * (flops.of_run(c) - 3 * attention) / compute,
        attention=images * ATTENTION_PASSES * attention / (m.peak * a.attention_share),
        recomputed=images * (again / compute + attended_again / (m.peak * a.attention_share)),
        # A multiply-add of each token and parameter, as if the embedding table were a matmul, too.
        encoder=images * 2 * tokens * m.text_encoder / compute,
        elementwise=accumulation * _elementwise(c, micro, m),
        moved=over_pcie / (a.pcie * 1e9),
        staged=(accumulation * _staged(c, ranks, passes) + (4 + width + 4) / ranks) * psi / device,
        reduced=wire_seconds(sent.gradients, calls, ranks, nodes, m),
        optimizer=4 * share * (CLIP_PASSES + adamw_passes(c, m)) / where,
        ema=4 * share * EMA_PASSES / where,
        gathered=wire_seconds(sent.weights, 1, ranks, nodes, m),
        rest=a.overhead,
    )


def _recomputed(c: Config) -> tuple[int, int]:
    """FLOPs per image that the policies repeat, without attention's, and attention's."""
    pixel, patch, size = c.machine.pixel_checkpointing, c.machine.patch_checkpointing, c.data.image_size
    every = flops.recomputed(c.model, size, pixel, patch, c.text.max_tokens)
    blocks = len(recomputed_blocks(patch, c.model.depth)), c.model.pixel_depth * (pixel == "full")
    attended = flops.attention(c.model, size, c.text.max_tokens, patch=blocks[0], pixel=blocks[1])
    return every - attended, attended


def _staged(c: Config, ranks: int, passes: int) -> float:
    """Bytes per parameter that ZeRO-2 moves in a micro batch beside what goes over the wire: a gradient copied into the
    bucket, made one vector, widened and added to the partition (`python -m benchmarks.zero2_cost` counts it in bf16).

    fp32 is taken to move its width instead. With an all-reduce each rank gets all sums, and narrows them.
    """
    width = memory.WIDTH[c.precision]
    into_bucket, widened, added = 2 * width, width + 4, 12
    if ranks == 1:
        return into_bucket + widened + added
    back = width + 4  # the sum, in the gradients' own dtype again, and its copy
    return into_bucket + 2 * width + widened + back * (1 / ranks if passes == 1 else 1) + (added + back) / ranks


def moved(c: Config) -> Moved:
    """What everything but matmuls and attention moves through memory, and its kernels in a micro batch."""
    machine = c.machine
    return kernels.moved(
        c.model,
        c.data.image_size,
        c.text.max_tokens,
        machine.compile is True,
        machine.pixel_kernels,
        machine.pixel_checkpointing,
        machine.patch_checkpointing,
        memory.WIDTH[c.precision],
    )


def _elementwise(c: Config, micro: int, m: Machine) -> float:
    """Seconds of a micro batch: a kernel takes as long as its bytes, but at least as a launch."""
    once, a = moved(c), m.assume
    read = (once.elementwise + once.narrow) / a.memory_share + once.sums / a.sum_share
    launch, large = a.launch * 1e-6, once.launches - once.matmuls - once.small
    return once.small * launch + max(micro * read / m.memory_bandwidth, large * launch)


def adamw_passes(c: Config, m: Machine) -> float:
    """fp32 numbers that AdamW moves through memory per parameter."""
    return m.assume.optimizer_passes or (FUSED_PASSES if c.machine.fused_adamw else FOREACH_PASSES)


# ---------------------------------------------------------------------------------------------------------------------
# Bytes that a rank sends: rings of N ranks (Patarasuk and Yuan, 2009)
#
# An all-reduce of S bytes makes each rank send 2·S·(N-1)/N; an all-gather, and N reductions of a share to its owner,
# half of that. ZeRO-2 needs the gradients' shares at their owners for each backward pass, and one all-gather of weights
# for each step. With `use_multi_rank_bucket_allreduce`, its default, DeepSpeed 0.19.8 all-reduces the gradients, and
# each rank keeps only its share all the same: `python -m benchmarks.bytes_sent` counts it.
# ---------------------------------------------------------------------------------------------------------------------

GRADIENT_WIDTH = 4
"""Bytes of a gradient between ranks: they are reduced in fp32."""


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends in a step."""

    gradients: float
    weights: float


def passes_of(knobs: dict[str, Any]) -> int:
    """How often a gradient is sent: twice if all ranks get the sum, as in an all-reduce."""
    return 1 if memory.reduced_to_owners(knobs) else 2


def sent_by(model: ModelConfig, precision: str, ranks: int, accumulation: int, passes: int) -> Sent:
    """Bytes that a rank sends for a network."""
    share, psi = (ranks - 1) / ranks, parameters.count(model)
    gradients = psi - parameters.without_gradient(model)
    return Sent(GRADIENT_WIDTH * gradients * share * accumulation * passes, memory.WIDTH[precision] * psi * share)


def wire_seconds(size: float, hops: float, ranks: int, nodes: int, m: Machine) -> float:
    """Time in which every rank sends `size` bytes in rings that take `hops` rounds.

    Between nodes there are as many rings as GPUs in a node, each through another network card, so the network of a
    whole node carries what one GPU sends.
    """
    if ranks == 1:
        return 0.0
    slowest = m.link if nodes == 1 else min(m.link, m.network * (ranks // nodes))
    latency = m.assume.link_latency if nodes == 1 else m.assume.network_latency
    return size / (slowest * m.assume.wire_share) + hops * (ranks - 1) * latency * 1e-6
