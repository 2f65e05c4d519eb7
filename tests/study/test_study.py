"""Studies: what they refuse, when they are stale, their table; real ones."""

import fcntl
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from mmkd.errors import ConfigError
from mmkd.study.training import locked
from tests.helpers import made_data, toy
from tests.helpers.hold import reached

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / 'tools'


@pytest.fixture
def tool():
    from mmkd.study import command as study

    return study


@pytest.fixture
def reading():
    from mmkd.study import study

    return study


@pytest.fixture
def of_a_run():
    """The module of single runs."""
    from mmkd.study import run

    return run


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """The folder of two tiny configs: plain.py and distilled.py."""
    return write_configs(tmp_path_factory.mktemp('configs'))


def write_configs(folder):
    for name, make in (('plain', toy.plain), ('distilled', toy.distilled)):
        config = make(folder, epochs=2, images=4)
        # A detector of two epochs is sure of nothing.
        config.model.test_cfg.rcnn.score_thr = 0.0
        config.train_cfg.val_interval = 2
        toy.write(config, folder / f'{name}.py')
    return folder


def content(configs, tmp_path, **changes):
    """A study as its file would say it."""
    plain = {'config': str(configs / 'plain.py')}
    return {
        'name': 'tiny',
        'work_dir': str(tmp_path / 'study'),
        'seeds': [0],
        'baseline': 'student',
        'runs': {
            'student': {**plain, 'options': {'train_cfg.max_epochs': 1}},
            'distilled': {
                'config': str(configs / 'distilled.py'),
                'teacher': 'teacher',
            },
            'teacher': plain,
        },
        **changes,
    }


@pytest.fixture
def write(configs, tmp_path):
    """Writes a study's file."""

    def write(**changes):
        path = tmp_path / 'study.yaml'
        path.write_text(yaml.dump(content(configs, tmp_path, **changes)))
        return path

    return write


# ----------------------------------------------------------------- the file


def test_teachers_come_first_and_seeds_are_set(reading, write):
    study = reading.read_study(write(seeds=[4, 1]))
    assert [run.name for run in study.runs] == [
        'student-seed4', 'student-seed1', 'teacher-seed4', 'teacher-seed1',
        'distilled-seed4', 'distilled-seed1',
    ]  # fmt: skip
    for run in study.runs:
        assert run.config.randomness.seed == run.seed
        if run.network == 'distilled':
            assert run.teacher.name == f'teacher-seed{run.seed}'
    assert study.runs[0].config.train_cfg.max_epochs == 1
    assert study.runs[2].config.train_cfg.max_epochs == 2


def test_the_written_config_has_the_options_and_the_teacher(
    reading, write, configs, tmp_path
):
    runs = content(configs, tmp_path)['runs']
    runs['distilled']['options'] = {
        'distillation.methods.hint.levels': [0, 2],
        'distillation.methods.hint.loss': None,
        'optim_wrapper.optimizer.lr': 1e-3,
    }
    run = reading.read_study(write(runs=runs)).runs[-1]
    run.teacher.folder.mkdir(parents=True)
    shutil.copy(a_checkpoint(tmp_path), run.teacher.folder / 'epoch_2.pth')
    run.write_config()
    run.teacher.write_config()
    written = reading.load_config(str(run.config_file))
    hint = written.distillation.methods.hint
    assert (hint.levels, hint.loss) == ([0, 2], None)
    assert written.optim_wrapper.optimizer.lr == 1e-3
    teacher = written.distillation.teacher
    assert teacher.checkpoint == str(run.teacher.folder / 'epoch_2.pth')
    theirs = reading.load_config(teacher.config)
    assert theirs.model == run.teacher.config.model


def a_checkpoint(folder, weight=1.0):
    import torch

    path = folder / 'some.pth'
    torch.save({'state_dict': {'w': torch.tensor(weight)}}, path)
    return path


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(sedes=[1]), r'no option "sedes". Did you mean "seeds"\?'),
        (dict(seeds=[1, 1]), r'different whole numbers.*got \[1, 1\]'),
        (dict(seeds=[True]), r'different whole numbers'),
        (dict(baseline='studnet'), r'baseline.*Did you mean "student"\?'),
        (dict(metrics=['AP']), 'metrics must map a heading to a metric'),
        (dict(runs={}), 'runs must map a name to its config'),
        (dict(runs={'student': 'a.py'}), r'runs.student must be a mapping'),
    ],
)
def test_a_wrong_study_is_refused(reading, write, changes, message):
    with pytest.raises(ConfigError, match=message):
        reading.read_study(write(**changes))


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
def test_a_wrong_run_is_refused(
    reading, write, configs, tmp_path, run, message
):
    runs = content(configs, tmp_path)['runs']
    runs['x'] = {**runs['student'], **run}
    with pytest.raises(ConfigError, match=message):
        reading.read_study(write(runs=runs))


def test_a_key_given_twice_is_refused(reading, tmp_path):
    path = tmp_path / 'study.yaml'
    path.write_text('runs:\n  a: {config: a.py}\n  a: {config: b.py}\n')
    with pytest.raises(ConfigError, match='"a" is given twice'):
        reading.read_study(path)


def test_options_shared_by_an_anchor(reading, tmp_path):
    """YAML's merge is no key given twice."""
    path = tmp_path / 'study.yaml'
    path.write_text('a: &all {x: 1, y: 2}\nb:\n  <<: *all\n  y: 3\n')
    assert reading.read_yaml(path)['b'] == dict(x=1, y=3)
    path.write_text('a: &a {x: 1}\nb: {c: &b {<<: *a, x: 2}}\nd: {<<: *b}\n')
    assert reading.read_yaml(path)['d'] == dict(x=2)
    # An own key comes first, then the mappings in the order of the list.
    path.write_text(
        'a: &a {lr: 1, seed: 1}\n'
        'b: &b {<<: *a, lr: 2, name: b}\n'
        'c: {<<: [*b, *a], name: c}\n'
        'd: {name: d, <<: [*a, *b]}\n'
    )
    read = reading.read_yaml(path)
    assert read['b'] == dict(seed=1, lr=2, name='b')
    assert read['c'] == dict(seed=1, lr=2, name='c')
    assert read['d'] == dict(seed=1, lr=1, name='d')
    for wrong in ('1', '[1]', '[*a, [*a]]'):
        path.write_text(f'a: &a {{x: 1}}\nb: {{<<: {wrong}}}\n')
        with pytest.raises(ConfigError, match='expected a mapping, or a list'):
            reading.read_yaml(path)
    path.write_text('a: &a {x: 1}\nb:\n  <<: *a\n  <<: *a\n')
    with pytest.raises(ConfigError, match='"<<" is given twice'):
        reading.read_yaml(path)


def test_hooks_are_added_to_a_run(reading, write, configs, tmp_path):
    runs = content(configs, tmp_path)['runs']
    hooks = [dict(type='mmkd.TelemetryHook', interval=4)]
    runs['student'] = {**runs['student'], 'options': {'custom_hooks': hooks}}
    study = reading.read_study(write(runs=runs))
    assert study.of('student')[0].config.custom_hooks == hooks
    runs['student']['options'] = {'work_dir': 'elsewhere'}
    with pytest.raises(ConfigError, match='no option "work_dir"'):
        reading.read_study(write(runs=runs))


def test_errors_of_the_file_end_the_tool(tool, write, capsys, tmp_path):
    assert tool.main([str(write(sedes=[1]))]) == 1
    assert 'error: ' in capsys.readouterr().err
    assert tool.main([str(tmp_path / 'none.yaml')]) == 1
    assert 'none.yaml does not exist' in capsys.readouterr().err


def test_the_study_of_the_repository_is_right(reading):
    study = reading.read_study(ROOT / 'studies' / 'bccd_frcnn.yaml')
    assert study.networks == [
        'teacher', 'student', 'distilled', 'soft', 'bounded', 'hint',
    ]  # fmt: skip
    parts = ('soft', 'bounded', 'hint')
    for network in parts:
        method = study.of(network)[0].config.distillation.methods.frcnn
        dropped = {part for part in parts if method.get(part, 0) is None}
        assert dropped == {*parts} - {network}


# ---------------------------------------------------------------- staleness


def finish(run, weight=1.0, **metrics):
    """Leave the files of a run that is done."""
    run.folder.mkdir(parents=True)
    shutil.copy(a_checkpoint(run.work_dir, weight), run.folder / 'epoch_2.pth')
    run.training.note(fingerprint=run.inputs, finished='then')
    result = {
        'metrics': {'coco/bbox_mAP': 0.0, **metrics},
        'training_seconds': 90.0,
        'training_cpu_seconds': 60.0,
        'memory_mib': 800.0,
        'inputs': run.inputs,
        'checkpoint': run.checkpoint_hash,
    }
    (run.folder / 'result.json').write_text(json.dumps(result))


@pytest.fixture
def finished(reading, write, configs, tmp_path):
    """A study whose runs are done, and copies of its data to tamper with."""
    data = tmp_path / 'data'
    source = made_data.root() / 'coco_tiny'
    shutil.copytree(source / 'annotations', data / 'annotations')
    for split in ('train2017', 'val2017'):
        (data / split).mkdir()
        for image in sorted((source / split).iterdir())[:2]:
            shutil.copy(image, data / split)
    runs = content(configs, tmp_path)['runs']
    for run in runs.values():
        run.setdefault('options', {})['train_dataloader.dataset.data_root'] = (
            f'{data}/'
        )
    path = write(runs=runs, metrics={'AP': 'coco/bbox_mAP'})
    for run in reading.read_study(path).runs:
        finish(run)
    return path, data, runs


def plan(tool, path, capsys, *options):
    """What the tool says of each run."""
    from mmkd.study import hashes

    hashes.hash_path.cache_clear()
    capsys.readouterr()
    assert tool.main([str(path), '--dry-run', *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    pairs = [line.split(None, 1) for line in lines if '-seed0 ' in line]
    return {name.removesuffix('-seed0'): text for name, text in pairs}


def test_what_is_done_is_done(tool, finished, capsys):
    path, _, _ = finished
    told = plan(tool, path, capsys)
    assert told == dict.fromkeys(('student', 'teacher', 'distilled'), 'done')


def test_a_changed_option_is_told(tool, finished, write, capsys):
    _, _, runs = finished
    runs['student']['options']['optim_wrapper.optimizer.lr'] = 0.5
    told = plan(tool, write(runs=runs), capsys)
    assert told['student'] == 'stale: its config changed'
    assert told['teacher'] == told['distilled'] == 'done'


def test_another_work_dir_changes_nothing(
    reading, finished, write, configs, tmp_path
):
    path, _, runs = finished
    here = reading.read_study(path).runs
    there = reading.read_study(write(runs=runs, work_dir=str(tmp_path / 'b')))
    for one, other in zip(here[:2], there.runs[:2], strict=True):
        assert {**one.inputs, 'teacher': ''} == {**other.inputs, 'teacher': ''}


@pytest.mark.parametrize('kind', ['annotation', 'image', 'removed'])
def test_changed_data_are_told(tool, finished, capsys, kind):
    path, data, _ = finished
    if kind == 'annotation':
        file = data / 'annotations' / 'instances_train2017.json'
        text = file.read_text()
        # As long as before: the content counts.
        file.write_text(text.replace('"category_id": 1,', '"category_id": 2,'))
        assert file.read_text() != text
    else:
        image = next((data / 'train2017').iterdir())
        if kind == 'image':
            image.write_bytes(image.read_bytes() + b'0')
        else:
            image.unlink()
    told = plan(tool, path, capsys)
    assert told['student'] == told['teacher'] == 'stale: its data changed'
    assert told['distilled'] == 'waits for teacher-seed0'


def test_another_teacher_is_told(tool, reading, finished, capsys):
    path, _, _ = finished
    teacher = reading.read_study(path).runs[1]
    new = a_checkpoint(teacher.work_dir, weight=2.0)
    shutil.copy(new, teacher.folder / 'epoch_2.pth')
    told = plan(tool, path, capsys)
    assert told['distilled'] == "stale: its teacher's checkpoint changed"
    assert told['teacher'] == told['student'] == 'done'


def test_a_removed_teacher_is_the_one_that_was(
    tool, reading, finished, capsys
):
    path, _, _ = finished
    next(reading.read_study(path).runs[1].folder.glob('*.pth')).unlink()
    assert plan(tool, path, capsys)['distilled'] == 'done'


def test_changed_code_is_told_and_can_be_kept(
    tool, of_a_run, finished, write, capsys, monkeypatch
):
    path, _, runs = finished
    monkeypatch.setattr(of_a_run, 'versions', lambda: {'torch': '9.9'})
    told = plan(tool, path, capsys)
    assert told['student'] == 'stale: the installed packages changed'
    assert told['distilled'] == 'waits for teacher-seed0'
    told = plan(tool, path, capsys, '--keep-stale')
    assert set(told.values()) == {
        'done, but stale and kept: the installed packages changed'
    }
    runs['student']['options']['optim_wrapper.optimizer.lr'] = 0.5
    told = plan(tool, write(runs=runs), capsys, '--keep-stale')
    assert told['student'] == (
        'stale: its config and the installed packages changed'
    )


def test_the_hash_of_code_sees_every_file(tmp_path):
    from mmkd.study.hashes import hash_code

    seen = set()
    for name, text in (('a.py', ''), ('b/c.py', ''), ('b/c.py', '#')):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
        hash_code.cache_clear()
        seen.add(hash_code(tmp_path))
    (tmp_path / 'b' / 'notes.txt').write_text('x')
    hash_code.cache_clear()
    assert hash_code(tmp_path) in seen
    assert len(seen) == 3


def test_the_time_of_a_killed_study_counts(tool, reading, write):
    run = reading.read_study(write()).runs[0]
    run.folder.mkdir(parents=True)
    run.training.note(fingerprint=run.inputs, begun=1000.0, wall_seconds=50)
    log = run.training.log
    log.touch()
    os.utime(log, (1100, 1100))  # its last words
    for _ in range(2):
        assert tool.prepare(run, keep_stale=False)
        assert run.noted['wall_seconds'] == 150


def test_foreign_files_are_left_alone(tool, write, tmp_path, capsys):
    precious = tmp_path / 'study' / 'student-seed0' / 'epoch_9.pth'
    precious.parent.mkdir(parents=True)
    precious.touch()
    assert tool.main([str(write())]) == 1
    assert 'holds files that are not of a study' in capsys.readouterr().err
    assert precious.exists()


# ----------------------------------------------------------------- the table


def test_the_table_by_hand(reading, write, tmp_path):
    from mmkd.study import table as study_table

    study = reading.read_study(
        write(seeds=[0, 1, 2], metrics={'AP': 'coco/bbox_mAP'})
    )
    values = {
        'student': [0.40, 0.42, 0.44],
        'teacher': [0.50, 0.52, 0.54],
        'distilled': [0.43, 0.43, 0.47],
    }
    for run in study.runs:
        ap = values[run.network][run.seed]
        finish(run, run.seed, **{'coco/bbox_mAP': ap})
    text = study_table.write_table(study)
    table = json.loads((study.work_dir / 'table.json').read_text())
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
    hashes = [run.checkpoint_hash[:8] for run in study.of('teacher')]
    assert len(set(hashes)) == 3
    assert cells(text, 'distilled')[-1] == ', '.join(hashes)
    assert cells(text, 'distilled', 1) == ['3', '+2.3 ± 1.2 (p 0.073)']
    assert cells(text, 'teacher', 1) == ['3', '+10.0 ± 0.0']
    assert 'Failed' not in text
    assert 'Stale' not in text


def cells(text, name, number=0):
    rows = [
        line for line in text.splitlines() if line.startswith(f'| {name} ')
    ]
    return [cell.strip() for cell in rows[number].strip('|').split('|')][1:]


def test_the_table_of_what_is_there(reading, of_a_run, write, monkeypatch):
    from mmkd.study import table as study_table

    study = reading.read_study(
        write(seeds=[0, 1], metrics={'AP': 'coco/bbox_mAP'})
    )
    runs = {run.name: run for run in study.runs}
    for name, ap in (('student-seed0', 0.4), ('student-seed1', 0.5)):
        finish(runs[name], **{'coco/bbox_mAP': ap})
    finish(runs['teacher-seed1'], **{'coco/bbox_mAP': 0.6})
    runs['teacher-seed0'].failure = 'training failed, see log'
    monkeypatch.setattr(of_a_run, 'hash_code', lambda: 'other')
    text = study_table.write_table(study)
    table = json.loads((study.work_dir / 'table.json').read_text())
    assert cells(text, 'teacher (stale)')[:2] == ['1', '60.0']
    assert cells(text, 'distilled')[:2] == ['0', '']
    # Seed 1 alone is a pair.
    assert cells(text, 'teacher', 1) == ['1', '+10.0']
    assert '- teacher-seed0: training failed, see log' in text
    assert '- student-seed0: the code of mmkd changed' in text
    assert table['missing'] == ['distilled-seed0', 'distilled-seed1']


def test_a_tiny_p_and_a_loss(reading):
    from mmkd.study import table as study_table

    found = study_table.gain([0.1, 0.2, 0.31], [0.6, 0.7, 0.8])
    assert found.p < 0.001
    assert study_table.p_value(found) == ' (p < 0.001)'
    assert found.text('+').startswith('-49.7')


# --------------------------------------------------------------- for real


@pytest.fixture
def code(tmp_path):
    """A folder of mmkd as it is now, to be run and changed."""
    shutil.copytree(ROOT / 'mmkd', tmp_path / 'code' / 'mmkd')
    return tmp_path / 'code'


def start(path, code, *options):
    command = [sys.executable, str(TOOLS / 'study.py'), str(path), *options]
    env = {**os.environ, 'PYTHONPATH': f'{code}{os.pathsep}{ROOT}'}
    return subprocess.Popen(
        command,
        cwd=path.parent,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(path, code, *options):
    process = start(path, code, *options)
    output, _ = process.communicate()
    return process.returncode, output


def wait_for(process, path):
    while not path.exists():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.05)


# A run with these options waits for `hold` after its first epoch.
HELD = {'default_hooks.timer.type': 'tests.helpers.hold.Timer'}


def kill(process, folder):
    """Kill a study, and wait for the end of the training that it held."""
    process.kill()
    process.wait()
    with (folder / '.lock').open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


@pytest.mark.slow
def test_a_study_is_killed_resumed_and_not_repeated(
    write, code, configs, tmp_path, hold
):
    runs = content(configs, tmp_path)['runs']
    runs['teacher'] = {**runs['teacher'], 'options': HELD}
    path, folder = write(runs=runs), tmp_path / 'study'
    first = start(path, code)
    wait_for(first, reached(hold))
    kill(first, folder)
    hold.unlink()
    kept = (folder / 'student-seed0' / 'result.json').read_bytes()

    status, output = run(path, code, '--jobs', '2')
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

    status, output = run(path, code)
    assert status == 0
    assert output.count('-seed0') == output.count('done') == 3

    with (code / 'mmkd' / 'adapters.py').open('a') as file:
        file.write('\n')
    status, output = run(path, code, '--dry-run')
    assert status == 0
    assert output.count('stale: the code of mmkd changed') == 2
    assert 'distilled-seed0  waits for teacher-seed0' in output
    status, output = run(path, code, '--keep-stale')
    assert status == 0
    assert '| student (stale)' in output
    assert (folder / 'student-seed0' / 'result.json').read_bytes() == kept


@pytest.mark.slow
def test_a_failing_run_leaves_the_others(write, code, configs, tmp_path, hold):
    runs = content(configs, tmp_path)['runs']
    broken = {
        'config': str(configs / 'distilled.py'),
        'options': {'distillation.methods.hint.source': 'nek'},
    }
    heir = {'config': str(configs / 'distilled.py'), 'teacher': 'broken'}
    path = write(
        runs={'broken': broken, 'heir': heir, 'student': runs['student']},
        metrics={'AP': 'coco/bbox_mAP'},
    )
    status, output = run(path, code)
    assert status == 1, output
    log = tmp_path / 'study' / 'broken-seed0' / 'train.txt'
    assert 'Did you mean "neck"?' in log.read_text()
    assert f'- broken-seed0: training failed (exit status 1), see {log}' in (
        output
    )
    assert '- heir-seed0: not run: broken-seed0 failed' in output
    assert cells(output, 'student')[0] == '1'
    assert cells(output, 'broken')[0] == '0'

    with locked(tmp_path / 'study'):  # one at a time in a folder
        second, output = run(path, code)
    assert second == 1
    assert 'another process' in output

    held = {'config': str(configs / 'plain.py'), 'options': HELD}
    third = start(write(runs={'held': held}, baseline='held'), code)
    wait_for(third, reached(hold))
    third.send_signal(signal.SIGTERM)
    third.communicate()
    assert third.returncode == 143
