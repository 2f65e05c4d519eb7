"""Studies of networks that train together: peers and ensembles as rows."""

import json
import shutil

import pytest

from mmkd.errors import ConfigError
from mmkd.study import work
from mmkd.study.table import write_table
from tests.helpers import toy
from tests.helpers.hold import reached
from tests.helpers.studies import (
    a_checkpoint,
    cells,
    finish,
    kill,
    run_all,
    start,
    wait_for,
)

LR = 'optim_wrapper.optimizer.lr'


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
        methods=dict(dml=dict(type='mmkd.DML')),
    )
    cfg.custom_hooks = [dict(type='mmkd.EnsembleValidationHook')]
    # What the two tests read is what the validation during training reads.
    cfg.val_dataloader = cfg.test_dataloader
    cfg.val_evaluator = cfg.test_evaluator
    return toy.write(cfg, tmp_path / 'together.py')


@pytest.fixture
def content(content, together):
    runs = {
        'both': {'of': 'dml', 'ensemble': ['student', 'second']},
        'dml': {'config': str(together)},
        'second': {'of': 'dml', 'network': 'second'},
    }
    return {**content, 'baseline': 'dml', 'runs': runs}


# ----------------------------------------------------------------- the file


def test_rows_follow_their_run_with_its_seeds(study):
    study.networks['dml']['seeds'] = [4, 1]
    runs = study.read().runs
    assert [run.name for run in runs] == [
        'dml-seed4', 'dml-seed1', 'both-seed4', 'both-seed1',
        'second-seed4', 'second-seed1',
    ]  # fmt: skip
    for row in runs[2:]:
        assert row.source.name == f'dml-seed{row.seed}'
    assert runs[2].members == ['student', 'second']
    assert runs[4].members == ['second']


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
def test_a_wrong_row_is_refused(study, configs, row, message):
    study.networks['plain'] = {'config': str(configs / 'plain.py')}
    study.networks['x'] = row
    with pytest.raises(ConfigError, match=message):
        study.read()


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


def test_a_teacher_that_trains_is_a_peer(study, taught, tmp_path):
    study.networks['dml']['config'] = str(taught)
    study.networks['both']['ensemble'].append('teacher')
    study.networks['second']['network'] = 'teacher'
    runs = study.runs()
    assert runs['second'].members == ['teacher']
    assert runs['both'].members == ['student', 'second', 'teacher']
    assert runs['dml'].inputs['teacher'] == ''
    before = runs['dml'].inputs['peers']
    with (tmp_path / 'big.py').open('a') as file:
        file.write("\nmodel['backbone']['style'] = 'caffe'\n")
    assert runs['dml'].inputs['peers'] != before


def test_a_run_cannot_be_a_teacher_that_trains(study, configs, taught):
    own = study.networks['dml'] = {'config': str(taught), 'teacher': 'plain'}
    study.networks['plain'] = {'config': str(configs / 'plain.py')}
    message = r'runs.dml: .*taught.py trains its own in the same step'
    with pytest.raises(ConfigError, match=message):
        study.read()
    own['options'] = {'distillation.teacher.trainable': False}
    runs = study.runs()
    assert runs['dml'].teacher is runs['plain']


# ---------------------------------------------------------------- staleness


@pytest.fixture
def done(study):
    """The runs of the study, which are done."""
    runs = study.runs()
    trained = runs['dml']
    finish(trained, ap=0.4)
    (trained.folder / 'second').mkdir()
    peer = a_checkpoint(trained.work_dir, 3.0)
    shutil.copy(peer, trained.folder / 'second' / 'epoch_2.pth')
    finish(runs['both'], ap=0.5)
    finish(runs['second'], ap=0.3)
    return runs


def test_what_is_done_is_done(study, done):
    assert study.plan() == dict.fromkeys(done, 'done')


def test_rows_wait_for_a_run_that_is_stale(study, done):
    study.networks['dml']['options'] = {LR: 0.5}
    waits = 'waits for dml-seed0'
    stale = 'stale: its config changed'
    assert study.plan() == {'dml': stale, 'both': waits, 'second': waits}


def test_a_changed_config_of_a_peer_is_told(study, done, tmp_path):
    with (tmp_path / 'second.py').open('a') as file:
        file.write("\nmodel['backbone']['style'] = 'caffe'\n")
    told = study.plan()
    assert told['dml'] == (
        'stale: a config or a first checkpoint of its peers changed'
    )
    assert told['both'] == told['second'] == 'waits for dml-seed0'


def test_what_was_not_noted_is_not_compared(study, done):
    """Results of before peers were looked at stay."""
    then = dict(done['dml'].inputs)
    del then['peers']
    done['dml'].training.note(fingerprint=then)
    assert study.plan()['dml'] == 'done'


@pytest.mark.parametrize('changed', ['', 'second'])
def test_rows_are_of_the_checkpoints_that_are_there(study, done, changed):
    trained = done['dml']
    new = a_checkpoint(trained.work_dir, weight=2.0)
    shutil.copy(new, trained.folder / changed / 'epoch_2.pth')
    stale = 'stale: a checkpoint of its run changed'
    second = stale if changed else 'done'
    assert study.plan() == {'dml': 'done', 'both': stale, 'second': second}


def test_removed_checkpoints_are_those_that_were(study, done):
    for path in done['dml'].folder.rglob('*.pth'):
        path.unlink()
    assert set(study.plan().values()) == {'done'}


def test_no_row_is_of_a_removed_checkpoint(study, done):
    """Where the peer's is gone, what needs it says so, and is not run."""
    folder, second = done['dml'].folder, done['second']
    (folder / 'second' / 'epoch_2.pth').unlink()
    (second.folder / 'result.json').unlink()
    told = study.plan()
    assert told['dml'] == told['both'] == 'done'
    gone = 'a checkpoint of dml-seed0 is gone or damaged. Bring it back to '
    assert f', but {gone}' in told['second']
    assert not work.prepare(second, keep_stale=False)
    assert second.failure.startswith(f'not run: {gone}{folder}')
    assert not work.prepare(done['both'], keep_stale=False)
    assert not done['both'].failure


def test_other_members_are_told(study, done):
    study.networks['both']['ensemble'].reverse()
    told = study.plan()
    assert told['both'].startswith('stale: its config')
    assert told['dml'] == told['second'] == 'done'


def test_the_table_names_the_run_that_is_paid_for(study, done):
    text = write_table(study.read())
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
def test_a_real_run_and_its_rows(study, code, together, tmp_path, hold):
    """Their metrics are those of the last validation in training."""
    folder = tmp_path / 'study'
    (code / 'toy_sum.py').write_text(METRIC)
    with together.open('a') as file:
        file.write("\ncustom_imports = dict(imports=['toy_sum'])\n")
        file.write("test_evaluator = dict(type='ToySum')\n")
        file.write('val_evaluator = test_evaluator\n')
    study.content['metrics'] = {'AP': 'toy/sum'}
    path = study.write()
    first = start(path, code)
    wait_for(first, reached(hold))
    kill(first, folder, hold)
    assert not (folder / 'both-seed0' / 'result.json').exists()
    status, output = run_all(path, code, '--dry-run')
    assert status == 0
    assert 'dml-seed0     done' in output
    assert 'both-seed0    is to be tested' in output
    status, output = run_all(path, code, '--jobs', '2')
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

    status, output = run_all(path, code)
    assert status == 0
    assert output.count('-seed0') == output.count('done') == 3

    # A failed run is not tested.
    shutil.rmtree(folder / 'dml-seed0')
    together.write_text(together.read_text() + "\nmodel['type'] = 'Nothing'\n")
    status, output = run_all(path, code)
    assert status == 1
    assert '- both-seed0: not run: dml-seed0 failed' in output
