"""`megapix export`, `import` and `reshard`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import tyro

from megapix import config, console
from megapix.dist import World
from megapix.errors import InputError
from megapix.files import check_writable


@dataclass(frozen=True)
class ExportOptions:
    """Write the EMA (or raw) weights of a run or checkpoint as one safetensors file, a chunk at a time, with
    the configuration in its metadata. Or write what other programs load."""

    path: tyro.conf.Positional[Path]
    """Run folder (its newest whole checkpoint) or checkpoint folder;
    for other formats than safetensors also an exported file or imported folder."""
    out: Path
    """File to write, such as pixeldit.safetensors; `megapix sample`, `load_model` and `train --init` read it.
    For diffusers a new folder."""
    format: Literal["safetensors", "nvlabs", "comfyui", "diffusers"] = "safetensors"
    """'nvlabs' writes a torch file (.ckpt, .pth) with the authors' names, 'comfyui' a safetensors file of a text
    network for ComfyUI, 'diffusers' a folder in diffusers' layout, which samples by its own pipeline.py:
    docs/weights.md."""
    shard_gib: float = 10.0
    """For diffusers: GiB of weights in a file, above which there are several."""
    raw: bool = False
    """Export the raw weights instead of the EMA (the default)."""
    ema: bool = False
    """Export the EMA (the default). With --raw, nvlabs writes both into one file."""


def export(arguments: list[str], world: World) -> int:
    """Export weights for use outside training."""
    options: ExportOptions = console.parse(ExportOptions, arguments, "megapix export", world.main)
    theirs = options.format == "nvlabs"
    if options.raw and options.ema and not theirs:
        raise InputError("--ema and --raw: expected one of them")
    check_writable("--out", options.out)
    shard_bytes = _shard_bytes(options.shard_gib)
    from megapix.weights import nvlabs, read, write

    if options.format in ("comfyui", "diffusers"):
        weights = read.stored_weights(options.path, False if options.raw else True if options.ema else None)
        if options.format == "comfyui":
            from megapix.ports import comfyui

            written = [comfyui.write(weights, options.out)]
        else:
            from megapix.ports import diffusers

            written = [diffusers.write(weights, options.out, shard_bytes)]
    elif theirs:
        kinds = [kind for kind, flag in ((True, options.ema), (False, options.raw)) if flag]
        written = nvlabs.export(options.path, options.out, kinds or [None])
    else:
        written = [write.export(options.path, options.out, not options.raw)]
    for about in written:
        print(f"megapix: {options.out}: the {about.kind} of {about.source}")
    if different := config.unlike_released(written[0].model, written[0].text):
        print(
            f"megapix: note: the released code and its ports do not run this network as it is: {'; '.join(different)}"
        )
    return 0


@dataclass(frozen=True)
class PushOptions:
    """Make a model repository on the Hugging Face hub of a run's weights: a folder as by `export --format diffusers`,
    with a model card of the run's data, counters, curves and last samples."""

    path: tyro.conf.Positional[Path]
    """Run folder (its newest whole checkpoint), checkpoint folder, exported file or imported folder."""
    repo: tyro.conf.Positional[str]
    """OWNER/NAME of the repository; it is made if it is not there."""
    license: str
    """Licence of the weights, as the hub names it, such as apache-2.0 or other."""
    raw: bool = False
    """Push the raw weights instead of the EMA."""
    private: bool = False
    """Make a private repository."""
    shard_gib: float = 10.0
    """GiB of weights in a file, above which there are several."""


def push(arguments: list[str], world: World) -> int:
    """Push weights to the hub."""
    options: PushOptions = console.parse(PushOptions, arguments, "megapix push", world.main)
    shard_bytes = _shard_bytes(options.shard_gib)
    from megapix.ports import hub

    ema = False if options.raw else None
    address = hub.push(options.path, options.repo, options.license, ema, options.private, shard_bytes)
    print(f"megapix: {options.path} is at {address}; megapix.load('hf://{options.repo}') loads it")
    return 0


def _shard_bytes(gib: float) -> int:
    if not 0 < gib < float("inf"):
        raise InputError(f"--shard-gib = {gib}: expected above 0")
    return int(gib * 2**30)


@dataclass(frozen=True)
class ImportOptions:
    """Make a folder from a checkpoint that the authors of PixelDiT released: model.safetensors with the configuration
    in its metadata, and config.json. The network is recognised by its shapes; the numbers stay as they are."""

    checkpoint: tyro.conf.Positional[Path]
    """Torch file (.ckpt, .pth) or safetensors with the authors' names, behind denoiser., ema_denoiser., another prefix
    or none; of several safetensors files one of them, their index, or the folder."""
    out: Path
    """New folder; `megapix sample`, `export`, `load_model` and `train --init` read it."""
    ema: bool = False
    """Import the EMA; the default is the EMA if there is one, else the raw weights."""
    raw: bool = False
    """Import the raw weights."""
    trust: bool = False
    """Load a file that holds more than tensors too, which may run code in it: only if you trust its source."""
    image_size: int | None = None
    """Height and width in pixels that the weights were trained at, by default 256, or 1024 with text;
    the sampling defaults are those of that size's preset."""
    convention: config.Convention | None = None
    """Of a network that takes text: 'released' (the default), or 'paper' for weights that this program has trained so
    (model.convention); neither names nor shapes tell."""
    guidance: float | None = None
    """Guidance scale to sample with by default, 1 is off, by default the preset's."""
    interval: tuple[float, float] | None = None
    """Guidance acts for t strictly between these, by default the preset's."""
    shift: float | None = None
    """Time shift of the sampler's grid, by default the preset's."""


def import_(arguments: list[str], world: World) -> int:
    """Import released weights."""
    options: ImportOptions = console.parse(ImportOptions, arguments, "megapix import", world.main)
    if options.raw and options.ema:
        raise InputError("--ema and --raw: expected one of them")
    from megapix.weights import nvlabs
    from megapix.weights.read import first
    from megapix.weights.write import write_model

    released = nvlabs.read(options.checkpoint, options.ema if options.ema or options.raw else None, options.trust)
    weights = nvlabs.weights_of(released, options.image_size, options.checkpoint, options.convention)
    sampling = config.override_sampling(
        weights.about.sampling, options.interval, guidance=options.guidance, shift=options.shift
    )
    about = replace(weights.about, sampling=sampling)
    write_model(options.out, replace(weights, about=about))
    print(f"megapix: {options.out}: the {about.kind} of {about.source}: {nvlabs.describe(about.model)}")
    print(f"megapix: taken from {released.place}")
    if released.ignored:
        print(f"megapix: not taken, as they belong to neither the EMA nor the raw weights: {first(released.ignored)}")
    return 0


@dataclass(frozen=True)
class ReshardOptions:
    """Rewrite a checkpoint for another number of ranks, equal bit for bit. Resuming needs no such step: any number of
    ranks reads any checkpoint."""

    path: tyro.conf.Positional[Path]
    """Run folder (its newest whole checkpoint) or checkpoint folder."""
    out: Path
    """New run folder, with that one checkpoint."""
    ranks: int
    """Number of ranks to write it for, one file each."""


def reshard(arguments: list[str], world: World) -> int:
    """Rewrite a checkpoint."""
    options: ReshardOptions = console.parse(ReshardOptions, arguments, "megapix reshard", world.main)
    if options.ranks < 1:
        raise InputError(f"--ranks = {options.ranks}: expected at least 1")
    from megapix.checkpoint.find import find
    from megapix.checkpoint.reshard import reshard

    saved = find(options.path, world)
    folder = reshard(saved, options.ranks, options.out)
    print(f"megapix: {folder}: {saved.folder} for {options.ranks} ranks")
    return 0
