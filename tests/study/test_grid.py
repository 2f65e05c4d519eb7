"""Grids in a study's file: options, teachers and data multiply the runs."""

import copy

import pytest
import yaml

from mmkd.errors import ConfigError
from tests.study.test_study import ROOT, finish, write_configs

LR = 'optim_wrapper.optimizer.lr'
EPOCHS = 'train_cfg.max_epochs'
ROOT_OF_DATA = 'train_dataloader.dataset.data_root'


@pytest.fixture
def grid():
    from mmkd.study import grid

    return grid


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp('configs'))


@pytest.fixture
def content(configs, tmp_path):
    """A grid as its file would say it, but without data."""
    plain = {'config': str(configs / 'plain.py')}
    return {
        'work_dir': str(tmp_path / 'study'),
        'baseline': 'student',
        'metrics': {'AP': 'coco/bbox_mAP'},
        'runs': {
            'kd': {
                'config': str(configs / 'distilled.py'),
                'teachers': ['a', 'b'],
                'options': {EPOCHS: 3, LR: 0.3},
            },
            'student': plain,
            'a': plain,
            'b': {**plain, 'options': {EPOCHS: 5}},
        },
    }


@pytest.fixture
def read(tmp_path):
    from mmkd.study.study import read_study

    def read(content):
        path = tmp_path / 'study.yaml'
        path.write_text(yaml.dump(copy.deepcopy(content), sort_keys=False))
        return read_study(path)

    return read


TWO = {'tiny': None, 'voc': {ROOT_OF_DATA: 'voc/'}}


# ----------------------------------------------------------------- the rows


def test_teachers_multiply_a_run(read, content):
    study = read(content)
    assert study.networks == ['student', 'a', 'kd-a', 'b', 'kd-b']
    for teacher in 'ab':
        (run,) = study.of(f'kd-{teacher}')
        assert run.teacher is study.of(teacher)[0]
        assert run.config.train_cfg.max_epochs == 3


def test_options_multiply_a_run_and_win(read, content):
    content['runs']['kd'] |= {
        'each': {'slow': {LR: 0.1}, 'as-given': None},
    }
    study = read(content)
    rates = {
        run.network: run.config.optim_wrapper.optimizer.lr
        for run in study.runs
        if run.network.startswith('kd')
    }
    assert rates == {
        'kd-slow-a': 0.1,
        'kd-slow-b': 0.1,
        'kd-as-given-a': 0.3,
        'kd-as-given-b': 0.3,
    }


def test_data_multiply_every_run(read, content):
    """The teacher and the baseline of a row have its data."""
    study = read({**content, 'data': TWO, 'seeds': [0, 4]})
    assert study.networks == [
        'student-tiny', 'student-voc', 'a-tiny', 'kd-a-tiny', 'a-voc',
        'kd-a-voc', 'b-tiny', 'kd-b-tiny', 'b-voc', 'kd-b-voc',
    ]  # fmt: skip
    for run in study.runs:
        data = run.network.rpartition('-')[2]
        root = run.config.train_dataloader.dataset.data_root
        assert (root == 'voc/') == (data == 'voc')
        assert study.baselines[run.network] == f'student-{data}'
        if run.network.startswith('kd'):
            label = run.network.split('-')[1]
            assert run.teacher.name == f'{label}-{data}-seed{run.seed}'
    assert len(study.runs) == 20


def test_data_of_a_run_add_to_those_of_the_study(read, content):
    content['runs']['kd']['data'] = {'voc': {LR: 0.7}}
    study = read({**content, 'data': TWO})
    rows = [name for name in study.networks if name.startswith('kd')]
    assert rows == ['kd-a-voc', 'kd-b-voc']
    config = study.of('kd-a-voc')[0].config
    assert config.train_dataloader.dataset.data_root == 'voc/'
    assert config.optim_wrapper.optimizer.lr == 0.7


def test_a_teacher_of_no_data_teaches_on_any(read, content):
    """A run's data alone; without its like, there is nothing to compare."""
    content['runs']['kd']['data'] = TWO
    study = read(content)
    assert study.of('kd-b-voc')[0].teacher is study.of('b')[0]
    assert study.baselines == {'student': 'student', 'a': 'student',
                               'b': 'student'}  # fmt: skip


def test_one_row_can_be_named(read, content):
    content['runs']['late'] = {
        'config': content['runs']['kd']['config'],
        'teacher': 'b-voc',
    }
    content['baseline'] = 'kd-a'
    study = read({**content, 'data': TWO})
    for data in TWO:
        assert study.of(f'late-{data}')[0].teacher is study.of('b-voc')[0]
        assert study.baselines[f'b-{data}'] == f'kd-a-{data}'


def test_what_is_of_a_run_is_of_each_of_its_rows(grid):
    runs = {
        'dml': {'config': 'c.py', 'each': {'x': {}, 'y': {}}},
        'second': {'of': 'dml', 'network': 'second'},
        'of-x': {'of': 'dml-x', 'network': 'second'},
    }
    rows = grid.expand(runs, {'d': {}, 'e': {}}, 'file')
    found = {name: row.options.get('of') for name, row in rows.items()}
    assert found == {
        'dml-x-d': None,
        'dml-x-e': None,
        'dml-y-d': None,
        'dml-y-e': None,
        'second-x-d': 'dml-x-d',
        'second-x-e': 'dml-x-e',
        'second-y-d': 'dml-y-d',
        'second-y-e': 'dml-y-e',
        'of-x-x-d': 'dml-x-d',
        'of-x-x-e': 'dml-x-e',
    }


@pytest.mark.parametrize('name', ['bccd', 'bccd_frcnn', 'bccd_lad'])
def test_a_file_without_a_grid_is_what_it_was(grid, name):
    """Its rows are its runs."""
    file = ROOT / 'studies' / f'{name}.yaml'
    runs = yaml.safe_load(file.read_text())['runs']
    rows = grid.expand(runs, {}, 'file')
    assert list(rows) == list(runs)
    assert {name: row.options for name, row in rows.items()} == runs


def test_the_help_tells_the_rows(grid, read):
    from mmkd.study import command as study

    _, _, example = study.__doc__.partition('combination.\n')
    content = yaml.safe_load(example.partition('These are')[0])
    rows = list(grid.expand(content['runs'], content['data'], 'help'))
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
        (dict(teacher='kd'), 'one teacher with its data; "kd" has kd-a, kd-b'),
        (dict(data={'d': {'no': 1}}), r'runs.x-d.options: .* no option "no"'),
        (dict(of='kd', each={}), 'cannot have config, each of its own'),
    ],
)
def test_a_wrong_grid_is_refused(read, content, run, message):
    content['runs']['x'] = {'config': content['runs']['kd']['config'], **run}
    with pytest.raises(ConfigError, match=message):
        read(content)


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
def test_a_wrong_study_is_refused(read, content, changes, message):
    with pytest.raises(ConfigError, match=message):
        read({**content, **changes})


def test_unknown_data_of_a_run_are_refused(read, content):
    content['runs']['kd']['data'] = {'vok': {}}
    message = r'kd.data: the study has no data "vok". Did you mean "voc"\?'
    with pytest.raises(ConfigError, match=message):
        read({**content, 'data': TWO})


def test_two_rows_of_one_name_are_refused(read, content):
    content['runs']['kd-a'] = content['runs']['student']
    message = r'runs.kd-a has the row "kd-a", but so has runs.kd. Rename'
    with pytest.raises(ConfigError, match=message):
        read(content)


# ----------------------------------------------------------------- the table


def test_gains_are_over_the_same_data(read, content, tmp_path):
    from mmkd.study.table import write_table

    content['runs'] = {key: content['runs'][key] for key in ('student', 'a')}
    study = read({**content, 'data': TWO})
    values = {'student-tiny': 0.2, 'student-voc': 0.5, 'a-tiny': 0.3,
              'a-voc': 0.55}  # fmt: skip
    for run in study.runs:
        finish(run, **{'coco/bbox_mAP': values[run.network]})
    text = write_table(study)
    gains = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in text.partition('gain over student')[2].splitlines()
        if line.startswith('| a-')
    ]
    assert gains == [['a-tiny', '1', '+10.0'], ['a-voc', '1', '+5.0']]
    assert '| student-' not in text.partition('gain over student')[2]
    assert 'of the same seed and data' in text
