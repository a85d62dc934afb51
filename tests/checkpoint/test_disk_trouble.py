"""A checkpoint that cannot be read now is not damaged: it is read later, or the run ends; no older one takes its
place. A save that fails is tried again."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from megapix import outage
from megapix.checkpoint import saver, vectors
from megapix.checkpoint.find import choose
from megapix.checkpoint.folder import complete
from megapix.checkpoint.layout import PARTS, Layout
from megapix.checkpoint.manifest import Counters, State
from megapix.checkpoint.saver import Saver
from megapix.config import CheckpointConfig
from megapix.dist import World
from megapix.errors import RunError, StorageError
from tests.support.failing_disk import Failing, failing
from tests.support.made_run import LAYOUT, add_checkpoint, numbers
from tests.support.small_run import SMALL

READS = ["checkpoints", "latest", "images-000000000010", "images-000000000010/state.json", "rank-00001"]
"""What is read of a run folder, by a part of its path."""


@pytest.fixture(autouse=True)
def patience() -> Iterator[None]:
    outage.wait_at_most(0.002)
    yield
    outage.wait_at_most(10)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for images in (5, 10):
        add_checkpoint(tmp_path / "run", images)
    return tmp_path / "run"


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("part", READS)
def test_one_error_at_resume_changes_nothing(part: str, error: int, run: Path) -> None:
    """Whichever touch of the file it is."""
    with failing(Failing(part, times=0)) as disk:
        choose(run, "auto", World())
    assert disk.seen
    for after in range(disk.seen):
        with failing(Failing(part, 1, error, after)):
            choice = choose(run, "auto", World())
        assert choice.saved
        assert (choice.saved.folder.name, choice.refused) == ("images-000000000010", ())


@pytest.mark.parametrize("part", READS)
def test_a_disk_that_stays_away_at_resume_ends_the_run(part: str, run: Path) -> None:
    before = sorted(run.rglob("*"))
    with failing(Failing(part, times=10**9)), pytest.raises(StorageError, match="Input/output error; tried again for"):
        choose(run, "auto", World())
    assert sorted(run.rglob("*")) == before
    assert choose(run, "require", World()).saved


def test_a_folder_that_cannot_be_listed_now_is_not_empty(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken_list(_: object) -> list[str]:
        raise broken()

    monkeypatch.setattr(os, "listdir", broken_list)
    with pytest.raises(StorageError, match="checkpoints: Input/output error"):
        complete(run)


def test_numbers_are_read_again(run: Path) -> None:
    folder, vector = complete(run)[-1], torch.zeros(LAYOUT.total)
    for after in range(3):
        with failing(Failing("rank-0000", 1, errno.EIO, after)):
            vectors.fill(vector, folder, LAYOUT, "ema", 0)
        assert torch.equal(vector, numbers("ema"))
        vector.zero_()


def test_retention_removes_nothing_for_want_of_reading(run: Path) -> None:
    add_checkpoint(run, 15)
    for part in ("images-000000000005/state.json", "rank-00000"):
        with failing(Failing(part, 10**9)):
            saver._prune(run, run / "checkpoints" / "images-000000000015", CheckpointConfig(keep=2))
        assert len(complete(run)) == 3


# ---------------------------------------------------------------------------------------------------------------------
# Saving
# ---------------------------------------------------------------------------------------------------------------------

ONE = Layout({"a": (5,)}, 1)


def state(images: int) -> State:
    return State(Counters(images, images), SMALL, "digest", ("a",) * 3, ONE, images)


def share(first: float) -> dict[str, torch.Tensor]:
    return {part: torch.full((5,), first) for part in PARTS}


@pytest.fixture
def writing(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exception | None]]:
    """What the next writes of a rank's file end in; they succeed where nothing is left."""
    ends: list[Exception | None] = []
    write: Callable[..., Any] = vectors.write

    def maybe(path: Path, *args: Any) -> Any:
        if ends and (error := ends.pop(0)):
            raise error
        return write(path, *args)

    monkeypatch.setattr(vectors, "write", maybe)
    monkeypatch.setattr(saver, "PAUSES", (0.0, 0.0))
    return ends


def broken(number: int = errno.EIO) -> OSError:
    return OSError(number, os.strerror(number))


def saver_of(run: Path, background: bool = True) -> closing[Saver]:
    return closing(Saver(run, CheckpointConfig(background=background, max_failed=2), World()))


@pytest.mark.parametrize("background", [True, False])
def test_a_failed_save_is_a_warning(
    background: bool, writing: list[Exception | None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writing += [broken(), None, broken(), None]
    with saver_of(tmp_path, background) as saves:
        ends = []
        for images in (1, 2, 3, 4):
            saves.save(state(images), share(images))
            ends.append(saves.finish())
    assert ends == [False, True, False, True], "not in a row"
    assert [path.name[-1] for path in complete(tmp_path)] == ["2", "4"]
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("megapix: warning: the checkpoint images-000000000001 could not be saved: ")
    assert "Input/output error; there is none before it; the next one is tried when it is due (1 in a row" in first
    assert "images-000000000002 is still whole" in second


@pytest.mark.parametrize(
    ("error", "kind"), [(broken(errno.ENOSPC), StorageError), (broken(), StorageError), (ZeroDivisionError(), RunError)]
)
def test_failed_saves_in_a_row_end_the_run(
    error: Exception, kind: type[RunError], writing: list[Exception | None], tmp_path: Path
) -> None:
    writing += [error] * 2
    with saver_of(tmp_path) as saves:
        saves.save(state(1), share(1))
        assert not saves.finish()
        saves.save(state(2), share(2))
        with pytest.raises(RunError, match="images-000000000002 could not be saved") as caught:
            saves.finish()
        assert isinstance(caught.value, StorageError) is (kind is StorageError)


@pytest.mark.parametrize("background", [True, False])
def test_the_last_save_is_tried_again(background: bool, writing: list[Exception | None], tmp_path: Path) -> None:
    writing += [broken(), broken(), None, broken(), broken(), broken()]
    with saver_of(tmp_path, background) as saves:
        saves.save(state(1), share(1))
        saves.settle()
        assert choose(tmp_path, "require", World()).saved
        saves.save(state(2), share(2))
        with pytest.raises(StorageError, match="images-000000000001 is still whole"):
            saves.settle()
    assert not writing


def test_the_disk_that_fails_is_not_waited_for_again(tmp_path: Path) -> None:
    """To say what there was before."""
    outage.wait_at_most(1000)
    with saver_of(tmp_path) as saves:
        saves.save(state(1), share(1))
        saves.settle()
        with failing(Failing("checkpoints", 10**9)):
            saves.save(state(2), share(2))
            saves._join()
        assert str(saves._problem).endswith("what is before it cannot be seen now")
