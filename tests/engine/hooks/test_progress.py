"""The live line in a real terminal, and the summary at the end."""

import fcntl
import os
import pty
import re
import shlex
import signal
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from mmkd.engine.hooks import ProgressHook, progress
from mmkd.errors import ConfigError
from tests.helpers import toy

ERASE, SHOW_CURSOR = '\x1b[2K', '\x1b[?25h'


def config(tmp_path, **hook):
    cfg = toy.distilled(tmp_path / 'run', epochs=2)
    cfg.val_evaluator = dict(type='ToyFalling', prefix='toy')
    if hook:
        cfg.custom_hooks = [dict(type='mmkd.ProgressHook', **hook)]
    return cfg


def log(folder):
    (path,) = Path(folder).glob('*/*.log')
    return path.read_text()


def in_terminal(path, interrupt_at=None):
    """Train in a terminal of 300 columns.

    Args:
        path: The config.
        interrupt_at: The text at which Ctrl-C is pressed.

    Returns:
        The exit status, and all that was shown, without colours.
    """
    ours, theirs = pty.openpty()
    environ = {k: v for k, v in os.environ.items() if k != 'COLUMNS'}
    size = struct.pack('HHHH', 40, 300, 0, 0)
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, size)
    process = subprocess.Popen(
        [sys.executable, 'tools/train.py', str(path)],
        stdin=subprocess.DEVNULL,  # rich asks it first how wide the screen is
        stdout=theirs,
        stderr=theirs,
        cwd=toy.ROOT,
        env={**environ, 'OMP_NUM_THREADS': '1', 'TERM': 'xterm'},
        # A shell's background process ignores it, and so would this one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    os.close(theirs)
    shown = ''
    try:
        while piece := os.read(ours, 4096):
            shown += piece.decode(errors='replace')
            if interrupt_at and interrupt_at in shown:
                process.send_signal(signal.SIGINT)
                interrupt_at = None
    except OSError:  # the other end is closed
        pass
    os.close(ours)
    return process.wait(), re.sub(r'\x1b\[[0-9;]*m', '', shown)


def test_terminal(tmp_path):
    """One line that is written again and again; the log has plain lines."""
    cfg = toy.distilled(tmp_path / 'run', epochs=2)
    status, shown = in_terminal(toy.write(cfg, tmp_path / 'c.py'))
    assert status == 0, shown
    lines = [part for part in re.split(r'[\r\n]+', shown) if ' GiB ' in part]
    last = lines[-1].removeprefix(ERASE)
    assert last.startswith('epoch 2/2: 100% ')
    assert ' 8/8 0:00:00 ' in last
    assert re.search(r'\d\.\d GiB  loss \d', last)
    assert 'loss_rpn_cls ' in last
    assert 'hint.loss' in last
    assert 'Epoch(train)' not in shown  # the line stands in for them
    # What is logged appears above the line.
    assert re.search(r'Epoch\(val\).*\r\nepoch 1/2: \d', shown)
    assert shown.rindex('Done.') > shown.rindex(SHOW_CURSOR)
    written = log(tmp_path / 'run')
    assert len(re.findall(r'Epoch\(train\)', written)) == 8
    assert not re.search(r'[\r\x1b]', written)


def test_an_interruption_leaves_the_terminal_whole(tmp_path):
    cfg = toy.distilled(tmp_path / 'run', epochs=9)
    status, shown = in_terminal(toy.write(cfg, tmp_path / 'c.py'), ' GiB ')
    assert status != 0
    assert re.search(r'epoch 1/9: .*\r\n', shown)  # the line is ended
    assert shown.count(SHOW_CURSOR) == 2  # at the beginning and at the end
    assert shown.rindex(SHOW_CURSOR) > shown.rindex(' GiB ')


def test_only_the_first_process_shows_the_line(monkeypatch):
    monkeypatch.setattr(sys.stdout, 'isatty', lambda: True, raising=False)
    monkeypatch.setattr(progress, 'is_main_process', lambda: False)
    ProgressHook().before_train(runner=None)
    monkeypatch.setattr(progress, 'is_main_process', lambda: True)
    with pytest.raises(AttributeError, match='max_iters'):
        ProgressHook().before_train(runner=None)


def test_no_terminal(tmp_path, capfd):
    """Plain lines, as ever; the summary names what comes next."""
    runner = toy.train(config(tmp_path))
    assert len(re.findall(r'Epoch\(train\)', capfd.readouterr().out)) == 8
    text = log(tmp_path / 'run').partition('Done.')[2]
    assert 'toy/falling: best 10.000 at 1, last 9.000 at 2\n' in text
    assert f'mmkd report {tmp_path}/run' in text
    assert re.search(f'mmkd test .* {tmp_path}/run/epoch_2.pth', text)
    assert sum(isinstance(h, ProgressHook) for h in runner.hooks) == 1


def test_commands_can_be_pasted(tmp_path):
    """Though paths have blanks, quotes and more in them."""
    folder = tmp_path / "it's $HOME; here"
    toy.train(config(folder))
    lines = log(folder / 'run').partition('Next:\n')[2].splitlines()
    found = [shlex.split(line) for line in lines[:2]]
    assert found[0][:2] == ['mmkd', 'test']
    assert found[0][-1] == f'{folder}/run/epoch_2.pth'
    assert found[1] == ['mmkd', 'report', f'{folder}/run']


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
