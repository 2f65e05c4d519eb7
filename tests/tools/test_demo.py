"""The parts of the demo, then all of it at a tiny scale."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from mmengine.config import Config

ROOT = Path(__file__).resolve().parents[2]
NEON = ROOT / 'data' / 'neon'


@pytest.fixture
def training():
    from mmkd.study import training

    return training


@pytest.fixture
def report():
    from mmkd.report import summary

    return summary


def figures(ap, **changes):
    from mmkd.report.measure import Figures

    values = dict(
        AP=ap, AP50=2 * ap, AP75=ap / 2, parameters=1_250_000, gflops=0.5, ms=9
    )
    return Figures(**values | changes)


# ------------------------------------------------------------------- table


def test_table(report):
    text = report.table(
        {'teacher': figures(0.2, parameters=12_340_000), 'a': figures(0.1)},
        {'teacher': 10.04, 'a': 3.0},
    )
    assert text == (
        '| network | parameters | GFLOPs | ms a tile |   AP | AP50 | AP75 '
        '| CPU min of training |\n'
        '| ------- | ---------: | -----: | --------: | ---: | ---: | ---: '
        '| ------------------: |\n'
        '| teacher |    12.34 M |   0.50 |         9 | 20.0 | 40.0 | 10.0 '
        '|                10.0 |\n'
        '| a       |     1.25 M |   0.50 |         9 | 10.0 | 20.0 |  5.0 '
        '|                 3.0 |'
    )


@pytest.mark.parametrize(
    ('distilled', 'gain'),
    [(0.125, '+2.5 AP'), (0.08, '-2.0 AP'), (0.1 - 1e-9, '+0.0 AP')],
)
def test_remarks_tell_gain_and_loss_alike(report, distilled, gain):
    from mmkd.report.measure import Tile

    tiles = [Tile('x', np.zeros((4, 4, 3)), np.zeros((n, 4))) for n in (3, 4)]
    text = report.remarks(
        {'student': figures(0.1), 'distilled': figures(distilled)}, tiles
    )
    assert f'Distilled - student: {gain}.' in text
    assert 'only 2 validation tiles (7 trees) and one seed' in text
    assert 'the spread is wide' in text


# ------------------------------------------------------------------ curves


def write_scalars(folder, start, rows, end='\n'):
    path = folder / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, rows)) + end)


def test_curves_of_a_resumed_run(report, tmp_path):
    write_scalars(
        tmp_path,
        '20250101_000000',
        [
            dict(loss=3.0, epoch=1, step=9),
            dict(loss=2.0, epoch=1, step=18),
            {'coco/bbox_mAP': 0.1, 'step': 1},
            dict(loss=9.0, epoch=2, step=27),
        ],
        end='\n{"loss": 8.0, "st',  # killed while it wrote
    )
    write_scalars(
        tmp_path,
        '20250102_000000',
        [
            {'coco/bbox_mAP': 0.15, 'step': 1},
            dict(loss=1.0, epoch=2, step=27),
            {'coco/bbox_mAP': 0.2, 'step': 2},
        ],
    )
    curves = report.read_curves(tmp_path)
    assert curves.loss == {9: 3.0, 18: 2.0, 27: 1.0}
    assert curves.ap == {1: 0.15, 2: 0.2}
    assert list(curves.loss) == [9, 18, 27]


def test_curves_are_drawn(report, tmp_path):
    curves = {
        name: report.Curves({9: 2.0, 18: 1.0}, {1: 0.1, 2: 0.2})
        for name in ('teacher', 'student', 'distilled')
    }
    report.plot_curves(curves, tmp_path)
    for name in ('loss.png', 'ap.png'):
        assert (tmp_path / name).read_bytes().startswith(b'\x89PNG')


# ---------------------------------------------------------------- pictures


def test_iou(report):
    box = np.array([0.0, 0.0, 10.0, 10.0])
    others = np.array(
        [[0, 0, 10, 10], [5, 0, 15, 10], [20, 20, 30, 30]], dtype=float
    )
    # 5 x 10 shared of 100 + 100 - 50
    np.testing.assert_allclose(report.iou(box, others), [1, 1 / 3, 0])


def test_match_takes_the_surest_box_first_and_each_tree_once(report):
    trees = np.array([[0, 0, 10, 10], [20, 0, 30, 10]], dtype=float)
    boxes = np.array(
        [[1, 0, 11, 10], [0, 0, 10, 10], [50, 50, 60, 60]], dtype=float
    )
    right, seen = report.match(boxes, np.array([0.9, 0.6, 0.8]), trees)
    assert right.tolist() == [True, False, False]
    assert seen.tolist() == [True, False]


def test_match_of_nothing(report):
    none = np.zeros((0, 4))
    right, seen = report.match(none, np.zeros(0), none)
    assert right.shape == seen.shape == (0,)
    box = np.array([[0.0, 0.0, 1.0, 1.0]])
    assert not report.match(box, np.ones(1), none)[0].any()
    assert not report.match(none, np.zeros(0), box)[1].any()


def test_pictures_are_at_even_distances(report, tmp_path):
    from mmkd.report.measure import Detections, Tile

    pixels = np.full((8, 8, 3), 99, np.uint8)
    box = np.array([[1.0, 1.0, 6.0, 6.0]])
    tiles = [Tile(f'tile{i}', pixels, box) for i in range(7)]
    found = {'student': [Detections(box, np.array([0.9]))] * 7}
    report.draw_pictures(tiles, found, tmp_path / 'pictures', count=3)
    drawn = sorted(path.stem for path in (tmp_path / 'pictures').iterdir())
    assert drawn == ['tile0', 'tile3', 'tile6']


# ------------------------------------------------------------- fingerprint


def test_fingerprint_tells_configs_and_data_apart(training):
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


def test_plan_marks_what_a_training_depends_on(training, tmp_path, data):
    before = marks(training.plan(tmp_path / 'a', data, []))
    assert before == marks(training.plan(tmp_path / 'b', data, []))
    options = ['randomness.seed=1']
    seed = marks(training.plan(tmp_path / 'a', data, options))
    (data / 'train.json').write_text('{"images": []}')
    relabelled = marks(training.plan(tmp_path / 'a', data, []))
    for name in before:
        assert len({before[name], seed[name], relabelled[name]}) == 3


def test_distilled_depends_on_the_teacher(
    training, tmp_path, data, monkeypatch
):
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


def test_the_distilled_one_reads_the_last_teacher(training, tmp_path, data):
    networks = training.plan(tmp_path, data, ['train_cfg.max_epochs=3'])
    assert networks['teacher'].checkpoint == tmp_path / 'teacher/epoch_3.pth'
    option = networks['distilled'].command[-1]
    key, _, path = option.partition('=')
    assert key == 'distillation.teacher.checkpoint'
    assert (ROOT / path).resolve() == networks['teacher'].checkpoint
    assert not any('distillation' in o for o in networks['student'].command)


def test_changed_training_is_begun_anew(training, tmp_path, data, capsys):
    network = training.plan(tmp_path, data, [])['student']
    network.folder.mkdir()
    network.note(fingerprint=network.fingerprint)
    training.plan(tmp_path, data, [])
    assert network.state
    assert capsys.readouterr().out == ''
    training.plan(tmp_path, data, ['randomness.seed=7'])
    assert not network.folder.exists()
    assert 'student: config, data or versions' in capsys.readouterr().out


def test_foreign_files_are_left_alone(training, tmp_path, data):
    (tmp_path / 'student').mkdir()
    precious = tmp_path / 'student' / 'epoch_20.pth'
    precious.touch()
    with pytest.raises(training.DemoError, match='not of this demo'):
        training.plan(tmp_path, data, [])
    assert precious.exists()


# ---------------------------------------------------------------- training


@pytest.fixture
def networks(training, tmp_path, data, monkeypatch):
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
def lock(training, tmp_path):
    with training.locked(tmp_path) as number:
        yield number


@pytest.mark.parametrize('jobs', [1, 3])
def test_train_in_order_and_once(
    training, networks, lock, tmp_path, capsys, jobs
):
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


def test_failure_shows_the_log_and_ends_the_others(
    training, networks, lock, tmp_path
):
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


def test_second_demo_in_a_folder_is_refused(training, lock, tmp_path):
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
def test_last_progress(training, eta):
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
def test_demo_is_interrupted_continued_and_reused(report, tmp_path, hold):
    prepared_data()
    tiny = (
        'train_cfg.max_epochs=2',
        'train_dataloader.dataset.indices=16',
        'val_dataloader.dataset.indices=3',
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
    assert (results['seed'], results['tiles']) == (0, 3)
    assert list(results['networks']) == ['teacher', 'student', 'distilled']
    for name, row in results['networks'].items():
        curves = report.read_curves(tmp_path / name)
        assert row['AP'] == pytest.approx(curves.ap[2], abs=0.0011)
        assert row['parameters'] > 100_000
        assert row['gflops'] > 0
        assert row['ms'] > 0
    student, distilled = (
        results['networks'][name] for name in ('student', 'distilled')
    )
    assert distilled['parameters'] == student['parameters']
    assert len(list((tmp_path / 'pictures').glob('*.png'))) == 3
    assert (tmp_path / 'table.md').read_text() in output

    third = demo(tmp_path, *tiny)
    output, _ = third.communicate()
    assert third.returncode == 0
    assert output.count('reused') == 4
