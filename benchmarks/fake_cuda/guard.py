"""The library of `guard.cpp`: built once for a version of torch, and loaded before it."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
_loaded = False


def load() -> None:
    """Put a CUDA device that computes nothing into this process. For programs of their own, before torch is imported.

    Raises:
        RuntimeError: torch has been imported, or was built with CUDA.
        subprocess.CalledProcessError: the library does not compile; the compiler has said why.
    """
    global _loaded
    if _loaded:
        return
    version = importlib.metadata.version("torch")
    if "torch" in sys.modules:
        raise RuntimeError("the device that computes nothing has to be loaded before torch is")
    if not version.endswith("+cpu"):
        raise RuntimeError(f"torch {version}: expected a build for CPUs, which has no CUDA device of its own")
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed would call the device
    ctypes.CDLL(str(_built(version)), ctypes.RTLD_GLOBAL)
    _loaded = True


def _built(version: str) -> Path:
    """The library in the user's cache folder, where the next program finds it."""
    key = hashlib.sha256(version.encode() + SOURCE.read_bytes()).hexdigest()[:16]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megapix" / "fake_cuda"
    library = cache / f"guard-{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    spec = importlib.util.find_spec("torch")
    assert spec
    assert spec.origin
    torch = Path(spec.origin).parent
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        made = Path(folder, library.name)
        include = [f"-I{torch}/include", f"-I{torch}/include/torch/csrc/api/include"]
        link = [f"-L{torch}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
        command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", *include, str(SOURCE), "-o", str(made), *link]
        subprocess.run(command, check=True)
        made.replace(library)  # two programs may build it at once
    return library
