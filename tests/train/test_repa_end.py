"""REPA with accumulation on two ranks, from features of random numbers, and its end within a step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megapix.checkpoint.folder import latest
from megapix.checkpoint.manifest import read_state
from megapix.data.arrays import Extras
from megapix.data.batch import Batch
from megapix.data.loader import MicroBatches
from megapix.data.locate import locate
from megapix.diffusion import repa
from megapix.diffusion.condition import classes
from megapix.engine.network import build_network
from megapix.model import Alignment
from megapix.shards.image_features import FeatureFile, Features, write_file, write_manifest
from megapix.shards.index import read_index
from megapix.shards.tables.files import file_name
from tests.support.launch import succeed
from tests.support.small_run import SMALL, STEP_BATCH, arguments, scalars

WIDTH, WEIGHT, STOP_AT = 5, 0.7, 20


@pytest.fixture
def features(shards: Path, tmp_path: Path) -> Features:
    """2 x 2 cells of random numbers for each image and its mirror image."""
    index = read_index(shards)
    files = [FeatureFile(file_name("features", place), entry.samples, 2, 2) for place, entry in enumerate(index.shards)]
    found = Features(tmp_path, "none", "e" * 64, index.digest, WIDTH, "fp32", True, tuple(files))
    for number, file in enumerate(files):
        shape = file.samples, 2, 2, 2, WIDTH
        write_file(found, file, [np.random.default_rng(number).normal(size=shape).astype(np.float32)])
    write_manifest(found)
    return found


def test_accumulation_with_repa_until_an_image_within_a_step(shards: Path, features: Features, tmp_path: Path) -> None:
    """Steps that start at 0, 8 and 16 images seen are aligned, and the last two are not; the first one's loss, distance
    and gradient norm against plain autograd."""
    run = tmp_path / "run"
    options = ["--repa.features", str(features.folder), "--repa.dtype", "fp32", "--repa.layer", "1"]
    options += ["--repa.weight", str(WEIGHT), "--repa.stop-at", str(STOP_AT), "--optim.end-at", "40"]
    succeed(2, "megapix", arguments(shards, run, *options, "--machine.micro-batch", "2"))
    distances = scalars(run, "loss/repa")
    assert list(distances) == [1, 2, 3]
    assert list(scalars(run, "loss/train")) == [1, 2, 3, 4, 5]

    net = build_network(SMALL.model, SMALL.seed, alignment=Alignment(1, WIDTH))
    reading = replace(SMALL.data, path=str(shards))
    batch = MicroBatches(locate(reading), reading, SMALL.seed, STEP_BATCH, Extras(features))[np.arange(STEP_BATCH)]
    assert isinstance(batch, Batch)
    assert batch.features is not None
    asked = batch.images, classes(batch.labels, 3), batch.positions, SMALL.seed, SMALL.flow
    loss, _, distance = repa.training_loss(net, batch.features, *asked)
    (loss.mean() + WEIGHT * distance.mean()).backward()
    norms = torch.stack([p.grad.double().norm() for p in net.parameters() if p.grad is not None])
    first, norm = read_state(latest(run)).recent[0]
    assert first == pytest.approx(loss.mean().item(), rel=1e-5)
    assert scalars(run, "loss/train")[1] == pytest.approx(loss.mean().item(), rel=1e-5)
    assert distances[1] == pytest.approx(distance.mean().item(), rel=1e-5)
    assert norm == pytest.approx(norms.norm().item(), rel=1e-4)
    assert scalars(run, "health/grad_norm")[1] == pytest.approx(norms.norm().item(), rel=1e-4)
