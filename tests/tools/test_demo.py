"""The parts of the demo, then all of it at a tiny scale."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmkd.errors import MMKDError
from mmkd.report import summary
from mmkd.report.evaluation import Objects, Picture
from mmkd.report.work_dir import read_aps
from mmkd.study.step import Step, locked
from tools import demo

ROOT = Path(__file__).resolve().parents[2]
NEON = ROOT / 'data' / 'neon'
BOX = np.array([[1.0, 1.0, 6.0, 6.0]])


def measured(ap, **changes):
    values = dict(
        AP=ap, AP50=2 * ap, AP75=ap / 2, parameters=1_250_000, gflops=0.5, ms=9
    )
    return values | changes


def tree(score=1.0, count=1):
    """A box of that score, count times."""
    names, scores = np.full(count, 'Tree'), np.full(count, score)
    return Objects(BOX.repeat(count, 0), names, scores)


# ----------------------------------------------------------------- results


def test_table():
    text = summary.results_table(
        {'teacher': measured(0.2, parameters=12_340_000), 'a': measured(0.1)},
        {'teacher': 10.04, 'a': 3.0},
    )
    header, _, *rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in text.splitlines()
    ]
    assert header == [
        'network', 'parameters', 'GFLOPs', 'ms per tile',
        'AP', 'AP50', 'AP75', 'CPU min of training',
    ]  # fmt: skip
    assert rows == [
        ['teacher', '12.34 M', '0.50', '9', '20.0', '40.0', '10.0', '10.0'],
        ['a', '1.25 M', '0.50', '9', '10.0', '20.0', '5.0', '3.0'],
    ]


@pytest.mark.parametrize(
    ('distilled', 'gain'),
    [(0.125, '+2.5 AP'), (0.08, '-2.0 AP'), (0.1 - 1e-9, '+0.0 AP')],
)
def test_remarks_tell_gain_and_loss_alike(distilled, gain):
    tiles = [Picture(n, Path('x'), tree(count=n)) for n in (3, 4)]
    text = summary.remarks(
        {'student': measured(0.1), 'distilled': measured(distilled)}, tiles
    )
    assert f'Distilled - student: {gain}.' in text
    assert 'only 2 validation tiles (7 trees) and one seed' in text
    assert 'the spread is wide' in text


def test_curves_are_drawn(tmp_path):
    curves = dict(logged={'loss': {9: 2.0, 18: 1.0}}, aps={'': {1: 0.1}})
    runs = [argparse.Namespace(name=name, **curves) for name in 'ab']
    summary.draw_curves(runs, tmp_path)
    for name in ('loss.png', 'ap.png'):
        assert cv2.imread(str(tmp_path / name)).std() > 1


def test_pictures_are_at_even_distances(tmp_path):
    cv2.imwrite(str(tmp_path / 'tile.png'), np.full((8, 8, 3), 99, np.uint8))
    tiles = []
    for i in range(7):
        path = tmp_path / f'tile{i}.png'
        path.symlink_to('tile.png')
        tiles.append(Picture(i, path, tree(), {'student': tree(0.9)}))
    summary.draw_pictures(tiles, tmp_path / 'pictures', count=3)
    drawn = sorted(path.stem for path in (tmp_path / 'pictures').iterdir())
    assert drawn == ['tile0', 'tile3', 'tile6']


# --------------------------------------------------------------- its study


@pytest.fixture
def study(tmp_path):
    options = {'train_cfg.max_epochs': 3}
    args = argparse.Namespace(work_dir=tmp_path, seed=7, cfg_options=options)
    return demo.demo_study(args)


def test_the_networks_are_a_study(study, tmp_path):
    teacher, student, distilled = study.runs
    assert distilled.teacher is teacher
    assert teacher.teacher is student.teacher is None
    for run in study.runs:
        assert run.folder == tmp_path / f'{run.network}-seed7'
        assert run.config.train_cfg.max_epochs == 3
        assert run.config.randomness.seed == 7


def test_a_failure_shows_the_end_of_its_log(study, tmp_path):
    demo.check(study)
    student = study.of('student')[0]
    code = 'print("no", "such", "layer"); raise SystemExit(3)'
    student.step = Step(student.folder, 'train', ['-c', code], {})
    with locked(tmp_path) as lock:
        student.step.start(lock)
    student.step.process.wait()
    student.failure = 'training failed (exit status 3)'
    message = r'student: training failed .exit .*\n  \| no such layer'
    with pytest.raises(MMKDError, match=message):
        demo.check(study)


# ---------------------------------------------------------- from end to end


def prepared_data():
    if not NEON.exists():
        command = [sys.executable, 'tools/prepare_data.py', 'neon']
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f'needs data/neon: {done.stderr.strip()}')


def start(work_dir, *options):
    command = [sys.executable, 'tools/demo.py', '--work-dir', str(work_dir)]
    command += ['--cfg-options', *options]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, 'PYTHONPATH': str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # A shell's background process has it ignored, and so its heirs.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


@pytest.mark.slow
def test_demo_is_interrupted_continued_and_reused(tmp_path, hold):
    prepared_data()
    tiny = (
        'train_cfg.max_epochs=2',
        'train_dataloader.dataset.indices=64',
        'default_hooks.timer.type=tests.helpers.hold.Timer',
    )
    first = start(tmp_path, *tiny)
    # From then on the teacher waits at the end of its first epoch.
    while not (tmp_path / 'teacher-seed0' / 'last_checkpoint').exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate()
    assert first.returncode == 130
    assert 'Run the same command again to continue' in output
    hold.unlink()

    second = start(tmp_path, *tiny)
    output, _ = second.communicate()
    assert second.returncode == 0, output
    log = (tmp_path / 'teacher-seed0' / 'train.txt').read_text()
    assert 'resumed epoch: 1' in log

    results = json.loads((tmp_path / 'table.json').read_text())
    assert (results['seed'], results['tiles']) == (0, 24)
    assert list(results['networks']) == ['teacher', 'student', 'distilled']
    for name, row in results['networks'].items():
        aps = read_aps(tmp_path / f'{name}-seed0')['']
        assert row['AP'] == pytest.approx(aps[2], abs=0.0011)
        assert row['parameters'] > 100_000
        assert row['gflops'] > 0
        assert row['ms'] > 0
    student, distilled = (
        results['networks'][name] for name in ('student', 'distilled')
    )
    assert distilled['parameters'] == student['parameters']
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == 6
    assert (tmp_path / 'table.md').read_text() in output

    third = start(tmp_path, *tiny)
    output, _ = third.communicate()
    assert third.returncode == 0
    assert output.count('-seed0') == output.count('done') == 3
    assert 'results: reused' in output
