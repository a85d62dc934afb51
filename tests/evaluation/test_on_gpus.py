"""Evaluations on GPUs: each rank on its own, with the noise of the CPU, and as many threads as there are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from megapix.conditioning.conditioner import Classes
from megapix.config import EvaluationConfig, SamplingConfig
from megapix.dist import World
from megapix.encoders.scoring import EfficientNetLite0, Inception
from megapix.errors import InputError
from megapix.evaluation import reference as evaluation_reference
from megapix.evaluation.manifest import read_scores
from megapix.evaluation.options import EvaluateOptions
from megapix.evaluation.ranks import device_of
from megapix.evaluation.reference import Standard
from megapix.evaluation.run import evaluate
from megapix.shards.statistics import Moments, Reference, write_reference
from megapix.train.small_evaluation import SmallEvaluation
from tests.support.fake_cuda import CPU, NAMES, FakeCuda
from tests.support.small_extractor import WIDTH, SmallExtractor
from tests.support.small_network import class_network, imported
from tests.support.small_run import SMALL


def reference() -> Reference:
    features = np.random.default_rng(0).normal(size=(11, WIDTH)).astype(np.float32)
    moments = Moments(features.mean(0).astype(np.float64), np.cov(features, rowvar=False), 11)
    return Reference(moments, features, "effnet_lite0", "e" * 64, "d" * 64)


@pytest.fixture
def threads() -> Iterator[int]:
    """More than one."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield 2
    torch.set_num_threads(before)


@contextmanager
def on(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda | None]:
    """GPUs, or none."""
    with monkeypatch.context() as patch:
        if gpu:
            with FakeCuda(patch.setattr) as cuda:
                yield cuda
        else:
            yield None


def test_a_rank_takes_the_gpu_of_its_number_on_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of(World(1, 2, 1)) == CPU
    cuda = FakeCuda(monkeypatch.setattr)
    assert device_of(World(6, 8, 2)) == torch.device("cuda", 2)
    assert cuda.calls == [("set_device", 2)]
    with pytest.raises(InputError, match="no GPU is left for local rank 4: 4 are visible"):
        device_of(World(4, 8, 4))


def test_an_evaluation_on_a_gpu(threads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its scores are those of a CPU, and it says whose they are."""
    imported(tmp_path / "net", class_network())
    write_reference(tmp_path / "reference.npz", reference())
    scores, seen = [], []
    for gpu in (False, True):
        with on(gpu, monkeypatch) as cuda:
            extractor = SmallExtractor()
            monkeypatch.setattr(evaluation_reference, "open_extractor", lambda *_, made=extractor: made)
            out = tmp_path / f"{gpu}.json"
            options = EvaluateOptions(tmp_path / "net", tmp_path / "reference.npz", out, count=7, batch=3)
            assert evaluate(options, World(0, 1, 1)) == 0
            seen.append(set(extractor.threads))
            if cuda:
                noise = [copy for copy in cuda.copies if copy.shape == (3, 3, 16, 16) and copy.dtype == torch.float32]
                assert [(copy.source, copy.target) for copy in noise] == [("cpu", "cuda:1")] * 3, "7 images, 3 at once"
        scores.append(read_scores(out, "--out"))
    assert seen == [{1}, {threads}], "one on a CPU, for the same sums on any number of cores"
    assert scores[1].scores == pytest.approx(scores[0].scores, rel=1e-3)
    assert [found.manifest.device for found in scores] == ["cpu", NAMES[1]]


class EmaOf:
    """In the place of an engine whose EMA is this network."""

    def __init__(self, net: nn.Module) -> None:
        self._net = net

    @contextmanager
    def ema_weights(self) -> Iterator[nn.Module]:
        yield self._net


def test_the_small_evaluation_of_a_run_on_a_gpu(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The extractor is moved to the rank's GPU, the scores are those of a CPU."""
    c = replace(SMALL, evaluation=EvaluationConfig(count=5, batch=3), sampling=SamplingConfig(steps=2))
    found, seen = [], []
    for device in (CPU, torch.device("cuda", 1)):
        with on(device != CPU, monkeypatch), torch.no_grad():
            extractor = SmallExtractor()
            measure = Standard(Path("reference.npz"), "", reference(), extractor)
            small = SmallEvaluation(measure, Classes(3, device), c, World(), device)
            engine = EmaOf(class_network().to(device).eval())
            found.append(small.scores(engine, lambda phase: None))  # type: ignore[arg-type]
            seen.append(set(extractor.threads))
    assert seen == [{1}, {threads}]
    assert found[1] == pytest.approx(found[0], rel=1e-3)
    assert "evaluation/fd_effnet_lite0" in found[0]


class Scaled(nn.Module):
    """In the place of Inception's network, whose weights are the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        found = images.float().flatten(1) * self.weight
        return found, found


def inception() -> Inception:
    made = Inception.__new__(Inception)
    made._net = Scaled()
    return made


@pytest.mark.parametrize(("make", "method"), [(EfficientNetLite0, "extract_features"), (inception, "forward")])
def test_extractors_compute_where_they_are_moved_to(
    make: Callable[[], Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exactly: without TensorFloat-32, and by one choice of algorithms."""
    cudnn, flags = torch.backends.cudnn, []
    with FakeCuda(monkeypatch.setattr) as cuda:
        extractor = make()
        extractor.to(torch.device("cuda", 1))
        computed, before = getattr(extractor._net, method), (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark)

        def noted(images: Tensor) -> Any:
            flags.append((cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark))
            return computed(images)

        monkeypatch.setattr(extractor._net, method, noted)
        features, logits = extractor(torch.zeros(1, 3, 8, 8, dtype=torch.uint8, device="cuda:1"))
        assert {cuda.place(features), cuda.place(logits)} == {torch.device("cuda", 1)}
        assert (cudnn.allow_tf32, cudnn.deterministic, cudnn.benchmark) == before
    assert flags == [(False, True, False)]
