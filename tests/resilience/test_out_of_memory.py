"""Too little memory on one rank, or on all: one line that says where and what needs less, and code 1 on every rank."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from megapix import config
from megapix.cli import main as cli
from megapix.config import Config
from megapix.dist import World
from megapix.errors import InputError, OutOfMemory, RunError
from megapix.resilience import out_of_memory
from megapix.resilience.out_of_memory import Lack, lack, of_run
from megapix.shards.index import read_index, write_index
from tests.evaluation.test_evaluate import stats_of
from tests.programs.out_of_memory import GPU
from tests.support.launch import Launch
from tests.support.small_run import SMALL, arguments

HOST = os.uname().nodename
SAID = "2.00 GiB asked, 1.02 GiB of 79.11 GiB free"


def ended(phase: str, ranks: str, command: list[str]) -> str:
    """The one line of two ranks that must both end with code 1, soon."""
    done = Launch(2, "tests.programs.out_of_memory", [phase, ranks, *command]).finish(timeout=90)
    said = "".join(rank.err for rank in done)
    assert [rank.code for rank in done] == [1, 1], said
    assert "Traceback" not in said
    lines = [line for line in said.splitlines() if "megapix: error: " in line]
    # Rank 0 holds the store that says who is first: if it has ended in this moment, another one tells, too.
    assert 1 <= len(lines) <= len(ranks), said
    return lines[0]


LONG = pytest.mark.long
SAVES = ["--checkpoint.every", "9"]
GRID = "--log.grid-columns, --log.grid-classes or --log.samples-every never"
SAMPLES = ["--log.samples-every", "16", "--log.grid-columns", "2"]
ACTIVATIONS = (
    "--machine.micro-batch below 4, --machine.pixel-checkpointing full, --machine.patch-checkpointing full, "
    "--machine.ds-config zero2_offload or more ranks"
)


@pytest.mark.parametrize(
    ("phase", "rank", "where", "less", "options"),
    [
        pytest.param("backward", 1, "step 3, phase 'backward'", ACTIVATIONS, [], id="backward"),
        pytest.param("sample", 0, "step 2, phase 'sample'", GRID, SAMPLES, id="sample"),
        pytest.param("sample", 1, "step 2, phase 'sample'", GRID, SAMPLES, id="sample-1", marks=LONG),
        pytest.param("start", 1, "phase 'start'", "--machine.ds-config zero2_offload or", [], id="start", marks=LONG),
        pytest.param("data", 0, "step 3, phase 'data'", ACTIVATIONS, [], id="data", marks=LONG),
        pytest.param("step", 0, "step 3, phase 'step'", ACTIVATIONS, [], id="step", marks=LONG),
        pytest.param("save", 1, "step 2, phase 'save'", "--machine.ds-", SAVES, id="save", marks=LONG),
    ],
)
def test_one_rank(
    phase: str, rank: int, where: str, less: str, options: list[str], shards: Path, tmp_path: Path
) -> None:
    """The other one may wait for it in a collective, as for the EMA that comes back after a sample grid."""
    line = ended(phase, str(rank), arguments(shards, tmp_path / "run", *options))
    start = f"megapix: error: out of GPU memory on rank {rank} ({HOST}), {where}: {SAID}; less is needed with {less}"
    assert line.startswith(start), line


@pytest.mark.parametrize("seconds", ["60", pytest.param("0", marks=pytest.mark.long)])
def test_all_ranks_at_once(seconds: str, shards: Path, tmp_path: Path) -> None:
    """The first one tells, with a watchdog or without."""
    line = ended("backward", "01", arguments(shards, tmp_path / "run", "--machine.watchdog", seconds))
    assert f", step 3, phase 'backward': {SAID}; less is needed with " in line


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 1])
def test_measures(rank: int, shards: Path, tmp_path: Path) -> None:
    """Within the EMA's weights, too."""
    held_out = Path(shutil.copytree(shards, tmp_path / "held-out"))
    index = read_index(shards)
    write_index(held_out, replace(index, source=index.source | {"kind": "another"}))
    validated = ["--validation.path", str(held_out), "--validation.samples", "40", "--validation.every", "8"]
    line = ended("validate", str(rank), arguments(shards, tmp_path / "a", *validated))
    assert f"rank {rank} ({HOST}), step 1, phase 'validate': {SAID}; less is needed with --validation.every nev" in line
    stats = stats_of(shards, tmp_path / "stats.npz")
    scored = ["--evaluation.reference", str(stats), "--evaluation.every", "8", "--evaluation.count", "8"]
    line = ended("evaluate", str(rank), arguments(shards, tmp_path / "b", *scored, "--evaluation.batch", "4"))
    assert f"rank {rank} ({HOST}), step 1, phase 'evaluate': {SAID}; less is needed with --evaluation.batch bel" in line


@pytest.mark.long
def test_a_save_at_work_is_finished(shards: Path, tmp_path: Path) -> None:
    """The one before the step that fails: the failing rank writes its share of it, and the run can be resumed."""
    command = arguments(shards, tmp_path / "run", "--checkpoint.every", "16")
    ended("backward", "1", command)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("images-*[0-9]"))


@pytest.mark.long
def test_the_host(shards: Path, tmp_path: Path) -> None:
    options = ["--data.workers", "2"]
    line = ended("worker", "1", arguments(shards, tmp_path / "run", *options))
    assert line.endswith(
        f"out of host memory on rank 1 ({HOST}), step 1, phase 'data': 256. PiB asked; "
        "less is needed with --data.workers below 2"
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is recognized, and what is advised
# ---------------------------------------------------------------------------------------------------------------------


def raised(work: Callable[[], object]) -> Exception:
    try:
        work()
    except Exception as error:
        return error
    raise AssertionError("it must fail")


def wrapped() -> object:
    """As torch.compile does."""
    error = RuntimeError("backend='inductor' raised")
    error.inner_exception = torch.OutOfMemoryError(GPU)  # type: ignore[attr-defined]
    raise error


def while_handling() -> object:
    try:
        raise torch.OutOfMemoryError(GPU)
    finally:
        raise KeyError("a hook")


def caught(error: Exception) -> Callable[[], object]:
    def work() -> object:
        raise error

    return work


@pytest.mark.parametrize(
    ("work", "expected"),
    [
        (caught(torch.OutOfMemoryError(GPU)), Lack(True, SAID)),
        (wrapped, Lack(True, SAID)),
        (while_handling, Lack(True, SAID)),
        (
            caught(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 512 bytes. GPU 1 is strange.")),
            Lack(True, "512 bytes asked"),
        ),
        (
            caught(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more than 1EB memory.")),
            Lack(True, "CUDA out of memory. Tried to allocate more than 1EB memory."),
        ),
        (
            caught(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronous")),
            Lack(True, "CUDA error: out of memory"),
        ),
        (
            caught(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
            Lack(True, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        ),
        (lambda: torch.empty(2**50), Lack(False, "4194304.00 GiB asked")),
        (lambda: np.empty(2**58, np.uint8), Lack(False, "256. PiB asked")),
        (caught(MemoryError()), Lack(False, "the bytes are not known")),
        (caught(RuntimeError("shape '[2]' is invalid for input of size 3")), None),
        (caught(KeyError("out of memory")), None),
    ],
)
def test_what_is_a_lack_of_memory(work: Callable[[], object], expected: Lack | None) -> None:
    assert lack(raised(work)) == expected


def test_other_errors_pass() -> None:
    for error in (InputError("x"), RunError("x"), KeyError("x"), OutOfMemory("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught_, out_of_memory.told(World(), lambda: (3, "step"), lambda *_: ()):
            raise error
        assert caught_.value is error


@pytest.mark.parametrize(
    ("options", "phase", "gpu", "expected"),
    [
        ({}, "backward", True, [*ACTIVATIONS.replace(" or", ",").split(", ")]),
        (
            {"pixel_checkpointing": "full", "patch_checkpointing": "full"}, "data", True,
            ["--machine.micro-batch below 4", "--machine.pixel-checkpointing chunked",
             "--machine.ds-config zero2_offload", "more ranks"],
        ),
        (
            {"pixel_checkpointing": "full", "pixel_kernels": "triton", "ds_config": "zero2_offload"}, "agree", True,
            ["--machine.micro-batch below 4", "--machine.patch-checkpointing full", "more ranks"],
        ),
        ({"pixel_checkpointing": "chunked", "patch_checkpointing": 1}, "step", True,
         ["--machine.micro-batch below 4", "--machine.ds-config zero2_offload", "more ranks"]),
        ({}, "start", True, ["--machine.ds-config zero2_offload", "more ranks"]),
        ({}, "validate", True, ["--validation.every never"]),
        ({}, "evaluate", True, ["--evaluation.batch below 64", "--evaluation.every never"]),
        ({}, "score", True, ["--evaluation.batch below 64", "--evaluation.every never"]),
        ({}, "save", False, ["--checkpoint.no-background", "--data.workers below 3"]),
        ({"pixel_checkpointing": "offload", "ds_config": "zero2_offload"}, "backward", False,
         ["--machine.pixel-checkpointing full", "--machine.ds-config zero2", "--data.workers below 3"]),
    ],
)  # fmt: skip
def test_what_needs_less(options: dict[str, object], phase: str, gpu: bool, expected: Sequence[str]) -> None:
    """Nothing that is so already, and nothing that is refused beside what is set."""
    c: Config = config.replace(SMALL, "data.workers", 3)
    for name, value in options.items():
        c = config.replace(c, f"machine.{name}", value)
    assert of_run(c, 4, phase, gpu) == expected
    assert not any("micro-batch" in way for way in of_run(c, 1, phase, gpu))


@pytest.mark.parametrize(
    ("command", "less"),
    [("sample", "; less is needed with --batch or --size"), ("export", "")],
)
def test_a_command_without_phases(
    command: str, less: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, command, lambda *_: caught(torch.OutOfMemoryError(GPU))())
    assert cli.main([command]) == 1
    assert capsys.readouterr().err == f"megapix: error: out of GPU memory, phase '{command}': {SAID}{less}\n"


def test_it_is_known_without_torch() -> None:
    """A command that needs no torch does not load it to find out."""
    code = """
import sys
from megapix.cli import main as cli
cli.COMMANDS["plan"] = lambda *_: bytearray(2**62)
code = cli.main(["plan"])
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = "megapix: error: out of host memory, phase 'plan': the bytes are not known\n"
    assert (done.returncode, done.stderr) == (1, said)
