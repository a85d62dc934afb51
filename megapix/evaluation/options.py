"""The options of `megapix evaluate`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megapix.config import Sampler

Precision = Literal["fp32", "bf16"]
PLACES = ("path", "reference", "extractor_weights", "prompts", "encoder", "clip", "out", "images", "npz", "repeat")
"""Options that say where something lies; all others say what is evaluated, and are refused with --repeat."""


@dataclass(frozen=True)
class EvaluateOptions:
    """Score the images of a run, a checkpoint, an exported file or an imported folder against reference statistics, on
    one process or on every rank of a launcher. The same command resumes after an interruption."""

    path: tyro.conf.Positional[Path | None] = None
    """Run folder (its newest whole checkpoint), checkpoint folder, exported file, or imported folder;
    with --repeat the manifest's."""
    reference: Path | None = None
    """Reference statistics by `data_prep stats`, or one of ADM's .npz files; with --repeat the manifest's."""
    out: Path | None = None
    """JSON file for the scores and their manifest; score.json, or with --repeat MANIFEST's name with -repeated."""
    repeat: Path | None = None
    """Repeat the evaluation of this file of scores, and compare the scores;
    refused if weights, extractor, reference or prompts have changed. Only paths may be given with it."""
    extractor: Literal["effnet_lite0", "inception"] | None = None
    """Feature extractor, by default the reference's."""
    extractor_weights: Path | None = None
    """Weights file of the extractor inception."""
    count: int | None = None
    """Images to sample, by default 50,000."""
    classes: tuple[int, ...] | None = None
    """Image number n has class n modulo their number, by default all classes in order."""
    prompts: Path | None = None
    """For a network that takes text: a file with one prompt per line, or a shard folder for its first captions;
    image number n has prompt n modulo their number."""
    encoder: str = ""
    """Folder or hub name of the text encoder;
    by default the text features stored in --prompts, or else the run's encoder."""
    clip: str = ""
    """For a network that takes text: folder or hub name of a CLIP or SigLIP, which scores how well images fit their
    prompts. With it --reference may be left out; with --repeat the manifest's."""
    raw: bool = False
    """Use the raw weights instead of the EMA."""
    seed: int | None = None
    """Seed of the noise, by default 0; an image depends on it and its own number, not on the number of ranks."""
    precision: Precision | None = None
    """dtype of the network's weights and activations for sampling, by default fp32."""
    batch: int | None = None
    """Images sampled at once, by default 64: the block that ranks share out and that an interruption loses."""
    sampler: Sampler | None = None
    """Sampler, by default the run's."""
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
    images: Path | None = None
    """Folder that also gets every image as PNG, NUMBER-CLASS.png or NUMBER-PROMPT.png, all of them numbers."""
    npz: Path | None = None
    """File that also gets all images, as ADM's evaluator reads them: arr_0, uint8 [N, H, W, 3]."""
