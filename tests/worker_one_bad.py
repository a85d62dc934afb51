"""`megapix ARGUMENTS` on a rank, but rank 1 is given a shard folder that does not exist."""

from __future__ import annotations

import os
import sys

from megapix import cli

if __name__ == "__main__":
    arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        arguments[arguments.index("--data.path") + 1] = "gone"
    raise SystemExit(cli.main(arguments))
