"""`megapix ARGUMENTS` on every rank, but rank 1 gets another value for one option.

usage: python -m tests.worker_differs OPTION VALUE ARGUMENTS…
"""

from __future__ import annotations

import os
import sys

from megapix import cli

if __name__ == "__main__":
    option, value, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        arguments[arguments.index(option) + 1] = value
    raise SystemExit(cli.main(arguments))
