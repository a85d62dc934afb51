"""`megapix bench step` on a GPU, which the CPU plays: its events are a second apart, each."""

from __future__ import annotations

import json
from pathlib import Path

from megapix.bench.step import PARTS
from tests.support.fake_cuda import NAMES
from tests.support.launch import succeed


def test_a_step_is_measured_by_the_gpus_own_events(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    options = ["bench", "step", "t2i-tiny", "--repeats", "1", "--warmup", "1", "--micro-batch", "2", "--out", str(out)]
    options += [
        "--model.width",
        "32",
        "--model.heads",
        "2",
        "--model.depth",
        "1",
        "--save",
        str(tmp_path),
        "--machine.no-compile",
    ]
    succeed(1, "tests.programs.on_gpus", options, RECORD=str(tmp_path))
    n, calls = json.loads(out.read_text()), json.loads((tmp_path / "rank-0.json").read_text())
    assert n["machine"]["device"] == NAMES[0]
    assert n["peak"]["data_sheet_tflops"] == (989.0 if n["configuration"]["precision"] == "bf16" else None)
    assert {name: part["median"] for name, part in n["parts"].items() if name in ("patch_forward", "agree", "ema")} == {
        "patch_forward": 1.0, "agree": 1.0, "ema": 1.0
    }  # fmt: skip
    assert list(n["parts"]) == list(PARTS)
    assert {"16 x 16 x 16", "24 x 24 x 24"} <= set(n["peak"]["products"]), "squares of a GPU, here small ones"
    assert n["configuration"]["machine"]["pixel_checkpointing"] == "none"
    assert calls[0] == ["set_device", 0]
    moved = [call["copy"] for call in calls if isinstance(call, dict)]
    made_up = [copy for copy in moved if copy["dtype"] == "torch.uint8" and copy["target"] == "cuda:0"]
    assert [copy["shape"] for copy in made_up] == [[2, 3, 64, 64]], "once, and not in a step"
    assert [copy for copy in moved if copy["module"] == "conditioner"] == [], "nor is the text copied in a step"
