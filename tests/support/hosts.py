"""Hosts for tests: network, host-name, process and mount namespaces, joined by a bridge, an sshd in each.

Files, and so the run folder, are those of this machine and shared. Every process of a host ends with its sshd, which is
the first process of the host's process namespace. The bridge has a namespace of its own; nothing else is reached.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support import programs
from tests.support.launch import ROOT

MARKS = [
    programs.needs("ip", "sshd", "ssh-keygen", "pdsh", "unshare", "nsenter", "mount"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for network namespaces"),
]
"""Of the tests that make hosts."""

SSHD = """\
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin yes
StrictModes no
UsePAM no
PidFile none
MaxStartups 100
"""
SSH = """\
Host *
  IdentityFile {folder}/key
  StrictHostKeyChecking no
  UserKnownHostsFile /dev/null
  LogLevel ERROR
"""
BOOT = """\
set -e
hostname {name}
mount -t tmpfs tmpfs /run
mkdir /run/sshd
mount --bind {folder}/hosts /etc/hosts
mount --bind {folder}/ssh /etc/ssh/ssh_config.d
exec {sshd} -D -e -f {folder}/sshd_config
"""


@dataclass
class Host:
    """A running host; `init` is its first process, as this machine counts."""

    name: str
    address: str
    switch: str
    port: str
    init: int

    def popen(self, command: Sequence[str | Path], **environment: str) -> subprocess.Popen[str]:
        """Start a command there, in the repository, with this interpreter's environment."""
        enter = ["nsenter", "-t", str(self.init), "-m", "-u", "-n", "-p", "--"]
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        base = {"PYTHON": sys.executable, "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "eth0", "PATH": path}
        return subprocess.Popen(
            [*enter, "sh", "-c", f'cd {ROOT} && exec "$@"', "sh", *map(str, command)],
            env=os.environ | base | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def link(self, state: str) -> None:
        """Set its port of the switch 'up' or 'down', as if a cable were pulled."""
        _run("ip", "-n", self.switch, "link", "set", self.port, state)


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True)


@contextmanager
def hosts(names: Sequence[str], folder: Path) -> Iterator[list[Host]]:
    """Hosts of these names at 10.77.0.1, .2, …; keys and configuration lie in `folder`."""
    tag = f"megapix{os.getpid()}"
    switch, spaces, booted = f"{tag}-switch", [f"{tag}-{name}" for name in names], []
    addresses = [f"10.77.0.{number + 1}" for number in range(len(names))]
    sshd = shutil.which("sshd")  # it wants to be started by its whole path
    (folder / "ssh").mkdir()
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / "key")
    (folder / "sshd_config").write_text(SSHD.format(folder=folder))
    (folder / "ssh" / "test.conf").write_text(SSH.format(folder=folder))
    lines = [f"{address} {name}\n" for name, address in zip(names, addresses, strict=True)]
    (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))
    try:
        _run("ip", "netns", "add", switch)
        _run("ip", "-n", switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", switch, "link", "set", "bridge", "up")
        found = []
        for number, (name, space, address) in enumerate(zip(names, spaces, addresses, strict=True)):
            port = f"port{number}"
            _run("ip", "netns", "add", space)
            _run("ip", "-n", switch, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", space)
            _run("ip", "-n", switch, "link", "set", port, "master", "bridge", "up")
            _run("ip", "-n", space, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _run("ip", "-n", space, "link", "set", device, "up")
            script = BOOT.format(name=name, folder=folder, sshd=sshd)
            unshare = ["unshare", "--uts", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
            process = subprocess.Popen(
                ["ip", "netns", "exec", space, *unshare, "sh", "-c", script],
                stderr=subprocess.PIPE,
                text=True,
            )
            booted.append(process)
            assert process.stderr
            for line in process.stderr:  # sshd says when it listens
                if "Server listening" in line:
                    break
            else:
                raise RuntimeError(f"{name} does not start: {process.wait()}")
            init = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
            found.append(Host(name, address, switch, port, int(init)))
        yield found
    finally:
        for process in booted:
            process.kill()  # and its child, by --kill-child, with all that runs there
            process.wait()
        for space in (switch, *spaces):
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)
