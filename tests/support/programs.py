"""Programs that a machine may lack, and what a test does about it. PATH alone says which are there.

`MEGAPIX_TESTS_WITHOUT=pdsh,sshd pytest …` hides some by name, from the tests and from every process that they start.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

PACKAGES = {
    "chattr": "e2fsprogs",
    "chromium": "chromium",
    "git": "git",
    "ip": "iproute2",
    "mount": "mount",
    "nginx": "nginx-light",
    "nsenter": "util-linux",
    "openssl": "openssl",
    "pdsh": "pdsh",
    "ssh-keygen": "openssh-client",
    "sshd": "openssh-server",
    "umount": "mount",
    "unshare": "util-linux",
}
"""Debian's package of each program that a test may ask for."""
HIDDEN = "MEGAPIX_TESTS_WITHOUT"
"""The environment variable that names the hidden ones."""


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip a test, a module's tests, or those of a fixture's parameter, where one of these programs is missing."""
    assert set(names) <= PACKAGES.keys(), names
    return pytest.mark.optional_programs(*names)


def lacking(names: tuple[str, ...]) -> str:
    """Which of them are missing and what would install them, or nothing."""
    missing = [f"{name} (Debian: {PACKAGES[name]})" for name in names if shutil.which(name) is None]
    return f"needs {', '.join(missing)}" if missing else ""


def hide(names: list[str], scratch: Path) -> None:
    """Take programs off this process's PATH. A folder that holds one gives way to links to all others of it."""
    folders = []
    for number, folder in enumerate(map(Path, os.environ["PATH"].split(os.pathsep))):
        if any((folder / name).exists() for name in names):
            links = scratch / str(number)
            links.mkdir()
            for program in folder.iterdir():
                if program.name not in names:
                    (links / program.name).symlink_to(program)
            folder = links
        folders.append(str(folder))
    os.environ["PATH"] = os.pathsep.join(folders)
