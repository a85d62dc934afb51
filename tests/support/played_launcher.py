"""launch.sh with DeepSpeed's launcher, ssh and pdsh played by small scripts, which show what they are asked."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support.launch import ROOT

LAUNCHER = """#!/bin/sh
case "$*" in
  *deepspeed.launcher*) {played} ;;
  *"megapix train"*--dry-run)
    if [ "$checked" ]; then printf '{{"out": "%s"}}' "$checked"; else exec "{python}" "$@"; fi
    ;;
  *"megapix train"*) echo "rank $RANK of $WORLD_SIZE, local $LOCAL_RANK, at $MASTER_ADDR:$MASTER_PORT, $HF_TOKEN" ;;
  *) exec "{python}" "$@" ;;
esac
"""


def start(
    folder: Path, played: str, *options: str | Path, script: Path = ROOT / "launch.sh", **environment: str
) -> subprocess.Popen[str]:
    """launch.sh, with `played` as DeepSpeed's launcher; `folder`/bin comes first on the PATH."""
    python = folder / "bin" / "python"
    python.parent.mkdir(exist_ok=True)
    python.write_text(LAUNCHER.format(played=played, python=sys.executable))
    python.chmod(0o755)
    path = os.pathsep.join([str(python.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        [script, *options],
        env=os.environ | {"PYTHON": str(python), "PATH": path} | environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=_heed_signals,
    )


def _heed_signals() -> None:
    """A test run in the background, or under nohup, ignores these, and so would its children."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def finish(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def play(folder: Path, **programs: str) -> None:
    """Scripts as pdsh or ssh, for `start`."""
    (folder / "bin").mkdir(exist_ok=True)
    for name, played in programs.items():
        program = folder / "bin" / name
        program.write_text(f"#!/bin/sh\n{played}\n")
        program.chmod(0o755)


HERE = 'for last; do :; done; echo "$@" >>{folder}/ssh.log; sh -c "$last"'
"""An ssh whose every host is this machine; the command is its last argument."""
NODES = "node01 slots=2\nnode02 slots=1\n"
