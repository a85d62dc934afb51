"""The ranks of an evaluation: processes without DeepSpeed that share a folder, and sync at its beginning and end."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed

from megapix.allocator import keep_freed_memory
from megapix.dist import World, host_group
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
    return host_group(world)


def device_of(world: World) -> torch.device:
    """This rank's GPU, or the CPU where there is none.

    Raises:
        InputError: there are GPUs, but none for this rank.
    """
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    if world.local_rank >= torch.cuda.device_count():
        raise InputError(f"no GPU is left for local rank {world.local_rank}: {torch.cuda.device_count()} are visible")
    torch.cuda.set_device(world.local_rank)
    return torch.device("cuda", world.local_rank)
