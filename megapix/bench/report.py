"""The result of the benchmark: its numbers for JSON, and the same as a table."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megapix import config
from megapix.bench.kernels import Kernels
from megapix.bench.peak import Matmul
from megapix.bench.step import PARTS
from megapix.bench.stopwatch import Spread
from megapix.config import BatchLayout, Config
from megapix.costs import flops


@dataclass(frozen=True)
class Saves:
    """Background saves, one number each."""

    stalls: list[float]
    """Seconds that training waited for it."""
    written: list[float]
    """Seconds until it was whole on disk, with a step meanwhile."""


@dataclass(frozen=True)
class Measured:
    """Measurements of rank 0."""

    config: Config
    layout: BatchLayout
    device: torch.device
    steps: list[dict[str, float]]
    """Seconds of each of PARTS, per step."""
    matmuls: dict[Matmul, float]
    """TFLOP/s per matmul."""
    kernels: Kernels
    saves: Saves | None = None


def numbers(measured: Measured) -> dict[str, Any]:
    """Everything as plain data, ready for JSON; times in seconds.

    The parts of a step add up to it, so their shares, of all steps together, add up to 1.
    """
    c, layout = measured.config, measured.layout
    whole = [sum(parts.values()) for parts in measured.steps]
    step = Spread.of(whole)
    cost, images_per_s = flops.of_run(c), layout.total / step.median
    best = max(measured.matmuls, key=lambda matmul: measured.matmuls[matmul])
    peak, data_sheet = measured.matmuls[best], flops.peak_of(c, measured.device)

    def part(name: str) -> dict[str, float]:
        seconds = [parts[name] for parts in measured.steps]
        return asdict(Spread.of(seconds)) | {"share": sum(seconds) / sum(whole)}

    def speed(of: float | None) -> dict[str, float]:
        return flops.speed(images_per_s, cost, layout.ranks, of)

    return {
        "configuration": config.to_dict(c),
        "machine": {
            "device": device_name(measured.device),
            "threads": torch.get_num_threads(),
            "ranks": layout.ranks,
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "python": platform.python_version(),
        },
        "batch": asdict(layout) | {"total": layout.total},
        "step": asdict(step) | {"each": whole},
        "images_per_s": images_per_s,
        "flops_per_image": cost,
        "tflops_per_rank": speed(None)["speed/tflops_per_rank"],
        "peak": {
            "tflops": peak,
            "product": str(best),
            "data_sheet_tflops": data_sheet,
            "products": {str(matmul): tflops for matmul, tflops in measured.matmuls.items()},
        },
        "mfu": speed(peak)["speed/mfu"],
        "mfu_of_data_sheet": speed(data_sheet).get("speed/mfu"),
        "kernels": measured.kernels.numbers(),
        "parts": {name: part(name) for name in PARTS},
        "save": _saves(measured.saves) if measured.saves else None,
    }


def table(n: dict[str, Any]) -> str:
    """`numbers` as text: what was timed, its speed, its share of the peak, and one line per part of a step."""
    c, machine, batch, peak = n["configuration"], n["machine"], n["batch"], n["peak"]
    step, repeats = _spread(n["step"]), len(n["step"]["each"])
    checkpointing = f"checkpointing pixel {c['machine']['pixel_checkpointing']}, patch "
    checkpointing += str(c["machine"]["patch_checkpointing"])
    of_sheet = n["mfu_of_data_sheet"]
    sheet = f"{100 * of_sheet:.1f} % of {peak['data_sheet_tflops']:g} TFLOP/s" if of_sheet else "not known"
    lines = [
        f"machine   {machine['device']}, ranks: {machine['ranks']}, threads per rank: {machine['threads']}; "
        f"torch {machine['torch']}, deepspeed {machine['deepspeed']}",
        f"step      {BatchLayout(batch['micro'], batch['accumulation'], batch['ranks'])}; "
        f"{c['data']['image_size']} pixels, {c['precision']}, {checkpointing}; images "
        f"{'of ' + c['data']['path'] if c['data']['path'] else 'synthetic'}",
        f"time      {step.text()}, median of {repeats} steps: {n['images_per_s']:.4g} images/s, "
        f"{n['tflops_per_rank']:.4g} TFLOP/s per rank at {n['flops_per_image'] / 1e12:.4g} TFLOP per image",
        f"peak      {peak['tflops']:.4g} TFLOP/s, the best matmul here: {peak['product']}",
        f"kernels   {Kernels(**n['kernels']).text()}",
        f"MFU       {100 * n['mfu']:.1f} % of that peak; of the data sheet's: {sheet}",
        "",
        f"{'part of a step':44} {'median':>9} {'min':>9} {'max':>9} {'share':>7}",
    ]
    for name, what in PARTS.items():
        part = n["parts"][name]
        times = " ".join(f"{part[key]:7.4f} s" for key in ("median", "low", "high"))
        lines.append(f"{what:44} {times} {100 * part['share']:5.1f} %")
    lines.append("")
    if save := n["save"]:
        stall, written = (_spread(save[name]).text() for name in ("stall", "written"))
        lines.append(f"save      training waits {stall}; written after {written}")
    else:
        lines.append("save      not timed: --save FOLDER does")
    return "\n".join(lines) + "\n"


def device_name(device: torch.device) -> str:
    """A GPU's or CPU's name, as its driver or the kernel gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return named[0].split(":", 1)[1].strip() if named else platform.machine()


def _saves(saves: Saves) -> dict[str, Any]:
    return {"stall": asdict(Spread.of(saves.stalls)), "written": asdict(Spread.of(saves.written))}


def _spread(data: dict[str, Any]) -> Spread:
    return Spread(data["median"], data["low"], data["high"])
