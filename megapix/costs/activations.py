"""Bytes of activations that one image holds between forward and backward, counted by hand for each policy.

They are what autograd and the policies (`engine/checkpointing.py`) keep of the network's own operations, block by block
(without compilation, which decides for itself), in a micro batch of several images with text masks:
`python -m benchmarks.activation_memory` measures the same, and a test compares the two.

Letters: L patches, T text tokens, P pixels of a patch, D patch width, A attention width of the PiT blocks, d pixel
width, H heads, C = 3 colours.
"""

from __future__ import annotations

from dataclasses import dataclass

from megapix.config import CHUNK, MachineConfig, ModelConfig, recomputed_blocks
from megapix.costs.flops import CHANNELS, TIMESTEP_CHANNELS, ffn_width

FLOAT = 4
ROW = 16
"""Bytes of an fp32 number: norm statistics, and the loss."""


@dataclass(frozen=True)
class _Tokens:
    """Bytes of some tokens, and of their statistics."""

    all: int
    """[rows, width]."""
    statistics: int
    """One number per token: norm."""
    head_statistics: int
    """One number per head and token: norm of q or k, log-sum-exp of attention."""

    @staticmethod
    def of(rows: int, width: int, heads: int, bytes_each: int) -> _Tokens:
        return _Tokens(rows * width * bytes_each, rows * FLOAT, rows * heads * FLOAT)


@dataclass(frozen=True)
class _Sizes:
    """Bytes of the tensors in the blocks."""

    patches: _Tokens
    """[L, D], with the patch pathway's heads."""
    text: _Tokens
    """[T, D], with the same heads; 0 with classes."""
    features: int
    """Text features, the network's input."""
    bias: int
    """Of attention, the mask's: one number per text token and patch, in rows of a multiple of 16 (`key_bias`)."""
    vector: int
    """[D]."""
    compact: _Tokens
    """[L, A], with the heads of the PiT blocks."""
    pixels: _Tokens
    """[L·P, d]."""
    image: int
    """[C, H, W] in the network's dtype."""


def per_image(model: ModelConfig, size: int, width: int, machine: MachineConfig, tokens: int = 0) -> dict[str, int]:
    """Bytes that one image of size × size pixels holds on the device: by pathway, and of the loss.

    Args:
        width: bytes of a number in the network's dtype, 2 for bf16 and 4 for fp32.
        machine: its policies of both pathways, and the kernels of the pixel pathway. What 'offload' moves to the host
            is `on_host`.
        tokens: text tokens of the image, padding included; ignored with classes.
    """
    s = _sizes(model, size, width, tokens)
    loss = CHANNELS * size * size * FLOAT
    return {
        "patch": _patch_pathway(model, s, width, machine.patch_checkpointing),
        "pixel": _pixel_pathway(model, s, machine.pixel_checkpointing, machine.pixel_kernels),
        "loss": loss,
    }


def on_host(model: ModelConfig, size: int, width: int, machine: MachineConfig) -> int:
    """Bytes of one image that the policy 'offload' moves to host memory."""
    if machine.pixel_checkpointing != "offload":
        return 0
    s, kernels = _sizes(model, size, width), machine.pixel_kernels
    return _pixel_pathway(model, s, "none", kernels) - _pixel_pathway(model, s, "offload", kernels)


def backward(model: ModelConfig, size: int, width: int, machine: MachineConfig, tokens: int, images: int) -> int:
    """Bytes that the backward pass of one block needs temporarily, in a micro batch of `images` images.

    That is what the block would have kept under 'none' and recomputes, and for a PiT block its gradients and
    temporaries: twelve tensors of pixel tokens (9 to 11.6 were measured with torch's kernels, in bf16 and fp32). With
    'chunked' both are those of a chunk, beside four tensors of all pixel tokens (gradients of the block's output and
    input, and of attention's output and input), and the modulation's weight for the part after attention, a copy and
    its gradient of a chunk and, in fp32, of all.
    """
    s, kernels, policy = _sizes(model, size, width, tokens), machine.pixel_kernels, machine.pixel_checkpointing
    again = recomputed_blocks(machine.patch_checkpointing, model.depth)
    patch = max((_patch_block(model, s, n) - _patch_block(model, s, n, recomputed=True) for n in again), default=0)
    pit = _pit_block(model, s, "none", kernels) - _pit_block(model, s, policy, kernels)
    at_once: float = images
    whole = 0
    if policy == "chunked":
        at_once = min(images, CHUNK / (size // model.patch_size) ** 2)
        weight = model.patch_size**2 * 4 * model.pixel_width * model.width
        whole = 4 * images * s.pixels.all + (FLOAT + 2 * width) * weight
    return round(max(at_once * pit, images * patch) + 12 * at_once * s.pixels.all) + whole


def _sizes(model: ModelConfig, size: int, width: int, tokens: int = 0) -> _Sizes:
    L, P, T = (size // model.patch_size) ** 2, model.patch_size**2, tokens if model.text_width else 0
    return _Sizes(
        patches=_Tokens.of(L, model.width, model.heads, width),
        text=_Tokens.of(T, model.width, model.heads, width),
        features=T * model.text_width * width,
        bias=((T + L) // ROW * ROW + ROW) * width,
        vector=model.width * width,
        compact=_Tokens.of(L, model.attention_width, model.attention_heads, width),
        pixels=_Tokens.of(L * P, model.pixel_width, 0, width),
        image=L * P * CHANNELS * width,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Patch pathway
# ---------------------------------------------------------------------------------------------------------------------


def _patch_pathway(model: ModelConfig, s: _Sizes, width: int, policy: str | int) -> int:
    again = recomputed_blocks(policy, model.depth)
    blocks = sum(_patch_block(model, s, number, number in again) for number in range(1, model.depth + 1))
    # What the time's embedder keeps, the condition's sum, and its silu.
    condition = TIMESTEP_CHANNELS * width + 4 * s.vector
    # The text's features, their projection, and its norm with positions.
    condition += s.features + 2 * s.text.all + s.text.statistics
    if model.text_width:
        condition += s.bias  # one of all blocks
    # The patches; the embedder's output; in silu(t + s) its input and output in place of the last block's.
    return s.image + 2 * s.patches.all + condition + blocks


def _patch_block(model: ModelConfig, s: _Sizes, number: int, recomputed: bool = False) -> int:
    """Its output and what it keeps, only the output if the rest is `recomputed`; its input is the output of the one
    before."""
    last = number == model.depth
    if recomputed:
        return s.patches.all + (0 if last else s.text.all)
    if not model.text_width:
        return _stream(model, s.patches, s.vector, joint=False)
    text = _stream(model, s.text, s.vector, joint=True, read=not last)
    return _stream(model, s.patches, s.vector, joint=True) + text


def _stream(model: ModelConfig, tokens: _Tokens, vector: int, joint: bool, read: bool = True) -> int:
    """A stream's tokens; with `joint` attention, which concatenates those of two streams, v is copied, and attention's
    output is copied for the projection. `read` is whether anything reads the stream's result."""
    # modulation; modulated, qkv, q, k, attention
    kept = 6 * vector + (7 + joint) * tokens.all + tokens.statistics + 3 * tokens.head_statistics
    if not read:
        return kept
    # projected, x; modulated, hidden layer, its result, x
    hidden = (2 if model.mlp == "gelu" else 4) * ffn_width(model) * tokens.all // model.width
    return kept + (5 + joint) * tokens.all + hidden + tokens.statistics


# ---------------------------------------------------------------------------------------------------------------------
# Pixel pathway
# ---------------------------------------------------------------------------------------------------------------------


def _pixel_pathway(model: ModelConfig, s: _Sizes, policy: str, kernels: str) -> int:
    ends = 2 * s.image  # the colours that go in, and the velocity
    if policy == "offload":
        return ends
    output = {"none": s.pixels.all + s.pixels.statistics, "selective": s.image}.get(policy, 0)
    return ends + s.pixels.all + model.pixel_depth * _pit_block(model, s, policy, kernels) + output


def _pit_block(model: ModelConfig, s: _Sizes, policy: str, kernels: str) -> int:
    """Its output and what it keeps; its input is the output of the one before."""
    if policy in ("full", "offload"):
        return s.pixels.all
    if policy == "chunked":
        # Its input, what attention reads and gives: [L, P, d]; compacted, qkv, q, k, attention, its projection: [L, A].
        return 3 * s.pixels.all + 8 * s.compact.all + 3 * s.compact.head_statistics
    post, fused = model.modulation == "post", kernels == "triton"
    # compacted, qkv, attention, its projection: [L, A]; expanded, and x: [L, P, d]; fc1 and fc2, unless they are fused
    kept = 6 * s.compact.all + (1 + 1 + 5 * (not fused)) * s.pixels.all + s.compact.head_statistics
    if policy == "selective_modulation":
        return kept
    kept += (4 if post else 6) * s.pixels.all
    if policy == "selective":
        return kept
    # q, k: [L, A]; what compaction reads; and if it is not fused, what the MLP reads, gelu, x after attention
    kept += 2 * s.compact.all + (1 + 6 * (not fused)) * s.pixels.all + 2 * s.compact.head_statistics
    return kept + (post if fused else 2) * s.pixels.statistics
