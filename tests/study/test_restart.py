"""Studies that were killed at a bad moment, or lost their checkpoints."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.study.test_study import (
    a_checkpoint,
    content,
    finish,
    plan,
    write_configs,
)

SPIN = (
    'import time\n'
    'while time.process_time() < {seconds}:\n'
    '    pass\n'
)  # fmt: skip
GONE = 'a checkpoint of teacher-seed0 is gone or damaged. Bring it back to '


@pytest.fixture
def tool():
    from mmkd.study import command as study

    return study


@pytest.fixture
def costs(monkeypatch):
    """The module of costs, which notes at each look."""
    from mmkd.study import cost as study_cost

    monkeypatch.setattr(study_cost, 'NOTED_EVERY', -1)
    return study_cost


@pytest.fixture
def step_of():
    from mmkd.study.run import Step

    return Step


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp('configs'))


@pytest.fixture
def study(configs, tmp_path):
    """Writes a study's file and reads it."""
    from mmkd.study.study import read_study

    def study(**changes):
        path = tmp_path / 'study.yaml'
        path.write_text(yaml.dump(content(configs, tmp_path, **changes)))
        return path, {run.network: run for run in read_study(path).runs}

    return study


@pytest.fixture
def done(study):
    """A study whose runs are done."""
    path, runs = study(metrics={'AP': 'coco/bbox_mAP'})
    for name in ('student', 'teacher', 'distilled'):
        finish(runs[name])
    return path, runs


# ---------------------------------------------------------- lost checkpoints


@pytest.fixture(params=['removed', 'named', 'damaged', 'last'])
def lost(request, done):
    """The same without the teacher's checkpoint."""
    path, runs = done
    file = runs['teacher'].folder / 'epoch_2.pth'
    if request.param == 'damaged':
        os.truncate(file, 100)
    else:
        file.unlink()
    if request.param in ('named', 'last'):
        (file.parent / 'last_checkpoint').write_text(str(file))
    if request.param == 'last':
        a_checkpoint(file.parent).rename(file.with_name('epoch_1.pth'))
    return path, runs


def test_what_needs_no_lost_checkpoint_is_done(tool, lost, capsys):
    path, _ = lost
    assert set(plan(tool, path, capsys).values()) == {'done'}


def test_nothing_is_trained_from_a_lost_teacher(
    tool, lost, study, configs, tmp_path, capsys
):
    runs = content(configs, tmp_path)['runs']
    runs['distilled']['options'] = {'optim_wrapper.optimizer.lr': 0.5}
    path, now = study(runs=runs, metrics={'AP': 'coco/bbox_mAP'})
    told = plan(tool, path, capsys)
    assert told['teacher'] == told['student'] == 'done'
    assert told['distilled'].startswith(
        f'stale: its config changed, but {GONE}'
    )
    run = now['distilled']
    assert not tool.prepare(run, keep_stale=False)
    assert run.failure.startswith(f'not run: {GONE}{now["teacher"].folder}')
    assert 'remove that folder to train it again' in run.failure
    assert run.result  # what there was is kept
    assert not run.config_file.exists()


def test_a_test_needs_no_teacher(tool, lost, capsys):
    path, runs = lost
    run = runs['distilled']
    (run.folder / 'result.json').unlink()
    assert plan(tool, path, capsys)['distilled'] == 'is continued'
    assert tool.prepare(run, keep_stale=False)
    assert run.next_step.name == 'test'


def test_what_was_never_tested_is_trained_again(tool, lost):
    """Not tested with the checkpoint ``None``."""
    _, runs = lost
    (runs['teacher'].folder / 'result.json').unlink()
    assert runs['teacher'].next_step.name == 'train'


# ------------------------------------------------------------------- killed


def test_a_removal_can_be_broken_off(tool, done, monkeypatch, capsys):
    """At its first file, by which a folder is known to be a study's."""
    path, runs = done
    folder = runs['student'].folder
    remove_all = tool.shutil.rmtree

    def killed(folder, **_):
        (folder / 'train.json').unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(tool.shutil, 'rmtree', killed)
    with pytest.raises(KeyboardInterrupt):
        tool.remove(folder)
    monkeypatch.setattr(tool.shutil, 'rmtree', remove_all)
    assert plan(tool, path, capsys)['student'] == 'is to be trained'
    rest = folder.with_name('.removed-student-seed0')
    assert (rest / 'result.json').exists()
    monkeypatch.setattr(tool, 'execute', lambda *_: None)
    assert tool.main([str(path)]) == 0
    assert not rest.exists()
    assert (runs['teacher'].folder / 'result.json').exists()


def test_a_stale_run_leaves_nothing_behind(tool, done):
    _, runs = done
    run = runs['student']
    run.training.note(fingerprint={**run.inputs, 'config': 'other'})
    assert tool.prepare(run, keep_stale=False)
    assert not run.folder.exists()
    assert not list(run.work_dir.glob('.*'))


def test_notes_can_be_broken_off(study):
    _, runs = study()
    folder = runs['student'].folder
    folder.mkdir(parents=True)
    (folder / 'train.json.tmp').write_text('{"beg')
    assert runs['student'].changed() == []


def test_a_step_without_a_log_has_lost_no_time(tool, study):
    """Killed when it was noted as begun, but had not been started."""
    _, runs = study()
    run = runs['student']
    run.folder.mkdir(parents=True)
    run.training.note(begun=1000.0, fingerprint=run.inputs)
    assert tool.prepare(run, keep_stale=False), run.failure
    assert run.noted['wall_seconds'] == 0
    assert run.noted['begun'] is None


# -------------------------------------------------------------------- costs


@pytest.fixture
def spinning(tool, step_of, tmp_path):
    """A step that is at work, and a way to end it without a word."""
    step = step_of(tmp_path, 'train', ['-c', SPIN.format(seconds=60)], {})
    with (tmp_path / '.lock').open('w') as lock:
        tool.note_begun(step)
        training = tool.Training.start(step, lock.fileno())
        yield step, training
    if training.process.returncode is None:
        training.process.kill()
        training.process.wait()


def test_the_cpu_time_of_what_is_killed_counts(costs, spinning):
    step, training = spinning
    step.note(cpu_seconds=100)
    while step.state['running_cpu_seconds'] < 1:
        assert training.process.poll() is None
        time.sleep(0.05)
        costs.note_running(step, training)
    _, _, usage = kill(training)
    seen = step.state['running_cpu_seconds']
    assert seen <= usage.ru_utime + usage.ru_stime + 0.1  # it is rounded
    step.log.write_text('its last words')
    last_words = step.state['begun'] + 7
    os.utime(step.log, (last_words, last_words))
    for _ in range(2):
        costs.note_lost_time(step)
        assert step.state['cpu_seconds'] == pytest.approx(100 + seen)
        assert step.state['wall_seconds'] == 7


def kill(training):
    training.process.send_signal(signal.SIGKILL)
    ended = os.wait4(training.process.pid, 0)
    training.process.returncode = -signal.SIGKILL
    return ended


def test_the_time_of_what_was_stopped_counts_once(tool, costs, spinning):
    """After Ctrl-C: the processes are stopped, and noted at once."""
    step, training = spinning
    training.started -= 5
    step.log.write_text('its last words')
    step.note(running_cpu_seconds=0.4)
    tool.stop([training])
    then = step.state
    assert then['wall_seconds'] >= 5
    assert then['begun'] is not None
    costs.note_lost_time(step)
    for key in ('wall_seconds', 'cpu_seconds'):
        assert step.state[key] == then[key]


# Of processes that tell what they have taken, and then take no more.
SESSION = f"""
import resource, subprocess, sys, time
spin = {SPIN.format(seconds=0.5)!r}
subprocess.run([sys.executable, '-c', spin], check=True)
command = [sys.executable, '-c', spin + 'print(time.process_time()); input()']
other = subprocess.Popen(
    [command[0], '-u', *command[1:]], stdin=-1, stdout=-1, text=True
)
at_work = float(other.stdout.readline())
ended = resource.getrusage(resource.RUSAGE_CHILDREN)
print(at_work + ended.ru_utime + ended.ru_stime + time.process_time())
input()
"""


def test_the_cpu_time_of_a_session_has_its_workers(costs):
    """Those at work and those that have ended, of no other session."""
    with subprocess.Popen(
        [sys.executable, '-u', '-c', SESSION],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        told = float(process.stdout.readline())
        found = costs.cpu_of_session(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
    assert told > 1
    assert found == pytest.approx(told, abs=0.2)


UNTIL_NOTED = """
import json, time
noted = False
while not noted or time.process_time() < 1:
    noted = json.load(open({notes!r}))['running_cpu_seconds'] > 0
print(time.process_time())
raise SystemExit(3)
"""


def test_running_steps_are_noted(tool, costs, step_of, study, monkeypatch):
    """By the loop itself, and only while they run."""
    path, runs = study()
    run = runs['student']
    step = step_of(run.folder, 'train', [], {})
    step.command[:] = ['-c', UNTIL_NOTED.format(notes=str(step.notes))]
    monkeypatch.setattr(type(run), 'training', step)
    whole = tool.read_study(path)
    whole.runs = [run]
    run.work_dir.mkdir()
    with tool.locked(run.work_dir) as lock:
        tool.execute(whole, 1, lock, False)
    assert 'exit status 3' in run.failure
    noted = json.loads(step.notes.read_text())
    told = float(step.log.read_text())
    assert noted['cpu_seconds'] == pytest.approx(told, abs=0.2)
    assert noted['begun'] is None
