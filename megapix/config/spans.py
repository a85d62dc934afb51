"""Spans of training, in images seen or in epochs, and how a global batch is laid out over ranks.

A span (`Images`) is written in images seen, 25600 or '25600', or in epochs, '160ep'. `freeze` turns epochs into images
once, from the index; the result is the resolved configuration, and that is what is stored.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megapix.config.checks import aligned_layer
from megapix.config.fields import get, replace
from megapix.config.marks import Images
from megapix.config.options import Config
from megapix.errors import InputError


@dataclass(frozen=True)
class BatchLayout:
    """global batch = micro batch × accumulation × ranks, computed here and nowhere else."""

    micro: int
    accumulation: int
    ranks: int

    @property
    def total(self) -> int:
        """Images of one optimizer step."""
        return self.micro * self.accumulation * self.ranks

    def __str__(self) -> str:
        return f"{self.total} = micro batch {self.micro} x accumulation {self.accumulation} x ranks {self.ranks}"


def batch_layout(config: Config, ranks: int) -> BatchLayout:
    """Split the global batch over ranks and accumulation steps.

    Raises:
        InputError: it does not divide; the message holds the arithmetic.
    """
    total, micro = config.optim.global_batch, config.machine.micro_batch
    if micro == 0:
        micro = max(1, total // ranks)
    accumulation = total // (micro * ranks)
    if accumulation < 1 or micro * accumulation * ranks != total:
        raise InputError(
            f"optim.global_batch = {total} is not micro batch x accumulation x ranks: "
            f"{micro} x {total / (micro * ranks):g} x {ranks}; "
            f"choose machine.micro_batch so that {total} is divisible by {ranks} x machine.micro_batch"
        )
    return BatchLayout(micro, accumulation, ranks)


def images(span: Images, epoch: int, key: str) -> int | None:
    """Images seen that `span` means, with `epoch` images per epoch; None for 'never'.

    Raises:
        InputError: neither a count nor epochs such as '160ep' nor 'never'.
    """
    text = str(span)
    if text == "never":
        return None
    match = re.fullmatch(r"(\d+)|(\d+(?:\.\d+)?)ep", text)
    if not match:
        raise InputError(f"{key} = {text!r}: expected images seen such as 25600, epochs such as '160ep', or 'never'")
    return int(match[1]) if match[1] else round(float(match[2]) * epoch)


SPANS = (
    "optim.lr_step_at",
    "optim.end_at",
    "optim.warmup",
    "repa.stop_at",
    "checkpoint.every",
    "checkpoint.keep_every",
    "log.every",
    "log.blocks_every",
    "log.samples_every",
    "validation.every",
    "evaluation.every",
)
MAY_BE_NEVER = (
    "optim.lr_step_at",
    "repa.stop_at",
    "checkpoint.keep_every",
    "log.blocks_every",
    "log.samples_every",
    "validation.every",
    "evaluation.every",
)


def freeze(config: Config, epoch: int) -> Config:
    """Turn every span into images (or 'never'), with `epoch` images per epoch: the resolved configuration.

    Raises:
        InputError: a span that cannot be read, is zero where it may not be, or 'never' where an end is needed.
    """
    for key in SPANS:
        value = images(get(config, key), epoch, key)
        if value is None and key not in MAY_BE_NEVER:
            raise InputError(f"{key} = 'never': expected images seen or epochs")
        if value == 0 and key not in ("optim.warmup", "repa.stop_at"):
            raise InputError(f"{key} = {get(config, key)!r} is no image at all; expected at least 1")
        config = replace(config, key, "never" if value is None else value)
    return replace(config, "repa.layer", aligned_layer(config))
