"""What padded text tokens cost: one MM-DiT block, forward and backward, on captions of several lengths.

    python -m benchmarks.text_padding                      width 768, 1,024 patches (512 x 512 pixels), 8 captions
    python -m benchmarks.text_padding --patches 256 --batch 16 --fp32

    all          every caption padded to the most tokens that there may be, 300, with a key mask
    longest      padded to the longest of the micro batch, with a key mask: what the network does
    packed       no padding: the text of all captions end to end through norms, projections and FFN, and attention of
                 one sample after the other

The three give the same numbers but for rounding, which is checked first. Ratios are of medians of interleaved turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from megapix.config import ModelConfig
from megapix.dist import from_environment
from megapix.engine import processes
from megapix.model.attention import attention, key_bias
from megapix.model.embed import rope_table, text_rope_table
from megapix.model.layers import projected
from megapix.model.pixeldit_t2i import MMDiTBlock

MOST = 300
LENGTHS = {
    "names, 3 to 12 tokens": lambda batch, g: torch.randint(3, 13, (batch,), generator=g),
    "short captions, 10 to 40": lambda batch, g: torch.randint(10, 41, (batch,), generator=g),
    "long captions, 60 to 300": lambda batch, g: torch.randint(60, 301, (batch,), generator=g),
}


def packed(block: MMDiTBlock, x: Tensor, texts: list[Tensor], c: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`MMDiTBlock.forward` on text [ΣT, D] without padding; `texts` are the samples' tokens."""
    lengths, head = [len(text) for text in texts], x.shape[-1] // block.attn.heads
    rope, turns = rope_table(size, size, head, x.device), text_rope_table(MOST, head, x.device)
    y = torch.cat(texts)[None]  # [1, ΣT, D]
    turns = tuple(torch.cat([table[:length] for length in lengths]) for table in turns)  # type: ignore[assignment]
    times = torch.repeat_interleave(torch.arange(len(texts)), torch.tensor(lengths))
    x1, x2, x3, x4, x5, x6 = block.adaLN_modulation_img(c).chunk(6, dim=-1)
    y1, y2, y3, y4, y5, y6 = (part[times, 0][None] for part in block.adaLN_modulation_txt(c).chunk(6, dim=-1))
    a = block.attn
    qx, kx, vx = projected(block.norm_x1.modulated(x, x1, x2), a.qkv_x, a.q_norm_x, a.k_norm_x, rope, a.heads)
    qy, ky, vy = projected(block.norm_y1.modulated(y, y1, y2), a.qkv_y, a.q_norm_y, a.k_norm_y, turns, a.heads)
    outs, at = [], 0
    for b, length in enumerate(lengths):
        parts = ((qy, qx), (ky, kx), (vy, vx))
        q, k, v = (torch.cat([text[:, at : at + length], image[b : b + 1]], 1) for text, image in parts)
        outs.append(attention(q, k, v))
        at += length
    x_out = torch.cat([out[:, length:] for out, length in zip(outs, lengths, strict=True)])
    y_out = torch.cat([out[:, :length] for out, length in zip(outs, lengths, strict=True)], 1)
    x = torch.addcmul(x, x3, a.proj_x(x_out))
    y = torch.addcmul(y, y3, a.proj_y(y_out))
    x = torch.addcmul(x, x6, block.mlp_x(block.norm_x2.modulated(x, x4, x5)))
    return x, torch.addcmul(y, y6, block.mlp_y(block.norm_y2.modulated(y, y4, y5)))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.text_padding", description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--patches", type=int, default=1024, help="a square number")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--fp32", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        processes.start(from_environment())  # memory is kept between steps, as in a run
    dtype, size = torch.float32 if options.fp32 else torch.bfloat16, round(options.patches**0.5)
    generator = torch.Generator().manual_seed(0)
    model = ModelConfig(width=options.width, heads=options.width // 64, mlp="swiglu", num_classes=0, text_width=8)
    block = MMDiTBlock(model, last=False)
    with torch.no_grad():
        for p in block.parameters():
            p.add_(torch.randn(p.shape, generator=generator) * 0.02)
    block = block.to(device, dtype)
    x = torch.randn(options.batch, size * size, options.width, generator=generator).to(device, dtype)
    c = torch.randn(options.batch, 1, options.width, generator=generator).to(device, dtype)
    print("| captions | tokens | all, ms | longest, ms | packed, ms | longest / all | packed / longest |")
    print("|---|---|---|---|---|---|---|")
    for name, draw in LENGTHS.items():
        lengths = draw(options.batch, generator).tolist()
        texts = [torch.randn(n, options.width, generator=generator).to(device, dtype) for n in lengths]

        def masked(most: int, texts: list[Tensor] = texts, lengths: list[int] = lengths) -> tuple[Tensor, Tensor]:
            y = torch.zeros(len(texts), most, options.width, device=device, dtype=dtype)
            for row, text in zip(y, texts, strict=True):
                row[: len(text)] = text
            mask = (torch.arange(most) < torch.tensor(lengths)[:, None]).to(device)
            bias = key_bias(mask, size * size, x.dtype)
            head = options.width // block.attn.heads
            rope, turns = rope_table(size, size, head, device), text_rope_table(most, head, device)
            return block(x, y, c, rope, turns, bias)

        ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
            "all": lambda: masked(MOST),
            "longest": lambda lengths=lengths: masked(max(lengths)),  # type: ignore[misc]
            "packed": lambda texts=texts: packed(block, x, texts, c, size),  # type: ignore[misc]
        }
        expected, tolerance = ways["all"]()[0].float(), 1e-4 if options.fp32 else 0.1
        for way in ways.values():
            assert (way()[0].float() - expected).abs().max() < tolerance * expected.abs().max()
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.repeats):
            for way, run in ways.items():
                start = time.perf_counter()
                out_x, out_y = run()
                (out_x.float().square().mean() + out_y.float().square().mean()).backward()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds[way].append(time.perf_counter() - start)
        ms = {way: 1e3 * statistics.median(times) for way, times in seconds.items()}
        ratios = f"{ms['longest'] / ms['all']:.2f} | {ms['packed'] / ms['longest']:.2f}"
        print(
            f"| {name} | {sum(lengths)} of {MOST * options.batch} | "
            + " | ".join(f"{v:.0f}" for v in ms.values())
            + f" | {ratios} |"
        )


if __name__ == "__main__":
    main()
