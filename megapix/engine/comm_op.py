"""DeepSpeed's CPU communication op: where it is built, and how it is loaded past locks that nobody holds any more."""

from __future__ import annotations

import fcntl
import hashlib
import os
import sys
from pathlib import Path

import deepspeed
import torch
import torch.utils.cpp_extension
from deepspeed.accelerator import get_accelerator

from megapix.dist import World, stops_held_back
from megapix.errors import InputError


def extensions() -> Path:
    """The folder in which torch builds extensions: TORCH_EXTENSIONS_DIR, or in torch's cache one of this environment.

    A build keeps the paths of its headers, so two environments with one folder would rebuild each other's every time.
    """
    if folder := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(folder)
    environment = [sys.prefix, sys.version, torch.__version__, *torch.__path__]
    environment += [deepspeed.__version__, *deepspeed.__path__]
    name = hashlib.sha256("\n".join(environment).encode()).hexdigest()[:8]
    return Path(torch.utils.cpp_extension.get_default_build_root()) / f"megapix-{name}"


def load_comm_op(world: World) -> None:
    """Compile (once per environment) and load DeepSpeed's CPU communication op.

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
            with stops_held_back():
                builder.load(verbose=False)
    except OSError as error:
        raise InputError(
            f"{what} cannot be built in {str(folder)!r}: {error.strerror or error}; "
            "expected a folder that can be written, this or another one in TORCH_EXTENSIONS_DIR"
        ) from error
    except ImportError as error:
        raise InputError(f"{what} cannot be loaded: {error}; remove {str(folder)!r} to have it built again") from error
