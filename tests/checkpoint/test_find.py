"""A checkpoint that somebody reads stays, whatever the run that it belongs to removes meanwhile."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megapix import config
from megapix.checkpoint import find as find_module
from megapix.checkpoint import retention
from megapix.checkpoint import vectors as flat
from megapix.checkpoint.find import Saved, choose, find
from megapix.checkpoint.folder import complete, point_to
from megapix.checkpoint.manifest import Counters, read_state
from megapix.checkpoint.reshard import reshard
from megapix.dist import World
from megapix.weights.read import stored_weights
from megapix.weights.write import export
from tests.support.made_run import add_checkpoint, weights_of


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Three checkpoints, of which `latest` names the second."""
    folders = [add_checkpoint(tmp_path / "run", images) for images in (5, 10, 15)]
    point_to(folders[1])
    return tmp_path / "run"


def second(run: Path) -> Path:
    return run / "checkpoints" / "images-000000000010"


def chosen(run: Path, out: Path) -> object:
    """What a run goes on from."""
    return choose(run, "auto", World()).saved


def found(run: Path, out: Path) -> object:
    """What is read by its own path."""
    return find(second(run), World())


def loaded(run: Path, out: Path) -> object:
    return stored_weights(run, ema=True).tensors


def exported(run: Path, out: Path) -> object:
    export(run, out)
    return load_file(out)


def resharded(run: Path, out: Path) -> object:
    saved = Saved(second(run), read_state(second(run)))
    return read_state(reshard(saved, 3, out)).counters


@pytest.mark.parametrize(
    ("read", "opens"),
    [
        (chosen, (find_module, "sha256_of")),
        (found, (find_module, "sha256_of")),
        (loaded, (flat, "read_range")),
        (exported, (flat, "read_range")),
        (resharded, (flat, "read_range")),
    ],
)
def test_what_is_read_is_not_removed(
    read: Callable[[Path, Path], Any],
    opens: tuple[Any, str],
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Retention works just when a file of the checkpoint is opened; afterwards it may have it."""
    newest, opened = run / "checkpoints" / "images-000000000015", getattr(*opens)
    retain, removed = config.CheckpointConfig(keep=1), []

    def open_late(path: Path, *args: Any, **kwargs: Any) -> Any:
        if path.parent == second(run):
            retention.prune(run, newest, retain)
            removed.append(not second(run).is_dir())
        return opened(path, *args, **kwargs)

    monkeypatch.setattr(*opens, open_late)
    try:
        result = read(run, tmp_path / "out")
    finally:
        assert removed
        assert not any(removed), "removed while it was read"
    if isinstance(result, Saved):
        assert result.folder == second(run)
    elif isinstance(result, Counters):
        assert result == Counters(10, 10)
    else:
        expected = weights_of("ema")
        assert result.keys() == expected.keys()
        assert all(torch.equal(result[name], expected[name]) for name in expected)
    assert complete(run) == [second(run), newest]
    retention.prune(run, newest, retain)
    assert complete(run) == [newest]
