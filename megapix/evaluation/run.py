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
    blocks = Blocks(work, m.count, m.batch, options.npz is not None, options.images, m.classes)
    scored = dist.together(world, lambda: _finished(p, options, blocks) if world.main else None)
    scored = dist.gather(world, scored)[0]
    if scored:
        world.say(f"{p.out} is finished")
    else:
        dist.together(world, lambda: _make_folders(p, options, work) if world.main else None)
        if world.main:
            _warn(p)
        with claim(work, world):
            dist.together(world, lambda: _share(m, work, world))
            todo = dist.gather(world, [block for block in range(blocks.total) if not blocks.done(block)])[0]
            problem = None
            try:
                with one_thread() if device.type == "cpu" else nullcontext():
                    _draw(p, blocks, todo[world.rank :: world.size], device, world)
            except InputError as error:
                problem = str(error)
            _meet(world, problem, group)
            scored = dist.together(world, lambda: _score(p, options, blocks) if world.main else None, group)
    if world.main and scored:
        shutil.rmtree(work, ignore_errors=True)  # what should be left of it costs room alone
        _say(p, scored, world)
    return dist.gather(world, _differs(p.recorded, scored) if world.main and scored else 0)[0]


def _finished(p: Plan, options: EvaluateOptions, blocks: Blocks) -> Scored | None:
    """The scores, if this very evaluation has been made already with all that is asked for."""
    if not p.out.exists():
        return None
    found = read_scores(p.out, "--out")
    if found.manifest.key != p.manifest.key:
        raise InputError(f"--out {str(p.out)!r} holds the scores of another evaluation: expected another file")
    whole = options.npz is None or options.npz.is_file()
    whole = whole and all(path.is_file() for block in range(blocks.total) for path in blocks.pngs(block))
    return found if whole else None


def _warn(p: Plan) -> None:
    """Say what would make the scores less than they seem."""
    m, width = p.manifest, p.extractor.width
    for what, count in (("count", m.count), ("the reference's count", m.reference_count)):
        if 0 < count <= width:
            dist.warn(
                f"{what} = {count} is not above the {width} features of {m.extractor}: the covariance of so few images "
                "is singular, and the Fréchet distance too high; compare it only with others of the same counts"
            )
    if not len(p.reference.features):
        dist.warn(f"{m.reference.path} holds no features: no KID, no precision and recall")
    if p.recorded:
        then = p.recorded.manifest
        for what, before, now in (("device", then.device, m.device), ("versions", then.versions, m.versions)):
            if before != now:
                dist.warn(f"{what} were {before}, and are {now}: scores may differ by rounding")


def _make_folders(p: Plan, options: EvaluateOptions, work: Path) -> None:
    for option, folder in (
        ("--out", work),
        ("--images", options.images),
        ("--npz", options.npz.parent if options.npz else None),
    ):
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
    """Draw this rank's blocks and write their features.

    Each block is drawn as a whole batch, of which the last may be kept in part; noise is always the CPU's. So an image
    depends on seed, number, batch and device alone.
    """
    m = p.manifest
    net = network(p.weights, device).to(torch.bfloat16 if m.precision == "bf16" else torch.float32)
    with tqdm(total=m.count, initial=blocks.images_done(), unit="img", disable=not world.main, **_bar_style()) as bar:
        for block in mine:
            numbers = list(range(block * m.batch, (block + 1) * m.batch))
            labels = torch.tensor([blocks.label(n) for n in numbers], device=device)
            noise = sample.seeded_noise(m.seed, numbers, m.size, torch.device("cpu")).to(device)
            pixels = sample.to_uint8(sample.draw(net, noise, labels, m.sampling))
            features, logits = p.extractor(torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().to(device))
            kept = len(blocks.numbers(block))
            for path, image in zip(blocks.pngs(block), pixels, strict=False):
                sample.write_png(path, image)
            try:
                if blocks.with_pixels:
                    blocks.write_pixels(block, pixels[:kept])
                blocks.write(block, features[:kept].float().cpu().numpy(), logits[:kept].float().cpu().numpy())
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
    scored = Scored(p.manifest, score(*blocks.read(), p.reference))
    if options.npz:
        write_npz(options.npz, blocks, p.manifest.size)
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
