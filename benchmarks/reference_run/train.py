"""One training of the reference run: by `megapix train`, or by the plain PyTorch loop of the parity table."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from benchmarks.reference_run.data import Data
from megapix import config
from megapix.cli.parse import parse_run
from megapix.data.batch import Batch
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.diffusion.condition import Condition, classes
from megapix.dist import World
from megapix.engine.network import build_network
from megapix.parity import plain
from megapix.weights.about import About, Weights
from megapix.weights.write import write_model

MOMENTS, MOMENT = 4, 4_800
"""How often the weights are looked at, and how many images lie between."""
LR_STEP = 9_600
"""Images after which the learning rate falls to a tenth: half of all, as in the paper (epoch 160 of 320)."""
BATCH = 32
PLAIN = "plain PyTorch"
VARIANTS: dict[str, list[str]] = {
    "megapix": [],
    PLAIN: [],
    "post-modulation": ["--model.modulation", "post"],
    "SwiGLU": ["--model.mlp", "swiglu"],
    "no LR step": ["--optim.lr-step-at", "never"],
}
"""Name -> options beside those of all trainings. The plain loop has the first one's."""

Trace = dict[str, dict[int, float]]
"""Scalar -> images seen -> value."""


def train(variant: str, data: Data, out: Path) -> tuple[dict[int, Path], Trace]:
    """Train a variant in `out`, or resume: where the weights of each moment are, and what was logged."""
    asked = [*_options(data), *VARIANTS[variant]]
    return _plain(asked, out) if variant == PLAIN else _megapix(asked, out)


def _options(data: Data) -> list[str]:
    return [
        *("tiny", "--data.path", str(data.train), "--model.num-classes", str(data.classes)),
        *("--model.patch-size", "4"),  # the preset's when the results were made
        *("--optim.lr-step-at", str(LR_STEP), "--optim.end-at", str(MOMENTS * MOMENT)),
        *("--optim.global-batch", str(BATCH)),
        *("--optim.ema-decay", "0.98"),  # of 600 steps: the preset's 0.995 would remember the first ones too long
        *("--checkpoint.every", str(MOMENT), "--checkpoint.keep-every", str(MOMENT), "--log.every", "320"),
        *("--log.samples-every", "never", "--log.blocks-every", "never"),
        *("--validation.path", str(data.heldout), "--validation.every", "1200", "--validation.samples", "128"),
    ]


def _megapix(asked: list[str], out: Path) -> tuple[dict[int, Path], Trace]:
    subprocess.run([sys.executable, "-m", "megapix", "train", *asked, "--out", out], check=True)
    events = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    trace = {
        tag: {event.step * BATCH: event.value for event in events.Scalars(tag)}
        for tag in ("loss/train", "validation/loss_raw", "validation/loss_ema")
    }
    return {seen: out / "checkpoints" / f"images-{seen:012d}" for seen in _moments()}, trace


def _plain(asked: list[str], out: Path) -> tuple[dict[int, Path], Trace]:
    """The same data, order, noise and initial weights, on one process without DeepSpeed."""
    located = locate((asked_for := parse_run([*asked, "--out", str(out)], World())).data)
    c = config.freeze(asked_for, located.index.samples)
    logged = out / "losses.json"
    if not logged.is_file():
        batches = MicroBatches(located, c.data, c.seed, c.optim.global_batch)

        def samples(positions: object) -> tuple[Tensor, Condition]:
            batch = batches[positions]  # type: ignore[index]
            assert isinstance(batch, Batch)
            return batch.images, classes(batch.labels, c.model.num_classes)

        def keep(steps: int, ema: Mapping[str, Tensor]) -> None:
            seen = steps * c.optim.global_batch
            if seen in _moments() and not (folder := _folder(out, seen)).is_dir():
                about = About(
                    c.model, c.sampling, c.data.image_size, c.text, located.index.class_names, True, PLAIN, seen
                )
                write_model(folder, Weights({n: t.clone() for n, t in ema.items()}, about))

        out.mkdir(parents=True, exist_ok=True)
        net = build_network(c.model, c.seed)
        steps = MOMENTS * MOMENT // c.optim.global_batch
        trace = plain.train(net, c, samples, steps, c.optim.global_batch, keep)
        logged.write_text(json.dumps(trace.losses))
    losses = torch.tensor(json.loads(logged.read_text()), dtype=torch.float64)
    means = losses.view(-1, 320 // c.optim.global_batch).mean(1).tolist()
    return {seen: _folder(out, seen) for seen in _moments()}, {
        "loss/train": {(i + 1) * 320: mean for i, mean in enumerate(means)}
    }


def _folder(out: Path, seen: int) -> Path:
    return out / f"images-{seen:012d}"


def _moments() -> list[int]:
    return [MOMENT * (i + 1) for i in range(MOMENTS)]
