"""What a process costs, also one that was killed."""

import os
import signal
import subprocess
import sys
import time

import pytest

from mmkd.errors import MMKDError
from mmkd.study import step as study_step
from mmkd.study.step import Step, cpu_of_session, locked, stop

SPIN = (
    'import time\n'
    'while time.process_time() < {seconds}:\n'
    '    pass\n'
)  # fmt: skip


@pytest.fixture
def spinning(tmp_path, monkeypatch):
    """A step that is at work, and notes its costs at each look."""
    monkeypatch.setattr(study_step, 'NOTED_EVERY', -1)
    step = Step(tmp_path, 'train', ['-c', SPIN.format(seconds=60)], {})
    with locked(tmp_path) as lock:
        step.note(cpu_seconds=100)
        step.start(lock)
        yield step
    if step.process.returncode is None:
        step.process.kill()
        step.process.wait()


def test_the_cpu_time_of_what_is_killed_counts(spinning):
    while spinning.state['running_cpu_seconds'] < 1:
        time.sleep(0.05)
        assert not spinning.ended()
    # The study is killed as well: nobody is told of the process's end.
    spinning.process.send_signal(signal.SIGKILL)
    _, _, usage = os.wait4(spinning.process.pid, 0)
    spinning.process.returncode = -signal.SIGKILL
    seen = spinning.state['running_cpu_seconds']
    assert seen <= usage.ru_utime + usage.ru_stime + 0.1  # it is rounded
    spinning.log.write_text('its last words')
    last_words = spinning.state['begun'] + 7
    os.utime(spinning.log, (last_words, last_words))
    again = Step(spinning.folder, 'train', [], {})
    for _ in range(2):
        again.count_lost_time()
        assert again.state['cpu_seconds'] == pytest.approx(100 + seen)
        assert again.state['wall_seconds'] == 7


def test_the_time_of_what_was_stopped_counts_once(spinning):
    """After Ctrl-C: the processes are stopped, and noted at once."""
    spinning.started -= 5
    assert not spinning.ended()
    spinning.log.write_text('its last words')
    stop([spinning])
    then = spinning.state
    assert then['wall_seconds'] >= 5
    assert then['cpu_seconds'] >= 100
    assert 'finished' not in then
    Step(spinning.folder, 'train', [], {}).count_lost_time()
    assert spinning.state == then


def test_the_time_of_a_killed_study_counts(tmp_path):
    step = Step(tmp_path, 'train', [], {})
    step.note(begun=1000.0, wall_seconds=50)
    step.log.touch()
    os.utime(step.log, (1100, 1100))  # its last words
    for _ in range(2):
        step.count_lost_time()
        assert step.state['wall_seconds'] == 150


def test_a_step_without_a_log_has_lost_no_time(tmp_path):
    """Killed when it was noted as begun, but had not been started."""
    step = Step(tmp_path, 'train', [], {})
    step.note(begun=1000.0)
    step.count_lost_time()
    assert step.state['wall_seconds'] == 0
    assert step.state['begun'] is None


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


def test_the_cpu_time_of_a_session_has_its_workers():
    """Those at work and those that have ended, of no other session."""
    with subprocess.Popen(
        [sys.executable, '-u', '-c', SESSION],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        told = float(process.stdout.readline())
        found = cpu_of_session(process.pid)
        os.killpg(process.pid, signal.SIGKILL)
    assert told > 1
    assert found == pytest.approx(told, abs=0.2)


def test_a_second_process_in_a_folder_is_refused(tmp_path):
    refused = pytest.raises(MMKDError, match='is at work in')
    with locked(tmp_path), refused, locked(tmp_path):
        pass
