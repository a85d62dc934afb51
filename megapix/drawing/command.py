"""The command `megapix sample`: what is asked of which weights, and where it goes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megapix import config
from megapix.condition import Condition
from megapix.conditioner import Classes, of_prompts
from megapix.drawing.draw import Asked, Files, Row, draw_all
from megapix.drawing.files import DpgFiles, GenEvalFiles, GridFiles
from megapix.drawing.options import SampleOptions
from megapix.drawing.prompts import rows_of
from megapix.errors import InputError
from megapix.weights import About, load_weights

SHOWN = 16
"""Classes that a grid shows if none are named."""


def sample(o: SampleOptions) -> int:
    """Draw and write; the options are checked but for what depends on the weights.

    Raises:
        InputError: no weights, options that do not go with them, or what `draw_all` raises.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    weights = load_weights(o.path, False if o.raw else None)
    about = weights.about
    sampling = config.asked_sampling(
        about.sampling, o.interval, sampler=o.sampler, steps=o.steps, guidance=o.guidance, shift=o.shift
    )
    rows, condition_of = (_texts if about.model.text_width else _classes)(o, about, device)
    size = o.size or (about.image_size, about.image_size)
    asked = Asked(rows, o.per_class, o.seed, o.seeds, size, o.batch, sampling, o.negative_prompt)
    files = _files(o, rows)
    drawn = draw_all(weights, asked, condition_of, files, device)
    there = f" ({len(rows) - drawn} of {len(rows)} rows were there)" if drawn < len(rows) else ""
    print(f"megapix: {o.out}: {o.per_class} samples a row, from the {about.kind} of {about.source}{there}")
    shown = ", ".join(row.name for row in rows[:SHOWN])
    print(f"megapix: rows: {shown}{f' and {len(rows) - SHOWN} more' if len(rows) > SHOWN else ''}")
    return 0


def _files(o: SampleOptions, rows: list[Row]) -> Files:
    if o.layout == "geneval":
        return GenEvalFiles(o.out, rows)
    return DpgFiles(o.out, rows) if o.layout == "dpg" else GridFiles(o.out, o.singles, rows, o.zoom)


def _classes(
    o: SampleOptions, about: About, device: torch.device
) -> tuple[list[Row], Callable[[Sequence[int]], Condition]]:
    for option, given in (("--prompts", o.prompts), ("--negative-prompt", o.negative_prompt), ("--encoder", o.encoder)):
        if given:
            raise InputError(f"{option} = {str(given)!r}: {about.source} takes classes, not text (--classes)")
    if o.layout != "grid":
        raise InputError(f"--layout {o.layout} is for networks that take text; {about.source} takes classes")
    known = about.model.num_classes
    chosen = o.classes or tuple(range(min(SHOWN, known)))
    for number in chosen:
        if not 0 <= number < known:
            raise InputError(f"class {number} does not exist: expected 0 to {known - 1}")
    rows = [Row(about.classes[number], f"{number:04d}") for number in chosen]
    told = Classes(known, device).told
    return rows, lambda some: told([chosen[row] for row in some])


def _texts(
    o: SampleOptions, about: About, device: torch.device
) -> tuple[list[Row], Callable[[Sequence[int]], Condition]]:
    if o.classes:
        raise InputError(f"--classes: {about.source} takes text, not classes (--prompts)")
    if o.prompts is None:
        raise InputError(f"{about.source} takes text: expected --prompts, a file with a prompt a line")
    rows = rows_of(o.prompts, o.layout, o.count)
    prompts = [row.name for row in rows]
    told = of_prompts(about, o.prompts, prompts, device, o.encoder, o.negative_prompt, o.batch)
    return rows, told.conditioner.told
