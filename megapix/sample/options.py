"""The options of `megapix sample`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from megapix import config
from megapix.errors import InputError
from megapix.files import check_writable

Layout = Literal["grid", "geneval", "dpg"]


@dataclass(frozen=True)
class SampleOptions:
    """Sample images from a run, a checkpoint, an exported file or an imported folder, on one process. 'The run's'
    defaults come from the configuration stored with the weights. Each PNG holds what it was made from as metadata."""

    path: tyro.conf.Positional[Path]
    """Run folder (its newest whole checkpoint), checkpoint folder, exported file, or imported folder."""
    out: Path = Path("samples.png")
    """PNG file of the grid, one class or prompt per row; for another layout the folder, whose rows are kept."""
    singles: Path | None = None
    """Folder that also gets every image of a grid as its own PNG, CLASS-NUMBER.png or PROMPT-NUMBER.png."""
    raw: bool = False
    """Use the raw weights of a run or checkpoint instead of the EMA."""
    classes: tuple[int, ...] = ()
    """Class numbers; by default all, at most 16."""
    prompts: Path | None = None
    """For a network that takes text: a file with one prompt per line, or a shard folder for its captions;
    for geneval its evaluation_metadata.jsonl, for dpg its folder of .txt files."""
    count: int = 0
    """Number of prompts to take from it, the first ones; 0 is all."""
    negative_prompt: str = ""
    """Prompt that guidance leads away from; empty is the empty caption."""
    encoder: str = ""
    """Folder or hub name of the text encoder;
    by default the text features stored in --prompts, or else the run's encoder."""
    layout: Layout = "grid"
    """One picture; or the files that the evaluators of GenEval or DPG-Bench read (docs/text.md)."""
    per_class: Annotated[int, tyro.conf.arg(aliases=["--per-prompt"])] = 8
    """Images per class or prompt; GenEval and DPG-Bench want 4."""
    seed: int = 0
    """Seed of the noise; an image depends on it and its own number, not on the batch."""
    seeds: tuple[int, ...] = ()
    """One seed per image of a row, the same ones in all rows, in place of --seed."""
    sampler: config.Sampler | None = None
    """Euler, Heun, or two-step Adams-Bashforth, by default the run's."""
    steps: int | None = None
    """Sampler steps, by default the run's."""
    guidance: float | None = None
    """Guidance scale, 1 is off, by default the run's."""
    interval: tuple[float, float] | None = None
    """Guidance acts for t strictly between these, by default the run's."""
    shift: float | None = None
    """Time shift of the sampler's grid, by default the run's."""
    size: tuple[int, int] | None = None
    """Height and width in pixels, each divisible by the patch size, by default the run's."""
    batch: int = 64
    """Images sampled at once."""
    zoom: int = 1
    """Pixels of the grid's PNG for each pixel of an image."""


def check(o: SampleOptions) -> None:
    """Check what can be checked whatever the weights are.

    Raises:
        InputError: naming option, value and what would be right.
    """
    for name in ("per_class", "batch", "zoom"):
        if getattr(o, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} = {getattr(o, name)}: expected at least 1")
    if o.count < 0:
        raise InputError(f"--count = {o.count}: expected 0 (all) or more")
    for seed in (o.seed, *o.seeds):
        config.validate_seed(seed)
    if o.seeds and len(o.seeds) != o.per_class:
        raise InputError(f"--seeds are {len(o.seeds)}, but --per-class = {o.per_class}: expected one for each image")
    if o.layout == "dpg" and o.per_class != 4:
        raise InputError(f"--per-class = {o.per_class}: DPG-Bench expects 4 images of a prompt")
    if o.layout != "grid":
        for name, default in (("singles", None), ("zoom", 1)):
            if getattr(o, name) != default:
                raise InputError(f"--{name} is for --layout grid only")
        if o.out.exists() and not o.out.is_dir():
            raise InputError(f"--out {str(o.out)!r} is a file; --layout {o.layout} writes a folder")
        check_writable("--out", o.out / "0.png")
        return
    check_writable("--out", o.out)
    if o.singles:
        if o.singles.exists() and not o.singles.is_dir():
            raise InputError(f"--singles {str(o.singles)!r} is not a folder")
        check_writable("--singles", o.singles / "0.png")
