"""Reference statistics: what an extractor says of real images, in one .npz file.

    mu        float64 [D]       mean of the features
    sigma     float64 [D, D]    their covariance (divided by n - 1)
    count     int64             images that both are of
    features  float32 [M, D]    features of some of these images, evenly spread, for KID, precision and recall
    about     text              JSON: format, extractor, hash of its weights, digest of the data set

`data_prep stats` writes it, `megapix evaluate` and training read it; they also know ADM's reference batches, of which
only `mu` and `sigma` are read (they are of `inception`, and have no count and no features).
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megapix.errors import InputError
from megapix.files import sha256_of, size_of, write_atomic
from megapix.outage import persist

FORMAT, VERSION = "megapix-stats", 1
ADM_EXTRACTOR, ADM_WIDTH = "inception", 2048


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features."""

    mu: NDArray[np.float64]
    """[D]"""
    sigma: NDArray[np.float64]
    """[D, D]"""
    count: int
    """Images; 0 where a file does not say."""


class Sums:
    """Adds features up in float64. The same batches in the same order, in one thread, give the same bits; so do blocks
    of them that are counted apart and merged in the same order."""

    def __init__(self, width: int) -> None:
        self.count = 0
        self._sum = torch.zeros(width, dtype=torch.float64)
        self._products = torch.zeros(width, width, dtype=torch.float64)

    def add(self, features: NDArray[np.float32]) -> None:
        """Count features [B, D] in."""
        values = torch.from_numpy(features).double()
        self.count += len(values)
        self._sum += values.sum(0)
        self._products.addmm_(values.T, values)

    def counted(self) -> dict[str, Any]:
        """What was added, for `merge` of another process: count int64, sum float64 [D], products float64 [D, D]."""
        return {"count": np.array(self.count), "sum": self._sum.numpy(), "products": self._products.numpy()}

    def merge(self, counted: Mapping[str, NDArray[Any]]) -> None:
        """Count in what another one has counted."""
        self.count += int(counted["count"])
        self._sum += torch.from_numpy(counted["sum"])
        self._products += torch.from_numpy(counted["products"])

    def moments(self) -> Moments:
        """Mean and covariance of all that was added: two vectors at least."""
        mu = self._sum / self.count
        sigma = (self._products - self.count * torch.outer(mu, mu)) / (self.count - 1)
        return Moments(mu.numpy(), sigma.numpy(), self.count)


@dataclass(frozen=True)
class Reference:
    """What a reference file holds."""

    moments: Moments
    features: NDArray[np.float32]
    """[M, D]; M is 0 where the file has none."""
    extractor: str
    extractor_sha256: str
    """Hash of the extractor's weights; empty where the file does not say."""
    data_digest: str
    """The data set's; empty where the file does not say."""


def write_reference(path: Path, reference: Reference) -> None:
    """Write the file, whole or not at all; equal statistics give equal bytes.

    Raises:
        InputError: it cannot be written.
    """
    about = {
        "format": FORMAT,
        "version": VERSION,
        "extractor": reference.extractor,
        "extractor_sha256": reference.extractor_sha256,
        "data_digest": reference.data_digest,
    }
    data, moments = io.BytesIO(), reference.moments
    np.savez(
        data,
        mu=moments.mu,
        sigma=moments.sigma,
        count=np.int64(moments.count),
        features=reference.features,
        about=np.array(json.dumps(about)),
    )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data.getvalue())
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def read_reference(path: Path, option: str = "--reference") -> tuple[Reference, str]:
    """A reference file, which `option` names, and its SHA-256.

    Raises:
        InputError: no such file, or neither reference statistics nor one of ADM's reference batches.
        StorageError: it cannot be read now.
    """
    if size_of(path) is None:
        raise InputError(f"{option} {str(path)!r} is no file; 'data_prep stats SHARDS --out STATS.npz' makes one")

    def once() -> Reference:
        with np.load(path, allow_pickle=False) as file:
            return _ours(file) if "about" in file else _adms(file)

    try:
        reference = persist(path, once)
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise InputError(f"{option} {str(path)!r}: cannot be read as reference statistics: {reason}") from error
    return reference, sha256_of(path)


def _ours(file: Any) -> Reference:
    about = json.loads(str(file["about"]))
    if (found := (about["format"], about["version"])) != (FORMAT, VERSION):
        raise ValueError(f"format and version are {found}, expected {(FORMAT, VERSION)}")
    moments, features = _moments(file, int(file["count"])), np.asarray(file["features"], np.float32)
    if features.ndim != 2 or features.shape[1] != len(moments.mu):
        raise ValueError(f"features {features.shape} do not fit mu {moments.mu.shape}")
    says = [about[key] for key in ("extractor", "extractor_sha256", "data_digest")]
    if not all(isinstance(text, str) for text in says):
        raise ValueError(f"extractor, its sha256 and the data's digest are {says}, expected texts")
    return Reference(moments, features, *says)


def _adms(file: Any) -> Reference:
    moments = _moments(file, 0)
    if len(moments.mu) != ADM_WIDTH:
        raise ValueError(f"mu has {len(moments.mu)} numbers, but those of ADM's reference batches have {ADM_WIDTH}")
    return Reference(moments, np.zeros((0, ADM_WIDTH), np.float32), ADM_EXTRACTOR, "", "")


def _moments(file: Any, count: int) -> Moments:
    mu, sigma = np.asarray(file["mu"], np.float64), np.asarray(file["sigma"], np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu {mu.shape} and sigma {sigma.shape} are not a mean and its covariance")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise ValueError("mu or sigma holds numbers that are not finite")
    return Moments(mu, sigma, count)
