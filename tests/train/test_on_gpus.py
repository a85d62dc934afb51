"""Runs on ranks with a GPU each, which the CPU plays: everything lies where it belongs, and nothing is waited for."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megapix.checkpoint.layout import PARTS
from megapix.config.ds_config import DS_CONFIGS
from megapix.shards import image_features as features
from megapix.shards.image_features import FeatureFile, Features
from megapix.shards.index import read_index, write_index
from megapix.shards.tables.files import file_name
from tests.support import image_encoders, text_encoders
from tests.support.launch import Rank, start, succeed, succeeded
from tests.support.small_run import arguments, flat_vectors, saved, scalars
from tests.support.trained import Subject


@dataclass
class Asked:
    """Ranks that have ended, and what each asked of its GPU."""

    ranks: list[Rank]
    calls: list[list[Any]]


def on_gpus(ranks: int, command: list[str], folder: Path) -> Asked:
    """Run a command on ranks with a GPU each."""
    folder.mkdir()
    done = start(ranks, "tests.programs.on_gpus", command, RECORD=str(folder))
    paths = [folder / f"rank-{rank}.json" for rank in range(ranks)]  # a rank that was killed has left none
    return Asked(done, [json.loads(path.read_text()) if path.is_file() else [] for path in paths])


def copies(calls: list[Any], *shape: int, dtype: str) -> list[dict[str, Any]]:
    """Those of tensors of that shape and dtype."""
    found = [call["copy"] for call in calls if isinstance(call, dict)]
    return [copy for copy in found if (copy["shape"], copy["dtype"]) == ([*shape], f"torch.{dtype}")]


def image_features(shards: Path, folder: Path) -> Path:
    """Random features of every image and its mirror image, as of an encoder whose grid has one cell."""
    index, generator = read_index(shards), np.random.default_rng(0)
    files = tuple(FeatureFile(file_name("features", n), entry.samples, 1, 1) for n, entry in enumerate(index.shards))
    whole = Features(folder, "made up", "e" * 64, index.digest, 7, "bf16", True, files)
    folder.mkdir()
    for file in files:
        numbers = torch.from_numpy(generator.normal(size=(file.samples, 2, 1, 1, 7))).bfloat16()
        features.write_file(whole, file, [numbers.view(torch.int16).numpy()])
    features.write_manifest(whole)
    return folder


def test_a_run_on_two_gpus(shards: Path, tmp_path: Path) -> None:
    """Classes and stored features: what it computes is what it computes on CPUs, bit for bit; and of a micro batch each
    field lies in page-locked memory, from where it is copied once and not waited for."""
    held_out = Path(shutil.copytree(shards, tmp_path / "held-out"))
    index = read_index(shards)
    write_index(held_out, replace(index, source=index.source | {"kind": "another"}))
    knobs = json.loads((DS_CONFIGS / "zero2.json").read_text())
    knobs["zero_optimization"]["overlap_comm"] = True
    (tmp_path / "knobs.json").write_text(json.dumps(knobs))
    options = ["--repa.features", str(image_features(shards, tmp_path / "features")), "--repa.layer", "2"]
    options += ["--machine.micro-batch", "2", "--optim.end-at", "16", "--checkpoint.every", "7", "--precision", "bf16"]
    options += ["--log.samples-every", "9", "--log.grid-columns", "2", "--log.blocks-every", "8"]
    options += ["--validation.path", str(held_out), "--validation.samples", "5", "--validation.every", "16"]
    options += ["--machine.ds-config", str(tmp_path / "knobs.json"), "--machine.unproven"]
    # GPUs clip in AdamW's own pass, where they divide and do not multiply by the inverse: not to the bit.
    options += ["--flow.generator", "philox", "--optim.grad-clip", "0"]
    asked = on_gpus(2, arguments(shards, tmp_path / "gpus", *options), tmp_path / "asked")
    succeeded(asked.ranks)
    succeed(2, "megapix", arguments(shards, tmp_path / "cpus", *options))
    expected, found = (flat_vectors(saved(tmp_path / name).folder) for name in ("cpus", "gpus"))
    assert all(torch.equal(found[part], expected[part]) for part in PARTS)
    for tag in ("loss/train", "loss/repa", "health/grad_norm", "blocks/grad_norm/pit_1", "validation/loss_ema"):
        assert scalars(tmp_path / "gpus", tag) == scalars(tmp_path / "cpus", tag)
    assert "joining CPU ranks" not in asked.ranks[0].out
    warned = "zero_optimization.overlap_comm: docs/parity.md tests it on CPU ranks only"
    assert [warned in rank.err for rank in asked.ranks] == [True, False]

    for rank, calls in enumerate(asked.calls):
        device = f"cuda:{rank}"
        assert calls[0] == ["set_device", rank]
        ends = {call["copy"][end] for call in calls if isinstance(call, dict) for end in ("source", "target")}
        assert ends == {"cpu", device, "None"}
        for module, shape, dtype in (
            ("loop", (2, 3, 16, 16), "uint8"),
            ("conditioner", (2,), "int64"),
            ("loop", (2, 1, 1, 7), "bfloat16"),
            ("flow", (2,), "float32"),
            ("flow", (2,), "bool"),
            ("noise", (2,), "int64"),
        ):  # images, labels, features, times, dropout and the noise's keys
            read = [copy for copy in copies(calls, *shape, dtype=dtype) if copy["module"] == module]
            assert len(read) == 4, (module, dtype)
            assert all(copy["target"] == device and copy["pinned"] and copy["non_blocking"] for copy in read)
            fields = 2 if dtype == "int64" else 1
            assert calls.count(["pinned", [*shape], f"torch.{dtype}"]) == 4 * fields
        assert calls.count(["max_memory_allocated", device]) == 2, "in each row of the log"
        waits = [n for n, call in enumerate(calls) if call == ["synchronize"]]
        assert len(waits) == 2, "once for each checkpoint, and nowhere else"
        for wait in waits:
            written = [call["copy"] for call in calls[:wait] if isinstance(call, dict)][-len(PARTS) :]
            assert all(copy["source"] == device and copy["pinned"] and copy["non_blocking"] for copy in written)
    assert scalars(tmp_path / "gpus", "memory/gpu_peak_GiB") == {1: 1.5, 2: 1.5}
    of_an_h100 = {step: value / 989 for step, value in scalars(tmp_path / "gpus", "speed/tflops_per_rank").items()}
    assert scalars(tmp_path / "gpus", "speed/mfu") == pytest.approx(of_an_h100)


@pytest.mark.long
def test_a_run_on_text_on_a_gpu(text_shards: Path, text_encoder: Path, tmp_path: Path) -> None:
    """The frozen encoders of text and of images compute there, too."""
    text = Subject("text", text_shards)
    options = ["--text.encoder", str(text_encoder), "--repa.encoder", str(image_encoders.make(tmp_path / "encoder"))]
    options += ["--repa.layer", "1", "--optim.end-at", "16", "--checkpoint.every", "16", "--machine.micro-batch", "4"]
    options += ["--log.samples-every", "16", "--log.grid-columns", "1", "--log.grid-classes", "2"]
    options += ["--machine.pixel-checkpointing", "chunked"]
    asked = on_gpus(1, text.arguments(tmp_path / "run", *options), tmp_path / "asked")
    succeeded(asked.ranks)
    assert all(1.0 < loss < 2.0 for loss in scalars(tmp_path / "run", "loss/train").values())
    moved = [call["copy"] for call in asked.calls[0] if isinstance(call, dict)]
    assert copies(asked.calls[0], 1, 2, text_encoders.WIDTH, dtype="float32")[0]["target"] == "cpu", "the empty caption"
    images = [copy for copy in moved if copy["dtype"] == "torch.uint8" and copy["target"] == "cuda:0"]
    assert len(images) == 4
    assert all(copy["pinned"] and copy["non_blocking"] for copy in images)


def test_fused_kernels_are_for_gpus_and_no_test_has_seen_them_there(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks are built and the warning is given; these GPUs, whose driver is empty, cannot run them."""
    (tmp_path / "driver.c").write_text("")
    subprocess.run(["gcc", "-shared", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    monkeypatch.setenv("TRITON_LIBCUDA_PATH", str(tmp_path))
    options = ["--machine.pixel-kernels", "triton", "--model.pixel-width", "16", "--machine.no-compile"]
    command = arguments(shards, tmp_path / "run", *options)
    (rank,) = on_gpus(1, command, tmp_path / "asked").ranks
    assert rank.code != 0
    assert "megapix: warning: machine.pixel_kernels: the kernels are tested in Triton's interpreter only" in rank.err
    assert "megapix: error" not in rank.err
    assert "in _norm_modulate" in rank.err
