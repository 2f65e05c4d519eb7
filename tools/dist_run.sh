#!/usr/bin/env bash
# Start SCRIPT in PROCESSES processes with torchrun; see dist_train.sh.
#   tools/dist_run.sh SCRIPT PROCESSES [arguments of SCRIPT]
set -euo pipefail
PYTHON=${PYTHON:-python}
NNODES=${NNODES:-1}
# Pass on what ends a training, and leave it time to save a checkpoint.
export PET_SIGNALS_TO_HANDLE=${PET_SIGNALS_TO_HANDLE:-SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2}
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-300}
root=$(cd "$(dirname "$0")/.." && pwd)
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# Processes that share cores must not spin against each other.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
if [ "$NNODES" = 1 ]; then
    # A free port each time, so that jobs on one machine do not collide.
    where=(--standalone)
    [ -n "${PORT:-}" ] && where=(--master_addr 127.0.0.1 --master_port "$PORT")
else
    where=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}"
           --master_addr "${MASTER_ADDR:?the address of node 0}"
           --master_port "${PORT:-29500}")
fi
exec "$PYTHON" -m torch.distributed.run "${where[@]}" --nproc_per_node "$2" \
    "$1" "${@:3}" --launcher pytorch
