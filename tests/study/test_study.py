"""The file of a study: what it describes, and what is refused."""

import codecs
import datetime
import shutil

import pytest

from mmkd.cli import main
from mmkd.detectors.source import load_config
from mmkd.errors import ConfigError, DataError, MMKDError
from mmkd.study.file import read_yaml
from mmkd.study.step import locked, read_json, write_json
from mmkd.study.study import read_study
from tests.helpers import toy
from tests.helpers.studies import a_checkpoint


def test_teachers_come_first_and_seeds_are_set(study):
    study.content['seeds'] = [4, 1]
    runs = study.read().runs
    assert [run.name for run in runs] == [
        'student-seed4', 'student-seed1', 'teacher-seed4', 'teacher-seed1',
        'distilled-seed4', 'distilled-seed1',
    ]  # fmt: skip
    for run in runs:
        assert run.config.randomness.seed == run.seed
        if run.network == 'distilled':
            assert run.teacher.name == f'teacher-seed{run.seed}'
    assert runs[0].config.train_cfg.max_epochs == 1
    assert runs[2].config.train_cfg.max_epochs == 2


def test_the_written_config_has_the_options_and_the_teacher(study, tmp_path):
    study.networks['distilled']['options'] = {
        'distillation.methods.hint.levels': [0, 2],
        'distillation.methods.hint.loss': None,
        'optim_wrapper.optimizer.lr': 1e-3,
    }
    run = study.runs()['distilled']
    run.teacher.folder.mkdir(parents=True)
    shutil.copy(a_checkpoint(tmp_path), run.teacher.folder / 'epoch_2.pth')
    run.write_config()
    run.teacher.write_config()
    written = load_config(run.config_file)
    hint = written.distillation.methods.hint
    assert (hint.levels, hint.loss) == ([0, 2], None)
    assert written.optim_wrapper.optimizer.lr == 1e-3
    teacher = written.distillation.teacher
    assert teacher.checkpoint == str(run.teacher.folder / 'epoch_2.pth')
    assert load_config(teacher.config).model == run.teacher.config.model


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(sedes=[1]), r'no option "sedes". Did you mean "seeds"\?'),
        (dict(seeds=[1, 1]), r'different whole numbers.*got \[1, 1\]'),
        (dict(seeds=[True]), r'different whole numbers'),
        (dict(seeds=[-1]), r'whole numbers from 0 to 4294901759'),
        (dict(seeds=[2**32]), r'whole numbers from 0 to 4294901759'),
        (dict(seeds=['1']), r'different whole numbers'),
        (dict(name=7), 'name must be a text of one line'),
        (dict(work_dir=['x']), 'work_dir must be a text of one line'),
        (dict(work_dir='a\0'), 'work_dir must be a text of one line'),
        (dict(baseline=[1]), 'baseline must be the name of a run'),
        (dict(baseline='studnet'), r'baseline.*Did you mean "student"\?'),
        (dict(metrics=['AP']), 'yaml: metrics must map a heading to a metric'),
        (dict(runs={}), 'runs must map a name to its config'),
        (dict(runs={'student': 'a.py'}), r'runs.student must be a mapping'),
    ],
)
def test_a_wrong_study_is_refused(study, changes, message):
    study.content |= changes
    with pytest.raises(ConfigError, match=message):
        study.read()


@pytest.mark.parametrize(
    ('run', 'message'),
    [
        (dict(configg=1), 'no option "configg". Did you mean "config"'),
        (dict(config='no/such.py'), r'runs.x: the config .* does not exist'),
        (dict(teacher='teachr'), r'x.teacher .* Did you mean "teacher"\?'),
        (dict(teacher='student'), 'has no `distillation` to use it'),
        (dict(teacher='x'), 'x are, by one another, their own teachers'),
        (
            dict(options={'train_cfgs.max_epochs': 1}),
            'no option "train_cfgs". Did you mean "train_cfg"',
        ),
        (dict(options=[1]), 'options must map keys of the config to values'),
        (dict(of='student'), 'it cannot have config, options of its own'),
    ],
)
def test_a_wrong_run_is_refused(study, run, message):
    study.networks['x'] = {**study.networks['student'], **run}
    with pytest.raises(ConfigError, match=message):
        study.read()


def test_a_key_given_twice_is_refused(tmp_path):
    path = tmp_path / 'study.yaml'
    path.write_text('runs:\n  a: {config: a.py}\n  a: {config: b.py}\n')
    with pytest.raises(ConfigError, match='"a" is given twice'):
        read_study(path)


def test_options_shared_by_an_anchor(tmp_path):
    """YAML's merge is no key given twice."""
    path = tmp_path / 'study.yaml'
    path.write_text('a: &all {x: 1, y: 2}\nb:\n  <<: *all\n  y: 3\n')
    assert read_yaml(path)['b'] == dict(x=1, y=3)
    path.write_text('a: &a {x: 1}\nb: {c: &b {<<: *a, x: 2}}\nd: {<<: *b}\n')
    assert read_yaml(path)['d'] == dict(x=2)
    # An own key comes first, then the mappings in the order of the list.
    path.write_text(
        'a: &a {lr: 1, seed: 1}\n'
        'b: &b {<<: *a, lr: 2, name: b}\n'
        'c: {<<: [*b, *a], name: c}\n'
        'd: {name: d, <<: [*a, *b]}\n'
    )
    read = read_yaml(path)
    assert read['b'] == dict(seed=1, lr=2, name='b')
    assert read['c'] == dict(seed=1, lr=2, name='c')
    assert read['d'] == dict(seed=1, lr=1, name='d')
    for wrong in ('1', '[1]', '[*a, [*a]]'):
        path.write_text(f'a: &a {{x: 1}}\nb: {{<<: {wrong}}}\n')
        with pytest.raises(ConfigError, match='expected a mapping, or a list'):
            read_yaml(path)
    path.write_text('a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n')
    with pytest.raises(ConfigError, match='"<<" is given twice'):
        read_yaml(path)


def test_a_study_s_name_is_no_way_out(study, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    del study.content['work_dir']
    for name in ('../../out', '/tmp/out', '..', '.git', 'a/b', 'C:\\x'):
        study.content['name'] = name
        with pytest.raises(ConfigError, match='becomes that of the folder'):
            study.read()
    study.content['name'] = 'BCCD, all of it'
    folder = tmp_path / 'work_dirs' / 'studies' / 'BCCD, all of it'
    assert study.read().work_dir == folder
    study.content |= dict(name='../x', work_dir='here')  # only a title then
    assert study.read().work_dir == tmp_path / 'here'
    study.content['name'] = 'x' * 201
    del study.content['work_dir']
    with pytest.raises(ConfigError, match='more than 200 bytes'):
        study.read()


@pytest.mark.parametrize(
    'name',
    ['../x', '/x', 'a/b', '.x', 'a\\b', 'C:x', 'a\n', 'a\0', '', 7, True],
)
@pytest.mark.parametrize('axis', ['runs', 'each', 'data'])
def test_names_become_folders(study, name, axis):
    plain = study.networks['student']
    if axis == 'runs':
        study.networks[name] = plain
    elif axis == 'each':
        plain['each'] = {name: {}}
    else:
        study.content['data'] = {name: {}}
    with pytest.raises(ConfigError, match='becomes that of a folder'):
        study.read()


def test_names_of_rows_that_no_file_system_takes(study):
    study.networks['x' * 120] = dict(study.networks['teacher'])
    study.networks['x' * 120]['each'] = {'y' * 120: {}}
    with pytest.raises(ConfigError, match='more than 200 bytes'):
        study.read()


@pytest.mark.parametrize(
    'options',
    [
        {'default_hooks.checkpoint.out_dir': '../elsewhere'},
        {'default_hooks': {'checkpoint': {'out_dir': '/tmp/elsewhere'}}},
        {'val_evaluator.outfile_prefix': 'elsewhere/x'},
        {'visualizer.vis_backends': [dict(type='A', save_dir='~/x')]},
    ],
)
def test_runs_write_into_the_work_dir(study, options, tmp_path):
    student = study.networks['student']
    student['options'] = options
    with pytest.raises(ConfigError, match='is out of the work dir'):
        study.read()
    inside = str(tmp_path / 'study' / 'x')
    student['options'] = {'default_hooks.checkpoint.out_dir': inside}
    runs = study.runs()
    assert runs['student'].config.default_hooks.checkpoint.out_dir == inside


def test_links_in_a_work_dir_are_not_followed(tmp_path):
    """Neither that of the lock nor that of a temporary file."""
    mine = tmp_path / 'mine'
    mine.write_text('mine')
    folder = tmp_path / 'study'
    folder.mkdir()
    (folder / '.lock').symlink_to(mine)
    with pytest.raises(OSError, match='symbolic link'), locked(folder):
        pass
    (folder / 'x.json.tmp').symlink_to(mine)
    write_json(folder / 'x.json', {'a': 1})
    assert mine.read_text() == 'mine'
    assert read_json(folder / 'x.json') == {'a': 1}


@pytest.mark.parametrize(
    'content', [b'', b'{"a', b'[1]', b'\xff', b'9' * 5000]
)
def test_notes_that_are_damaged(tmp_path, content):
    path = tmp_path / 'train.json'
    path.write_bytes(content)
    with pytest.raises(
        DataError, match=r'train\.json: expected .*to run that'
    ):
        read_json(path)


LAUGHS = 'a: &a [x, x]\n' + ''.join(
    f'{new}: &{new} [{", ".join([f"*{old}"] * 9)}]\n'
    for old, new in zip('abcdefgh', 'bcdefghi', strict=True)
)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (LAUGHS, 'holds more than 100,000 values'),
        (LAUGHS.replace('[', '{<<: [').replace(']', ']}'), r'no YAML'),
        ('a: &a [*a]', 'one that holds itself'),
        ('a: &a {b: *a}', 'one that holds itself'),
        ('a: &a {<<: *a}', 'one that holds itself'),
        ('a: ' + '[' * 3000 + ']' * 3000, 'too deep in one another'),
        ('a: ' + '9' * 5000, 'no YAML: Exceeds the limit'),
        ('a: 2026-13-45', 'no YAML: month must be in'),
        ('a: !!int ""', 'no YAML'),
        ('a: !!timestamp x', 'no YAML'),
        ('a: !!python/object/apply:os.system [ls]', 'no YAML'),
        ('a: \0', 'no YAML'),
        ('a: [', 'no YAML'),
        ('', 'must hold name'),
        ('[1]', 'must hold name'),
        ('x: ' + 'y' * (1 << 20), 'more than 1,048,576 bytes'),
    ],
)
def test_files_that_are_no_study(tmp_path, text, message):
    path = tmp_path / 'study.yaml'
    path.write_text(text)
    with pytest.raises(MMKDError, match=message):
        read_study(path)
    path.write_bytes(b'\xff\xfe\xfa' + text.encode())
    with pytest.raises(MMKDError):
        read_study(path)


def test_marks_and_line_ends_of_other_systems(study):
    content = study.write().read_bytes().replace(b'\n', b'\r\n')
    study.path.write_bytes(codecs.BOM_UTF8 + content)
    assert len(read_study(study.path).runs) == 3


@pytest.mark.parametrize(
    'value', [float('nan'), 2**70, {1: 2}, b'x', datetime.date(2026, 1, 1)]
)
def test_options_that_no_config_can_hold(study, value):
    options = study.networks['student']['options']
    options['train_cfg.max_epochs'] = value
    with pytest.raises(ConfigError, match='options must map keys'):
        study.read()


def test_options_that_do_not_fit(study):
    study.networks['distilled']['options'] = {'distillation': 3}
    with pytest.raises(ConfigError, match=r'distilled.* do not fit .*3'):
        study.read()


def test_hooks_are_added_to_a_run(study):
    hooks = [dict(type='mmkd.TelemetryHook', interval=4)]
    study.networks['student']['options'] = {'custom_hooks': hooks}
    assert study.runs()['student'].config.custom_hooks == hooks
    study.networks['student']['options'] = {'work_dir': 'elsewhere'}
    with pytest.raises(ConfigError, match='no option "work_dir"'):
        study.read()


def test_errors_of_the_file_end_the_command(study, capsys, tmp_path):
    study.content['sedes'] = [1]
    assert main(['study', str(study.write())]) == 1
    assert 'error: ' in capsys.readouterr().err
    assert main(['study', str(tmp_path / 'none.yaml')]) == 1
    assert 'none.yaml does not exist' in capsys.readouterr().err


def test_the_study_of_the_repository_is_right():
    study = read_study(toy.ROOT / 'studies' / 'bccd_frcnn.yaml')
    assert study.networks == [
        'teacher', 'student', 'distilled', 'soft', 'bounded', 'hint',
    ]  # fmt: skip
    parts = ('soft', 'bounded', 'hint')
    for network in parts:
        method = study.of(network)[0].config.distillation.methods.frcnn
        dropped = {part for part in parts if method.get(part, 0) is None}
        assert dropped == {*parts} - {network}


def test_the_study_on_bccd_shows_every_network():
    study = read_study(toy.ROOT / 'studies' / 'bccd.yaml')
    rows = {row.network: row for row in study.runs if row.seed == 0}
    assert rows['online-teacher'].members == ['teacher']
    assert rows['online-teacher'].source is rows['online']
    assert rows['offline-ensemble'].members == ['student', 'second']
    assert rows['offline'].teacher is rows['teacher']
    several = rows['offline-kd-only'].config.distillation.methods.several
    assert (several.alpha, several.beta) == (1.0, 0.0)
    assert (
        rows['dcm-heads-only'].config.distillation.methods.dcm.kl_weight == 0
    )
