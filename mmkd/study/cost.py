"""What the runs of a study cost, killed ones too."""

import contextlib
import os
import time
from pathlib import Path

from mmkd.engine.logs import complete_rows

from .run import Run, Step, Tested
from .training import Training

COST = ('training_seconds', 'training_cpu_seconds', 'memory_mib', 'memory_of')
NOTED_EVERY = 10
"""Seconds: so much of a killed process's CPU time is lost at most."""


def cost_of(run: Run) -> dict[str, float | str]:
    """Of the training, which may be that of the run it is of."""
    if isinstance(run, Tested):
        theirs = run.source.result
        return {'trained_in': run.source.name} | {k: theirs[k] for k in COST}
    return {
        'training_seconds': run.noted['wall_seconds'],
        'training_cpu_seconds': run.noted['cpu_seconds'],
        **memory_of(run),
    }


def memory_of(run: Run) -> dict[str, float | str]:
    """Peak of the training: the GPU's, as logged, else the process's."""
    logged = [
        row['memory']
        for path in run.folder.glob('2*/vis_data/scalars.json')
        for row in complete_rows(path)
        if 'memory' in row
    ]
    if logged:
        return {'memory_mib': max(logged), 'memory_of': 'GPU'}
    return {'memory_mib': run.noted['peak_mib'], 'memory_of': 'process'}


# ------------------------------------------------------- of a killed process


def note_begun(step: Step) -> None:
    """Note, before a process starts, what else would be lost with this one."""
    before = step.state.get('wall_seconds', 0)
    step.note(begun=time.time(), wall_before=before, running_cpu_seconds=0)


def note_running(step: Step, training: Training) -> None:
    """Note from time to time what only the running process knows."""
    if time.time() - step.notes.stat().st_mtime > NOTED_EVERY:
        peak = max(step.state.get('peak_mib', 0), training.peak)
        step.note(
            running_cpu_seconds=round(cpu_of_session(training.process.pid), 1),
            peak_mib=round(peak, 1),
        )


def note_lost_time(step: Step) -> None:
    """Count the time of a step whose study was killed as well."""
    noted = step.state
    if noted.get('begun') is None:
        return
    wall, cpu = noted.get('wall_seconds', 0), noted.get('cpu_seconds', 0)
    # Otherwise the process had ended, and was counted, before the study.
    if wall == noted.get('wall_before', wall):
        with contextlib.suppress(FileNotFoundError):  # it had not started
            last_words = step.log.stat().st_mtime
            wall += max(last_words - noted['begun'], 0)
        cpu += noted.get('running_cpu_seconds', 0)
    step.note(
        begun=None, wall_seconds=round(wall, 1), cpu_seconds=round(cpu, 1)
    )


def cpu_of_session(leader: int) -> float:
    """CPU seconds of a process and all that it has started (Linux).

    A process in a session of its own: workers that load data are in it.
    """
    ticks = 0
    for path in Path('/proc').glob('[0-9]*/stat'):
        with contextlib.suppress(OSError):
            # The name before, in brackets, may hold anything. Then: state,
            # parent, group, session, ..., from the 12th on the time of the
            # process and of its ended children, in user and system mode.
            fields = path.read_text().rpartition(')')[2].split()
            if int(fields[3]) == leader:
                ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf('SC_CLK_TCK')
