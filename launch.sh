#!/usr/bin/env bash
# `megapix launch` with this checkout's Python: PYTHON, or .venv, or python3.
set -euo pipefail

fail() {
  echo "launch.sh: error: $*" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if [[ ${PYTHON:-} ]]; then
  python=$(command -v "$PYTHON") || fail "PYTHON = '$PYTHON': expected an interpreter's name or path"
else
  python=$here/.venv/bin/python
  [[ -x $python ]] || python=$(command -v python3) || fail "no python: make .venv with 'make quickstart', or set PYTHON"
fi
export MEGAPIX_LAUNCHER=launch.sh # how its messages begin
exec "$python" -m megapix launch "$@"
