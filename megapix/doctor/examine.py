"""The examination, top to bottom: every rank goes through the same checks, and rank 0 shows what all have found."""

from __future__ import annotations

import socket

import torch
import torch.distributed

from megapix import config, dist, engine
from megapix.config import BatchLayout, Config
from megapix.dist import World
from megapix.doctor import files, network, software
from megapix.doctor.verdict import Findings, Verdict, table, tried, worst
from megapix.ds_config import read_knobs
from megapix.model import build


def examine(asked: Config, world: World) -> int:
    """Check every node for what would make the run `asked` fail; the exit code: 1 if something would, else 0.

    Every rank calls it. One that cannot meet the others says what it knows on its own.

    Raises:
        Agreed: options that are wrong in themselves, on any rank; `leave` then.
        InputError: there is no launcher's address in the environment.
    """
    met = network.meet(world)
    if met.status == "fail":
        print(table([Findings(world.rank, socket.gethostname(), [met])]), flush=True)
        return 1
    layout = dist.together(world, lambda: _layout(asked, world))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(asked.model).parameters())

    hosts = dist.gather(world, socket.gethostname())
    here = hosts.count(hosts[world.rank])
    op = tried("op build", lambda: software.communication_op(world))
    gpus = tried("GPU", lambda: software.gpus(asked, parameters, world))
    verdicts = [
        met,
        network.names(hosts),
        tried("clock", lambda: network.clock(world)),
        tried("versions", lambda: software.versions(world)),
        op,
        gpus,
        tried("shared memory", lambda: software.shared_memory(asked, layout, here)),
        tried("run folder", lambda: files.run_folder(asked.out, world)),
        tried("disk", lambda: files.disk(asked, parameters)),
        tried("shards", lambda: files.shards(asked, world)),
    ]
    readable = verdicts[-1].status != "fail"
    verdicts.append(tried("command", lambda: files.command(asked, world, readable)))
    sweep = ""
    if "fail" not in dist.gather(world, gpus.status):
        device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        verdict, sweep = network.bandwidth(world, device, gradient=4 * parameters)
        verdicts.append(verdict)
    else:
        verdicts.append(Verdict("all-reduce", "warn", "not measured, for want of a GPU on every rank"))

    everyone = dist.gather(world, Findings(world.rank, hosts[world.rank], verdicts))
    status = worst(everyone)
    if world.main:
        print(table(everyone))
        print(sweep, end="\n" if sweep else "")
        print(f"megapix doctor: {_SUMMARY[status]}", flush=True)
    return leave(world, 1 if status == "fail" else 0)


def _layout(asked: Config, world: World) -> BatchLayout:
    config.validate(asked)
    read_knobs(asked.machine.ds_config, asked.machine.unproven)
    return config.batch_layout(asked, world.size)


_SUMMARY = {
    "ok": "nothing found that would stop this run",
    "warn": "the run would work; look at the warnings",
    "fail": "the run would fail",
}


def leave(world: World, code: int) -> int:
    """Leave the doctor's group, which DeepSpeed knows nothing of, then end as a rank of training does."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    return engine.leave(world, code)
