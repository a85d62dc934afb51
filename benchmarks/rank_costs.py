"""What the parts of a run cost as functions of the ranks: collectives, process groups, connections and descriptors.

    python -m benchmarks.rank_costs [--ranks 2 4 8]

A tiny network trains on CPU ranks, each a process of its own with gloo between them, once from its start and once from
its checkpoint. Each rank notes what a start, a resume, an ordinary step, a row of the log, a save and a grid of eight
images do (benchmarks/rank_costs_child.py). The global batch grows with the ranks: one image each.

Printed is a Markdown table: the numbers at each number of ranks N, of rank 0 and the most of any other; and whether
they are constant, shrink, or lie on a line a + b·N, and then what that makes at 1,024 ranks. Bytes are those of a
collective's outputs or inputs, whichever are more. Below it are the lines of code whose bytes grow on every rank.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.photos import photo
from benchmarks.rank_costs_child import AT, PARTS, run
from data_prep.sources.image_folder import ImageFolder
from data_prep.writing.plan import Options
from data_prep.writing.write import write
from megapix.dist import free_port
from megapix.shards.image_policy import Policy

SIDE, CLASSES, COLUMNS = 16, 2, 4
SECONDS = 500
"""After which a launch counts as hung."""
NEAR = 0.02
"""Share of the largest number by which a law may miss: the text of a port, a path or a time varies in length."""
FORKS = multiprocessing.get_context("forkserver")
"""Processes that share what importing torch and DeepSpeed costs, and nothing else."""
MANY = 1024
FEW = 100.0
"""Bytes for each further rank, on every rank, that nobody has to name."""

Found = dict[str, dict[str, int]]
"""Part -> quantity -> number, of one rank."""


def arguments(shards: Path, out: Path, ranks: int, steps: int) -> list[str]:
    """A run of a tiny network, one image a rank, that logs, saves and samples a grid at every other step."""
    every = str(2 * ranks)
    options = {
        "out": out,
        "data.path": shards,
        "data.image-size": SIDE,
        "data.workers": 0,
        "precision": "fp32",
        "model.patch-size": 4,
        "model.width": 32,
        "model.depth": 2,
        "model.heads": 2,
        "model.pixel-width": 8,
        "model.pixel-depth": 2,
        "model.num-classes": CLASSES,
        "optim.global-batch": ranks,
        "optim.end-at": steps * ranks,
        "machine.micro-batch": 1,
        "checkpoint.every": every,
        "log.every": every,
        "log.samples-every": every,
        "log.blocks-every": "never",
        "log.grid-classes": CLASSES,
        "log.grid-columns": COLUMNS,
        "sampling.steps": 3,
    }
    given = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return ["train", "tiny", *given, "--checkpoint.no-background", "--machine.no-compile"]


def launch(ranks: int, command: list[str], folder: Path) -> list[Found]:
    """Run a command of `megapix` on so many ranks and return what each has noted."""
    folder.mkdir()
    port = free_port()
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    files, processes = [folder / f"{rank}.json" for rank in range(ranks)], []
    try:
        for rank, file in enumerate(files):
            own = world | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(FORKS.Process(target=run, args=(file, own, command)))
            processes[-1].start()
        for process in processes:
            process.join(SECONDS)
        codes = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(code != 0 for code in codes):
        said = "\n".join(file.with_suffix(".txt").read_text()[-2000:] for file in files)
        raise SystemExit(f"{said}\na run on {ranks} ranks ended with {codes}")
    return [json.loads(file.read_text()) for file in files]


def measure(ranks: int, shards: Path, folder: Path) -> list[Found]:
    """What each rank has noted of a run and of its resume."""
    folder.mkdir()
    first = launch(ranks, arguments(shards, folder / "run", ranks, 4), folder / "first")
    again = launch(ranks, arguments(shards, folder / "run", ranks, 6), folder / "again")
    return [
        {"start": one["start"], "resume": two["start"]} | {part: two[part] for part in PARTS.values()}
        for one, two in zip(first, again, strict=True)
    ]


def made_up(folder: Path) -> Path:
    """Shards of 32 pictures in two classes."""
    for number in range(32):
        path = folder / "pictures" / str(number % CLASSES) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(SIDE, SIDE, number).save(path)
    source = ImageFolder.open(folder / "pictures")
    write(source, folder / "shards", Options(Policy.make("crop", SIDE)), workers=1, progress=False)
    return folder / "shards"


def line(ranks: list[int], numbers: list[int]) -> tuple[float, float] | None:
    """(a, b) of the line a + b·N through the numbers at N ranks, b = 0 where they are constant; None if there is none.

    Two points lie on a line whatever they mean, and one is constant: a line asks for three, a constant for two.
    """
    most = max(numbers)
    if len(numbers) > 1 and most - min(numbers) <= NEAR * most:
        return float(np.mean(numbers)), 0.0
    if len(numbers) < 3:
        return None
    b, a = np.polyfit(ranks, numbers, 1)
    missed = np.abs(a + b * np.array(ranks) - numbers).max()
    return (float(a), float(b)) if missed <= NEAR * most else None


def law(ranks: list[int], numbers: list[int]) -> str:
    """What the numbers are as a function of the ranks N, in words, with what a line makes at MANY ranks."""
    found = line(ranks, numbers)
    if found and not found[1]:
        return "constant"
    if found and found[1] > 0:
        a, b = found
        slope = "N" if f"{b:.1f}" == "1.0" else f"{b:,.1f}·N".replace(".0·", "·")
        start = f" {'+' if a > 0 else '-'} {abs(a):,.0f}" if round(a) else ""
        return f"{slope}{start}; {a + b * MANY:,.0f}"
    return "shrinks" if len(numbers) > 1 and numbers == sorted(numbers, reverse=True) else ""


def compared(found: dict[int, list[Found]]) -> dict[tuple[str, str], tuple[list[int], list[int]]]:
    """(part, quantity) -> at each number of ranks, rank 0's number, and the most of any other rank."""
    worlds = list(found.values())
    keys = dict.fromkeys(
        (part, name) for part in worlds[0][0] for world in worlds for rank in world for name in rank[part]
    )
    return {
        (part, name): (
            [world[0][part].get(name, 0) for world in worlds],
            [max(rank[part].get(name, 0) for rank in world[1:]) for world in worlds],
        )
        for part, name in keys
    }


def table(found: dict[int, list[Found]]) -> str:
    """All numbers as a Markdown table, without those that are zero everywhere; bytes by line of code are left out."""
    ranks = list(found)
    at = ", ".join(map(str, ranks))
    formula = f"formula; at {MANY:,}"
    head = f"| part | quantity | rank 0, at {at} ranks | {formula} | maximum of the other ranks | {formula} |"
    lines = [head, "|---|---|---|---|---|---|"]
    for (part, name), both in compared(found).items():
        if not name.startswith(AT) and any(map(any, both)):
            cells = (f"{', '.join(f'{n:,}' for n in numbers)} | {law(ranks, numbers)}" for numbers in both)
            lines.append(f"| {part} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def growing(found: dict[int, list[Found]]) -> str:
    """The lines of code whose bytes grow on every rank by more than FEW for each rank, as a Markdown table."""
    ranks, lines = list(found), []
    for (part, name), both in compared(found).items():
        slopes = [fit[1] for numbers in both if (fit := line(ranks, numbers))]
        if name.startswith(AT) and len(slopes) == 2 and min(slopes) > FEW:
            lines.append((min(slopes), part, name.removeprefix(AT)))
    head = f"| part | bytes per rank, on every rank | at {MANY:,} ranks | code |"
    body = [f"| {part} | {b:,.0f} | {b * MANY:,.0f} | `{where}` |" for b, part, where in sorted(lines, reverse=True)]
    return "\n".join([head, "|---|---|---|---|", *body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8], help="numbers of ranks, two or more each")
    options = parser.parse_args()
    os.environ |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    FORKS.set_forkserver_preload([run.__module__, "deepspeed"])
    with tempfile.TemporaryDirectory() as folder:
        shards = made_up(Path(folder))
        found = {ranks: measure(ranks, shards, Path(folder) / str(ranks)) for ranks in sorted(options.ranks)}
    print(f"{table(found)}\n\n{growing(found)}")


if __name__ == "__main__":
    main()
