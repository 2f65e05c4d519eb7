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
from mmkd.report.evaluation import Evaluation, Objects, Picture
from mmkd.report.work_dir import read_aps
from mmkd.study.step import Step, locked
from tools import demo

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / 'data'
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
    ('distilled', 'said'),
    [(0.125, '+2.5 AP (10.0 → 12.5)'), (0.08, '-2.0 AP (10.0 → 8.0)')],
)
def test_the_verdict_tells_gain_and_loss_alike(distilled, said):
    aps = {'teacher': 0.3, 'student': 0.1, 'distilled': distilled}
    networks = {name: measured(ap) for name, ap in aps.items()}
    evaluation = Evaluation({}, [], hits={'student': [], 'distilled': []})
    found = summary.judge(evaluation, networks, seed=3)
    assert said in found.headline
    assert 'One seed each' in found.text()
    assert 'leads the plain student by 20.0 AP' in ' '.join(
        found.text().split()
    )


def test_curves_are_drawn(tmp_path):
    curves = dict(logged={'loss': {9: 2.0, 18: 1.0}}, aps={'': {1: 0.1}})
    runs = [argparse.Namespace(name=name, **curves) for name in 'ab']
    summary.draw_curves(runs, tmp_path)
    for name in ('loss.png', 'ap.png'):
        assert cv2.imread(str(tmp_path / name)).std() > 1


@pytest.fixture
def tile(tmp_path):
    """Make a tile with trees, and how many of them each student finds."""
    cv2.imwrite(str(tmp_path / 'tile.png'), np.full((8, 8, 3), 99, np.uint8))

    def tile(number, trees=1, **found):
        path = tmp_path / f'tile{number}.png'
        path.symlink_to('tile.png')
        objects = {name: tree(0.4, count) for name, count in found.items()}
        return Picture(number, path, tree(count=trees), objects)

    return tile


def test_pictures_are_at_even_distances(tile, tmp_path):
    tiles = [tile(number, student=1) for number in range(7)]
    folder = tmp_path / 'pictures'
    summary.draw_pictures(tiles, {'student': 0.3}, folder, count=3)
    drawn = sorted(path.stem for path in folder.iterdir())
    assert drawn == ['tile0', 'tile3', 'tile6']


def test_before_and_after_is_the_tile_that_gained_most(tile):
    tiles = [
        tile(0, 5, student=0, distilled=2),  # less than half of them
        tile(1, 5, student=2, distilled=4),
        tile(2, 5, student=5, distilled=5),
        tile(3, 1, student=0, distilled=9),  # eight of them find none
    ]
    scores = {'student': 0.3, 'distilled': 0.3}
    assert summary.most_gained(tiles, scores) is tiles[1]
    assert summary.most_gained(tiles[:1], scores) is tiles[0]
    # Below its score nothing is drawn, so nothing is gained.
    scores['distilled'] = 0.5
    assert summary.most_gained(tiles, scores) in (tiles[0], tiles[3])


def test_a_picture_has_a_panel_for_each_network(tile, tmp_path):
    first = tile(0, 1, student=0, distilled=1, teacher=1)
    path = tmp_path / 'drawn.png'
    summary.draw_tile(first, dict.fromkeys(first.found, 0.3), path)
    drawn = cv2.imread(str(path)).astype(int)
    # The trees are found in the last two of four panels.
    blue, green, red = (drawn[..., channel] for channel in range(3))
    found = (blue > 200) & (abs(green - 180) < 20) & (red < 110)
    quarters = [part.sum() > 20 for part in np.array_split(found, 4, axis=1)]
    assert quarters == [False, False, True, True]


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


def test_without_an_index_it_says_what_to_do(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(demo, 'ROOT', tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PYTHONPATH', str(ROOT))
    status = demo.main(['--work-dir', str(tmp_path / 'demo')])
    error = capfd.readouterr().err
    assert status == 1
    assert 'put it into data/downloads, and run this again' in error
    assert error.endswith(
        'error: data/neon could not be prepared (see above).\n'
    )
    assert not (tmp_path / 'demo').exists()


def prepared_data():
    for name in demo.NEEDS:
        if not (DATA / name).exists():
            command = [sys.executable, 'tools/prepare_data.py', name]
            done = subprocess.run(
                command, cwd=ROOT, capture_output=True, text=True, check=False
            )
            if done.returncode:
                pytest.skip(f'needs data/{name}: {done.stderr.strip()}')


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
        'train_dataloader.dataset.indices=24',
        'model.test_cfg.score_thr=0.0',  # they have hardly learnt anything
        'default_hooks.timer.type=tests.helpers.hold.Timer',
    )
    first = start(tmp_path, *tiny)
    # From then on the teacher waits at the end of its first epoch.
    while not (tmp_path / 'teacher-seed0' / 'last_checkpoint').exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    hold.unlink()
    output, _ = first.communicate()
    assert first.returncode == 130
    assert 'Run the same command again to continue' in output

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
    verdict = results['verdict']
    change = f'({100 * student["AP"]:.1f} → {100 * distilled["AP"]:.1f})'
    assert change in ' '.join(verdict.split())
    # The picture, the verdict and the next step come last, in this order.
    ends = ['before_after.png\n', verdict, demo.NEXT]
    assert sorted(map(output.rindex, ends)) == [*map(output.rindex, ends)]
    assert output.endswith(f'{demo.NEXT}\n')
    assert cv2.imread(str(tmp_path / 'before_after.png')).std() > 1

    third = start(tmp_path, *tiny)
    output, _ = third.communicate()
    assert third.returncode == 0
    assert output.count('-seed0') == output.count('done') == 3
    assert 'results: reused' in output
    assert verdict in output
