"""A run of 300 steps on two ranks, disturbed in every way that it must survive: it ends in the bits of one left alone.

    python -m tests.campaign [--share 1.0] [--seed 0]

Twenty SIGKILLs of one rank or both at random moments, five SIGTERMs, a web server that is away for 30 seconds, an EIO
on a shard and one on a checkpoint's file, and a killed data worker; a smaller --share has fewer of the first two, less
time and fewer steps. Compared are weights, moments, EMA and each step's logged numbers.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from megapix.resilience.stopping import EXIT_STOPPED
from megapix.resilience.watchdog import EXIT_LOST
from tests.support import made_shards
from tests.support.launch import Forked, Launch, succeed
from tests.support.process_groups import workers_of
from tests.support.servers import Nginx, nginx
from tests.support.small_run import STEP_BATCH, arguments, flat_vectors, logged, saved, scalars

PROGRAM = "tests.programs.failing_disk"
STEPS, KILLS, STOPS, AWAY = 300, 20, 5, 30.0
TAGS = ("loss/train", "health/grad_norm", "schedule/lr")
DISTURBED = {
    "server": [],
    "shard": [{"rank": 1, "part": "shard-000001.tar", "after": 3}],
    "checkpoint": [{"rank": 0, "part": "rank-00000-of-00002.safetensors", "after": 2}],
    "worker": [],
}
"""What is disturbed, once each -> what the disks of the ranks fail with meanwhile."""


LEFT = 40
"""Steps that a run has left when it is ended the last time: seconds, so that it does not end by itself first."""


def campaign(folder: Path, shards: Path, share: float = 1.0, seed: int = 0) -> list[str]:
    """What was done to the run, a line each.

    Raises:
        AssertionError: it did not end as the undisturbed one did.
    """
    chance = random.Random(seed)
    steps = max(60 + LEFT, round(STEPS * share))
    ends = ["kill"] * max(2, round(KILLS * share)) + ["stop"] * max(1, round(STOPS * share))
    ends += ["stop"] * max(0, len(DISTURBED) - len(ends))
    chance.shuffle(ends)
    disturbed = dict(zip(chance.sample(range(len(ends)), len(DISTURBED)), DISTURBED, strict=True))
    still, run = folder / "still", folder / "run"
    options = ["--optim.end-at", str(steps * STEP_BATCH), "--optim.lr-step-at", str(steps // 2 * STEP_BATCH)]
    options += ["--checkpoint.every", str(3 * STEP_BATCH), "--data.workers", "1", "--data.outage-minutes", "5"]
    succeed(2, PROGRAM, arguments(shards, still, *options), RANKS_DISK="[]")
    done = []
    with nginx(shards, folder) as server:
        remote = ["--data.path", server.url, "--data.cache", str(folder / "cache")]
        for number, end in enumerate(ends):
            what = disturbed.get(number, "")
            # The disk fails in the rank's own process alone, which then has to read the shards itself.
            more = {"server": remote, "shard": ["--data.workers", "0"]}.get(what, [])
            command = arguments(shards, run, *options, *more)
            launch = Launch(2, PROGRAM, command, RANKS_DISK=json.dumps(DISTURBED.get(what, [])))
            target = (number + 1) * (steps - LEFT) // len(ends) - chance.randrange(3)
            try:
                _wait(launch, run, target)
                if what:
                    done.append(_disturb(what, launch, run, server, AWAY * share))
                done.append(_end(end, launch, chance))
            finally:
                launch.kill()
    succeed(2, PROGRAM, arguments(shards, run, *options), RANKS_DISK="[]")
    whole, parts = (flat_vectors(saved(name).folder) for name in (still, run))
    assert [part for part in whole if not torch.equal(whole[part], parts[part])] == []
    for tag in TAGS:
        expected, found = scalars(still, tag), scalars(run, tag)
        assert list(found) == list(range(1, steps + 1)), f"{tag}: one line, without overlaps"
        assert found == expected, tag
    assert not [path.name for path in (run / "checkpoints").iterdir() if ".aside" in path.name]
    return done


def _wait(launch: Launch, run: Path, step: int) -> None:
    launch.wait_for(lambda: max(logged(run), default=0) >= step)


def _disturb(what: str, launch: Launch, run: Path, server: Nginx, away: float) -> str:
    """Disturb a run at work, or see that it was; it takes steps afterwards."""
    step = max(logged(run))
    if what == "server":
        server.stop()
        time.sleep(away)
        server.start()
    elif what == "worker":
        victim = max(workers_of(launch.processes[1].pid))
        os.kill(victim, signal.SIGKILL)
        launch.wait_for(lambda: f"(process {victim}) was killed by SIGKILL" in _said(launch, 1))
    elif what == "shard":
        launch.wait_for(lambda: "Input/output error; tried again" in _said(launch, 1))
    _wait(launch, run, step + 2)
    if what == "checkpoint":
        assert "refused" not in _said(launch, 0)
    return f"step {step}: {what}"


def _end(how: str, launch: Launch, chance: random.Random) -> str:
    """End a run at work, at a moment between two steps that chance decides."""
    time.sleep(chance.uniform(0, 0.1))
    if how == "stop":
        launch.signal(signal.SIGTERM)
        codes = [rank.code for rank in launch.finish()]
        assert codes == [EXIT_STOPPED] * 2, codes
        return "SIGTERM to every process"
    victims = chance.choice([[0], [1], [0, 1]])
    launch.signal(signal.SIGKILL, victims)
    codes = [rank.code for rank in launch.finish()]
    assert all(codes[rank] == EXIT_LOST for rank in {0, 1} - set(victims)), codes
    return f"SIGKILL to rank {' and '.join(map(str, victims))}"


def _said(launch: Launch, rank: int) -> str:
    process = launch.processes[rank]
    assert isinstance(process, Forked)
    return process.error_text()


def main() -> None:
    """The whole campaign, in a temporary folder."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaign", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        shards = made_shards.pack(made_shards.draw(Path(name, "images")), Path(name, "shards"))
        for line in campaign(Path(name), shards, options.share, options.seed):
            print(line)
    print("weights, moments, EMA and logged numbers are those of the undisturbed run")


if __name__ == "__main__":
    sys.exit(main())
