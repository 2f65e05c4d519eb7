"""The GPU's check where there is no GPU, and with wrong options."""

import os
import subprocess
import sys

import pytest
from toy import ROOT


def run(*arguments):
    env = {**os.environ, 'CUDA_VISIBLE_DEVICES': '', 'OMP_NUM_THREADS': '1'}
    return subprocess.run(
        ['tools/gpu_check.sh', *map(str, arguments)],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )


def test_without_gpu_it_says_so(tmp_path):
    done = run('--python', sys.executable, '--out', tmp_path / 'out')
    assert done.returncode == 2
    assert 'sees no CUDA device: nothing to check here' in done.stdout
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--wheels', 'nowhere'], '--wheels nowhere is no folder'),
        (['--minutes', '0'], '--minutes 0 is no whole number from 1'),
        (['--minutes'], '--minutes takes a value'),
        (['--wheel', 'x'], 'unknown option --wheel'),
        (['--python', 'no-such-python'], "no 'no-such-python'"),
    ],
)
def test_wrong_options(arguments, message):
    done = run(*arguments)
    assert done.returncode == 1
    assert message in done.stderr


def test_a_python_without_pytorch(tmp_path):
    empty = tmp_path / 'python'
    empty.write_text(f'#!/bin/sh\nexec {sys.executable} -S -I "$@"\n')
    empty.chmod(0o755)
    done = run('--python', empty)
    assert done.returncode == 1
    assert 'has no PyTorch' in done.stderr
