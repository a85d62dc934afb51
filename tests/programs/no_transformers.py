"""`megapix ARGUMENTS` on one rank, then the check that transformers was not imported, by us or by DeepSpeed.

usage: python -m tests.programs.no_transformers ARGUMENTS…
"""

from __future__ import annotations

import importlib.util
import sys

from megapix.cli import main as cli


def main() -> int:
    assert importlib.util.find_spec("transformers"), "it could have been"
    code = cli.main(sys.argv[1:])
    assert "transformers" not in sys.modules
    return code


if __name__ == "__main__":
    raise SystemExit(main())
