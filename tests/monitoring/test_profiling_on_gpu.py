"""What a trace holds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity

from megapix.monitoring.profiling import Trace


@pytest.mark.parametrize(
    ("there", "activities"),
    [(True, [ProfilerActivity.CPU, ProfilerActivity.CUDA]), (False, [ProfilerActivity.CPU])],
)
def test_a_gpus_kernels_are_traced_where_there_is_one(
    there: bool, activities: list[ProfilerActivity], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def profile(**options: Any) -> Any:
        asked.update(options)
        return SimpleNamespace(start=lambda: None)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setattr(torch.profiler, "profile", profile)
    Trace(3, tmp_path, 1, 0)
    assert asked["activities"] == activities
