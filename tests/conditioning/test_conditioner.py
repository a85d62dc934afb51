"""What the network is told is what was named, and lies on the run's device, whatever it comes from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megapix.conditioning import conditioner
from megapix.conditioning.conditioner import EMPTY_NAME, Classes, Conditioner, EncodedText, StoredText
from megapix.conditioning.text_source import TextSource
from megapix.data.batch import Batch
from megapix.diffusion.condition import Condition
from megapix.dist import World
from megapix.shards.index import read_index
from megapix.shards.text_feature_reader import TextFeatureReader
from megapix.shards.text_features import read_text_features
from tests.support.fake_cuda import FakeCuda
from tests.support.small_run import SMALL

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)


class Counting:
    """Stands for a text encoder: a caption's features are its letters, counted."""

    first_cut = None

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        longest = 1 + max(map(len, captions))
        lengths = torch.tensor([1 + len(caption) for caption in captions])
        mask = torch.arange(longest) < lengths[:, None]
        return (mask[..., None] * torch.arange(longest)[:, None].float()).to(self.device), mask.to(self.device)


def everywhere(cuda: FakeCuda, cond: Condition) -> set[torch.device | None]:
    return {cuda.place(part) for part in (*cond.cond, *cond.null)}


def batch() -> Batch:
    """Two images with a caption and its features, pinned."""
    text = torch.ones(2, 3, 24, dtype=torch.bfloat16), torch.ones(2, 3, dtype=torch.bool)
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    return Batch(images, torch.tensor([2, 0]), np.arange(2), captions=("a", "bc"), text=text).pin_memory()


def test_rows_and_subjects_are_those_that_are_named(text_shards: Path) -> None:
    """Classes, captions and stored features, from the first on and from the middle."""
    classes = Classes(3, CPU)
    assert [classes.rows(count).cond[0].tolist() for count in (2, 9)] == [[0, 1], [0, 1, 2]]
    assert classes.of_subjects([2, 1]).cond[0].tolist() == [2, 1]

    null = Counting(CPU)([""])
    text = EncodedText(Counting(CPU), null, ("a", "bcd", "ef"), print, prompts=("a prompt", "x"))
    assert text.subjects == 3
    for condition, lengths in ((text.rows(1), [8]), (text.of_subjects([1, 2]), [3, 2])):
        assert (condition.cond[1].sum(1) - 1).tolist() == lengths
        assert condition.null == null

    features = read_text_features(text_shards, read_index(text_shards), "shards")
    assert features
    stored, reader = StoredText(null, CPU, features), TextFeatureReader(features)
    for condition, samples in ((stored.of_subjects([5, 7]), [5, 7]), (stored.rows(2), [0, 1])):
        for row, sample in enumerate(samples):
            expected = torch.from_numpy(reader.read(sample, 0).copy()).view(torch.bfloat16)
            assert condition.cond[1][row].sum() == len(expected)
            assert torch.equal(condition.cond[0][row, : len(expected)], expected)


def test_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeCuda(monkeypatch.setattr) as cuda:
        classes = Classes(3, GPU)
        for cond in (classes.of(batch()), classes.rows(2), classes.of_subjects([1, 2])):
            assert everywhere(cuda, cond) == {GPU}
        assert classes.of(batch()).cond[0].tolist() == [2, 0]
        assert [(copy.pinned, copy.non_blocking) for copy in cuda.copies] == [(True, True)] * 2


def test_stored_text(text_shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    features = read_text_features(text_shards, read_index(text_shards), "shards")
    assert features
    with FakeCuda(monkeypatch.setattr) as cuda:
        stored = StoredText((torch.zeros(1, 1, 24), torch.ones(1, 1, dtype=torch.bool)), GPU, features)
        cuda.calls.clear()
        of = stored.of(batch())
        assert [(copy.pinned, copy.non_blocking) for copy in cuda.copies] == [(True, True)] * 2
        for cond in (of, stored.rows(2), stored.of_subjects([5, 7])):
            assert everywhere(cuda, cond) == {GPU}


def test_the_empty_caption_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed on the GPU, kept in a file, and back on the GPU in this run and the next."""

    def run() -> Conditioner:
        return conditioner.of_run(SMALL, TextSource(Counting(GPU)), World(), GPU, tmp_path)  # type: ignore[arg-type]

    with FakeCuda(monkeypatch.setattr) as cuda:
        for made in (run(), run()):
            assert everywhere(cuda, made.of(batch())) == {GPU}
            assert made.of(batch()).null[0].tolist() == [[[0.0]]]
    assert (tmp_path / EMPTY_NAME).is_file()
