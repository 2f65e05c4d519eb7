"""The live line in a real terminal, and the summary at the end."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mmkd.engine.hooks import ProgressHook
from mmkd.errors import ConfigError
from tests.helpers import toy

pytestmark = pytest.mark.usefixtures('shared_data')


def config(tmp_path, **hook):
    cfg = toy.distilled(tmp_path / 'run', epochs=2)
    cfg.val_evaluator = dict(type='ToyFalling', prefix='toy')
    if hook:
        cfg.custom_hooks = [dict(type='mmkd.ProgressHook', **hook)]
    return cfg


def log(folder):
    (path,) = Path(folder).glob('*/*.log')
    return path.read_text()


def in_terminal(command):
    """What a program shows in a terminal of 300 columns."""
    ours, theirs = pty.openpty()
    size = struct.pack('HHHH', 40, 300, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    process = subprocess.Popen(
        command, stdout=theirs, stderr=theirs, cwd=toy.ROOT, env=env
    )
    os.close(theirs)
    shown = b''
    try:
        while piece := os.read(ours, 4096):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_terminal(tmp_path):
    """One line that is written again and again; the log has plain lines."""
    cfg = toy.distilled(tmp_path / 'run', epochs=2)
    path = toy.write(cfg, tmp_path / 'c.py')
    shown = in_terminal([sys.executable, 'tools/train.py', str(path)])
    parts = re.split(r'[\r\n]', shown)
    last = [part for part in parts if part.startswith('epoch ')][-1]
    assert last.startswith('epoch 2/2: 100%')
    assert ' 8/8 ' in last
    # The rate of a slow machine is told the other way round.
    assert re.search(r'\d(it/s|s/it)', last)
    assert re.search(r'\d\.\d GiB  loss \d', last)
    assert 'loss_rpn_cls ' in last
    assert 'hint.loss' in last
    assert 'Epoch(train)' not in shown  # the line stands in for them
    assert 'Epoch(val)' in shown
    assert 'Done.' in shown
    written = log(tmp_path / 'run')
    assert len(re.findall(r'Epoch\(train\)', written)) == 8
    assert '\r' not in written


def test_no_terminal(tmp_path, capfd):
    """Plain lines, as ever; the summary names what comes next."""
    runner = toy.train(config(tmp_path))
    assert len(re.findall(r'Epoch\(train\)', capfd.readouterr().out)) == 8
    text = log(tmp_path / 'run').partition('Done.')[2]
    assert 'toy/falling: best 10.000 at 1, last 9.000 at 2\n' in text
    assert f'mmkd report {tmp_path}/run' in text
    assert f'{tmp_path}/run/epoch_2.pth' in text
    assert sum(isinstance(h, ProgressHook) for h in runner.hooks) == 1


def test_gain(tmp_path):
    """Last against last, of the same metric."""
    other = tmp_path / 'plain' / '20260101_000000' / 'vis_data'
    other.mkdir(parents=True)
    (other / 'scalars.json').write_text(
        '{"loss": 1.0, "step": 1}\n'
        '{"toy/falling": 9.5, "step": 1}\n'
        '{"toy/falling": 8.25, "coco/bbox_mAP_50": 0.9, "step": 2}\n'
        '{"toy/falling": 0.9'  # cut by an interruption
    )
    toy.train(config(tmp_path, compare_with=str(tmp_path / 'plain')))
    text = log(tmp_path / 'run').partition('Done.')[2]
    assert 'plain: last 8.250, a gain of +0.750\n' in text
    assert f'mmkd report {tmp_path}/plain {tmp_path}/run' in text


def test_the_other_run_has_no_such_metric(tmp_path):
    (tmp_path / 'plain').mkdir()
    toy.train(config(tmp_path, compare_with=str(tmp_path / 'plain')))
    assert 'has no toy/falling to compare with' in log(tmp_path / 'run')


def test_no_such_folder():
    with pytest.raises(ConfigError, match='there is no folder nowhere'):
        ProgressHook(compare_with='nowhere')
