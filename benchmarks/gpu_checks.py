"""What a GPU alone can show, in one command without a network: `make gpu-checks`.

    python -m benchmarks.gpu_checks [--minutes 25] [--out FILE] [--only WORDS]...

Parity: the network with blocks as written, compiled, with fused pixel kernels and with every checkpointing policy
against plain PyTorch in fp32: output and gradients, in fp32 within 1e-5 of the largest element of each tensor, and in
bf16 within twice what plain PyTorch's own bf16 differs by; and noise, whose bits must be the CPU's.

Speed: whole training steps (forward, backward, ZeRO-2's optimizer step and the EMA, on one GPU) of what `megapix train`
would take by itself and of other ways, beside plain eager PyTorch (`benchmarks.plain_eager`), as written and compiled:
images/s, MFU of the data sheet's peak and of the best matmul measured here, peak memory, and the kernels that ran.

Each way is a process of its own (`--way NAME` runs one by hand, and prints its rows as JSON), since engines and graphs
of one would take memory from the next. It has a time limit, and is skipped if too few of the minutes are left; the most
telling ways come first. Where memory runs out, half the micro batch is tried. Rows are printed, and in the Markdown
file, as they come. The exit code is 1 if parity fails, and 2 without a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu_report import Report
from benchmarks.gpu_ways import WAYS, Way, of
from megapix.cli import environment
from megapix.errors import InputError
from megapix.files import check_writable

ROOT = Path(__file__).resolve().parent.parent
LINGERS = 10.0
"""Seconds that a process may take to end when it has said all."""
TAIL = 15
"""Lines of a failed process that are shown."""


def main(arguments: list[str]) -> int:
    """Run all ways, or the one that was asked for; returns the exit code.

    Raises:
        InputError: an option that cannot be used.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_checks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--minutes", type=float, default=25.0, help="for all of it")
    parser.add_argument(
        "--only", action="append", default=[], metavar="WORDS", help="ways with these words in the name"
    )
    parser.add_argument("--repeats", type=int, default=7, help="steps that are timed")
    parser.add_argument("--out", type=Path, help="Markdown file, whole after each row")
    parser.add_argument("--cpu", action="store_true", help="small networks on the CPU, to see that this program works")
    parser.add_argument("--memory", type=float, default=0.0, help="GiB of host memory that a way may take; 0: no limit")
    parser.add_argument("--ways", type=Path, help="JSON list of ways, in place of benchmarks/gpu_ways.py")
    parser.add_argument("--way", help="run this one in this process")
    parser.add_argument("--micro", type=int, default=0, help="its images; 0 takes what a run would take")
    options = parser.parse_args(arguments)
    ways = [Way(**way) for way in json.loads(options.ways.read_text())] if options.ways else WAYS
    if options.cpu:
        ways = [way.on_cpu() for way in ways if not way.needs_gpu]
    if options.way is not None:
        return _child(options, ways)
    chosen = [way for way in ways if not options.only or any(words in way.name for words in options.only)]
    if not chosen:
        raise InputError(f"--only {' '.join(options.only)!r}: no way has these words (benchmarks/gpu_ways.py)")
    if options.out:
        check_writable("--out", options.out)
    report = Report(options.out)
    program = [sys.executable, "-m", "benchmarks.gpu_checks", "--repeats", str(options.repeats)]
    program += ["--memory", str(options.memory), *["--cpu"] * options.cpu]
    program += ["--ways", str(options.ways.absolute())] if options.ways else []
    return run(chosen, program, report, 60 * options.minutes)


def run(ways: list[Way], program: list[str], report: Report, seconds: float) -> int:
    """Run the ways one after another; returns the exit code.

    Args:
        program: the command that runs a way, to which --way and --micro are added.
        seconds: for all of them.
    """
    signal.signal(
        signal.SIGTERM, lambda number, frame: sys.exit(128 + number)
    )  # through `follow`, which ends its child
    deadline, queue = time.monotonic() + seconds, deque(ways)
    known = {(way.name, way.micro) for way in ways}
    while queue:
        way = queue.popleft()
        if (left := deadline - time.monotonic()) < way.needs:
            report.ended(way, f"skipped: it needs about {way.needs} s, and {max(left, 0):.0f} s are left")
            continue
        command = [*program, "--way", way.name, "--micro", str(way.micro)]
        rows: list[dict[str, Any]] = []

        def take(row: dict[str, Any], way: Way = way, rows: list[dict[str, Any]] = rows) -> None:
            rows.append(row)
            if row["kind"] != "no gpu":
                report.add(way, row)

        why = follow(command, min(way.limit, left), take)
        if rows and rows[-1]["kind"] == "no gpu":
            print(
                "benchmarks.gpu_checks: error: torch sees no GPU; --cpu runs this program without one", file=sys.stderr
            )
            return 2
        if why:
            report.ended(way, why)
        if rows and rows[-1]["kind"] == "oom":
            half = replace(way, micro=rows[-1]["micro"] // 2)
            if half.micro and (half.name, half.micro) not in known:
                known.add((half.name, half.micro))
                queue.appendleft(half)
    return int(report.failed)


def follow(command: list[str], seconds: float, take: Callable[[dict[str, Any]], None]) -> str | None:
    """Run a way's process, give each of its rows to `take`, and say why it ended before its last one, if it did."""
    late = threading.Event()
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
        )

        def end() -> None:
            late.set()
            _kill(process)

        timer = threading.Timer(seconds, end)
        timer.start()
        try:
            if _rows(process, take):
                return None
            code = process.wait()
        finally:
            timer.cancel()
            _kill(process)
            process.wait()
        if late.is_set():
            return f"ended after {seconds:.0f} s, its limit"
        errors.seek(0)
        said = errors.read().decode(errors="replace").strip().splitlines()
    for line in said[-TAIL:]:
        print(line, file=sys.stderr, flush=True)
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    return f"ended with code {code}: {said[-1] if said else 'it said nothing'}"


def _rows(process: subprocess.Popen[bytes], take: Callable[[dict[str, Any]], None]) -> bool:
    """Take rows up to the last one; whether that came."""
    assert process.stdout
    for line in process.stdout:
        if not line.endswith(b"\n"):
            return False  # it was ended within a row
        row = json.loads(line)
        if row["kind"] == "end":
            with suppress(subprocess.TimeoutExpired):
                process.wait(LINGERS)
            return True
        take(row)
    return False


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End it and what it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _child(options: argparse.Namespace, ways: list[Way]) -> int:
    try:
        way = of(options.way, options.micro, ways)
    except KeyError:
        raise InputError(f"--way {options.way!r} does not exist (benchmarks/gpu_ways.py)") from None
    environment.expand_segments()
    from benchmarks import gpu_child  # late: torch and DeepSpeed, which the parent does without

    gpu_child.run(way, options.repeats, options.cpu, options.memory)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except InputError as error:
        print(f"benchmarks.gpu_checks: error: {error}", file=sys.stderr)
        sys.exit(2)
