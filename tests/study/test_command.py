"""Real studies: killed and continued, failing, at work twice."""

import json
import signal

import pytest

from mmkd.study.step import locked
from tests.helpers.hold import reached
from tests.helpers.studies import HELD, cells, kill, run_all, start, wait_for


@pytest.mark.slow
def test_a_study_is_killed_resumed_and_not_repeated(
    study, code, tmp_path, hold
):
    study.networks['teacher']['options'] = HELD
    path, folder = study.write(), tmp_path / 'study'
    first = start(path, code)
    wait_for(first, reached(hold))
    kill(first, folder, hold)
    kept = (folder / 'student-seed0' / 'result.json').read_bytes()

    status, output = run_all(path, code, '--jobs', '2')
    assert status == 0, output
    assert 'student-seed0    done' in output
    assert 'teacher-seed0    is continued' in output
    log = (folder / 'teacher-seed0' / 'train.txt').read_text()
    assert log.count('resumed epoch: 1') == 1
    assert (folder / 'student-seed0' / 'result.json').read_bytes() == kept

    table = json.loads((folder / 'table.json').read_text())
    assert set(table['runs']) == {'student', 'teacher', 'distilled'}
    for network, rows in table['runs'].items():
        row = rows['by_seed']['0']
        tested = (folder / f'{network}-seed0' / 'test').glob('*/*.json')
        assert row['metrics'] == json.loads(next(tested).read_text())
        assert row['training_seconds'] > 1
        assert row['training_cpu_seconds'] > 1
        assert 200 < row['memory_mib'] < 20_000
    teacher = table['runs']['teacher']['by_seed']['0']
    distilled = table['runs']['distilled']['by_seed']['0']
    assert distilled['inputs']['teacher'] == teacher['checkpoint']
    log = (folder / 'distilled-seed0' / 'train.txt').read_text()
    assert 'hint.loss_hint' in log
    assert (folder / 'table.md').read_text().strip() in output

    status, output = run_all(path, code)
    assert status == 0
    assert output.count('-seed0') == output.count('done') == 3

    with (code / 'mmkd' / 'utils.py').open('a') as file:
        file.write('\n')
    status, output = run_all(path, code, '--dry-run')
    assert status == 0
    assert output.count('stale: the code of mmkd changed') == 2
    assert 'distilled-seed0  waits for teacher-seed0' in output
    status, output = run_all(path, code, '--keep-stale')
    assert status == 0
    assert '| student (stale)' in output
    assert (folder / 'student-seed0' / 'result.json').read_bytes() == kept


@pytest.mark.slow
def test_a_failing_run_leaves_the_others(study, code, configs, tmp_path, hold):
    distilled = {'config': str(configs / 'distilled.py')}
    wrong = {'distillation.methods.hint.source': 'nek'}
    study.networks.update(
        {
            'teacher': {**distilled, 'options': wrong},
            'distilled': {**distilled, 'teacher': 'teacher'},
        }
    )
    path = study.write()
    status, output = run_all(path, code)
    assert status == 1, output
    log = tmp_path / 'study' / 'teacher-seed0' / 'train.txt'
    assert 'Did you mean "neck"?' in log.read_text()
    assert f'- teacher-seed0: training failed (exit status 1), see {log}' in (
        output
    )
    assert '- distilled-seed0: not run: teacher-seed0 failed' in output
    assert cells(output, 'student')[0] == '1'
    assert cells(output, 'teacher')[0] == '0'

    with locked(tmp_path / 'study'):  # one at a time in a folder
        second, output = run_all(path, code)
    assert second == 1
    assert 'another process' in output

    held = {'config': str(configs / 'plain.py'), 'options': HELD}
    study.networks['student'] = held
    third = start(study.write(), code)
    wait_for(third, reached(hold))
    third.send_signal(signal.SIGTERM)
    hold.unlink()
    third.communicate()
    assert third.returncode == 143
