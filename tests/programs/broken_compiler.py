"""The command line, where torch.compile's C++ compiler is another one; DeepSpeed's stays.

usage: python -m tests.programs.broken_compiler COMPILER train ...
"""

from __future__ import annotations

import sys

from torch._inductor import config

from megapix.cli.main import main

if __name__ == "__main__":
    config.cpp.cxx = (None, sys.argv[1])
    config.force_disable_caches = True  # another run may have compiled the same
    sys.exit(main(sys.argv[2:]))
