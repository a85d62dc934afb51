"""The suite on a machine that has none of the optional programs."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.launch import ROOT, start


def test_what_needs_hidden_programs_is_skipped_and_says_so() -> None:
    """A pytest on all files that ask for programs, with those of this machine hidden; long tests are skipped, too."""
    users = re.compile(r"^from tests\.support\.(programs|hosts) import", re.M)
    files = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if users.search(path.read_text())]
    asked = ["-m", "optional_programs", "-rs", "-p", "no:cacheprovider", *files]
    (rank,) = start(1, "pytest", asked, **{programs.HIDDEN: ",".join(programs.PACKAGES)})
    *_, last = rank.out.splitlines()
    assert rank.code == 0, rank.out + rank.err
    assert re.fullmatch(r"\d+ skipped, \d+ deselected in .*", last), rank.out
    reasons = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", rank.out, re.M)
    named = [re.findall(r"([\w-]+) \(Debian: ([\w-]+)\)", reason) for reason in reasons]
    assert all(named), reasons
    assert {pair for pairs in named for pair in pairs} == set(programs.PACKAGES.items()), "and the table has no others"


def test_hidden_programs_are_off_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one, two, scratch = tmp_path / "one", tmp_path / "two", tmp_path / "scratch"
    for folder in (one, two, scratch):
        folder.mkdir()
    for program in (one / "pdsh", one / "other", two / "third"):
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{one}:{two}")
    assert programs.lacking(("pdsh",)) == ""
    programs.hide(["pdsh", "ip"], scratch)
    assert shutil.which("other")
    assert shutil.which("third") == str(two / "third"), "a folder without them stays"
    assert programs.lacking(("pdsh", "ip")) == "needs pdsh (Debian: pdsh), ip (Debian: iproute2)"
