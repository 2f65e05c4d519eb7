"""Folded batch norms: the same numbers, and nothing folded that must not."""

import copy

import pytest
import torch
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.teachers.fold_bn import _fold, fold_batch_norms, watched
from tests.helpers import faster
from tests.helpers import tiny_dense as dense
from tests.helpers import tiny_detectors as tiny

SIZES = ((96, 128), (128, 96))


def retina_sepbn():
    model = tiny.retinanet()
    options = dict(num_classes=3, in_channels=16, feat_channels=8)
    model.bbox_head = dict(
        type='RetinaSepBNHead',
        num_ins=5,
        stacked_convs=2,
        norm_cfg=dict(type='BN'),
        anchor_generator=model.bbox_head.anchor_generator,
        **options,
    )
    return model


def norms_in(module):
    return [m for m in module.modules() if isinstance(m, _BatchNorm)]


def folded(model, paths=()):
    """A folded teacher beside the network as it is."""
    teacher = tiny.wrap(copy.deepcopy(model), paths)
    return teacher, fold_batch_norms(teacher)


def close(ours, theirs):
    scale = theirs.abs().max()
    torch.testing.assert_close(ours / scale, theirs / scale, atol=2e-5, rtol=0)


class TestFamilies:
    """Against the networks as they are, on other pixels than the check's."""

    @pytest.mark.parametrize(
        ('config', 'kept'),
        [
            (tiny.retinanet, 0),
            (dense.yolox, 0),
            # Of the head: the levels share convolutions, not norms.
            (dense.rtmdet, 2 * 3),
            (retina_sepbn, 2 * 2 * 5),
        ],
    )
    def test_dense(self, config, kept):
        model = faster.trained(config())
        teacher, count = folded(model)
        assert len(norms_in(model)) == count + kept
        assert len(norms_in(teacher.model)) == kept
        assert norms_in(teacher.model) == norms_in(teacher.model.bbox_head)
        inputs, samples = tiny.batch_for(model, sizes=SIZES)
        view = teacher.view(Batch(inputs, samples))
        with torch.no_grad():
            maps = model.extract_feat(inputs)
            outputs = model.bbox_head(maps)
        for ours, theirs in zip(view.maps, maps, strict=True):
            close(ours, theirs)
        for ours, theirs in zip(view.raw_dense, outputs, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                close(a, b)

    @pytest.mark.parametrize('config', [tiny.faster_rcnn, tiny.double_head])
    def test_two_stage(self, config):
        model = faster.trained(config())
        teacher, count = folded(model)
        assert count == len(norms_in(model)) >= 20
        assert norms_in(teacher.model) == []
        inputs, samples = tiny.batch_for(model, sizes=SIZES)
        step = StepRecord(model)
        with step.recording():
            tiny.seeded_loss(model, inputs, samples)
        view = teacher.view(Batch(inputs, samples))
        logits, deltas, _ = view.score_rois(step.rois[0], 0)
        with torch.no_grad():
            maps = model.extract_feat(inputs)
            expected = model.roi_head._bbox_forward(maps, step.rois[0].boxes)
            scores, _ = model.rpn_head(maps)
        close(logits, expected['cls_score'])
        close(deltas, expected['bbox_pred'])
        for ours, theirs in zip(view.rpn[0], scores, strict=True):
            close(ours, theirs)

    def test_what_is_new_is_frozen_and_in_eval_mode(self):
        teacher, _ = folded(faster.trained(tiny.retinanet()))
        assert not any(p.requires_grad for p in teacher.model.parameters())
        assert not any(m.training for m in teacher.model.modules())


def test_taps_on_a_norm_and_on_its_convolution():
    model = faster.trained(tiny.retinanet())
    paths = ['backbone.layer2.1.bn2', 'backbone.layer3.0.conv2']
    teacher, count = folded(model, paths)
    assert count == len(norms_in(model)) - 1  # that of the read convolution
    inputs, samples = tiny.batch_for(model)
    view = teacher.view(Batch(inputs, samples))
    expected = StepRecord(model, paths)
    with torch.no_grad(), expected.recording():
        model.extract_feat(inputs)
    assert isinstance(teacher.model.get_submodule(paths[0]), nn.Identity)
    for path in paths:
        (theirs,) = expected.features(path)
        close(view.features(path, expected)[0], theirs)


def test_a_hand_worked_value():
    convolution, norm = nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1, eps=0.0)
    for parameter, value in (
        *((convolution.weight, 2), (convolution.bias, 1)),
        *((norm.weight, 6), (norm.bias, 5)),
        *((norm.running_mean, 3), (norm.running_var, 4)),
    ):
        nn.init.constant_(parameter, value)
    _fold(convolution, norm)
    # 6 / sqrt(4) * (2 x + 1 - 3) + 5 = 6 x - 1
    assert convolution.weight.item() == pytest.approx(6)
    assert convolution.bias.item() == pytest.approx(-1)


class Tangle(nn.Module):
    """Convolutions and norms that meet otherwise than they are listed."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.norm1 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv3, self.norm3 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.conv4, self.norm4 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.shared, self.norm5 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
        self.norm6, self.alone = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)
        self.twice = nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.norm1(self.conv1(x))
        x = self.norm2(self.conv2(x))
        x = self.norm3(self.conv3(x).relu_())  # changed in between
        x = self.conv4(x)
        x = self.norm4(x * 1)  # another tensor
        x = self.norm5(self.shared(x)) + self.norm6(self.shared(x))
        return self.twice(self.twice(self.alone(x)))


def test_only_those_that_meet_each_other_alone():
    model = Tangle().eval()
    with torch.no_grad(), watched(model) as flow:
        model(torch.randn(1, 4, 3, 3))
    assert {(c, n) for c, n in flow.pairs()} == {
        (model.conv1, model.norm1),
        (model.conv2, model.norm2),
    }
    assert 'forward' not in vars(model.conv1)


@MODELS.register_module(name='ToyForked')
class Forked(nn.Module):
    """A convolution whose output goes another way beside its norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 16, 1), nn.BatchNorm2d(16)
        nn.init.constant_(self.norm.weight, 3.0)

    def forward(self, maps):
        made = self.conv(maps[0])
        return (self.norm(made) + made,) * 5


def test_a_wrong_fold_is_noticed():
    model = faster.trained(tiny.retinanet())
    model.neck = Forked()
    with pytest.raises(
        ConfigError, match=r'fold_bn.*answers differently.*Set fold_bn=False'
    ):
        folded(model)
