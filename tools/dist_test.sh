#!/usr/bin/env bash
# Test on several processes (GPUs, or CPU cores through gloo):
#   tools/dist_test.sh CONFIG CHECKPOINT PROCESSES [options of tools/test.py]
# Several machines: run it on each with NNODES, NODE_RANK and MASTER_ADDR set.
set -euo pipefail
if [ $# -lt 3 ]; then sed -n '2,4s/^# //p' "$0"; exit 2; fi
exec "$(dirname "$0")/dist_run.sh" "$(dirname "$0")/test.py" "$3" "$1" "$2" "${@:4}"
