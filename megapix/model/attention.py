"""Scaled dot product attention, and which of torch's kernels computes it.

On GPUs torch 2.13 has four (`sdp_utils.cpp`), and takes the first of its own order that takes the tensors: cuDNN's,
where it is the fastest and right (Hopper and Blackwell with cuDNN after 9.15.1, which mended sequences that 128 does
not divide), then flash, memory-efficient, and math. Flash takes no mask, so masked text gets cuDNN's or the
memory-efficient one; with deterministic algorithms cuDNN's is left out. 'auto' is this order. Any other value of
`machine.attention` allows one kernel alone.

Shape suffixes: B batch, L tokens, H heads, h channels of one head.
"""

from __future__ import annotations

import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
"""Values of machine.attention besides 'auto', and what torch calls them."""
RIGHT_CUDNN = 91501
"""The first cuDNN whose attention is right for sequences that 128 does not divide (pytorch issue 169849)."""
ROW = 16
"""Numbers that the row length of a bias is a multiple of: the memory-efficient kernel copies rows that 8 does not."""


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, kernel: str = "auto") -> Tensor:
    """Softmax attention of [B, L, H, h] queries, keys and values, heads laid end to end: [B, L, D].

    Args:
        bias: added to the scores, in the dtype of q: [B, 1, 1, L] (`key_bias`); None adds nothing.
        kernel: a value of machine.attention.
    """
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # [B, H, L, h]
    if kernel == "auto":
        out = F.scaled_dot_product_attention(q, k, v, bias)  # [B, H, L, h]
    else:
        with sdpa_kernel([KERNELS[kernel]]):
            out = F.scaled_dot_product_attention(q, k, v, bias)  # [B, H, L, h]
    return out.transpose(1, 2).flatten(2)  # [B, L, D]


def key_bias(mask_BT: Tensor, patches: int, dtype: torch.dtype) -> Tensor:
    """The bias of text and then image tokens as keys: 0, and -inf where the mask is false: [B, 1, 1, T + patches].

    Made once for all blocks, as SDPA would make it from a bool mask in each. Its rows lie a multiple of 16 numbers
    apart, more than there are keys: so no kernel copies it, and a compiled block need not know whether its length is
    such a multiple.
    """
    tokens = mask_BT.shape[1]
    row = (tokens + patches) // ROW * ROW + ROW
    text = torch.zeros_like(mask_BT, dtype=dtype).masked_fill(~mask_BT, float("-inf"))  # [B, T]
    return F.pad(text, (0, row - tokens))[:, None, None, : tokens + patches]


def take(network: nn.Module, kernel: str) -> None:
    """Have every attention of a network computed by this value of machine.attention."""
    for module in network.modules():
        if hasattr(module, "sdpa"):
            module.sdpa = kernel  # type: ignore[assignment]


def chosen(
    heads: int, channels: int, tokens: int, dtype: torch.dtype, device: torch.device, masked: bool, kernel: str = "auto"
) -> str | None:
    """The kernel of KERNELS that torch takes for training with these sizes on this device; None if it refuses.

    Args:
        tokens: queries, and keys.
        masked: whether there is a bias.
        kernel: a value of machine.attention.
    """
    old = device.type == "cuda" and (torch.backends.cudnn.version() or 0) < RIGHT_CUDNN  # type: ignore[no-untyped-call]
    if kernel == "cudnn" and old and tokens % 128:
        return None
    q = torch.empty(1, tokens, heads, channels, dtype=dtype, device=device, requires_grad=True).transpose(1, 2)
    bias = key_bias(torch.ones(1, 1, dtype=torch.bool, device=device), tokens - 1, dtype) if masked else None
    allowed = [*KERNELS.values()] if kernel == "auto" else [KERNELS[kernel]]
    with sdpa_kernel(allowed), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says in several what it found wrong
        try:
            found = torch._fused_sdp_choice(q, q, q, bias)
        except RuntimeError:
            return None
    return next((name for name, backend in KERNELS.items() if backend.value == found), None)
