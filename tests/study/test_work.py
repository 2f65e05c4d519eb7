"""The work on a study: one run after the other, and broken off anywhere."""

from pathlib import Path

import pytest

from mmkd.cli import main
from mmkd.study import command, work
from mmkd.study import step as study_step
from mmkd.study.run import Run
from mmkd.study.step import Step, locked

LOG = """\
{t} Epoch(train)  [1][ 9/28]  lr: 1e-03  eta: 0:20:06  time: 2.2  loss: 1.5 x
{t} Epoch(val)  [1][ 9/24]    eta: 0:00:02  time: 0.1  data_time: 0.0
{t} Epoch(val) [1][24/24]    coco/bbox_mAP: 0.0140  coco/bbox_mAP_50: 0.05
{t} Epoch(train) [12][18/28]  lr: 1e-03  eta: {eta}  time: 2.2  loss: 0.75 x
"""


# ------------------------------------------------------------------ progress


@pytest.mark.parametrize('eta', ['0:01:02', '1 day, 0:01:02'])
def test_last_progress(eta):
    log = LOG.format(t='11/21 21:40:22 - mmengine - INFO -', eta=eta)
    assert work.last_progress(log, 20) == (
        f'epoch 12 of 20   loss 0.75   {eta} left   AP 1.4'
    )
    assert work.last_progress('', 20) == 'starts'


def test_progress_in_a_file_is_a_line_per_epoch(capsys):
    with work.progress(['a', 'second']) as tell:
        tell('a', 'epoch  1 of 2   loss 0.5')
        tell('a', 'epoch  1 of 2   loss 0.4')
        tell('second', 'starts')
        tell('a', 'epoch  2 of 2   loss 0.3')
    assert capsys.readouterr().out.splitlines() == [
        'a          epoch  1 of 2   loss 0.5',
        'second     starts',
        'a          epoch  2 of 2   loss 0.3',
    ]


def test_progress_on_a_terminal_is_redrawn(capsys, monkeypatch):
    """With the newest line of each run, whatever brackets are in it."""
    monkeypatch.setenv('FORCE_COLOR', '1')
    monkeypatch.setenv('TTY_COMPATIBLE', '1')
    names = [f'run{number}' for number in range(60)]
    with work.progress(names) as tell:
        for name in names[:50]:
            tell(name, '[1] old')
            tell(name, f'[/b] {name}')
    shown = capsys.readouterr().out.rpartition('run49')
    assert '[/b] run49' in ''.join(shown)
    assert '10 wait' in shown[2]
    assert '\x1b[' in shown[0]


# ---------------------------------------------------------------- broken off


def test_a_removal_can_be_broken_off(study, monkeypatch):
    """At its first file, by which a folder is known to be a study's."""
    runs = study.finish()
    folder = runs['student'].folder

    def killed(folder, **_):
        (folder / 'train.json').unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(work.shutil, 'rmtree', killed)
        with pytest.raises(KeyboardInterrupt):
            work.remove(folder)
    assert study.plan()['student'] == 'is to be trained'
    rest = folder.with_name('.removed-student-seed0')
    assert (rest / 'result.json').exists()
    monkeypatch.setattr(command, 'execute', lambda *_, **__: None)
    assert main(['study', str(study.path)]) == 0
    assert not rest.exists()
    assert (runs['teacher'].folder / 'result.json').exists()


def test_a_stale_run_leaves_nothing_behind(study):
    run = study.finish()['student']
    run.training.note(fingerprint={**run.inputs, 'config': 'other'})
    assert work.prepare(run, keep_stale=False)
    assert not run.folder.exists()
    assert not list(run.work_dir.glob('.*'))


def test_notes_can_be_broken_off(study):
    run = study.runs()['student']
    run.folder.mkdir(parents=True)
    (run.folder / 'train.json.tmp').write_text('{"beg')
    assert run.changed() == []


def test_lost_time_counts_before_a_run_is_continued(study):
    run = study.runs()['student']
    run.folder.mkdir(parents=True)
    log = run.training.log
    log.touch()
    begun = log.stat().st_mtime - 100
    run.training.note(fingerprint=run.inputs, begun=begun, wall_seconds=50)
    assert work.prepare(run, keep_stale=False), run.failure
    assert run.noted['wall_seconds'] == 150


UNTIL_NOTED = """
import json, time
noted = False
while not noted or time.process_time() < 1:
    noted = json.load(open({notes!r}))['running_cpu_seconds'] > 0
print(time.process_time())
raise SystemExit(3)
"""


def test_running_steps_are_noted(study, monkeypatch):
    """By the loop itself, and only while they run."""
    monkeypatch.setattr(study_step, 'NOTED_EVERY', -1)
    read = study.read()
    (run,) = read.runs = read.of('student')
    step = Step(run.folder, 'train', [], {})
    step.command = ['-c', UNTIL_NOTED.format(notes=str(step.notes))]
    monkeypatch.setattr(type(run), 'training', step)
    with locked(run.work_dir) as lock:
        work.execute(read, 1, lock, keep_stale=False)
    assert 'exit status 3' in run.failure
    told = float(step.log.read_text())
    assert step.state['cpu_seconds'] == pytest.approx(told, abs=0.2)
    assert step.state['begun'] is None


# ------------------------------------------------------------- order and end


@pytest.fixture
def order(tmp_path, monkeypatch):
    """The file to which quick steps, in place of real ones, write."""
    order = tmp_path / 'order'

    def quick(run, name, *_):
        code = QUICK.format(
            name=name, run=run.network, folder=run.folder, order=order
        )
        return Step(run.folder, name, ['-c', code], run.inputs)

    monkeypatch.setattr(Run, '_step', quick)
    return order


QUICK = """
import time
from pathlib import Path

with open('{order}', 'a') as file:
    file.write('{name}:{run} ')
while time.process_time() < 0.2:
    pass
print(time.process_time())
if '{name}' == 'train':
    Path('{folder}', 'epoch_2.pth').write_text('{run}')
else:
    tested = Path('{folder}', 'test', '1')
    tested.mkdir(parents=True)
    (tested / 'x.json').write_text('{{"coco/bbox_mAP": 1}}')
"""


def execute(study, jobs=1, **options):
    read = study.read()
    with locked(read.work_dir) as lock:
        work.execute(read, jobs, lock, keep_stale=False, **options)
    return {run.network: run for run in read.runs}


@pytest.mark.parametrize('jobs', [1, 3])
def test_runs_are_done_in_order_and_once(study, order, jobs, capsys):
    runs = execute(study, jobs)
    for run in runs.values():
        assert run.result['metrics'] == {'coco/bbox_mAP': 1}
        told = float((run.folder / 'train.txt').read_text())
        cost = run.result['training_cpu_seconds']
        assert cost == pytest.approx(told, abs=0.1)
    done = order.read_text().split()
    steps = [f'{step}:{name}' for step in ('train', 'test') for name in runs]
    assert sorted(done) == sorted(steps)
    assert done.index('test:teacher') < done.index('train:distilled')
    parallel = done.index('train:teacher') < done.index('test:student')
    assert parallel == (jobs > 1)
    assert 'distilled-seed0  AP 100.0' in capsys.readouterr().out
    execute(study, jobs)
    assert order.read_text().split() == done


def test_a_failure_can_end_the_others(study, order, monkeypatch):
    """The student fails once the teacher is at work, which never ends."""
    quick = Run._step
    never = f'import signal; open({str(order)!r}, "w"); signal.pause()'
    fails = (
        f'import os\nwhile not os.path.exists({str(order)!r}): pass\n'
        'raise SystemExit(3)'
    )

    def step(run, name, *_):
        made = quick(run, name)
        made.command = ['-c', fails if run.network == 'student' else never]
        return made

    monkeypatch.setattr(Run, '_step', step)
    runs = execute(study, jobs=2, stop_at_failure=True)
    assert 'training failed (exit status 3)' in runs['student'].failure
    teacher = runs['teacher']
    assert not Path('/proc', str(teacher.step.process.pid)).exists()
    # It was noted when it was ended.
    assert 'wall_seconds' in teacher.noted
    assert 'finished' not in teacher.noted
    assert not runs['distilled'].folder.exists()
