"""What a GPU alone can show, in one command without a network: `make gpu-checks`.

    python -m benchmarks.gpu_checks [--preset xl-256] [--out FILE]

Parity: compiled blocks, fused pixel kernels and every checkpointing policy against the blocks as written, output and
gradients, in bf16 (2e-2 of the largest element of each tensor) and fp32 (1e-5).

Speed: whole training steps (forward, backward, ZeRO-2's optimizer step and the EMA, on one GPU) of ours for each policy
and as written, compiled and with fused pixel kernels, and of plain eager PyTorch (`benchmarks.plain_eager`), as written
and compiled, at micro batches 1, 2, 4, … up to the largest that fits: images/s, MFU of the data sheet's peak and of the
best matmul measured here, peak memory.

Both are printed as Markdown, with the card's name. The exit code is 1 if parity fails.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.plain_eager import PlainStep
from megapix import config
from megapix.bench import peak
from megapix.bench.report import device_name
from megapix.bench.stopwatch import Stopwatch
from megapix.config import BatchLayout, Config, MachineConfig, ModelConfig
from megapix.costs import flops
from megapix.diffusion import flow
from megapix.diffusion.condition import classes
from megapix.dist import from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network
from megapix.model import PixelDiT

TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
SMALL = ModelConfig(patch_size=16, width=256, depth=2, heads=4, pixel_depth=2, num_classes=10)
POLICIES: list[tuple[config.PixelPolicy, str | int]] = [
    ("none", "none"),
    ("selective", "none"),
    ("selective_modulation", "none"),
    ("full", "none"),
    ("chunked", "none"),
    ("offload", "none"),
    ("full", 2),
    ("full", "full"),
]
WARMUP = 3


def main() -> int:
    """Print both parts, and write them where they were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="xl-256", choices=config.PRESETS)
    parser.add_argument("--most", type=int, default=512, help="largest micro batch that is tried")
    parser.add_argument("--repeats", type=int, default=7, help="steps that are timed")
    parser.add_argument("--cpu", action="store_true", help="run on the CPU, to see that this program works")
    parser.add_argument("--out", type=Path, help="Markdown file that gets what is printed")
    options = parser.parse_args()
    if not options.cpu and not torch.cuda.is_available():
        print(
            "benchmarks.gpu_checks: error: torch sees no GPU here; --cpu runs this program without one", file=sys.stderr
        )
        return 2
    torch.backends.cuda.matmul.allow_tf32 = False
    world = from_environment()
    device = processes.start(world)
    lines = [f"{device_name(device)}, torch {torch.__version__}", ""]
    print("\n".join(lines), flush=True)
    bad = 0
    for row in itertools.chain(parity(device), [""], speed(options.preset, options.most, options.repeats, device)):
        bad += row.endswith("| no |")
        lines.append(row)
        print(row, flush=True)
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")
    return leave(world, int(bad > 0))


# ---------------------------------------------------------------------------------------------------------------------
# Parity
# ---------------------------------------------------------------------------------------------------------------------


def parity(device: torch.device) -> Iterator[str]:
    """A row for each way to run the blocks."""
    yield "| dtype | blocks | worst difference of outputs | of gradients | bound | holds |"
    yield "|---|---|---|---|---|---|"
    for dtype, bound in TOLERANCE.items():
        asked = _question(4, 128, device)
        expected = _gradients(_network(dtype, device), asked)
        for name, machine in ways(device.type == "cuda"):
            found = _gradients(_network(dtype, device, machine), asked)
            out, gradients = (worst(*pair) for pair in zip(found, expected, strict=True))
            holds = "yes" if max(out, gradients) <= bound else "no"
            kind = str(dtype).removeprefix("torch.")
            yield f"| {kind} | {name} | {out:.1e} | {gradients:.1e} | {bound:.0e} | {holds} |"


def ways(fused: bool) -> Iterator[tuple[str, MachineConfig]]:
    """How blocks can be run, as written first."""
    for kernels, compiled in itertools.product(("plain", "triton") if fused else ("plain",), (False, True)):
        for pixel, patch in POLICIES:
            if kernels == "triton" and pixel == "chunked":
                continue  # the fused kernels take all patches at once
            torch.compiler.reset()  # graphs of the way before would count as compiled too often
            name = f"pixel {pixel}, patch {patch}{', fused' * (kernels == 'triton')}{', compiled' * compiled}"
            yield (
                name,
                MachineConfig(
                    pixel_checkpointing=pixel, patch_checkpointing=patch, pixel_kernels=kernels, compile=compiled
                ),
            )


def _network(dtype: torch.dtype, device: torch.device, machine: MachineConfig | None = None) -> PixelDiT:
    """Without a weight at zero, and the same ones each time."""
    net = build_network(SMALL, 0, machine)
    generator = torch.Generator().manual_seed(0)
    for p in net.parameters():
        nn.init.normal_(p, std=0.05, generator=generator)
    return net.to(device, dtype)


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference in a tensor, relative to its largest element; of the worst tensor."""
    pairs = zip(found, expected, strict=True)
    return max(float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs)


def _gradients(net: PixelDiT, asked: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    out = net(*asked)
    out.float().square().mean().backward()
    return [out.detach()], [p.grad for p in net.parameters() if p.grad is not None]


def _question(batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(batch, 3, size, size, generator=generator), torch.rand(batch, generator=generator)
    return x.to(device), t.to(device), torch.arange(batch, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


def speed(preset: str, most: int, repeats: int, device: torch.device) -> Iterator[str]:
    """A row for each way, and each micro batch that fits."""
    c = dataclasses.replace(config.preset(preset), out="-")
    products = peak.matmuls(c, 16, device.type)
    best = max(peak.measure(products, c.precision, device).values())
    sheet = flops.peak_of(c, device)
    yield f"{preset}, {c.precision}; peak in TFLOP/s: {best:.4g} by the best matrix product, data sheet {sheet or '-'}"
    yield ""
    yield "| network | micro batch | images/s | MFU, data sheet | MFU, measured peak | peak memory, GiB |"
    yield "|---|---|---|---|---|---|"
    cost = flops.training(c.model, c.data.image_size)
    for name, step in steps(c, device):
        micro = 1
        while micro <= most and (found := _timed(step, micro, c, repeats, device)):
            seconds, memory = found
            rate = micro / seconds
            shares = " | ".join(f"{100 * rate * cost / 1e12 / of:.1f} %" if of else "" for of in (sheet, best))
            yield f"| {name} | {micro} | {rate:.4g} | {shares} | {memory / 2**30:.1f} |"
            micro *= 2


Step = Callable[[Tensor, Tensor], None]


def steps(c: Config, device: torch.device) -> Iterator[tuple[str, Step]]:
    """Training steps on given images and labels; each is made when its turn has come."""
    for compiled in (False, True):
        plain = PlainStep(c, build_network(c.model, c.seed).state_dict(), "weights", device)
        if compiled:
            plain.net.compile()
        yield f"plain PyTorch{', compiled' if compiled else ''}", plain
        del plain
    for name, machine in ways(device.type == "cuda"):
        yield f"ours, {name}", _ours(dataclasses.replace(c, machine=machine))


def _ours(c: Config) -> Step:
    """In an engine of its own: one that has run out of memory in a step cannot be used again."""
    e = zero2.build(c, BatchLayout(1, 1, 1), build_network(c.model, c.seed, c.machine))

    def step(images: Tensor, labels: Tensor) -> None:
        condition = classes(labels, c.model.num_classes)
        loss, _ = flow.training_loss(e, images, condition, np.arange(len(images)), c.seed, c.flow)
        e.backward(loss.mean())
        e.step()

    return step


def _timed(step: Step, micro: int, c: Config, repeats: int, device: torch.device) -> tuple[float, int] | None:
    """Median seconds of a step, and the peak of allocated bytes; None if it does not fit."""
    size = c.data.image_size
    images = torch.randint(256, (micro, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.zeros(micro, dtype=torch.long, device=device)
    watch, seconds = Stopwatch(device), []
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        for number in range(WARMUP + repeats):
            with watch.part("step"):
                step(images, labels)
            took = watch.read()["step"]
            if number >= WARMUP:
                seconds.append(took)
    except torch.cuda.OutOfMemoryError:
        return None
    return statistics.median(seconds), torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


if __name__ == "__main__":
    sys.exit(main())
