"""`--profile`: traces that other programs read, of the steps asked for, and a run that goes on unchanged."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megapix import config
from megapix.checkpoint.folder import latest
from megapix.cli import main as cli
from megapix.errors import InputError
from megapix.monitoring.profiling import UNTRACED, Trace
from tests.support.launch import succeed
from tests.support.small_run import STEP_BATCH, arguments, scalars, shard_tensors


def events(path: Path) -> list[dict[str, Any]]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def steps_of(path: Path) -> list[str]:
    """The profiler's own marks of whole steps."""
    return sorted({event["name"] for event in events(path) if str(event.get("name")).startswith("ProfilerStep#")})


@pytest.mark.long
def test_a_traced_run_is_the_same_run(shards: Path, tmp_path: Path) -> None:
    """Seven steps on two ranks: the fourth and fifth are traced on each; losses and weights are equal to the bit."""
    traced, plain = tmp_path / "traced", tmp_path / "plain"
    end = ("--optim.end-at", str(7 * STEP_BATCH))
    succeed(2, "megapix", arguments(shards, traced, *end, "--profile", "2"))
    succeed(2, "megapix", arguments(shards, plain, *end))
    assert not (plain / "profile").exists()
    files = sorted((traced / "profile").iterdir())
    assert [path.name for path in files] == [f"rank-{rank:05d}.4.pt.trace.json.gz" for rank in (0, 1)]
    for path in files:
        assert steps_of(path) == ["ProfilerStep#4", "ProfilerStep#5"]
        names = {event["name"] for event in events(path)}
        assert {"aten::scaled_dot_product_attention", "Optimizer.step#AdamWWithEMA.step"} <= names
    for tag in ("loss/train", "health/grad_norm"):
        assert scalars(traced, tag) == scalars(plain, tag)
    whole, other = (shard_tensors(latest(run)) for run in (traced, plain))
    assert all(torch.equal(whole[name], other[name]) for name in whole)


@pytest.mark.parametrize("ran", [UNTRACED, UNTRACED + 1])
def test_a_run_that_ends_early(ran: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After its first three steps there is something to write; before, it is said that there is not."""
    trace = Trace(5, tmp_path / "profile", rank=3, done=100)
    for _ in range(ran):
        trace.begin_step()
        torch.ones(2).sum()
    trace.close()
    trace.begin_step()  # and nothing happens any more
    written = list(tmp_path.glob("profile/*"))
    if ran == UNTRACED:
        assert written == []
        assert "profile = 5: no trace, as the run ended within its first 3 steps" in capsys.readouterr().err
    else:
        assert [path.name for path in written] == ["rank-00003.104.pt.trace.json.gz"]
        assert steps_of(written[0]) == ["ProfilerStep#4"]


def test_a_trace_that_cannot_be_written_is_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "profile").write_text("a file")
    trace = Trace(1, tmp_path / "profile", rank=0, done=0)
    for _ in range(UNTRACED + 2):
        trace.begin_step()
    assert "the trace cannot be written" in capsys.readouterr().err


def test_a_negative_number_of_steps_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match=r"profile = -1: expected 0 \(off\) or more"):
        config.validate(config.replace(config.tiny(), "profile", -1))
    assert cli.main(["train", "tiny", "--profile", "-1", "--dry-run"]) == 2
    assert capsys.readouterr().err == "megapix: error: profile = -1: expected 0 (off) or more\n"
