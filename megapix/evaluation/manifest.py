"""The manifest of a score: everything that decides its value, with hashes; and the file that holds both."""

from __future__ import annotations

import hashlib
import json
import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megapix.config import Generator, SamplingConfig
from megapix.errors import InputError
from megapix.evaluation.options import Precision
from megapix.files import write_atomic

FORMAT, VERSION = "megapix-score", 1
PACKAGES = ("megapix", "torch", "numpy", "efficientnet_lite_pytorch", "torch-fidelity", "transformers", "tokenizers")
"""Their versions are recorded, where they are installed."""
SOURCES = ("weights", "extractor_weights", "reference", "prompts", "text_encoder", "clip")
"""The members of a manifest that say what a file holds."""


@dataclass(frozen=True)
class Source:
    """A file or checkpoint that a score depends on."""

    path: str
    """Where it was; not part of the manifest's key."""
    sha256: str
    """Of weights: hash of names, shapes and values in fp32, the same for a checkpoint of any number of ranks and for an
    exported file. Of prompts: of their text, a JSON string a line. Of a text encoder: its digest. Else of the file."""


@dataclass(frozen=True)
class Manifest:
    """One evaluation. Equal manifests, apart from paths, mean equal images and equal scores."""

    weights: Source
    ema: bool
    images_seen: int
    sampling: SamplingConfig
    size: tuple[int, int]
    """Height and width in pixels."""
    classes: tuple[int, ...]
    count: int
    batch: int
    seed: int
    precision: Precision
    extractor: str
    extractor_weights: Source
    """Without a path where the extractor comes with its weights."""
    reference: Source
    data_digest: str
    """Identity of the reference's data set; empty where its file does not say."""
    reference_count: int
    """Images of the reference's moments; 0 where its file does not say."""
    device: str
    """Name of the GPU of rank 0, or 'cpu'."""
    versions: dict[str, str]
    prompts: Source = Source("", "")
    """Of a network that takes text, the hash of the prompts in their order; without a hash where it takes classes."""
    text_encoder: Source = Source("", "")
    """Of a network that takes text, the folder or hub name and the digest; no path where features were stored."""
    text_features: dict[str, str | int | float | bool] = field(default_factory=dict)
    """Of a network that takes text, whether they were stored, and the options that they were made with."""
    generator: Generator = "torch"
    """Of the noise, as the weights say; scores from before there was another one do not name it."""
    initial_share: float | None = None
    """Of an EMA, the share that is still the weights that its run began with; the weights' hash has it already."""

    clip: Source = Source("", "")
    """CLIP or SigLIP, and the hash of its weights and of what goes with them; without a hash where none scores."""

    @property
    def key(self) -> str:
        """SHA-256 of everything but paths, and but what follows from the weights."""
        data = asdict(self)
        del data["initial_share"]
        for name in SOURCES:
            del data[name]["path"]
        if not self.clip.sha256:  # as before there was one
            del data["clip"]
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Scored:
    """A score file."""

    manifest: Manifest
    scores: dict[str, float | None]


def versions() -> dict[str, str]:
    """Versions of what computes a score."""
    installed = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            installed[package] = version(package)
        except PackageNotFoundError:
            continue
    return installed


def write_scores(path: Path, scored: Scored) -> None:
    """Write a score file, whole or not at all.

    Raises:
        InputError: it cannot be written.
    """
    data = {"format": FORMAT, "version": VERSION, "scores": scored.scores, "manifest": asdict(scored.manifest)}
    try:
        write_atomic(path, (json.dumps(data, indent=1) + "\n").encode())
    except OSError as error:
        raise InputError(f"--out {str(path)!r} cannot be written: {error.strerror}") from error


def read_scores(path: Path, option: str) -> Scored:
    """Read a score file that `option` names.

    Raises:
        InputError: missing, or not a score file of this version.
    """
    import pydantic  # late: only files need it

    try:
        data: Any = json.loads(path.read_bytes())
        if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"it is no {FORMAT} of version {VERSION}")
        return pydantic.TypeAdapter(Scored).validate_python({k: data[k] for k in ("manifest", "scores")})
    except OSError as error:
        raise InputError(f"{option} {str(path)!r}: cannot be read: {error.strerror}") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise InputError(f"{option} {str(path)!r}: not a score file: {where}: {first['msg'].lower()}") from error
    except (ValueError, KeyError) as error:
        raise InputError(f"{option} {str(path)!r}: not a score file: {error}") from error
