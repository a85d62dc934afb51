"""`megapix ARGUMENTS` on every rank, but rank 1 sees another machine: other mounts, another checkout, another clock.

usage: python -m tests.programs.other_node MOUNTS CHECKOUT CLOCK ARGUMENTS…

MOUNTS is a shell command that runs in rank 1's own mount namespace (needs root), CHECKOUT the folder that it runs
from, CLOCK a folder with a sitecustomize.py.
"""

from __future__ import annotations

import os
import sys

from megapix.cli import main as cli

if __name__ == "__main__":
    mounts, checkout, clock, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        os.environ["PYTHONPATH"] = clock
        script = f'{mounts} && cd "$0" && exec "$@"'
        command = ["unshare", "-m", "sh", "-ec", script, checkout, sys.executable, "-m", "megapix", *arguments]
        os.execvp(command[0], command)
    raise SystemExit(cli.main(arguments))
