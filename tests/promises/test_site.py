"""The docs as a site: it is built without a warning, holds every option, and asks for nothing from a network."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from megapix.config import Config, leaves
from tests.support.launch import ROOT


@pytest.mark.long
def test_site(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = (tmp_path / "options.html").read_text()
    assert not [name for name, *_ in leaves(Config()) if f"--{name.replace('_', '-')}<" not in options]
    fetched = r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//(?!arxiv|github)[^"]*"'
    pages = sorted(tmp_path.glob("*.html"))
    assert len(pages) > 20
    assert not [(page.name, found) for page in pages for found in re.findall(fetched, page.read_text())]
