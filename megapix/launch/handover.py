"""What the other nodes need of this environment, and `.deepspeed_env` of the user, which wins.

DeepSpeed passes variables on in the command line of ssh, which everybody on every node can read. So only what a process
needs before its Python starts goes that way; all else, and of `.deepspeed_env` what may be a secret, goes through the
stdin of ssh into a file for each rank. It lies in its node's memory, this user alone can read it, and the rank removes
it once it has read it (`cli/environment.py`).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
from fnmatch import fnmatchcase
from itertools import accumulate
from pathlib import Path

from megapix.errors import InputError, RankLost
from megapix.launch.hostfile import Node
from megapix.launch.supervise import heeding
from megapix.launch.words import QUOTED
from megapix.text import text_of

OPEN = """
PATH LD_LIBRARY_PATH OMP_NUM_THREADS DS_ACCELERATOR MALLOC_* GLIBC_TUNABLES
SSL_CERT_* REQUESTS_CA_BUNDLE CURL_CA_BUNDLE AWS_CA_BUNDLE
"""
"""What a process needs before its Python starts, besides PYTHON*, which DeepSpeed passes on by itself; and where
certificates lie, which everybody may know."""
OWN = "CUDA_VISIBLE_DEVICES DS_ENV_FILE TORCHELASTIC_*"
"""A launcher's own."""
PRIVATE = """
TORCH* PYTORCH* CUDA_* CUDNN_* CUBLAS* NVIDIA_TF32_OVERRIDE TRITON_* DS_* DEEPSPEED_* NCCL* GLOO_* UCX* MV2* FI_* OMP_*
GOMP_* KMP_* MKL_* OPENBLAS_* MAX_JOBS CC CXX CPATH C_INCLUDE_PATH CPLUS_INCLUDE_PATH LIBRARY_PATH HF_* HUGGING*
TRANSFORMERS_* TOKENIZERS_* XDG_CACHE_HOME FSSPEC_* AWS_* S3* GOOGLE_* GCLOUD_* GCSFS_* STORAGE_EMULATOR_HOST AZURE_*
*_proxy *_PROXY MLFLOW* MEGAPIX_HTTP_* NETRC
"""
"""What torch, Triton, DeepSpeed, the networks and remote storage read."""
PASSED_ON = "MLFLOW* MV2* NCCL* PYTHON* UCX*"
"""What DeepSpeed would put into the command line without being asked."""
SECRET = re.compile("TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|SAS|SESSION|COOKIE|CONNECTION")
CHANGED = re.compile(r"[\"$`\\\n]|%[hnu]|^\s|\s$")
"""What does not survive: DeepSpeed puts a value between double quotes, and pdsh replaces %h, %n and %u."""
TAKE = (
    "umask 077; set -C; cat >$0.$1 || exit 1; n=$1; "
    "while n=$((n + 1)); [ $n -lt $2 ]; do ln $0.$1 $0.$n || exit 1; done"
)
"""For the nodes: a file, and a name of it for each further rank."""


class Handover:
    """Files of variables in the memory of nodes, from `give` until the ranks or `take_back` remove them."""

    def __init__(self, nodes: list[Node], scratch: Path) -> None:
        """`scratch` is a folder of this run alone, for what DeepSpeed reads; its name makes those of the files."""
        self.nodes, self.scratch = nodes, scratch
        self.base = f"/dev/shm/megapix-environment-{scratch.name.rpartition('-')[2]}"
        self.uploads: list[subprocess.Popen[bytes]] = []

    def give(self, environment: dict[str, str], quoted: bool) -> dict[str, str]:
        """Hand `environment` to all nodes and return what DeepSpeed's launcher gets; `quoted`: so are the arguments.

        Raises:
            InputError: a value does not survive ssh, or a node does not take the file.
            RankLost: a node is not reached.
        """
        theirs = _users()
        exported, private = dict[str, str](), dict[str, str]()
        for name, value in environment.items():
            if name in theirs or _like(name, OWN):
                continue
            if _like(name, OPEN) or (name.startswith("PYTHON") and not _may_be_secret(name, value)):
                if CHANGED.search(value):
                    raise InputError(
                        f"environment variable {name} does not survive ssh: expected no quote, $, `, \\, %n, line "
                        "break or outer space"
                    )
                if not name.startswith("PYTHON"):
                    exported[name] = value
            elif name.startswith("PYTHON") or _like(name, PRIVATE):
                private[name] = value
        for name, value in theirs.items():
            (private if _may_be_secret(name, value) else exported)[name] = value
        if quoted:
            exported[QUOTED] = "1"
        if private:
            exported["MEGAPIX_ENVIRONMENT"] = self.base
        lines = "".join(f"{name}={value}\n" for name, value in exported.items())
        path = self.scratch / "env"
        path.write_bytes(os.fsencode(lines))
        if private:
            self._upload(private)
        unwanted = {name for name in private if _like(name, PASSED_ON)}
        kept = {name: value for name, value in environment.items() if name not in unwanted}
        return kept | {"DS_ENV_FILE": str(path)}

    def _upload(self, private: dict[str, str]) -> None:
        payload = b"".join(os.fsencode(f"{name}={value}") + b"\0" for name, value in private.items())
        ends = list(accumulate(node.slots for node in self.nodes))
        signals: list[int] = []  # one that came between a start and its place in the list would leave a file behind
        with heeding(lambda number, _: signals.append(number)):
            for node, end in zip(self.nodes, ends, strict=True):
                with os.fdopen(
                    os.memfd_create("environment"), "w+b"
                ) as file:  # a pipe could fill up before ssh reads it
                    file.write(payload)
                    file.seek(0)
                    self.uploads.append(self._ssh(node, TAKE, str(end - node.slots), str(end), stdin=file.fileno()))
        for number in signals:
            signal.raise_signal(number)
        for node, upload in zip(self.nodes, self.uploads, strict=True):
            code = upload.wait()
            if code == 255:
                raise RankLost(f"{node.host} is not reached by ssh")
            if code:
                raise InputError(
                    f"--hostfile: {node.host} does not take the environment of this node: expected a /dev/shm that can "
                    "be written"
                )

    def take_back(self) -> None:
        """Remove what no rank has removed."""
        if not self.uploads:
            return
        for upload in self.uploads:  # what is on its way would come after the removal
            upload.wait()
        null = subprocess.DEVNULL
        for removal in [self._ssh(node, "rm -f $0.*", stdin=null, stdout=null, stderr=null) for node in self.nodes]:
            removal.wait()

    def _ssh(self, node: Node, script: str, *arguments: str, **streams: int) -> subprocess.Popen[bytes]:
        """Start a script there, with pdsh's options; its $0 is where the files lie."""
        options = os.environ["PDSH_SSH_ARGS_APPEND"].split()
        command = " ".join(["exec sh -c", f"'{script}'", self.base, *arguments])
        try:
            return subprocess.Popen(["ssh", *options, node.host, command], **streams)  # type: ignore[call-overload]
        except FileNotFoundError as error:
            raise InputError(
                "no ssh: --hostfile starts the nodes by it (Debian: apt install openssh-client)"
            ) from error


def _users() -> dict[str, str]:
    """Variables of `.deepspeed_env`, at home and here."""
    found = dict[str, str]()
    for folder in (Path.home(), Path()):
        try:
            data = (folder / ".deepspeed_env").read_bytes()
        except OSError:
            continue
        try:
            text = text_of(data)
        except ValueError:  # a value may be of any bytes
            text = data.decode("utf-8-sig", "surrogateescape").replace("\r\n", "\n")
        found.update(re.findall(r"^([A-Za-z_][A-Za-z_0-9]*)=(.*)$", text, re.MULTILINE))
    return found


def _may_be_secret(name: str, value: str) -> bool:
    """By its name, or with a password in a URL. Errs on the safe side."""
    return bool(SECRET.search(name.upper()) or re.search("://[^/]*@", value))


def _like(name: str, patterns: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns.split())
