"""A training step of megapix beside the same step in plain eager PyTorch, taken by turns in one process.

    python -m benchmarks.step PRESET [--bf16 weights|autocast] [options of `megapix bench step`]

The plain step is `benchmarks.plain_eager`: an ordinary module without activation checkpointing, torch's AdamW and a
dense EMA, from the same weights on the same images. Printed: what `megapix bench step` prints, then the plain step's
time and how many times as fast ours is. --bf16 says how it makes bf16: with bf16 weights and fp32 masters, as ours (the
default), or by torch.autocast. One rank, and one micro batch per step.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from megapix.bench.command import batches, measure, on_ranks, report
from megapix.bench.report import numbers
from megapix.bench.stopwatch import Spread, Stopwatch
from megapix.cli.parse import parse_step
from megapix.dist import from_environment, leave
from megapix.engine import processes
from megapix.engine.network import build_network
from megapix.errors import InputError


def compare(ours: list[float], plain: list[float]) -> dict[str, Any]:
    """Seconds of the plain steps, and how many times as fast ours are: of the medians, and of each pair of steps."""
    ratios = [theirs / own for own, theirs in zip(ours, plain, strict=True)]
    ratio = Spread.of(plain).median / Spread.of(ours).median
    return asdict(Spread.of(plain)) | {"each": plain, "ratio": ratio, "ratio_of_pairs": asdict(Spread.of(ratios))}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bf16", choices=("weights", "autocast"), default="weights")
    own, rest = parser.parse_known_args(arguments)
    world = from_environment()
    if not rest:
        raise InputError("expected a preset or --config FILE, and options of `megapix bench step`")
    options = parse_step(rest, world, "python -m benchmarks.step")
    if world.size > 1:
        raise InputError(f"{world.size} ranks: the plain step runs on one; expected no launcher")
    from benchmarks.plain_eager import PlainStep

    device = processes.start(world)
    prepared = on_ranks(options, world, device)
    if prepared.config.model.text_width:
        raise InputError(
            "the plain step takes classes; expected a preset without text (megapix bench step times those)"
        )
    if prepared.layout.accumulation > 1:
        raise InputError(f"{prepared.layout}: the plain step does not accumulate; expected another --micro-batch")
    c, data = prepared.config, batches(prepared, world, device)
    plain = PlainStep(c, build_network(c.model, c.seed).state_dict(), own.bf16, device)
    watch, seconds = Stopwatch(device), list[float]()

    def step() -> None:
        with watch.part("step"):
            batch = next(data)
            plain(batch.images.to(device), batch.labels.to(device))
        seconds.append(watch.read()["step"])

    measured = measure(options, prepared, data, world, device, between=step)
    found = numbers(measured)
    found["plain_eager"] = compare(found["step"]["each"], seconds[options.warmup :])
    report(found, options.out)
    how = f", bf16 by {own.bf16}" if c.precision == "bf16" else ""
    pairs = Spread(*(found["plain_eager"]["ratio_of_pairs"][key] for key in ("median", "low", "high")))
    print(f"\nplain eager{how}: {Spread.of(seconds[options.warmup :]).text()}")
    print(f"ours / plain eager: {found['plain_eager']['ratio']:.3f} times as fast; of pairs {pairs.text('times')}")
    return leave(world, 0)


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"benchmarks.step: error: {error}", file=sys.stderr)
        sys.exit(2)
