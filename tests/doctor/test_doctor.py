"""`megapix doctor`: what is in order passes, and each thing that would make a run fail is found and named."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megapix import config
from megapix.dist import World
from megapix.doctor import network, run_files, software
from megapix.doctor.verdict import Findings, Verdict, table
from megapix.engine.network import build_network
from megapix.errors import InputError
from megapix.shards.index import read_index
from tests.data.test_mix_stored import again
from tests.support.launch import ROOT, Rank, free_port, start
from tests.support.programs import needs
from tests.support.small_run import SMALL, arguments
from tests.train.test_mix_run import mix_of

CHECKS = ["hosts", "names", "clock", "versions", "op build", "compiler", "GPU", "shared memory", "run folder", "disk"]
CHECKS += ["shards", "command", "all-reduce"]


def doctor(ranks: int, shards: Path, out: Path, *overrides: str) -> list[Rank]:
    return start(ranks, "megapix", ["doctor", *arguments(shards, out, *overrides)[1:]])


def lines(out: str) -> dict[str, str]:
    """Check -> its lines in the table."""
    found: dict[str, str] = {}
    for line in out.splitlines():
        cells = re.split(" {2,}", line, maxsplit=3)
        if cells[0] in ("ok", "warn", "FAIL"):
            found[cells[2]] = found.get(cells[2], "") + line + "\n"
    return found


def test_nothing_wrong_on_two_ranks(shards: Path, tmp_path: Path) -> None:
    first, second = doctor(2, shards, tmp_path / "run")
    assert (first.code, second.code) == (0, 0), first.out + first.err + second.err
    found = lines(first.out)
    assert list(found) == CHECKS, first.out
    assert all(text.startswith("ok ") for text in found.values()), first.out
    assert "2 ranks met" in found["hosts"]
    assert f"torch {torch.__version__}" in found["versions"]
    assert "starts at 0 of 160 images, global batch 8 = micro batch 4 x accumulation 1 x ranks 2" in found["command"]
    sweep = re.findall(r"^ *(\d+ [KM]iB) +([\d.]+) +([\d.]+)$", first.out, re.M)
    assert [size for size, _, _ in sweep] == ["4 KiB", "64 KiB", "1 MiB", "16 MiB"]
    for size, ms, rate in sweep:
        mib = int(size.split()[0]) / (1024 if "KiB" in size else 1)
        assert mib / (float(ms) / 1e3) == pytest.approx(float(rate), rel=0.2)
    assert second.out == "", "one table, from rank 0"
    assert list(tmp_path.iterdir()) == [], "nothing is left where the run will be"


def test_alone_and_without_a_launcher(shards: Path, tmp_path: Path) -> None:
    """More checkpoints to keep than there is room for: a warning, and code 0."""
    (rank,) = doctor(1, shards, tmp_path / "run", "--checkpoint.keep", "100000000")
    assert rank.code == 0, rank.out + rank.err
    assert lines(rank.out)["disk"].startswith("warn")
    assert "the run would work; look at the warnings" in rank.out


@pytest.fixture(params=[pytest.param("mount", marks=needs("unshare", "mount"))])
def mounts() -> None:
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("mounting another file system for one rank needs root")


@pytest.mark.usefixtures("mounts")
@pytest.mark.long
def test_everything_wrong_on_one_rank(shards: Path, tmp_path: Path) -> None:
    """Rank 1 has its own run folder and a small disk, lacks a shard, runs a changed checkout, and is 5 s ahead."""
    incomplete, checkout, clock = tmp_path / "incomplete", tmp_path / "checkout", tmp_path / "clock"
    shutil.copytree(shards, incomplete)
    (incomplete / "shard-000001.tar").unlink()
    for package in ("megapix", "ds_configs", "data_prep"):
        shutil.copytree(ROOT / package, checkout / package)
    with open(checkout / "megapix" / "flow.py", "a") as file:
        file.write("# changed\n")
    clock.mkdir()
    (clock / "sitecustomize.py").write_text("import time\nreal = time.time\ntime.time = lambda: real() + 5.0\n")
    runs = tmp_path / "runs"
    runs.mkdir()
    mount = f"mount -t tmpfs -o size=100m tmpfs {runs} && mount --bind {incomplete} {shards}"
    asked = ["doctor", *arguments(shards, runs / "run")[1:]]
    first, second = start(2, "tests.programs.other_node", [mount, checkout, clock, *asked])
    assert (first.code, second.code) == (1, 1), first.out + first.err + second.err
    found = lines(first.out)
    assert "FAIL" in found["versions"]
    assert "rank 1: megapix's source" in found["versions"]
    assert "FAIL" in found["run folder"]
    assert f"{runs}: what rank" in found["run folder"]
    assert "FAIL" in found["disk"]
    assert re.search(r"rank 1: 100\.0 MiB free in .*runs, .* would not fit", found["disk"])
    assert "FAIL" in found["shards"]
    assert "rank 1: " in found["shards"]
    assert "shard-000001.tar" in found["shards"]
    assert "FAIL" in found["command"]
    assert found["clock"].startswith("warn")
    assert "rank 1: ahead of rank 0's by 5.0 s" in found["clock"]
    assert first.out.rstrip().endswith("megapix doctor: the run would fail")
    assert list(runs.iterdir()) == []


def test_all_sets_of_a_mix_are_read(shards: Path, tmp_path: Path) -> None:
    """The second set lacks the end of a tar file that no size shows: its last sample is damaged."""
    other = again(shards, tmp_path / "other")
    mix = mix_of(tmp_path / "mix.json", {"path": str(shards), "weight": 1}, {"path": str(other), "weight": 1})
    (rank,) = doctor(1, mix, tmp_path / "run")
    assert rank.code == 0, rank.out + rank.err
    assert lines(rank.out)["shards"].count("samples of") == 2
    entry = read_index(other).shards[-1]
    tar = other / entry.name
    tar.write_bytes(bytes(tar.stat().st_size))
    (rank,) = doctor(1, mix, tmp_path / "run")
    assert rank.code == 1
    assert "FAIL" in (said := lines(rank.out)["shards"])
    assert str(tar) in said


def test_ranks_that_were_asked_for_different_runs(shards: Path, tmp_path: Path) -> None:
    asked = ["doctor", *arguments(shards, tmp_path / "run")[1:]]
    ranks = start(2, "tests.programs.other_option", ["--seed", "7", *asked])
    assert [rank.code for rank in ranks] == [1, 1]
    assert "rank 1 has seed = 7, but rank 0 has 1" in lines(ranks[0].out)["command"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--optim.global-batch", "7", "--machine.micro-batch", "2"], "optim.global_batch = 7 is not micro batch"),
        (["--machine.ds-config", "zero9"], "machine.ds_config = 'zero9'"),
        (["--machine.peak-tflops", "-1"], "machine.peak_tflops = -1.0: expected 0"),
    ],
)
def test_bad_input_is_code_2(overrides: list[str], message: str, shards: Path, tmp_path: Path) -> None:
    (rank,) = doctor(1, shards, tmp_path / "run", *overrides)
    assert rank.code == 2
    assert rank.err.splitlines()[-1].startswith("megapix: error: " + message)


# ---------------------------------------------------------------------------------------------------------------------
# Single checks, against the real thing in this process
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))


@pytest.mark.usefixtures("launched")
def test_a_rank_that_does_not_appear_is_named() -> None:
    verdict = network.meet(World(0, 3), seconds=1)
    assert verdict.status == "fail"
    assert "ranks 1, 2 did not appear within 1 s" in verdict.detail


@pytest.mark.usefixtures("launched")
def test_rank_0_that_is_not_there_is_named() -> None:
    verdict = network.meet(World(1, 2), seconds=1)
    assert verdict.status == "fail"
    assert f"rank 0 at 127.0.0.1:{os.environ['MASTER_PORT']} was not reached within 1 s" in verdict.detail


@pytest.mark.usefixtures("launched")
def test_an_address_that_does_not_resolve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    verdict = network.meet(World(1, 2))
    assert verdict.status == "fail"
    assert "MASTER_ADDR = 'no-such-host.invalid' does not resolve" in verdict.detail
    assert network.names(["localhost", "no-such-host.invalid"]).status == "warn"
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(InputError, match="environment variable MASTER_ADDR is missing"):
        network.meet(World(1, 2))


def test_ranks_that_do_not_reach_each_other_end_in_time() -> None:
    """Where packets are dropped gloo would wait for a quarter of an hour; here, for an event that never comes."""
    code = """
import threading
from megapix.dist import World
from megapix.doctor.network import _ends_after
with _ends_after(0.2, World(3, 4), "hostb"):
    threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert re.search(r"FAIL +hostb +hosts +all ranks appeared, but met no other within 0.2 s", done.stdout)


def test_a_gpu_that_fails_is_told_after_the_ranks_have_met(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: int) -> str:
        raise RuntimeError("CUDA error: uncorrectable ECC error\nmore")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", fail)
    met = []
    monkeypatch.setattr(software, "gather", lambda world, value, group=None: met.append(value) or [value])
    verdict = software.gpus(SMALL, 1000, World())
    assert (verdict.status, verdict.detail) == ("fail", "CUDA error: uncorrectable ECC error")
    assert len(met) == 1


def test_no_compiler_or_no_ninja(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = shutil.which("g++")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert software.communication_op(World()).detail.startswith("no g++")
    (tmp_path / "g++").symlink_to(str(compiler))
    verdict = software.communication_op(World())
    assert (verdict.status, verdict.detail.partition(":")[0]) == ("fail", "no ninja on the PATH")


def test_shared_memory_counts_the_ops_buffers() -> None:
    most = shutil.disk_usage("/dev/shm").free // (66 * 2**20)
    assert software.shared_memory(most).status == "ok"
    assert software.shared_memory(most + 1).status == "fail"


def test_the_size_of_a_checkpoint(shards: Path, tmp_path: Path) -> None:
    """Against one that a run has written; the manifest is what is beside the numbers."""
    run = tmp_path / "run"
    (rank,) = start(1, "megapix", arguments(shards, run, "--optim.end-at", "8", "--model.width", "128"))
    assert rank.code == 0, rank.err
    (folder,) = (run / "checkpoints").glob("images-*")
    there = sum(path.stat().st_size for path in folder.iterdir())
    asked = config.replace(config.replace(SMALL, "model.width", 128), "out", str(run))
    parameters = sum(p.numel() for p in build_network(asked.model, 0).parameters())
    said = run_files.disk(asked, parameters).detail
    assert said.endswith(f"a checkpoint takes {16 * parameters / 2**20:,.1f} MiB")
    assert there == pytest.approx(16 * parameters, rel=0.03)


def test_nodes_with_the_same_outcome_share_a_line() -> None:
    good, bad = Verdict("disk", "ok", "plenty"), Verdict("disk", "fail", "full")
    everyone = [Findings(rank, f"n{rank // 2}", [bad if rank == 5 else good]) for rank in range(12)]
    assert table(everyone).splitlines()[1:] == [
        "ok       n0, n1, n3 and 2 more  disk   plenty",
        "FAIL     n2                     disk   rank 5: full",
    ]
    assert table(everyone[:4]).splitlines()[1] == "ok       all 2  disk   plenty"
