#!/usr/bin/env bash
# Train on several processes (GPUs, or CPU cores through gloo):
#   tools/dist_train.sh CONFIG PROCESSES [options of tools/train.py]
# Several machines: run it on each with NNODES, NODE_RANK and MASTER_ADDR set.
set -euo pipefail
if [ $# -lt 2 ]; then sed -n '2,4s/^# //p' "$0"; exit 2; fi
exec "$(dirname "$0")/dist_run.sh" "$(dirname "$0")/train.py" "$2" "$1" "${@:3}"
