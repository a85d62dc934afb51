"""Skipped steps in a row are counted across a stop and a resume."""

from __future__ import annotations

from pathlib import Path

from tests.support.launch import start
from tests.support.small_run import STEP_BATCH, arguments, saved


def test_a_resume_goes_on_counting(shards: Path, tmp_path: Path) -> None:
    """No step is ever applied. The first process is asked to stop before it starts, so it ends after one step; the
    second one is to end at the third step, not at its own third."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    command = arguments(shards, run, "--health.max-skipped", "3")
    done = start(2, "tests.programs.bad_gradients", command, NAN="1:0:1000", NAN_IN="gradient")
    assert [rank.code for rank in done] == [75, 75], done[0].err
    state = saved(run).state
    assert (state.counters.position, state.counters.images_seen) == (STEP_BATCH, 0)
    assert state.skipped_in_a_row == 1
    done = start(2, "tests.programs.bad_gradients", command, NAN="1:0:1000", NAN_IN="gradient")
    assert [rank.code for rank in done] == [1, 1], done[0].err
    assert "step 2 skipped: the gradient is not finite (2 in a row)" in done[0].out
    assert "3 steps in a row were skipped, the last is step 3" in done[0].err
