"""Passes over a data set on a GPU: the frozen network computes there, what is stored is what a CPU computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from data_prep.passes import decoded
from data_prep.passes.image_features import features
from data_prep.passes.statistics import stats
from data_prep.passes.text_features import embed_text
from megapix.encoders import scoring as extractors
from megapix.shards.storage import Access
from megapix.shards.text_recipe import recipe_of
from tests.support import image_encoders
from tests.support.fake_cuda import FakeCuda
from tests.support.small_extractor import SmallExtractor
from tests.support.trained import TEXT

ACCESS = Access(60.0, 0)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


@pytest.fixture(autouse=True)
def _in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are decoded here."""
    monkeypatch.setattr(decoded, "in_processes", lambda work, parts, workers: ((part, work(part)) for part in parts))


def test_statistics(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extractors, "open_extractor", lambda *_: SmallExtractor())

    def made(name: str) -> bytes:
        stats(shards, tmp_path / name, "effnet_lite0", None, 7, 16, 1, ACCESS, progress=False)
        return (tmp_path / name).read_bytes()

    expected = made("cpu.npz")
    with FakeCuda(monkeypatch.setattr, ("one",)) as cuda:
        assert made("gpu.npz") == expected
    images = [copy for copy in cuda.copies if copy.target == "cuda:0" and len(copy.shape) == 4]
    assert sum(copy.shape[0] for copy in images) == 40


def test_features_of_images(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = str(image_encoders.make(tmp_path / "encoder"))

    def made(name: str) -> dict[str, bytes]:
        features(shards, encoder, tmp_path / name, "fp32", True, 16, 1, ACCESS, progress=False)
        return files(tmp_path / name)

    expected = made("cpu")
    with FakeCuda(monkeypatch.setattr, ("one",)) as cuda:
        assert made("gpu") == expected
    images = [copy for copy in cuda.copies if copy.target == "cuda:0" and len(copy.shape) == 4 and copy.shape[1] == 3]
    assert sum(copy.shape[0] for copy in images if copy.shape[-1] == 16) == 40
    assert len(expected) == 3


def test_features_of_captions(
    text_shards: Path, text_encoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = files(text_shards)
    with FakeCuda(monkeypatch.setattr, ("one",)) as cuda:
        out = Path(shutil.copytree(text_shards, tmp_path / "gpu"))
        for path in out.glob("text-*.safetensors"):
            path.unlink()
        embed_text(out, str(text_encoder), recipe_of(TEXT.text), 16, False, progress=False)
        assert files(out) == expected
    assert len(expected) == 4
    assert any(copy.target == "cuda:0" and copy.dtype == torch.int64 for copy in cuda.copies), "tokens"
