"""Bytes that a rank sends in a step, and how long it takes: a ring of N ranks (Patarasuk and Yuan, 2009).

An all-reduce of S bytes makes each rank send 2·S·(N-1)/N; an all-gather, and N reductions of a share to its owner, half
of that. ZeRO-2 needs the gradients' shares at their owners for each backward pass, and one all-gather of weights for
each step. With `use_multi_rank_bucket_allreduce`, its default, DeepSpeed 0.19.8 all-reduces the gradients although each
rank keeps only its share: `python -m benchmarks.bytes_sent` counts it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megapix.config import ModelConfig
from megapix.costs import parameters
from megapix.costs.assumptions import Machine
from megapix.costs.memory import WIDTH, reduced_to_owners

GRADIENT_WIDTH = 4
"""Bytes of a gradient between ranks: they are reduced in fp32."""


@dataclass(frozen=True)
class Sent:
    """Bytes that one rank sends in a step."""

    gradients: float
    weights: float


def passes(knobs: dict[str, Any]) -> int:
    """How often a gradient is sent: twice if all ranks get the sum, as in an all-reduce."""
    return 1 if reduced_to_owners(knobs) else 2


def sent(model: ModelConfig, precision: str, ranks: int, accumulation: int, passes: int) -> Sent:
    """Bytes that a rank sends for a network."""
    share, psi = (ranks - 1) / ranks, parameters.count(model)
    gradients = psi - parameters.without_gradient(model)
    return Sent(GRADIENT_WIDTH * gradients * share * accumulation * passes, WIDTH[precision] * psi * share)


def seconds(size: float, hops: float, ranks: int, nodes: int, m: Machine) -> float:
    """Time in which every rank sends `size` bytes in rings that take `hops` rounds.

    Between nodes there are as many rings as GPUs in a node, each through another network card, so the network of a
    whole node carries what one GPU sends.
    """
    if ranks == 1:
        return 0.0
    slowest = m.link if nodes == 1 else min(m.link, m.network * (ranks // nodes))
    latency = m.assume.link_latency if nodes == 1 else m.assume.network_latency
    return size / (slowest * m.assume.wire_share) + hops * (ranks - 1) * latency * 1e-6
