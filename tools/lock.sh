#!/usr/bin/env bash
# Write requirements/lock-py*.txt: the version of every package that mmkd and
# its tools need, for each Python. A version that is locked stays as long as
# it fits; with --upgrade each package moves to its newest version. What else
# is given goes to uv as well.
set -euo pipefail
cd "$(dirname "$0")/.."
shopt -s extglob

# Sources of onedl-mmcv and onedl-mmdetection tell what they need only with
# torch at hand, which uv has to take from here.
if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
    printf '[lock] error: %s\n' \
        '.venv has no torch. Call "make install" first.' >&2
    exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
.venv/bin/python -m pip install --quiet --target "$folder" 'uv>=0.9'

# pip stays the one that Python brings along.
for python in 3.10 3.11 3.12; do
    lock=requirements/lock-py${python/./}.txt
    "$folder/bin/uv" pip compile --quiet --no-build-isolation \
        --python .venv/bin/python --python-version "$python" \
        --python-platform x86_64-manylinux_2_28 \
        --no-emit-package pip --no-emit-index-url --no-annotate \
        --custom-compile-command 'make lock' --output-file "$lock" "$@" \
        requirements/!(lock-*).txt
    printf '[lock] %s: %s packages\n' "$lock" "$(grep -c == "$lock")"
done
