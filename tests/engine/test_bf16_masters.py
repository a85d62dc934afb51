"""The fp32 masters of a bf16 network, through a checkpoint."""

from __future__ import annotations

from pathlib import Path

from tests.support.launch import succeed


def test_masters_begin_and_resume_in_fp32(tmp_path: Path) -> None:
    """Three steps of two ranks with accumulation 2, a save, a resume in another engine, and one more step in both."""
    succeed(2, "tests.programs.bf16_masters", [tmp_path])
