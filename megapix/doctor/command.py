"""The preflight, top to bottom: every rank makes the same checks, and rank 0 prints the verdicts of all."""

from __future__ import annotations

import socket

import torch

from megapix import config
from megapix.config import Config
from megapix.config.ds_config import read_knobs
from megapix.dist import World, gather, on_all_ranks
from megapix.doctor import network, run_files, software
from megapix.doctor.verdict import Findings, Verdict, table, tried, worst
from megapix.model import build
from megapix.train import automatic


def examine(requested: Config, world: World, classes_given: bool = True) -> int:
    """Check on every node what would make the requested run fail; returns the exit code: 1 if something would, or 0.

    Every rank calls it. One that cannot reach the others prints what it knows on its own. `classes_given` as in
    `megapix.train.resolve`.

    Raises:
        CollectiveInputError: invalid options, on any rank.
        InputError: the launcher's address is not in the environment.
    """
    met = network.meet(world)
    if met.status == "fail":
        print(table([Findings(world.rank, socket.gethostname(), [met])]), flush=True)
        return 1
    on_all_ranks(world, lambda: _check(requested, world))
    with torch.device("meta"):
        parameters = sum(p.numel() for p in build(requested.model).parameters())

    hosts = gather(world, socket.gethostname())
    here = hosts.count(hosts[world.rank])
    op = tried("op build", lambda: software.communication_op(world))
    gpus = tried("GPU", lambda: software.gpus(requested, parameters, world))
    verdicts = [
        met,
        network.names(hosts),
        tried("clock", lambda: network.clock(world)),
        tried("versions", lambda: software.versions(world)),
        op,
        tried("compiler", lambda: software.compilation(requested)),
        gpus,
        tried("shared memory", lambda: software.shared_memory(here)),
        tried("run folder", lambda: run_files.run_folder(requested.out, world)),
        tried("disk", lambda: run_files.disk(requested, parameters)),
        tried("shards", lambda: run_files.shards(requested, world)),
    ]
    readable = verdicts[-1].status != "fail"
    verdicts.append(tried("command", lambda: run_files.command(requested, world, readable, classes_given)))
    sweep = ""
    if "fail" not in gather(world, gpus.status):
        device = torch.device("cuda", world.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        verdict, sweep = network.bandwidth(world, device, gradient=4 * parameters)
        verdicts.append(verdict)
        if cards := automatic.cards_of(world, device):
            lacks = automatic.lacking(world, cards)
            verdicts.append(tried("memory", lambda: software.memory(requested, cards, not lacks)))
    else:
        verdicts.append(Verdict("all-reduce", "warn", "not measured: not every rank has a GPU"))

    everyone = gather(world, Findings(world.rank, hosts[world.rank], verdicts))
    status = worst(everyone)
    if world.main:
        print(table(everyone))
        print(sweep, end="\n" if sweep else "")
        print(f"megapix doctor: {_SUMMARY[status]}", flush=True)
    return 1 if status == "fail" else 0


def _check(requested: Config, world: World) -> None:
    config.validate(requested)
    read_knobs(requested.machine.ds_config, requested.machine.unproven)
    config.batch_layout(requested, world.size)


_SUMMARY = {
    "ok": "nothing found that would stop this run",
    "warn": "the run would work; look at the warnings",
    "fail": "the run would fail",
}
