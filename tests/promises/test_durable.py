"""What is written: each file was whole on the disk before it got its name, whoever writes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from data_prep.sources.image_folder import ImageFolder
from data_prep.writing import write as writing
from megapix import files
from megapix.checkpoint.find import Saved
from megapix.checkpoint.manifest import read_state
from megapix.checkpoint.reshard import reshard
from megapix.evaluation.store import write_npz
from megapix.monitoring.tensorboard import Writer, purge
from megapix.shards import image_features as features
from megapix.shards import storage, text_features
from megapix.shards.image_features import FeatureFile, Features
from megapix.shards.storage import Remote
from megapix.shards.text_features import Row
from megapix.shards.text_recipe import Recipe
from megapix.weights import nvlabs
from megapix.weights.read import stored_weights
from megapix.weights.write import export, write_model
from tests.support.disk_calls import DiskCalls
from tests.support.made_run import add_checkpoint
from tests.support.made_shards import OPTIONS


def exported(root: Path) -> None:
    export(root / "run", root / "out.safetensors")


def imported(root: Path) -> None:
    write_model(root / "model", stored_weights(root / "run"))


def as_the_authors_would(root: Path) -> None:
    nvlabs.export(root / "run", root / "out.pt", [True])


def resharded(root: Path) -> None:
    folder = root / "run" / "checkpoints" / "images-000000000007"
    reshard(Saved(folder, read_state(folder)), 3, root / "three")


def image_features(root: Path) -> None:
    file = FeatureFile("features-000000.safetensors", 3, 2, 5)
    whole = Features(root, "encoder", "e" * 64, "d" * 64, 4, "fp32", True, (file,))
    features.write_file(whole, file, [np.ones((3, 2, 2, 5, 4), np.float32)])
    features.write_manifest(whole)


def features_of_captions(root: Path) -> None:
    recipe = Recipe(width=3, max_tokens=5, normalize="none", scale=1.0, prefix="", dtype="fp32")
    rows = [Row(np.full((tokens, 3), tokens, np.int16), False) for tokens in (2, 5, 1)]
    text_features.write_file(root, recipe, "d" * 64, "text-000000.safetensors", [1, 2], rows)


def all_images(root: Path) -> None:
    np.save(root / "pixels.npy", np.arange(3 * 4 * 5 * 3, dtype=np.uint8).reshape(3, 4, 5, 3))
    images = SimpleNamespace(count=3, size=(4, 5), blocks=1)
    write_npz(root / "images.npz", SimpleNamespace(images=images, pixels=lambda _: root / "pixels.npy"))  # type: ignore[arg-type]


def rows_of_a_run(root: Path) -> None:
    purge(root / "tensorboard", 2)


def small_file(root: Path) -> None:
    files.write_atomic(root / "small", b"text")


@pytest.mark.parametrize(
    ("work", "named"),
    [
        (exported, ["out.safetensors"]),
        (imported, [".model.tmp/config.json", "model"]),
        (as_the_authors_would, ["out.pt"]),
        (resharded, ["state.json", "three/checkpoints/images-000000000007", "latest", "config.json"]),
        (image_features, ["features-000000.safetensors", "features-files.bin", "features.json"]),
        (features_of_captions, ["text-000000.safetensors"]),
        (all_images, ["images.npz"]),
        (rows_of_a_run, ["tfevents"]),
        (small_file, ["small"]),
    ],
)
def test_a_file_is_whole_on_the_disk_before_it_has_its_name(
    work: Callable[[Path], None], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_checkpoint(tmp_path / "run", 7)
    board = Writer(tmp_path / "tensorboard", 0, enabled=True)
    for step in range(1, 5):
        board.scalars(step, {"loss/train": 0.5})
    board.close()
    disk = DiskCalls(monkeypatch, tmp_path)
    work(tmp_path)
    assert len(disk.moved) == len(named), disk.order
    for (new, whole), expected in zip(disk.moved, named, strict=True):
        assert expected in new
        assert whole, f"{new} got its name before all of it was on the disk: {disk.order}"


@pytest.mark.parametrize("work", [exported, imported, as_the_authors_would, all_images])
def test_a_new_name_is_on_the_disk_when_a_command_ends(
    work: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_checkpoint(tmp_path / "run", 7)
    disk = DiskCalls(monkeypatch, tmp_path)
    work(tmp_path)
    assert disk.order[-2].partition(" -> ")[2] in ("out.safetensors", "model", "out.pt", "images.npz")
    assert disk.order[-1] == "sync ."


def test_shards_are_too(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tar files, their receipts, table and captions; the index is last."""
    in_this_process = lambda work, jobs, workers: ((job, work(job)) for job in jobs)  # noqa: E731
    monkeypatch.setattr(writing, "in_processes", in_this_process)
    disk = DiskCalls(monkeypatch, tmp_path)
    writing.write(ImageFolder.open(image_folder), tmp_path / "shards", OPTIONS, workers=1, progress=False)
    assert {new: whole for new, whole in disk.moved if not whole} == {}
    names = [new.removeprefix("shards/") for new, _ in disk.moved]
    assert [name for name in names if name.endswith(".tar")] == [f"shard-{n:06d}.tar" for n in range(3)]
    assert names[-1] == "index.json"
    assert {"samples.bin", "captions.bin"} < set(names)


def test_a_shard_is_whole_in_the_cache_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Made(Remote):
        def __init__(self) -> None:
            pass

        def begin(self, ranges: object) -> list[Any]:
            return [None]

        def read(self, name: str, offset: int, size: int, begun: object = None) -> bytes:
            return bytes([7]) * size

    disk = DiskCalls(monkeypatch, tmp_path)
    Made().fetch("shard", tmp_path / "shard.part", 3 * storage.PART // 2)
    assert disk.order == ["sync shard.part"]
    assert disk.synced["shard.part"] == bytes([7]) * (3 * storage.PART // 2)
