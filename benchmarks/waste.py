"""What a step spends beside its work: waiting for the device, the EMA, and a slow AdamW; and how long a start takes.

    python -m benchmarks.waste reads [--precision bf16]     # host reads of each step of a real run, with their places
    python -m benchmarks.waste ema [--preset b-256] [--images 16]    # the EMA's share of a step of one rank
    python -m benchmarks.waste adamw [--numbers 100000000]  # torch's implementations of AdamW on one flat fp32 vector

`reads` trains the tiny preset for twelve steps on synthetic images and notes every time that a number is taken out of a
tensor: on a GPU the host would wait there for all the work before it. It also prints when the first step was done, and
the CPU time of this process until then, which other work on the machine does not stretch.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.overrides import TorchFunctionMode

from benchmarks.bytes_sent import step
from megapix import config
from megapix.dist import from_environment, leave
from megapix.engine import processes, zero2
from megapix.engine.network import build_network
from megapix.engine.optim import EMA, AdamWWithEMA
from megapix.resilience import agreement
from megapix.train import loop

READS = {"item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__"}
STEPS, SETTLED = 12, 4
"""Steps of the run, and the first one that is counted."""


# ---------------------------------------------------------------------------------------------------------------------
# reads
# ---------------------------------------------------------------------------------------------------------------------


class Reads(TorchFunctionMode):
    """Notes where a number is taken out of a tensor, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.step = 1
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if (name := getattr(func, "__name__", "")) in READS and self.step >= SETTLED:
            self.found[_place(), name] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """File and line of the nearest caller that is neither torch nor this program."""
    frame = sys._getframe(2)
    while "/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__:
        assert frame.f_back is not None
        frame = frame.f_back
    return f"{'/'.join(Path(frame.f_code.co_filename).parts[-3:])}:{frame.f_lineno}"


def reads(precision: Literal["bf16", "fp32"]) -> None:
    """Train, count, print."""
    world = from_environment()
    seen = Reads()
    outcome, first = agreement.outcome, []

    def counted(*args: Any) -> Any:
        heard = outcome(*args)
        first.append((time.clock_gettime(time.CLOCK_BOOTTIME), time.process_time()))
        seen.step += 1
        return heard

    agreement.outcome = counted
    with tempfile.TemporaryDirectory() as folder:
        shards = _shards(Path(folder))
        c = replace(config.tiny(), precision=precision)
        total = c.optim.global_batch
        c = config.replace(config.replace(c, "out", f"{folder}/run"), "data.path", str(shards))
        c = replace(c, optim=replace(c.optim, lr_step_at="never", end_at=STEPS * total))
        c = replace(c, log=replace(c.log, every=STEPS * total, blocks_every="never", samples_every="never"))
        with seen:
            loop.train(c, world)
    when, cpu = first[0]
    print(f"first step done {when - _started():.1f} s after the process began, {cpu:.1f} s of CPU time")
    counted_steps = STEPS - SETTLED  # without the last, which logs and saves
    for (place, name), count in sorted(seen.found.items()):
        if count >= counted_steps:
            print(f"{count // counted_steps} per step: {name:9} {place}")
    leave(world, 0)


def _started() -> float:
    """When this process began, in seconds since the machine did (proc_pid_stat(5), field 22)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return ticks / 100


def _shards(root: Path) -> Path:
    """64 synthetic images of 32 pixels in five classes."""
    from data_prep.sources.image_folder import ImageFolder
    from data_prep.writing.plan import Options
    from data_prep.writing.write import write
    from megapix.shards.image_policy import Policy

    generator = np.random.default_rng(0)
    for number in range(64):
        path = root / "images" / str(number % 5) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    source, options = ImageFolder.open(root / "images"), Options(Policy.make("crop", 32), samples_per_shard=32)
    write(source, root / "shards", options, workers=1, progress=False)
    return root / "shards"


# ---------------------------------------------------------------------------------------------------------------------
# ema
# ---------------------------------------------------------------------------------------------------------------------


class Lerp(TorchFunctionMode):
    """Times `lerp_` of one tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        super().__init__()
        self.tensor, self.seconds = tensor, 0.0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        if func is torch.Tensor.lerp_ and args[0] is self.tensor:
            self.seconds += time.perf_counter() - start
        return out


def ema(preset: str, images: int, repeats: int) -> None:
    """Print the EMA's share of a step on the CPU."""
    world = from_environment()
    processes.start(world)
    c = config.preset(preset)
    c = replace(c, optim=replace(c.optim, global_batch=images * world.size))
    e = zero2.build(c, config.batch_layout(c, world.size), build_network(c.model, 0, c.machine))
    partition = e.partition
    step(e, c, 1, 1)  # makes buffers and tables
    shares = []
    for _ in range(repeats):
        with Lerp(e.optimizer.state[partition][EMA]) as lerp:
            start = time.perf_counter()
            step(e, c, 1, images)
            took = time.perf_counter() - start
        shares.append(lerp.seconds / took)
        world.say(f"step {took:.2f} s, EMA {lerp.seconds:.3f} s: {lerp.seconds / took:.2%}")
    world.say(
        f"{preset}, {images} images per rank, {c.precision}: the EMA takes {statistics.median(shares):.2%} of a step"
    )
    leave(world, 0)


# ---------------------------------------------------------------------------------------------------------------------
# adamw
# ---------------------------------------------------------------------------------------------------------------------


def adamw(numbers: int, repeats: int) -> None:
    """Print the seconds of each implementation, by turns, and how far its weights are from the plain one's."""
    torch.manual_seed(0)
    weights, gradient = torch.randn(numbers), torch.randn(numbers)
    made: dict[str, tuple[torch.Tensor, Callable[[], Any]]] = {}
    for name in ("plain", "foreach", "fused"):
        p = torch.nn.Parameter(copy.deepcopy(weights))
        p.grad = gradient
        optimizer = torch.optim.AdamW(
            [p], 1e-4, weight_decay=0.0, **{"foreach": name == "foreach", "fused": name == "fused"}
        )
        made[name] = p, optimizer.step
    p = torch.nn.Parameter(copy.deepcopy(weights))
    p.grad = gradient
    ours = AdamWWithEMA([p], 1e-4, (0.9, 0.999), 0.0, 0.9999)
    ours.begin()
    made["ours, with EMA"] = p, ours.step
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(repeats):
        for name, (_, take) in made.items():
            start = time.perf_counter()
            take()
            seconds[name].append(time.perf_counter() - start)
    plain = statistics.median(seconds["plain"][1:])
    for name, (found, _) in made.items():
        took = statistics.median(seconds[name][1:])
        apart = (found - made["plain"][0]).abs().max().item()
        spread = f"{min(seconds[name][1:]):.3f} to {max(seconds[name][1:]):.3f}"
        print(f"{name:15} {took:.3f} s ({spread}), {took / plain:.2f} of plain; weights apart by {apart:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("reads", "ema", "adamw"))
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16")
    parser.add_argument("--preset", default="b-256")
    parser.add_argument("--images", type=int, default=16, help="images of one rank")
    parser.add_argument("--numbers", type=int, default=100_000_000, help="length of the flat vector")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    if options.what == "reads":
        reads(options.precision)
    elif options.what == "ema":
        ema(options.preset, options.images, options.repeats)
    else:
        adamw(options.numbers, options.repeats + 1)


if __name__ == "__main__":
    main()
