"""Bytes of one rank under ZeRO-2, as DeepSpeed 0.19.8 allocates them for our engine (runtime/zero/stage_1_and_2.py).

Ψ parameters on N ranks; W is the width of a weight in bytes, 2 in bf16 and 4 in fp32:

    weights          W·Ψ     one flat vector, which the network's parameters are views of
    masters          4·Ψ/N   fp32 partition (in fp32 too: a copy)
    moments          8·Ψ/N   Adam's two
    EMA              4·Ψ/N
    gradients        4·Ψ/N   the averaged partition in fp32; it lives from the first reduction of a step to its end
    bucket           W·b     for each backward pass, b = reduce_bucket_size, in full however small the network is

`tests/costs/test_plan.py` compares all of them with the storages of real ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megapix.checkpoint.layout import Layout
from megapix.config import Config, ModelConfig
from megapix.costs import activations, parameters

WIDTH = {"bf16": 2, "fp32": 4}
"""Precision -> bytes of a weight, a gradient before it is reduced, and an activation."""
IMAGE_COPIES = 5
"""fp32 tensors of an image's size that a step holds beside what autograd saves: image, noise, x_t, target, velocity."""
TEXT_COPIES = 2
"""The same of its text features: as the encoder gives them, and with dropped captions replaced."""


@dataclass(frozen=True)
class Bytes:
    """Bytes of one rank, on its GPU, but for `host`."""

    weights: int
    masters: int
    moments: int
    ema: int
    encoder: int
    """A frozen text encoder."""
    gradients: int
    bucket: int
    reducing: int
    """Copies of a full bucket, or of one owner's share of it, while it is reduced."""
    stepping: int
    """Temporaries of AdamW, or of the gradient's norm."""
    activations: int
    backward: int
    """Recomputed activations of one block, or of a chunk of it, its gradients and temporaries."""
    peak: int
    """The most at once: as backward starts, as a bucket is reduced, or in the optimizer's step."""
    host: int
    """Bytes of host memory that the optimizer takes if it is offloaded, and offloaded activations."""

    @property
    def states(self) -> int:
        """What stays from step to step."""
        return self.weights + self.masters + self.moments + self.ema + self.encoder


def of_rank(
    c: Config, knobs: dict[str, Any], ranks: int, micro: int, accumulation: int, text_encoder: float = 0.0
) -> Bytes:
    """Bytes of a rank that sees `micro` images at once, `accumulation` times a step.

    Args:
        c: network, image size, tokens of a caption, precision and the two checkpointing policies.
        knobs: DeepSpeed's (`ds_config.read_knobs`).
        text_encoder: parameters of a frozen one on the same GPU; its activations are freed before backward begins.
    """
    zero, psi, width = knobs["zero_optimization"], parameters.count(c.model), WIDTH[c.precision]
    share = Layout({"all": (psi,)}, ranks).share
    offload = "offload_optimizer" in zero
    bucket = int(zero.get("reduce_bucket_size", 500_000_000))
    full = min(bucket, psi)
    weights, fp32 = width * share * ranks, 4 * share
    on_device = 0 if offload else 1
    # bf16: the partition is added up in fp32 apart from the bucket. fp32: the partition's gradients are kept as they
    # come, and made one vector at the step.
    gradients = fp32 if c.precision == "bf16" or not offload else 0
    # A bucket's slices, all or those of one owner, are made one vector before they are reduced, and in bf16 that vector
    # is widened to fp32. One rank's bucket is added up as it lies there, and never more than one parameter is widened.
    at_once = min(full, share) if reduced_to_owners(knobs) else full
    reducing = at_once * (2 + 4 if c.precision == "bf16" else 4) * (ranks > 1)
    # AdamW's square root of the second moment, or before it the fp64 copy of a gradient whose norm is taken.
    root = 0 if c.machine.fused_adamw else fp32
    stepping = on_device * max(root, 8 * min(parameters.largest(c.model), share))
    held, backward = micro * _held(c), activations.backward(*_network(c), c.machine, c.text.max_tokens, micro)
    encoder = round(text_encoder * WIDTH[c.text.dtype])
    states = weights + on_device * 4 * fp32 + encoder
    # The gradients' partition exists as backward starts if a micro batch has been added to it before.
    before = gradients if accumulation > 1 else 0
    left = held * (psi - full) // psi  # by the time the first bucket is full
    start = before + held + backward + width * bucket
    # bf16 adds the reduced gradients to the partition; fp32 copies them, when they are reduced, into a second one.
    both = gradients + reducing if c.precision == "bf16" else before + max(gradients, reducing)
    reduction = left + width * bucket + both
    temporary = 2 * parameters.largest(c.model) * width if offload else 0
    return Bytes(
        weights=weights,
        masters=on_device * fp32,
        moments=on_device * 2 * fp32,
        ema=on_device * fp32,
        encoder=encoder,
        gradients=gradients,
        bucket=width * bucket,
        reducing=reducing,
        stepping=stepping,
        activations=held,
        backward=backward,
        peak=states + temporary + max(start, reduction, gradients + stepping),
        host=((5 * fp32 + width * share) if offload else 0) + micro * offloaded(c),
    )


def reduced_to_owners(knobs: dict[str, Any]) -> bool:
    """Whether a gradient's sum goes to the rank that steps it alone; otherwise all ranks get it."""
    zero = knobs["zero_optimization"]
    return zero.get("contiguous_gradients", True) and not zero.get("use_multi_rank_bucket_allreduce", True)


def offloaded(c: Config) -> int:
    """Bytes of an image's activations that the pixel policy moves to host memory."""
    return activations.on_host(*_network(c), c.machine)


def _held(c: Config) -> int:
    kept = activations.per_image(*_network(c), c.machine, c.text.max_tokens)
    text = TEXT_COPIES * c.text.max_tokens * c.model.text_width
    return sum(kept.values()) + (IMAGE_COPIES * 3 * c.data.image_size**2 + text) * 4


def _network(c: Config) -> tuple[ModelConfig, int, int]:
    return c.model, c.data.image_size, WIDTH[c.precision]
