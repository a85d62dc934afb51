"""Checkpoints that leave a run's course: their names are gone for good before their files are."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megapix.checkpoint import retention
from megapix.checkpoint.folder import complete
from tests.support.disk_calls import DiskCalls
from tests.support.made_run import add_checkpoint


def test_names_go_before_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (add_checkpoint(tmp_path, images) for images in (7, 14, 21))
    (third / "KEEP").touch()
    disk, remove = DiskCalls(monkeypatch, tmp_path / "checkpoints"), shutil.rmtree

    def removed(path: Path, *args: Any, **kwargs: Any) -> None:
        if path.exists():
            disk.order.append(f"remove {path.name}")
        remove(path, *args, **kwargs)

    monkeypatch.setattr(shutil, "rmtree", removed)
    assert retention.leave(tmp_path, first, remove=True) == [third.with_name(f"{third.name}.aside")]
    assert disk.order == [
        f"{second.name} -> {second.name}.gone",
        f"{third.name} -> {third.name}.aside",
        "sync .",
        f"remove {second.name}.gone",
    ]
    assert complete(tmp_path) == [first]


def test_what_was_set_aside_stays(tmp_path: Path) -> None:
    """Going back over the same name a second and a third time."""
    first = add_checkpoint(tmp_path, 7)
    names = []
    for course in ("first", "second", "third"):
        later = add_checkpoint(tmp_path, 14)
        (later / "KEEP").write_text(course)
        names += [path.name for path in retention.leave(tmp_path, first, remove=True)]
    assert names == [f"images-000000000014.aside{number}" for number in ("", "-2", "-3")]
    parent = tmp_path / "checkpoints"
    assert [(parent / name / "KEEP").read_text() for name in names] == ["first", "second", "third"]
    assert complete(tmp_path) == [first]
    retention.settle(tmp_path, None)
    assert all((parent / name).is_dir() for name in names)
