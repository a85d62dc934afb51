"""`megapix ARGUMENTS` on every rank, with a record of what is drawn, and perhaps gradients that are not finite.

usage: python -m tests.programs.bad_gradients ARGUMENTS…

Environment:
    RECORD   folder; rank r appends "IMAGES_SEEN POSITION…" to rank-r.txt, a line for each micro batch
    NAN      RANK:FIRST:LAST, the rank whose gradient is NaN where a position lies in [FIRST, LAST)
    NAN_IN   'gradient' (the loss stays finite) or 'loss'
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megapix.cli import main as cli
from megapix.diffusion import flow


class _NanGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * float("nan")


def main() -> int:
    computed, rank = flow.training_loss, int(os.environ["RANK"])
    record = Path(os.environ["RECORD"]) / f"rank-{rank}.txt" if "RECORD" in os.environ else None
    sick, first, last = map(int, os.environ.get("NAN", "-1:0:0").split(":"))

    def training_loss(net: Any, images: Tensor, condition: Any, positions: Any, *rest: Any) -> tuple[Tensor, Tensor]:
        loss, t = computed(net, images, condition, positions, *rest)
        if record:
            with open(record, "a") as file:
                print(net.schedule.images_seen, *positions.tolist(), file=file)
        if rank == sick and ((first <= positions) & (positions < last)).any():
            loss = loss * float("nan") if os.environ["NAN_IN"] == "loss" else _NanGradient.apply(loss)
        return loss, t

    flow.training_loss = training_loss
    return cli.main(sys.argv[1:])


if __name__ == "__main__":
    raise SystemExit(main())
