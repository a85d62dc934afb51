"""Checks of a node: versions, DeepSpeed's op, GPUs, shared memory."""

from __future__ import annotations

import hashlib
import platform
import shutil
import sysconfig
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from megapix.config import Config
from megapix.config.ds_config import read_knobs
from megapix.costs import automatic
from megapix.costs.automatic import Cards
from megapix.dist import World, gather
from megapix.doctor.verdict import Verdict
from megapix.engine import comm_op, compiler

SHM = Path("/dev/shm")
OP_SHM = 66 * 2**20
"""Bytes of /dev/shm that DeepSpeed's CPU communication op maps for each rank."""
FREE_GPU = 0.9
"""Share of a GPU's memory that should be free before a run."""


def versions(world: World) -> Verdict:
    """Python, torch, deepspeed and megapix, with a hash of its source files, must be rank 0's. Every rank calls it."""
    packages = {name: _version(name) for name in ("torch", "deepspeed", "megapix")}
    packages["megapix's source"] = _source()
    python = platform.python_version()
    theirs, their_python = gather(world, (packages, python))[0]
    different = [f"{name} {v} (rank 0: {theirs[name]})" for name, v in packages.items() if v != theirs[name]]
    if different:
        return Verdict("versions", "fail", "; ".join(different))
    if python != their_python:
        return Verdict("versions", "warn", f"Python {python} (rank 0: {their_python})")
    return Verdict("versions", "ok", f"Python {python}, " + ", ".join(f"{name} {v}" for name, v in packages.items()))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # run from a checkout, perhaps
        return "not installed"


def _source() -> str:
    """Hash of megapix's files, since a checkout that lags behind has the same version."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    try:
        for path in sorted(root.rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    except OSError as error:
        return f"unreadable ({error.strerror})"
    return digest.hexdigest()[:12]


def communication_op(world: World) -> Verdict:
    """DeepSpeed compiles its CPU communication op at an environment's first use; GPUs need none."""
    if torch.cuda.is_available():
        return Verdict("op build", "ok", "GPUs need no op of DeepSpeed's")
    if shutil.which("g++") is None:
        return Verdict("op build", "fail", "no g++: DeepSpeed compiles its CPU communication op (apt install g++)")
    if shutil.which("ninja") is None:
        scripts = sysconfig.get_path("scripts")
        return Verdict("op build", "fail", f"no ninja on the PATH: pip install ninja, and add {scripts} to PATH")
    header = Path(sysconfig.get_path("include"), "Python.h")
    if not header.is_file():
        return Verdict("op build", "fail", f"no {header}: the op needs Python's headers (apt install python3-dev)")
    start = time.monotonic()
    comm_op.load_comm_op(world)
    seconds = time.monotonic() - start
    return Verdict("op build", "ok", f"DeepSpeed's CPU communication op is in {comm_op.extensions()}, {seconds:.0f} s")


def compilation(config: Config) -> Verdict:
    """What kernels are compiled with, if this run compiles any."""
    cuda, setting = torch.cuda.is_available(), config.machine.compile
    option = compiler.asked(config.machine, cuda)
    if not option and (setting is False or not cuda):
        return Verdict("compiler", "ok", f"not needed: machine.compile = {setting!r}{'' if cuda else ' on CPUs'}")
    lacking = compiler.missing(cuda)
    if not lacking:
        return Verdict("compiler", "ok", f"all there for {'Triton, on GPUs' if cuda else 'Inductor, on CPUs'}")
    if option:
        return Verdict("compiler", "fail", f"{option}: {lacking}")
    return Verdict("compiler", "warn", f"{lacking}; without, machine.compile = {setting!r} compiles no block: slower")


def shared_memory(ranks_here: int) -> Verdict:
    """/dev/shm holds the op's buffers. Batches do not lie there: workers hand over memory without a name."""
    need = 0 if torch.cuda.is_available() else ranks_here * OP_SHM
    free = shutil.disk_usage(SHM).free
    detail = f"{free / 2**20:,.0f} MiB free in {SHM}, {need / 2**20:,.0f} MiB needed for {ranks_here} of the ranks"
    if free < need:
        return Verdict("shared memory", "fail", f"{detail} (docker: --shm-size)")
    return Verdict("shared memory", "ok", detail)


def gpus(config: Config, parameters: int, world: World) -> Verdict:
    """A GPU for each rank, the same on all, free, and large enough for the states. Every rank calls it."""
    cuda, name, broken = torch.cuda.is_available(), "", ""
    try:
        name = torch.cuda.get_device_name(world.local_rank) if cuda and _own_gpu(world) else ""
    except Exception as error:  # reported after the gather, which all ranks take part in
        broken = str(error).strip() or type(error).__name__
    first = gather(world, (cuda, name))[0]
    if broken:
        return Verdict("GPU", "fail", broken.splitlines()[0])
    if cuda != first[0]:
        return Verdict("GPU", "fail", f"{'a GPU' if cuda else 'no GPU'} here, but rank 0 has {first[1] or 'none'}")
    if not cuda:
        return Verdict("GPU", "ok", "none: CPU ranks with gloo")
    if not name:
        count = torch.cuda.device_count()
        return Verdict("GPU", "fail", f"{count} GPUs are visible, none is left for local rank {world.local_rank}")
    free, total = torch.cuda.mem_get_info(world.local_rank)
    # Weights of the network on each rank; in shards the averaged gradient and, unless offloaded, masters, moments, EMA.
    zero = read_knobs(config.machine.ds_config, config.machine.unproven)["zero_optimization"]
    shards = 4 if "offload_optimizer" in zero else 20
    need = parameters * (2 if config.precision == "bf16" else 4) + parameters * shards // world.size
    detail = f"{torch.cuda.device_count()} x {name}, {total / 2**30:.0f} GiB, {free / 2**30:.0f} GiB free"
    if total < need:
        return Verdict("GPU", "fail", f"{detail}; weights and optimizer alone need {need / 2**30:.1f} GiB")
    if free < FREE_GPU * total:
        return Verdict("GPU", "warn", f"{detail}: another process holds the rest")
    if name != first[1]:
        return Verdict("GPU", "warn", f"{detail}, but rank 0 has {first[1]}: every step waits for the slowest")
    return Verdict("GPU", "ok", detail)


def memory(config: Config, cards: Cards, compiler: bool) -> Verdict:
    """What the run would take of its GPUs: what it chooses where an option is 'auto', and how many bytes that needs.

    Frozen encoders beside the engine are not counted here; the run counts them.
    """
    choice = automatic.choose(config, cards, compiler)
    return Verdict("memory", "ok" if choice.peak <= cards.room else "warn", choice.about(cards))


def _own_gpu(world: World) -> bool:
    return world.local_rank < torch.cuda.device_count()
