"""`megapix` commands one after the other where deepspeed is not to be found.

usage: python -m tests.programs.no_deepspeed COMMANDS      (JSON: a list of lists of arguments)
"""

from __future__ import annotations

import importlib.util
import json
import sys
from typing import Any


class Blocked:
    """A finder before all others."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """None lets others look for it."""
        if name.split(".")[0] == "deepspeed":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main() -> int:
    assert importlib.util.find_spec("deepspeed"), "it could have been"
    sys.meta_path.insert(0, Blocked())  # type: ignore[arg-type]
    from megapix.cli import main as cli

    return max(cli.main(command) for command in json.loads(sys.argv[1]))


if __name__ == "__main__":
    raise SystemExit(main())
