"""Knowledge distillation of class logits on real detectors."""

import copy
import math

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import LogitPair, rows, seen_targets


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def log_sigmoid(z):
    return min(z, 0) - math.log1p(math.exp(-abs(z)))


def binary(student, teacher, temperature):
    """KL of two Bernoulli distributions, in plain floats."""
    s, t = student / temperature, teacher / temperature
    p = math.exp(log_sigmoid(t))
    return p * (log_sigmoid(t) - log_sigmoid(s)) + (1 - p) * (
        log_sigmoid(-t) - log_sigmoid(-s)
    )


def reference(pair, temperature, columns=((0, 1, 2), (0, 1, 2))):
    """The sum over priors and classes that the docstring gives."""
    _, weights, avg_factor = seen_targets(pair)
    inside = where_the_images_are(pair)
    ours = torch.cat(rows(pair.student, pair.inputs), 1)
    width = pair.teacher.bbox_head.num_classes
    theirs = torch.cat(rows(pair.teacher, pair.inputs, channels=width), 1)
    total = 0.0
    for image, prior in (weights * inside).nonzero().tolist():
        s, t = ours[image, prior].tolist(), theirs[image, prior].tolist()
        total += weights[image, prior].item() * sum(
            binary(s[a], t[b], temperature)
            for a, b in zip(*columns, strict=True)
        )
    return temperature**2 * total / float(avg_factor)


def where_the_images_are(pair):
    """(B, N), by row and column of each level."""
    head = pair.student.bbox_head
    # Points stand in the middle of a cell, anchors in its corner.
    offset = 0.5 if hasattr(head, 'regress_ranges') else 0.0
    found = []
    for sample in pair.samples:
        height, width = sample.img_shape
        found.append([])
        for level, (step, _) in zip(
            head(pair.student.extract_feat(pair.inputs))[0],
            head.prior_generator.strides,
            strict=True,
        ):
            for row in range(level.shape[2]):
                for column in range(level.shape[3]):
                    within = (row + offset) * step < height
                    within &= (column + offset) * step < width
                    found[-1] += [within] * (level.shape[1] // 3)
    return torch.tensor(found)


GUIDED = 'guided_anchoring/ga-faster-rcnn_r50-caffe_fpn_1x_coco.py'
CASCADE_RPN = 'cascade_rpn/cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py'
FOVEA = 'foveabox/fovea_r50_fpn_4xb4-1x_coco.py'
SABL_RETINA = 'sabl/sabl-retinanet_r50_fpn_1x_coco.py'


def yolov3():
    config = toy.small_model(
        toy.stock('yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py').model
    )
    config.bbox_head.num_classes = 3
    return config


HEADS = {
    'retinanet': tiny.retinanet(),
    'fcos': tiny.fcos(),
    'atss': tiny_dense.atss(),
    'gfl': tiny.gfl(),
}


@pytest.mark.parametrize('name', HEADS)
def test_the_sum_over_priors_and_classes(name):
    pair = LogitPair('KD', HEADS[name], temperature=2.0)
    losses = pair.losses()
    assert losses.keys() == {'cls'}
    expected = reference(pair, 2.0)
    assert expected > 0.1
    assert losses['cls'].item() == pytest.approx(expected, rel=1e-3)
    losses['cls'].backward()
    assert pair.student.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pair.teacher.parameters())


@pytest.mark.parametrize('name', [FOVEA, SABL_RETINA])
def test_heads_with_targets_or_priors_of_their_own(name):
    config = toy.small_model(toy.stock(name).model)
    config.bbox_head.num_classes = 3
    pair = LogitPair('KD', config)
    loss = pair.losses()['cls']
    assert loss > 0
    loss.backward()
    assert pair.student.backbone.conv1.weight.grad.abs().sum() > 0
    pair.equal()
    assert pair.losses()['cls'].item() == 0


def test_between_points_and_anchors():
    """ATSS teaches FCOS: one prior a point in both."""
    pair = LogitPair('KD', tiny.fcos(), tiny_dense.atss())
    assert pair.distiller.teacher.renormalize.needed
    loss = pair.losses()['cls'].item()
    inputs = pair.distiller.teacher.renormalize(pair.inputs, pair.samples)
    ours = torch.cat(rows(pair.student, pair.inputs), 1)
    theirs = torch.cat(rows(pair.teacher, inputs), 1)
    assert ours.shape == theirs.shape
    assert loss > 0


def test_a_teacher_that_knows_other_classes():
    """Only what both know is compared, by name."""
    config = tiny.gfl()
    more = tiny.gfl(bbox_head__num_classes=5)
    pair = LogitPair(
        'KD', config, more, teacher_classes=('sky', 'cow', 'bus', 'cat', 'sea')
    )
    loss = pair.losses()['cls'].item()
    expected = reference(pair, 1.0, columns=((0, 2), (3, 1)))
    assert loss == pytest.approx(expected, rel=1e-3)


def test_reordered_classes_of_an_equal_teacher_give_nothing():
    order = [2, 0, 1]
    names = tuple(tiny.CLASSES[i] for i in order)
    pair = LogitPair('KD', tiny.gfl(), teacher_classes=names)
    pair.equal()
    assert pair.losses()['cls'].item() > 0.1
    layer = pair.teacher.bbox_head.gfl_cls
    with torch.no_grad():
        layer.weight.copy_(layer.weight[order].clone())
        layer.bias.copy_(layer.bias[order].clone())
    assert pair.losses()['cls'].item() == 0


@pytest.mark.parametrize('name', HEADS)
def test_an_equal_student_has_nothing_to_learn(name):
    pair = LogitPair('KD', HEADS[name])
    pair.equal()
    loss = pair.losses()['cls']
    assert loss.item() == 0
    loss.backward()
    assert pair.student.backbone.conv1.weight.grad.abs().max() < 1e-6


def test_a_softmax_head():
    """SSD has a background class, and anchors that differ by level."""
    config = toy.small_model(
        toy.stock('ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py').model
    )
    config.bbox_head.num_classes = 3
    config.data_preprocessor.batch_augments = None
    pair = LogitPair('KD', config, temperature=3.0)
    generator = torch.Generator().manual_seed(0)
    for model in (pair.student, pair.teacher):
        for layers in model.bbox_head.cls_convs:
            layers[-1].weight.data.normal_(0, 0.3, generator=generator)
    loss = pair.losses(sizes=[(320, 320)] * 2)['cls'].item()
    assert loss > 0.1
    labels, weights = ssd_targets(pair)
    p, p_t = (
        torch.cat(rows(model, pair.inputs, channels=4), 1).div(3).softmax(-1)
        for model in (pair.student, pair.teacher)
    )
    divergence = (p_t * (p_t / p).log()).sum(-1)
    positives = (labels < 3).sum()
    expected = 9 * (weights * divergence).sum() / positives
    assert loss == pytest.approx(expected.item(), rel=1e-3)


def ssd_targets(pair):
    """SSD's loss is no module: its targets as its head computes them."""
    head, found = pair.student.bbox_head, []
    original = head.get_targets

    def record(*args, **kwargs):
        found.append(original(*args, **kwargs))
        return found[-1]

    head.get_targets = record
    pair.stock_losses()
    del head.get_targets
    labels, weights = (torch.cat(part, 1) for part in found[0][:2])
    return labels, weights


# ------------------------------------------------------------------ two-stage


@pytest.mark.parametrize('name', [GUIDED, CASCADE_RPN])
def test_where_the_proposals_come_from_does_not_matter(name):
    config = toy.small_model(toy.stock(name).model)
    config.roi_head.bbox_head.num_classes = 3
    loss = LogitPair('KD', config).losses()['cls']
    assert loss.isfinite()
    assert loss > 0


def test_the_labels_of_sabl_are_ordinary():
    config = toy.small_model(
        toy.stock('sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py').model
    )
    config.roi_head.bbox_head.num_classes = 3
    assert LogitPair('KD', config).losses()['cls'] > 0


@pytest.mark.parametrize('sigmoid', [False, True])
def test_the_rois_of_a_two_stage_detector(sigmoid):
    config = tiny.faster_rcnn(
        roi_head__bbox_head__loss_cls__use_sigmoid=sigmoid
    )
    pair = LogitPair('KD', config, temperature=2.0)
    found = []
    head = pair.student.roi_head.bbox_head
    original = head.loss_and_target

    def record(*args, **kwargs):
        found.append(
            {**kwargs, **dict(zip(('cls', 'box'), args, strict=False))}
        )
        return original(*args, **kwargs)

    head.loss_and_target = record
    losses = pair.losses()
    del head.loss_and_target
    assert losses.keys() == {'cls'}
    (call,) = found
    with torch.no_grad():
        theirs = pair.teacher.roi_head._bbox_forward(
            pair.teacher.extract_feat(pair.inputs), call['rois']
        )['cls_score']
    ours = call.get('cls', call.get('cls_score'))
    total = 0.0
    for s, t in zip(ours.tolist(), theirs.tolist(), strict=True):
        if sigmoid:
            total += sum(binary(a, b, 2.0) for a, b in zip(s, t, strict=True))
        else:
            p, q = (torch.tensor(z).double().div(2).softmax(0) for z in (s, t))
            total += (q * (q / p).log()).sum().item()
    assert losses['cls'].item() == pytest.approx(
        4 * total / len(ours), rel=1e-3
    )


def test_every_stage_of_a_cascade():
    pair = LogitPair('KD', tiny.cascade_rcnn())
    losses = pair.losses()
    assert losses.keys() == {'s0_cls', 's1_cls', 's2_cls'}
    halved = LogitPair(
        'KD',
        tiny.cascade_rcnn(roi_head__stage_loss_weights=[0.5, 0.5, 0.25]),
        tiny.cascade_rcnn(),
    ).losses()
    assert halved['s0_cls'].item() == pytest.approx(
        losses['s0_cls'].item() / 2
    )
    assert halved['s1_cls'].item() == pytest.approx(losses['s1_cls'].item())


# ------------------------------------------------------------------- promises


@pytest.mark.parametrize('config', [tiny.gfl(), tiny.faster_rcnn()])
def test_zero_weight_is_the_stock_loss(config):
    pair = LogitPair('KD', config, loss_weight=0.0)
    losses = pair.step()
    state = copy.deepcopy(pair.student.state_dict())
    assert toy.same(losses, pair.stock_losses())
    assert toy.same(list(state), list(pair.student.state_dict()))


@pytest.mark.parametrize('config', [tiny_dense.yolox(), yolov3()])
def test_where_only_positives_train_classes(config):
    """Without objects YOLOX's and YOLOv3's class losses train nothing."""
    pair = LogitPair('KD', config)
    assert pair.losses(objects=(0, 0))['cls'].item() == 0
    assert pair.losses(objects=(0, 2))['cls'].item() > 0


def test_an_image_without_objects():
    losses = LogitPair('KD', tiny.gfl()).losses(objects=(0, 0))
    assert losses['cls'].isfinite()
    assert losses['cls'] > 0


def test_under_half_precision():
    pair = LogitPair('KD', tiny.gfl())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        half = pair.losses()['cls']
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(pair.losses()['cls'].item(), rel=0.1)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize('temperature', [0, -1.0, float('nan')])
def test_a_bad_temperature(temperature):
    with pytest.raises(
        ConfigError, match=r'KD.temperature must be above 0, got'
    ):
        build_checked(
            METHODS, dict(type='mmkd.KD', temperature=temperature), 'kd'
        )


def softmax_atss():
    config = tiny_dense.atss()
    config.bbox_head.loss_cls = dict(type='CrossEntropyLoss')
    return config


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        (
            tiny.retinanet(),
            tiny.gfl(),
            r'KD: the priors of the two dense heads',
        ),
        (
            tiny.detr(),
            tiny.detr(),
            r'KD fits .* DETR: its queries do not belong',
        ),
        (
            tiny.gfl(),
            tiny.faster_rcnn(),
            r'the teacher is FasterRCNN: it has n',
        ),
        (
            tiny.faster_rcnn(),
            tiny.gfl(),
            r'the student is FasterRCNN: it has n',
        ),
        (
            tiny.faster_rcnn(roi_head__bbox_head__loss_cls__use_sigmoid=True),
            tiny.faster_rcnn(),
            r'kind of classifier, or use a method on features',
        ),
        (
            softmax_atss(),
            tiny_dense.atss(),
            r'student belong to a softmax with background, those of the',
        ),
    ],
)
def test_pairs_that_do_not_fit(student, teacher, message):
    with pytest.raises(ConfigError, match=message):
        LogitPair('KD', student, teacher)
