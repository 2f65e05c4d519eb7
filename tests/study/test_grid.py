"""Grids in a study's file: options, teachers and data multiply the runs."""

import pytest
import yaml

from mmkd.errors import ConfigError
from mmkd.study import command
from mmkd.study.grid import expand
from mmkd.study.table import write_table
from tests.helpers import toy
from tests.helpers.studies import cells, finish

LR = 'optim_wrapper.optimizer.lr'
EPOCHS = 'train_cfg.max_epochs'
ROOT_OF_DATA = 'train_dataloader.dataset.data_root'
TWO = {'tiny': None, 'voc': {ROOT_OF_DATA: 'voc/'}}


@pytest.fixture
def content(content, configs):
    """A grid, but without data."""
    plain = {'config': str(configs / 'plain.py')}
    runs = {
        'kd': {
            'config': str(configs / 'distilled.py'),
            'teachers': ['a', 'b'],
            'options': {EPOCHS: 3, LR: 0.3},
        },
        'student': plain,
        'a': plain,
        'b': {**plain, 'options': {EPOCHS: 5}},
    }
    return {**content, 'runs': runs}


# ----------------------------------------------------------------- the rows


def test_teachers_multiply_a_run(study):
    runs = study.runs()
    assert list(runs) == ['student', 'a', 'kd-a', 'b', 'kd-b']
    for teacher in 'ab':
        run = runs[f'kd-{teacher}']
        assert run.teacher is runs[teacher]
        assert run.config.train_cfg.max_epochs == 3


def test_options_multiply_a_run_and_win(study):
    study.networks['kd']['each'] = {'slow': {LR: 0.1}, 'as-given': None}
    rates = {
        name: run.config.optim_wrapper.optimizer.lr
        for name, run in study.runs().items()
        if name.startswith('kd')
    }
    assert rates == {
        'kd-slow-a': 0.1,
        'kd-slow-b': 0.1,
        'kd-as-given-a': 0.3,
        'kd-as-given-b': 0.3,
    }


def test_data_multiply_every_run(study):
    """The teacher and the baseline of a row have its data."""
    study.content |= {'data': TWO, 'seeds': [0, 4]}
    read = study.read()
    assert read.networks == [
        'student-tiny', 'student-voc', 'a-tiny', 'kd-a-tiny', 'a-voc',
        'kd-a-voc', 'b-tiny', 'kd-b-tiny', 'b-voc', 'kd-b-voc',
    ]  # fmt: skip
    for run in read.runs:
        data = run.network.rpartition('-')[2]
        root = run.config.train_dataloader.dataset.data_root
        assert (root == 'voc/') == (data == 'voc')
        assert read.baselines[run.network] == f'student-{data}'
        if run.network.startswith('kd'):
            label = run.network.split('-')[1]
            assert run.teacher.name == f'{label}-{data}-seed{run.seed}'
    assert len(read.runs) == 20


def test_data_of_a_run_add_to_those_of_the_study(study):
    study.content['data'] = TWO
    study.networks['kd']['data'] = {'voc': {LR: 0.7}}
    runs = study.runs()
    rows = [name for name in runs if name.startswith('kd')]
    assert rows == ['kd-a-voc', 'kd-b-voc']
    config = runs['kd-a-voc'].config
    assert config.train_dataloader.dataset.data_root == 'voc/'
    assert config.optim_wrapper.optimizer.lr == 0.7


def test_a_teacher_of_no_data_teaches_on_any(study):
    """Without a row of its data, a row is compared with none."""
    study.networks['kd']['data'] = TWO
    read = study.read()
    assert read.of('kd-b-voc')[0].teacher is read.of('b')[0]
    assert read.baselines == dict.fromkeys(('student', 'a', 'b'), 'student')


def test_one_row_can_be_named(study):
    kd = study.networks['kd']
    study.networks['late'] = {'config': kd['config'], 'teacher': 'b-voc'}
    study.content |= {'data': TWO, 'baseline': 'kd-a'}
    read = study.read()
    for data in TWO:
        assert read.of(f'late-{data}')[0].teacher is read.of('b-voc')[0]
        assert read.baselines[f'b-{data}'] == f'kd-a-{data}'


def test_what_is_of_a_run_is_of_each_of_its_rows():
    runs = {
        'dml': {'config': 'c.py', 'each': {'x': {}, 'y': {}}},
        'second': {'of': 'dml', 'network': 'second'},
        'of-x': {'of': 'dml-x', 'network': 'second'},
    }
    rows = expand(runs, {'d': {}, 'e': {}}, 'file')
    found = {name: row.options.get('of') for name, row in rows.items()}
    grid = [f'{each}-{data}' for each in 'xy' for data in 'de']
    assert found == {
        **{f'dml-{point}': None for point in grid},
        **{f'second-{point}': f'dml-{point}' for point in grid},
        **{f'of-x-{point}': f'dml-{point}' for point in grid[:2]},
    }


@pytest.mark.parametrize('name', ['bccd', 'bccd_frcnn', 'bccd_lad'])
def test_without_a_grid_the_rows_are_the_runs(name):
    file = toy.ROOT / 'studies' / f'{name}.yaml'
    runs = yaml.safe_load(file.read_text())['runs']
    rows = expand(runs, {}, 'file')
    assert list(rows) == list(runs)
    assert {name: row.options for name, row in rows.items()} == runs


def test_the_help_tells_the_rows():
    _, _, example = command.__doc__.partition('combination.\n')
    content = yaml.safe_load(example.partition('These are')[0])
    rows = list(expand(content['runs'], content['data'], 'help'))
    told = ['big-bccd', 'big-voc', 'huge-bccd', 'kd-warm-big-bccd']
    assert [name for name in rows if name in told] == told
    assert rows[-1] == 'kd-hot-huge-voc'
    assert len(rows) == 14


# ---------------------------------------------------------------- its errors


@pytest.mark.parametrize(
    ('run', 'message'),
    [
        (dict(each=['x']), 'x.each must map names to options'),
        (dict(each={}), 'x.each must map names to options'),
        (dict(each={'y': 3}), r"x.each must map .* got {'y': 3}"),
        (dict(each={'a/b': {}}), r"x.each: the name 'a/b' becomes that of a"),
        (dict(each={4: {}}), 'x.each: the name 4 becomes that of a folder'),
        (
            dict(each={'y': {'train_cfgs.max_epochs': 1}}),
            'x-y.*no option "train_cfgs". Did you mean "train_cfg"',
        ),
        (dict(teachers='a'), "x.teachers must be a list of .* got 'a'"),
        (dict(teachers=[]), 'x.teachers must be a list of different runs'),
        (dict(teachers=['a', 'a']), 'must be a list of different runs'),
        (dict(teachers=['a'], teacher='b'), 'the run has a "teacher", too'),
        (dict(teachers=['a', 'bb']), 'x.teacher names the run "bb", which'),
        (dict(teacher=['a', 'b']), r'x.teacher must be .* "teachers: \[a, b'),
        (dict(teacher='kd'), 'one teacher with its data, .* has kd-a, kd-b'),
        (dict(data={'d': {'no': 1}}), r'runs.x-d.options: .* no option "no"'),
        (dict(of='kd', each={}), 'cannot have config, each of its own'),
    ],
)
def test_a_wrong_grid_is_refused(study, run, message):
    config = study.networks['kd']['config']
    study.networks['x'] = {'config': config, **run}
    with pytest.raises(ConfigError, match=message):
        study.read()


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(data={}), 'data must map names to options'),
        (dict(data=['voc']), 'data must map names to options'),
        (dict(data={'v o c': {}}), "data: the name 'v o c' becomes that"),
        (dict(baseline='kd'), '"kd" is more than one row for the same data'),
        (dict(baseline='kd-c'), r'baseline names .* Did you mean "kd-'),
    ],
)
def test_a_wrong_study_is_refused(study, changes, message):
    study.content |= changes
    with pytest.raises(ConfigError, match=message):
        study.read()


def test_unknown_data_of_a_run_are_refused(study):
    study.content['data'] = TWO
    study.networks['kd']['data'] = {'vok': {}}
    message = r'kd.data: the study has no data "vok". Did you mean "voc"\?'
    with pytest.raises(ConfigError, match=message):
        study.read()


def test_two_rows_of_one_name_are_refused(study):
    study.networks['kd-a'] = study.networks['student']
    message = r'runs.kd-a has the row "kd-a", but so has runs.kd. Rename'
    with pytest.raises(ConfigError, match=message):
        study.read()


# ----------------------------------------------------------------- the table


def test_gains_are_over_the_same_data(study):
    for name in ('kd', 'b'):
        del study.networks[name]
    study.content['data'] = TWO
    read = study.read()
    values = {'student-tiny': 0.2, 'student-voc': 0.5, 'a-tiny': 0.3,
              'a-voc': 0.55}  # fmt: skip
    for run in read.runs:
        finish(run, ap=values[run.network])
    text = write_table(read)
    assert cells(text, 'a-tiny', 1) == ['1', '+10.0']
    assert cells(text, 'a-voc', 1) == ['1', '+5.0']
    assert '| student-' not in text.partition('gain over student')[2]
    assert 'of the same seed and data' in text
