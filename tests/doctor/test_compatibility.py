"""The compatibility page: what is tried, how it ends, what is written."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import ConfigDict

from mmkd.errors import ConfigError
from tests.helpers import made_data

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'
GFL = 'gfl/gfl_r50_fpn_1x_coco.py'
DETR = 'detr/detr_r50_8xb2-150e_coco.py'
KINDS = (
    *('features', 'class logits', 'RoI'),
    *('assignment', 'distributions', 'cross-head'),
)


@pytest.fixture
def tool():
    from mmkd.doctor import compatibility

    return compatibility


@pytest.fixture
def trial():
    from mmkd.doctor import trial

    return trial


def rows(page, title):
    """Each row's cells by its first, of the table below a title."""
    section = page.split(f'## {title}\n')[1].split('\n## ')[0]
    lines = [x for x in section.splitlines() if x.startswith('| ')]
    cells = [[c.strip() for c in x.strip('|').split('|')] for x in lines]
    return {first: rest for first, *rest in cells}


@pytest.mark.slow
def test_two_families_through_the_real_tool(tmp_path):
    page, kept = tmp_path / 'page.md', tmp_path / 'kept.json'
    command = [
        *(sys.executable, str(TOOLS / 'compatibility.py')),
        *(
            '--only',
            '^(gfl|detr)/',
            '--data',
            str(made_data.root() / 'coco_tiny'),
        ),
        *('--json', str(kept), '--output', str(page)),
    ]

    def run():
        return subprocess.run(
            command, check=True, capture_output=True, text=True
        ).stdout

    assert run().count('plain: works') == 2
    unfit = 'does not fit'
    text = page.read_text()
    table = rows(text, 'Families')
    assert table.pop('') == ['plain', *KINDS]
    # GFL fits all kinds that one-stage heads with a static assignment can.
    assert table == {
        GFL: ['works', 'works', 'works', unfit, unfit, 'works', 'works'],
        DETR: ['works', 'works', *[unfit] * 5],
    }
    assert 'in 2 of 2 families (100.0 %)' in text
    assert '### Fails\n\nNothing.' in text
    # DETR: once, for all kinds of the same reason.
    kinds = 'class logits, distributions, cross-head'
    assert f'do not correspond.\n  * {kinds}: detr\n' in text
    assert 'Not done:' in text  # the page is always of all
    for steps in json.loads(kept.read_text())['trials'].values():
        assert steps['plain']['data'] == 'photos'
        assert steps['plain']['narrow']
    # What is there already is not tried again.
    assert 'plain' not in run()
    assert page.read_text() == text


class TestFamilies:
    def test_every_folder_is_tried_or_left_out_with_a_reason(self, tool):
        from mmkd.doctor.families import CONFIGS, SKIPPED, families

        folders = {
            p.name
            for p in CONFIGS.iterdir()
            if p.is_dir() and p.name != '__pycache__'
        }
        skipped = [name for each in SKIPPED.values() for name in each.split()]
        assert sorted([*families(), *skipped]) == sorted(folders)

    def test_every_config_exists(self, tool):
        from mmkd.doctor.families import CONFIGS

        for pair in tool.all_pairs(''):
            for name in (pair.student, pair.teacher):
                assert (CONFIGS / name).is_file(), name

    def test_only(self, tool):
        names = [pair.name for pair in tool.all_pairs('^(detr/|FCOS)')]
        assert names == ['FCOS to RetinaNet', 'FCOS to ATSS', DETR]


def args(**changes):
    given = dict(jobs=1, limit=60, memory=1000, data=Path('.'))
    return argparse.Namespace(**{**given, **changes})


def outcome(tool, monkeypatch, examine, **changes):
    """What the tool notes down where ``examine`` does what it does."""
    monkeypatch.setattr(tool, 'examine', examine)
    pair = tool.Pair('a', 'a/a.py', 'a/a.py')
    ((name, steps),) = tool.trials([pair], {}, args(**changes))
    assert name == 'a'
    return steps


class TestEnds:
    """A process that ends badly is noted down where it ended."""

    PLAIN = dict(status='works', reason='')

    def test_killed(self, tool, monkeypatch):
        def examine(*pair_and_data):
            pair_and_data[-1]('plain', self.PLAIN)
            os.kill(os.getpid(), 9)

        steps = outcome(tool, monkeypatch, examine)
        assert steps['plain'] == self.PLAIN
        assert steps['features']['status'] == 'fails'
        assert 'killed' in steps['features']['reason']
        assert 'class logits' not in steps

    def test_out_of_time(self, tool, monkeypatch):
        def examine(*_):
            while True:
                pass

        steps = outcome(tool, monkeypatch, examine, limit=1)
        assert 'CPU time' in steps['plain']['reason']

    def test_out_of_memory(self, tool, monkeypatch, trial):
        def examine(*pair_and_data):
            huge = trial.judged(lambda: torch.ones(2**40))
            pair_and_data[-1]('plain', huge)

        steps = outcome(tool, monkeypatch, examine)
        assert steps['plain']['status'] == 'fails'
        assert 'alloc' in steps['plain']['reason']

    def test_what_is_kept_is_not_tried(self, tool, monkeypatch):
        pair = tool.Pair('a', 'a/a.py', 'a/a.py')
        assert list(tool.trials([pair], {'a': {}}, args())) == []


def test_what_is_tried_again(tool):
    kept = {
        'a': dict(plain=dict(status='works'), RoI=dict(status='does not fit')),
        'b': dict(plain=dict(status='fails')),
    }
    assert tool.still_valid(kept, None) == kept
    assert tool.still_valid(kept, 'failed') == dict(a=kept['a'])
    assert tool.still_valid(kept, 'all') == {}


def test_what_is_not_tried_stays_on_the_page(tool, monkeypatch, tmp_path):
    """Also if it has failed: ``--again`` is of those that ``--only`` names."""
    kept, page = tmp_path / 'kept.json', tmp_path / 'page.md'
    verdict = dict(status='fails', reason='old')
    old = {name: dict(plain=verdict) for name in (GFL, DETR)}
    kept.write_text(json.dumps(dict(versions=tool.versions(), trials=old)))

    def examine(*pair_and_data):
        pair_and_data[-1]('plain', dict(status='works', reason=''))

    monkeypatch.setattr(tool, 'examine', examine)
    monkeypatch.setattr(tool.signal, 'signal', lambda *_: None)
    options = ['--only', '^gfl/', '--again', '--memory', '1000']
    files = ['--json', str(kept), '--output', str(page)]
    monkeypatch.setattr(sys, 'argv', ['tool', *options, *files])
    tool.main()
    found = rows(page.read_text(), 'Families')
    assert (found[GFL][0], found[DETR][0]) == ('works', '**fails**')


def test_a_reason_is_written_once():
    from mmkd.doctor.compatibility_page import general, refusals
    from mmkd.doctor.families import Pair

    def fits(model, why='it has no dense head'):
        reason = f'KD fits heads, such as A; the student is {model}: {why}.'
        return dict(status='does not fit', reason=reason)

    heads = [
        "LD distils bins (DFL), the student's AHead predicts none.",
        "LD distils bins (DFL), the teacher's BSepBNHead predicts none.",
    ]
    assert len({general(text) for text in heads}) == 1
    kept = "the student's anchors are not the teacher's."
    assert general(f'KD: {kept}') == kept
    assert general('X: the assignment of the student (AHead) is static.') == (
        'its assignment is static.'
    )
    trials = {
        'a/1.py': dict(logits=fits('A'), LD=fits('A')),
        'a/2.py': dict(logits=fits('A (bbox_head=H)'), LD=fits('A')),
        'b/1.py': dict(logits=fits('B', 'its BRoIHead is odd')),
        'c/1.py': dict(LD=fits('C', 'its CRoIHead is odd')),
        'c/2.py': {},
    }
    pairs = [Pair(name, name, name) for name in trials]
    assert refusals(pairs, trials).splitlines() == [
        '* it has no dense head.',
        '  * logits, LD: a',
        '* its head is odd.',
        '  * logits: b',
        '  * LD: c/1.py',
    ]


class TestVerdicts:
    def test_of_errors(self, trial):
        def refuse():
            raise ConfigError('KD fits X, not 3.5 of Y. Use Z.')

        def fail():
            raise ValueError('two\nlines')

        assert trial.judged(refuse) == dict(
            status='does not fit', reason='KD fits X, not 3.5 of Y.'
        )
        assert trial.judged(fail) == dict(
            status='fails', reason='ValueError: two'
        )
        assert trial.judged(int) == dict(status='works', reason='')

    def test_a_loss_without_gradient_fails(self, trial):
        student = torch.nn.Linear(1, 1)
        loss = student(torch.ones(1)).sum()
        trial._check(student, {'trial.loss_a': loss, 'loss': loss})
        with pytest.raises(trial.TrialError, match='no gradient'):
            trial._check(student, {'trial.loss_a': 0 * loss, 'loss': loss})
        with pytest.raises(trial.TrialError, match=r'loss_b not finite'):
            trial._check(student, {'trial.loss_b': loss / 0})

    def test_steering_that_changes_nothing_fails(self, trial, monkeypatch):
        idle = object.__new__(trial.Trial)
        idle.student, idle.teacher, idle.classes = ConfigDict(), {}, ()
        idle.plain_losses = {'loss': 1.0}
        monkeypatch.setattr(trial, 'build_distiller', lambda *_: Attached())
        idle._train = lambda _: [{'loss': 1.5}, {'loss': 1.0}]
        idle.run({})
        idle._train = lambda _: [{'loss': 1.0}, {'loss': 1.5}]
        with pytest.raises(trial.TrialError, match='that of plain training'):
            idle.run({})


class Attached:
    def attach(self):
        pass


def test_the_page_counts_families_not_configs(tool):
    from mmkd.doctor.compatibility_page import page

    def steps(plain='works', features='works', **more):
        given = {'plain': plain, 'features': features, **more}
        return {k: dict(status=v, reason=f'{k} |') for k, v in given.items()}

    content = dict(
        versions={'torch': '1'},
        trials={
            'a/1.py': steps(),
            'a/2.py': steps(features='fails'),
            'b/1.py': steps(RoI='does not fit'),
            'c/1.py': {'plain': steps(plain='fails')['plain']},
            'a to b': steps(),
        },
    )
    pairs = [tool.Pair(n, n, n) for n in (*content['trials'], 'd/1.py')]
    pairs[4] = tool.Pair('a to b', 'b/1.py', 'a/1.py')
    text = page(pairs, content)
    # c does not run, d was not reached, and one of a's two fails
    assert 'in 1 of 2 families (50.0 %)' in text
    assert '3 families were tried with 4 configs' in text
    assert rows(text, 'Counts')['plain'] == ['3', '0', '1']
    assert rows(text, 'Families')['b/1.py'][:4] == [
        *('works', 'works', '–', 'does not fit')
    ]
    assert rows(text, 'Families')['c/1.py'] == ['**fails**', *['–'] * 6]
    assert list(rows(text, 'Teachers of another kind')) == ['', 'a to b']
    assert '* a/2.py, features: features \\|' in text
    assert 'Not done: 1 of 6 configs' in text
    assert re.search(r'## Not reached\n\n\* d/1\.py\n', text)
