"""Layers that both pathways share, and their blocks.

Shape suffixes: B batch, L patches, P pixels of a patch, N = B·L, D patch width, d pixel width, H heads,
h channels of one head.

Precision: in bf16 the weights, linear layers and residual streams are bf16; norm statistics, x·(1+scale)+shift and
the rotary rotation are computed in fp32 inside the functions below and rounded once at their end. In fp32 the casts
cost nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megapix.config import ModelConfig
from megapix.model.attention import attention

MLP_RATIO = 4
EPS = 1e-6
CHANNELS_AT_ONCE = 8
"""Channels that `narrow_linear` pads to a multiple of: 16 bytes in bf16."""
Rope = tuple[Tensor, Tensor]
"""Cosine and sine tables, each [L, h/2] float32 (`embed.rope_table`)."""


class RMSNorm(nn.Module):
    """RMSNorm with a learned weight, eps 1e-6, in fp32 inside, rounded once to the dtype of x; with what follows it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """norm(x)."""
        return _Norm.apply(x, self.weight)  # type: ignore[no-untyped-call]

    def modulated(self, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        """norm(x)·(1 + scale) + shift."""
        return _NormModulate.apply(x, self.weight, shift, scale)  # type: ignore[no-untyped-call]

    def rotated(self, x_BLHh: Tensor, rope: Rope) -> Tensor:
        """norm(x), each pair of adjacent channels (a, b) rotated to (a·cos - b·sin, a·sin + b·cos)."""
        return _NormRotate.apply(x_BLHh, self.weight, *rope)  # type: ignore[no-untyped-call]


def wide(x: Tensor) -> Tensor:
    """A half-precision tensor in fp32; fp32 and fp64 as they are."""
    return x.float() if x.itemsize < 4 else x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x·(1 + scale) + shift in fp32, rounded once to the dtype of x; all of one shape."""
    return _Modulate.apply(x, shift, scale)  # type: ignore[no-untyped-call]


# ---------------------------------------------------------------------------------------------------------------------
# Norm, modulation and rotation, each as one operation with a backward written out
#
# The chain rule op by op would keep up to five fp32 tensors of x's size for backward; these keep x itself, one number
# for each row, and what lives elsewhere anyway (weights, modulation, position tables). All else is recomputed.
# ---------------------------------------------------------------------------------------------------------------------


def _inverse_rms(x32: Tensor) -> Tensor:
    return x32.square().mean(-1, keepdim=True).add_(EPS).rsqrt_()


def _norm_backward(g: Tensor, unit: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight from g, that of norm(x), all fp32; `unit` is x·rstd. Overwrites g."""
    d_weight = (g * unit).flatten(0, -2).sum(0)
    g.mul_(wide(weight))
    d_x = torch.addcmul(g, unit, (g * unit).mean(-1, keepdim=True), value=-1).mul_(rstd)
    return d_x, d_weight.to(weight.dtype)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        x32 = wide(x)
        rstd = _inverse_rms(x32)
        ctx.save_for_backward(x, weight, rstd)
        return (x32 * rstd).mul_(wide(weight)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        x, weight, rstd = ctx.saved_tensors
        d_x, d_weight = _norm_backward(wide(grads[0]).clone(), wide(x) * rstd, rstd, weight)
        return d_x.to(x.dtype), d_weight


class _NormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        x32 = wide(x)
        rstd = _inverse_rms(x32)
        ctx.save_for_backward(x, weight, scale, rstd)
        ctx.shift_shape = shift.shape
        normed = (x32 * rstd).mul_(wide(weight))
        return torch.addcmul(normed, normed, wide(scale)).add_(wide(shift)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        x, weight, scale, rstd = ctx.saved_tensors
        g, unit, grown = wide(grads[0]), wide(x) * rstd, wide(scale) + 1.0
        d_shift = g.sum_to_size(ctx.shift_shape)
        d_x, d_weight = _norm_backward(g * grown, unit, rstd, weight)
        if torch.compiler.is_compiling():
            # The weight's too out of the scale's sums, one an image: for the sum above Inductor would go through all
            # tokens once more. Nobody wants it then, so it is not made.
            sums = (g * unit).sum_to_size(scale.shape)
            d_scale, d_weight = sums * wide(weight), (sums * grown).flatten(0, -2).sum(0).to(weight.dtype)
        else:
            d_scale = (g * unit).mul_(wide(weight)).sum_to_size(scale.shape)
        return d_x.to(x.dtype), d_weight, d_shift.to(x.dtype), d_scale.to(scale.dtype)


class _Modulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(x, scale)
        x32 = wide(x)
        return torch.addcmul(x32, x32, wide(scale)).add_(wide(shift)).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, scale = ctx.saved_tensors
        g = wide(grads[0])
        return torch.addcmul(g, g, wide(scale)).to(x.dtype), grads[0], (g * wide(x)).to(scale.dtype)


class _NormRotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BLHh: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x32 = wide(x_BLHh)
        rstd = _inverse_rms(x32)
        ctx.save_for_backward(x_BLHh, weight, cos, sin, rstd)
        return _rotate((x32 * rstd).mul_(wide(weight)), cos, sin).to(x_BLHh.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, cos, sin, rstd = ctx.saved_tensors
        g = _rotate(wide(grads[0]), cos, -sin)  # back
        d_x, d_weight = _norm_backward(g, wide(x) * rstd, rstd, weight)
        return d_x.to(x.dtype), d_weight, None, None


def _rotate(x_BLHh: Tensor, cos_Lh: Tensor, sin_Lh: Tensor) -> Tensor:
    cos, sin = cos_Lh[:, None, :], sin_Lh[:, None, :]  # [L, 1, h/2]
    pairs = x_BLHh.view(*x_BLHh.shape[:-1], -1, 2)  # [B, L, H, h/2, 2]
    if torch.compiler.is_compiling():  # torch.compile fuses real numbers, and makes nothing of complex ones
        # Not stack() of the two halves, for which Inductor would write keys to memory in fp32.
        sign = torch.arange(-1, 2, 2, device=x_BLHh.device)  # (a, b)·cos + (b, a)·(-sin, sin)
        return (pairs * cos[..., None] + pairs.flip(-1) * (sin[..., None] * sign)).flatten(-2)
    # (a + ib)·(cos + i·sin) in one operation, where stack() copies number by number: a sixth of the time on CPUs.
    # Gradients of keys come transposed from attention that is not fused, and complex numbers have to lie side by side.
    rotated = torch.view_as_complex(pairs.contiguous()) * torch.complex(cos, sin)  # [B, L, H, h/2]
    return torch.view_as_real(rotated).flatten(-2)


# ---------------------------------------------------------------------------------------------------------------------
# Layers and blocks
# ---------------------------------------------------------------------------------------------------------------------


def projected(
    x_BLD: Tensor, qkv: nn.Linear, q_norm: RMSNorm, k_norm: RMSNorm, rope: Rope, heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of tokens, the first two normed per head and rotated: [B, L, H, h] each."""
    q, k, v = qkv(x_BLD).view(*x_BLD.shape[:2], 3, heads, -1).unbind(2)  # [B, L, H, h]
    return q_norm.rotated(q, rope), k_norm.rotated(k, rope), v


class Attention(nn.Module):
    """Self-attention over patches with QK-RMSNorm per head and 2D RoPE: [B, L, D] -> [B, L, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.sdpa = heads, "auto"
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width // heads)
        self.k_norm = RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, rope: Rope) -> Tensor:
        q, k, v = projected(x_BLD, self.qkv, self.q_norm, self.k_norm, rope, self.heads)  # [B, L, H, h] each
        return self.proj(attention(q, k, v, kernel=self.sdpa))  # [B, L, D]


def aligned(x: Tensor) -> bool:
    """Whether products of few channels are padded where x lies: on GPUs, whose fast kernels want 16 bytes a row."""
    return x.is_cuda


def compiled_for_gpu(x: Tensor) -> bool:
    """Whether Inductor makes kernels for a GPU of what is done with x."""
    return torch.compiler.is_compiling() and x.is_cuda


def narrow_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    """A linear layer to or from few channels, on GPUs padded by zeros to a multiple of CHANNELS_AT_ONCE inside:
    [..., in] -> [..., out], the same numbers but for rounding."""
    if not aligned(x):
        return layer(x)
    more_in, more_out = -layer.in_features % CHANNELS_AT_ONCE, -layer.out_features % CHANNELS_AT_ONCE
    weight, bias = F.pad(layer.weight, (0, more_in, 0, more_out)), F.pad(layer.bias, (0, more_out))
    return F.linear(F.pad(x, (0, more_in)), weight, bias)[..., : layer.out_features]


class GeluMlp(nn.Module):
    """Linear, exact GELU, Linear with biases, hidden width 4·width: DiT's FFN, and the pixel pathway's."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class PixelMlp(GeluMlp):
    """The same for pixel tokens: [N, P, d] -> [N, P, d]."""

    def forward(self, x_NPd: Tensor) -> Tensor:
        return _summed_by_patch(self.fc2, F.gelu(_summed_by_patch(self.fc1, x_NPd)))


def _summed_by_patch(layer: nn.Linear, x_NPd: Tensor) -> Tensor:
    """A linear layer, whose bias's gradient is summed up by patches first, if it is compiled for a GPU: Inductor does
    that where it writes the gradients of pixels, and does not read them again."""
    if not compiled_for_gpu(x_NPd):
        return layer(x_NPd)
    return F.linear(x_NPd, layer.weight) + layer.bias.expand(len(x_NPd), 1, -1)


def modulation_of(layer: nn.Sequential, x: Tensor) -> Tensor:
    """A pixel-wise adaLN's modulation, of one linear layer: [B, L, D] -> [B, L, P·chunks·d].

    If it is compiled for a GPU, the bias's gradient is a column of the weight's, out of one product, instead of a sum
    that reads all gradients of the modulation, the largest tensor of a block, once more.
    """
    if not compiled_for_gpu(x):
        return layer(x)
    return _WideLinear.apply(x, layer[0].weight, layer[0].bias)  # type: ignore[no-untyped-call]


class _WideLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        g, ones = grads[0].flatten(0, -2), F.pad(x.flatten(0, -2), (0, CHANNELS_AT_ONCE), value=1.0)
        both = g.T @ ones  # [out, in + CHANNELS_AT_ONCE]
        return grads[0] @ weight, both[:, : x.shape[-1]].contiguous(), both[:, -1].contiguous()


class SwiGluMlp(nn.Module):
    """w2(silu(w1 x) · w3 x) without biases, hidden width int(2/3 · 4 · width): the released weights' FFN."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * MLP_RATIO * width)
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def patch_mlp(config: ModelConfig) -> nn.Module:
    """The FFN of the patch pathway that the configuration names."""
    return GeluMlp(config.width) if config.mlp == "gelu" else SwiGluMlp(config.width)


def zero_linear(in_features: int, out_features: int) -> nn.Linear:
    """A linear layer that starts at zero, weight and bias: modulation and output layers."""
    layer = nn.Linear(in_features, out_features)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class PatchBlock(nn.Module):
    """Augmented DiT block (section 3.1): adaLN-Zero, RMSNorm, attention with RoPE, FFN: [B, L, D] -> [B, L, D]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.width
        self.norm1 = RMSNorm(width)
        self.attn = Attention(width, config.heads)
        self.norm2 = RMSNorm(width)
        self.mlp = patch_mlp(config)
        self.adaLN_modulation = nn.Sequential(zero_linear(width, 6 * width))

    def forward(self, x_BLD: Tensor, c_B1D: Tensor, rope: Rope) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c_B1D).chunk(6, dim=-1)  # [B, 1, D]
        x_BLD = torch.addcmul(x_BLD, gate1, self.attn(self.norm1.modulated(x_BLD, shift1, scale1), rope))
        return torch.addcmul(x_BLD, gate2, self.mlp(self.norm2.modulated(x_BLD, shift2, scale2)))


class PiTBlock(nn.Module):
    """PiT block (section 3.2): pixel-wise AdaLN, pixel token compaction, MLP per pixel: [N, P, d] -> [N, P, d].

    Compaction: the P·d numbers of a patch go through a linear layer to the width of attention (D, or its own),
    attention runs over the L patches, and a linear layer expands the result again; so it costs what it costs in the
    patch pathway, not (H·W)².
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        pixels, width = config.patch_size**2, config.pixel_width
        self.post = config.modulation == "post"
        self.chunks = 4 if self.post else 6
        self.norm1 = RMSNorm(width)
        self.compress_to_attn = nn.Linear(pixels * width, config.attention_width)
        self.attn = Attention(config.attention_width, config.attention_heads)
        self.expand_from_attn = nn.Linear(config.attention_width, pixels * width)
        self.norm2 = RMSNorm(width)
        self.mlp = PixelMlp(width)
        self.adaLN_modulation = nn.Sequential(zero_linear(config.width, pixels * self.chunks * width))

    def forward(self, x_NPd: Tensor, s_BLD: Tensor, rope: Rope) -> Tensor:
        modulation = modulation_of(self.adaLN_modulation, s_BLD)  # [B, L, P·chunks·d]
        parts = modulation.view(*x_NPd.shape[:-1], -1).chunk(self.chunks, dim=-1)  # chunks × [N, P, d]
        attended = self.attend(self.before(x_NPd, *parts[:-4]), s_BLD, rope)  # [N, P, d]
        return self.after(x_NPd, attended, *parts[-4:])

    def before(self, x_NPd: Tensor, *modulation: Tensor) -> Tensor:
        """Attention's input: the norm of the pixel tokens, with pre-modulation shifted and scaled."""
        return self.norm1.modulated(x_NPd, *modulation) if modulation else self.norm1(x_NPd)

    def attend(self, x_NPd: Tensor, s_BLD: Tensor, rope: Rope) -> Tensor:
        """Compaction, attention over patches, expansion; of s only the shape matters."""
        compact = self.compress_to_attn(x_NPd.view(*s_BLD.shape[:2], -1))  # [B, L, attention width]
        return self.expand_from_attn(self.attn(compact, rope)).view_as(x_NPd)  # [N, P, d]

    def after(self, x_NPd: Tensor, attended_NPd: Tensor, *modulation: Tensor) -> Tensor:
        """The residuals of attention and MLP; `modulation` is its last four parts."""
        if self.post:
            scale1, shift1, scale2, shift2 = modulation
            x_NPd = x_NPd + modulate(attended_NPd, shift1, scale1)
            return x_NPd + modulate(self.mlp(self.norm2(x_NPd)), shift2, scale2)
        gate1, shift2, scale2, gate2 = modulation
        x_NPd = torch.addcmul(x_NPd, gate1, attended_NPd)
        return torch.addcmul(x_NPd, gate2, self.mlp(self.norm2.modulated(x_NPd, shift2, scale2)))


class FinalLayer(nn.Module):
    """RMSNorm, then a linear layer from the pixel width to colour: [N, P, d] -> [N, P, C]."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(width)
        self.linear = zero_linear(width, channels)

    def forward(self, x_NPd: Tensor) -> Tensor:
        return narrow_linear(self.linear, self.norm(x_NPd))  # [N, P, C]
