"""Pretrainings of a study, and the runs that begin with them."""

import json

import pytest
import torch
from mmengine.config import Config

from mmkd.cli import main
from mmkd.errors import ConfigError
from mmkd.study.pretraining import Pretraining
from tests.helpers import made_data, toy
from tests.helpers.studies import finish


@pytest.fixture
def study(study, configs):
    """A plain run, and one that begins with what is pretrained."""
    plain = str(configs / 'plain.py')
    options = (
        f'--images {made_data.root() / "bccd"} --epochs 1 --batch-size 4 '
        '--size 32 --workers 0 --from-scratch'
    )
    study.content['pretrain'] = {
        'simclr': {'configs': [plain], 'options': options}
    }
    study.networks.clear()
    short = {'train_cfg.max_epochs': 1}
    study.networks |= {
        'student': {'config': plain, 'options': short},
        'begun': {'config': plain, 'options': short, 'pretrained': 'simclr'},
    }
    return study


def pretraining(study):
    return study.read().pretrainings['simclr']


def pretrained(found: Pretraining, weight: float = 1.0) -> None:
    """Leave the files of a pretraining that is done."""
    found.file.parent.mkdir(parents=True, exist_ok=True)
    state = {'backbone.w': torch.tensor(weight)}
    torch.save({'state_dict': state}, found.file)
    found.step.note(fingerprint=found.inputs, finished='then')


def told(study, capsys, *options):
    capsys.readouterr()
    assert main(['study', str(study.write()), '--dry-run', *options]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_run_begins_with_the_backbone(study):
    run = study.runs()['begun']
    pretrained(pretraining(study))
    run.write_config()
    backbone = Config.fromfile(run.config_file).model.backbone
    folder = run.work_dir / 'pretrain-simclr' / 'run'
    assert backbone.init_cfg == dict(
        type='Pretrained',
        checkpoint=str(folder / 'plain_backbone.pth'),
        prefix='backbone.',
    )
    other = study.runs()['student']
    other.write_config()
    stock = Config.fromfile(other.config_file).model.backbone
    assert stock.get('init_cfg') != backbone.init_cfg
    assert {**stock, 'init_cfg': 0} == {**backbone, 'init_cfg': 0}


def test_the_plan(study, capsys):
    lines = told(study, capsys)
    assert lines[0] == 'simclr: is to be pretrained'
    assert lines[2].endswith('to be trained, but simclr is to be pretrained')
    pretrained(pretraining(study))
    lines = told(study, capsys)
    assert lines[0] == 'simclr: done'
    assert lines[2].endswith('is to be trained')


def test_another_backbone_makes_a_result_stale(study, capsys):
    pretrained(pretraining(study))
    for run in study.runs().values():
        finish(run)
    assert [line.split()[-1] for line in told(study, capsys)] == ['done'] * 3
    pretrained(pretraining(study), weight=2.0)
    lines = told(study, capsys)
    assert lines[1].endswith('done')
    assert lines[2].endswith('stale: its pretrained backbone changed')


def test_a_backbone_that_is_gone(study, capsys):
    """To save space; what it was is noted."""
    pretrained(pretraining(study))
    for run in study.runs().values():
        finish(run)
    pretraining(study).file.unlink()
    lines = told(study, capsys)
    assert lines[0].endswith('made again where a run needs it')
    assert lines[2].endswith('done')


def test_other_options_begin_it_anew(study, capsys):
    pretrained(pretraining(study))
    study.content['pretrain']['simclr']['options'] += ' --seed 1'
    assert told(study, capsys)[0] == 'simclr: begun anew: its options changed'


def test_code_that_is_kept(study, capsys):
    found = pretraining(study)
    pretrained(found)
    noted = json.loads(found.step.notes.read_text())
    noted['fingerprint']['code'] = 'other'
    found.step.notes.write_text(json.dumps(noted))
    assert 'the code of mmkd changed' in told(study, capsys)[0]
    assert told(study, capsys, '--keep-stale')[0] == 'simclr: done'


def test_wrong_files(study):
    study.networks['begun']['pretrained'] = 'simcrl'
    message = r'runs\.begun\.pretrained: .*Did you mean "simclr"'
    with pytest.raises(ConfigError, match=message):
        study.read()
    study.networks['begun']['pretrained'] = 'simclr'
    study.content['pretrain']['simclr'] = {'options': '--images x'}
    with pytest.raises(ConfigError, match='pretrain must map names to the'):
        study.read()


def test_a_config_that_is_not_there(study):
    study.content['pretrain']['simclr']['configs'] = ['/nowhere.py']
    with pytest.raises(ConfigError, match=r"'/nowhere\.py' does not exist"):
        pretraining(study).status(keep_stale=False)


@pytest.mark.slow
def test_a_whole_study(study, capsys):
    study.networks.pop('student')
    study.content['baseline'] = 'begun'
    assert main(['study', str(study.write())]) == 0, capsys.readouterr()
    run = study.runs()['begun']
    assert run.result['metrics']
    begun = toy.load(pretraining(study).file)['state_dict']
    ended = toy.load(run.checkpoint)['state_dict']
    assert {k for k in ended if k.startswith('backbone.')} == begun.keys()
    # what the detector's config freezes is still what was pretrained
    cfg = Config.fromfile(run.config_file).model.backbone
    if cfg.get('frozen_stages', -1) >= 0:
        assert torch.equal(
            ended['backbone.conv1.weight'], begun['backbone.conv1.weight']
        )
    capsys.readouterr()
    assert main(['study', str(study.path)]) == 0
    assert capsys.readouterr().out.count('done') == 2
