"""What a network has taken from a file, and what it has not, and why."""

import pytest
import torch
from mmdet.models.backbones import MobileNetV2, ResNet, SwinTransformer
from mmengine.config import ConfigDict
from torch import nn

from mmkd.data.checkpoint_loader import safe_checkpoints
from mmkd.doctor import weights
from mmkd.doctor.report import Report
from mmkd.errors import CheckpointError
from tests.data.test_foreign_weights import AUTHORS, renamed, swin_names


def pretrained(module, path, **options):
    """A network whose backbone has started from a file, as MMEngine does."""
    module.init_cfg = ConfigDict(
        type='Pretrained', checkpoint=str(path), **options
    )
    model = nn.ModuleDict(dict(backbone=module))
    with safe_checkpoints():
        weights.check_starts(model)
        module.init_weights()
    return model


def examined(module, path, **options):
    model, report = pretrained(module, path, **options), Report()
    with safe_checkpoints():
        weights._check_pretrained('student', model, model, report)
    return report


def save(path, content):
    torch.save(content, path)
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / 'weights.pth'


def resnet(width=8, **options):
    return ResNet(depth=18, base_channels=width, **options)


def test_a_file_that_fits(file):
    save(file, dict(state_dict=resnet().state_dict()))
    report = examined(resnet(), file)
    assert not report.findings + report.notes
    assert '100 of 100 tensors' in report.sections['Weights'][0]


def test_names_of_torchvision(file):
    state = MobileNetV2(widen_factor=0.25).state_dict()
    order = iter(range(1000))
    layers = dict.fromkeys(key.rpartition('.')[0] for key in state)
    number = {layer: next(order) for layer in layers}
    # As torchvision calls the layers: by their numbers.
    state = {
        f'features.{number[path]}.{leaf}': value
        for key, value in state.items()
        for path, _, leaf in [key.rpartition('.')]
    }
    save(file, state | {'features.1.conv.0.0.weight': torch.ones(1)})
    (found,) = examined(MobileNetV2(widen_factor=0.25), file).stops
    assert "the student's backbone has taken nothing from backbone" in found
    assert '0 of 260 tensors' in found
    assert "It holds the weights of torchvision's MobileNetV2." in found

    save(file, state)
    (found,) = examined(MobileNetV2(widen_factor=0.25), file).stops
    assert '`mmkd convert FILE OUT --to CONFIG`' in found


def test_another_shape_is_called_that(file):
    save(file, resnet(16).state_dict())
    report = examined(resnet(8), file)
    (found,) = report.stops
    assert (
        '100 of another shape: conv1.weight is (16, 3, 7, 7) in the file and '
        '(8, 3, 7, 7) here' in found
    )
    assert 'not in' not in found + report.sections['Weights'][0]


def test_names_behind_a_prefix(file):
    state = resnet().state_dict()
    save(file, {f'backbone.{k}': v for k, v in state.items()})
    (found,) = examined(resnet(), file).stops
    assert "set prefix='backbone'" in found
    report = examined(resnet(), file, prefix='backbone.')
    assert not report.findings


def test_a_prefix_that_does_not_exist(file):
    state = resnet().state_dict()
    save(file, {f'backbone.{k}': v for k, v in state.items()})
    with pytest.raises(CheckpointError) as caught:
        examined(resnet(), file, prefix='student.backbone')
    assert "no key that begins with prefix='student.backbone'" in str(
        caught.value
    )
    assert "set prefix='backbone'" in str(caught.value)


def test_where_nothing_looks(file):
    save(file, dict(model=resnet().state_dict(), epoch=3))
    (found,) = examined(resnet(), file).stops
    assert 'They lie under "model" in it.' in found
    assert '`mmkd convert' in found


def test_few(file):
    state = resnet().state_dict()
    few = {k: v for k, v in state.items() if k.startswith('layer1')}
    save(file, few)
    (found,) = examined(resnet(), file).warns
    assert 'has taken only 20 of 100 tensors' in found
    assert '80 are not in it (conv1.weight, ' in found


def test_most(file):
    """A head for other classes is nothing wrong."""
    state = resnet().state_dict()
    state['conv1.weight'] = torch.ones(16, 3, 7, 7)
    report = examined(resnet(), save(file, state))
    assert not report.findings
    (note,) = report.notes
    assert 'has taken 99 of 100 tensors' in note
    assert '1 of another shape: conv1.weight is (16, 3, 7, 7)' in note


@pytest.mark.parametrize(
    ('state', 'whose'),
    [
        ({'model.0.conv.weight': torch.ones(1)}, 'an Ultralytics YOLO'),
        ({'vit.layer.attention.self.query.bias': torch.ones(1)}, 'Hugging'),
    ],
)
def test_what_cannot_be_mapped(file, state, whose):
    (found,) = examined(resnet(), save(file, state)).stops
    assert f'It holds the weights of {whose}' in found
    assert 'mmkd cannot map them to this ResNet' in found


@pytest.mark.parametrize(
    ('style', 'name', 'wrong'),
    [
        ('caffe', 'torchvision_resnet50.pth', True),
        ('pytorch', 'torchvision_resnet50.pth', False),
        ('pytorch', 'resnet50_caffe.pth', True),
    ],
)
def test_the_style_of_a_resnet(tmp_path, style, name, wrong):
    path = tmp_path / name
    module = ResNet(depth=50, base_channels=4, style=style)
    save(path, module.state_dict())
    report = examined(module, path)
    assert bool(report.warns) == wrong
    assert not wrong or 'in another layer of a block' in report.warns[0]


SWIN = dict(
    **dict(embed_dims=16, depths=(1, 1), num_heads=(2, 4), window_size=4),
    **dict(strides=(4, 2), out_indices=(0, 1)),
)


class TestSwin:
    """It has a loader of its own."""

    def theirs(self):
        state = {
            swin_names(k): v
            for k, v in SwinTransformer(**SWIN).state_dict().items()
            if not k.startswith('norm') and v.is_floating_point()
        }
        return renamed(state, *AUTHORS)

    def test_names_that_it_converts(self, file):
        save(file, dict(model=self.theirs()))
        report = examined(SwinTransformer(**SWIN, convert_weights=True), file)
        assert not report.findings

    def test_names_that_it_fails_on(self, file):
        save(file, dict(model=self.theirs()))
        with pytest.raises(CheckpointError, match=r'"backbone\."') as caught:
            examined(SwinTransformer(**SWIN), file)
        assert "the weights of Swin's authors" in str(caught.value)
