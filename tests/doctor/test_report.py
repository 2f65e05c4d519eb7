"""The report says first what was found, and nothing else is printed."""

import json
import subprocess
import sys

from mmkd.doctor.report import Report
from tests.doctor.test_traps import config
from tests.helpers import toy


def a_report():
    report = Report()
    report.say('Taps', 'level 0', 'level 1')
    report.fold('Taps', 'two levels')
    report.find('it is fast', 'notes')
    report.find('one ' * 30, 'warns')
    report.find('it cannot work')
    report.find('it cannot work')
    return report


def test_the_worst_comes_first():
    lines = a_report().text().splitlines()
    assert lines[0] == '1 finding that stops, 1 warning, 1 note'
    titles = ['Findings', 'Warnings', 'Notes', 'Taps']
    assert [line for line in lines if line in titles] == titles
    assert lines[3] == '  1. it cannot work'


def test_it_fits_a_terminal():
    lines = a_report().text(width=40).splitlines()
    assert max(map(len, lines)) <= 40
    start = lines.index('Warnings') + 1
    assert lines[start].startswith('  1. one one')
    assert lines[start + 1].startswith('     one one')


def test_taps_are_folded():
    assert '  two levels' in a_report().text()
    assert 'level 1' not in a_report().text()
    assert '  level 1' in a_report().text(verbose=True)


def test_nothing_else_is_printed(tmp_path):
    """Not even by COCO's tools, third parties and imports; warnings pass."""
    cfg = config(tmp_path, loss_weight=100)
    path, figures = toy.write(cfg, tmp_path / 'c.py'), tmp_path / 'f.json'
    done = subprocess.run(
        [sys.executable, '-m', 'mmkd', 'doctor', path, '--json', figures],
        cwd=toy.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ''
    told = done.stdout.split('Notes')[0]
    assert told.startswith('1 warning')
    assert 'Warnings\n  1. kd.loss_cwd ' in told
    kept = json.loads(figures.read_text())
    assert (kept['stops'], len(kept['warns'])) == ([], 1)
    # One row of all levels, which --verbose shows.
    assert done.stdout.count('student  neck') == 1
    assert len(kept['sections']['Taps']) == 11
