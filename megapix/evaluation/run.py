"""An evaluation from start to end: plan → blocks of images on every rank → features on disk → scores on rank 0."""

from __future__ import annotations

import json
import os
import shutil
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from megapix import dist, sample
from megapix.claim import claim
from megapix.dist import World
from megapix.errors import InputError, Trouble
from megapix.evaluation.adm import write_npz
from megapix.evaluation.blocks import Blocks
from megapix.evaluation.images import draw
from megapix.evaluation.manifest import Manifest, Scored, read_scores, write_scores
from megapix.evaluation.options import EvaluateOptions
from megapix.evaluation.plan import Plan, plan
from megapix.evaluation.ranks import device_of, join
from megapix.evaluation.scores import score
from megapix.evaluation.threads import one_thread
from megapix.shards import write_atomic
from megapix.weights import network

TOLERANCE = 0.01
"""Relative difference up to which a repeated score counts as the same: rounding differs between devices."""


def evaluate(options: EvaluateOptions, world: World) -> int:
    """Draw, score and write; every rank calls it. The exit code: 1 if repeated scores differ, else 0.

    Raises:
        InputError: bad input, raised on every rank together.
        Trouble: another rank was lost.
    """
    group = join(world)
    device = dist.together(world, lambda: device_of(world))
    p = plan(options, world, device)
    m = p.manifest
    work = p.out.with_name(f".{p.out.stem}-{m.key[:16]}.work")
    blocks = Blocks(work, p.images, options.npz is not None, options.images)

    def finished() -> Scored | None:
        found = dist.together(world, lambda: _finished(p, options, blocks) if world.main else None)
        if found := dist.gather(world, found)[0]:
            world.say(f"{p.out} is finished: nothing was drawn; another --out evaluates anew")
        return found

    scored = finished()
    if not scored:
        if world.main:
            _warn(p)
        with claim(work, world):
            # The same command may have held the folder until now.
            scored = finished() or _draw_and_score(p, options, blocks, device, world, group)
            if world.main:
                shutil.rmtree(work, ignore_errors=True)  # what should be left of it costs room alone
    if world.main and scored:
        _say(p, scored, world)
    return dist.gather(world, _differs(p.recorded, scored) if world.main and scored else 0)[0]


def _draw_and_score(
    p: Plan, options: EvaluateOptions, blocks: Blocks, device: torch.device, world: World, group: Any
) -> Scored | None:
    """Draw the blocks that are missing, each rank its share; the scores on rank 0."""
    dist.together(world, lambda: _make_folders(p, options, blocks.folder) if world.main else None)
    dist.together(world, lambda: _share(p.manifest, blocks.folder, world))
    missing = [block for block in range(blocks.images.blocks) if not blocks.done(block)]
    todo = dist.gather(world, missing)[0]
    problem = None
    try:
        with one_thread() if device.type == "cpu" else nullcontext():
            _draw(p, blocks, todo[world.rank :: world.size], device, world)
    except InputError as error:
        problem = str(error)
    _meet(world, problem, group)
    return dist.together(world, lambda: _score(p, options, blocks) if world.main else None, group)


def _finished(p: Plan, options: EvaluateOptions, blocks: Blocks) -> Scored | None:
    """The scores, if this very evaluation has been made already with all that is asked for."""
    if not p.out.exists():
        return None
    found = read_scores(p.out, "--out")
    if found.manifest.key != p.manifest.key:
        raise InputError(f"--out {str(p.out)!r} holds the scores of another evaluation: expected another file")
    whole = options.npz is None or options.npz.is_file()
    whole = whole and all(path.is_file() for block in range(blocks.images.blocks) for path in blocks.pngs(block))
    return found if whole else None


def _warn(p: Plan) -> None:
    """Say what would make the scores less than they seem."""
    m = p.manifest
    for caution in p.standard.cautions("count", m.count):
        dist.warn(caution)
    if p.recorded:
        then = p.recorded.manifest
        for what, before, now in (("device", then.device, m.device), ("versions", then.versions, m.versions)):
            if before != now:
                dist.warn(f"{what} were {before}, and are {now}: scores may differ by rounding")


def _make_folders(p: Plan, options: EvaluateOptions, work: Path) -> None:
    for option, folder in (("--out", work), ("--images", options.images)):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{option}: {str(folder)!r} cannot be made: {error.strerror}") from error
    try:
        write_atomic(work / "manifest.json", _text(p.manifest).encode())
    except OSError as error:
        raise InputError(f"--out: {str(work)!r} cannot be written: {error.strerror}") from error


def _share(m: Manifest, work: Path, world: World) -> None:
    """See that this rank has rank 0's folder."""
    path = work / "manifest.json"
    if not path.is_file() or path.read_text() != _text(m):
        raise InputError(f"{path} is not what rank 0 wrote: --out must be on a file system that all nodes share")


def _text(m: Manifest) -> str:
    return json.dumps(asdict(m), indent=1) + "\n"


def _draw(p: Plan, blocks: Blocks, mine: list[int], device: torch.device, world: World) -> None:
    """Draw this rank's blocks and write their features."""
    m = p.manifest
    net = network(p.weights, device).to(torch.bfloat16 if m.precision == "bf16" else torch.float32)
    p.standard.extractor.to(device)
    with tqdm(total=m.count, initial=blocks.images_done(), unit="img", disable=not world.main, **_bar_style()) as bar:
        for block in mine:
            drawn = draw(blocks.images, block, net, p.standard.extractor, device)
            if not drawn.finite:
                raise InputError(sample.not_finite(m.weights.path))
            for path, image in zip(blocks.pngs(block), drawn.pixels, strict=False):
                sample.write_png(path, image)
            try:
                if blocks.with_pixels:
                    blocks.write_pixels(block, drawn.pixels)
                blocks.write(block, drawn.features, drawn.logits)
            except OSError as error:
                raise InputError(f"--out: {str(blocks.folder)!r} cannot be written: {error.strerror}") from error
            if world.main:
                bar.update(blocks.images_done() - bar.n)


def _meet(world: World, problem: str | None, group: Any) -> None:
    """Wait for all ranks, as `dist.agree`; a rank that does not live to come is told of as such."""
    try:
        dist.agree(world, problem, group)
    except RuntimeError as error:
        raise Trouble("another rank was lost; the same command goes on with the images that are missing") from error


def _score(p: Plan, options: EvaluateOptions, blocks: Blocks) -> Scored:
    """Compute the scores from all blocks, and write everything."""
    scored = Scored(p.manifest, score(*blocks.read(), p.standard.reference))
    _finished(p, options, blocks)  # another evaluation may have written there meanwhile
    if options.npz:
        write_npz(options.npz, blocks)
    write_scores(p.out, scored)
    return scored


def _say(p: Plan, scored: Scored, world: World) -> None:
    m = scored.manifest
    kind = "EMA" if m.ema else "raw weights"
    world.say(f"{p.out}: {m.count:,} images from the {kind} of {m.weights.path}")
    for name, value in scored.scores.items():
        shown = "not computed" if value is None else f"{value:.6g}"
        if p.recorded:
            before = p.recorded.scores.get(name)
            shown += f" (recorded: {before:.6g})" if before is not None else " (not recorded)"
        world.say(f"  {name} {shown}")


def _differs(recorded: Scored | None, scored: Scored) -> int:
    """1 if a score is not the recorded one, rounding aside."""
    if recorded is None:
        return 0
    for name, before in recorded.scores.items():
        now = scored.scores.get(name)
        if (before is None) != (now is None):
            return 1
        if before is not None and now is not None and abs(now - before) > TOLERANCE * abs(before):
            dist.warn(f"{name} is {now!r}, but {before!r} was recorded")
            return 1
    return 0


def _bar_style() -> dict[str, Any]:
    terminal = os.isatty(2)
    return {"mininterval": 0.5 if terminal else 10.0, "dynamic_ncols": terminal}
