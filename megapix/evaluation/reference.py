"""What samples are scored against: reference statistics, and the extractor that they were made with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from megapix.encoders.scoring import Extractor, open_extractor
from megapix.errors import InputError
from megapix.shards.statistics import Reference, read_reference


@dataclass(frozen=True)
class Standard:
    """Reference statistics and their extractor."""

    path: Path
    """The reference's file."""
    sha256: str
    """Its hash."""
    reference: Reference
    extractor: Extractor

    def cautions(self, what: str, count: int) -> list[str]:
        """Warnings about the scores of `count` images; `what` names the count."""
        cautions, width = [], self.extractor.width
        for name, images in ((what, count), ("the reference's count", self.reference.moments.count)):
            if 0 < images <= width:
                cautions.append(
                    f"{name} = {images} is not above the {width} features of {self.extractor.name}: the covariance of "
                    "so few images is singular, and the Fréchet distance too high; compare it only with others of the "
                    "same counts"
                )
        if not len(self.reference.features):
            cautions.append(f"{self.path} holds no features: no KID, no precision and recall")
        return cautions


def open_standard(path: Path, weights: Path | None, extractor: str | None = None, prefix: str = "--") -> Standard:
    """Read reference statistics and load their extractor on the CPU; torch's random state is left as it was.

    Args:
        weights: file of the extractor's weights, where they are the user's.
        extractor: the requested one; None takes the reference's.
        prefix: of the options `reference` and `extractor-weights` in messages.

    Raises:
        InputError: the reference cannot be read or is of another extractor or other weights, or the extractor's extra
            or file is missing.
    """
    option = f"{prefix}reference"
    reference, sha256 = read_reference(path, option)
    name = extractor or reference.extractor
    if name != reference.extractor:
        raise InputError(f"{option} {str(path)!r} is of extractor {reference.extractor}, but {name} was asked for")
    with torch.random.fork_rng(devices=[]):  # networks are filled with random numbers before their weights are read
        opened = open_extractor(name, weights, f"{prefix}extractor-weights")
    if reference.extractor_sha256 not in ("", opened.sha256):
        raise InputError(
            f"{option} {str(path)!r} was made with weights {reference.extractor_sha256[:16]}… of the extractor "
            f"{name}, but these are {opened.sha256[:16]}…"
        )
    if (width := len(reference.moments.mu)) != opened.width:
        raise InputError(f"{option} {str(path)!r} is of {width} features, but {name} has {opened.width}")
    return Standard(path, sha256, reference, opened)
