"""ZeRO-2 against the reference: losses, gradient norms, weights and EMA of a case, and how far they may differ."""

from __future__ import annotations

import functools
import math
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megapix.config import Config, MachineConfig
from megapix.dist import World
from megapix.parity import plain
from megapix.parity.cases import STEPS, Case, configuration, describe
from megapix.parity.plain import Trace
from megapix.parity.zero2 import network, samples, zero2


@dataclass(frozen=True)
class Difference:
    """How far two traces are apart, or may be."""

    gradient: float
    """Of the first step: largest difference in a tensor, relative to its largest element; the worst tensor."""
    loss: float
    """Largest relative difference of any step."""
    norm: float
    """Of the gradient: largest relative difference of any step."""
    weights: float
    """At the end, measured like the gradient."""
    ema: float
    """At the end, measured like the gradient."""

    def within(self, tolerance: Difference) -> bool:
        """Whether every number is finite and at most the tolerance's."""
        return all(value <= bound for value, bound in zip(astuple(self), astuple(tolerance), strict=True))


TOLERANCES = {
    "fp32": Difference(gradient=1e-5, loss=1e-5, norm=1e-4, weights=1e-3, ema=1e-3),
    "bf16": Difference(gradient=1e-5, loss=3e-3, norm=5e-2, weights=0.1, ema=0.1),
    "bf16 compiled": Difference(gradient=0.05, loss=3e-3, norm=5e-2, weights=0.2, ema=0.2),
}
"""What a case may differ from its reference.

fp32: sums in another order. The gradient differs by some 1e-6; Adam divides it by its own size, so where it is nearly
zero its rounding becomes a part of a step: 1e-5 to 1e-4 of the largest weight after ten of them.

Norms of later steps depend on where the runs have gone: in fp32 they part by up to 3e-5 in ten steps, in bf16 by 2e-2
(measured; another CPU, with other kernels, has other figures).

bf16: against the reference in bf16 the gradient of the first step is as close as in fp32. Later a weight that lies
between two bf16 numbers may be rounded the other way, and the runs part as far as bf16 parts from fp32 (0.08 to 0.1
of the largest weight at this learning rate, measured), not farther.

bf16 compiled: fused operations round less often, so already the first gradient differs by bf16's own rounding.
"""


def tolerance(case: Case) -> Difference:
    """The tolerances of a case."""
    return TOLERANCES["bf16 compiled" if case.compile and case.precision == "bf16" else case.precision]


@dataclass(frozen=True)
class Result:
    """A case, and how far it is from the reference in its own precision."""

    case: Case
    difference: Difference
    from_fp32: Difference
    """From the fp32 reference: in bf16, what bf16 costs."""
    types: str = ""
    """Gradient dtypes, where they are not a run's own; such a result is information, not a test."""

    @property
    def holds(self) -> bool:
        """Whether ZeRO-2 computes what the reference computes."""
        return bool(self.types) or self.difference.within(tolerance(self.case))


def compare(trace: Trace, expected: Trace) -> Difference:
    """How far `trace` is from `expected`."""

    def steps(a: list[float], b: list[float]) -> float:
        return float(np.max(np.abs(np.subtract(a, b)) / np.abs(b)))

    def tensor(a: Tensor, b: Tensor) -> float:
        largest = float(b.abs().max())
        if largest == 0:  # no gradient: of the last text block's weights that nothing depends on
            return math.inf if a.any() else 0.0
        return float((a - b).abs().max()) / largest

    def tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
        assert a.keys() == b.keys()
        return float(np.max([tensor(a[name], b[name]) for name in b]))

    return Difference(
        gradient=tensors(trace.gradient, expected.gradient),
        loss=steps(trace.losses, expected.losses),
        norm=steps(trace.norms, expected.norms),
        weights=tensors(trace.weights, expected.weights),
        ema=tensors(trace.ema, expected.ema),
    )


@functools.lru_cache(maxsize=8)
def reference(c: Config, micro: int, device: torch.device) -> Trace:
    """The reference of a configuration."""
    return plain.train(network(c).to(device), c, functools.partial(samples, c.model, device), STEPS, micro)


def measure(
    todo: list[Case], world: World, device: torch.device, types: dict[str, dict[str, Any]] | None = None
) -> list[Result]:
    """Run the cases on every rank and compare them on rank 0, whose list is filled; the others get an empty one.

    With `types`, each case is run once per combination of gradient dtypes instead of a run's own.
    """
    results = []
    for case in todo:
        for name, chosen in (types or {"": {}}).items():
            trace = zero2(case, world, device, chosen)
            if world.main:
                # Options that the reference does not have are left at one value, so that cases share it.
                c = replace(configuration(case), machine=MachineConfig())
                exact = reference(replace(c, precision="fp32"), c.optim.global_batch, device)
                same = exact
                if case.precision == "bf16":
                    same = reference(c, c.optim.global_batch // case.ranks // case.accumulation, device)
                results.append(Result(case, compare(trace, same), compare(trace, exact), name))
                world.say(
                    f"{describe(case)}{name and ', '}{name}: {'as the reference' if results[-1].holds else 'DIFFERS'}"
                )
    return results


GRADIENT_TYPES = {
    f"accumulated in {accumulated}, reduced in {reduced}": {
        "data_types": {"grad_accum_dtype": accumulated},
        "communication_data_type": reduced,
    }
    for accumulated in ("fp32", "bf16")
    for reduced in ("fp32", "bf16")
}
"""Gradient dtypes of bf16 training; the first is a run's own."""


def table(results: list[Result]) -> str:
    """Markdown: one row per case, then what the gradient dtypes change."""

    def row(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    def cell(value: object) -> str:
        return {True: "on", False: "off"}[value] if isinstance(value, bool) else str(value)

    names = [f.name.replace("_", " ") for f in fields(Case)]
    measured = [f.name for f in fields(Difference)]
    lines = [row([*names, *measured, "result"]), "|" + "---|" * (len(names) + len(measured) + 1)]
    for r in (r for r in results if not r.types):
        numbers = [f"{value:.1e}" for value in astuple(r.difference)]
        lines.append(row([*map(cell, astuple(r.case)), *numbers, "holds" if r.holds else "**differs**"]))
    lines += ["", row(["ranks", "accumulation", "bf16 gradients", *measured, "weights from fp32"])]
    lines.append("|" + "---|" * (len(measured) + 4))
    for r in (r for r in results if r.types):
        numbers = [f"{value:.1e}" for value in (*astuple(r.difference), r.from_fp32.weights)]
        lines.append(row([str(r.case.ranks), str(r.case.accumulation), r.types, *numbers]))
    return "\n".join(lines) + "\n"
