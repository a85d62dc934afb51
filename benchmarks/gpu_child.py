"""One way of `benchmarks.gpu_checks`, in a process of its own, which prints rows as JSON, a line each.

The rows have a 'kind': 'about' (the machine), 'card', 'parity', 'step'; 'oom' where memory ran out, 'refused' where an
option cannot be used here; and 'end' when all have come.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import resource
import signal
import statistics
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu_ways import Way
from benchmarks.plain_eager import PlainPixelDiT, PlainStep
from megapix import config
from megapix.bench import kernels, peak
from megapix.bench.command import batches, conditioner_of, on_ranks
from megapix.bench.options import StepOptions
from megapix.bench.report import device_name
from megapix.bench.step import TrainingStep
from megapix.bench.stopwatch import Stopwatch
from megapix.config import Config, MachineConfig, ModelConfig
from megapix.costs import flops
from megapix.diffusion.noise import keys_of, normal
from megapix.dist import World, from_environment
from megapix.engine import processes
from megapix.engine.network import build_network
from megapix.errors import InputError

Row = dict[str, Any]
BOUND = 1e-5
"""Largest difference from plain PyTorch in fp32, as a share of the largest element of a tensor."""
TIMES = 2.0
"""In bf16, how many times as far from fp32 as plain PyTorch's bf16 a result may be: both are rounded, each in places of
its own."""
SMALL = ModelConfig(patch_size=16, width=288, depth=2, heads=4, pixel_depth=2, num_classes=10)
"""The network of the parity checks, with PixelDiT-XL's head width of 72."""
ON_CPU = dataclasses.replace(SMALL, patch_size=8, width=144, heads=2)
SIDE, IMAGES = 6, 3
"""Patches along an image's side, and images."""
WARMUP = 3
PR_SET_PDEATHSIG = 1
DRIVER = Path("/proc/driver/nvidia/version")


def run(way: Way, repeats: int, cpu: bool, memory: float) -> None:
    """Print the rows, and end the process.

    Args:
        repeats: steps that are timed.
        cpu: whether it runs without a GPU.
        memory: GiB of host memory that it may take beside what it has when it begins; 0 is no limit.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a parent that is killed leaves nothing on the GPU
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no row

    def show(row: Row) -> None:
        print(json.dumps(row), file=out, flush=True)

    if not cpu and not torch.cuda.is_available():
        show({"kind": "no gpu"})
        show({"kind": "end"})
        os._exit(2)
    torch.backends.cuda.matmul.allow_tf32 = False
    world = from_environment()
    device = processes.start(world)
    show(about(device))
    if memory:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        most = used + int(memory * 2**30)
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    so_far: Row = {"micro": way.micro, "phase": "building"}
    try:
        for row in KINDS[way.kind](way, repeats, world, device, so_far):
            show(row)
    except InputError as error:
        show(so_far | {"kind": "refused", "why": str(error)})
    except Exception as error:
        if not (asked := out_of_memory(error)):
            raise
        show(so_far | {"kind": "oom", "asked": asked})
    show({"kind": "end"})
    os._exit(0)  # an engine that ran out of memory cannot be closed


def about(device: torch.device) -> Row:
    """The card, and the versions of what runs on it."""
    row: Row = {"kind": "about", "device": device_name(device), "memory": 0, "driver": "", "cudnn": ""}
    if device.type == "cuda":
        row["memory"] = torch.cuda.get_device_properties(device).total_memory
        row["driver"] = driver(DRIVER.read_text() if DRIVER.is_file() else "")
        row["cudnn"] = str(torch.backends.cudnn.version())
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda or ""}
    return row | versions | {"triton": _version("triton"), "deepspeed": _version("deepspeed")}


def driver(text: str) -> str:
    """The version in /proc/driver/nvidia/version; 'unknown' without."""
    found = re.search(r"Module(?: for \S+)?\s+([\d.]+)", text)
    return found.group(1) if found else "unknown"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def out_of_memory(error: BaseException | None) -> str:
    """What an error says was asked for, if it, or what it came from, is for lack of memory; empty otherwise."""
    while error is not None:
        text = str(error)
        lacking = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if lacking or "can't allocate memory" in text or "ALLOC_FAILED" in text or "bad_alloc" in text:
            asked = re.search(r"tried to allocate ([\d.]+ ?\w+)", text, re.IGNORECASE)
            return asked.group(1) if asked else "an unknown amount"
        error = error.__cause__ or error.__context__
    return ""


# ---------------------------------------------------------------------------------------------------------------------
# Parity
# ---------------------------------------------------------------------------------------------------------------------


def parity(way: Way, repeats: int, world: World, device: torch.device, so_far: Row) -> Iterator[Row]:
    """The network with blocks as they are run against plain PyTorch's in fp32: outputs and gradients."""
    model = SMALL if device.type == "cuda" else ON_CPU
    size, dtype = SIDE * model.patch_size, peak.DTYPES[way.precision]
    asked = _question(size, device)
    weights = {name: p.to(dtype).float() for name, p in _weights(model).items()}

    def answer(net: nn.Module, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
        net.load_state_dict(weights)
        return _gradients(net.to(device, dtype), asked)

    exact = answer(PlainPixelDiT(model, size), torch.float32)
    bounds = [BOUND, BOUND]
    if way.precision == "bf16":
        rounded = answer(PlainPixelDiT(model, size), dtype)
        bounds = [TIMES * worst(*pair) for pair in zip(rounded, exact, strict=True)]
    for pixel, patch in way.policies:
        so_far["phase"] = f"pixel {pixel}, patch {patch}"
        machine = MachineConfig(
            pixel_checkpointing=pixel,  # type: ignore[arg-type]
            patch_checkpointing=patch,  # type: ignore[arg-type]
            pixel_kernels="triton" if way.fused else "plain",
            compile=way.compiled,
        )
        torch.compiler.reset()  # graphs of the policy before would count as compiled too often
        net = build_network(model, 0, machine)
        found = [worst(*pair) for pair in zip(answer(net, dtype), exact, strict=True)]
        ran = kernels.traced(lambda net=net: net(*asked))  # type: ignore[misc]
        yield {
            "kind": "parity",
            "dtype": way.precision,
            "blocks": f"pixel {pixel}, patch {patch}{', fused' * way.fused}{', compiled' * way.compiled}",
            "outputs": found[0],
            "gradients": found[1],
            "bounds": bounds,
            "holds": all(apart <= bound for apart, bound in zip(found, bounds, strict=True)),
            "attention": ", ".join(ran.attention),
        }


def noise(way: Way, repeats: int, world: World, device: torch.device, so_far: Row) -> Iterator[Row]:
    """Noise of the generator 'philox' on the device against the CPU's, bit for bit: an odd shape, and images of 512
    pixels, above the size from which torch's own noise depends on the card."""
    keys = keys_of(np.arange(1, 4, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    for shape in ((3, 17, 23), (3, 512, 512)):
        here, there = (normal(keys, shape, where, "philox").cpu() for where in (torch.device("cpu"), device))
        different = int((here.view(torch.int32) != there.view(torch.int32)).sum())
        yield {
            "kind": "parity",
            "dtype": "fp32",
            "blocks": f"noise {tuple(here.shape)}: numbers whose bits are not the CPU's",
            "outputs": different,
            "gradients": 0,
            "bounds": [0],
            "holds": different == 0,
            "attention": "",
        }


def worst(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference in a tensor, relative to its largest element; of the worst tensor. NaN is infinitely far."""
    pairs = zip(found, expected, strict=True)
    apart = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in pairs]
    return max(float(x.nan_to_num(nan=float("inf"))) for x in apart)


def _weights(model: ModelConfig) -> dict[str, Tensor]:
    """By name; none of them zero."""
    generator = torch.Generator().manual_seed(0)
    named = build_network(model, 0).named_parameters()
    return {name: torch.randn(p.shape, generator=generator) * 0.05 for name, p in named}


def _gradients(net: nn.Module, asked: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    out = net(*asked)
    out.float().square().mean().backward()
    return [out.detach()], [p.grad for _, p in sorted(net.named_parameters()) if p.grad is not None]


def _question(size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(IMAGES, 3, size, size, generator=generator), torch.rand(IMAGES, generator=generator)
    return x.to(device), t.to(device), torch.arange(IMAGES, device=device)


# ---------------------------------------------------------------------------------------------------------------------
# Speed
# ---------------------------------------------------------------------------------------------------------------------


def card(way: Way, repeats: int, world: World, device: torch.device, so_far: Row) -> Iterator[Row]:
    """The fastest matmul of the network's and of some squares: what MFU is measured against beside the data sheet."""
    c = _configured(way)
    products = peak.matmuls(c, 16, device.type)
    found = peak.measure(products, c.precision, device)
    best = max(products, key=lambda product: found[product])
    yield {"kind": "card", "tflops": found[best], "product": str(best), "sheet": flops.peak_of(c, device)}


def ours(way: Way, repeats: int, world: World, device: torch.device, so_far: Row) -> Iterator[Row]:
    """Training steps through the engine, as `megapix bench step` takes them."""
    options = dataclasses.replace(StepOptions.of(_configured(way)), micro_batch=way.micro)
    prepared = on_ranks(options, world, device)
    c, m = prepared.config, prepared.config.machine
    so_far |= {"micro": prepared.layout.micro, "policy": f"{m.pixel_checkpointing}, {m.patch_checkpointing}"}
    step = TrainingStep(
        c, prepared.layout, batches(prepared, world, device), conditioner_of(prepared, world, device), world, device
    )
    yield _timed(lambda: sum(step().values()), prepared.layout.total, c, repeats, device, so_far)
    step.close()


def plain(way: Way, repeats: int, world: World, device: torch.device, so_far: Row) -> Iterator[Row]:
    """Training steps of plain PyTorch on the same network."""
    c = _configured(way)
    taken = PlainStep(c, build_network(c.model, c.seed).state_dict(), "weights", device)
    if way.compiled:
        taken.net.compile()
    size, micro = c.data.image_size, way.micro
    images = torch.randint(256, (micro, 3, size, size), dtype=torch.uint8, device=device)
    labels = torch.zeros(micro, dtype=torch.long, device=device)
    watch = Stopwatch(device)

    def step() -> float:
        with watch.part("step"):
            taken(images, labels)
        return watch.read()["step"]

    yield _timed(step, micro, c, repeats, device, so_far)


def _configured(way: Way) -> Config:
    c = dataclasses.replace(config.preset(way.preset), precision=way.precision)  # type: ignore[arg-type]
    return dataclasses.replace(c, machine=MachineConfig(**way.machine))


def _timed(step: Callable[[], float], images: int, c: Config, repeats: int, device: torch.device, so_far: Row) -> Row:
    """The row of steps of that many images: speed of the median, most memory, and the kernels of one more step."""
    seconds = []
    for number in range(WARMUP + repeats):
        so_far["phase"] = f"step {number + 1}"
        took = step()
        if number >= WARMUP:
            seconds.append(took)
    if device.type == "cuda":
        memory = torch.cuda.max_memory_allocated()
    else:
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rate = images / statistics.median(seconds)
    so_far["phase"] = "the step that shows the kernels"
    ran = kernels.traced(step)
    return so_far | {
        "kind": "step",
        "images_per_s": rate,
        "tflops": rate * flops.of_run(c) / 1e12,
        "sheet": flops.peak_of(c, device),
        "memory": memory,
        "kernels": ran.text(),
    }


KINDS: dict[str, Callable[[Way, int, World, torch.device, Row], Iterator[Row]]] = {
    "card": card,
    "parity": parity,
    "noise": noise,
    "step": ours,
    "plain": plain,
}

if __name__ == "__main__":
    sys.exit("python -m benchmarks.gpu_checks --way NAME starts it")
