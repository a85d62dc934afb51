"""The Markdown of `benchmarks.gpu_checks`, whole on the disk after each row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu_ways import Way
from megapix.files import write_atomic

Row = dict[str, Any]
HEADS = {
    "parity": ("dtype", "blocks", "outputs", "gradients", "bounds", "holds", "attention"),
    "speed": (
        *("network", "pixel, patch policy", "micro batch", "images/s", "MFU, data sheet", "MFU, best matmul"),
        *("peak memory, GiB", "kernels"),
    ),
}
NOTES = {
    "parity": "Largest difference of a tensor from plain PyTorch's in fp32, as a share of the tensor's largest "
    "element. The bounds are fixed in fp32, and in bf16 twice what plain PyTorch itself differs by in bf16.",
    "speed": "Training steps on one rank: forward, backward, optimizer, EMA. Kernels are those of one more step, by "
    "torch's profiler.",
}


class Report:
    """Rows as they come: printed, and in `out` if there is one."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._head, self._best = "", ""
        self._tflops: float | None = None
        self._tables: dict[str, list[str]] = {name: [] for name in HEADS}
        self._printed = ""
        self.failed = False
        """Whether a parity check does not hold, or did not come to its end."""

    def add(self, way: Way, row: Row) -> None:
        """Take a row of a way."""
        if row["kind"] == "about":
            if not self._head:
                self._head = about(row)
                self._show(self._head)
        elif row["kind"] == "card":
            self._tflops = row["tflops"]
            sheet = f"{row['sheet']:g}" if row["sheet"] else "not known"
            self._best = f"Best matmul here: {row['tflops']:.4g} TFLOP/s ({row['product']}); data sheet: {sheet}."
            self._show(self._best)
        elif row["kind"] == "parity":
            self.failed |= not row["holds"]
            numbers = [f"{row['outputs']:.1e}", f"{row['gradients']:.1e}", ", ".join(f"{x:.1e}" for x in row["bounds"])]
            holds = "yes" if row["holds"] else "no"
            self._line("parity", [row["dtype"], row["blocks"], *numbers, holds, row["attention"]])
        elif row["kind"] == "step":
            shares = [f"{100 * row['tflops'] / of:.1f} %" if of else "" for of in (row["sheet"], self._tflops)]
            cells = [way.name, row.get("policy", ""), str(row["micro"]), f"{row['images_per_s']:.4g}", *shares]
            self._line("speed", [*cells, f"{row['memory'] / 2**30:.1f}", row["kernels"]])
        elif row["kind"] == "oom":
            self._without(way, row, f"out of memory in {row['phase']}, which asked for {row['asked']}")
        else:
            self._without(way, row, row["why"])

    def ended(self, way: Way, why: str) -> None:
        """A way has no more rows, for a reason."""
        self._without(way, {"micro": way.micro}, why)

    def _without(self, way: Way, row: Row, why: str) -> None:
        if way.kind in ("step", "plain"):
            micro = str(row["micro"]) if row["micro"] else "chosen"
            self._line("speed", [way.name, row.get("policy", ""), micro, why])
        else:
            self.failed |= way.kind != "card" and not why.startswith("skipped")
            self._line("parity", [way.precision, way.name, why])

    def _line(self, table: str, cells: list[str]) -> None:
        cells = [cell.replace("|", "/").replace("\n", " ") for cell in cells]
        line = f"| {' | '.join(cells + [''] * (len(HEADS[table]) - len(cells)))} |"
        self._tables[table].append(line)
        if table != self._printed:
            self._printed = table
            print("\n" + "\n".join(_head(table)))
        self._show(line)

    def _show(self, line: str) -> None:
        print(line, flush=True)
        if self._out:
            write_atomic(self._out, self.text().encode())

    def text(self) -> str:
        """The whole file."""
        parts = ["# GPU checks", self._head, self._best]
        for name, lines in self._tables.items():
            if lines:
                parts += [f"## {name.capitalize()}", NOTES[name], "\n".join([*_head(name), *lines])]
        return "\n\n".join(part for part in parts if part) + "\n"


def about(row: Row) -> str:
    """The card and the versions, in one line."""
    parts = [row["device"] + f", {row['memory'] / 2**30:.1f} GiB" * bool(row["memory"])]
    for name, key in (("driver", "driver"), ("CUDA", "cuda"), ("cuDNN", "cudnn")):
        parts += [f"{name} {row[key]}"] * bool(row[key])
    parts += [f"{name} {row[name.lower()]}" for name in ("torch", "Triton", "DeepSpeed")]
    return "; ".join(parts)


def _head(table: str) -> list[str]:
    return [f"| {' | '.join(HEADS[table])} |", "|" + "---|" * len(HEADS[table])]
