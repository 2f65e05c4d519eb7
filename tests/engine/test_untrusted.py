"""No checkpoint runs code, wherever a training, a test or a page reads it."""

import functools
import http.server
import json
import sys
import threading
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, load_checkpoint
from torch import nn

from mmkd.cli import main
from mmkd.data.checkpoint_loader import safe_checkpoints
from mmkd.doctor import diagnose
from mmkd.engine.checkpoint import latest_checkpoint
from mmkd.errors import CheckpointError, ConfigError
from mmkd.report.evaluation import load_model
from mmkd.report.work_dir import last_checkpoint
from tests.helpers import hostile, toy

OPT_IN = r'more than weights \(.*Path.*--cfg-options trust_checkpoint=True'


@pytest.fixture
def trace(tmp_path):
    """What the code in a checkpoint creates; checked after each test."""
    path = tmp_path / 'trace'
    yield path
    assert not path.exists()


@pytest.fixture
def evil(tmp_path, trace):
    code = hostile.RunsCode(trace)
    return str(hostile.checkpoint(tmp_path / 'evil.pth', optimizer=code))


def pretrained(path):
    return dict(type='Pretrained', checkpoint=path)


def distilled(folder, **options):
    cfg = toy.distilled(folder / 'run', toy.RETINANET, images=2, **options)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    return cfg


def with_peer(cfg, path):
    config = toy.teacher_config(cfg)
    config['model']['backbone']['init_cfg'] = pretrained(path)
    cfg.distillation = dict(
        peers=dict(second=dict(config=config)),
        methods=dict(dml=dict(type='mmkd.DML')),
    )


WAYS = {
    'load_from': lambda cfg, path: cfg.update(load_from=path),
    'resume': lambda cfg, path: cfg.update(load_from=path, resume=True),
    'student': lambda cfg, path: cfg.model.backbone.update(
        init_cfg=pretrained(path)
    ),
    'whole student': lambda cfg, path: cfg.model.update(
        init_cfg=pretrained(path)
    ),
    'peer': with_peer,
    'teacher': lambda cfg, path: cfg.distillation.teacher.update(
        checkpoint=path
    ),
}


@pytest.mark.parametrize('way', WAYS)
def test_a_training(tmp_path, evil, way):
    cfg = distilled(tmp_path)
    WAYS[way](cfg, evil)
    words = r'trust_checkpoint=True next' if way == 'teacher' else OPT_IN
    before = CheckpointLoader._schemes
    with pytest.raises(CheckpointError, match=words):
        toy.train(cfg)
    assert CheckpointLoader._schemes == before


@pytest.mark.parametrize('named', ['it', 'a moved one'])
def test_a_tampered_last_checkpoint(tmp_path, evil, named):
    cfg = distilled(tmp_path)
    cfg.resume = True
    work_dir = Path(cfg.work_dir)
    work_dir.mkdir()
    Path(evil).rename(work_dir / 'epoch_1.pth')
    (work_dir / 'last_checkpoint').write_text(
        f'{work_dir}/epoch_1.pth' if named == 'it' else '/gone/epoch_1.pth'
    )
    with pytest.raises(CheckpointError, match=OPT_IN):
        toy.train(cfg)


@pytest.mark.parametrize('runner', ['mmkd.DistillationRunner', 'Runner'])
@pytest.mark.parametrize('command', ['train', 'resume', 'test', 'tta'])
def test_commands(tmp_path, evil, capsys, runner, command):
    cfg = toy.plain(tmp_path / 'run', toy.RETINANET, images=2)
    cfg.runner_type = runner
    if command == 'train':
        cfg.model.backbone.init_cfg = pretrained(evil)
    path = str(toy.write(cfg, tmp_path / 'config.py'))
    words = {
        'train': ['train', path],
        'resume': ['train', path, '--resume', evil],
        'test': ['test', path, evil],
        'tta': ['test', path, evil, '--tta'],
    }[command]
    assert main(words) == 1
    assert 'trust_checkpoint=True' in capsys.readouterr().err


def test_the_doctor(tmp_path, evil):
    cfg = distilled(tmp_path)
    cfg.load_from = evil
    (finding,) = diagnose(cfg).findings
    assert 'trust_checkpoint=True' in finding


@HOOKS.register_module()
class SavesObjects(Hook):
    def before_save_checkpoint(self, runner, checkpoint):
        checkpoint['mine'] = Config(dict(a=1))


def test_the_doctor_of_what_cannot_be_read_again(tmp_path):
    """A hook that saves objects makes checkpoints that nobody resumes."""
    cfg = distilled(tmp_path)
    cfg.custom_hooks = [dict(type='SavesObjects')]
    found = diagnose(cfg).findings
    assert any('could not resume what it saves' in each for each in found)


def test_a_page(tmp_path, evil):
    """That of `mmkd report`, of which this builds the detectors."""
    cfg = toy.plain(tmp_path / 'run', toy.RETINANET, images=2)

    class Run:
        config, checkpoint = cfg, evil

    with pytest.raises(CheckpointError, match=OPT_IN):
        load_model(Run)


def test_trusted_checkpoints_are_read(tmp_path, evil, trace):
    cfg = distilled(tmp_path)
    cfg.load_from, cfg.trust_checkpoint = evil, True
    runner = toy.build(cfg)
    runner.load_checkpoint(evil)
    assert trace.exists()
    trace.unlink()
    cfg.trust_checkpoint = 'yes'
    with pytest.raises(ConfigError, match=r"True or False, got 'yes'"):
        toy.build(cfg)


def test_the_config_in_a_checkpoint_is_not_run(tmp_path, trace):
    """MMEngine runs it when it resumes, to look for ``gpu_ids``."""
    cfg = distilled(tmp_path)
    toy.train(cfg)
    path = Path(cfg.work_dir, 'epoch_1.pth')
    content = toy.load(path)
    content['meta']['config'] = f'open({str(trace)!r}, "w")\na = 1'
    torch.save(content, path)
    cfg = distilled(tmp_path, epochs=2)
    cfg.resume = True
    assert toy.train(cfg).epoch == 2


def judged(folder, epochs):
    cfg = toy.plain(folder, toy.RETINANET, images=2, epochs=epochs)
    cfg.model.test_cfg.score_thr = 0.0  # it is sure of nothing
    cfg.runner_type = toy.RUNNER
    cfg.default_hooks.checkpoint.save_best = 'coco/bbox_mAP'
    return cfg


def test_the_best_checkpoint_of_another_place_is_not_removed(tmp_path):
    """MMEngine removes what a checkpoint calls the former best one."""
    run, victim = tmp_path / 'run', tmp_path / 'thesis.tex'
    victim.write_text('years of work')
    toy.train(judged(run, 1))
    content = toy.load(run / 'epoch_1.pth')
    info = content['message_hub']['runtime_info']
    info.update(best_score=-1.0, best_ckpt=str(victim))
    torch.save(content, run / 'epoch_1.pth')
    for path in run.glob('best_*'):
        path.unlink()
    cfg = judged(run, 2)
    cfg.resume = True
    toy.train(cfg)
    assert list(run.glob('best_*'))
    assert victim.exists()


# -------------------------------------------------------------- the loader


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A web server on this machine, and empty folders of downloads."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    monkeypatch.setenv('MMENGINE_HOME', str(tmp_path / 'mmengine'))
    (tmp_path / 'mmengine').mkdir()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=tmp_path
    )
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def addresses(tmp_path, site, path):
    """Give a checkpoint all the addresses that MMEngine has for one."""
    names = {'remote': f'{site}/{path.name}', 'local': str(path)}
    text = json.dumps(names)
    (tmp_path / 'mmengine' / 'open_mmlab.json').write_text(text)
    return {
        'path': str(path),
        'file': path.as_uri(),
        'http': f'{site}/{path.name}',
        'open-mmlab': 'open-mmlab://remote',
        'openmmlab': 'openmmlab://local',
        'mmcls': 'mmcls://remote',
    }


SCHEMES = ('path', 'file', 'http', 'open-mmlab', 'openmmlab', 'mmcls')


@pytest.mark.parametrize('scheme', SCHEMES)
def test_addresses(tmp_path, site, evil, monkeypatch, scheme):
    module = 'mmkd.data.checkpoint_loader.get_mmcls_models'
    state = {'backbone.w': torch.ones(2), 'w': torch.ones(2)}
    good = hostile.checkpoint(tmp_path / 'good.pth', state_dict=state)
    for path in (good, Path(evil)):
        name = addresses(tmp_path, site, path)[scheme]
        url = f'{site}/{path.name}'
        monkeypatch.setattr(module, lambda url=url: {'remote': url})
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(2))
        if path is good:
            with safe_checkpoints():
                load_checkpoint(model, name)
            assert model.w.tolist() == [1, 1]
        else:
            with (
                safe_checkpoints(),
                pytest.raises(CheckpointError, match=OPT_IN),
            ):
                load_checkpoint(model, name)


def test_what_mmengine_has_downloaded_is_used(tmp_path, site):
    """On a machine without a network, say."""
    place = tmp_path / 'home' / 'hub' / 'checkpoints' / 'net-12345678.pth'
    place.parent.mkdir(parents=True)
    hostile.checkpoint(place)
    with safe_checkpoints():
        found = CheckpointLoader.load_checkpoint(f'{site}/no/{place.name}')
    assert found['state_dict']['w'].tolist() == [1, 1]


def test_models_of_torchvision_without_it(tmp_path, site, monkeypatch):
    """MMEngine would import it, for a URL that MMEngine itself has."""
    monkeypatch.setitem(sys.modules, 'torchvision', None)
    folder = tmp_path / 'home' / 'hub' / 'checkpoints'
    folder.mkdir(parents=True)
    hostile.checkpoint(folder / 'resnet50-0676ba61.pth')
    with safe_checkpoints():
        found = CheckpointLoader.load_checkpoint('torchvision://resnet50')
        assert found['state_dict']['w'].tolist() == [1, 1]
        words = r'torchvision://new_net is not among .* cannot be imported'
        with pytest.raises(CheckpointError, match=words):
            CheckpointLoader.load_checkpoint('torchvision://new_net')


@pytest.mark.parametrize(
    ('name', 'words'),
    [
        ('torchvision://no_such_net', r'no checkpoint torchvision://no_su'),
        ('open-mmlab://no_such_net', r'no checkpoint open-mmlab://no_su'),
        ('pavi://x', r'pavi://x is not read'),
    ],
)
def test_names_that_nobody_knows(name, words, monkeypatch, site):
    monkeypatch.setattr(
        'mmkd.data.checkpoint_loader.get_torchvision_models', dict
    )
    with safe_checkpoints(), pytest.raises(CheckpointError, match=words):
        CheckpointLoader.load_checkpoint(name)


@pytest.mark.parametrize(
    'content',
    [[1], 5, {'state_dict': [1]}, {'meta': 3}, {'distillation': 'x'}],
)
def test_other_content(tmp_path, content):
    torch.save(content, tmp_path / 'x.pth')
    with (
        safe_checkpoints(),
        pytest.raises(CheckpointError, match=r'x\.pth is no checkpoint: exp'),
    ):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'x.pth'))


def test_others_schemes_stay(tmp_path, monkeypatch):
    before = dict(CheckpointLoader._schemes)
    monkeypatch.setattr(CheckpointLoader, '_schemes', before)
    with safe_checkpoints():
        CheckpointLoader.register_scheme('mine://', lambda *_: {'a': 1})
        with safe_checkpoints(trust=True):
            pass
        inner = CheckpointLoader._schemes['']
        assert inner is not before['']
    after = CheckpointLoader._schemes
    assert {**before, 'mine://': after['mine://']} == after


# ------------------------------------------------------- which checkpoint


class TestPointer:
    @pytest.fixture
    def folder(self, tmp_path):
        run = tmp_path / 'run'
        run.mkdir()
        for name in ('epoch_1.pth', '../other.pth'):
            hostile.checkpoint(run / name)
        return run

    @pytest.fixture(autouse=True)
    def said(self, monkeypatch):
        said = []
        monkeypatch.setattr(
            'mmkd.engine.checkpoint.print_log',
            lambda text, *_: said.append(text),
        )
        return said

    def point(self, folder, content):
        if isinstance(content, str):
            content = content.encode()
        (folder / 'last_checkpoint').write_bytes(content)

    @pytest.mark.parametrize(
        'content',
        [
            *('../other.pth', 'https://example.org/x.pth', 's3://b/x.pth'),
            *('epoch_1.pth\nother.pth', b'\xff\xfe\x00', b'\x00' * 10**6),
            *('/etc/passwd', 'epoch_1.pth\x1b[2J', 'a' * 10**5),
        ],
    )
    def test_what_the_run_has_not_saved(
        self, folder, content, monkeypatch, said
    ):
        monkeypatch.chdir(folder)
        self.point(folder, content)
        found = latest_checkpoint(str(folder))
        assert found == str(folder / 'epoch_1.pth')
        assert 'last_checkpoint is wrong' in said[0]
        Path(found).unlink()
        with pytest.raises(CheckpointError, match=r'--resume CHECKPOINT'):
            latest_checkpoint(str(folder))

    def test_what_it_has_saved_elsewhere(self, folder, tmp_path, said):
        """As the checkpoint hook's ``out_dir`` has it."""
        saved = tmp_path / 'saved' / 'run' / 'epoch_2.pth'
        saved.parent.mkdir(parents=True)
        hostile.checkpoint(saved)
        self.point(folder, str(saved))
        place = str(tmp_path / 'saved')
        assert latest_checkpoint(str(folder), place) == str(saved)
        remote = 's3://bucket/runs/run/epoch_2.pth'
        self.point(folder, remote)
        assert latest_checkpoint(str(folder), 's3://bucket/runs') == remote
        cfg = Config(dict(default_hooks=dict(checkpoint=dict(out_dir=place))))
        self.point(folder, str(saved))
        assert last_checkpoint(folder, cfg) == str(saved)
        assert not said

    def test_a_link_that_a_user_has_made(self, folder, tmp_path):
        """On a disk with more room, say."""
        link = folder / 'epoch_1.pth'
        link.unlink()
        link.symlink_to(tmp_path / 'other.pth')
        self.point(folder, str(link))
        assert latest_checkpoint(str(folder)) == str(link)
