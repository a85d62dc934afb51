"""Train the variants on one data set, score each moment, and write results/DATASET.json and the sample grids."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.reference_run.data import FASHION, Data, prepare
from benchmarks.reference_run.train import VARIANTS, train

RESULTS = Path(__file__).parent / "results"
SCORE = "fd_effnet_lite0"
DRAW = ["--count", "500", "--sampler", "ab2", "--steps", "16", "--guidance", "1"]
"""How the scored images are sampled."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.reference_run", description=__doc__)
    parser.add_argument("dataset", choices=("fashion-mnist", "openmoji"))
    parser.add_argument("--work", type=Path, required=True, help="folder for shards, runs and scores (about 1 GB)")
    parser.add_argument("--files", type=Path, default=FASHION, help="folder with Fashion-MNIST's four .gz files")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    options = parser.parse_args()
    work = options.work / options.dataset
    work.mkdir(parents=True, exist_ok=True)
    data = prepare(options.dataset, work, options.files)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # two trainings at a time, each on a core of its own
    with ThreadPoolExecutor(2) as pool:
        measured = {variant: pool.submit(measure, variant, data, work) for variant in options.variants}
        for variant, future in measured.items():
            keep(options.dataset, variant, future.result())
    for seen, grid in grids(data, work, options.variants[0]).items():
        shutil.copy(grid, RESULTS / f"{options.dataset}-{seen:06d}.png")


def keep(dataset: str, variant: str, found: dict[str, Any]) -> None:
    """Put a variant's results into the data set's file."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{dataset}.json"
    results = (json.loads(path.read_text()) if path.is_file() else {}) | {variant: found}
    path.write_text(json.dumps({name: results[name] for name in VARIANTS if name in results}, indent=1) + "\n")


def measure(variant: str, data: Data, work: Path) -> dict[str, Any]:
    """One variant's losses, and the scores of its EMA at each moment."""
    out = work / variant.replace(" ", "-")
    moments, trace = train(variant, data, out)
    scores = {}
    for seen, weights in moments.items():
        score = out / f"score-{seen:06d}.json"
        run("megapix", "evaluate", weights, "--reference", data.reference, "--out", score, *DRAW)
        scores[seen] = {name: round(value, 4) for name, value in json.loads(score.read_text())["scores"].items()}
    losses = {tag: {seen: round(value, 5) for seen, value in values.items()} for tag, values in trace.items()}
    return {"scores": scores, **losses}


def grids(data: Data, work: Path, variant: str) -> dict[int, Path]:
    """Guided EMA samples of a variant at each moment, a class a row."""
    moments, _ = train(variant, data, work / variant.replace(" ", "-"))
    found = {}
    for seen, weights in moments.items():
        found[seen] = work / f"grid-{seen:06d}.png"
        run("megapix", "sample", weights, "--per-class", 6, "--out", found[seen])
    return found


def run(module: str, *arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", module, *map(str, arguments)], check=True)


if __name__ == "__main__":
    main()
