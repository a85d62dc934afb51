"""Bytes of activations that one image holds between forward and backward, counted by hand for each policy.

They are what `recompute.py` and autograd keep of the network's own operations, block by block (without compilation,
which decides for itself): `python -m bench.activation_memory` measures the same, and a test compares the two.

Letters: L patches, P pixels of a patch, D patch width, d pixel width, H heads, C = 3 colours.
"""

from __future__ import annotations

from dataclasses import dataclass

from megapix.config import MachineConfig, ModelConfig

CHANNELS = 3
FLOAT = 4
"""Bytes of an fp32 number: norm statistics, and the loss."""


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the tensors that the blocks are made of."""

    tokens: int
    """Patch tokens [L, D]."""
    pixels: int
    """Pixel tokens [L, P, d]."""
    image: int
    """[C, H, W] in the network's dtype."""
    head_statistics: int
    """A number for each head and patch: norm of q or k, log-sum-exp of attention."""
    patch_statistics: int
    """A number for each patch: norm."""
    pixel_statistics: int
    """A number for each pixel: norm."""


def per_image(model: ModelConfig, size: int, width: int, machine: MachineConfig) -> dict[str, int]:
    """Bytes that one image of size × size pixels holds on the device: by pathway, and of the loss.

    Args:
        width: bytes of a number in the network's dtype, 2 for bf16 and 4 for fp32.
        machine: its policies of both pathways, and the kernels of the pixel pathway. What 'offload' moves to the host
            is `on_host`.
    """
    s = _sizes(model, size, width)
    loss = CHANNELS * size * size * FLOAT
    return {
        "patch": _patch_pathway(model, s, machine.patch_checkpointing),
        "pixel": _pixel_pathway(model, s, machine.pixel_checkpointing, machine.pixel_kernels),
        "loss": loss,
    }


def on_host(model: ModelConfig, size: int, width: int, machine: MachineConfig) -> int:
    """Bytes of one image that the policy 'offload' moves to host memory."""
    if machine.pixel_checkpointing != "offload":
        return 0
    s, kernels = _sizes(model, size, width), machine.pixel_kernels
    return _pixel_pathway(model, s, "none", kernels) - _pixel_pathway(model, s, "offload", kernels)


def remade(model: ModelConfig, size: int, width: int, machine: MachineConfig) -> int:
    """Bytes of one image that come back for a moment in backward: what one block would have kept under 'none'."""
    s, kernels = _sizes(model, size, width), machine.pixel_kernels
    pit = _pit_block(model, s, "none", kernels) - _pit_block(model, s, machine.pixel_checkpointing, kernels)
    block = _patch_block(model, s) - s.tokens if machine.patch_checkpointing != "none" else 0
    return max(pit, block)


def working(model: ModelConfig, size: int, width: int) -> int:
    """Bytes of one image that the backward pass of a PiT block needs beside all that: gradients and temporaries.

    Twelve tensors of pixel tokens; 9 to 11.6 were measured with plain kernels, for all policies, in bf16 and fp32.
    """
    return 12 * _sizes(model, size, width).pixels


def _sizes(model: ModelConfig, size: int, width: int) -> _Sizes:
    L, P = (size // model.patch_size) ** 2, model.patch_size**2
    return _Sizes(
        tokens=L * model.width * width,
        pixels=L * P * model.pixel_width * width,
        image=L * P * CHANNELS * width,
        head_statistics=L * model.heads * FLOAT,
        patch_statistics=L * FLOAT,
        pixel_statistics=L * P * FLOAT,
    )


def _patch_pathway(model: ModelConfig, s: _Sizes, policy: str | int) -> int:
    every = {"none": 0, "full": 1}[policy] if isinstance(policy, str) else policy
    recomputed = model.depth // every if every else 0
    blocks = recomputed * s.tokens + (model.depth - recomputed) * _patch_block(model, s)
    # The patches; the embedder's output; in silu(t + s) its input and output in place of the last block's.
    return s.image + 2 * s.tokens + blocks


def _patch_block(model: ModelConfig, s: _Sizes) -> int:
    # modulated, qkv, q, k, attention, its projection, x; modulated, fc1, gelu, fc2, x
    hidden = 8.0 if model.mlp == "gelu" else 4 * int(2 / 3 * 4 * model.width) / model.width
    return round((9 + 3 + hidden) * s.tokens) + 2 * s.patch_statistics + 3 * s.head_statistics


def _pixel_pathway(model: ModelConfig, s: _Sizes, policy: str, kernels: str) -> int:
    ends = 2 * s.image  # the colours that go in, and the velocity
    if policy == "offload":
        return ends
    output = {"none": s.pixels + s.pixel_statistics, "selective": s.image}.get(policy, 0)
    return ends + s.pixels + model.pixel_depth * _pit_block(model, s, policy, kernels) + output


def _pit_block(model: ModelConfig, s: _Sizes, policy: str, kernels: str) -> int:
    """Its output and what it keeps; its input is the output of the one before."""
    if policy in ("full", "offload"):
        return s.pixels
    post, fused = model.modulation == "post", kernels == "triton"
    # compacted, qkv, attention, its projection: [L, D]; expanded, and x: [L, P, d]; fc1 and fc2, unless they are fused
    kept = 6 * s.tokens + (1 + 1 + 5 * (not fused)) * s.pixels + s.head_statistics
    if policy == "selective_modulation":
        return kept
    kept += (4 if post else 6) * s.pixels
    if policy == "selective":
        return kept
    # q, k: [L, D]; what compaction reads; and if it is not fused, what the MLP reads, gelu, x after attention
    kept += 2 * s.tokens + (1 + 6 * (not fused)) * s.pixels + 2 * s.head_statistics
    return kept + (post if fused else 2) * s.pixel_statistics
