"""The one door to DeepSpeed: its processes, its engine around our network, optimizer and schedule, its partition."""

from __future__ import annotations

import atexit
import ctypes
import fcntl
import hashlib
import logging
import os
import resource
import socket
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils.cpp_extension
from torch import Tensor

from megapix import flat, model, recompute
from megapix.checkpoint import PARTS, Layout, Saved
from megapix.config import BatchLayout, Config, MachineConfig, ModelConfig
from megapix.dist import World, agree, together
from megapix.ds_config import deepspeed_config
from megapix.errors import InputError
from megapix.model import Alignment, PixelDiT
from megapix.model.layers import PiTBlock
from megapix.optim import EMA, AdamWWithEMA
from megapix.schedule import ImagesSeenSchedule

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
from deepspeed.accelerator import get_accelerator
from deepspeed.constants import default_pg_timeout
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state, safe_set_full_fp32_param

M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4
"""Options of glibc's mallopt (malloc.h): when to give memory back, how much to take at once, maps in all."""

# ---------------------------------------------------------------------------------------------------------------------
# Processes
# ---------------------------------------------------------------------------------------------------------------------


def start(world: World) -> torch.device:
    """Join the process group (NCCL on GPUs, gloo on CPUs) and return this rank's device.

    Raises:
        Agreed: DeepSpeed's CPU communication op cannot be had on some rank.
    """
    deepspeed_logger.setLevel(logging.WARNING)
    # It warns of every optimizer that is not its own; ours is proven by the parity and EMA tests.
    deepspeed_logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    if world.size == 1 and "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    # Called by DeepSpeed; nothing that a user of megapix could change.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    _allow_connections()
    get_accelerator().set_device(world.local_rank)
    backend = get_accelerator().communication_backend_name()
    if get_accelerator().device_name() == "cpu":
        _keep_freed_memory()
        torch.distributed.init_process_group(backend, timeout=default_pg_timeout)  # DeepSpeed takes it as it is
        together(world, lambda: load_comm_op(world))
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
    return torch.device(get_accelerator().current_device_name())


def _allow_connections() -> None:
    """Each rank of a large run holds some connections for every other; the usual soft limit is 1,024 open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _keep_freed_memory() -> None:
    """Let glibc keep what CPU tensors free, unless the environment tunes it. Its default gives each large block back to
    the kernel, which fills it with zeros for the next step: 12 to 16 % of a step's time (docs/performance.md)."""
    tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt") and not tuned:
        for option, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**28)):
            libc.mallopt(option, value)


def extensions() -> Path:
    """The folder in which torch builds extensions: TORCH_EXTENSIONS_DIR, or in torch's cache one of this environment.

    A build keeps the paths of its headers, so two environments in one folder would build each other's again and again.
    """
    if asked := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(asked)
    environment = [sys.prefix, sys.version, torch.__version__, *torch.__path__]
    environment += [deepspeed.__version__, *deepspeed.__path__]
    name = hashlib.sha256("\n".join(environment).encode()).hexdigest()[:8]
    return Path(torch.utils.cpp_extension.get_default_build_root()) / f"megapix-{name}"


def load_comm_op(world: World) -> None:
    """Compile (once for an environment) and load DeepSpeed's CPU communication op.

    torch guards its build folder with a file that a killed process leaves behind, and every later run would wait for it
    for ever. Our own lock ends with its process, and whoever holds it knows that such a file is a leftover.

    Raises:
        InputError: its folder cannot be written, or holds a damaged build.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return
    root = extensions()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(root)
    # torch calls ninja, which is installed beside the interpreter; another one would build everything again.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    folder, what = root / builder.name, "DeepSpeed's CPU communication op"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(root / f".{builder.name}.flock", "w") as lock:
            if not (folder / f"{builder.name}.so").exists():
                world.say(f"building {what} in {folder}, once for this environment: about a minute")
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / "lock").unlink(missing_ok=True)
            builder.load(verbose=False)
    except OSError as error:
        raise InputError(
            f"{what} cannot be built in {str(folder)!r}: {error.strerror or error}; "
            "expected a folder that can be written, this or another one in TORCH_EXTENSIONS_DIR"
        ) from error
    except ImportError as error:
        raise InputError(f"{what} cannot be loaded: {error}; remove {str(folder)!r} to have it built again") from error


def stop() -> None:
    """Wait for every rank and leave the process group; a rank that exits while others talk would abort."""
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def leave(world: World, code: int) -> int:
    """`stop`, then end this rank with `code`; alone in the world, return it.

    With several ranks the process ends here, after Python's own exit handlers: threads that gloo has left behind can
    abort the interpreter's teardown ("terminate called without an active exception"), and a launcher would take a
    finished run for a failed one.
    """
    stop()
    if world.size > 1:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


# ---------------------------------------------------------------------------------------------------------------------
# The engine
# ---------------------------------------------------------------------------------------------------------------------


def build_network(
    config: ModelConfig, seed: int, machine: MachineConfig | None = None, alignment: Alignment | None = None
) -> PixelDiT:
    """The network with its initial weights, a function of the seed; the global generator is left as it was.

    `machine` says what each block keeps for backward, whether it is compiled, and the pixel pathway's kernels; without
    it each keeps what autograd saves, none is compiled, and the kernels are the plain ones. `alignment` adds REPA's
    projector.

    Raises:
        InputError: the blocks are to be compiled, or to use Triton's kernels, and the machine cannot.
    """
    block = pit_block(machine.pixel_kernels) if machine else PiTBlock
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = model.build(config, alignment, block)
    if machine:
        if machine.compile:
            _need_a_compiler()
        recompute.apply(network, machine)
    return network


def pit_block(kernels: str) -> type[PiTBlock]:
    """The class of the pixel pathway's blocks, for a value of machine.pixel_kernels.

    Raises:
        InputError: Triton's kernels are asked for, and it is not installed or has no GPU.
    """
    if kernels == "plain":
        return PiTBlock
    if get_accelerator().device_name() == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            f"machine.pixel_kernels = {kernels!r}: Triton compiles for GPUs alone; expected 'plain' on CPUs "
            "(or TRITON_INTERPRET=1 in the environment: Triton's interpreter, for tests of a few pixels)"
        )
    try:
        from megapix.model.fused import FusedPiTBlock  # late: only these runs need Triton
    except ModuleNotFoundError as error:
        raise InputError(
            f"machine.pixel_kernels = {kernels!r}: {error.name} is not installed; expected 'plain', or the Triton that "
            "this torch was built for (pip install triton)"
        ) from error
    return FusedPiTBlock


def _need_a_compiler() -> None:
    from torch._inductor import cpp_builder, exc  # late: a second of imports that only compiled runs need

    if get_accelerator().device_name() == "cpu":
        try:
            cpp_builder.get_cpp_compiler()
        except exc.InvalidCxxCompiler as error:
            raise InputError(
                "machine.compile = True: torch.compile finds no C++ compiler; expected g++, or another one in CXX"
            ) from error


def build(config: Config, layout: BatchLayout, network: PixelDiT, knobs: dict[str, Any] | None = None) -> Any:
    """DeepSpeed's engine around `network`, with our optimizer and our schedule. Call it on every rank.

    In bf16 the fp32 masters, and so the EMA, start from the network's fp32 weights; DeepSpeed alone would start them
    from weights already rounded to bf16. `knobs` is DeepSpeed's whole configuration where it is not the one that
    follows from `config`.

    Raises:
        InputError: DeepSpeed refuses a knob of the JSON.
    """
    import pydantic

    o = config.optim
    initial = [p.detach().clone() for p in network.parameters()] if config.precision == "bf16" else []
    settings = o.lr, (o.beta1, o.beta2), o.weight_decay, o.ema_decay
    optimizer = AdamWWithEMA(network.parameters(), *settings, fused=config.machine.fused_adamw)
    try:
        engine, *_ = deepspeed.initialize(
            model=network,
            optimizer=optimizer,
            lr_scheduler=lambda base: ImagesSeenSchedule(base, o),
            config=knobs or deepspeed_config(config, layout),
            dist_init_required=False,
        )
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise InputError(f"machine.ds_config = {config.machine.ds_config!r}: {key}: {first['msg'].lower()}") from error
    for p, value in zip(network.parameters() if initial else (), initial, strict=True):
        safe_set_full_fp32_param(p, value)
    optimizer.begin()
    # Links parameters to their optimizer state at once, so that the EMA can be gathered; DeepSpeed would do it at the
    # first step. The state's tensors are filled in place from here on.
    engine.optimizer._lazy_init_hp_params_optimizer_state()
    if engine.optimizer.cpu_offload:
        _forget_skipped_gradients(engine.optimizer)
    return engine


def _forget_skipped_gradients(optimizer: Any) -> None:
    """Let a skipped step leave no gradient behind in ZeRO-Offload.

    In bf16 DeepSpeed 0.19.8 keeps the summed gradients of a skipped step if the optimizer is offloaded, and adds the
    next step's to them: after one that is not finite every step would be skipped. Without offload it drops them.
    """
    reset = optimizer.reset_cpu_buffers  # called at the end of every step, skipped or not

    def reset_all() -> None:
        reset()
        for kept in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            for group in kept:
                kept[group] = None

    optimizer.reset_cpu_buffers = reset_all


# ---------------------------------------------------------------------------------------------------------------------
# State
# ---------------------------------------------------------------------------------------------------------------------


def layout(engine: Any, world: World) -> Layout:
    """How ZeRO-2 has laid the parameters end to end and shared them out; the same on every rank."""
    names = {id(p): name for name, p in engine.module.named_parameters()}
    (group,), (partition_size,) = engine.optimizer.bit16_groups, engine.optimizer.partition_size
    found = Layout({names[id(p)]: tuple(p.shape) for p in group}, world.size)
    if partition_size != found.share:
        raise RuntimeError(f"DeepSpeed's partition has {partition_size} numbers, expected {found.share}")
    return found


def share(engine: Any, layout: Layout, world: World) -> dict[str, Tensor]:
    """This rank's range of each part of a checkpoint: flat fp32 views of what the optimizer steps."""
    (partition,) = engine.optimizer.single_partition_of_fp32_groups
    start, stop = layout.range_of(world.rank)
    parts = {"weights": partition.detach()} | engine.optimizer.optimizer.state[partition]
    return {part: parts[part][: stop - start] for part in PARTS}


def adam_steps(engine: Any) -> int:
    """Applied steps that AdamW has counted."""
    (partition,) = engine.optimizer.single_partition_of_fp32_groups
    return int(engine.optimizer.optimizer.state[partition]["step"])


def load(engine: Any, saved: Saved, world: World) -> None:
    """Restore a checkpoint of any number of ranks: each rank reads its own range, a chunk at a time.

    Raises:
        Agreed: a file cannot be read, or holds another network.
    """
    own, folder, state = layout(engine, world), saved.folder, saved.state
    if state.layout.shapes != own.shapes:
        agree(world, f"{folder} holds another network than the one that its configuration describes")
    start, _ = own.range_of(world.rank)

    def fill() -> None:
        for part, vector in share(engine, own, world).items():
            flat.fill(vector, folder, state.layout, part, start)

    together(world, fill)
    (partition,) = engine.optimizer.single_partition_of_fp32_groups
    engine.optimizer.optimizer.state[partition]["step"].fill_(state.adam_steps)
    engine.optimizer.update_lp_params()  # the weights that the network computes with, from the masters
    engine.lr_scheduler.load_state_dict({"images_seen": state.counters.images_seen})


@contextmanager
def raw_weights(engine: Any) -> Iterator[PixelDiT]:
    """The network with the weights as they are trained, in eval mode."""
    network: PixelDiT = engine.module
    network.eval()
    try:
        yield network
    finally:
        network.train()


@contextmanager
def ema_weights(engine: Any) -> Iterator[PixelDiT]:
    """The network with the EMA gathered into its weights, in eval mode; the training weights come back at the end.

    Call it on every rank: each parameter's EMA is gathered from all shards, and afterwards its weight is made from the
    masters again, as after a step; no second copy of the weights is held.
    """
    with raw_weights(engine) as network:
        try:
            with torch.no_grad():
                for p in network.parameters():
                    p.copy_(safe_get_full_optimizer_state(p, EMA))
            yield network
        finally:
            engine.optimizer.update_lp_params()


def gathered(engine: Any, what: str) -> dict[str, torch.Tensor]:
    """A state of every parameter in fp32, by name, gathered from all shards after a step. Call it on every rank.

    `what` is 'master', `optim.EMA`, or one of Adam's, 'exp_avg' and 'exp_avg_sq'.
    """
    return {
        name: safe_get_full_fp32_param(p) if what == "master" else safe_get_full_optimizer_state(p, what)
        for name, p in engine.module.named_parameters()
    }
