"""`mmkd convert`: from the file of a library to what init_cfg takes."""

import pytest
import torch
from mmdet.models.backbones import MobileNetV2, SwinTransformer
from mmengine.config import Config, ConfigDict

from mmkd.cli import main
from mmkd.data.checkpoint_loader import safe_checkpoints
from tests.data.test_foreign_weights import (
    Network,
    mobilenet_of_torchvision,
    swin_names,
)
from tests.doctor.test_weights import SWIN
from tests.helpers import toy


@pytest.fixture
def mobilenet(tmp_path):
    """A file of torchvision, a picture, and the features of it."""
    torch.manual_seed(0)
    picture, network = torch.randn(1, 3, 64, 96), Network()
    features = mobilenet_of_torchvision(picture, network)
    path = tmp_path / 'mobilenet_v2.pth'
    head = {'classifier.1.weight': torch.randn(10, 1280)}
    torch.save(network.state | head, path)
    return path, picture, features


def loaded(module, path):
    module.init_cfg = ConfigDict(type='Pretrained', checkpoint=str(path))
    with safe_checkpoints():
        module.init_weights()
    module.eval()
    return module


def test_the_features_are_equal(mobilenet, tmp_path, capsys):
    path, picture, features = mobilenet
    out = tmp_path / 'out.pth'
    assert main(['convert', str(path), str(out)]) == 0
    said = capsys.readouterr().out
    assert '314 tensors' not in said
    assert "of torchvision's MobileNetV2" in said
    assert '260 of 260 tensors of MobileNetV2' in said
    assert 'left over: classifier.1.weight' in said
    (found,) = loaded(MobileNetV2(out_indices=(7,)), out)(picture)
    torch.testing.assert_close(found, features)


def config(folder, **backbone):
    cfg = dict(
        model=toy.stock(toy.RETINANET).model.to_dict()
        | dict(backbone=backbone)
    )
    return toy.write(Config(cfg), folder / 'config.py')


def test_a_swin_starts_from_it(tmp_path, capsys):
    """It looks for names of a detector's backbone."""
    cfg = config(tmp_path, type='SwinTransformer', **SWIN)
    trained = SwinTransformer(**SWIN)
    state = {
        swin_names(k): v
        for k, v in trained.state_dict().items()
        if not k.startswith('norm') and v.is_floating_point()
    }
    path, out = tmp_path / 'swin.pth', tmp_path / 'out.pth'
    torch.save(state, path)
    arguments = ['convert', str(path), str(out), '--to', str(cfg)]
    assert main(arguments) == 0
    assert 'convert_weights=False' in capsys.readouterr().out
    found = loaded(SwinTransformer(**SWIN), out).state_dict()
    name = 'stages.1.blocks.0.ffn.layers.1.weight'
    assert torch.equal(found[name], trained.state_dict()[name])
    name = 'stages.0.downsample.reduction.weight'
    pixels = state['features.2.reduction.weight'].unflatten(1, (4, 16))
    assert torch.equal(
        found[name].unflatten(1, (16, 4))[:, :, 1], pixels[:, 2]
    )


def test_nothing_is_written_of_what_does_not_fit(mobilenet, tmp_path, capsys):
    path, *_ = mobilenet
    out = tmp_path / 'out.pth'
    out.write_text('as it was')
    cfg = config(tmp_path, type='MobileNetV2', widen_factor=0.5)
    arguments = ['convert', str(path), str(out), '--to', str(cfg)]
    assert main(arguments) == 1
    assert 'of another shape: conv1.conv.weight' in capsys.readouterr().err
    assert main([*arguments, '--module', 'backbon']) == 1
    assert 'has no such part. It has' in capsys.readouterr().err
    torch.save({'model.0.conv.weight': torch.ones(1)}, path)
    assert main(['convert', str(path), str(out)]) == 1
    assert 'an Ultralytics YOLO fit no stock module' in capsys.readouterr().err
    torch.save(dict(epoch=1), path)
    assert main(['convert', str(path), str(out)]) == 1
    assert 'no state dict was found' in capsys.readouterr().err
    assert main(['convert', str(path), str(path)]) == 1
    assert 'FILE and OUT are both' in capsys.readouterr().err
    assert out.read_text() == 'as it was'
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        *('config.py', 'mobilenet_v2.pth', 'out.pth')
    ]
