"""DeepSpeed's CPU communication op: where each environment builds it, what is said of it, and what ends in one line."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from deepspeed.accelerator import get_accelerator
from torch.utils import cpp_extension

from megapix.dist import World
from megapix.engine import comm_op
from tests.support.launch import Forked, Launch, start
from tests.support.small_run import arguments

NAME = "deepspeed_shm_comm"


def test_each_environment_has_a_folder_of_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("TORCH_EXTENSIONS_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = comm_op.extensions()
    assert first.parent == Path(cpp_extension.get_default_build_root()) == tmp_path / "torch_extensions"
    assert comm_op.extensions() == first, "it is found again"
    found = {first}
    with monkeypatch.context() as other:
        other.setattr(sys, "prefix", "/elsewhere/.venv")
        found.add(comm_op.extensions())
    with monkeypatch.context() as other:
        other.setattr(torch, "__version__", "2.99.1")
        found.add(comm_op.extensions())
    with monkeypatch.context() as other:
        other.setattr(deepspeed, "__version__", "0.99.1")
        found.add(comm_op.extensions())
    assert len(found) == 4
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "mine"))
    assert comm_op.extensions() == tmp_path / "mine", "the user's is taken as it is"


class Builder:
    """DeepSpeed's, but what it builds is an empty file."""

    name = NAME

    def load(self, verbose: bool) -> None:
        Path(os.environ["TORCH_EXTENSIONS_DIR"], NAME, f"{NAME}.so").touch()


def test_a_build_is_announced_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(get_accelerator(), "create_op_builder", lambda name: Builder())
    for folder, rank, said in (("a", 0, True), ("a", 0, False), ("b", 1, False)):
        monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / folder))
        comm_op.load_comm_op(World(rank, 2, rank))
        line = f"megapix: building DeepSpeed's CPU communication op in {tmp_path / folder / NAME}, once for this "
        assert capsys.readouterr().out == (f"{line}environment: about a minute\n" if said else "")


class Uneven(Launch):
    """Rank 1 has an environment of its own."""

    def __init__(self, shards: Path, run: Path, **theirs: str) -> None:
        self.theirs = theirs
        super().__init__(2, "megapix", arguments(shards, run))

    def _start(self, argv: list[str], environment: dict[str, str]) -> Forked:
        return Forked(argv, environment | (self.theirs if environment["RANK"] == "1" else {}))


def test_a_folder_that_cannot_be_written_on_one_rank_ends_all(shards: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    bad = tmp_path / "file" / "cache"
    first, second = Uneven(shards, tmp_path / "run", TORCH_EXTENSIONS_DIR=str(bad)).finish()
    assert (first.code, second.code) == (2, 2), first.err + second.err
    (line,) = first.err.splitlines()
    assert line.startswith("megapix: error: rank 1 on ")
    assert f"DeepSpeed's CPU communication op cannot be built in '{bad / NAME}': Not a directory; expected" in line
    assert "TORCH_EXTENSIONS_DIR" in line
    assert second.err == ""


def test_a_damaged_build_is_named(shards: Path, tmp_path: Path) -> None:
    comm_op.load_comm_op(World())
    shutil.copytree(comm_op.extensions(), tmp_path / "copy")
    (tmp_path / "copy" / NAME / f"{NAME}.so").write_bytes(b"cut")
    (rank,) = start(1, "megapix", arguments(shards, tmp_path / "run"), TORCH_EXTENSIONS_DIR=str(tmp_path / "copy"))
    assert rank.code == 2
    (line,) = rank.err.splitlines()
    assert line.startswith("megapix: error: DeepSpeed's CPU communication op cannot be loaded: ")
    assert line.endswith(f"; remove '{tmp_path / 'copy' / NAME}' to have it built again")
