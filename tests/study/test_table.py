"""The table of a study, by hand."""

import json
import math

import pytest

from mmkd.study import run as study_run
from mmkd.study.table import gain, write_table
from tests.helpers.studies import cells, finish


def test_the_table_by_hand(study):
    study.content['seeds'] = [0, 1, 2]
    values = {
        'student': [0.40, 0.42, 0.44],
        'teacher': [0.50, 0.52, 0.54],
        'distilled': [0.43, 0.43, 0.47],
    }
    read = study.read()
    for run in read.runs:
        finish(run, run.seed, values[run.network][run.seed])
    text = write_table(read)
    table = json.loads((read.work_dir / 'table.json').read_text())
    # Gains 3, 1 and 3: mean 7/3, deviations 2/3, -4/3 and 2/3, squared and
    # summed 8/3, by n - 1 = 2: 4/3. t = 7/3 / sqrt(4/3 / 3) = 3.5; with two
    # degrees of freedom p = 1 - t / sqrt(t^2 + 2).
    found = table['gains']['distilled']['AP']
    assert found['n'] == 3
    assert found['mean'] == pytest.approx(0.07 / 3)
    assert found['deviation'] == pytest.approx(math.sqrt(4 / 3) / 100)
    assert found['p'] == pytest.approx(1 - 3.5 / math.sqrt(14.25))
    # 40, 42, 44: mean 42, deviation sqrt((4 + 0 + 4) / 2) = 2.
    over = table['runs']['student']['over_seeds']['AP']
    assert over['mean'] == pytest.approx(0.42)
    assert over['deviation'] == pytest.approx(0.02)
    # The teacher is ahead by 10 each time: no spread, no test.
    assert table['gains']['teacher']['AP']['p'] is None
    costs = ['1.5', '1.0', '800', '']
    assert cells(text, 'student') == ['3', '42.0 ± 2.0', *costs]
    assert cells(text, 'distilled')[:2] == ['3', '44.3 ± 2.3']
    hashes = [run.checkpoint_hash[:8] for run in read.of('teacher')]
    assert len(set(hashes)) == 3
    assert cells(text, 'distilled')[-1] == ', '.join(hashes)
    assert cells(text, 'distilled', 1) == ['3', '+2.3 ± 1.2 (p 0.073)']
    assert cells(text, 'teacher', 1) == ['3', '+10.0 ± 0.0']
    assert 'Failed' not in text
    assert 'Stale' not in text


def test_the_table_of_what_is_there(study, monkeypatch):
    study.content['seeds'] = [0, 1]
    read = study.read()
    runs = {run.name: run for run in read.runs}
    for name, ap in (
        ('student-seed0', 0.4),
        ('student-seed1', 0.5),
        ('teacher-seed1', 0.6),
    ):
        finish(runs[name], ap=ap)
    runs['teacher-seed0'].failure = 'training failed, see log'
    monkeypatch.setattr(study_run, 'hash_code', lambda: 'other')
    text = write_table(read)
    table = json.loads((read.work_dir / 'table.json').read_text())
    assert cells(text, 'teacher (stale)')[:2] == ['1', '60.0']
    assert cells(text, 'distilled')[:2] == ['0', '']
    # Seed 1 alone is a pair.
    assert cells(text, 'teacher', 0) == ['1', '+10.0']
    assert '- teacher-seed0: training failed, see log' in text
    assert '- student-seed0: the code of mmkd changed' in text
    assert table['missing'] == ['distilled-seed0', 'distilled-seed1']


def test_a_tiny_p_and_a_loss():
    found = gain([0.1, 0.2, 0.31], [0.6, 0.7, 0.8])
    assert found.p < 0.001
    assert found.text('+') == '-49.7 ± 0.6 (p < 0.001)'
