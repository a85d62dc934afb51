"""What torch.compile and Triton's kernels need of a machine, looked for before the first step."""

from __future__ import annotations

import os
import shutil
import subprocess
import sysconfig
import tempfile
from importlib.util import find_spec
from pathlib import Path

from megapix.config import MachineConfig
from megapix.errors import InputError

LIBCUDA = "libcuda.so.1"
"""The driver's library, which Triton links its launcher with."""
LDCONFIG = "/sbin/ldconfig"
"""Where Triton asks for libraries."""


def missing(cuda: bool) -> str | None:
    """What compiled kernels lack here, in words for one line, or None if all is there.

    On GPUs Triton builds its launcher in C, with Python's headers and the driver's library: they are looked for as its
    `runtime/build.py` and `backends/nvidia/driver.py` do, and something as small is built. On CPUs Inductor builds C++.

    Args:
        cuda: kernels for GPUs, by Triton; else for CPUs, by Inductor.
    """
    return _for_triton() if cuda else _for_inductor()


def asked(machine: MachineConfig, cuda: bool) -> str | None:
    """The option, with its value, that compiles kernels whatever it takes; None if none does, as with 'auto'."""
    if machine.compile is True:
        return "machine.compile = True"
    if machine.pixel_kernels != "plain" and cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"machine.pixel_kernels = {machine.pixel_kernels!r}"
    return None


def require(machine: MachineConfig, cuda: bool) -> None:
    """Refuse options that compile kernels where something is missing for it.

    Raises:
        InputError: what is missing, how to get it, and the option that does without.
    """
    option = asked(machine, cuda)
    lacking = missing(cuda) if option else None
    if lacking:
        without = "--machine.no-compile" if machine.compile is True else "--machine.pixel-kernels plain"
        raise InputError(f"{option}: {lacking}; or do without ({without})")


def _for_inductor() -> str | None:
    from torch._inductor import cpp_builder, exc  # late: a second of imports that only compiled runs need

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return "torch.compile finds no C++ compiler; expected g++ (Debian: apt install g++), or another one in CXX"
    # It gives the compiler both folders, which are one but for Debian's own Python.
    folders = [Path(sysconfig.get_path("include")), Path(sysconfig.get_path("include", "posix_prefix"))]
    return _no_header("torch.compile", next((f for f in folders if (f / "Python.h").is_file()), folders[0]))


def _for_triton() -> str | None:
    if find_spec("triton") is None:
        return "torch.compile finds no Triton; expected the one that this torch was built for (pip install triton)"
    name = os.environ.get("CC")
    compiler = shutil.which(name) if name is not None else shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        found = "no C compiler" if name is None else f"no C compiler CC = {name!r}"
        return f"Triton finds {found}; expected gcc (Debian: apt install gcc libc6-dev), or another one's path in CC"
    scheme = sysconfig.get_default_scheme()
    scheme = "posix_prefix" if scheme == "posix_local" else scheme  # Debian's own one, whose folder has no headers
    include = Path(sysconfig.get_path("include", scheme))
    if lacking := _no_header("Triton", include):
        return lacking
    folders = _folders_of_libcuda()
    if not any((folder / LIBCUDA).exists() for folder in folders):
        return (
            f"Triton finds no {LIBCUDA}, the driver's library; expected it in the list of {LDCONFIG} -p, "
            "or its folder in TRITON_LIBCUDA_PATH"
        )
    return _trial(compiler, include, folders)


def _no_header(who: str, include: Path) -> str | None:
    header = include / "Python.h"
    if header.is_file():
        return None
    return f"{who} needs {header}; expected Python's headers (Debian: apt install python3-dev)"


def _folders_of_libcuda() -> list[Path]:
    if folder := os.environ.get("TRITON_LIBCUDA_PATH"):
        return [Path(folder)]
    try:
        listed = subprocess.run([LDCONFIG, "-p"], capture_output=True, text=True, errors="ignore").stdout
    except OSError:
        return []
    found = [Path(line.split()[-1]).parent for line in listed.splitlines() if LIBCUDA in line]
    return found or [Path(folder) for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]


def _trial(compiler: str, include: Path, folders: list[Path]) -> str | None:
    """Build a module as Triton builds its launcher: a compiler may be there without libc's headers or a linker."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch, "trial.c")
        source.write_text("#include <stdlib.h>\n#include <Python.h>\nint trial(void) { return Py_IsInitialized(); }\n")
        command = [compiler, str(source), "-shared", "-fPIC", "-o", f"{scratch}/trial.so", f"-l:{LIBCUDA}"]
        command += [f"-L{folder}" for folder in folders] + [f"-I{include}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            return f"Triton's C compiler {compiler} does not start: {error.strerror}; expected a working gcc or CC"
    if done.returncode == 0:
        return None
    said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
    first = next((line for line in said if "error" in line), said[0])
    return f"Triton's C compiler {compiler} builds nothing ({first.strip()}); expected a working gcc or CC"
