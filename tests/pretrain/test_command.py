"""`mmkd pretrain` from photos to a detector that begins with the result."""

import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mmkd.cli.main import main
from mmkd.engine.logs import by_step, training_rows
from mmkd.pretrain import augment
from tests.helpers import made_data, toy
from tests.helpers import tiny_detectors as tiny

pytest.importorskip('kornia')
FEW = (
    *('--epochs', '4', '--batch-size', '4', '--size', '32'),
    *('--workers', '0', '--eval-interval', '2', '--warmup-epochs', '1'),
)
KEEP = (
    *('--cfg-options', 'default_hooks.checkpoint.max_keep_ckpts=-1'),
    'default_hooks.checkpoint.interval=1',
)


def write(folder, name='net', **changes):
    path = folder / f'{name}.py'
    Config(dict(model=tiny.retinanet(**changes))).dump(str(path))
    return path


def source():
    return str(made_data.root() / 'bccd')


def pretrain(*arguments):
    return main(['pretrain', *map(str, arguments)])


@pytest.fixture(scope='module')
def dogo(tmp_path_factory):
    """A run of two networks, with its folder and what it printed."""
    folder = tmp_path_factory.mktemp('dogo')
    frozen = dict(backbone__frozen_stages=1, backbone__norm_eval=True)
    small = write(folder, 'small', **frozen)
    big = write(folder, 'big', backbone__base_channels=16)
    run = folder / 'run'
    paths = ('--images', source(), '--val', source(), '--work-dir', run)
    assert pretrain(small, big, *paths, *FEW, *KEEP) == 0
    return run, (small, big)


class TestRun:
    def test_each_detector_begins_with_its_backbone(self, dogo):
        run, configs = dogo
        whole = toy.load(run / 'epoch_4.pth')['state_dict']
        for path in configs:
            file = run / f'{path.stem}_backbone.pth'
            cfg = Config.fromfile(path).model
            cfg.backbone.init_cfg = dict(
                type='Pretrained', checkpoint=str(file), prefix='backbone.'
            )
            detector = MODELS.build({'_scope_': 'mmdet', **cfg})
            detector.init_weights()
            for key, value in detector.backbone.state_dict().items():
                trained = whole[f'networks.{path.stem}.backbone.{key}']
                assert torch.equal(value, trained), key

    def test_networks_have_learnt(self, dogo):
        run, configs = dogo
        rows = by_step(training_rows(run))
        for path in configs:
            begun = toy.load(run / 'epoch_1.pth')['state_dict']
            ended = toy.load(run / 'epoch_4.pth')['state_dict']
            layer = f'networks.{path.stem}.backbone.conv1.weight'  # frozen
            assert not torch.equal(begun[layer], ended[layer])
            losses = rows[f'{path.stem}.loss_nt_xent']
            assert len(losses) == 4
            assert rows[f'{path.stem}.loss_kl'].keys() == losses.keys()

    def test_measures_are_logged(self, dogo):
        run, configs = dogo
        rows = by_step(training_rows(run))
        for path in configs:
            for kind in ('knn', 'knn_class_mean', 'alignment', 'uniformity'):
                assert [*rows[f'{path.stem}/{kind}']] == [2, 4]
            assert all(0 <= v <= 1 for v in rows[f'{path.stem}/knn'].values())

    def test_the_log_says_what_was_changed_and_what_to_do(self, dogo):
        run, _ = dogo
        (log,) = run.glob('*/*.log')
        text = log.read_text()
        assert 'small: batch norms learn (norm_eval=False) in pre' in text
        assert '(frozen_stages=1) are trained in pretraining' in text
        assert 'model.backbone.init_cfg.prefix=backbone.' in text
        assert 'mmkd export' not in text  # there is no detector to export

    def test_the_learning_rate_rises_and_falls(self, dogo):
        """Linearly to 0.3 * 4 / 256, then half a cosine, by iteration."""
        run, _ = dogo
        cfg = Config.fromfile(run / 'pretrain.py')
        steps = 12 // 4
        top = 0.3 * 4 / 256
        rates = [*by_step(training_rows(run))['lr'].values()]
        rise = 1 / (steps + 1)
        assert cfg.optim_wrapper.optimizer.lr == top
        expected = []
        for step in range(2, 12, steps):  # the last of each epoch
            if step < steps:
                factor = rise + (1 - rise) * step / (steps - 1)
            else:
                angle = math.pi * (step - steps) / (3 * steps)
                factor = (1 + math.cos(angle)) / 2
            expected.append(top * factor)
        assert rates == pytest.approx(expected)

    def test_the_list_of_images(self, dogo):
        run, _ = dogo
        files = (run / 'images.txt').read_text().splitlines()
        numbers = {int(Path(file).stem) for file in files}
        assert numbers == {*made_data.SPLITS['train']}

    def test_a_run_is_not_overwritten(self, dogo, capsys):
        run, configs = dogo
        before = (run / 'pretrain.py').read_bytes()
        status = pretrain(
            *configs, '--images', source(), '--work-dir', run, '--epochs', 1
        )
        assert status == 1
        assert 'holds a run that has been begun' in capsys.readouterr().err
        assert (run / 'pretrain.py').read_bytes() == before

    def test_resumed_is_uninterrupted(self, dogo, capsys):
        run, configs = dogo
        again = run.parent / 'again'
        again.mkdir()
        for name in ('epoch_2.pth', 'images.txt'):
            shutil.copy(run / name, again / name)
        (again / 'last_checkpoint').write_text(str(again / 'epoch_2.pth'))
        paths = ('--images', source(), '--val', source())
        status = pretrain(
            *configs, *paths, '--work-dir', again, '--resume', *FEW, *KEEP
        )
        assert status == 0
        (log,) = again.glob('*/*.log')
        assert 'will not equal' not in log.read_text()
        for name in ('small_backbone.pth', 'big_backbone.pth'):
            whole, resumed = (toy.load(f / name) for f in (run, again))
            assert toy.same(whole, resumed), name


class TestWrongInput:
    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            (['--batch-size', '1'], '--batch-size must be at least 2'),
            (['--batch-size', '13'], 'more than there are images (12)'),
            (['--method', 'dogo'], 'give two or more configs, got one'),
            (['--kl-weight', '1'], '--kl-weight is for --method dogo'),
            (['--size', '20'], '--size must be at least 32'),
            (['--crop-scale', '.5', '.1'], '--crop-scale must be two parts'),
            (['--work-dir', __file__], 'is a file. Give the name of a folder'),
            (['--val', 'nowhere'], 'nowhere: expected'),
        ],
    )
    def test_is_told_in_a_line(
        self, tmp_path, capsys, monkeypatch, options, message
    ):
        monkeypatch.chdir(tmp_path)
        path = write(tmp_path)
        assert pretrain(path, '--images', source(), *options) == 1
        error = capsys.readouterr().err
        assert message in error
        assert 'Traceback' not in error
        assert not list(tmp_path.rglob('*.pth'))

    def test_weights_of_several_networks(self, tmp_path, capsys):
        both = [write(tmp_path, 'a'), write(tmp_path, 'b')]
        where = ('--images', source())
        assert pretrain(*both, *where, '--kl-weight', 1, 2, 3) == 1
        assert 'one for each of the 2 configs' in capsys.readouterr().err
        assert pretrain(*both, *where, '--kl-weight', -1) == 1
        assert 'at least 0, got -1' in capsys.readouterr().err

    def test_an_empty_folder(self, tmp_path, capsys):
        (tmp_path / 'none').mkdir()
        path = write(tmp_path)
        assert pretrain(path, '--images', tmp_path / 'none') == 1
        assert 'expected images, got none' in capsys.readouterr().err

    def test_without_kornia(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(augment, 'find_spec', lambda name: None)
        assert pretrain(write(tmp_path), '--images', source()) == 1
        assert "pip install 'mmkd[pretrain]'" in capsys.readouterr().err


def test_the_config_alone(tmp_path, capsys):
    path, run = write(tmp_path), tmp_path / 'run'
    where = ('--images', source(), '--work-dir', run)
    assert pretrain(path, path, *where, *FEW, '--no-train') == 0
    assert {p.name for p in run.glob('*.*')} >= {'images.txt', 'pretrain.py'}
    assert f'mmkd train {run}/pretrain.py' in capsys.readouterr().out
    model = Config.fromfile(run / 'pretrain.py').model
    assert [*model.networks] == ['net', 'net_2']
    # the first learns from the other, as the official code's template has it
    assert model.kl_weights == [100.0, 1.0]


def test_resumed_with_other_images(tmp_path, capsys):
    path, run = write(tmp_path), tmp_path / 'run'
    where = ('--images', source(), '--work-dir', run)
    pretrain(path, *where, *FEW, '--no-train')
    whole = (run / 'images.txt').read_text().splitlines()
    (run / 'images.txt').write_text('\n'.join(whole[:8]))
    capsys.readouterr()
    assert pretrain(path, *where, *FEW, '--no-train', '--resume') == 0
    text = capsys.readouterr().out
    assert 'The images have changed since the run began (8 then, 12' in text
    assert len((run / 'images.txt').read_text().splitlines()) == 8


@pytest.mark.slow
def test_a_signal_and_resume(tmp_path):
    """It ends after the iteration, with a checkpoint to go on from."""
    path, run = write(tmp_path), tmp_path / 'run'
    pretrain(
        *(path, '--images', source(), '--work-dir', run, *FEW, '--no-train')
    )
    cfg = Config.fromfile(run / 'pretrain.py')
    cfg.custom_imports = dict(imports=['tests.helpers.toy'])
    cfg.custom_hooks.append(dict(type='ToySignal'))
    config = toy.write(cfg, run / 'pretrain.py')
    command = ('tools/train.py', config, '--work-dir', run, '--resume')
    job = toy.tool(
        tmp_path / 'log', *command, env=dict(TOY_SIGNAL='TERM iteration 5')
    )
    assert job.process.exitcode == 143, job.text()[-3000:]
    assert (run / 'preempted.pth').is_file()
    assert not (run / 'net_backbone.pth').exists()
    job = toy.tool(tmp_path / 'log', *command)
    assert job.process.exitcode == 0, job.text()[-3000:]
    assert (run / 'net_backbone.pth').is_file()


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Both have the same weights, and one writes."""
    from tests.engine.test_distributed import launch

    path, run = write(tmp_path), tmp_path / 'run'
    pretrain(
        *(path, '--images', source(), '--work-dir', run, *FEW, '--no-train')
    )
    cfg = Config.fromfile(run / 'pretrain.py')
    launch(tmp_path, cfg, '--work-dir', run)
    saved = toy.load(run / 'net_backbone.pth')['state_dict']
    whole = toy.load(run / 'epoch_4.pth')['state_dict']
    for key, value in saved.items():
        assert torch.equal(value, whole[f'networks.net.{key}'])
    assert os.path.getsize(run / 'images.txt')
