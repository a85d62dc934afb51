#!/usr/bin/env bash
# Starts `megapix train` (or doctor, evaluate) on this machine, on several nodes, or as one rank of srun. Environment and
# launcher only.
set -euo pipefail

usage() {
  cat <<'EOT'
usage: ./launch.sh [options] PRESET --data.path SHARDS --out RUN [megapix train options]
       ./launch.sh [options] doctor PRESET --data.path SHARDS --out RUN [megapix train options]
       ./launch.sh [options] doctor --parity
       ./launch.sh [options] evaluate WEIGHTS --reference STATS [megapix evaluate options]

The first starts `megapix train`, the next two `megapix doctor` (is every node fit for that run?), the last `megapix
evaluate`, under the deepspeed launcher: one rank for each GPU of this machine, or, where there is none, CPU ranks with
gloo (2 by default). Everything but these options goes to megapix.

  --ranks N         ranks on each node (default: all GPUs, or those of CUDA_VISIBLE_DEVICES; without a GPU, 2 CPU ranks)
  --hostfile FILE   several nodes, started from this one by ssh and pdsh: a line 'HOST slots=RANKS' for each
  --no-ssh          several nodes, with this command run on each by hand or by a scheduler; needs
    --node-rank N     which node this is, from 0 (the one at --master-addr)
    --nnodes K        how many there are, or --hostfile FILE for nodes with different numbers of ranks
  --master-addr A   address of the first node for the others (default with --hostfile: its first by `hostname -I`)
  --help            this text; `megapix train --help` lists presets, `megapix train PRESET --help` all options

Under srun with more than one task, each task becomes one rank, with no launcher in between. docs/cluster.md shows all
ways, with a SLURM script.

TERM, USR1 or HUP asks the run to save and end with code 75; a second one, or INT, ends it at once with 130.
Code 69: a rank or a node was lost. The others are those of `megapix train`.

Environment: PYTHON (default: .venv/bin/python if it exists, else python3), OMP_NUM_THREADS (CPU threads of a rank;
default: cores / ranks), MASTER_PORT (default: a free port; with --no-ssh 29500), MASTER_ADDR (as --master-addr). With
--hostfile the other nodes get what torch, Triton, NCCL and remote storage read of it, tokens and keys by a file in
their memory that only this user can read and that is removed (docs/cluster.md).
EOT
}

fail() {
  echo "launch.sh: error: $*" >&2
  exit 2
}

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ranks='' hostfile='' node_rank='' nnodes='' no_ssh='' help=''
master=${MASTER_ADDR:-}
arguments=()
while (($#)); do
  option=${1%%=*}
  case $option in
    --ranks | --hostfile | --node-rank | --nnodes | --master-addr)
      if [[ $1 == *=* ]]; then value=${1#*=}; else
        (($# > 1)) || fail "$option needs a value"
        value=$2
        shift
      fi
      ;;
  esac
  case $option in
    --help | -h) ((${#arguments[@]})) || { usage; exit 0; }; help=1; arguments+=("$1") ;;
    --ranks) ranks=$value ;;
    --hostfile) hostfile=$value ;;
    --node-rank) node_rank=$value ;;
    --nnodes) nnodes=$value ;;
    --master-addr) master=$value ;;
    --no-ssh) no_ssh=1 ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
((${#arguments[@]})) || { usage >&2; exit 2; }
command=train
if [[ ${arguments[0]} == doctor || ${arguments[0]} == evaluate ]]; then
  command=${arguments[0]}
  arguments=("${arguments[@]:1}")
  ((${#arguments[@]})) || arguments=(--help)
fi
[[ -z $ranks || $ranks =~ ^[1-9][0-9]*$ ]] || fail "--ranks = '$ranks': expected a number above 0"
[[ -z $nnodes || $nnodes =~ ^[1-9][0-9]*$ ]] || fail "--nnodes = '$nnodes': expected a number above 0"
[[ -z $hostfile || -z $ranks$nnodes ]] || fail "--hostfile says how many nodes and ranks: expected no --nnodes or --ranks"
if [[ $no_ssh ]]; then
  [[ $node_rank =~ ^[0-9]+$ ]] || fail "--node-rank = '$node_rank': --no-ssh expects this node's number, from 0"
  [[ $master ]] || fail "--no-ssh expects --master-addr, the address of node 0 for the others"
  [[ $nnodes$hostfile ]] || fail "--no-ssh expects --nnodes or --hostfile"
else
  [[ -z $node_rank$nnodes ]] || fail "--node-rank and --nnodes go with --no-ssh"
fi

if [[ ${PYTHON:-} ]]; then
  python=$(command -v "$PYTHON") || fail "PYTHON = '$PYTHON': expected an interpreter's name or path"
else
  python=$here/.venv/bin/python
  [[ -x $python ]] || python=$(command -v python3) || fail "no python: make .venv with 'make quickstart', or set PYTHON"
fi
PATH=$(dirname "$python"):$PATH # deepspeed's op builder looks for ninja on the PATH
export PATH
[[ -z $help ]] || exec "$python" -m megapix "$command" "${arguments[@]}"

gpus=0
devices=
if command -v nvidia-smi >/dev/null; then
  count=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true) # slices of a GPU are listed below it
  ((count == 0)) || devices=${CUDA_VISIBLE_DEVICES-$(seq -s, 0 $((count - 1)))}
fi
if [[ -n $devices ]]; then
  IFS=, read -r -a list <<<"$devices"
  gpus=${#list[@]}
else
  export DS_ACCELERATOR=cpu
fi

# A step of several tasks; a batch script, or a shell from `srun --pty`, has one and starts this machine's ranks.
if ((${SLURM_STEP_NUM_TASKS:-1} > 1)); then
  [[ -z $hostfile$no_ssh$ranks ]] || fail "under srun each task is a rank: expected none of --hostfile, --no-ssh, --ranks"
  if [[ -z $master ]]; then
    if command -v scontrol >/dev/null; then
      master=$(scontrol show hostnames "$SLURM_STEP_NODELIST")
      master=${master%%$'\n'*}
    else # node[03-07,12],other -> node03
      [[ $SLURM_STEP_NODELIST =~ ^([^],[]+)(\[([0-9]+))? ]] ||
        fail "SLURM_STEP_NODELIST = '$SLURM_STEP_NODELIST' has no first node: set MASTER_ADDR"
      master=${BASH_REMATCH[1]}${BASH_REMATCH[3]:-}
    fi
  fi
  export MASTER_ADDR=$master MASTER_PORT=${MASTER_PORT:-$((20000 + (SLURM_JOB_ID + SLURM_STEP_ID) % 10000))}
  export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_STEP_NUM_TASKS LOCAL_RANK=$SLURM_LOCALID
  ((gpus != 1)) || LOCAL_RANK=0 # --gpus-per-task=1: a task sees its own card alone
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
  exec "$python" -m megapix "$command" "${arguments[@]}" # so that SLURM's signals reach the rank itself
fi

if [[ $devices ]]; then
  [[ $devices =~ ^[0-9]+(,[0-9]+)*$ ]] || fail "CUDA_VISIBLE_DEVICES = '$devices': expected numbers such as 0,1"
  [[ -z $hostfile$no_ssh || $devices == "$(seq -s, 0 $((gpus - 1)))" ]] ||
    fail "CUDA_VISIBLE_DEVICES = '$devices': on several nodes DeepSpeed takes the first GPUs of each: expected it unset"
fi
# What the other nodes need of this environment, and `.deepspeed_env` of the user, which wins. DeepSpeed passes variables on
# in the command line of ssh, which everybody on every node can read. So only what a process needs before its Python
# starts goes that way; all else, and of `.deepspeed_env` what may be a secret, goes through the stdin of ssh into a file
# for each rank. It lies in its node's memory, this user alone can read it, and the rank removes it once it has read it.
hand_on() {
  local name value line file first=0 i open=() private=()
  local -A theirs=()
  for file in ~/.deepspeed_env .deepspeed_env; do
    [[ -r $file ]] || continue
    while IFS= read -r line || [[ $line ]]; do
      [[ ! $line =~ ^([A-Za-z_]+[A-Za-z_0-9]*)=(.*)$ ]] || theirs[${BASH_REMATCH[1]}]=${BASH_REMATCH[2]}
    done <"$file"
  done
  for name in $(compgen -e); do
    [[ ! -v theirs[$name] ]] || continue
    case $name in
      PATH | LD_LIBRARY_PATH | OMP_NUM_THREADS | DS_ACCELERATOR | MALLOC_* | GLIBC_TUNABLES) open+=("$name") ;;
      CUDA_VISIBLE_DEVICES | DS_ENV_FILE | TORCHELASTIC_*) ;; # a launcher's own
      TORCH* | PYTORCH* | CUDA_* | CUDNN_* | CUBLAS* | NVIDIA_TF32_OVERRIDE | TRITON_* | DS_* | DEEPSPEED_* | \
        NCCL* | GLOO_* | UCX* | MV2* | FI_* | OMP_* | GOMP_* | KMP_* | MKL_* | OPENBLAS_* | MAX_JOBS | CC | CXX | CPATH | \
        C_INCLUDE_PATH | CPLUS_INCLUDE_PATH | LIBRARY_PATH | HF_* | HUGGING* | TRANSFORMERS_* | TOKENIZERS_* | \
        XDG_CACHE_HOME | FSSPEC_* | AWS_* | S3* | GOOGLE_* | GCLOUD_* | GCSFS_* | STORAGE_EMULATOR_HOST | AZURE_* | \
        *_proxy | *_PROXY | SSL_CERT_* | REQUESTS_CA_BUNDLE | CURL_CA_BUNDLE | MLFLOW*)
        private+=("$name")
        ;;
      PYTHON*) if may_be_secret "$name" "${!name}"; then private+=("$name"); else open+=("$name"); fi ;;
    esac
  done
  for name in "${open[@]}"; do
    value=${!name} # DeepSpeed puts it between double quotes, and pdsh replaces %h, %n and %u
    [[ ! $value =~ [\"\$\`\\]|$'\n'|%[hnu%]|^[[:space:]]|[[:space:]]$ ]] ||
      fail "environment variable $name does not survive ssh: expected no quote, \$, \`, \\, %n, line break or outer space"
    [[ $name == PYTHON* ]] || echo "$name=$value" # DeepSpeed passes PYTHON* on by itself
  done >"$scratch/env"
  for name in "${!theirs[@]}"; do
    value=${theirs[$name]}
    if may_be_secret "$name" "$value"; then private+=("$name"); else echo "$name=$value" >>"$scratch/env"; fi
  done
  export DS_ENV_FILE=$scratch/env
  ((${#private[@]})) || return 0

  handed=/dev/shm/megapix-environment-${scratch##*.}
  echo "MEGAPIX_ENVIRONMENT=$handed" >>"$scratch/env"
  # shellcheck disable=SC2016 # for the nodes: a file, and a name of it for each further rank
  local take='umask 077; set -C; cat >$0.$1 || exit 1; n=$1; while n=$((n + 1)); [ $n -lt $2 ]; do ln $0.$1 $0.$n || exit 1; done'
  for i in "${!hosts[@]}"; do
    for name in "${private[@]}"; do printf '%s=%s\0' "$name" "${theirs[$name]-${!name}}"; done |
      ssh_to "${hosts[i]}" "$take" "$first" $((first + slots[i])) &
    uploads+=($!)
    first=$((first + slots[i]))
  done
  for i in "${!hosts[@]}"; do
    wait "${uploads[i]}" || {
      (($? != 255)) || { echo "launch.sh: error: ${hosts[i]} is not reached by ssh" >&2 && exit 69; }
      fail "--hostfile: ${hosts[i]} does not take the environment of this node: expected a /dev/shm that can be written"
    }
  done
  for name in "${private[@]}"; do
    case $name in MLFLOW* | MV2* | NCCL* | PYTHON* | UCX*) unset "$name" ;; esac # DeepSpeed would pass them on, too
  done
}

# By its name, or with a password in a URL. Errs on the safe side.
may_be_secret() {
  [[ ${1^^} =~ TOKEN|KEY|SECRET|PASS|CREDENTIAL|AUTH|SAS|SESSION|COOKIE|CONNECTION || $2 =~ ://[^/]*@ ]]
}

# ssh_to HOST SCRIPT [ARGUMENTS]: with pdsh's options, in the background; the script's $0 is where the files lie.
ssh_to() {
  # shellcheck disable=SC2086 # options
  exec ssh $PDSH_SSH_ARGS_APPEND "$1" "exec sh -c '$2' $handed ${*:3}"
}

# shellcheck disable=SC2329 # called by the trap
clean_up() {
  trap '' TERM USR1 HUP INT
  # shellcheck disable=SC2086 # a pattern
  rm -rf ${scratch:+"$scratch"} ${segments:-}
  [[ $handed ]] || return 0
  wait "${uploads[@]}" || true # what is on its way would come after the removal
  uploads=()
  local host
  for host in "${hosts[@]}"; do
    # shellcheck disable=SC2016 # for the nodes
    ssh_to "$host" 'rm -f $0.*' </dev/null >/dev/null 2>&1 &
    uploads+=($!)
  done
  wait "${uploads[@]}" || true
}

hosts=() slots=() uploads=()
scratch=
handed= # where the ranks' files lie on every node
trap clean_up EXIT
if [[ $hostfile ]]; then
  [[ -r $hostfile ]] || fail "--hostfile $hostfile: cannot be read"
  world=0
  while read -r line || [[ $line ]]; do
    [[ $line && $line != \#* ]] || continue
    [[ $line =~ ^([^[:space:]]+)[[:space:]]+slots=([1-9][0-9]*)$ ]] ||
      fail "--hostfile $hostfile: line '$line': expected 'HOST slots=RANKS'"
    hosts+=("${BASH_REMATCH[1]}")
    slots+=("${BASH_REMATCH[2]}")
    ((${#hosts[@]} > 1)) || ranks=${BASH_REMATCH[2]}
    world=$((world + BASH_REMATCH[2]))
  done <"$hostfile"
  ((${#hosts[@]})) || fail "--hostfile $hostfile names no host"
else
  ranks=${ranks:-$((gpus ? gpus : 2))}
  ((!gpus || ranks <= gpus)) || fail "--ranks = $ranks: there are $gpus GPUs ($devices)"
  world=$((ranks * ${nnodes:-1}))
fi
if [[ $no_ssh ]]; then
  ((node_rank < ${nnodes:-${#hosts[@]}})) || fail "--node-rank = $node_rank: there are ${nnodes:-${#hosts[@]}} nodes"
fi
cores=$(nproc)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > ranks ? cores / ranks : 1))}

run= # the run folder; doctor and evaluate have none
if [[ $command == train ]]; then
  # The configuration is checked once here, so that a mistake is one line and not one from every rank.
  resolved=$(WORLD_SIZE=$world "$python" -m megapix train "${arguments[@]}" --dry-run)
  run=$("$python" -c 'import json, sys; print(json.loads(sys.argv[1])["out"])' "$resolved")
fi

port=${MASTER_PORT:-}
if [[ $no_ssh ]]; then
  port=${port:-29500} # the same on every node
elif [[ -z $port ]]; then
  port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

if ((!gpus)); then
  # DeepSpeed's CPU communication op: compiled at its first use, and on a single node 66 MiB of /dev/shm for each rank.
  command -v g++ >/dev/null || fail "no g++: DeepSpeed compiles its CPU communication op (Debian: apt install g++)"
  command -v ninja >/dev/null || fail "no ninja beside $python: pip install ninja"
  header=$("$python" -c 'import sysconfig; print(sysconfig.get_path("include") + "/Python.h")')
  [[ -f $header ]] || fail "no $header: DeepSpeed's op needs Python's headers (Debian: apt install python3-dev)"
  if ((ranks == world)); then
    need=$((ranks * 66))
    free=$(df --output=avail --block-size=1M /dev/shm | tail -n 1)
    ((free >= need)) || fail "/dev/shm has $((free)) MiB free, $ranks CPU ranks need $need (docker: --shm-size=1g)"
    # Its segments outlive a run; the port makes this run's own.
    segments="/dev/shm/deepspeed_allreduce_buffer_$(id -u)_*_${port}_*"
  fi
fi

where=(--hostfile /dev/null)
if [[ $no_ssh ]]; then
  if [[ -z $hostfile ]]; then
    scratch=$(mktemp -d)
    hostfile=$scratch/hostfile # names that nobody calls: DeepSpeed counts nodes and ranks from it
    for ((node = 0; node < nnodes; node++)); do echo "node-$node slots=$ranks"; done >"$hostfile"
  fi
  where=(--hostfile "$hostfile" --no_ssh --node_rank "$node_rank" --master_addr "$master")
elif [[ $hostfile ]]; then
  command -v pdsh >/dev/null || fail "no pdsh: --hostfile starts the nodes with it (Debian: apt install pdsh); or --no-ssh"
  for path in "$PWD" "$python"; do
    [[ $path != *[[:space:]]* ]] || fail "'$path' holds white space, which does not survive ssh: expected a path without"
  done
  for i in "${!arguments[@]}"; do # a shell on each node reads them; DeepSpeed quotes those with a space
    [[ ${arguments[i]} == *' '* ]] || arguments[i]=$(printf %q "${arguments[i]}")
  done
  where=(--hostfile "$hostfile" --force_multi ${master:+--master_addr "$master"})
  # A dead host must not keep ssh, and so this script, waiting.
  alive='-o BatchMode=yes -o ConnectTimeout=10 -o ServerAliveInterval=5 -o ServerAliveCountMax=3'
  export PDSH_RCMD_TYPE=ssh PDSH_SSH_ARGS_APPEND="$alive ${PDSH_SSH_ARGS_APPEND:-}"
  scratch=$(mktemp -d)
  hand_on
elif ((gpus)); then
  where+=(--include "localhost:$(IFS=,; echo "${list[*]:0:ranks}")")
else
  where+=(--num_gpus "$ranks")
fi
unset CUDA_VISIBLE_DEVICES # named to the launcher, which sets it for each rank

# Passes pdsh's stderr on, and marks the moment when the first node is done.
relay() {
  while IFS= read -r line; do
    printf '%s\n' "$line" >&2
    [[ $line != pdsh@*"exited with exit code"* ]] || : >"$scratch/ended"
  done
}

forced='' # the exit code of a run that was ended by force
asked=''
group='' # of the launcher, once it is there

# Ends every rank of this run, here and, where ssh started them, on the other nodes. DeepSpeed's own way would end all
# jobs that this user has on those nodes; the port tells this one. A launcher gives its ranks 30 seconds.
end_now() {
  forced=$1
  [[ $group ]] || return 0
  if [[ $scratch && -z $no_ssh ]]; then
    kill -KILL -- "-$group" 2>/dev/null || true
    ours="deepspeed[.]launcher[.]launch .*--master_port=$port "
    pdsh -f 1024 -w "$(IFS=,; echo "${hosts[*]}")" \
      "pkill -f '$ours'; n=0; while pgrep -f '$ours' >/dev/null && [ \$n -lt 45 ]; do sleep 1; n=\$((n + 1)); done" \
      2>/dev/null || true
  else
    kill -TERM -- "-$group" 2>/dev/null || true
  fi
}

# shellcheck disable=SC2329 # called by the traps below
end_soon() {
  if [[ $asked || -z $run ]]; then
    echo "launch.sh: ending the ranks; the same command resumes from the last checkpoint" >&2 || true
    end_now 130
  else
    asked=1
    mkdir -p "$run" && : >"$run/stop" # neither deepspeed nor pdsh hands signals on to the ranks
    echo "launch.sh: asking the run to save and end; once more ends it now" >&2 || true # the terminal may be gone
  fi
}
trap end_soon TERM USR1 HUP
trap 'asked=1; end_soon' INT

# The launcher gets a process group of its own, so that one signal ends every rank of this machine: deepspeed's runner
# does not pass SIGTERM on, and its ranks would go on alone.
start=("$python" -m deepspeed.launcher.runner --log_level error "${where[@]}" --master_port "$port")
start+=(--no_local_rank --module megapix "$command" "${arguments[@]}")
set -m
if [[ $scratch && -z $no_ssh ]]; then "${start[@]}" 2> >(relay) & else "${start[@]}" & fi
group=$!
set +m
[[ -z $forced ]] || end_now "$forced" # a signal has come before the launcher was there

patience=40 # seconds for the other nodes, once one is done: those of a launcher and some more
while kill -0 "$group" 2>/dev/null; do
  sleep 1 || true
  if [[ -z $forced && -e ${scratch:-/dev/null}/ended ]] && ((patience-- == 0)); then
    echo "launch.sh: error: ranks of other nodes have not ended: ending them" >&2
    end_now 69
  fi
done
code=0
wait "$group" || code=$?
patience=225 # fifths of a second for what the launcher has left behind
while kill -0 -- "-$group" 2>/dev/null; do
  sleep 0.2 || true
  ((patience-- > 0)) || kill -KILL -- "-$group" 2>/dev/null || true
done
[[ -z $asked || -z $run ]] || rm -f "$run/stop" # if no rank has lived to obey it
[[ -z $forced ]] || code=$forced
((code <= 128 || code == 130)) || code=69 # a rank ended by a signal, or a node that ssh has lost
exit "$code"
