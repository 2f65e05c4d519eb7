#!/usr/bin/env bash
# Make .venv and install mmkd and everything it needs into it. Call it again
# after an interruption: what is installed stays, what is half there is
# repaired. Without anything to do it returns at once.
#   PYTHON    the interpreter to make .venv with (default: python3)
#   MAX_JOBS  compiler processes (default: one per core)
set -euo pipefail
shopt -s extglob
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
py=.venv/bin/python
stamp=.venv/.mmkd-installed

say() { printf '[install] %s\n' "$*"; }
die() {
    printf '[install] error: %s\n' "$1" >&2
    shift
    [ $# = 0 ] || printf '    %s\n' "$@" >&2
    exit 1
}
pip() { "$py" -m pip --disable-pip-version-check "$@"; }
install() {
    pip install --no-build-isolation -c "$(lock)" "$@" |
        sed -u '/^Requirement already satisfied/d'
}

# The versions to install, as constraints: what a lock holds for a CUDA build
# of torch alone does no harm where torch does not ask for it.
lock() {
    local file
    file=$("$py" -c 'import sys
print("requirements/lock-py%d%d.txt" % sys.version_info[:2])')
    [ -e "$file" ] || file=requirements/tested.txt
    echo "$file"
}

# Whatever would call for another installation changes this line: a moved
# folder, a changed requirement, a changed package layout or this script.
fingerprint() {
    { pwd && cat requirements/*.txt setup.py tools/install.sh; } | cksum
}

make_venv() {
    command -v "$python" >/dev/null || die "no '$python' on PATH." \
        'Install Python 3.10 or newer, or name it:' \
        '  make install PYTHON=/path/to/python'
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
        2>/dev/null || die 'mmkd needs Python 3.10 or newer.' \
        "'$python -V' says: $("$python" -V 2>&1 | head -n 1)" \
        'Install a newer one, or name it:' \
        '  make install PYTHON=/path/to/python'
    "$python" -c 'import ensurepip, venv' 2>/dev/null || die \
        "'$python' has no venv module, which makes .venv." \
        'On Debian and Ubuntu: apt-get install python3-venv'
    say "making .venv with $("$python" -V)"
    rm -rf .venv
    "$python" -m venv .venv
}

# pip takes a package for installed as soon as its metadata is there; the list
# of its files is written last. Without that list it was interrupted.
drop_half_installed() {
    local info
    for info in .venv/lib/python*/site-packages/*.dist-info; do
        if [ -d "$info" ] && [ ! -e "$info/RECORD" ]; then
            say "repairing $(basename "$info" .dist-info)"
            rm -rf "$info"
        fi
    done
}

# A wheel from an index or a folder of wheels, or the one pip kept of an
# earlier compilation.
has_wheel() {
    local folder tag
    tag=$("$py" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
    pip cache list onedl_mmcv 2>/dev/null |
        grep "onedl_mmcv-${1#*==}-$tag-" >/dev/null && return
    folder=$(mktemp -d)
    pip download --quiet --no-deps --only-binary :all: -d "$folder" "$1" \
        >/dev/null 2>&1
    local found=$?
    rm -rf "$folder"
    return "$found"
}

check_compiler() {
    command -v "${CXX:-c++}" >/dev/null || die \
        "there is no wheel of $1 that fits, so its" \
        "operators have to be compiled; but no '${CXX:-c++}' is on PATH." \
        'Install a C++ compiler, or point CXX at one:' \
        '  Debian, Ubuntu: apt-get install g++' \
        '  Fedora: dnf install gcc-c++' \
        'Or point PIP_FIND_LINKS at a folder with a wheel that fits.'
    "$py" -c 'import os, sys, sysconfig
header = os.path.join(sysconfig.get_path("include"), "Python.h")
sys.exit(not os.path.exists(header))' || die \
        "there is no wheel of $1 that fits, so its" \
        "operators have to be compiled; but the headers of $("$py" -V)" \
        '(Python.h) are missing. Install them:' \
        '  Debian, Ubuntu: apt-get install python3-dev' \
        '  Fedora: dnf install python3-devel'
}

say_cuda() {
    command -v nvidia-smi >/dev/null || return 0
    say 'this machine has an NVIDIA driver. The CUDA operators are compiled if'
    say 'torch sees a GPU, or with FORCE_CUDA=1; nvcc has to be there'
    say '(CUDA_HOME), and TORCH_CUDA_ARCH_LIST=9.0, say, saves time.'
    say 'CUDA_VISIBLE_DEVICES= compiles the CPU operators alone. Ready CUDA'
    say 'wheels: the mim command of the onedl-mim package.'
}

# Python's own flags ask for debug information (-g), which would take half as
# long again; a value given here replaces all of them, so -O3 is repeated.
install_mmcv() {
    MMCV_WITH_OPS=1 MAX_JOBS=${MAX_JOBS:-$(getconf _NPROCESSORS_ONLN)} \
        CFLAGS="-O3 -DNDEBUG -g0 ${CFLAGS:-}" \
        CXXFLAGS="-O3 -DNDEBUG -g0 ${CXXFLAGS:-}" install "$@"
}

# The headless OpenCV goes on top of the other one, as it needs no libGL.
headless_opencv() {
    install --quiet --force-reinstall --no-deps opencv-python-headless
}

ensure_mmcv() {
    local mmcv start=$SECONDS
    mmcv=$(grep '^onedl-mmcv==' requirements/tested.txt)
    if pip freeze | grep -xF "$mmcv" >/dev/null &&
        "$py" -c 'import mmcv.ops' 2>/dev/null; then
        return
    fi
    has_wheel "$mmcv" || check_compiler "$mmcv"
    say_cuda
    say "installing $mmcv. If no wheel fits, its operators are compiled now:"
    say 'about 7 minutes on 2 idle cores, 20 on busy ones, with little output.'
    install_mmcv "$mmcv"
    headless_opencv
    # A wheel that was compiled against another torch installs but won't load.
    if ! "$py" -c 'import mmcv.ops'; then
        say 'the wheel does not fit this torch: compiling mmcv anew'
        check_compiler "$mmcv"
        install_mmcv --force-reinstall --no-deps --no-cache-dir \
            --no-binary onedl-mmcv "$mmcv"
    fi
    say "$mmcv took $((SECONDS - start)) s"
}

# Quick: looks for the packages without importing them.
up_to_date() {
    [ "$(cat "$stamp" 2>/dev/null)" = "$(fingerprint)" ] && "$py" -I -c '
import sys
from importlib.util import find_spec
names = ("torch", "mmengine", "mmcv", "mmdet", "mmkd")
sys.exit(not all(map(find_spec, names)))' 2>/dev/null
}

main() {
    up_to_date && return
    rm -f "$stamp"
    # Fails for a .venv that is absent, cut off, or whose Python has gone.
    pip --version >/dev/null 2>&1 || make_venv
    drop_half_installed
    say "installing the versions in $(lock)"

    say 'installing torch and what compiling mmcv needs'
    install torch -r requirements/build.txt
    ensure_mmcv
    say 'installing mmengine, mmdet and the tools'
    local files=(requirements/!(lock-*).txt)
    install "${files[@]/#/-r}"
    headless_opencv
    # Its requirements are installed already: nothing is to move torch.
    install --quiet --no-deps -e .

    # yapf writes its grammars to a cache when first imported; processes that
    # did so at the same time, as the tests' do, would read half of a file.
    "$py" -c 'import torch, mmengine, mmcv.ops, mmdet, yapf' || die \
        'the installed packages do not import (see above).' \
        'Remove .venv and run this again.'
    fingerprint >"$stamp"
    say "done in $SECONDS s; activate it with: source .venv/bin/activate"
}

main
