"""Ranks as processes: how they form the process group, and what each sets up on its machine."""

from __future__ import annotations

import logging
import os
import warnings

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.utils import logger as deepspeed_logger

from megapix.allocator import keep_freed_memory
from megapix.dist import World, allow_files, free_port, on_all_ranks
from megapix.engine.comm_op import load_comm_op
from megapix.errors import InputError


def start(world: World) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device.

    Raises:
        InputError: there are GPUs, but none for this rank.
        CollectiveInputError: DeepSpeed's CPU communication op cannot be built on some rank.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    # It warns of every optimizer that is not its own; ours is tested for parity, and so is its EMA.
    deepspeed_logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    if world.size == 1 and "MASTER_PORT" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    # DeepSpeed calls it; nothing that a user of megapix could change.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    allow_files()
    if get_accelerator().device_name() == "cuda" and world.local_rank >= torch.cuda.device_count():
        raise InputError(f"no GPU is left for local rank {world.local_rank}: {torch.cuda.device_count()} are visible")
    get_accelerator().set_device(world.local_rank)
    backend = get_accelerator().communication_backend_name()
    if get_accelerator().device_name() == "cpu":
        keep_freed_memory()
        torch.distributed.init_process_group(backend, timeout=default_pg_timeout)  # DeepSpeed takes it as it is
        on_all_ranks(world, lambda: load_comm_op(world))
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return torch.device(get_accelerator().current_device_name())
