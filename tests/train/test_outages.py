"""Runs whose storage fails for a while: they end as the undisturbed one does, bit for bit, or with a code of their
own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.support.launch import Forked, Launch, Rank, start, succeed
from tests.support.programs import needs
from tests.support.servers import nginx
from tests.support.small_run import STEP_BATCH, arguments, flat_vectors, logged, saved, scalars

PROGRAM = "tests.programs.failing_disk"
EVERY = ["--checkpoint.every", str(5 * STEP_BATCH)]
HALF = ["--optim.end-at", str(10 * STEP_BATCH)]


@pytest.fixture(scope="module")
def undisturbed(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 20 steps on two ranks."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    succeed(2, "megapix", arguments(shards, run, *EVERY))
    return run


def same(run: Path, other: Path) -> bool:
    a, b = flat_vectors(saved(run).folder), flat_vectors(saved(other).folder)
    return all(torch.equal(a[part], b[part]) for part in a) and scalars(run, "loss/train") == scalars(
        other, "loss/train"
    )


def errors(done: list[Rank]) -> list[str]:
    return [line for rank in done for line in rank.err.splitlines() if line.startswith("megapix: error: ")]


def test_transient_errors_change_no_bit(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    """Of a shard on each rank, of the index, of a save in the middle and of a last one; then of two files of the
    checkpoint at the resume."""
    run = tmp_path / "run"
    faults = [
        {"rank": 0, "part": "shard-000001.tar", "after": 5, "error": 5},
        {"rank": 1, "part": "shard-000000.tar", "after": 7, "error": 116, "times": 3},
        {"rank": 1, "part": "index.json", "error": 116},
        {"rank": 0, "part": "samples.bin", "after": 20},
        {"rank": 1, "writes": [1, 2, 3]},
    ]
    done = succeed(2, PROGRAM, arguments(shards, run, *EVERY, *HALF), RANKS_DISK=json.dumps(faults))
    warned = "".join(rank.err for rank in done)
    assert "the checkpoint images-000000000040 could not be saved: rank 1 on " in warned
    assert "shard-000001.tar: Input/output error; tried again" in done[0].err
    assert "replaced" not in warned
    assert [path.name for path in (run / "checkpoints").glob("images-*")] == ["images-000000000080"]
    state, losses = saved(run).state, scalars(run, "loss/train")
    assert state.previous == 0, "the checkpoint before it is not the one that failed"
    assert state.loss == pytest.approx(sum(losses.values()) / 10)
    faults = [
        {"rank": 0, "part": "rank-00000-of-00002.safetensors", "after": 2},
        {"rank": 1, "part": "rank-00001-of-00002.safetensors", "after": 3, "error": 116},
        {"rank": 1, "part": "/state.json", "after": 1},
    ]
    done = succeed(2, PROGRAM, arguments(shards, run, *EVERY), RANKS_DISK=json.dumps(faults))
    assert "refused" not in done[0].err + done[1].err
    assert not list((run / "checkpoints").glob("*.aside"))
    assert same(run, undisturbed)


def test_a_shard_that_stays_away_ends_the_run(shards: Path, tmp_path: Path) -> None:
    """With one line and a code of its own on both ranks, and no sample is replaced."""
    fault = [{"rank": 1, "part": "shard-000001.tar", "after": 3, "times": 10**9}]
    options = ["--data.outage-minutes", "0.01", "--data.corrupt-shard", "replace"]
    done = start(2, PROGRAM, arguments(shards, tmp_path / "run", *options), RANKS_DISK=json.dumps(fault))
    assert [rank.code for rank in done] == [74, 74], done[1].err
    assert "shard-000001.tar: Input/output error; tried again for 0.01 minutes" in done[0].err + done[1].err
    assert "replaced" not in done[0].err + done[1].err
    assert "Traceback" not in done[0].err + done[1].err


def test_a_checkpoint_that_stays_away_is_not_given_up(undisturbed: Path, shards: Path) -> None:
    before = sorted(path.name for path in (undisturbed / "checkpoints").iterdir())
    fault = [{"rank": 1, "part": "rank-00001-of-00002.safetensors", "times": 10**9}]
    command = arguments(shards, undisturbed, *EVERY, "--data.outage-minutes", "0.01", "--optim.end-at", "400")
    done = start(2, PROGRAM, command, RANKS_DISK=json.dumps(fault))
    assert [rank.code for rank in done] == [74, 74], done[1].err
    (line,) = errors(done)
    assert "rank 1 on " in line
    assert line.endswith("rank-00001-of-00002.safetensors: Input/output error; tried again for 0.01 minutes")
    assert sorted(path.name for path in (undisturbed / "checkpoints").iterdir()) == before


@needs("nginx")
def test_a_server_that_is_away_is_waited_for(undisturbed: Path, shards: Path, tmp_path: Path) -> None:
    """It is stopped while two ranks read, and comes back once one of them has said that it waits for it; the other may
    have read ahead, and wait for the one."""
    pytest.importorskip("aiohttp")
    run = tmp_path / "run"

    def said(launch: Launch) -> bool:
        return any(
            isinstance(process, Forked) and "tried again, for" in process.error_text() for process in launch.processes
        )

    with nginx(shards, tmp_path) as server:
        # The cache is of the index alone: a rank could have all shards by then, and wait for nothing.
        remote = ["--data.path", server.url, "--data.cache", str(tmp_path / "cache"), "--data.cache-gib", "0"]
        remote += ["--data.outage-minutes", "2"]
        launch = Launch(2, "megapix", arguments(shards, run, *EVERY, *remote))
        try:
            launch.wait_for(lambda: len(logged(run)) >= 2)
            server.stop()
            launch.wait_for(lambda: said(launch))
            server.start()
            done = launch.finish(timeout=120)
        finally:
            launch.kill()
    assert [rank.code for rank in done] == [0, 0], done[0].err
    assert same(run, undisturbed)
