"""The command `megapix sample`: from its options to rows, their condition and their files."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from megapix import config
from megapix.allocator import keep_freed_memory
from megapix.conditioning.conditioner import Classes
from megapix.conditioning.prompts import of_prompts
from megapix.diffusion.condition import Condition
from megapix.dist import warn
from megapix.errors import InputError
from megapix.sample.options import SampleOptions
from megapix.sample.outputs import DpgFiles, GenEvalFiles, GridFiles
from megapix.sample.prompts import rows_of
from megapix.sample.rows import Files, Request, Row, generate_rows
from megapix.weights.about import About
from megapix.weights.read import load_weights

SHOWN = 16
"""Classes that a grid shows if none are given."""


def sample(o: SampleOptions) -> int:
    """Sample and write; returns the exit code. `options.check` has passed; what depends on the weights is checked here.

    Raises:
        InputError: no weights, options that do not fit them, or what `generate_rows` raises.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    keep_freed_memory()
    weights = load_weights(o.path, False if o.raw else None)
    about = weights.about
    if words := config.share_in_words(about.initial_share):
        warn(f"{words} ({about.source}); --raw takes the raw weights")
    sampling = config.override_sampling(
        about.sampling, o.interval, sampler=o.sampler, steps=o.steps, guidance=o.guidance, shift=o.shift
    )
    rows, condition_of = (_texts if about.model.text_width else _classes)(o, about, device)
    size = o.size or (about.image_size, about.image_size)
    request = Request(rows, o.per_class, o.seed, o.seeds, size, o.batch, sampling, o.negative_prompt)
    files = _files(o, rows)
    sampled = generate_rows(weights, request, condition_of, files, device)
    there = f" ({len(rows) - sampled} of {len(rows)} rows were there)" if sampled < len(rows) else ""
    print(f"megapix: {o.out}: {o.per_class} samples per row, from the {about.kind} of {about.source}{there}")
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
    of_classes = Classes(known, device).of_subjects
    return rows, lambda some: of_classes([chosen[row] for row in some])


def _texts(
    o: SampleOptions, about: About, device: torch.device
) -> tuple[list[Row], Callable[[Sequence[int]], Condition]]:
    if o.classes:
        raise InputError(f"--classes: {about.source} takes text, not classes (--prompts)")
    if o.prompts is None:
        raise InputError(f"{about.source} takes text: expected --prompts, a file with one prompt per line")
    rows = rows_of(o.prompts, o.layout, o.count)
    prompts = [row.name for row in rows]
    prompted = of_prompts(about, o.prompts, prompts, device, o.encoder, o.negative_prompt, o.batch)
    return rows, prompted.conditioner.of_subjects
