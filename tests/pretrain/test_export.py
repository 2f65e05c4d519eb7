"""What is written is the stock backbone of the detector."""

import pytest
import torch
from mmengine.registry import MODELS

from mmkd.data.checkpoint_loader import safe_checkpoints
from mmkd.pretrain.export import export_backbones
from tests.helpers import tiny_detectors as tiny
from tests.pretrain.test_model import big, pretraining, small

pytest.importorskip('kornia')


def test_each_detector_begins_with_its_backbone(tmp_path):
    model = pretraining(small(), big())
    for buffer in model.buffers():  # statistics, which count as well
        buffer.add_(1)
    files = export_backbones(model, tmp_path, dict(epoch=3))
    assert {p.name for p in tmp_path.iterdir()} == {
        'n0_backbone.pth',
        'n1_backbone.pth',
    }
    for (name, path), config in zip(
        files.items(), (small(), big()), strict=True
    ):
        config.backbone.init_cfg = dict(
            type='Pretrained', checkpoint=str(path), prefix='backbone.'
        )
        detector = MODELS.build({'_scope_': 'mmdet', **config})
        with safe_checkpoints(False):
            detector.init_weights()
        expected = model.networks[name].backbone.state_dict()
        found = detector.backbone.state_dict()
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert torch.equal(found[key], value), key


def test_the_file_is_a_stock_checkpoint(tmp_path):
    model = pretraining(small())
    (path,) = export_backbones(model, tmp_path, dict(epoch=3)).values()
    content = torch.load(path, weights_only=True)
    assert content['meta']['epoch'] == 3
    assert content['meta']['pretrained'] == 'n0'
    detector = tiny.build(small())
    keys = {k for k in detector.state_dict() if k.startswith('backbone.')}
    assert content['state_dict'].keys() == keys
    assert 'projector' not in ' '.join(content['state_dict'])
