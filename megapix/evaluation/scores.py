"""Scores from features and logits alone, in float64 and one CPU thread, so that the number of cores changes no bit.

Fréchet distance        |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁^½ Σ₂ Σ₁^½)^½)          Heusel et al. 2017
inception score         exp of the mean KL divergence p(y|x) ‖ p(y)             Salimans et al. 2016
KID                     unbiased MMD² under the kernel (x·y / D + 1)³           Bińkowski et al. 2018
fit                     100 · max(0, cos(image, prompt)), and how often no      Hessel et al. 2021,
                        other prompt fits an image better                       Park et al. 2021
precision and recall    share of one set in the k-NN balls of the other, k = 3  Kynkäänniemi et al. 2019
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megapix.shards.statistics import Moments, Reference, Sums

Features = NDArray[np.float32]
"""[N, D]"""
SPLIT = 5000
"""Images of one inception score, as in ADM's evaluator; the mean over such parts is reported."""
NEIGHBOURS = 3
ROWS = 1024
"""Rows of a matrix of pairs that are in memory at a time."""


def score(features: Features, logits: NDArray[np.float32], reference: Reference) -> dict[str, float | None]:
    """Every score by its name; None where the reference has no features to compute it from.

    KID, precision and recall compare sets of equal size (Kynkäänniemi et al., section 2): as many of the first images
    as the reference has features, or all of them with that many of its features.

    Args:
        features: [N, D] of the images, N at least 2, in the order of their numbers.
        logits: [N, K].
        reference: statistics of the same extractor.
    """
    name = reference.extractor
    names = ("fid", "inception_score", "inception_score_std", "kid", "precision", "recall")
    if name != "inception":  # those names mean Inception's features
        kinds = ("fd", "is", "is_std", "kid", "precision", "recall")
        names = tuple(f"{kind}_{name}" for kind in kinds)  # type: ignore[assignment]
    count = min(len(features), len(reference.features))
    made, real = features[:count], evenly(reference.features, count)
    with one_thread():
        by_pairs = (kid(made, real), *precision_recall(made, real)) if count > NEIGHBOURS else (None, None, None)
        distance = frechet_distance(moments(features), reference.moments)
        return dict(zip(names, (distance, *inception_score(logits), *by_pairs), strict=True))


def fit(images: Features, texts: Features, subjects: Sequence[int], name: str) -> dict[str, float | None]:
    """How well images fit their prompts: 'NAME_score', the mean of 100 · max(0, cos) without Hessel's factor 2.5, and
    'NAME_adherence', the share of images that none of the prompts fits better than their own; None with one prompt.

    Args:
        images: vectors of length 1 [N, E].
        texts: those of the prompts [P, E].
        subjects: each image's prompt.
    """
    right, cosines, first = torch.from_numpy(texts).double().T, list[float](), 0
    for start, rows in zip(range(0, len(images), ROWS), _parts(images), strict=True):
        every = rows @ right  # [rows, P]
        own = every.gather(1, torch.tensor(subjects[start : start + ROWS])[:, None])
        first += int((own >= every.amax(1, keepdim=True)).sum())  # a prompt that is there twice is its own equal
        cosines += own.flatten().tolist()
    adherence = first / len(images) if len(texts) > 1 else None
    return {f"{name}_score": 100.0 * float(np.mean(np.maximum(cosines, 0.0))), f"{name}_adherence": adherence}


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch's CPU operators use one thread: matmuls sum in another order on several."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def evenly(rows: Features, count: int) -> Features:
    """`count` of the rows, evenly spread."""
    return rows[np.arange(count) * len(rows) // max(count, 1)]


def moments(features: Features) -> Moments:
    """Mean and covariance of features [N, D]."""
    sums = Sums(features.shape[1])
    for start in range(0, len(features), ROWS):
        sums.add(features[start : start + ROWS])
    return sums.moments()


def frechet_distance(a: Moments, b: Moments) -> float:
    """Fréchet distance of two normal distributions.

    Σ₁^½ Σ₂ Σ₁^½ is symmetric and has the eigenvalues of Σ₁ Σ₂, so no square root of a general matrix is needed, and no
    imaginary part has to be dropped. Eigenvalues that rounding has made negative count as 0.
    """
    sigma_a, sigma_b = torch.from_numpy(a.sigma), torch.from_numpy(b.sigma)
    values, vectors = torch.linalg.eigh(sigma_a)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    product = root @ sigma_b @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0.0).sqrt().sum()
    difference = a.mu - b.mu
    return float((difference * difference).sum() + sigma_a.trace().item() + sigma_b.trace().item() - 2.0 * cross.item())


def inception_score(logits: NDArray[np.float32], split: int = SPLIT) -> tuple[float, float]:
    """Mean and standard deviation over parts of `split` images; a smaller last part is left out, unless it is
    the only one."""
    scores = []
    for start in range(0, max(len(logits) - split, 0) + 1, split):
        log_p = torch.from_numpy(logits[start : start + split]).double().log_softmax(1)
        p = log_p.exp()
        # Where the mean is 0, p is: xlogy takes 0 · log 0 for 0, and -log p of the other term is finite.
        divergence = (p * log_p - torch.special.xlogy(p, p.mean(0))).sum(1)
        scores.append(divergence.mean().exp().item())
    return float(np.mean(scores)), float(np.std(scores))


def kid(x: Features, y: Features) -> float:
    """Unbiased estimate of the squared MMD between features [N, D] and [M, D], each two at least; may be below 0."""
    n, m = len(x), len(y)
    within_x, within_y = _kernel_sum(x, x) - _kernel_trace(x), _kernel_sum(y, y) - _kernel_trace(y)
    return within_x / (n * (n - 1)) + within_y / (m * (m - 1)) - 2.0 * _kernel_sum(x, y) / (n * m)


def _kernel_sum(x: Features, y: Features) -> float:
    right = torch.from_numpy(y).double().T / x.shape[1]
    return sum(((rows @ right + 1.0) ** 3).sum().item() for rows in _parts(x))


def _kernel_trace(x: Features) -> float:
    return sum(((rows.square().sum(1) / x.shape[1] + 1.0) ** 3).sum().item() for rows in _parts(x))


def precision_recall(made: Features, real: Features, neighbours: int = NEIGHBOURS) -> tuple[float, float]:
    """Share of the made images [N, D] that lie among the real ones [M, D], and of the real ones among the made ones.

    A point lies among others if it is within the distance from one of them to its own k-th nearest neighbour. Each set
    has more than `neighbours` points.
    """
    made_radii, real_radii = _squared_radii(made, neighbours), _squared_radii(real, neighbours)
    precise, recalled = 0, torch.zeros(len(real), dtype=torch.bool)
    for start, distances in zip(range(0, len(made), ROWS), _squared_distances(made, real), strict=True):
        precise += int((distances <= real_radii).any(1).sum())
        recalled |= (distances <= made_radii[start : start + ROWS, None]).any(0)
    return precise / len(made), recalled.double().mean().item()


def _squared_radii(points: Features, neighbours: int) -> Tensor:
    """Squared distance of each point to its k-th nearest neighbour; the nearest of all is the point itself."""
    return torch.cat([d.kthvalue(neighbours + 1, 1).values for d in _squared_distances(points, points)])


def _squared_distances(x: Features, y: Features) -> Iterator[Tensor]:
    """Squared distances [N, M], some rows at a time."""
    right = torch.from_numpy(y).double()
    norms = right.square().sum(1)
    for rows in _parts(x):
        yield (rows.square().sum(1)[:, None] + norms - 2.0 * rows @ right.T).clamp(min=0.0)


def _parts(x: Features) -> Iterator[Tensor]:
    for start in range(0, len(x), ROWS):
        yield torch.from_numpy(x[start : start + ROWS]).double()
