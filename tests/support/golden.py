"""Traces of runs that are kept, and whether this machine computes the bits of the one they were made on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from tests.support.small_run import flat_vectors, saved, scalars

TAGS = ("loss/train", *(f"loss/t_{n}_of_4" for n in (1, 2, 3, 4)), "health/grad_norm", "schedule/lr")
"""What of TensorBoard is kept; `loss/repa` too, where there is REPA."""
TOLERANCE = 1e-5
"""How far a number may be from that of a machine that computes other bits, as a share of it; 30 times what was seen."""


def probe() -> dict[str, str]:
    """What decides a run's bits: torch, the kernels it takes on this CPU, and three steps of a small network in it."""
    threads, generator = torch.get_num_threads(), torch.Generator().manual_seed(0)
    torch.set_num_threads(1)
    x, y = torch.randn(2, 4, 16, 32, generator=generator)
    sizes = ((32, 96), (32, 128), (128, 32), (32, 48))
    weights = [(torch.randn(size, generator=generator) / 8).requires_grad_() for size in sizes]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, fused=True)
    for _ in range(3):
        q, k, v = (F.rms_norm(x, (32,)) @ weights[0]).view(4, 16, 3, 2, 16).permute(2, 0, 3, 1, 4)
        h = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(4, 16, 32)
        h = h + (F.gelu(h @ weights[1]) * F.silu(h @ weights[1])) @ weights[2]
        h = (h @ weights[3]).softmax(-1) * torch.linspace(0, 9, 48).sin().exp()
        ((h[..., :32] - y) ** 2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.set_num_threads(threads)
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bits": _sha256(torch.cat([w.detach().flatten() for w in weights])),
    }


def other_bits(recorded: dict[str, str]) -> str:
    """Why this machine computes other bits than the one of that probe; empty if it computes the same."""
    here = probe()
    return ", ".join(f"{key} {here[key][:16]} for {recorded[key][:16]}" for key in here if here[key] != recorded[key])


def trace(run: Path) -> dict[str, Any]:
    """What a finished run has logged at every step, the losses and norms that its newest checkpoint remembers in fp64,
    and that checkpoint's vectors by hash and norm; the EMA also by how far it is behind the weights."""
    folder = saved(run).folder
    state = json.loads((folder / "state.json").read_text())
    tags = (*TAGS, "loss/repa") if state["config"]["repa"]["digest"] else TAGS
    vectors, recent = dict(sorted(flat_vectors(folder).items())), state["recent"]
    behind = (vectors["weights"].double() - vectors["ema"].double()).norm().item()
    return {
        "images_seen": state["counters"]["images_seen"],
        "adam_steps": state["adam_steps"],
        "scalars": {tag: {str(step): value for step, value in scalars(run, tag).items()} for tag in tags},
        "recent": {"loss": [loss for loss, _ in recent], "grad_norm": [norm for _, norm in recent]},
        "sha256": {part: _sha256(vector) for part, vector in vectors.items()},
        "norms": {part: vector.double().norm().item() for part, vector in vectors.items()} | {"ema behind": behind},
    }


def differences(found: dict[str, Any], recorded: dict[str, Any], exact: bool) -> list[str]:
    """What of a trace is not as it was recorded: bit for bit, or to TOLERANCE, where hashes say nothing."""
    mine, theirs = (dict(_leaves(tree)) for tree in (found, recorded))
    return [
        f"{key} is {mine.get(key)!r}, and {theirs.get(key)!r} was recorded"
        for key in mine | theirs
        if not _same(mine.get(key), theirs.get(key), exact) and (exact or not key.startswith("/sha256/"))
    ]


def _same(mine: Any, theirs: Any, exact: bool) -> bool:
    numbers = not exact and isinstance(mine, int | float) and isinstance(theirs, int | float)
    return math.isclose(mine, theirs, rel_tol=TOLERANCE) if numbers else bool(mine == theirs)


def _leaves(tree: Any, where: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, dict | list):
        yield where, tree
        return
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        yield from _leaves(value, f"{where}/{key}")


def _sha256(vector: torch.Tensor) -> str:
    return hashlib.sha256(vector.numpy().tobytes()).hexdigest()


if __name__ == "__main__":
    import sys

    print(json.dumps(trace(Path(sys.argv[1])) if sys.argv[1:] else probe()))
