"""PixelDiT and its training step as one would write them from the paper: plain eager PyTorch, nothing tuned.

nn.Linear, F.rms_norm, chunk, F.scaled_dot_product_attention, F.gelu, x·(1 + scale) + shift, torch.optim.AdamW, a dense
EMA; no activation checkpointing, no DeepSpeed. It shares no code with `megapix.model`, but the names of its parameters,
so the same weights go into both (`tests/bench/test_step.py` compares outputs and gradients).
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megapix.config import Config, ModelConfig

Bf16 = Literal["weights", "autocast"]
"""bf16 as ours, with bf16 weights beside fp32 masters, or by torch.autocast over fp32 weights."""


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """RMSNorm in fp32, rounded at its end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), 1e-6).to(x.dtype)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over adjacent pairs: [B, heads, L, h] with tables [L, h / 2]."""
    a, b = x.float()[..., 0::2], x.float()[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2).to(x.dtype)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]  # [B, heads, L, h]
        q, k = rotate(self.q_norm(q), cos, sin), rotate(self.k_norm(k), cos, sin)
        out = F.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class SwiGlu(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = int(2 / 3 * 4 * width)
        self.w1, self.w3 = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class PatchBlock(nn.Module):
    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        self.norm1, self.norm2 = RMSNorm(m.width), RMSNorm(m.width)
        self.attn = Attention(m.width, m.heads)
        self.mlp = Mlp(m.width) if m.mlp == "gelu" else SwiGlu(m.width)
        self.adaLN_modulation = nn.Sequential(nn.Linear(m.width, 6 * m.width))

    def forward(self, x: Tensor, c: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate1 * self.attn(modulate(self.norm1(x), shift1, scale1), cos, sin)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))


class PiTBlock(nn.Module):
    def __init__(self, m: ModelConfig) -> None:
        super().__init__()
        pixels, d = m.patch_size**2, m.pixel_width
        self.post = m.modulation == "post"
        self.norm1, self.norm2 = RMSNorm(d), RMSNorm(d)
        self.compress_to_attn = nn.Linear(pixels * d, m.width)
        self.attn = Attention(m.width, m.heads)
        self.expand_from_attn = nn.Linear(m.width, pixels * d)
        self.mlp = Mlp(d)
        self.adaLN_modulation = nn.Sequential(nn.Linear(m.width, pixels * d * (4 if self.post else 6)))

    def forward(self, x: Tensor, s: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        parts = self.adaLN_modulation(s).reshape(*x.shape[:3], -1).chunk(4 if self.post else 6, dim=-1)
        if self.post:
            scale1, shift1, scale2, shift2 = parts
            x = x + modulate(self.attend(self.norm1(x), cos, sin), shift1, scale1)
            return x + modulate(self.mlp(self.norm2(x)), shift2, scale2)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        x = x + gate1 * self.attend(modulate(self.norm1(x), shift1, scale1), cos, sin)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))

    def attend(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Token compaction: [B, L, P, d] to [B, L, D], attention over patches, and back."""
        return self.expand_from_attn(self.attn(self.compress_to_attn(x.flatten(2)), cos, sin)).reshape(x.shape)


class FinalLayer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.linear = RMSNorm(width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


class Embedder(nn.Module):
    """A linear layer under the name that the released weights give it."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(inputs, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class TimestepEmbedder(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
        self.register_buffer("frequencies", 10.0 ** (-torch.arange(128) / 128), persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        angle = t[:, None].float() * self.frequencies
        return self.mlp(torch.cat((angle.cos(), angle.sin()), dim=-1).to(self.mlp[0].weight.dtype))


class ClassEmbedder(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class PlainPixelDiT(nn.Module):
    """PixelDiT for images of one size: noisy images [B, 3, S, S], t [B], y [B] -> velocity [B, 3, S, S]."""

    def __init__(self, m: ModelConfig, size: int) -> None:
        super().__init__()
        self.patch, self.side = m.patch_size, size // m.patch_size
        self.s_embedder = Embedder(3 * m.patch_size**2, m.width)
        self.t_embedder = TimestepEmbedder(m.width)
        self.y_embedder = ClassEmbedder(m.num_classes, m.width)
        self.patch_blocks = nn.ModuleList(PatchBlock(m) for _ in range(m.depth))
        self.pixel_embedder = Embedder(3, m.pixel_width)
        self.pixel_blocks = nn.ModuleList(PiTBlock(m) for _ in range(m.pixel_depth))
        self.final_layer = FinalLayer(m.pixel_width)

        positions = torch.linspace(0, 16, self.side, dtype=torch.float64)
        y, x = torch.meshgrid(positions, positions, indexing="ij")
        frequencies = 10000.0 ** (-torch.arange(0, m.width // m.heads, 4, dtype=torch.float64) / (m.width // m.heads))
        angles = torch.stack((x.reshape(-1, 1) * frequencies, y.reshape(-1, 1) * frequencies), dim=-1).flatten(1)
        self.register_buffer("cos", angles.cos().float(), persistent=False)
        self.register_buffer("sin", angles.sin().float(), persistent=False)

        quarter = m.pixel_width // 4
        axis = torch.arange(size, dtype=torch.float64)[:, None] * 10000.0 ** (-torch.arange(quarter) / quarter)
        axis = torch.cat((axis.sin(), axis.cos()), dim=-1)  # [S, d / 2]
        grid = torch.cat((axis[None].expand(size, -1, -1), axis[:, None].expand(-1, size, -1)), dim=-1)
        grid = grid.reshape(self.side, self.patch, self.side, self.patch, -1).transpose(1, 2)
        grid = grid.reshape(self.side**2, self.patch**2, -1)  # [L, P, d]
        self.register_buffer("pixel_positions", grid.float(), persistent=False)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        batch, side, p = len(x), self.side, self.patch
        x = x.to(self.s_embedder.proj.weight.dtype)
        patches = x.reshape(batch, 3, side, p, side, p).permute(0, 2, 4, 1, 3, 5)  # [B, rows, columns, C, p, p]
        s = self.s_embedder(patches.reshape(batch, side**2, 3 * p * p))
        t_emb = self.t_embedder(t)[:, None]
        c = F.silu(t_emb + self.y_embedder(y)[:, None])
        for block in self.patch_blocks:
            s = block(s, c, self.cos, self.sin)
        s = F.silu(t_emb + s)
        pixels = self.pixel_embedder(patches.reshape(batch, side**2, 3, p * p).transpose(2, 3))
        pixels = pixels + self.pixel_positions.to(pixels.dtype)  # [B, L, P, d]
        for block in self.pixel_blocks:
            pixels = block(pixels, s, self.cos, self.sin)
        out = self.final_layer(pixels).reshape(batch, side, side, p, p, 3)
        return out.permute(0, 5, 1, 3, 2, 4).reshape(batch, 3, side * p, side * p)


# ---------------------------------------------------------------------------------------------------------------------
# The training step
# ---------------------------------------------------------------------------------------------------------------------


class PlainStep:
    """Training steps on one micro batch after the other: rectified flow, clipping, AdamW, EMA.

    Args:
        initial: weights by name.
        bf16: how bf16 is made, if the configuration says bf16.
    """

    def __init__(self, c: Config, initial: dict[str, Tensor], bf16: Bf16, device: torch.device) -> None:
        self.config, self.device = c, device
        self.net = PlainPixelDiT(c.model, c.data.image_size)
        self.net.load_state_dict(initial)
        self.net.to(device)
        self.autocast = c.precision == "bf16" and bf16 == "autocast"
        self.masters = list(self.net.parameters())
        if c.precision == "bf16" and bf16 == "weights":
            self.masters = [nn.Parameter(p.detach().clone()) for p in self.net.parameters()]
            for p in self.net.parameters():
                p.data = p.data.bfloat16()
        self.ema = copy.deepcopy([p.detach() for p in self.masters])
        o = c.optim
        self.optimizer = torch.optim.AdamW(self.masters, o.lr, (o.beta1, o.beta2), weight_decay=o.weight_decay)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Mean squared error of the velocity at random times and noise: uint8 [B, 3, S, S], int64 [B] -> scalar."""
        f, batch = self.config.flow, len(images)
        x = images.float() / 127.5 - 1
        t = torch.sigmoid(torch.randn(batch, device=self.device) * f.t_std + f.t_mean)
        t = t / (t + (1 - t) * f.time_shift)
        noise = torch.randn_like(x)
        dropped = torch.rand(batch, device=self.device) < f.label_dropout
        y = torch.where(dropped, self.config.model.num_classes, labels)
        time = t[:, None, None, None]
        with torch.autocast(self.device.type, torch.bfloat16) if self.autocast else nullcontext():
            velocity = self.net(time * x + (1 - time) * noise, t, y)
        return F.mse_loss(velocity.float(), x - noise)

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        """Take one step."""
        self.loss(images, labels).backward()
        weights = list(self.net.parameters())
        if self.masters[0] is not weights[0]:
            for master, p in zip(self.masters, weights, strict=True):
                master.grad, p.grad = p.grad.float(), None
        if self.config.optim.grad_clip:
            nn.utils.clip_grad_norm_(self.masters, self.config.optim.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            for average, master in zip(self.ema, self.masters, strict=True):
                average.lerp_(master, 1 - self.config.optim.ema_decay)
            if self.masters[0] is not weights[0]:
                for master, p in zip(self.masters, weights, strict=True):
                    p.copy_(master)
