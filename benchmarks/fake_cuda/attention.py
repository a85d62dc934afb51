"""SDPA as the fused kernels that a GPU would choose.

On fake tensors, torch chooses by what this build has for CPUs: it would take attention apart into matmuls and softmax.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def choose(masked: str = "cudnn", free: str = "flash") -> None:
    """From now on let attention on "cuda" be a fused kernel: 'flash' (without a mask), 'cudnn' or 'efficient'.

    Args:
        masked: with a mask, which shuts out flash attention.
        free: without one.
    """
    plain: Any = F.scaled_dot_product_attention

    def attention(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *args: Any, **kwargs: Any
    ) -> Tensor:
        if q.device.type != "cuda":
            return plain(q, k, v, attn_mask, *args, **kwargs)
        if attn_mask is None and free == "flash":
            return aten._scaled_dot_product_flash_attention(q, k, v)[0]
        bias = attn_mask
        if bias is not None:
            if bias.dtype == torch.bool:  # as torch makes it for any of the kernels
                none = torch.zeros(bias.shape, dtype=q.dtype, device=q.device)
                bias = none.masked_fill(~bias, float("-inf"))
            bias = bias.expand(*q.shape[:3], k.shape[2])
        if (free if attn_mask is None else masked) == "cudnn":
            return aten._scaled_dot_product_cudnn_attention(q, k, v, bias, True)[0]
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, True)[0]

    F.scaled_dot_product_attention = attention
