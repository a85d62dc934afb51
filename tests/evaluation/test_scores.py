"""Scores against scipy, double loops and cases made by hand, and the files of reference statistics."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from megapix.errors import InputError
from megapix.evaluation import scores
from megapix.evaluation.scores import one_thread
from megapix.shards.statistics import Moments, Reference, Sums, read_reference, write_reference


def features(count: int, width: int, seed: int, shift: float = 0.0) -> scores.Features:
    """Correlated features with a mean of `shift`."""
    generator = np.random.default_rng(seed)
    mixed = generator.normal(size=(count, width)) @ generator.normal(size=(width, width)) / width**0.5
    return (mixed + shift).astype(np.float32)


def reference(values: scores.Features, extractor: str = "effnet_lite0") -> Reference:
    return Reference(scores.moments(values), values, extractor, "a" * 64, "b" * 64)


@pytest.mark.parametrize("width", [1, 7, 64, 200])
@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_frechet_distance_against_sqrtm(width: int, shift: float) -> None:
    a, b = scores.moments(features(500, width, 0)), scores.moments(features(700, width, 1, shift))
    root = scipy.linalg.sqrtm(a.sigma @ b.sigma).real
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma + b.sigma - 2 * root)
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)
    assert scores.frechet_distance(b, a) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_by_hand() -> None:
    # Of diagonal covariances it is |μ₁ - μ₂|² + Σ (σ₁ - σ₂)².
    a = Moments(np.array([1.0, 0.0]), np.diag([4.0, 9.0]), 10)
    b = Moments(np.array([0.0, 2.0]), np.diag([1.0, 25.0]), 10)
    assert scores.frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2, rel=1e-12)
    assert scores.frechet_distance(a, a) == pytest.approx(0.0, abs=1e-12)
    flat = Moments(np.zeros(2), np.zeros((2, 2)), 10)
    assert scores.frechet_distance(flat, a) == pytest.approx(1 + 4 + 9, rel=1e-12)


def test_frechet_distance_of_fewer_images_than_features() -> None:
    # sqrtm of a singular product is good to some 1e-4 here; singular values of the centred features are exact.
    x, y = features(20, 50, 0).astype(np.float64), features(30, 50, 1, 0.5).astype(np.float64)
    a, b = scores.moments(x.astype(np.float32)), scores.moments(y.astype(np.float32))
    centred = [(v - v.mean(0)) / (len(v) - 1) ** 0.5 for v in (x, y)]
    cross = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = ((a.mu - b.mu) ** 2).sum() + sum((c**2).sum() for c in centred) - 2 * cross
    assert scores.frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_moments_are_numpys() -> None:
    values = features(2500, 9, 3, 5.0)  # several parts
    moments = scores.moments(values)
    np.testing.assert_allclose(moments.mu, values.astype(np.float64).mean(0), rtol=1e-12)
    np.testing.assert_allclose(moments.sigma, np.cov(values.astype(np.float64), rowvar=False), rtol=1e-10, atol=1e-12)
    assert moments.count == 2500


def test_kid_against_a_double_loop() -> None:
    x, y = features(13, 6, 0), features(17, 6, 1, 0.4)

    def mean(a: scores.Features, b: scores.Features, same: bool) -> float:
        pairs = [(i, j) for i in range(len(a)) for j in range(len(b)) if not (same and i == j)]
        return sum((a[i].astype(np.float64) @ b[j] / 6 + 1) ** 3 for i, j in pairs) / len(pairs)

    expected = mean(x, x, True) + mean(y, y, True) - 2 * mean(x, y, False)
    assert scores.kid(x, y) == pytest.approx(expected, rel=1e-10)


def test_kid_of_more_rows_than_a_part() -> None:
    x, y = features(scores.ROWS + 5, 3, 0), features(scores.ROWS * 2 + 1, 3, 1, 0.4)
    kernel = [(a.astype(np.float64) @ b.astype(np.float64).T / 3 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y))]
    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in kernel[:2]]
    assert scores.kid(x, y) == pytest.approx(sum(within) - 2 * kernel[2].mean(), rel=1e-9)


def test_inception_score_by_hand() -> None:
    certain = np.full((6, 3), -1000.0, np.float32)
    certain[np.arange(6), np.arange(6) % 3] = 0.0
    assert scores.inception_score(certain) == pytest.approx((3.0, 0.0), rel=1e-12)  # sure of each, all classes alike
    assert scores.inception_score(np.zeros((6, 3), np.float32)) == pytest.approx((1.0, 0.0))  # sure of nothing
    assert scores.inception_score(certain[::3]) == pytest.approx((1.0, 0.0))  # one class alone
    # p(y|x) = (¾, ¼) and (¼, ¾): KL to (½, ½) is ¾ ln 3/2 + ¼ ln 1/2 each.
    halves = np.log(np.array([[3.0, 1.0], [1.0, 3.0]], np.float32))
    assert scores.inception_score(halves)[0] == pytest.approx(1.5**0.75 * 0.5**0.25, rel=1e-6)


def test_inception_score_in_parts() -> None:
    certain = np.full((7, 3), -1000.0, np.float32)
    certain[np.arange(7), [0, 1, 0, 0, 1, 2, 2]] = 0.0
    # Parts of two: classes {0, 1}, {0}, {1, 2}; the last image is left over.
    assert scores.inception_score(certain, 2) == pytest.approx((5 / 3, np.std([2, 1, 2])))


def test_precision_and_recall_by_hand() -> None:
    # On a line, k = 1. Real radii: 1, 1, 8; made radii: 0.5, 0.5, 11.5.
    real = np.array([[0], [1], [9]], np.float32)
    made = np.array([[2], [2.5], [-10]], np.float32)
    # 2 is 1 from 1 and 2.5 within 8 of 9; -10 is in no ball. 0 and 1 are in the ball of -10 (12 wide), 9 in none.
    assert scores.precision_recall(made, real, 1) == pytest.approx((2 / 3, 2 / 3))
    assert scores.precision_recall(real, made, 1) == pytest.approx((2 / 3, 2 / 3))
    assert scores.precision_recall(real, real, 1) == (1.0, 1.0)
    assert scores.precision_recall(made + 1000, real, 1) == (0.0, 0.0)


def test_precision_and_recall_against_loops() -> None:
    made, real = features(scores.ROWS + 9, 2, 0)[-60:], features(45, 2, 1, 0.6)

    def radii(points: scores.Features) -> list[float]:
        return [sorted(np.linalg.norm(points.astype(np.float64) - p, axis=1))[3] for p in points]

    def share(inside: scores.Features, among: scores.Features) -> float:
        balls = list(zip(among, radii(among), strict=True))
        return float(np.mean([any(np.linalg.norm(p.astype(np.float64) - c) <= r for c, r in balls) for p in inside]))

    precision, recall = scores.precision_recall(made, real)
    assert (precision, recall) == pytest.approx((share(made, real), share(real, made)))
    assert 0 < precision < 1 and 0 < recall < 1  # noqa: PT018 - the case would show nothing otherwise


def test_the_names_say_the_extractor() -> None:
    values, logits = features(40, 8, 0), np.zeros((40, 5), np.float32)
    found = scores.score(values, logits, reference(values))
    assert list(found) == [f"{n}_effnet_lite0" for n in ("fd", "is", "is_std", "kid", "precision", "recall")]
    found = scores.score(values, logits, reference(values, "inception"))
    assert list(found) == ["fid", "inception_score", "inception_score_std", "kid", "precision", "recall"]
    assert found["precision"] == found["recall"] == 1.0


def test_pairs_are_of_sets_of_equal_size() -> None:
    values, real, logits = features(40, 8, 0), features(24, 8, 1), np.zeros((40, 5), np.float32)
    found = scores.score(values, logits, reference(real))
    assert found["kid_effnet_lite0"] == scores.kid(values[:24], real)
    found = scores.score(values[:10], logits[:10], reference(real))
    assert found["kid_effnet_lite0"] == scores.kid(values[:10], real[np.arange(10) * 24 // 10])
    none = Reference(scores.moments(real), real[:0], "inception", "", "")
    assert [name for name, value in scores.score(values, logits, none).items() if value is None] == [
        "kid",
        "precision",
        "recall",
    ]


def test_threads_change_nothing() -> None:
    values, logits = features(300, 96, 0), features(300, 96, 2)
    real, before, found = reference(features(200, 96, 1)), torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(scores.score(values, logits, real))
            assert torch.get_num_threads() == threads
        with one_thread():
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1]


def test_a_reference_file_holds_what_was_written(tmp_path: Path) -> None:
    made = reference(features(30, 4, 0))
    for name in ("a.npz", "b.npz"):
        write_reference(tmp_path / "made" / name, made)
    (found, first), (_, second) = (read_reference(tmp_path / "made" / name) for name in ("a.npz", "b.npz"))
    assert first == second, "equal statistics, equal bytes"
    for ours, theirs in itertools.zip_longest(
        (found.moments.mu, found.moments.sigma, found.features), (made.moments.mu, made.moments.sigma, made.features)
    ):
        np.testing.assert_array_equal(ours, theirs)
    assert (found.moments.count, found.extractor, found.extractor_sha256, found.data_digest) == (
        30,
        "effnet_lite0",
        "a" * 64,
        "b" * 64,
    )


def test_adms_reference_batches_are_read(tmp_path: Path) -> None:
    path = tmp_path / "VIRTUAL_imagenet256_labeled.npz"
    images = np.zeros((2, 8, 8, 3), np.uint8)
    spatial = {"mu_s": np.zeros(3), "sigma_s": np.eye(3)}
    np.savez(path, arr_0=images, mu=np.ones(2048), sigma=np.eye(2048), **spatial)
    found, _ = read_reference(path)
    assert (found.extractor, found.extractor_sha256, found.features.shape) == ("inception", "", (0, 2048))
    assert (found.moments.count, found.moments.mu.sum()) == (0, 2048)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"mu": np.ones(4), "sigma": np.eye(4)}, "mu has 4 numbers, but those of ADM's reference batches have 2048"),
        ({"mu": np.ones(2048), "sigma": np.eye(4)}, "not a mean and its covariance"),
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, "holds numbers that are not finite"),
        ({"arr_0": np.ones(4)}, "mu"),
        ({"about": np.array('{"format": "other", "version": 9}')}, "('other', 9), expected ('megapix-stats', 1)"),
        ({"about": np.array("[1]")}, "list indices"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "allow_pickle=False"),
    ],
)
def test_other_files_are_refused(arrays: dict[str, np.ndarray], words: str, tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, **arrays)
    with pytest.raises(InputError, match="cannot be read as reference statistics") as caught:
        read_reference(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_file_and_no_archive(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no file; 'data_prep stats"):
        read_reference(tmp_path / "none.npz")
    (tmp_path / "text.npz").write_text("hello")
    with pytest.raises(InputError, match="cannot be read as reference statistics"):
        read_reference(tmp_path / "text.npz")
    write_reference(tmp_path / "cut.npz", reference(features(30, 40, 0)))
    data = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(InputError, match="cannot be read as reference statistics"):
        read_reference(tmp_path / "cut.npz")


def test_sums_do_not_depend_on_the_parts() -> None:
    values, parts = features(100, 5, 0), Sums(5)
    for part in np.array_split(values, 7):
        parts.add(part)
    np.testing.assert_allclose(parts.moments().sigma, scores.moments(values).sigma, rtol=1e-12)


def test_torch_fidelity_agrees() -> None:
    pytest.importorskip("torch_fidelity", exc_type=ImportError)  # it imports torchvision
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    made, real, logits = features(300, 16, 0), features(300, 16, 1, 0.3), features(300, 20, 2)
    found = scores.score(made, logits, reference(real, "inception"))
    x, y = torch.from_numpy(made).double(), torch.from_numpy(real).double()
    theirs = fid_statistics_to_metric(fid_features_to_statistics(x), fid_features_to_statistics(y), False)
    assert found["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    theirs = isc_features_to_metric(torch.from_numpy(logits), splits=1)
    assert found["inception_score"] == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    whole = {"kid_subsets": 1, "kid_subset_size": 300, "verbose": False}
    theirs = kid_features_to_metric(x, y, **whole)
    assert found["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    theirs = prc_features_to_metric(x, y, verbose=False)
    assert (found["precision"], found["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]))
