"""What a training step asks of a GPU, counted without one: kernels, bytes and a roofline's time, part by part.

    python -m benchmarks.step_cost                              PixelDiT-XL, 256 x 256, micro batch 32, on one H100
    python -m benchmarks.step_cost --preset t2i-1024-ms --micro 4
    python -m benchmarks.step_cost --write                  makes megapix/costs/kernels.json, which `megapix plan` reads

Eager steps are recorded operation by operation on fake tensors, compiled ones are Inductor's own code for an H100 with
its own count of bytes (`benchmarks/fake_cuda`). Times are those of `fake_cuda/roofline.py`: no kernel has run. The
step is the network's and the objective's, without ZeRO-2, optimizer and input.
"""

# ruff: noqa: E402

from __future__ import annotations

from benchmarks.fake_cuda import guard

guard.load()

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from functools import cache
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.fake_cuda import attention, between, inductor, roofline, subjects
from benchmarks.fake_cuda.count import Count, count
from benchmarks.fake_cuda.tally import Tally
from megapix.config import PRESETS, ModelConfig, pixeldit_xl, preset
from megapix.costs import flops

TABLE = Path(__file__).resolve().parent.parent / "megapix" / "costs" / "kernels.json"
COLUMNS = ("launches", "matmuls", "small", "elementwise", "sums", "narrow")
PATCH_POLICIES = ("none", "full")
PIXEL_POLICIES = ("none", "selective", "selective_modulation", "full")
WAYS = ("plain", "plain compiled", "triton", "triton compiled")
STEPS = {
    "eager, full": (False, "plain", "full"),
    "eager, none": (False, "plain", "none"),
    "compiled, full": (True, "plain", "full"),
    "compiled, none": (True, "plain", "none"),
    "compiled, Triton's kernels, none": (True, "triton", "none"),
}


@cache
def one(kind: str, model: ModelConfig, batch: int, size: int, tokens: int, way: str, policy: str) -> tuple[Count, int]:
    """A block in one of the WAYS, counted, and the numbers of its stream."""
    made = subjects.subject(kind, model, batch, (size, size), tokens, fused=way.startswith("triton"))
    return count(made, policy, way.endswith("compiled")), made.unit


@cache
def rest(model: ModelConfig, batch: int, size: int, tokens: int, compiled: bool) -> dict[str, tuple[Tally, Tally]]:
    """What a step does outside its blocks (`between.py`)."""
    return between.between(model, batch, (size, size), tokens, compiled)


# ---------------------------------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------------------------------


def step(
    model: ModelConfig, batch: int, size: int, tokens: int, compiled: bool, kernels: str, policy: str
) -> dict[str, tuple[int, Tally, Tally]]:
    """Part of a step -> how often it comes, one of its forward, and one of its backward passes."""
    plain, way = ("plain compiled" if compiled else "plain"), f"{kernels} compiled" if compiled else kernels

    def block(kind: str, way: str, policy: str) -> tuple[Tally, Tally]:
        found, _ = one(kind, model, batch, size, tokens, way, policy)
        return found.forward, found.backward

    text = bool(model.text_width)
    parts = {"patch block": (model.depth - text, *block("patch", plain, "none"))}
    if text:
        parts["last patch block"] = (1, *block("last", plain, "none"))
    parts["PiT block"] = (model.pixel_depth, *block("pit", way, policy))
    parts["output layer"] = (1, *block("final", plain, policy))
    streams = rest(model, batch, size, tokens, compiled)
    names = {
        "images": "x_t, target, loss",
        "noise": "noise",
        "pixels": "pixel embedder",
        "small": "condition",
        "tokens": "embedders",
    }
    for stream, (first, second) in streams.items():
        if first.launches + second.launches:
            parts[names.get(stream, f"between blocks, {stream}")] = (1, first, second)
    return parts


def show(name: str, preset_name: str, batch: int) -> None:
    """Print the tables of a preset."""
    c = preset(preset_name)
    size, tokens = c.data.image_size, c.text.max_tokens if c.model.text_width else 0
    goal = batch * flops.training(c.model, size, tokens)
    steps = {name: step(c.model, batch, size, tokens, *how) for name, how in STEPS.items()}
    print(f"\n{name}, micro batch {batch}\n")
    print("| | kernels | element-wise, ms | matmuls, ms | attention, ms | total, ms | MFU |")
    print("|---|---|---|---|---|---|---|")
    for title, parts in steps.items():
        whole = Tally()
        for times, first, second in parts.values():
            whole += (first + second) * times
        mfu = goal / whole.seconds / roofline.PEAK
        print(f"| {title} | {whole.launches:,} | {_ms(whole)} | {1e3 * whole.seconds:.1f} | {100 * mfu:.1f} % |")
    print("\n| part | times | forward: kernels | element-wise, ms | matmuls, ms | attention, ms |", end="")
    print(" backward: kernels | element-wise, ms | matmuls, ms | attention, ms |\n" + "|---" * 10 + "|")
    for title in ("eager, none", "compiled, none", "compiled, Triton's kernels, none"):
        for part, (times, first, second) in steps[title].items():
            cells = " | ".join(f"{t.launches} | {_ms(t, 3)}" for t in (first, second))
            print(f"| {title}: {part} | {times} | {cells} |")


def _ms(tally: Tally, digits: int = 1) -> str:
    return " | ".join(f"{1e3 * s:.{digits}f}" for s in (tally.elementwise_s, tally.matmul_s, tally.attention_s))


# ---------------------------------------------------------------------------------------------------------------------
# The table of the plan
# ---------------------------------------------------------------------------------------------------------------------


def kinds() -> dict[str, tuple[str, ModelConfig]]:
    """Kind of block, as the plan's table names it -> kind of subject, and a network that has it."""
    xl, t2i = pixeldit_xl(), preset("t2i-512").model
    return {
        "patch gelu": ("patch", xl),
        "patch swiglu": ("patch", dataclasses.replace(xl, mlp="swiglu")),
        "text swiglu": ("patch", t2i),
        "text gelu": ("patch", dataclasses.replace(t2i, mlp="gelu")),
        "last swiglu": ("last", t2i),
        "last gelu": ("last", dataclasses.replace(t2i, mlp="gelu")),
        "pit pre": ("pit", xl),
        "pit post": ("pit", dataclasses.replace(xl, modulation="post")),
        "final": ("final", xl),
    }


def sizes_of(model: ModelConfig) -> tuple[int, int, int]:
    """Images, their side and the tokens of a caption with which the table is counted."""
    return (8, 512, 300) if model.text_width else (32, 256, 0)


def row(found: Count, unit: int, way: str) -> dict[str, Any]:
    """A row of the table: passes by COLUMNS, bytes per number of the stream; kept bytes likewise, if compiled."""
    passes: dict[str, Any] = {"forward": _per(found.forward, unit), "backward": _per(found.backward, unit)}
    return passes | ({"kept": round(found.kept / unit, 4)} if way.endswith("compiled") else {})


def in_two_streams(model: ModelConfig, batch: int, size: int, way: str, policy: str) -> dict[str, Any]:
    """A row of a PiT block: what is left per pixel number, and `compact`, per number of its attention's tokens.

    It is counted twice, the second time with twice the attention's width.
    """
    width, heads = model.attention_width, model.attention_heads
    wider = dataclasses.replace(model, pixel_attention_width=2 * width, pixel_heads=2 * heads)
    (once, unit), (more, _) = (one("pit", each, batch, size, 0, way, policy) for each in (model, wider))
    small, large = row(once, 1, way), row(more, 1, way)
    numbers = batch * (size // model.patch_size) ** 2 * width
    compact: dict[str, Any] = {
        part: [0, 0, 0] + [round((b - a) / numbers, 4) for a, b in zip(small[part][3:], large[part][3:], strict=True)]
        for part in ("forward", "backward")
    }
    found: dict[str, Any] = {
        part: small[part][:3]
        + [round((a - b * numbers) / unit, 4) for a, b in zip(small[part][3:], compact[part][3:], strict=True)]
        for part in ("forward", "backward")
    }
    if "kept" in small:
        compact["kept"] = round((large["kept"] - small["kept"]) / numbers, 4)
        found["kept"] = round((small["kept"] - compact["kept"] * numbers) / unit, 4)
    return found | {"compact": compact}


def _per(tally: Tally, unit: int) -> list[float]:
    counted = [getattr(tally, column) for column in COLUMNS]
    return counted[:3] + [round(moved / unit, 4) for moved in counted[3:]]


def table() -> dict[str, Any]:
    """The whole of kernels.json."""
    blocks: dict[str, Any] = {}
    for name, (kind, model) in kinds().items():
        batch, size, tokens = sizes_of(model)
        ways = WAYS if kind == "pit" else WAYS[:2]
        policies = PIXEL_POLICIES if kind in ("pit", "final") else PATCH_POLICIES
        for way in ways:
            for policy in policies:
                if kind == "pit":
                    made = in_two_streams(model, batch, size, way, policy)
                else:
                    made = row(*one(kind, model, batch, size, tokens, way, policy), way)
                blocks.setdefault(name, {}).setdefault(way, {})[policy] = made
                print(name, way, policy, made, file=sys.stderr, flush=True)
    return {
        "made_by": "python -m benchmarks.step_cost --write",
        "torch": importlib.metadata.version("torch").split("+")[0],
        "columns": COLUMNS,
        "blocks": blocks,
        "between": {
            "classes": _between(pixeldit_xl(), 32, 256, 0),
            "text": _between(preset("t2i-512").model, 8, 512, 300),
        },
    }


def _between(model: ModelConfig, batch: int, size: int, tokens: int) -> dict[str, Any]:
    """Stream -> row, of a network with one block of each kind; and what a further block of a kind adds to `joins`."""
    L, found = (size // model.patch_size) ** 2, {}
    units = {
        "images": 3 * size**2,
        "noise": 3 * size**2,
        "pixels": size**2 * model.pixel_width,
        "patches": L * model.width,
    }
    units |= {"text": tokens * model.width, "tokens": (L + tokens) * model.width, "small": size**2}
    for compiled in (False, True):
        rows = {}
        for depth, pixel_depth in ((1, 1), (2, 1), (1, 2)):
            small = dataclasses.replace(model, depth=depth, pixel_depth=pixel_depth)
            streams = between.between(small, batch, (size, size), tokens, compiled)
            rows[depth, pixel_depth] = {
                name: _per(first + second, max(1, batch * units[name])) for name, (first, second) in streams.items()
            }
        base = rows.pop((1, 1))
        found["compiled" if compiled else "eager"] = base | {
            f"each {name} block": [round(b - a, 4) for a, b in zip(base[stream], more[stream], strict=True)]
            for (name, stream), more in zip((("patch", "small"), ("pit", "patches")), rows.values(), strict=True)
        }
    return found


def write() -> None:
    """Make kernels.json, a row a line."""
    text = json.dumps(table(), indent=1)
    TABLE.write_text(_flat(text) + "\n")


def _flat(text: str) -> str:
    """JSON with lists of numbers on one line."""
    import re

    return re.sub(
        r"\[[^\[\]{}]*\]", lambda found: re.sub(r"\s+", " ", found[0]).replace("[ ", "[").replace(" ]", "]"), text
    )


def main() -> None:
    """Print the tables, or write the plan's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description=__doc__)
    parser.add_argument("--preset", default="xl-256", choices=PRESETS)
    parser.add_argument("--micro", type=int, default=32, help="images of a micro batch")
    parser.add_argument("--write", action="store_true", help="make megapix/costs/kernels.json")
    options = parser.parse_args()
    attention.choose()
    inductor.pretend()
    with FakeTensorMode(allow_non_fake_inputs=True):
        if options.write:
            write()
        else:
            show(PRESETS[options.preset][1], options.preset, options.micro)


if __name__ == "__main__":
    main()
    sys.stdout.flush()
    os._exit(0)  # torch's threads wait for a device that is not there
