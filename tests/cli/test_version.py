"""One version: what the commands print, what a wheel gets, and what the papers of the release say."""

from __future__ import annotations

import re

import pytest

import data_prep.cli
import megapix
from megapix.cli import main as cli
from tests.support.launch import ROOT


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert data_prep.cli.main(["--version"]) == 0
    printed = capsys.readouterr().out
    (version,) = set(re.findall(r"^(?:megapix|data_prep) (\d+\.\d+\.\d+)$", printed, re.M))
    assert printed == f"megapix {version}\ndata_prep {version}\n"
    assert version == megapix.__version__
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\] - (\d{4}-\d\d-\d\d)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert released[0][0] == version
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"\nversion: {version}\ndate-released: {released[0][1]}\n" in citation
    assert 'version = { attr = "megapix.__version__" }' in (ROOT / "pyproject.toml").read_text()
