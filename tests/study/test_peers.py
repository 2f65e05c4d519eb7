"""Studies of networks that train together: peers and ensembles as rows."""

import json
import shutil

import pytest
import yaml

from mmkd.errors import ConfigError
from tests.helpers import toy
from tests.helpers.hold import reached
from tests.study.test_study import (
    ROOT,
    a_checkpoint,
    cells,
    finish,
    kill,
    plan,
    run,
    start,
    wait_for,
)


@pytest.fixture
def tool():
    from mmkd.study import command as study

    return study


@pytest.fixture
def reading():
    from mmkd.study import study

    return study


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """The folder of a RetinaNet and a peer of another width."""
    folder = tmp_path_factory.mktemp('configs')
    cfg = toy.plain(folder, toy.RETINANET, epochs=2, images=4)
    cfg.model.test_cfg.score_thr = 0.0  # of two epochs, sure of nothing
    cfg.runner_type = toy.RUNNER
    toy.write(cfg, folder / 'plain.py')
    cfg.model.backbone.base_channels = 12
    cfg.model.neck.in_channels = [12, 24, 48, 96]
    toy.write(cfg, folder / 'second.py')
    return folder


@pytest.fixture
def together(configs, tmp_path):
    """The config of both, as networks that train together."""
    cfg = toy.Config.fromfile(configs / 'plain.py')
    shutil.copy(configs / 'second.py', tmp_path)
    cfg.distillation = dict(
        peers=dict(second=dict(config=str(tmp_path / 'second.py'))),
        methods=dict(dml=dict(type='mmkd.MutualLearning')),
    )
    cfg.custom_hooks = [dict(type='mmkd.EnsembleValidationHook')]
    # What the two tests read is what the validation during training reads.
    cfg.val_dataloader = cfg.test_dataloader
    cfg.val_evaluator = cfg.test_evaluator
    return toy.write(cfg, tmp_path / 'together.py')


def content(together, tmp_path, **changes):
    return {
        'name': 'together',
        'work_dir': str(tmp_path / 'study'),
        'seeds': [0],
        'baseline': 'dml',
        'metrics': {'AP': 'coco/bbox_mAP'},
        'runs': {
            'both': {'of': 'dml', 'ensemble': ['student', 'second']},
            'dml': {'config': str(together)},
            'second': {'of': 'dml', 'network': 'second'},
        },
        **changes,
    }


@pytest.fixture
def write(together, tmp_path):
    def write(**changes):
        path = tmp_path / 'study.yaml'
        path.write_text(yaml.dump(content(together, tmp_path, **changes)))
        return path

    return write


# ----------------------------------------------------------------- the file


def test_rows_follow_their_run_with_its_seeds(
    reading, write, together, tmp_path
):
    runs = content(together, tmp_path)['runs']
    runs['dml']['seeds'] = [4, 1]
    study = reading.read_study(write(runs=runs))
    assert [run.name for run in study.runs] == [
        'dml-seed4', 'dml-seed1', 'both-seed4', 'both-seed1',
        'second-seed4', 'second-seed1',
    ]  # fmt: skip
    for row in study.runs[2:]:
        assert row.source.name == f'dml-seed{row.seed}'
    assert study.runs[2].members == ['student', 'second']
    assert study.runs[4].members == ['second']


@pytest.mark.parametrize(
    ('row', 'message'),
    [
        (dict(of='dm', network='second'), r'x.of .* Did you mean "dml"\?'),
        (dict(of='both', network='second'), '"both" is not trained by itself'),
        (dict(of='dml'), 'either "network".* or "ensemble"'),
        (
            dict(of='dml', network='second', ensemble=['student', 'second']),
            'either "network".* or "ensemble"',
        ),
        (
            dict(of='dml', network='thecond'),
            r'x.network: .* "thecond" in the run "dml". Did you mean "second"',
        ),
        # That is the run itself.
        (dict(of='dml', network='student'), 'no such network "student"'),
        (
            dict(of='dml', ensemble=['student', 'third']),
            'x.ensemble: there is no such network "third"',
        ),
        (dict(of='dml', ensemble=['second']), 'list of different networks'),
        (
            dict(of='dml', ensemble=['second', 'second']),
            'list of different networks',
        ),
        (dict(of='dml', ensemble='second'), 'list of different networks'),
        (
            dict(of='dml', network='second', seeds=[1], teacher='dml'),
            'cannot have teacher, seeds of its own',
        ),
        (
            dict(of='dml', netwrk='second'),
            'no option "netwrk". Did you mean "network"',
        ),
        (dict(of='plain', network='second'), 'It has no peers'),
        (
            dict(config='configs/bccd/methods/kd.py', teacher='second'),
            r'x.teacher: "second" is not trained by itself, it is of .* "dml"',
        ),
    ],
)
def test_a_wrong_row_is_refused(
    reading, write, configs, together, tmp_path, row, message
):
    runs = content(together, tmp_path)['runs']
    runs['plain'] = {'config': str(configs / 'plain.py')}
    with pytest.raises(ConfigError, match=message):
        reading.read_study(write(runs={**runs, 'x': row}))


def test_the_study_on_bccd_shows_every_network(reading):
    study = reading.read_study(ROOT / 'studies' / 'bccd.yaml')
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


# ---------------------------------------------------- a teacher that trains


@pytest.fixture
def taught(together, tmp_path):
    """The same with a teacher that trains in the same step."""
    cfg = toy.Config.fromfile(together)
    shutil.copy(tmp_path / 'second.py', tmp_path / 'big.py')
    cfg.distillation.teacher = dict(
        config=str(tmp_path / 'big.py'), trainable=True
    )
    return toy.write(cfg, tmp_path / 'taught.py')


def test_a_teacher_that_trains_is_a_peer(reading, write, taught, tmp_path):
    runs = {
        'dml': {'config': str(taught)},
        'big': {'of': 'dml', 'network': 'teacher'},
        'all': {'of': 'dml', 'ensemble': ['student', 'second', 'teacher']},
    }
    path = write(runs=runs)
    trained, together, big = reading.read_study(path).runs
    assert big.members == ['teacher']
    assert together.members == ['student', 'second', 'teacher']
    assert trained.inputs['teacher'] == ''
    before = trained.inputs['peers']
    with (tmp_path / 'big.py').open('a') as file:
        file.write("\nmodel['backbone']['style'] = 'caffe'\n")
    assert trained.inputs['peers'] != before


def test_a_run_cannot_be_a_teacher_that_trains(
    reading, write, configs, taught
):
    runs = {
        'dml': {'config': str(taught), 'teacher': 'plain'},
        'plain': {'config': str(configs / 'plain.py')},
    }
    message = r'runs.dml has a teacher, but that of .*taught.py trains in the'
    with pytest.raises(ConfigError, match=message):
        reading.read_study(write(runs=runs))
    frozen = {'distillation.teacher.trainable': False}
    runs['dml']['options'] = frozen
    study = reading.read_study(write(runs=runs))
    assert study.of('dml')[0].teacher is study.of('plain')[0]


# ---------------------------------------------------------------- staleness


@pytest.fixture
def finished(reading, write):
    """A study whose runs are done."""
    path = write()
    trained, *rows = reading.read_study(path).runs
    finish(trained, **{'coco/bbox_mAP': 0.4})
    peer = trained.folder / 'second'
    peer.mkdir()
    shutil.copy(a_checkpoint(trained.work_dir, 3.0), peer / 'epoch_2.pth')
    for row, ap in zip(rows, (0.5, 0.3), strict=True):
        row.folder.mkdir()
        row.test.note(fingerprint=row.inputs, finished='then')
        result = {
            'metrics': {'coco/bbox_mAP': ap},
            'training_seconds': 90.0,
            'training_cpu_seconds': 60.0,
            'memory_mib': 800.0,
            'inputs': row.inputs,
            'checkpoint': row.checkpoint_hash,
        }
        (row.folder / 'result.json').write_text(json.dumps(result))
    return path


def test_what_is_done_is_done(tool, finished, capsys):
    assert set(plan(tool, finished, capsys).values()) == {'done'}


def test_rows_wait_for_a_run_that_is_stale(
    tool, finished, write, together, tmp_path, capsys
):
    runs = content(together, tmp_path)['runs']
    runs['dml']['options'] = {'optim_wrapper.optimizer.lr': 0.5}
    told = plan(tool, write(runs=runs), capsys)
    assert told == {
        'dml': 'stale: its config changed',
        'both': 'waits for dml-seed0',
        'second': 'waits for dml-seed0',
    }


def test_a_changed_config_of_a_peer_is_told(tool, finished, tmp_path, capsys):
    with (tmp_path / 'second.py').open('a') as file:
        file.write("\nmodel['backbone']['style'] = 'caffe'\n")
    told = plan(tool, finished, capsys)
    assert told['dml'] == (
        'stale: a config or a first checkpoint of its peers changed'
    )
    assert told['both'] == told['second'] == 'waits for dml-seed0'


def test_what_was_not_noted_is_not_compared(tool, reading, finished, capsys):
    """Results of before peers were looked at stay."""
    trained = reading.read_study(finished).runs[0]
    then = dict(trained.inputs)
    del then['peers']
    trained.training.note(fingerprint=then)
    assert plan(tool, finished, capsys)['dml'] == 'done'


@pytest.mark.parametrize('changed', ['', 'second'])
def test_rows_are_of_the_checkpoints_that_are_there(
    tool, reading, finished, capsys, changed
):
    trained = reading.read_study(finished).runs[0]
    new = a_checkpoint(trained.work_dir, weight=2.0)
    shutil.copy(new, trained.folder / changed / 'epoch_2.pth')
    told = plan(tool, finished, capsys)
    stale = 'stale: a checkpoint of its run changed'
    assert told == {
        'dml': 'done',
        'both': stale,
        'second': stale if changed else 'done',
    }


def test_removed_checkpoints_are_those_that_were(
    tool, reading, finished, capsys
):
    for path in reading.read_study(finished).runs[0].folder.rglob('*.pth'):
        path.unlink()
    assert set(plan(tool, finished, capsys).values()) == {'done'}


def test_no_row_is_of_a_removed_checkpoint(tool, reading, finished, capsys):
    """Where the peer's is gone, what needs it says so, and is not run."""
    trained, both, second = reading.read_study(finished).runs
    (trained.folder / 'second' / 'epoch_2.pth').unlink()
    (second.folder / 'result.json').unlink()
    told = plan(tool, finished, capsys)
    assert told['dml'] == told['both'] == 'done'
    gone = 'a checkpoint of dml-seed0 is gone or damaged. Bring it back to '
    assert f', but {gone}' in told['second']
    assert not tool.prepare(second, keep_stale=False)
    assert second.failure.startswith(f'not run: {gone}{trained.folder}')
    assert not tool.prepare(both, keep_stale=False)
    assert not both.failure


def test_other_members_are_told(
    tool, finished, write, together, tmp_path, capsys
):
    runs = content(together, tmp_path)['runs']
    runs['both']['ensemble'].reverse()
    told = plan(tool, write(runs=runs), capsys)
    assert told['both'].startswith('stale: its config')
    assert told['dml'] == told['second'] == 'done'


def test_the_table_names_the_run_that_is_paid_for(reading, finished):
    from mmkd.study import table as study_table

    text = study_table.write_table(reading.read_study(finished))
    costs = ['1.5', '1.0', '800', '']
    assert cells(text, 'both') == ['1', '50.0', *costs]
    assert cells(text, 'second', 1) == ['1', '-10.0']
    assert 'that trained all its networks: both of dml, second of dml.' in text


# --------------------------------------------------------------- for real


# AP is 0 after two epochs; this tells any two networks apart.
METRIC = """
import sys

from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS

from tests.helpers.hold import wait


@METRICS.register_module(name='ToySum')
class Sum(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        for sample in data_samples:
            found = sample['pred_instances']
            boxes = found['bboxes'].sum() / 1e3
            self.results.append(float(found['scores'].sum() + boxes))

    def compute_metrics(self, results):
        if 'both-seed0' in sys.argv[-1]:
            wait()
        return dict(sum=sum(results))
"""


@pytest.mark.slow
def test_a_real_run_and_its_rows(write, together, tmp_path, hold):
    """Their metrics are those of the last validation in training."""
    folder, code = tmp_path / 'study', tmp_path / 'code'
    shutil.copytree(ROOT / 'mmkd', code / 'mmkd')
    (code / 'toy_sum.py').write_text(METRIC)
    with together.open('a') as file:
        file.write("\ncustom_imports = dict(imports=['toy_sum'])\n")
        file.write("test_evaluator = dict(type='ToySum')\n")
        file.write('val_evaluator = test_evaluator\n')
    path = write(metrics={'AP': 'toy/sum'})
    first = start(path, code)
    wait_for(first, reached(hold))
    kill(first, folder)
    hold.unlink()
    assert not (folder / 'both-seed0' / 'result.json').exists()
    status, output = run(path, code, '--dry-run')
    assert status == 0
    assert 'dml-seed0     done' in output
    assert 'both-seed0    is to be tested' in output
    status, output = run(path, code, '--jobs', '2')
    assert status == 0, output

    rows = {
        name: json.loads((folder / f'{name}-seed0/result.json').read_text())
        for name in ('dml', 'both', 'second')
    }
    scalars = next((folder / 'dml-seed0').glob('2*/vis_data/scalars.json'))
    logged = json.loads(scalars.read_text().splitlines()[-1])
    found = {name: row['metrics']['toy/sum'] for name, row in rows.items()}
    assert found == pytest.approx(
        {
            'dml': logged['toy/sum'],
            'both': logged['ensemble/toy/sum'],
            'second': logged['second/toy/sum'],
        },
        rel=1e-4,
    )
    assert len({round(value, 2) for value in found.values()}) == 3
    for name in ('both', 'second'):
        for key in ('training_cpu_seconds', 'memory_mib'):
            assert rows[name][key] == rows['dml'][key]
        assert rows[name]['trained_in'] == 'dml-seed0'
    assert 'both of dml, second of dml' in output

    status, output = run(path, code)
    assert status == 0
    assert output.count('-seed0') == output.count('done') == 3

    # A failed run is not tested.
    shutil.rmtree(folder / 'dml-seed0')
    together.write_text(together.read_text() + "\nmodel['type'] = 'Nothing'\n")
    status, output = run(path, code)
    assert status == 1
    assert '- both-seed0: not run: dml-seed0 failed' in output
