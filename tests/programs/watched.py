"""One rank under the watchdog: twenty steps of a gloo all-reduce, and a fault at the third step of one rank.

usage: python -m tests.programs.watched SECONDS FAULT RANK

FAULT is kill or stop (a signal to itself), hang (waits for an event that never comes), everywhere (all ranks hang at
the same place), hold (a phase that is allowed two more seconds), slow (a step of two thirds of the limit), input or bug
(an exception of this rank alone), disagree (one of all ranks), or none.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

import torch
import torch.distributed

from megapix.dist import CollectiveInputError, barrier, from_environment
from megapix.errors import InputError, Reported
from megapix.resilience.watchdog import Watchdog

STEPS, AT = 20, 3


def fault(name: str, seconds: float) -> None:
    print(f"fault {time.time()}", flush=True)
    match name:
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "hang" | "everywhere":
            threading.Event().wait()
        case "hold":
            threading.Event().wait(seconds + 1)
        case "slow":
            threading.Event().wait(seconds * 2 / 3)
        case "input":
            raise InputError("no such sample")
        case "disagree":
            raise CollectiveInputError("no such sample")
        case "bug":
            raise KeyError("a bug of this rank")


def main(seconds: str, name: str, victim: str) -> int:
    world = from_environment()
    torch.distributed.init_process_group("gloo")
    try:
        with Watchdog(world, float(seconds), {"wait": 2.0}) as watch:
            for step in range(1, STEPS + 1):
                watch.note(step, "wait" if name == "hold" else "data")
                if step == AT and (world.rank == int(victim) or name in ("everywhere", "disagree")):
                    fault(name, float(seconds))
                watch.note(step, "backward")
                torch.distributed.all_reduce(torch.ones(1000))
                watch.note(step, "step")
            barrier(world)
    except CollectiveInputError:
        os._exit(2)
    except Reported as end:
        os._exit(end.code)
    barrier(world)
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
