#!/usr/bin/env bash
# Starts `megapix train` on every accelerator of this machine, or on CPU ranks. Environment and launcher only.
set -euo pipefail

usage() {
  cat <<'EOF'
usage: ./launch.sh [--ranks N] PRESET --data.path SHARDS --out RUN [megapix train options]

Starts `megapix train` under the deepspeed launcher: one rank for each GPU of this machine, or, where there is none,
CPU ranks with gloo (2 by default). Everything but --ranks goes to `megapix train`.

  --ranks N    ranks to start (default: all GPUs, or those of CUDA_VISIBLE_DEVICES; without a GPU, 2 CPU ranks)
  --help       this text; `megapix train --help` lists presets, `megapix train PRESET --help` all options

Environment: PYTHON (default: .venv/bin/python if it exists, else python3), OMP_NUM_THREADS (CPU threads of a rank;
default: cores / ranks), MASTER_PORT (default: a free port).
EOF
}

fail() {
  echo "launch.sh: error: $*" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ranks=
arguments=()
while (($#)); do
  case $1 in
    --help | -h) ((${#arguments[@]})) || { usage; exit 0; }; arguments+=("$1") ;;
    --ranks=*) ranks=${1#--ranks=} ;;
    --ranks) (($# > 1)) || fail "--ranks needs a number"; ranks=$2; shift ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
((${#arguments[@]})) || { usage >&2; exit 2; }
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || fail "--ranks = '$ranks': expected a number above 0"

python=${PYTHON:-$here/.venv/bin/python}
[[ -x $python ]] || python=$(command -v python3) || fail "no python: make .venv with 'make quickstart', or set PYTHON"
PATH=$(dirname "$python"):$PATH # deepspeed's op builder looks for ninja on the PATH
export PATH

gpus=0
devices=
if command -v nvidia-smi >/dev/null; then
  count=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
  ((count == 0)) || devices=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((count - 1)))}
fi
if [[ -n $devices ]]; then
  [[ $devices =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "CUDA_VISIBLE_DEVICES = '$devices': expected numbers such as 0,1"
  IFS=, read -r -a list <<<"$devices"
  gpus=${#list[@]}
fi
cores=$(nproc)
if ((gpus)); then
  ranks=${ranks:-$gpus}
  ((ranks <= gpus)) || fail "--ranks = $ranks: there are $gpus GPUs ($devices)"
  unset CUDA_VISIBLE_DEVICES # named to the launcher, which sets it for each rank
  where=(--include "localhost:$(IFS=,; echo "${list[*]:0:ranks}")")
else
  ranks=${ranks:-2}
  export DS_ACCELERATOR=cpu
  where=(--num_gpus "$ranks")
fi
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

# The configuration is checked once here, so that a mistake is one line and not one from every rank.
WORLD_SIZE=$ranks "$python" -m megapix train "${arguments[@]}" --dry-run >/dev/null

port=${MASTER_PORT:-$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')}

if ((!gpus)); then
  # DeepSpeed's CPU communication op: compiled at its first use, and 66 MiB of /dev/shm for each rank.
  command -v g++ >/dev/null || fail "no g++: DeepSpeed compiles its CPU communication op (Debian: apt install g++)"
  command -v ninja >/dev/null || fail "no ninja beside $python: pip install ninja"
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
  [[ -f $header ]] || fail "no $header: DeepSpeed's op needs Python's headers (Debian: apt install python3-dev)"
  need=$((ranks * 66))
  free=$(df --output=avail --block-size=1M /dev/shm | tail -n 1)
  ((free >= need)) || fail "/dev/shm has $((free)) MiB free, $ranks CPU ranks need $need (docker: --shm-size=1g)"
  # Its segments outlive a run; the port makes this run's own.
  trap 'rm -f /dev/shm/deepspeed_allreduce_buffer_"$(id -u)"_*_"$port"_*' EXIT
fi

# The launcher gets a process group of its own, so that a signal to this script ends every rank: on one machine
# deepspeed's runner does not pass SIGTERM on, and its ranks would go on alone.
set -m
"$python" -m deepspeed.launcher.runner --log_level error --hostfile /dev/null "${where[@]}" --master_port "$port" \
  --no_local_rank --module megapix train "${arguments[@]}" &
group=$!
set +m
trap 'echo "launch.sh: stopping the ranks; the same command goes on from the last checkpoint" >&2
      kill -TERM -- "-$group" 2>/dev/null' INT TERM HUP
code=0
wait "$group" || code=$?
while kill -0 -- "-$group" 2>/dev/null; do sleep 0.2; done
exit "$code"
