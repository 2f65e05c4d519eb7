#!/usr/bin/env bash
# Check and measure mmkd on a bare CUDA machine: build mmcv with its CUDA
# operators against the PyTorch that is there, run the tests marked `gpu`, time
# steps at real size. What has passed is not done again by the next call, which
# goes on where this one ended, even in the middle of mmcv's compilation.
#
#   tools/gpu_check.sh [--wheels DIR] [--out DIR] [--minutes N]
#                      [--stage-minutes N] [--python EXE]
#
#   --wheels DIR        wheels and source archives to install from, where there
#                       is no package index (the README says how to fill it)
#   --out DIR           results and builds (default: work_dirs/gpu_check)
#   --minutes N         end before N minutes are over (default: no limit)
#   --stage-minutes N   limit of each stage (default: 30)
#   --python EXE        an interpreter that has PyTorch (default: python3)
#
# Writes OUT/gpu_check.json, new after each stage, with the results of this
# code on this machine alone, and the stages' logs. The exit status is 0 if all
# stages have passed, 1 if one failed or took too long, 2 if there is no GPU,
# 3 if the minutes are over and another call is to go on.
# shellcheck disable=SC2329 # stages and traps call functions by their names
set -uo pipefail

script=$(realpath "${BASH_SOURCE[0]}")
root=$(dirname "$(dirname "$script")")
say() { printf '[gpu_check] %s\n' "$*"; }
die() { printf 'error: %s\n' "$*" >&2; exit 1; }
usage() { sed -n '2,/^# shellcheck/s/^# \{0,1\}//p' "$script" | sed '$d'; }

wheels='' out=$root/work_dirs/gpu_check python=python3
minutes='' stage_minutes=30
while [ $# -gt 0 ]; do
    case $1 in
    --wheels | --out | --minutes | --stage-minutes | --python)
        [ $# -gt 1 ] || die "$1 takes a value"
        name=${1#--}
        declare "${name//-/_}=$2"
        shift 2
        ;;
    -h | --help) usage; exit 0 ;;
    *) die "unknown option $1 (see --help)" ;;
    esac
done
for number in ${minutes:+--minutes="$minutes"} \
    --stage-minutes="$stage_minutes"; do
    [[ $number =~ ^[a-z-]+=[1-9][0-9]*$ ]] ||
        die "${number%%=*} ${number#*=} is no whole number from 1"
done
[ -z "$wheels" ] || [ -d "$wheels" ] || die "--wheels $wheels is no folder"
[ -z "$wheels" ] || wheels=$(realpath "$wheels")
command -v "$python" >/dev/null || die "no '$python'; name one with --python"
# As it is called: a virtual environment's interpreter is a link.
python=$(realpath -s "$(command -v "$python")")
out=$(realpath -m "$out")
cd "$root" || exit 1

machine=$("$python" - <<'EOF'
import json
import platform
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"error: '{sys.executable}' has no PyTorch ({error}); "
             'name another with --python')
if not torch.cuda.is_available():
    print(f'[gpu_check] PyTorch {torch.__version__} sees no CUDA device: '
          'nothing to check here.', file=sys.stderr)
    sys.exit(2)
print(json.dumps({
    'gpu': torch.cuda.get_device_name(),
    'torch': torch.__version__,
    'cuda': torch.version.cuda,
    'python': platform.python_version(),
}))
EOF
) || exit

checksum() { cksum | cut -d ' ' -f 1; }
# Another GPU, PyTorch or interpreter has its own environment and builds, other
# code its own results: an edit that is not committed is another code.
here=$out/$(checksum <<<"$machine $python")
version=$({
    echo "$here"
    find mmkd tests tools configs requirements setup.py pyproject.toml \
        -type f -not -name '*.pyc' -print0 | LC_ALL=C sort -z | xargs -0 cksum
} | checksum)
env=$here/venv py=$here/venv/bin/python
mkdir -p "$here" || exit 1

# What the JSON file says of stages:
#   state begin NAME               exits with 3 if it has passed before
#   state end NAME STATUS SECONDS
#   state drop NAME...
state() {
    "$python" -IS - "$out/gpu_check.json" "$version" "$machine" "$@" <<'EOF'
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

path = Path(sys.argv[1])
version, machine, command, name, *rest = sys.argv[2:]


def read(file):
    try:
        return json.loads(file.read_text())
    except (OSError, ValueError):
        return None


def tests(file):
    """What pytest's JUnit file says: what failed, and why tests skipped."""
    try:
        cases = ElementTree.parse(file).iter('testcase')
    except (OSError, ElementTree.ParseError):
        return None
    found = {'passed': 0, 'skipped': {}, 'failed': {}}
    for case in cases:
        failed = [part for part in case if part.tag in ('failure', 'error')]
        skipped = case.find('skipped')
        if failed:
            test = f'{case.get("classname")}.{case.get("name")}'
            found['failed'][test] = failed[0].get('message')
        elif skipped is not None:
            reason = skipped.get('message')
            found['skipped'][reason] = found['skipped'].get(reason, 0) + 1
        else:
            found['passed'] += 1
    return found


content = read(path) or {}
if content.get('version') != version:
    content = {'version': version, **json.loads(machine), 'stages': {}}
stages = content['stages']
files = {kind: path.with_name(f'{name}.{kind}') for kind in ('json', 'xml')}
if command == 'drop':
    for each in (name, *rest):
        stages.pop(each, None)
elif command == 'begin':
    if stages.get(name, {}).get('status') == 'passed':
        sys.exit(3)
    for file in files.values():
        file.unlink(missing_ok=True)
    stages[name] = {'status': 'running'}
else:
    stages[name] = {
        'status': rest[0],
        'seconds': int(rest[1]),
        'log': f'{name}.log',
        'result': read(files['json']) or tests(files['xml']),
    }
part = path.with_suffix('.part')
part.write_text(json.dumps(content, indent=2) + '\n')
part.replace(path)
EOF
}

finish() {
    say "results: $out/gpu_check.json"
    exit "$1"
}

job='' # the stage's process while it runs
interrupt() {
    trap '' INT TERM HUP
    if [ -n "$job" ]; then
        kill -TERM "$job" 2>/dev/null # `timeout`, which ends its whole group
        wait "$job"
        state end "$stage" interrupted $((SECONDS - begun))
    fi
    say "interrupted ($1); another call goes on"
    exit $((128 + $2))
}
trap 'interrupt HUP 1' HUP
trap 'interrupt INT 2' INT
trap 'interrupt TERM 15' TERM

# Some seconds are for ending a stage and writing what is known.
deadline=$((${minutes:-1000000} * 60 - 15))

# stage NAME COMMAND...: until it has passed once; with a limit and a log.
stage() {
    local limit=$((stage_minutes * 60)) late='took too long' status outcome
    stage=$1 begun=$SECONDS
    shift
    if [ $((deadline - begun)) -le "$limit" ]; then
        limit=$((deadline - begun)) late=unfinished
    fi
    if [ "$limit" -lt 1 ]; then
        say "$stage: no time left; another call goes on"
        finish 3
    fi
    state begin "$stage"
    case $? in
    0) ;;
    3) say "$stage: passed before"; return 0 ;;
    *) die "$out/gpu_check.json cannot be written" ;;
    esac
    say "$stage: starts, at most $limit s (log: $out/$stage.log)"
    # Not in the foreground, where bash would leave a signal until it ends.
    timeout --kill-after=10 "$limit" "$@" >"$out/$stage.log" 2>&1 &
    job=$!
    wait "$job"
    status=$?
    job=''
    if [ $status = 0 ]; then
        outcome=passed
    elif [ $status = 124 ] || [ $((SECONDS - begun)) -ge "$limit" ]; then
        outcome=$late # 124: says `timeout`, or else it had to kill
    else
        outcome=failed
    fi
    state end "$stage" "$outcome" $((SECONDS - begun))
    say "$stage: $outcome after $((SECONDS - begun)) s"
    [ "$outcome" != failed ] || tail -n 15 "$out/$stage.log"
    [ "$outcome" != unfinished ] || finish 3
    return $status
}

# pip COMMAND ARGUMENT...: from the folder of wheels alone, if there is one.
pip() {
    local command=$1 from=()
    shift
    [ -z "$wheels" ] || from=(--no-index --find-links "$wheels")
    "$py" -m pip --disable-pip-version-check "$command" "${from[@]}" "$@"
}

# Not --system-site-packages: those of an environment's interpreter are the
# packages of what it was made with, not its own.
make_venv() {
    local site
    [ -x "$py" ] || "$python" -m venv --without-pip "$env"
    site=$("$py" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -c 'import os, sys, torch
paths = [os.path.dirname(os.path.dirname(torch.__file__))]
paths += [p for p in sys.path if p.endswith("-packages")]
print(*dict.fromkeys(paths), sep="\n")' >"$site/machine.pth"
    "$py" -m pip --version || "$py" -m ensurepip
    share_opencv "$site"
}

# mmdet's imaug asks for opencv-python, which needs libGL, and for the headless
# build; they are one module. pip is told that it has the former, and the
# latter as well where the machine's own works.
share_opencv() {
    local version name names=(opencv_python)
    ! "$py" -c 'import cv2' || names+=(opencv_python_headless)
    version=$(sed -n 's/^opencv-python==//p' requirements/tested.txt)
    for name in "${names[@]}"; do
        mkdir -p "$1/$name-$version.dist-info"
        printf '%s\n' 'Metadata-Version: 2.1' "Name: $name" \
            "Version: $version" >"$1/$name-$version.dist-info/METADATA"
    done
}

make_environment() {
    set -e
    # pip takes a package in which it was killed for installed.
    [ -e "$env/finished" ] || rm -rf "$env"
    rm -f "$env/finished"
    make_venv
    # PyTorch stays the machine's own; mmcv is built by the next stage.
    grep -v '^torch' requirements/tested.txt >"$here/constraints.txt"
    grep -v '^onedl-mmcv' requirements/mmdet.txt >"$here/packages.txt"
    pip install -c "$here/constraints.txt" -r requirements/build.txt \
        -r "$here/packages.txt" 'pytest>=8' 'pytest-timeout>=2.3'
    # The environment's own: Python 3.12 has `distutils`, which mmengine asks
    # for, from setuptools, and only from those of the environment itself.
    pip install --no-deps --ignore-installed setuptools
    pip install --no-deps --no-build-isolation -e .
    touch "$env/finished"
}

mmcv_works() {
    "$py" -c 'import mmdet, torch
from mmcv.ops import nms, sigmoid_focal_loss
boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 9.5]], device="cuda")
assert len(nms(boxes, boxes[:, 2], 0.5)[1]) == 1
sigmoid_focal_loss(boxes, boxes[:, 0].long(), 2.0, 0.25, None, "mean")
print("mmcv works on this GPU")'
}

# PyTorch takes the folder above the first nvcc, even if that is a wrapper;
# the compiler itself says where CUDA is.
cuda_home() {
    local nvcc
    for nvcc in "${CUDA_HOME:-}/bin/nvcc" "$(command -v nvcc)" \
        "${CUDA_HOME:-/usr/local/cuda}/bin/nvcc"; do
        if [ -x "$nvcc" ]; then
            realpath "$("$nvcc" --dryrun -x cu /dev/null 2>&1 |
                sed -n 's/^#\$ TOP=//p')"
            return
        fi
    done
    echo 'error: no nvcc in CUDA_HOME, on PATH or in /usr/local/cuda, which' \
        "compiles mmcv's operators: install the CUDA toolkit of PyTorch's" \
        'CUDA version, or point CUDA_HOME at it' >&2
    return 1
}

# The compiler's own environment: what PyTorch's extensions are built with.
find_compilers() {
    CUDA_HOME=$(cuda_home)
    TORCH_CUDA_ARCH_LIST=$("$py" -c 'import torch
print("%d.%d" % torch.cuda.get_device_capability())')
    # ninja may be a package of the machine, which has no command in our env.
    PATH=$CUDA_HOME/bin:$(dirname "$py"):$(dirname "$python"):$PATH
    # Small toolkits lack cuBLAS' headers; PyTorch's wheels bring them.
    CPLUS_INCLUDE_PATH=$("$python" -c 'import glob, os, torch
site = os.path.dirname(os.path.dirname(torch.__file__))
print(*glob.glob(os.path.join(site, "nvidia/*/include")), sep=":")')
    export CUDA_HOME TORCH_CUDA_ARCH_LIST PATH CPLUS_INCLUDE_PATH
    # Without it all files would be compiled one by one, and each time anew.
    command -v ninja || { echo 'error: no ninja on PATH' >&2; return 1; }
}

# In a folder that stays: pip builds where the sources are, and ninja goes on
# with the objects that are there.
compile_mmcv() {
    local source=$here/mmcv
    if [ ! -e "$source" ]; then
        rm -rf "$source.part"
        mkdir "$source.part"
        pip download --no-deps --no-build-isolation --no-binary onedl-mmcv \
            -d "$here" "$(grep '^onedl-mmcv==' requirements/tested.txt)"
        tar -xzf "$here"/onedl_mmcv-*.tar.gz -C "$source.part" \
            --strip-components=1
        mv "$source.part" "$source"
    fi
    # -g0: Python's own flags ask for debug information, which takes time.
    MMCV_WITH_OPS=1 FORCE_CUDA=1 MAX_JOBS=${MAX_JOBS:-$(nproc)} \
        CFLAGS="-O3 -DNDEBUG -g0 ${CFLAGS:-}" \
        CXXFLAGS="-O3 -DNDEBUG -g0 ${CXXFLAGS:-}" \
        pip wheel -v --no-deps --no-build-isolation -w "$here" "$source"
}

# install_mmcv WHEEL...: the first that works. That its version is installed
# says nothing: it may be without CUDA, for another PyTorch, or half there.
install_mmcv() {
    local wheel
    for wheel in "$@"; do
        if [ -e "$wheel" ] &&
            pip install --no-deps --ignore-installed "$wheel" && mmcv_works
        then
            return 0
        fi
    done
    return 1
}

build_mmcv() {
    set -e
    if mmcv_works || install_mmcv "$here"/onedl_mmcv-*.whl \
        ${wheels:+"$wheels"/onedl_mmcv-*.whl}; then
        return
    fi
    find_compilers
    compile_mmcv
    install_mmcv "$here"/onedl_mmcv-*.whl
}

benchmark() {
    local name=$1
    shift
    stage "$name" "$py" tools/benchmark.py "$@" --device cuda \
        --json "$out/$name.json" || failed=1
}

export wheels here env py python
export -f pip make_environment make_venv share_opencv build_mmcv mmcv_works \
    install_mmcv find_compilers cuda_home compile_mmcv
failed=0
# Where the results alone were brought along, the environment is missing.
[ -x "$py" ] || state drop environment mmcv
stage environment bash -c make_environment || finish 1
stage mmcv bash -c build_mmcv || finish 1
# Only the files with such tests: others import more than is installed here.
mapfile -t gpu_tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests)
stage tests "$py" -m pytest -m gpu -q --junitxml "$out/tests.xml" \
    "${gpu_tests[@]}" || failed=1
for batch in 2 4 8 16; do
    benchmark "step_batch$batch" step configs/faster_rcnn_kd_r50.py \
        --batch "$batch"
    benchmark "lad_batch$batch" assign --batch "$batch"
done
retinanet=(configs/{kd,dist,cwd,fgd,mgd,tat}_retinanet_r50.py)
others=(configs/{ld_gfl,crosskd_gfl,dkd_faster_rcnn,fbkd_faster_rcnn}_r50.py)
benchmark methods methods "${retinanet[@]}" "${others[@]}" --batch 2
# Last, because compiling takes longest.
for batch in 2 4 8 16; do
    benchmark "teacher_batch$batch" teacher configs/pkd_faster_rcnn_r50.py \
        --batch "$batch" --compile
done
finish $failed
