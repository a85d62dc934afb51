"""The processes of a run, one after the other: when each started, where, and with which versions. Imports no torch.

RUN/processes.jsonl gets a line at each start; `megapix diff` and `megapix report` read it.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megapix.dist import warn

NAME = "processes.jsonl"
PACKAGES = ("megapix", "torch", "deepspeed", "numpy", "transformers", "triton")


@dataclass(frozen=True)
class Process:
    """One start of a run."""

    started: float
    """Seconds since 1970."""
    images_seen: int
    """Where it started or resumed."""
    ranks: int
    hosts: tuple[str, ...]
    cards: str
    """The GPUs of all ranks in words, or 'CPUs'."""
    versions: dict[str, str]
    samples: int
    """Of the data set."""
    data_digest: str
    """Its identity, the hash of its index."""


def versions() -> dict[str, str]:
    """Python's version here, and those of the packages that a run computes with."""
    return {"python": platform.python_version()} | {name: found for name in PACKAGES if (found := _version(name))}


def note(run: Path, process: Process) -> None:
    """Add a start to the run folder. A run does not end because of it: what cannot be written is warned about."""
    try:
        with open(run / NAME, "a") as file:
            file.write(json.dumps(asdict(process)) + "\n")
    except OSError as error:
        warn(f"{run / NAME}: cannot be written: {error.strerror}")


def processes(run: Path) -> list[Process]:
    """The starts of a run, oldest first; lines that are damaged, or from another release, are passed over."""
    try:
        lines = (run / NAME).read_text(errors="replace").splitlines()
    except OSError:
        return []
    return [process for line in lines if (process := _parsed(line))]


def _parsed(line: str) -> Process | None:
    try:
        data = json.loads(line)
        return Process(**{**data, "hosts": tuple(data["hosts"])})
    except (ValueError, TypeError, KeyError):
        return None


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # megapix run from a checkout, or a package that is not needed here
        return ""
