"""The small run that the distributed tests share, as a configuration and as command-line arguments, and what is done
with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megapix import config
from megapix.checkpoint.find import Saved, choose
from megapix.checkpoint.manifest import Counters
from megapix.cli import main as cli
from megapix.config import Config, DataConfig, LogConfig, MachineConfig, ModelConfig, OptimConfig, SamplingConfig
from megapix.dist import World
from tests.support.launch import Launch, Rank

if TYPE_CHECKING:
    import pytest

STEP_BATCH = 8
SMALL = Config(
    seed=1,
    precision="fp32",
    model=ModelConfig(patch_size=4, width=32, depth=2, heads=2, pixel_width=8, pixel_depth=2, num_classes=3),
    data=DataConfig(image_size=16, workers=0),
    optim=OptimConfig(
        global_batch=STEP_BATCH,
        lr=2e-3,
        lr_after=5e-4,
        lr_step_at=12 * STEP_BATCH,
        end_at=20 * STEP_BATCH,
        grad_clip=0.5,
        ema_decay=0.9,
    ),
    machine=MachineConfig(pixel_checkpointing="none"),
    checkpoint=config.CheckpointConfig(every=10 * STEP_BATCH),
    log=LogConfig(every=STEP_BATCH, samples_every="never"),
    sampling=SamplingConfig(steps=3),
)
ENDLESS = ["--optim.end-at", "1000000000", "--checkpoint.every", "1000000000"]
"""Options of a run that does not end by itself."""


def arguments(shards: Path, out: Path, *overrides: str, small: Config = SMALL) -> list[str]:
    """`train` arguments of SMALL: the tiny preset with every option that differs from it, then the overrides."""
    preset = dict((key, value) for key, value, _ in config.leaves(config.preset("tiny")))
    found = ["train", "tiny", "--data.path", str(shards), "--out", str(out)]
    for key, value, _ in config.leaves(small):
        if value != preset[key] and key not in ("out", "data.path"):
            option = key.replace("_", "-")
            section, _, name = option.rpartition(".")
            if isinstance(value, bool):  # a switch: --data.flip or --data.no-flip
                found.append(f"--{option}" if value else f"--{section}.no-{name}")
            else:
                found += [f"--{option}", str(value)]
    return [*found, *overrides]


def asked_to_stop(command: list[str], run: Path, ask: Callable[[Launch], None]) -> list[Rank]:
    """`ask` two ranks to stop once three steps are logged; every rank must end with code 75."""
    launch = Launch(2, "megapix", command)
    try:
        launch.wait_for(lambda: len(logged(run)) >= 3)
        ask(launch)
        done = launch.finish(timeout=60)
    finally:
        launch.kill()
    assert [rank.code for rank in done] == [75, 75], done[0].err
    return done


def refused(asked: list[str], capsys: pytest.CaptureFixture[str], main: Callable[[list[str]], int] = cli.main) -> str:
    """The one line that is said of bad input."""
    capsys.readouterr()
    assert main(asked) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    return error


def scalars(run: Path, tag: str) -> dict[int, float]:
    """step -> value of one TensorBoard scalar, as TensorBoard shows it."""
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


def logged(run: Path) -> list[int]:
    """The steps that a run, perhaps at work, has logged so far."""
    if not list((run / "tensorboard").glob("events*")):
        return []
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    known = events.Tags()["scalars"]
    return [event.step for event in events.Scalars("loss/train")] if "loss/train" in known else []


def shard_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in every file of a checkpoint, by file and name."""
    return {
        f"{path.name}/{part}": tensor
        for path in sorted(folder.glob("*.safetensors"))
        for part, tensor in load_file(path).items()
    }


def flat_vectors(folder: Path) -> dict[str, torch.Tensor]:
    """The parts of a checkpoint, each rank's share laid end to end (the ranks' files sort in their order)."""
    tensors = shard_tensors(folder)
    parts = {name.split("/")[1] for name in tensors}
    return {part: torch.cat([t for name, t in tensors.items() if name.endswith(f"/{part}")]) for part in parts}


def saved(run: Path) -> Saved:
    """The checkpoint that `latest` names, which must be whole."""
    choice = choose(run, "require", World())
    assert choice.saved
    return choice.saved


def counters(run: Path) -> Counters:
    """Where a run's newest checkpoint stands."""
    return saved(run).state.counters
