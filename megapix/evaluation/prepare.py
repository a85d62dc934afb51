"""From options to a resolved evaluation: everything is checked here, before an image is sampled."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from megapix import config
from megapix.conditioning.conditioner import Classes
from megapix.conditioning.prompts import Prompted, of_prompts
from megapix.conditioning.text_source import read_prompts
from megapix.dist import World, agree, gather, on_all_ranks
from megapix.encoders.clip import ImageText
from megapix.encoders.clip import load as load_clip
from megapix.errors import InputError
from megapix.evaluation.images import Images
from megapix.evaluation.manifest import Manifest, Scored, Source, read_scores, versions
from megapix.evaluation.options import PLACES, EvaluateOptions
from megapix.evaluation.reference import Standard, open_standard
from megapix.evaluation.scores import one_thread
from megapix.files import check_writable
from megapix.weights.about import About, Weights
from megapix.weights.read import load_weights

COUNT, BATCH = 50_000, 64
NONE = Source("", "")
"""Of what does not take part."""


@dataclass(frozen=True)
class ResolvedEvaluation:
    """An evaluation that can start."""

    manifest: Manifest
    weights: Weights
    standard: Standard | None
    """What images are compared with; None where these are their prompts alone."""
    out: Path
    images: Images
    recorded: Scored | None
    """What --repeat is compared with."""
    clip: ImageText | None = None
    """Scores how well images fit their prompts, if asked for."""
    prompts: Sequence[str] = ()
    """Of a network that takes text."""


def resolve(options: EvaluateOptions, world: World, device: torch.device) -> ResolvedEvaluation:
    """Read and check everything; every rank calls it.

    Raises:
        InputError: the first thing that is wrong, on every rank.
    """
    recorded = on_all_ranks(world, lambda: _recorded(options))
    path = options.path or (Path(recorded.manifest.weights.path) if recorded else None)
    agree(
        world, None if path else "PATH is missing: expected a run, a checkpoint, an exported file or an imported folder"
    )
    assert path is not None
    weights = load_weights(path, recorded.manifest.ema if recorded else False if options.raw else None, world)
    resolved = on_all_ranks(world, lambda: _resolve(options, recorded, weights, device))
    theirs = gather(world, resolved.manifest)[0]
    same = resolved.manifest.key == replace(theirs, device=resolved.manifest.device).key
    agree(world, None if same else f"expected what rank 0 evaluates, {theirs}, but this is {resolved.manifest}")
    return replace(resolved, manifest=theirs)


def _recorded(options: EvaluateOptions) -> Scored | None:
    if options.repeat is None:
        return None
    for name, default in vars(EvaluateOptions()).items():
        if name not in PLACES and getattr(options, name) != default:
            raise InputError(f"--{name.replace('_', '-')} cannot be given with --repeat: {options.repeat} says it")
    return read_scores(options.repeat, "--repeat")


def _resolve(
    options: EvaluateOptions, recorded: Scored | None, weights: Weights, device: torch.device
) -> ResolvedEvaluation:
    then, about = recorded.manifest if recorded else None, weights.about
    takes_text = _takes_text(options, about)
    path = options.reference or (Path(then.reference.path) if then else None)
    if then and not then.reference.sha256:
        path = None
    name = options.clip or (then.clip.path if then else "")
    if path is None and not name:
        raise InputError("--reference is missing: expected statistics by 'data_prep stats', or ADM's .npz file")
    extractor_path = options.extractor_weights
    if extractor_path is None and then and then.extractor_weights.path:
        extractor_path = Path(then.extractor_weights.path)
    standard = open_standard(path, extractor_path, then.extractor if then else options.extractor) if path else None
    sources = {"weights": Source(str(Path(about.source).resolve()), weights_sha256(weights.tensors))}
    if standard and path:
        there = str(extractor_path.resolve()) if extractor_path else ""
        sources["extractor_weights"] = Source(there, standard.extractor.sha256)
        sources["reference"] = Source(str(path.resolve()), standard.sha256)
    clip = load_clip(name, "--clip") if name else None
    if clip:
        sources["clip"] = Source(str(Path(name).resolve()) if Path(name).is_dir() else name, clip.sha256)
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    if then:
        _require(options, then, sources)
        manifest = replace(then, **sources, device=gpu, versions=versions())  # type: ignore[arg-type]
    else:
        manifest = Manifest(
            weights=sources["weights"],
            extractor_weights=sources.get("extractor_weights", NONE),
            reference=sources.get("reference", NONE),
            clip=sources.get("clip", NONE),
            ema=about.ema,
            images_seen=about.images_seen,
            sampling=config.override_sampling(
                about.sampling,
                options.interval,
                sampler=options.sampler,
                steps=options.steps,
                guidance=options.guidance,
                shift=options.shift,
            ),
            size=options.size or (about.image_size, about.image_size),
            classes=tuple(range(about.model.num_classes)) if options.classes is None else options.classes,
            count=COUNT if options.count is None else options.count,
            batch=BATCH if options.batch is None else options.batch,
            seed=options.seed or 0,
            precision=options.precision or "fp32",
            extractor=standard.extractor.name if standard else "",
            data_digest=standard.reference.data_digest if standard else "",
            reference_count=standard.reference.moments.count if standard else 0,
            device=gpu,
            versions=versions(),
            generator=about.generator,
            initial_share=about.initial_share,
        )
    _check(manifest, about)
    out, subjects, prompts = _out(options), manifest.classes, list[str]()
    condition_of = Classes(about.model.num_classes, device).of_subjects
    if takes_text:
        manifest, prompted, prompts = _prompted(options, then, manifest, about, device)
        subjects, condition_of = tuple(range(prompted.conditioner.subjects)), prompted.conditioner.of_subjects
    m = manifest
    images = Images(m.count, m.batch, subjects, condition_of, m.seed, m.size, m.sampling, m.generator)
    return ResolvedEvaluation(manifest, weights, standard, out, images, recorded, clip, prompts)


def _require(options: EvaluateOptions, then: Manifest, sources: dict[str, Source]) -> None:
    """Refuse to repeat an evaluation with something else than was evaluated."""
    for what, source in sources.items():
        if source.sha256 != (expected := getattr(then, what).sha256):
            raise InputError(
                f"--repeat {str(options.repeat)!r}: {what.replace('_', ' ')} {source.path!r} with sha256 "
                f"{source.sha256[:16]}…, but {expected[:16]}… was evaluated"
            )


def _takes_text(options: EvaluateOptions, about: About) -> bool:
    """Whether the network takes text; options of the other kind are refused."""
    if about.model.text_width:
        if options.classes is not None:
            raise InputError(f"--classes: {about.source} takes text, not classes (--prompts)")
        return True
    for option, given in (("--prompts", options.prompts), ("--encoder", options.encoder), ("--clip", options.clip)):
        if given:
            raise InputError(f"{option} = {str(given)!r}: {about.source} takes classes, not text (--classes)")
    return False


def _prompted(
    options: EvaluateOptions, then: Manifest | None, manifest: Manifest, about: About, device: torch.device
) -> tuple[Manifest, Prompted, list[str]]:
    """The manifest with its members about text, the prompts' condition, and the prompts."""
    path, name = options.prompts, options.encoder
    if then:
        path, name = path or Path(then.prompts.path), name or then.text_encoder.path
    if path is None:
        raise InputError(
            f"{about.source} takes text: expected --prompts, a file with one prompt per line, or a shard folder"
        )
    prompts = list(read_prompts(path, "--prompts")[: manifest.count])
    with one_thread() if device.type == "cpu" else nullcontext():  # as images are sampled
        prompted = of_prompts(about, path, prompts, device, name)
    lines = "".join(f"{json.dumps(prompt)}\n" for prompt in prompts)
    encoder = "" if prompted.stored else name or about.text.encoder
    if encoder and Path(encoder).is_dir():  # not a name on the hub
        encoder = str(Path(encoder).resolve())
    sources = {
        "prompts": Source(str(path.resolve()), hashlib.sha256(lines.encode()).hexdigest()),
        "text_encoder": Source(encoder, prompted.recipe.digest),
    }
    if then:
        _require(options, then, sources)
    features = {"stored": prompted.stored} | {k: v for k, v in prompted.recipe.to_dict().items() if k != "digest"}
    if about.model.convention != "paper":  # the weights' hash does not know it
        features["convention"] = about.model.convention
    return replace(manifest, **sources, text_features=features), prompted, prompts  # type: ignore[arg-type]


def _check(manifest: Manifest, about: About) -> None:
    config.validate_sampling(manifest.sampling)
    for name, least in (("count", 2), ("batch", 1)):
        if getattr(manifest, name) < least:
            raise InputError(f"--{name} = {getattr(manifest, name)}: expected at least {least}")
    config.validate_seed(manifest.seed)
    if not manifest.classes and about.model.num_classes:
        raise InputError("--classes names no class")
    for c in manifest.classes:
        if not 0 <= c < about.model.num_classes:
            raise InputError(f"--classes: class {c} does not exist: expected 0 to {about.model.num_classes - 1}")
    (height, width), patch = manifest.size, about.model.patch_size
    if min(manifest.size) < patch or height % patch or width % patch:
        raise InputError(f"--size {height} {width}: expected multiples of the patch size {patch}")


def _out(options: EvaluateOptions) -> Path:
    out = options.out or Path("score.json")
    if options.repeat and not options.out:
        out = options.repeat.with_name(f"{options.repeat.stem}-repeated.json")
    if options.repeat and out.resolve() == options.repeat.resolve():
        raise InputError(f"--out {str(out)!r} is what --repeat is compared with; expected another file")
    for option, path in (("--out", out), ("--npz", options.npz)):
        if path:
            check_writable(option, path)
    if options.images and options.images.exists() and not options.images.is_dir():
        raise InputError(f"--images {str(options.images)!r} is not a folder")
    return out


def weights_sha256(tensors: dict[str, Tensor]) -> str:
    """Hash of names, shapes and fp32 values, the same for any file that holds the weights."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        values = tensors[name].float().contiguous()
        digest.update(f"{name} {tuple(values.shape)}\n".encode())
        digest.update(values.numpy().tobytes())
    return digest.hexdigest()
