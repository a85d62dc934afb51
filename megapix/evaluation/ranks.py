"""The ranks of an evaluation: plain processes that share a folder, and meet at its beginning and its end."""

from __future__ import annotations

import atexit
import os
import sys
from typing import Any

import torch
import torch.distributed

from megapix import dist
from megapix.dist import World
from megapix.errors import InputError


def join(world: World) -> Any:
    """Form the gloo group of all ranks; the group to wait in, for as long as images take, and None for a single rank.

    Raises:
        InputError: the launcher's address is not in the environment.
    """
    if world.size == 1:
        return None
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise InputError(
                f"environment variable {name} is missing: start the ranks with a launcher (launch.sh, torchrun)"
            )
    torch.distributed.init_process_group("gloo", rank=world.rank, world_size=world.size)
    return dist.host_group(world)


def device_of(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    Raises:
        InputError: there are GPUs, but none for this rank.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise InputError(f"no GPU is left for local rank {world.local_rank}: {torch.cuda.device_count()} are visible")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)


def leave(world: World, code: int) -> int:
    """Leave the group and end this rank with `code`; alone in the world, return it.

    With several ranks the process ends here, after Python's own exit handlers: threads that gloo has left behind can
    abort the interpreter's teardown.
    """
    if world.size == 1:
        return code
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
