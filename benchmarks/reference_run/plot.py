"""Draw docs/reference-run.png from the results, and print the document's tables.

python -m benchmarks.reference_run.plot
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks.reference_run.__main__ import RESULTS, SCORE
from benchmarks.reference_run.train import LR_STEP

OUT = Path("docs/reference-run.png")
WINDOW = 5
"""Logged losses, of 320 images each, in one point of the loss curve."""


def main() -> None:
    sets = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    figure, axes = plt.subplots(len(sets), 3, figsize=(15, 4.2 * len(sets)), squeeze=False, layout="constrained")
    for (left, middle, right), (name, results) in zip(axes, sets.items(), strict=True):
        for variant, found in results.items():
            left.plot(*smoothed(found["loss/train"]), label=variant, linewidth=1)
            if "validation/loss_ema" in found:
                middle.plot(*points(found["validation/loss_ema"]), label=variant, marker=".")
            score = {seen: scores[SCORE] for seen, scores in found["scores"].items()}
            right.plot(*points(score), label=variant, marker="o")
        titles = (f"training loss, mean of {WINDOW * 320} images", "validation loss of the EMA", f"{SCORE}, 500 images")
        for axis, title in zip((left, middle, right), titles, strict=True):
            axis.set(title=f"{name}: {title}", xlabel="images seen")
            axis.axvline(LR_STEP, color="grey", linestyle=":", label="learning rate / 10")
            axis.legend(fontsize="small")
        left.set_ylim(top=sorted(found["loss/train"].values())[-6])
        right.set_yscale("log")
    figure.savefig(OUT, dpi=80)
    for name, results in sets.items():
        print(f"\n{name}\n")
        print("\n".join(table(results)))


def table(results: dict[str, Any]) -> list[str]:
    """Markdown: the score at each moment, and the losses at the end, a row for each variant."""
    moments = list(next(iter(results.values()))["scores"])
    columns = [*(f"{int(seen):,}" for seen in moments), "training loss", "validation, EMA", "validation, raw"]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for variant, found in results.items():
        cells = [f"{found['scores'][seen][SCORE]:.1f}" for seen in moments]
        cells.append(f"{smoothed(found['loss/train'])[1][-1]:.4f}")
        for kind in ("ema", "raw"):
            losses = list(found.get(f"validation/loss_{kind}", {}).values())
            cells.append(f"{losses[-1]:.4f}" if losses else "")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def points(values: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Images seen, and values."""
    return [int(seen) for seen in values], list(values.values())


def smoothed(values: dict[str, float]) -> tuple[list[int], list[float]]:
    """Means of WINDOW points."""
    x, y = points(values)
    ends = range(WINDOW, len(y) + 1, WINDOW)
    return [x[end - 1] for end in ends], [sum(y[end - WINDOW : end]) / WINDOW for end in ends]


if __name__ == "__main__":
    main()
