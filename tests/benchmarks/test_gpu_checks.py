"""`python -m benchmarks.gpu_checks`: what becomes of a way's process, the file that grows, real ways on the CPU."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu_checks, gpu_child
from benchmarks.gpu_checks import follow, run
from benchmarks.gpu_report import HEADS, Report, about
from benchmarks.gpu_ways import WAYS, Way, of
from megapix import config
from megapix.dist import World
from megapix.errors import InputError
from tests.support.launch import ROOT

CPU = torch.device("cpu")
LONG = 60.0
STEP = Way("ours", "step", needs=1, limit=60, micro=6)
ABOUT = {
    **{"kind": "about", "device": "NVIDIA H100 80GB HBM3", "memory": 79 * 2**30, "driver": "570.86.15"},
    **{"cuda": "12.8", "cudnn": "91002", "torch": "2.13.0", "triton": "3.7.1", "deepspeed": "0.19.8"},
}
TIMED = {
    **{"kind": "step", "micro": 6, "policy": "none, none", "images_per_s": 250.0, "tflops": 200.0, "sheet": 1000.0},
    **{"memory": 3 * 2**29, "kernels": "attention flash x 30; not compiled; plain pixel kernels"},
}
HOLDS = {
    **{"kind": "parity", "dtype": "bf16", "blocks": "pixel full", "outputs": 0.004, "gradients": 0.01},
    **{"bounds": [0.008, 0.02], "holds": True, "attention": "cudnn"},
}


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    kept = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, kept)


# ---------------------------------------------------------------------------------------------------------------------
# A way's process
# ---------------------------------------------------------------------------------------------------------------------


def followed(code: str, seconds: float = LONG) -> tuple[str | None, list[dict[str, Any]]]:
    """What `follow` says of a process that runs this code, and the rows it took."""
    rows: list[dict[str, Any]] = []
    return follow([sys.executable, "-c", f"import os, sys, time\n{code}"], seconds, rows.append), rows


FIRST = """print('{"kind": "a"}', flush=True)\n"""
END = """print('{"kind": "end"}', flush=True)\n"""


def test_rows_come_before_the_end() -> None:
    assert followed(FIRST + END) == (None, [{"kind": "a"}])


def test_a_process_that_does_not_end_after_its_last_row_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_checks, "LINGERS", 0.1)
    start = time.monotonic()
    assert followed(FIRST + END + "time.sleep(60)") == (None, [{"kind": "a"}])
    assert time.monotonic() - start < 30


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("os.abort()", "ended by SIGABRT"),
        ("os.kill(os.getpid(), 9)", "ended by SIGKILL"),
        ("sys.exit('no such thing')", "ended with code 1: no such thing"),
        ("1 / 0", "ended with code 1: ZeroDivisionError: division by zero"),
        ("os._exit(3)", "ended with code 3: it said nothing"),
        ("""print('{"kind": "ha', end='', flush=True); os.abort()""", "ended by SIGABRT"),  # within a row
    ],
)
def test_a_crash_has_a_reason(code: str, why: str) -> None:
    assert followed(FIRST + code) == (why, [{"kind": "a"}])


def test_a_way_has_a_time_limit_and_leaves_no_process(tmp_path: Path) -> None:
    """It holds for what the process has started too, which would keep its output open."""
    code = f"pid = os.fork() or os.getpid()\nopen({str(tmp_path)!r} + f'/{{os.getpid()}}', 'w')\ntime.sleep(60)"
    assert followed(code, 3)[0] == "ended after 3 s, its limit"
    started = [int(path.name) for path in tmp_path.iterdir()]
    assert len(started) == 2
    for pid in started:
        with suppress(ProcessLookupError):
            ended, _, _ = select.select([os.pidfd_open(pid)], [], [], LONG)  # readable at its end
            assert ended


# ---------------------------------------------------------------------------------------------------------------------
# All ways
# ---------------------------------------------------------------------------------------------------------------------


def played(tmp_path: Path, answers: dict[str, str]) -> list[str]:
    """A program in place of the ways': it answers to '--way NAME --micro N' with the lines of 'NAME N'."""
    program = tmp_path / "way.py"
    program.write_text(f"import sys\nprint({answers!r}[sys.argv[2] + ' ' + sys.argv[4]])\n")
    return [sys.executable, str(program)]


def lines(*rows: dict[str, Any]) -> str:
    return "\n".join(json.dumps(row) for row in (*rows, {"kind": "end"}))


def cells(text: str, table: str) -> list[list[str]]:
    """Rows of a table of the file, which are all whole."""
    part = text.partition(f"## {table.capitalize()}\n")[2].partition("\n## ")[0]
    found = [line[2:-2].split(" | ") for line in part.splitlines() if line.startswith("|")]
    head, rule, *rows = found
    assert head == list(HEADS[table])
    assert set("".join(rule)) == {"-", "|"}
    assert {len(row) for row in rows} <= {len(head)}
    return rows


def test_half_the_micro_batch_where_memory_ran_out(tmp_path: Path) -> None:
    """13 images do not fit, nor do 6; 3 do, which are in the list anyway, and are not run twice."""
    out = tmp_path / "found.md"
    oom = {"kind": "oom", "policy": "full, none", "phase": "step 1", "asked": "2.50 GiB"}
    answers = {
        "ours 13": lines(ABOUT, oom | {"micro": 13}),
        "ours 6": lines(ABOUT, oom | {"micro": 6}),
        "ours 3": lines(ABOUT, TIMED | {"micro": 3}),
    }
    ways = [Way("ours", "step", needs=0, micro=micro) for micro in (13, 3)]
    assert run(ways, played(tmp_path, answers), Report(out), LONG) == 0
    rows = cells(out.read_text(), "speed")
    assert [row[:4] for row in rows] == [
        ["ours", "full, none", "13", "out of memory in step 1, which asked for 2.50 GiB"],
        ["ours", "full, none", "6", "out of memory in step 1, which asked for 2.50 GiB"],
        ["ours", "none, none", "3", "250"],
    ]


def test_what_no_longer_fits_is_skipped(tmp_path: Path) -> None:
    """And a shorter one after it is run. A check that was skipped has not failed."""
    out = tmp_path / "found.md"
    ways = [Way("blocks", "parity", needs=90), Way("long", "step", needs=61), Way("short", "step", needs=1, micro=6)]
    assert run(ways, played(tmp_path, {"short 6": lines(ABOUT, TIMED)}), Report(out), 60) == 0
    text = out.read_text()
    assert cells(text, "parity")[0][2] == "skipped: it needs about 90 s, and 60 s are left"
    assert [row[3] for row in cells(text, "speed")] == ["skipped: it needs about 61 s, and 60 s are left", "250"]


def test_the_time_that_is_left_is_a_limit_too(tmp_path: Path) -> None:
    (tmp_path / "way.py").write_text("import time\ntime.sleep(60)")
    out, start = tmp_path / "found.md", time.monotonic()
    assert run([Way("slow", "step", needs=0)], [sys.executable, str(tmp_path / "way.py")], Report(out), 1) == 0
    assert time.monotonic() - start < 30
    assert cells(out.read_text(), "speed") == [["slow", "", "chosen", "ended after 1 s, its limit", "", "", "", ""]]


def test_the_exit_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """1 if a check does not hold, or did not come to its end; 2 without a GPU, in one line; 0 whatever else happens."""
    blocks = Way("blocks", "parity", needs=0)

    def code(answer: str, way: Way = blocks) -> int:
        return run([way], played(tmp_path, {f"{way.name} {way.micro}": answer}), Report(None), LONG)

    assert code(lines(ABOUT, HOLDS)) == 0
    assert code(lines(ABOUT, HOLDS, HOLDS | {"holds": False})) == 1
    assert code(json.dumps(HOLDS)) == 1, "no end"
    assert code(lines({"kind": "refused", "why": "no compiler", "micro": 0})) == 1
    assert code(json.dumps(TIMED), STEP) == 0
    assert code(lines({"kind": "refused", "why": "too large", "micro": 6}), STEP) == 0
    capsys.readouterr()
    assert code(lines({"kind": "no gpu"})) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_the_file_is_whole_after_each_row(tmp_path: Path) -> None:
    """By hand: 200 of 1,000 and of 800 TFLOP/s. What a row before was written is still there."""
    out = tmp_path / "found.md"
    report = Report(out)
    report.add(STEP, ABOUT)
    head = "NVIDIA H100 80GB HBM3, 79.0 GiB; driver 570.86.15; CUDA 12.8; cuDNN 91002; torch 2.13.0; "
    head += "Triton 3.7.1; DeepSpeed 0.19.8"
    assert out.read_text() == f"# GPU checks\n\n{head}\n"
    report.add(STEP, TIMED)
    report.add(STEP, {"kind": "card", "tflops": 800.0, "product": "8192 x 8192 x 8192", "sheet": 989.0})
    report.add(STEP, TIMED)
    assert "Best matmul here: 800 TFLOP/s (8192 x 8192 x 8192); data sheet: 989." in out.read_text()
    report.add(Way("blocks", "parity"), HOLDS)
    report.ended(Way("blocks | fp32", "parity", precision="fp32"), "ended by\nSIGABRT")
    text = out.read_text()
    start = ["ours", "none, none", "6", "250", "20.0 %"]
    assert cells(text, "speed") == [
        [*start, "", "1.5", TIMED["kernels"]],
        [*start, "25.0 %", "1.5", TIMED["kernels"]],
    ]
    assert cells(text, "parity") == [
        ["bf16", "pixel full", "4.0e-03", "1.0e-02", "8.0e-03, 2.0e-02", "yes", "cudnn"],
        ["fp32", "blocks / fp32", "ended by SIGABRT", "", "", "", ""],
    ]
    assert report.failed
    assert list(tmp_path.iterdir()) == [out]
    assert about(ABOUT | {"memory": 0, "driver": "", "cuda": "", "cudnn": ""}).startswith(
        "NVIDIA H100 80GB HBM3; torch"
    )


def test_every_way_can_be_asked_for() -> None:
    """Each has a name and a micro batch of its own, options that exist, and the time that it needs; the first five
    minutes answer what matters most."""
    assert len({(way.name, way.micro) for way in WAYS}) == len(WAYS)
    for way in WAYS:
        assert of(way.name, way.micro, WAYS) == next(w for w in WAYS if (w.name, w.micro) == (way.name, way.micro)) or (
            way.name == "ours, compiled"  # of which only `needs` differs
        )
        assert way.needs <= way.limit
        assert set(way.machine) <= {key for key, _, _ in config.leaves(config.MachineConfig())}
        config.preset(way.preset)
    first = WAYS[:7]
    assert {way.kind for way in first} == {"card", "parity", "step", "plain"}
    assert sum(way.needs for way in first) <= 345
    assert sum(way.needs for way in WAYS[: WAYS.index(of("ours, default, text, 1024 pixels", 0, WAYS)) + 1]) <= 1560


def test_bad_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for options, words in (
        (["--only", "nope"], "--only 'nope': no way has these words"),
        (["--way", "nope"], "--way 'nope' does not exist"),
        (["--out", str(tmp_path)], "is a folder; expected a file"),
    ):
        with pytest.raises(InputError, match=words):
            gpu_checks.main(options)


# ---------------------------------------------------------------------------------------------------------------------
# Within a way
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_parity_of_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 a policy holds; an output that is off by a thousandth does not, nor does NaN."""
    way = Way("blocks", "parity", precision="fp32", policies=(("full", 2),))
    (found,) = gpu_child.parity(way, 1, World(), CPU, {})
    assert (found["blocks"], found["holds"]) == ("pixel full, patch 2", True)
    assert 0 < found["gradients"] < 1e-5
    assert found["attention"] == "flash for CPUs"
    build = gpu_child.build_network

    def wrong(factor: float) -> Any:
        def changed(*arguments: Any) -> nn.Module:
            net = build(*arguments)
            net.final_layer.register_forward_hook(lambda module, given, out: out * factor)
            return net

        return changed

    for factor in (1.001, float("nan")):
        monkeypatch.setattr(gpu_child, "build_network", wrong(factor))
        assert [row["holds"] for row in gpu_child.parity(way, 1, World(), CPU, {})] == [False]


def test_noise_on_another_device_has_the_cpus_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for the device; one number's last bit there makes the check fail."""
    way = Way("noise", "noise")
    assert [row["holds"] for row in gpu_child.noise(way, 1, World(), CPU, {})] == [True, True]
    normal, calls = gpu_child.normal, []

    def other(*arguments: Any) -> torch.Tensor:
        calls.append(arguments)
        out = normal(*arguments).contiguous()
        if len(calls) % 2 == 0:
            out.view(-1).view(torch.int32)[-1] ^= 1
        return out

    monkeypatch.setattr(gpu_child, "normal", other)
    assert [(row["outputs"], row["holds"]) for row in gpu_child.noise(way, 1, World(), CPU, {})] == [(1, False)] * 2


def test_what_is_a_lack_of_memory() -> None:
    """The card's allocator, the host's, and both under what a compiler raises of them."""
    gpu = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79 GiB")
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000 bytes. Error code 12"
    host = RuntimeError(f"[enforce fail at alloc_cpu.cpp:124] . {said}")
    outer = ValueError("backend failed")
    outer.__cause__ = gpu
    assert [gpu_child.out_of_memory(error) for error in (gpu, host, outer)] == ["2.50 GiB", "4000 bytes", "2.50 GiB"]
    assert gpu_child.out_of_memory(MemoryError()) == "an unknown amount"
    assert gpu_child.out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered")) == ""


def test_the_drivers_version() -> None:
    """As the two kinds of kernel module write it."""
    for text in (
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12.2",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.129.03  Release Build  (dvs-builder@U16)",
    ):
        assert gpu_child.driver(text) == "535.129.03"
    assert gpu_child.driver("") == "unknown"


# ---------------------------------------------------------------------------------------------------------------------
# Real ways
# ---------------------------------------------------------------------------------------------------------------------


def checks(tmp_path: Path, ways: list[dict[str, Any]] | None, *options: str) -> tuple[int, str, str]:
    """Exit code, the file, and stderr of the program."""
    out = tmp_path / "found.md"
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "--out", str(out), *options]
    if ways is not None:
        (tmp_path / "ways.json").write_text(json.dumps(ways))
        command += ["--cpu", "--repeats", "1", "--ways", str(tmp_path / "ways.json")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return done.returncode, out.read_text() if out.exists() else "", done.stderr


@pytest.mark.long
def test_a_real_lack_of_memory_is_a_row(tmp_path: Path) -> None:
    """ZeRO-2's bucket has 2,000,000,000 bytes, and the process may take 1.5 GiB more than it has."""
    ways = [{"name": "ours", "kind": "step", "micro": 1}]
    code, text, errors = checks(tmp_path, ways, "--memory", "1.5")
    assert code == 0, errors
    said = "out of memory in step 1, which asked for 2000000000 bytes"
    assert cells(text, "speed") == [["ours", "full, none", "1", said, "", "", "", ""]]


@pytest.mark.long
def test_real_ways_one_of_which_crashes(tmp_path: Path) -> None:
    """In bf16, compiled, plain, text; and an option that does not exist, which ends its process and no other."""
    ways: list[dict[str, Any]] = [
        {"name": "best", "kind": "card"},
        {"name": "noise", "kind": "noise"},
        {"name": "blocks", "kind": "parity", "policies": [["none", "none"], ["full", "full"]]},
        {"name": "broken", "kind": "step", "micro": 3, "machine": {"nope": 1}},
        {"name": "ours, compiled", "kind": "step", "micro": 3, "machine": {"compile": True}},
        {"name": "plain", "kind": "plain", "micro": 3},
        {"name": "text", "kind": "step", "preset": "t2i-1024-ms", "micro": 1},
    ]
    code, text, errors = checks(tmp_path, ways)
    assert code == 0, errors
    assert "Best matmul here:" in text
    assert [row[5] for row in cells(text, "parity")] == ["yes"] * 4
    broken, compiled, plain, captions = cells(text, "speed")
    assert broken[3].startswith("ended with code 1:")
    assert "unexpected keyword argument 'nope'" in broken[3]
    assert "not compiled" not in compiled[7]
    assert plain[7] == "attention flash for CPUs x 5; not compiled; plain pixel kernels"
    assert re.fullmatch(r"attention flash for CPUs x \d+; not compiled; plain pixel kernels", captions[7])
    for row in (compiled, plain, captions):
        assert float(row[3]) > 0
        assert float(row[6]) > 0
        assert row[5].endswith(" %")


@pytest.mark.long
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    code, text, errors = checks(tmp_path, None)
    assert (code, text) == (2, "")
    assert errors == "benchmarks.gpu_checks: error: torch sees no GPU; --cpu runs this program without one\n"
