"""`megapix ARGUMENTS` on every rank; a checkpoint's temporary folder cannot be made on rank 0, as on a broken disk.

usage: python -m tests.programs.failing_save ARGUMENTS…
"""

from __future__ import annotations

import sys
from pathlib import Path

from megapix.checkpoint import saver
from megapix.cli import main as cli

if __name__ == "__main__":
    saver.PAUSES = (0.0, 0.0)
    make = Path.mkdir

    def refuse(path: Path, *args: object, **kwargs: object) -> None:
        if path.suffix == ".tmp":
            raise OSError(5, "Input/output error", str(path))
        make(path, *args, **kwargs)  # type: ignore[arg-type]

    Path.mkdir = refuse  # type: ignore[method-assign,assignment]
    raise SystemExit(cli.main(sys.argv[1:]))
