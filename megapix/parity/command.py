"""`megapix doctor --parity`: does ZeRO-2 on these machines compute what a plain PyTorch reference computes?

A pairwise cover of the options that could change the result is trained for a few AdamW steps, through the same engine
as a run, on a tiny network and synthetic images. Each case is compared with the reference (`plain.train`) on the same
positions: losses, gradient norms, weights and EMA. Under a launcher the cases run on its ranks; without one, this
command starts 1, 2, 3, 4 and 6 local ranks itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megapix import console
from megapix.dist import World, free_port, gather
from megapix.engine import processes
from megapix.errors import InputError
from megapix.parity.cases import LOCAL_RANKS, Case, cases, describe
from megapix.parity.compare import GRADIENT_TYPES, Difference, Result, measure, table


@dataclass(frozen=True)
class ParityOptions:
    """Compare ZeRO-2 with a plain PyTorch reference, on a pairwise cover of the options that could change the result.

    Under a launcher it runs on its ranks; without one on 1, 2, 3, 4 and 6 local ranks.
    Exit code 1 if a case differs."""

    out: Path | None = None
    """Markdown file of the table."""
    ranks: tuple[int, ...] = ()
    """Numbers of ranks to cover; a launcher's ranks run their own part of that cover.
    The default is the launcher's number, or without one 2, 4, 1, 3 and 6 (with GPUs: no more than there are)."""
    compile: bool = True
    """Cover torch.compile, too."""
    results: Path | None = None
    """JSON file of this launch's results, instead of the table."""


def main(arguments: list[str], world: World) -> int:
    """Run the command on this rank, or start ranks; returns the exit code.

    Raises:
        InputError: an option that cannot be used.
    """
    options: ParityOptions = console.parse(ParityOptions, arguments, "megapix doctor --parity", world.main)
    for name in ("out", "results"):
        path: Path | None = getattr(options, name)
        if path and not path.absolute().parent.is_dir():
            raise InputError(f"--{name} {str(path)!r}: expected a file in a folder that exists")
    if any(ranks < 1 for ranks in options.ranks):
        raise InputError(f"--ranks {' '.join(map(str, options.ranks))}: expected numbers of at least 1")
    if "RANK" not in os.environ:
        results = _on_local_ranks(options)
        return finish(results, options)
    if options.ranks and world.size not in options.ranks:
        raise InputError(f"--ranks {' '.join(map(str, options.ranks))}: expected this launch's {world.size} among them")
    device = processes.start(world)
    covered = cases(options.ranks or (world.size,), options.compile)
    results = measure([case for case in covered if case.ranks == world.size], world, device)
    results += measure([Case(world.size, 4, precision="bf16")], world, device, GRADIENT_TYPES)
    code = 0
    if world.main and options.results:
        options.results.write_text(json.dumps([asdict(r) for r in results]))
    elif world.main:
        code = finish(results, options)
    return int(gather(world, code)[0])


def finish(results: list[Result], options: ParityOptions) -> int:
    """Print the table, write it to --out, and name the cases that differ. Returns the exit code."""
    text = table(results)
    print(text, end="")
    if options.out:
        options.out.write_text(text)
    different = [r for r in results if not r.holds]
    for r in different:
        print(f"megapix: differs from the plain PyTorch reference: {describe(r.case)}: {r.difference}", file=sys.stderr)
    return 1 if different else 0


def _on_local_ranks(options: ParityOptions) -> list[Result]:
    """Start each number of ranks on this machine and collect their results.

    Raises:
        InputError: a launch failed; its own output says why.
    """
    gpus, cores = torch.cuda.device_count(), os.cpu_count() or 1
    ranks = options.ranks or tuple(n for n in LOCAL_RANKS if n <= (gpus or n))
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for size in ranks:
            file = Path(folder) / f"{size}.json"
            port = str(free_port())
            command = ["torch.distributed.run", "--nproc-per-node", str(size), "--master-addr", "127.0.0.1"]
            command += ["--master-port", port, "-m", "megapix", "doctor", "--parity", "--results", str(file)]
            command += ["--ranks", *map(str, ranks), "--compile" if options.compile else "--no-compile"]
            # DeepSpeed's op builder calls ninja, which is installed beside the interpreter.
            path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
            environment = os.environ | {"PATH": path, "OMP_NUM_THREADS": str(max(1, cores // size))}
            try:
                code = subprocess.run([sys.executable, "-m", *command], env=environment).returncode
            finally:  # DeepSpeed's CPU communication op leaves its segments behind
                for segment in Path("/dev/shm").glob(f"deepspeed_*_127.0.0.1_{port}_*"):
                    segment.unlink(missing_ok=True)
            if code or not file.is_file():
                raise InputError(f"--ranks {size}: these ranks ended with code {code}; what they wrote above says why")
            for r in json.loads(file.read_text()):
                parts = Case(**r["case"]), Difference(**r["difference"]), Difference(**r["from_fp32"])
                results.append(Result(*parts, r["types"]))
    return results
