"""`megapix ARGUMENTS` on every rank, but rank 1 gets another value for one option.

usage: python -m tests.programs.other_option OPTION VALUE ARGUMENTS…
"""

from __future__ import annotations

import os
import sys

from megapix.cli import main as cli

if __name__ == "__main__":
    option, value, *arguments = sys.argv[1:]
    if os.environ["RANK"] == "1":
        arguments[arguments.index(option) + 1] = value
    raise SystemExit(cli.main(arguments))
