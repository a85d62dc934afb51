"""Saving: the numbers of the moment, in an order that no crash spoils, and a failure that every rank hears of."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from megapix.checkpoint import buffers, retention
from megapix.checkpoint import saver as saver_module
from megapix.checkpoint import vectors as flat
from megapix.checkpoint.find import choose
from megapix.checkpoint.folder import complete, latest
from megapix.checkpoint.layout import PARTS, Layout
from megapix.checkpoint.manifest import Counters, State
from megapix.checkpoint.saver import Saver
from megapix.config import CheckpointConfig
from megapix.dist import World
from tests.programs.saving import FAULTS
from tests.support.disk_calls import DiskCalls
from tests.support.fake_cuda import Copy, FakeCuda
from tests.support.launch import start, succeed
from tests.support.small_run import SMALL, STEP_BATCH, arguments, scalars

LAYOUT = Layout({"a": (5, 2), "b": (3,)}, 1)
RANK_FILE = LAYOUT.file_of(0)


def state(images: int) -> State:
    return State(Counters(images, images), SMALL, "digest", ("a",) * 3, LAYOUT, images)


def share(first: int, device: str = "cpu") -> dict[str, Tensor]:
    """Four vectors of 13 different numbers, from `first` on."""
    numbers = torch.arange(first, first + 4 * LAYOUT.total, dtype=torch.float32, device=device)
    return dict(zip(PARTS, numbers.split(LAYOUT.total), strict=True))


def saved(run: Path, images: int) -> dict[str, Tensor]:
    """What the file of a checkpoint holds."""
    return load_file(run / "checkpoints" / f"images-{images:012d}" / RANK_FILE)


def equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(found[part], expected[part]) for part in PARTS)


def no_room(folder: Path) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


@pytest.fixture
def saver(tmp_path: Path) -> Iterator[Saver]:
    with closing(Saver(tmp_path, CheckpointConfig(), World())) as made:
        yield made


# ---------------------------------------------------------------------------------------------------------------------
# The order on the disk
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [True, False])
def test_the_order_that_survives_a_crash(background: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file is on the disk before the manifest names it, the folder before it has its name, its name before
    `latest` says it. So it is where a checkpoint takes the place of another."""
    disk, name = DiskCalls(monkeypatch, tmp_path / "checkpoints"), f"images-{7:012d}"
    temporary = [
        f"sync {name}.tmp/{RANK_FILE}",
        f"sync {name}.tmp/.state.json.tmp",
        f"{name}.tmp/.state.json.tmp -> {name}.tmp/state.json",
        f"sync {name}.tmp/.COMMITTING.tmp",
        f"{name}.tmp/.COMMITTING.tmp -> {name}.tmp/COMMITTING",
        f"sync {name}.tmp",
    ]
    named = [f"{name}.tmp -> {name}", "sync .", "sync .latest.tmp", ".latest.tmp -> latest", f"sync {name}"]
    with closing(Saver(tmp_path, CheckpointConfig(background=background), World())) as saver:
        for first, expected in ((0, temporary + named), (100, [*temporary, f"{name} -> {name}.old", *named])):
            disk.order.clear()
            saver.save(state(7), share(first))
            saver.finish()
            assert disk.order == expected
            assert equal(saved(tmp_path, 7), share(first))
    assert len(disk.moved) == 4 + 5
    assert all(whole for _, whole in disk.moved), f"synced before it was whole: {disk.moved}"


@pytest.mark.parametrize("moved", [False, True])
def test_killed_before_latest_is_moved(moved: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start resumes from the complete checkpoint, unless somebody has moved `latest` meanwhile."""
    with closing(Saver(tmp_path, CheckpointConfig(max_failed=4), World())) as saver:
        for images in (5, 7):
            saver.save(state(images), share(images))
            assert saver.finish()
        monkeypatch.setattr(saver_module, "point_to", no_room)
        for _ in range(3):  # a commit that fails there may be tried again
            saver.save(state(9), share(9))
            assert not saver.finish()
        monkeypatch.undo()
    parent = tmp_path / "checkpoints"
    assert (parent / "latest").read_text() == f"images-{7:012d}\n"
    if moved:
        (parent / "latest").write_text(f"images-{5:012d}")
    start = choose(tmp_path, "require", World()).saved
    assert start
    assert start.state.counters.images_seen == (5 if moved else 9)
    aside = retention.settle(tmp_path, start)
    assert [path.name for path in aside] == ([f"images-{n:012d}.aside" for n in (7, 9)] if moved else [])
    left = [5] if moved else [5, 7, 9]
    assert [path.name for path in complete(tmp_path)] == [f"images-{n:012d}" for n in left]
    assert latest(tmp_path) == start.folder
    assert not list(parent.glob("images-*[0-9]/COMMITTING"))


# ---------------------------------------------------------------------------------------------------------------------
# In the background
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Writers wait for this event."""
    release, write = threading.Event(), flat.write

    def wait(*args: Any, **kwargs: Any) -> Any:
        assert release.wait(60)
        return write(*args, **kwargs)

    monkeypatch.setattr(flat, "write", wait)
    yield release
    release.set()


def test_training_goes_on_and_the_file_has_the_numbers_of_before(
    saver: Saver, held: threading.Event, tmp_path: Path
) -> None:
    live = share(0)
    saver.save(state(7), live)
    for vector in live.values():
        vector.fill_(-1.0)
    held.set()
    saver.finish()
    assert equal(saved(tmp_path, 7), share(0))


def test_the_next_save_leaves_the_numbers_of_the_last_alone(
    saver: Saver, held: threading.Event, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits: here its wait is what lets the first one write."""
    join = threading.Thread.join

    def joined(thread: threading.Thread, *args: Any) -> None:
        held.set()
        join(thread, *args)

    monkeypatch.setattr(threading.Thread, "join", joined)
    saver.save(state(7), share(0))
    saver.save(state(14), share(100))
    saver.finish()
    assert equal(saved(tmp_path, 7), share(0))
    assert equal(saved(tmp_path, 14), share(100))


def test_a_gpus_numbers_have_arrived_before_they_are_written(
    saver: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into pinned memory, piece by piece without waiting for any, and one wait for all of them; the memory is kept for
    the next."""

    def noted(what: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            cuda.calls.append(what)
            return function(*args, **kwargs)

        return run

    monkeypatch.setattr(buffers, "PIECE", 8)  # 13 numbers of a part: 8, 4 and 1
    monkeypatch.setattr(buffers, "SMALLEST", 4)
    with FakeCuda(monkeypatch.setattr) as cuda:
        monkeypatch.setattr(threading.Thread, "start", noted("start", threading.Thread.start))
        monkeypatch.setattr(flat, "write", noted("write", flat.write))
        for number in range(2):
            cuda.calls.clear()
            live = share(100 * number, "cuda:1")
            saver.save(state(7 + number), live)
            for vector in live.values():
                vector.fill_(-1.0)
            saver.finish()
            pieces = [(8,), (4,), (1,)]
            copied = [Copy("buffers", "cuda:1", "cpu", piece, torch.float32, True, True) for piece in pieces]
            made = [("pinned", piece, torch.float32) for piece in pieces] if number == 0 else []
            assert cuda.calls == [*(4 * [*made, *copied]), ("synchronize",), "start", "write"]
    for number in range(2):
        assert equal(saved(tmp_path, 7 + number), share(100 * number))


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong on one rank
# ---------------------------------------------------------------------------------------------------------------------


def test_every_rank_is_told_what_went_wrong_on_one(tmp_path: Path) -> None:
    """In the same words, and before it asks; the checkpoint before it stays the newest, and is whole."""
    first, file = "images-000000000001", "rank-00001-of-00002.safetensors"
    said = [
        [json.loads(line) for line in rank.out.splitlines()] for rank in succeed(2, "tests.programs.saving", [tmp_path])
    ]
    assert said[0] == said[1]
    told = {fault: reason for fault, _, reason, _ in said[0]}
    assert {fault: known for fault, known, *_ in said[0]} == {fault: fault != "none" for fault in FAULTS}
    assert {latest for *_, latest in said[0]} == {first}
    assert told.pop("none") == ""
    for number, (fault, reason) in enumerate(told.items(), 2):
        name = f"images-{number:012d}"
        assert reason.startswith(f"the checkpoint {name} could not be saved: rank {1 if number < 4 else 0} on ")
        assert f"{tmp_path / 'checkpoints' / f'{name}.tmp' / file}" in reason, fault
        assert reason.endswith(f"; {tmp_path / 'checkpoints' / first} is still whole")
    assert "No space left on device" in told["full"]
    assert "ZeroDivisionError('by nought')" in told["unforeseen"]
    assert f"{file} is missing: the run folder (--out) must be on a file system that all nodes share" in told["gone"]
    assert f"{file} has " in told["cut"]
    choice = choose(tmp_path, "require", World())
    assert choice.saved
    assert [path.name for path in complete(tmp_path)] == [choice.saved.folder.name] == [first]


@pytest.mark.parametrize(("end", "logged"), [(9, 4), (4, 4)])
def test_a_full_disk_on_one_rank_ends_the_run_on_all(end: int, logged: int, shards: Path, tmp_path: Path) -> None:
    """At the step after the save, or if that was the last one at the end: one line, and code 74."""
    options = ["--checkpoint.every", str(4 * STEP_BATCH - 1), "--optim.end-at", str(end * STEP_BATCH)]
    options += ["--checkpoint.max-failed", "1"]
    done = start(2, "tests.programs.full_disk", arguments(shards, tmp_path / "run", *options))
    assert [rank.code for rank in done] == [74, 74], done[0].err
    said = [line for rank in done for line in rank.err.splitlines() if line.startswith("megapix: error: ")]
    assert len(said) == 1
    line = said[0]
    assert line in done[0].err
    assert "the checkpoint images-000000000032 could not be saved: rank 1 on " in line
    assert "rank-00001-of-00002.safetensors: No space left on device; there is none before it" in line
    assert max(scalars(tmp_path / "run", "loss/train")) == logged
