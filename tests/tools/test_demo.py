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
from mmengine.config import Config

from mmkd.report import summary
from mmkd.report.evaluation import Objects, Picture
from mmkd.report.work_dir import read_aps
from mmkd.study import training

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


# ------------------------------------------------------------- fingerprint


def test_fingerprint_tells_configs_and_data_apart():
    def mark(lr=0.1, data=b'a'):
        config = Config(dict(optimizer=dict(lr=lr), betas=(1, 2)))
        return training.fingerprint(config, data)

    assert mark() == mark()
    assert len({mark(), mark(lr=0.2), mark(data=b'b')}) == 3


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / 'neon'
    folder.mkdir()
    (folder / 'train.json').write_text('{}')
    return folder


def marks(networks):
    return {name: network.fingerprint for name, network in networks.items()}


def test_plan_marks_what_a_training_depends_on(tmp_path, data):
    before = marks(training.plan(tmp_path / 'a', data, []))
    assert before == marks(training.plan(tmp_path / 'b', data, []))
    options = ['randomness.seed=1']
    seed = marks(training.plan(tmp_path / 'a', data, options))
    (data / 'train.json').write_text('{"images": []}')
    relabelled = marks(training.plan(tmp_path / 'a', data, []))
    for name in before:
        assert len({before[name], seed[name], relabelled[name]}) == 3


def test_distilled_depends_on_the_teacher(tmp_path, data, monkeypatch):
    read = Config.fromfile

    def changed(path):
        config = read(path)
        if Path(path).stem == 'teacher':
            config.optim_wrapper.optimizer.lr = 1.0
        return config

    before = marks(training.plan(tmp_path, data, []))
    monkeypatch.setattr(training.Config, 'fromfile', changed)
    after = marks(training.plan(tmp_path, data, []))
    assert {n for n in before if before[n] != after[n]} == {
        'teacher',
        'distilled',
    }


def test_the_distilled_one_reads_the_last_teacher(tmp_path, data):
    networks = training.plan(tmp_path, data, ['train_cfg.max_epochs=3'])
    assert networks['teacher'].checkpoint == tmp_path / 'teacher/epoch_3.pth'
    option = networks['distilled'].command[-1]
    key, _, path = option.partition('=')
    assert key == 'distillation.teacher.checkpoint'
    assert (ROOT / path).resolve() == networks['teacher'].checkpoint
    assert not any('distillation' in o for o in networks['student'].command)


def test_changed_training_is_begun_anew(tmp_path, data, capsys):
    network = training.plan(tmp_path, data, [])['student']
    network.folder.mkdir()
    network.note(fingerprint=network.fingerprint)
    training.plan(tmp_path, data, [])
    assert network.state
    assert capsys.readouterr().out == ''
    training.plan(tmp_path, data, ['randomness.seed=7'])
    assert not network.folder.exists()
    assert 'student: config, data or versions' in capsys.readouterr().out


def test_foreign_files_are_left_alone(tmp_path, data):
    (tmp_path / 'student').mkdir()
    precious = tmp_path / 'student' / 'epoch_20.pth'
    precious.touch()
    with pytest.raises(training.DemoError, match='not of this demo'):
        training.plan(tmp_path, data, [])
    assert precious.exists()


# ---------------------------------------------------------------- training


@pytest.fixture
def networks(tmp_path, data, monkeypatch):
    """The three, each trained by the script ``train.py`` in its folder."""
    planned = training.plan(tmp_path, data, [])
    command = property(lambda self: [str(self.folder / 'train.py')])
    monkeypatch.setattr(training.Network, 'command', command)
    order = str(tmp_path / 'order')
    for network in planned.values():
        network.folder.mkdir()
        (network.folder / 'train.py').write_text(
            f'open({str(network.checkpoint)!r}, "w")\n'
            f'open({order!r}, "a").write("{network.name} ")\n'
            'import time\n'
            'while time.process_time() < 0.2: pass\n'
            'print(time.process_time())'
        )
    return planned


@pytest.fixture
def lock(tmp_path):
    with training.locked(tmp_path) as number:
        yield number


@pytest.mark.parametrize('jobs', [1, 3])
def test_train_in_order_and_once(networks, lock, tmp_path, capsys, jobs):
    training.train(networks, jobs, lock)
    order = (tmp_path / 'order').read_text().split()
    assert sorted(order) == sorted(networks)
    assert order.index('teacher') < order.index('distilled')
    for network in networks.values():
        assert network.finished
        told = float(network.log.read_text())
        assert network.state['cpu_seconds'] == pytest.approx(told, abs=0.1)
    assert 'distilled  trained in' in capsys.readouterr().out
    training.train(networks, jobs, lock)
    assert (tmp_path / 'order').read_text().split() == order
    assert 'distilled: trained already, reused' in capsys.readouterr().out


def test_failure_shows_the_log_and_ends_the_others(networks, lock, tmp_path):
    """The student fails once the teacher is at work, which never ends."""
    pid = networks['teacher'].folder / 'pid'
    (networks['teacher'].folder / 'train.py').write_text(
        'import os, signal\n'
        f'open({str(pid)!r}, "w").write(str(os.getpid()))\n'
        'signal.pause()'
    )
    (networks['student'].folder / 'train.py').write_text(
        'import os\n'
        f'while not os.path.exists({str(pid)!r}): pass\n'
        'print("no", "such", "layer"); raise SystemExit(3)'
    )
    with pytest.raises(training.DemoError, match='no such layer') as error:
        training.train(networks, 2, lock)
    assert 'training the student failed (exit status 3)' in str(error.value)
    assert not Path('/proc', pid.read_text()).exists()
    # noted when it was ended
    assert 'wall_seconds' in networks['teacher'].state
    assert not networks['teacher'].finished
    assert not networks['distilled'].log.exists()


def test_second_demo_in_a_folder_is_refused(lock, tmp_path):
    with (
        pytest.raises(training.DemoError, match='is at work in'),
        training.locked(tmp_path),
    ):
        pass


LOG = """\
{t} Epoch(train)  [1][ 9/28]  lr: 1e-03  eta: 0:20:06  time: 2.2  loss: 1.5 x
{t} Epoch(val)  [1][ 9/24]    eta: 0:00:02  time: 0.1  data_time: 0.0
{t} Epoch(val) [1][24/24]    coco/bbox_mAP: 0.0140  coco/bbox_mAP_50: 0.05
{t} Epoch(train) [12][18/28]  lr: 1e-03  eta: {eta}  time: 2.2  loss: 0.75 x
"""


@pytest.mark.parametrize('eta', ['0:01:02', '1 day, 0:01:02'])
def test_last_progress(eta):
    log = LOG.format(t='11/21 21:40:22 - mmengine - INFO -', eta=eta)
    assert training.last_progress(log, 20) == (
        f'epoch 12 of 20   loss 0.75   {eta} left   AP 1.4'
    )
    assert training.last_progress('', 20) == 'starts'


# ---------------------------------------------------------- from end to end


def prepared_data():
    if not NEON.exists():
        command = [sys.executable, 'tools/prepare_data.py', 'neon']
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(f'needs data/neon: {done.stderr.strip()}')


def demo(work_dir, *options):
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
    first = demo(tmp_path, *tiny)
    # From then on the teacher waits at the end of its first epoch.
    while not (tmp_path / 'teacher' / 'last_checkpoint').exists():
        assert first.poll() is None, first.stdout.read()
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    output, _ = first.communicate()
    assert first.returncode == 130
    assert 'Run the same command again to continue' in output
    hold.unlink()

    second = demo(tmp_path, *tiny)
    output, _ = second.communicate()
    assert second.returncode == 0, output
    log = (tmp_path / 'teacher' / 'log.txt').read_text()
    assert 'resumed epoch: 1' in log

    results = json.loads((tmp_path / 'table.json').read_text())
    assert (results['seed'], results['tiles']) == (0, 24)
    assert list(results['networks']) == ['teacher', 'student', 'distilled']
    for name, row in results['networks'].items():
        aps = read_aps(tmp_path / name)['']
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

    third = demo(tmp_path, *tiny)
    output, _ = third.communicate()
    assert third.returncode == 0
    assert output.count('reused') == 4
