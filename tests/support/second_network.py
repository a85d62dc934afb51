"""PixelDiT a second time: a plain function of a state dict, written from the paper's formulas for clarity alone.

Float64 throughout, explicit softmax, complex numbers for the rotary turn, `unfold`/`fold` for patches, a Python loop
for the position tables. It shares no code with `megapix.model`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-6) * weight


def linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    out = x @ state[f"{name}.weight"].T
    return out + state[f"{name}.bias"] if f"{name}.bias" in state else out


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def rope_turns(rows: int, cols: int, head_dim: int) -> Tensor:
    """exp(iθ) for each patch and channel pair: complex128 [L, head_dim / 2]."""
    angles = torch.zeros(rows * cols, head_dim // 2, dtype=torch.float64)
    for r in range(rows):
        for c in range(cols):
            y = 16.0 * r / (rows - 1) if rows > 1 else 0.0
            x = 16.0 * c / (cols - 1) if cols > 1 else 0.0
            for k in range(head_dim // 4):
                f = 10000.0 ** (-4 * k / head_dim)
                angles[r * cols + c, 2 * k] = x * f
                angles[r * cols + c, 2 * k + 1] = y * f
    return torch.polar(torch.ones_like(angles), angles)


def attention(state: dict[str, Tensor], name: str, x: Tensor, turns: Tensor) -> Tensor:
    batch, length, width = x.shape
    head_dim = state[f"{name}.q_norm.weight"].numel()
    heads = width // head_dim
    qkv = linear(state, f"{name}.qkv", x).reshape(batch, length, 3, heads, head_dim)
    q = rms(qkv[:, :, 0], state[f"{name}.q_norm.weight"])
    k = rms(qkv[:, :, 1], state[f"{name}.k_norm.weight"])

    def turn(z: Tensor) -> Tensor:
        pairs = torch.complex(z[..., 0::2], z[..., 1::2]) * turns[None, :, None, :]
        return torch.stack([pairs.real, pairs.imag], -1).flatten(-2)

    q, k, v = turn(q), turn(k), qkv[:, :, 2]
    scores = torch.einsum("bqhc,bkhc->bhqk", q, k) / math.sqrt(head_dim)
    weights = torch.exp(scores - scores.max(-1, keepdim=True).values)
    weights = weights / weights.sum(-1, keepdim=True)
    out = torch.einsum("bhqk,bkhc->bqhc", weights, v).reshape(batch, length, width)
    return linear(state, f"{name}.proj", out)


def patch_mlp(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if f"{name}.w1.weight" in state:
        return linear(state, f"{name}.w2", silu(linear(state, f"{name}.w1", x)) * linear(state, f"{name}.w3", x))
    return linear(state, f"{name}.fc2", gelu(linear(state, f"{name}.fc1", x)))


def count(state: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.split(".")[1]) for key in state if key.startswith(prefix))


def joint_attention(
    state: dict[str, Tensor], name: str, image: Tensor, text: Tensor, real: Tensor, turns: Tensor
) -> tuple[Tensor, Tensor]:
    """Attention over the real text tokens and all patches of each sample, one sample and one head at a time."""
    head_dim = state[f"{name}.q_norm_x.weight"].numel()
    heads = image.shape[-1] // head_dim
    positions = torch.arange(text.shape[1], dtype=torch.float64)
    pairs = torch.arange(head_dim // 2, dtype=torch.float64)
    text_turns = torch.exp(1j * positions[:, None] * 10000.0 ** (-2 * pairs / head_dim))

    def project(tokens: Tensor, stream: str, turn_by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = linear(state, f"{name}.qkv_{stream}", tokens).chunk(3, -1)
        normed = []
        for part, norm in ((q, "q_norm"), (k, "k_norm")):
            z = rms(part.reshape(*part.shape[:2], heads, head_dim), state[f"{name}.{norm}_{stream}.weight"])
            turned = torch.complex(z[..., 0::2], z[..., 1::2]) * turn_by[None, :, None]
            normed.append(torch.stack([turned.real, turned.imag], -1).flatten(-2))
        return normed[0], normed[1], v.reshape(*v.shape[:2], heads, head_dim)

    (qx, kx, vx), (qy, ky, vy) = project(image, "x", turns), project(text, "y", text_turns)
    out_x, out_y = torch.zeros_like(image), torch.zeros_like(text)
    for b in range(len(image)):
        for h in range(heads):
            keys = torch.cat([ky[b, real[b], h], kx[b, :, h]])
            values = torch.cat([vy[b, real[b], h], vx[b, :, h]])
            for query, out in ((qx, out_x), (qy, out_y)):
                weights = torch.softmax(query[b, :, h] @ keys.T / math.sqrt(head_dim), -1)
                out[b, :, h * head_dim : (h + 1) * head_dim] = weights @ values
    return linear(state, f"{name}.proj_x", out_x), linear(state, f"{name}.proj_y", out_y)


def text_blocks(state: dict[str, Tensor], s: Tensor, t_emb: Tensor, y: Tensor, real: Tensor, turns: Tensor) -> Tensor:
    """Patch tokens after the MM-DiT blocks."""
    text = rms(linear(state, "y_embedder.proj", y.double()), state["y_embedder.norm.weight"])
    text = text + state["y_pos_embedding"][:, : y.shape[1]]
    c = silu(t_emb)
    for n in range(count(state, "patch_blocks.")):
        name = f"patch_blocks.{n}"
        streams, ways = {"x": s, "y": text}, {}
        for stream, kind in (("x", "img"), ("y", "txt")):
            ways[stream] = linear(state, f"{name}.adaLN_modulation_{kind}.0", c).chunk(6, -1)

        norm = {key: state[f"{name}.norm_{key}.weight"] for key in ("x1", "y1", "x2", "y2")}
        first = [rms(streams[z], norm[f"{z}1"]) * (1 + ways[z][1]) + ways[z][0] for z in "xy"]
        attended = joint_attention(state, f"{name}.attn", *first, real, turns)
        for z, out in zip("xy", attended, strict=True):
            streams[z] = streams[z] + ways[z][2] * out
            second = rms(streams[z], norm[f"{z}2"]) * (1 + ways[z][4]) + ways[z][3]
            streams[z] = streams[z] + ways[z][5] * patch_mlp(state, f"{name}.mlp_{z}", second)
        s, text = streams["x"], streams["y"]
    return s


def pixeldit(
    state: dict[str, Tensor], patch: int, x: Tensor, t: Tensor, y: Tensor, real: Tensor | None = None
) -> Tensor:
    """Velocity [B, 3, H, W] float64 of the network whose parameters are `state` (names as released).

    y are classes [B]; or text features [B, T, C], where `real` is true, if the parameters are of a text network.
    """
    state = {key: value.double() for key, value in state.items()}
    x, t = x.double(), t.double()
    batch, channels, height, width = x.shape
    rows, cols = height // patch, width // patch
    length, pixels = rows * cols, patch * patch
    d = state["pixel_embedder.proj.weight"].shape[0]
    text = "y_pos_embedding" in state
    turns = rope_turns(rows, cols, state[f"patch_blocks.0.attn.q_norm{'_x' * text}.weight"].numel())
    pixel_turns = rope_turns(rows, cols, state["pixel_blocks.0.attn.q_norm.weight"].numel())

    patches = F.unfold(x, patch, stride=patch).transpose(1, 2)  # [B, L, C·p·p], channel-major
    s = linear(state, "s_embedder.proj", patches)
    sinusoid = torch.zeros(batch, 256, dtype=torch.float64)
    for k in range(128):
        sinusoid[:, k] = torch.cos(t * 10.0 ** (-k / 128))
        sinusoid[:, 128 + k] = torch.sin(t * 10.0 ** (-k / 128))
    t_emb = linear(state, "t_embedder.mlp.2", silu(linear(state, "t_embedder.mlp.0", sinusoid)))[:, None]
    if text:
        assert real is not None
        s = text_blocks(state, s, t_emb, y, real, turns)
    else:
        c = silu(t_emb + state["y_embedder.embedding_table.weight"][y][:, None])
    for n in range(0 if text else count(state, "patch_blocks.")):
        name = f"patch_blocks.{n}"
        a1, b1, g1, a2, b2, g2 = linear(state, f"{name}.adaLN_modulation.0", c).chunk(6, -1)
        normed = rms(s, state[f"{name}.norm1.weight"]) * (1 + b1) + a1
        s = s + g1 * attention(state, f"{name}.attn", normed, turns)
        normed = rms(s, state[f"{name}.norm2.weight"]) * (1 + b2) + a2
        s = s + g2 * patch_mlp(state, f"{name}.mlp", normed)
    s = silu(t_emb + s)

    # pixels of patch l, row-major inside the patch: [B, L, P, C]
    tokens = patches.reshape(batch, length, channels, pixels).transpose(2, 3)
    tokens = linear(state, "pixel_embedder.proj", tokens)
    position = torch.zeros(length, pixels, d, dtype=torch.float64)
    quarter = d // 4
    for row in range(height):
        for col in range(width):
            place = (row // patch * cols + col // patch, row % patch * patch + col % patch)
            for k in range(quarter):
                f = 10000.0 ** (-k / quarter)
                position[place][k] = math.sin(col * f)
                position[place][quarter + k] = math.cos(col * f)
                position[place][2 * quarter + k] = math.sin(row * f)
                position[place][3 * quarter + k] = math.cos(row * f)
    tokens = tokens + position

    def attend(name: str, z: Tensor) -> Tensor:
        compact = linear(state, f"{name}.compress_to_attn", z.reshape(batch, length, pixels * d))
        out = attention(state, f"{name}.attn", compact, pixel_turns)
        return linear(state, f"{name}.expand_from_attn", out).reshape(batch, length, pixels, d)

    def mlp(name: str, z: Tensor) -> Tensor:
        return linear(state, f"{name}.mlp.fc2", gelu(linear(state, f"{name}.mlp.fc1", z)))

    for n in range(count(state, "pixel_blocks.")):
        name = f"pixel_blocks.{n}"
        modulation = linear(state, f"{name}.adaLN_modulation.0", s).reshape(batch, length, pixels, -1)
        norm1, norm2 = state[f"{name}.norm1.weight"], state[f"{name}.norm2.weight"]
        if modulation.shape[-1] == 6 * d:
            a1, b1, g1, a2, b2, g2 = modulation.split(d, -1)
            tokens = tokens + g1 * attend(name, rms(tokens, norm1) * (1 + b1) + a1)
            tokens = tokens + g2 * mlp(name, rms(tokens, norm2) * (1 + b2) + a2)
        else:
            b1, a1, b2, a2 = modulation.split(d, -1)
            tokens = tokens + attend(name, rms(tokens, norm1)) * (1 + b1) + a1
            tokens = tokens + mlp(name, rms(tokens, norm2)) * (1 + b2) + a2

    out = linear(state, "final_layer.linear", rms(tokens, state["final_layer.norm.weight"]))  # [B, L, P, C]
    flat = out.transpose(2, 3).reshape(batch, length, channels * pixels).transpose(1, 2)
    return F.fold(flat, (height, width), patch, stride=patch)
