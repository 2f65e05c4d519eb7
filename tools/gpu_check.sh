#!/usr/bin/env bash
# Check and measure mmkd on a bare CUDA machine: build mmcv with its CUDA
# operators against the PyTorch that is there, run the tests marked `gpu`, time
# steps at real size. Each stage has a limit of time; what is done is not done
# again by a second call, which goes on where the first one ended.
#
#   tools/gpu_check.sh [--wheels DIR] [--out DIR] [--minutes N] [--python EXE]
#
#   --wheels DIR   wheels and source archives (onedl_mmcv-*.tar.gz, ...) to
#                  install from, where there is no package index
#   --out DIR      results and state (default: work_dirs/gpu_check)
#   --minutes N    limit of each stage (default: 10)
#   --python EXE   an interpreter that has PyTorch (default: python3)
#
# Writes OUT/gpu_check.json, and a log and a JSON file of each stage. The exit
# status is 0 if all stages passed, 1 if one failed or ran out of time, 2 if
# there is no GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

wheels='' out=work_dirs/gpu_check minutes=10 python=python3
usage() { sed -n '2,/^set /{/^set /!s/^# \{0,1\}//p}' "$0"; }
while [ $# -gt 0 ]; do
    case $1 in
    --wheels | --out | --minutes | --python)
        [ $# -gt 1 ] || { echo "error: $1 takes a value" >&2; exit 1; }
        declare "${1#--}=$2"
        shift 2
        ;;
    -h | --help) usage; exit 0 ;;
    *) echo "error: unknown option $1 (see --help)" >&2; exit 1 ;;
    esac
done
[ -z "$wheels" ] || [ -d "$wheels" ] ||
    { echo "error: --wheels $wheels is no folder" >&2; exit 1; }
[[ $minutes =~ ^[1-9][0-9]*$ ]] ||
    { echo "error: --minutes $minutes is no whole number from 1" >&2; exit 1; }

say() { printf '[gpu_check] %s\n' "$*"; }

command -v "$python" >/dev/null ||
    { echo "error: no '$python'; name one with --python" >&2; exit 1; }
"$python" -c 'import torch' 2>/dev/null || {
    echo "error: '$python' has no PyTorch; name another with --python" >&2
    exit 1
}
capability=$("$python" -c '
import torch
if torch.cuda.is_available():
    print("%d.%d" % torch.cuda.get_device_capability())')
if [ -z "$capability" ]; then
    say "PyTorch $("$python" -c 'import torch; print(torch.__version__)')" \
        'sees no CUDA device: nothing to check here.'
    exit 2
fi

mkdir -p "$out/state"
out=$(cd "$out" && pwd)
env=$out/venv
py=$env/bin/python
# A stage is done again if the code or the machine has changed.
version=$({
    git rev-parse HEAD 2>/dev/null || find mmkd tests tools -name '*.py' \
        -exec cat {} + | cksum
    nvidia-smi -L 2>/dev/null
    "$python" -c 'import torch; print(torch.__version__)'
} | cksum)

# stage NAME COMMAND...: at most once, with a limit of time and a log.
stage() {
    local name=$1 status begun=$SECONDS state=$out/state/$1
    shift
    if [ "$(cat "$state" 2>/dev/null)" = "0 $version" ]; then
        say "$name: done before"
        return 0
    fi
    say "$name: starts, at most $minutes minutes (log: $out/$name.log)"
    timeout --kill-after=20 "${minutes}m" "$@" >"$out/$name.log" 2>&1
    status=$?
    echo "$status $version" >"$state"
    echo $((SECONDS - begun)) >"$state.seconds"
    case $status in
    0) say "$name: passed in $((SECONDS - begun)) s" ;;
    124 | 137) say "$name: not done in $minutes minutes" ;;
    *) say "$name: failed ($status)"; tail -n 15 "$out/$name.log" ;;
    esac
    return "$status"
}

install() {
    local from=()
    [ -z "$wheels" ] || from=(--no-index --find-links "$wheels")
    "$py" -m pip --disable-pip-version-check install \
        --no-build-isolation "${from[@]}" "$@"
}

make_environment() {
    set -e
    [ -x "$py" ] || "$python" -m venv --system-site-packages "$env"
    # PyTorch stays the machine's own: nothing here may move it.
    "$py" -c 'import torch; print("torch==" + torch.__version__)' \
        >"$out/constraint.txt"
    install -c "$out/constraint.txt" -r requirements/build.txt
    MMCV_WITH_OPS=1 FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability \
        MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        install --no-deps "$(grep '^onedl-mmcv==' requirements/tested.txt)"
    install -c "$out/constraint.txt" -r requirements/mmdet.txt \
        'pytest>=8' 'pytest-timeout>=2.3'
    install --no-deps -e .
    "$py" -c 'import mmcv.ops, mmdet, torch
from mmcv.ops import nms
boxes = torch.tensor([[0., 0, 9, 9], [0, 0, 9, 9.5]], device="cuda")
assert len(nms(boxes, torch.tensor([.9, .8], device="cuda"), .5)[1]) == 1'
}

benchmark() {
    local name=$1
    shift
    stage "$name" "$py" tools/benchmark.py "$@" --device cuda \
        --json "$out/$name.json"
}

export -f make_environment install
export wheels out env py python capability
failed=0
# The machine's compiler is slow on mmcv: this stage alone has half an hour.
limit=$minutes minutes=$((minutes > 30 ? minutes : 30))
stage environment bash -c make_environment || failed=1
minutes=$limit
if [ $failed = 0 ]; then
    stage tests "$py" -m pytest -m gpu -q -p no:cacheprovider tests || failed=1
    no_download='distillation.teacher.checkpoint=None'
    for batch in 2 4 8 16; do
        benchmark "step_batch$batch" step configs/faster_rcnn_kd_r50.py \
            --batch "$batch" --cfg-options $no_download || failed=1
        benchmark "lad_batch$batch" assign --batch "$batch" || failed=1
        benchmark "teacher_batch$batch" teacher configs/pkd_faster_rcnn_r50.py \
            --batch "$batch" --compile --cfg-options $no_download || failed=1
    done
    retinanet=(configs/{kd,dist,cwd,fgd,mgd,tat}_retinanet_r50.py)
    others=(configs/{ld_gfl,crosskd_gfl,dkd_faster_rcnn,fbkd_faster_rcnn}_r50.py)
    benchmark methods methods "${retinanet[@]}" "${others[@]}" \
        --batch 2 --cfg-options $no_download || failed=1
fi
"$python" - "$out" <<'EOF'
import json
import sys
from pathlib import Path

import torch

out = Path(sys.argv[1])
stages = {}
for state in sorted((out / 'state').glob('*')):
    if state.suffix == '.seconds':
        continue
    result = out / f'{state.name}.json'
    stages[state.name] = {
        'status': int(state.read_text().split()[0]),
        'seconds': int(state.with_suffix('.seconds').read_text()),
        'log': f'{state.name}.log',
        'result': json.loads(result.read_text()) if result.exists() else None,
    }
content = {
    'gpu': torch.cuda.get_device_name(),
    'torch': torch.__version__,
    'cuda': torch.version.cuda,
    'stages': stages,
}
(out / 'gpu_check.json').write_text(json.dumps(content, indent=2) + '\n')
EOF
say "results: $out/gpu_check.json"
exit $failed
