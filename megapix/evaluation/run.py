"""An evaluation from start to end: resolve → blocks of samples on every rank → features on disk → scores on rank 0."""

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

from megapix.config import share_in_words
from megapix.diffusion.pictures import write_png
from megapix.diffusion.sampler import not_finite
from megapix.dist import World, agree, gather, on_all_ranks, warn
from megapix.errors import InputError, OutOfMemory, RankLost, RunError
from megapix.evaluation.images import generate_images
from megapix.evaluation.manifest import Manifest, Scored, read_scores, write_scores
from megapix.evaluation.options import EvaluateOptions
from megapix.evaluation.prepare import ResolvedEvaluation, resolve
from megapix.evaluation.ranks import device_of, join
from megapix.evaluation.scores import fit, one_thread, score
from megapix.evaluation.store import Blocks, write_npz
from megapix.files import write_atomic
from megapix.resilience import out_of_memory
from megapix.resilience.run_lock import run_lock
from megapix.weights.read import network

TOLERANCE = 0.01
"""Relative difference up to which a repeated score counts as the same: rounding differs between devices."""


def evaluate(options: EvaluateOptions, world: World) -> int:
    """Sample, score and write; every rank calls it. Returns the exit code: 1 if repeated scores differ, else 0.

    Raises:
        InputError: bad input, raised on every rank together.
        RankLost: another rank was lost.
    """
    group = join(world)
    device = on_all_ranks(world, lambda: device_of(world))
    resolved = resolve(options, world, device)
    m = resolved.manifest
    work = resolved.out.with_name(f".{resolved.out.stem}-{m.key[:16]}.work")
    blocks = Blocks(work, resolved.images, options.npz is not None, options.images)

    def finished() -> Scored | None:
        scored = on_all_ranks(world, lambda: _finished(resolved, options, blocks) if world.main else None)
        if scored := gather(world, scored)[0]:
            world.say(f"{resolved.out} is finished: nothing was sampled; another --out evaluates again")
        return scored

    scored = finished()
    if not scored:
        if world.main:
            _warn(resolved)
        with run_lock(work, world):
            # The same command may have held the lock until now.
            scored = finished() or _sample_and_score(resolved, options, blocks, device, world, group)
            if world.main:
                shutil.rmtree(work, ignore_errors=True)  # what may be left of it only takes space
    if world.main and scored:
        _say(resolved, scored, world)
    return gather(world, _differs(resolved.recorded, scored) if world.main and scored else 0)[0]


def _sample_and_score(
    resolved: ResolvedEvaluation,
    options: EvaluateOptions,
    blocks: Blocks,
    device: torch.device,
    world: World,
    group: Any,
) -> Scored | None:
    """Sample the missing blocks, each rank its share; returns the scores on rank 0."""
    on_all_ranks(world, lambda: _make_folders(resolved, options, blocks.folder) if world.main else None)
    on_all_ranks(world, lambda: _check_shared(resolved.manifest, blocks.folder, world))
    missing = [block for block in range(blocks.images.blocks) if not blocks.done(block)]
    todo = gather(world, missing)[0]
    problem = exhausted = None
    here = out_of_memory.told(world, lambda: (0, "evaluate"), out_of_memory.of_command)
    try:
        with here, one_thread() if device.type == "cpu" else nullcontext():
            _sample(resolved, blocks, todo[world.rank :: world.size], device, world)
    except InputError as error:
        problem = str(error)
    except OutOfMemory as error:
        exhausted = str(error)
    _meet(world, problem, exhausted, group)
    return on_all_ranks(world, lambda: _score(resolved, options, blocks) if world.main else None, group)


def _finished(resolved: ResolvedEvaluation, options: EvaluateOptions, blocks: Blocks) -> Scored | None:
    """The scores, if this very evaluation is finished with all files that are requested."""
    if not resolved.out.exists():
        return None
    scored = read_scores(resolved.out, "--out")
    if scored.manifest.key != resolved.manifest.key:
        raise InputError(f"--out {str(resolved.out)!r} holds the scores of another evaluation: expected another file")
    whole = options.npz is None or options.npz.is_file()
    whole = whole and all(path.is_file() for block in range(blocks.images.blocks) for path in blocks.pngs(block))
    return scored if whole else None


def _warn(resolved: ResolvedEvaluation) -> None:
    """Warn about what makes the scores less reliable than they look."""
    m = resolved.manifest
    for caution in resolved.standard.cautions("count", m.count) if resolved.standard else ():
        warn(caution)
    if resolved.clip and (cut := resolved.clip.cut(resolved.prompts)):
        warn(f"{cut} of {len(resolved.prompts)} prompts have more than --clip's {resolved.clip.tokens} tokens")
    if words := share_in_words(m.initial_share):
        warn(f"{words} ({m.weights.path}); --raw takes the raw weights")
    if resolved.recorded:
        then = resolved.recorded.manifest
        for what, before, now in (("device", then.device, m.device), ("versions", then.versions, m.versions)):
            if before != now:
                warn(f"{what} were {before}, and are {now}: scores may differ by rounding")


def _make_folders(resolved: ResolvedEvaluation, options: EvaluateOptions, work: Path) -> None:
    for option, folder in (("--out", work), ("--images", options.images)):
        try:
            if folder:
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"{option}: {str(folder)!r} cannot be made: {error.strerror}") from error
    try:
        write_atomic(work / "manifest.json", _text(resolved.manifest).encode())
    except OSError as error:
        raise InputError(f"--out: {str(work)!r} cannot be written: {error.strerror}") from error


def _check_shared(m: Manifest, work: Path, world: World) -> None:
    """Check that this rank sees rank 0's folder."""
    path = work / "manifest.json"
    if not path.is_file() or path.read_bytes() != _text(m).encode():
        raise InputError(f"{path} is not what rank 0 wrote: --out must be on a file system that all nodes share")


def _text(m: Manifest) -> str:
    return json.dumps(asdict(m), indent=1) + "\n"


def _sample(resolved: ResolvedEvaluation, blocks: Blocks, mine: list[int], device: torch.device, world: World) -> None:
    """Sample this rank's blocks and write their features."""
    m = resolved.manifest
    net = network(resolved.weights, device).to(torch.bfloat16 if m.precision == "bf16" else torch.float32)
    extractor, clip = resolved.standard.extractor if resolved.standard else None, resolved.clip
    for encoder in (extractor, clip):
        if encoder:
            encoder.to(device)
    with tqdm(total=m.count, initial=blocks.images_done(), unit="img", disable=not world.main, **_bar_style()) as bar:
        for block in mine:
            samples = generate_images(blocks.images, block, net, extractor, device, clip=clip)
            if not samples.finite:
                raise InputError(not_finite(m.weights.path))
            for path, image in zip(blocks.pngs(block), samples.pixels, strict=False):
                write_png(path, image)
            try:
                if blocks.with_pixels:
                    blocks.write_pixels(block, samples.pixels)
                blocks.write(block, samples)
            except OSError as error:
                raise InputError(f"--out: {str(blocks.folder)!r} cannot be written: {error.strerror}") from error
            if world.main:
                bar.update(blocks.images_done() - bar.n)


def _meet(world: World, problem: str | None, exhausted: str | None, group: Any) -> None:
    """Sync all ranks, as `dist.agree`; a rank that has died raises RankLost on the others, and one whose memory was
    `exhausted` a RunError on all."""
    try:
        agree(world, problem, group)
        lacking = [line for line in gather(world, exhausted, group) if line]
        if lacking:
            raise RunError(lacking[0])
    except RuntimeError as error:
        raise RankLost("another rank was lost; the same command resumes with the images that are missing") from error


def _score(resolved: ResolvedEvaluation, options: EvaluateOptions, blocks: Blocks) -> Scored:
    """Compute the scores from all blocks, and write everything."""
    scores = dict[str, float | None]()
    if resolved.standard:
        scores |= score(blocks.read("features"), blocks.read("logits"), resolved.standard.reference)
    if resolved.clip:
        subjects = [blocks.images.subject(n) for n in range(blocks.images.count)]
        with one_thread():
            texts = resolved.clip.texts(resolved.prompts).cpu().numpy()
        scores |= fit(blocks.read("fit"), texts, subjects, resolved.clip.name)
    scored = Scored(resolved.manifest, scores)
    _finished(resolved, options, blocks)  # another evaluation may have written there meanwhile
    if options.npz:
        write_npz(options.npz, blocks)
    write_scores(resolved.out, scored)
    return scored


def _say(resolved: ResolvedEvaluation, scored: Scored, world: World) -> None:
    m = scored.manifest
    kind = "EMA" if m.ema else "raw weights"
    world.say(f"{resolved.out}: {m.count:,} images from the {kind} of {m.weights.path}")
    for name, value in scored.scores.items():
        shown = "not computed" if value is None else f"{value:.6g}"
        if resolved.recorded:
            before = resolved.recorded.scores.get(name)
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
            warn(f"{name} is {now!r}, but {before!r} was recorded")
            return 1
    return 0


def _bar_style() -> dict[str, Any]:
    terminal = os.isatty(2)
    return {"mininterval": 0.5 if terminal else 10.0, "dynamic_ncols": terminal}
