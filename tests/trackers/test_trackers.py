"""Trackers beside TensorBoard: the real libraries without a network, across kill -9 and a resume; and bad ones."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import sqlite3
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megapix.dist import free_port
from megapix.trackers import tracker
from megapix.trackers.tracker import Tracker, remembered
from tests.support.launch import Launch, start, succeed
from tests.support.small_run import STEP_BATCH, arguments, counters, logged, refused, scalars

SAVED = 4
"""Steps between checkpoints."""
LOSS = "loss/train"


def of_wandb(run: Path, folder: Path) -> tuple[set[str], dict[str, list[tuple[int, float]]]]:
    """Ids, and tag -> (step, value), of the transaction logs that wandb has written offline: LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    def records(data: bytes) -> Iterator[bytes]:
        at, whole = 7, b""
        while at < len(data):
            if (left := 32768 - at % 32768) < 7:
                at += left
                continue
            size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            whole += data[at + 7 : at + 7 + size]
            at += 7 + size
            if kind in (1, 4):  # whole, or the last part
                yield whole
                whole = b""

    ids, found = set[str](), dict[str, list[tuple[int, float]]]()
    for path in sorted((run / "wandb").glob("offline-run-*/*.wandb")):
        for record in map(Record.FromString, records(path.read_bytes())):
            if record.HasField("run"):
                ids.add(record.run.run_id)
            row = {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
            for tag, value in row.items():
                found.setdefault(tag, []).append((int(row["_step"]), value))
    return ids, found


def of_trackio(run: Path, folder: Path) -> tuple[set[str], dict[str, list[tuple[int, float]]]]:
    """The same of Trackio's file of the project."""
    (path,) = folder.glob("megapix*.db")
    ids, found = set[str](), dict[str, list[tuple[int, float]]]()
    for name, step, metrics in sqlite3.connect(path).execute("select run_name, step, metrics from metrics order by id"):
        ids.add(name)
        for tag, value in json.loads(metrics).items():
            found.setdefault(tag, []).append((step, value))
    return ids, found


def of_mlflow(run: Path, folder: Path) -> tuple[set[str], dict[str, list[tuple[int, float]]]]:
    """The same through MLflow's client."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    runs = client.search_runs([client.get_experiment_by_name("megapix").experiment_id])
    (only,) = runs
    assert only.info.status == "FINISHED"
    assert only.info.artifact_uri.startswith((folder / "mlruns").as_uri())
    assert only.data.params["optim.global_batch"] == str(STEP_BATCH)
    of_tag = {tag: client.get_metric_history(only.info.run_id, tag) for tag in only.data.metrics}
    values = {tag: [(m.step, m.value) for m in history] for tag, history in of_tag.items()}
    values["samples/ema"] = [(int(a.path[-13:-4]), 0.0) for a in client.list_artifacts(only.info.run_id, "samples/ema")]
    return {only.info.run_id}, values


READERS: dict[str, Callable[[Path, Path], tuple[set[str], dict[str, list[tuple[int, float]]]]]] = {
    "wandb": of_wandb,
    "trackio": of_trackio,
    "mlflow": of_mlflow,
}


def wait_for_the_end_of_its_process(run: Path, name: str) -> None:
    """The tracker's process outlives the run, until what it was handed is written."""
    with open(run / tracker.FOLDER / f"{name}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


@pytest.mark.long
@pytest.mark.parametrize("name", READERS)
def test_one_run_across_a_kill_and_a_resume(
    name: str, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are taken again are logged once, and every tag has TensorBoard's step and value."""
    if find_spec(name) is None:
        pytest.skip(f"needs the extra {name}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    run = tmp_path / "run"
    options = ["--checkpoint.every", str(SAVED * STEP_BATCH), "--log.tracker", name, "--log.grid-columns", "1"]
    options += ["--log.samples-every", str(3 * STEP_BATCH)]
    first = Launch(1, "megapix", arguments(shards, run, *options, "--optim.end-at", str(10**9)))
    try:
        first.wait_for(lambda: remembered(run, name).get("step", 0) >= SAVED + 2)
        os.kill(first.processes[0].pid, signal.SIGKILL)
    finally:
        first.kill()
    wait_for_the_end_of_its_process(run, name)
    handed, again = remembered(run, name)["step"], counters(run).images_seen // STEP_BATCH
    end = max(logged(run)) + 4
    (rank,) = succeed(1, "megapix", arguments(shards, run, *options, "--optim.end-at", str(end * STEP_BATCH)))
    last = remembered(run, name)
    assert last["step"] == end
    assert rank.err.count(f"log.tracker {name}") == (1 if handed > again else 0), rank.err
    assert "Traceback" not in rank.err

    ids, found = READERS[name](run, tmp_path)
    assert ids == {last["id"]}
    kept = sorted({*range(1, handed + 1), *range(again + 1, end + 1)})  # a tracker that lags loses what had to wait
    assert [step for step, _ in found[LOSS]] == kept, "each step once"
    board = scalars(run, LOSS)
    assert sorted(board) == list(range(1, end + 1))
    assert dict(found[LOSS]) == pytest.approx({step: board[step] for step in kept}), "a resumed run logs the same"
    assert {"schedule/lr", "health/grad_norm", "blocks/grad_norm/pit_0", "speed/images_per_s"} <= found.keys()
    grids = {step for tag, rows in found.items() if tag.startswith("samples/ema") for step, _ in rows}
    assert {3, 6} <= grids, found.keys()


@pytest.mark.long
def test_an_outage_is_one_warning(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that nobody listens at."""
    if find_spec("mlflow") is None:
        pytest.skip("needs the extra mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    command = arguments(shards, tmp_path / "run", "--log.tracker", "mlflow", "--optim.end-at", str(3 * STEP_BATCH))
    (rank,) = start(1, "megapix", command)
    assert rank.code == 0
    assert rank.err.count("log.tracker mlflow: ") == 1
    assert "Traceback" not in rank.err
    assert "rows are lost" in rank.err
    assert logged(tmp_path / "run") == [1, 2, 3]


def library(folder: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package `wandb` that keeps what it is called with in FOLDER/calls, and does what `code` says besides."""
    (folder / "wandb").mkdir()
    (folder / "wandb" / "__init__.py").write_text(f"""
import json, os, sys, time
def note(*what):
    with open({str(folder / "calls")!r}, "a") as file:
        file.write(json.dumps(what) + "\\n")
class Run:
    def log(self, row, step):
        note(step, sorted(row))
        log(row, step)
    def finish(self):
        note("finish")
        finish()
class Image:
    def __init__(self, image):
        note("image", list(image.getpixel((1, 0))))
class Settings:
    def __init__(self, **options): pass
def init(id, config, **options):
    note("init", id, config)
    print("noise on stdout")
    return Run()
def log(row, step): pass
def finish(): pass
{code}
""")
    monkeypatch.setenv("PYTHONPATH", f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")


def calls(folder: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (folder / "calls").read_text().splitlines()]


def play(run: Path, first_step: int, steps: range) -> None:
    """Log one row of each step, a picture and an event, as a run does."""
    board = Tracker("wandb", run, first_step)
    board.configuration(first_step, {"seed": 7})
    for step in steps:
        board.scalars(step, {LOSS: 1.0 / step, "loss/repa": float("nan")})
        board.scalars(step, {"blocks/x": 1.0})
    picture = np.zeros((2, 3, 3), np.uint8)
    picture[0, 1] = 1, 2, 3
    board.image(steps[-1], "samples/ema", picture)
    board.event(first_step, "happened")
    board.close()


def test_rows_of_steps_that_are_taken_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library(tmp_path, "", monkeypatch)
    play(tmp_path / "run", 0, range(1, 8))
    assert capsys.readouterr().err == ""
    first = calls(tmp_path)
    rows = [call for step in range(1, 8) for call in ([step, [LOSS]], [step, ["blocks/x"]])]
    tail = [["image", [1, 2, 3]], [7, ["samples/ema"]]]
    assert first[0][0] == "init"
    assert first[0][2] == {"seed": 7}
    assert first[1:] == [*rows, *tail, [7, ["events"]], ["finish"]], "a text comes at the last step"
    (tmp_path / "calls").unlink()
    play(tmp_path / "run", 4, range(5, 10))
    (line,) = capsys.readouterr().err.splitlines()
    assert "log.tracker wandb: has steps 5 to 7 of the process before, which are taken again" in line
    second = calls(tmp_path)
    assert second[0] == first[0], "one run"
    assert second[1:5] == [[8, [LOSS]], [8, ["blocks/x"]], [9, [LOSS]], [9, ["blocks/x"]]]
    assert [9, ["events"]] in second


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("def log(row, step): raise ConnectionError('no\\nroute')", "ConnectionError: no route (rows are lost"),
        ("def init(**options): raise ValueError('no key')", "ValueError: no key (rows are lost"),
        ("import no_such_module_of_its", "ModuleNotFoundError: No module named 'no_such_module_of_its'"),
        ("def log(row, step): os._exit(3)", "its process has ended with 3; the run goes on without it"),
        ("def finish(): time.sleep(600)", "has not ended within 2 s"),
        ("def log(row, step): time.sleep(600)", "has not ended within 2 s"),
    ],
)
def test_what_a_library_does_is_one_warning(
    code: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker, "PATIENCE", 2.0 if "sleep" in code else 60.0)
    library(tmp_path, code, monkeypatch)
    play(tmp_path / "run", 0, range(1, 50))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megapix: warning: log.tracker wandb: ")
    assert words in line


def test_an_outage_that_ends_costs_its_rows_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library(tmp_path, "def log(row, step):\n    if 2 < step < 5: raise OSError('away')", monkeypatch)
    play(tmp_path / "run", 0, range(1, 8))
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert [7, [LOSS]] in calls(tmp_path)
    assert remembered(tmp_path / "run", "wandb")["step"] == 7


def test_more_rows_than_may_wait_are_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracker, "WAITING", 5)
    monkeypatch.setattr(tracker, "PATIENCE", 1.0)
    library(tmp_path, "def log(row, step): time.sleep(600)", monkeypatch)
    board = Tracker("wandb", tmp_path / "run", 0)
    board.configuration(0, {})
    for step in range(1, 50):
        board.image(step, "samples/ema", np.zeros((300, 300, 3), np.uint8) + np.uint8(step))
        board.scalars(step, dict.fromkeys(map(str, range(2000)), 1.0))
    assert "5 rows wait for it: newer ones are lost" in capsys.readouterr().err
    board.close()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("wandb,tensorboard", "log.tracker = 'wandb,tensorboard': expected 'wandb', 'trackio', 'mlflow', or several"),
        ("mlflow,mlflow", "log.tracker = 'mlflow,mlflow': expected"),
    ],
)
def test_a_tracker_that_does_not_exist(
    value: str, words: str, own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = arguments(own_shards, tmp_path / "run", "--log.tracker", value, "--dry-run")
    assert words in refused(command, capsys)


def test_a_tracker_that_is_not_installed(
    own_shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megapix.trackers.find_spec", lambda name: None)
    command = arguments(own_shards, tmp_path / "run", "--log.tracker", "trackio", "--dry-run")
    assert "log.tracker = 'trackio': the package trackio is not installed: pip install" in refused(command, capsys)
