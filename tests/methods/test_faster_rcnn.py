"""Faster R-CNN distillation on real detectors against the paper's formulas."""

import copy

import pytest
import torch

from mmkd.detectors.blank import blank_pass
from mmkd.detectors.facts import read_facts
from mmkd.detectors.record import RoIOutputs, StepRecord
from mmkd.errors import ConfigError
from mmkd.methods import FasterRCNNDistillation
from mmkd.peers.view import as_teacher
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import frcnn_reference
from tests.helpers import tiny_detectors as tiny
from tests.helpers.frcnn_reference import (
    RCNNPair,
    SeenLosses,
    bounded,
    decode,
    encode,
    expected_parts,
    rcn_reference,
)

STDS = dict(
    rpn_head__bbox_coder__target_means=[0.1, -0.2, 0.0, 0.3],
    rpn_head__bbox_coder__target_stds=[0.5, 2.0, 0.25, 1.0],
    roi_head__bbox_head__bbox_coder__target_means=[0.0, 0.1, 0.2, 0.0],
    roi_head__bbox_head__bbox_coder__target_stds=[0.2, 0.1, 0.1, 0.4],
)
DECODED = dict(
    rpn_head__reg_decoded_bbox=True,
    rpn_head__loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
    roi_head__bbox_head__reg_decoded_bbox=True,
    roi_head__bbox_head__loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
)
SOFTMAX_RPN = dict(rpn_head__loss_cls__use_sigmoid=False)
SIGMOID_RCN = dict(roi_head__bbox_head__loss_cls__use_sigmoid=True)
AGNOSTIC = dict(roi_head__bbox_head__reg_class_agnostic=True)
CAFFE = dict(
    data_preprocessor=dict(
        _delete_=True,
        type='DetDataPreprocessor',
        mean=[103.53, 116.28, 123.675],
        std=[1.0, 1.0, 1.0],
        pad_size_divisor=32,
    )
)
POSITIVE_WEIGHTS = dict(
    train_cfg__rpn__pos_weight=3.0, train_cfg__rcnn__pos_weight=0.5
)
NO_POSITIVE_ROI = dict(
    train_cfg__rcnn__assigner__pos_iou_thr=0.999,
    train_cfg__rcnn__assigner__min_pos_iou=0.999,
    train_cfg__rcnn__sampler__add_gt_as_proposals=False,
)
NO_ROI = dict(train_cfg__rpn_proposal__min_bbox_size=10_000)


def four_classes(**changes):
    return dict(roi_head__bbox_head__num_classes=4, **changes)


FRCNN, CASCADE = tiny.faster_rcnn, tiny.cascade_rcnn
# name: student, teacher, options of the case
PAIRS = {
    'fpn': (FRCNN(), FRCNN(), {}),
    'other normalisation': (FRCNN(), FRCNN(**CAFFE), {}),
    'c4': (tiny.c4(), tiny.c4(), {}),
    'mask': (tiny.mask_rcnn(), tiny.mask_rcnn(), dict(masks=True)),
    'mask from faster': (tiny.mask_rcnn(), FRCNN(), dict(masks=True)),
    'double head': (tiny.double_head(), tiny.double_head(), {}),
    'faster from double head': (FRCNN(), tiny.double_head(), {}),
    'cascade': (CASCADE(), CASCADE(), {}),
    'cascade from faster': (CASCADE(), FRCNN(), {}),
    'faster from cascade': (FRCNN(), CASCADE(), {}),
    'softmax rpn': (FRCNN(**SOFTMAX_RPN), FRCNN(**SOFTMAX_RPN), {}),
    'softmax from sigmoid rpn': (FRCNN(**SOFTMAX_RPN), FRCNN(), {}),
    'sigmoid from softmax rpn': (FRCNN(), FRCNN(**SOFTMAX_RPN), {}),
    'sigmoid rois': (FRCNN(**SIGMOID_RCN), FRCNN(**SIGMOID_RCN), {}),
    'agnostic from specific': (FRCNN(**AGNOSTIC), FRCNN(), {}),
    'specific from agnostic': (FRCNN(), FRCNN(**AGNOSTIC), {}),
    'other deltas': (FRCNN(), FRCNN(**STDS), {}),
    'iou loss': (FRCNN(**DECODED), FRCNN(), {}),
    'iou loss, other deltas': (FRCNN(**DECODED), FRCNN(**STDS), {}),
    'more classes': (
        FRCNN(),
        FRCNN(**four_classes()),
        dict(teacher_classes=('cow', 'bus', 'cat', 'dog')),
    ),
    'fewer classes': (
        FRCNN(**four_classes()),
        FRCNN(),
        dict(student_classes=('yak', 'dog', 'cat', 'cow')),
    ),
    'classes overlap': (
        FRCNN(**four_classes()),
        FRCNN(),
        dict(student_classes=('yak', 'dog', 'gnu', 'cat')),
    ),
    'classes overlap, sigmoid': (
        FRCNN(**four_classes(**SIGMOID_RCN)),
        FRCNN(**SIGMOID_RCN),
        dict(student_classes=('yak', 'dog', 'gnu', 'cat')),
    ),
    'reordered': (
        FRCNN(),
        FRCNN(),
        dict(teacher_classes=('dog', 'cow', 'cat')),
    ),
    'sample weights': (FRCNN(**POSITIVE_WEIGHTS), FRCNN(), {}),
    'an image without objects': (FRCNN(), FRCNN(), dict(objects=(6, 0))),
    'no objects': (FRCNN(), FRCNN(), dict(objects=0, positives=False)),
    'no positive roi': (FRCNN(**NO_POSITIVE_ROI), FRCNN(), {}),
    'padding': (
        FRCNN(),
        FRCNN(**CAFFE),
        dict(sizes=((96, 128), (70, 90), (90, 64))),
    ),
}


@pytest.fixture(scope='module')
def pairs():
    """Each pair is built once."""
    made = {}

    def pair(name):
        if name not in made:
            student, teacher, options = PAIRS[name]
            made[name] = RCNNPair(student, teacher, **options)
        return made[name]

    return pair


UNIT = dict(
    mu=0.0,
    bounded=dict(type='mmkd.TeacherBoundedRegressionLoss', loss_weight=1.0),
    hint=dict(type='mmkd.FeatureHint', loss_weight=1.0),
)


@pytest.mark.parametrize('name', PAIRS)
def test_every_part_is_the_papers_formula(name, pairs, monkeypatch):
    pair = pairs(name)
    losses, method = pair.distil(**UNIT)
    expected = expected_parts(pair, SeenLosses(pair, monkeypatch), method)
    parts = {
        key.removeprefix('kd.loss_'): loss.item()
        for key, loss in losses.items()
        if key.startswith('kd.')
    }
    assert parts == pytest.approx(expected, rel=2e-4, abs=1e-6)
    pair.student.zero_grad()
    total(losses).backward()
    grads = [p.grad for p in pair.student.parameters() if p.grad is not None]
    assert all(grad.isfinite().all() for grad in grads)
    if name == 'no positive roi':
        assert parts.pop('rcn_bounded') == 0
    if not pair.positives:
        assert parts.pop('rpn_bounded') == parts.pop('rcn_bounded') == 0
    assert all(value > 0 for value in parts.values())


def test_both_sides_of_the_gate_occur(pairs, monkeypatch):
    """Or the test above would prove less than it says."""
    pair = pairs('fpn')
    seen = SeenLosses(pair, monkeypatch)
    _, gated = rcn_reference(pair, seen, 0)
    monkeypatch.setattr(
        frcnn_reference,
        'bounded',
        lambda s, y, t: sum((a - b) ** 2 for a, b in zip(s, y, strict=True)),
    )
    _, everything = rcn_reference(pair, seen, 0)
    assert 0 < gated < 0.9 * everything


def test_a_batch_without_any_roi(pairs):
    """No proposals and no objects: the stock loss has no ``loss_cls``."""
    pair = RCNNPair(FRCNN(**NO_ROI), FRCNN(), objects=0)
    losses, _ = pair.distil()
    assert 'loss_cls' not in losses
    for part in ('rcn_soft', 'rcn_bounded'):
        assert losses[f'kd.loss_{part}'].item() == 0
    total(losses).backward()
    assert losses['kd.loss_rpn_soft'] > 0


@pytest.mark.parametrize('unbounded', [False, True])
@pytest.mark.parametrize('decoded', [False, True])
def test_an_empty_background_box_does_no_harm(decoded, unbounded):
    """Encoded, it gives infinity; MMDetection encodes positives alone."""
    model = tiny.build(FRCNN())
    head = model.roi_head.bbox_head
    head.reg_decoded_bbox = decoded
    teacher_coder = tiny.build(FRCNN(**STDS)).roi_head.bbox_head.bbox_coder
    box, goal = [10.0, 10.0, 30.0, 50.0], [12.0, 8.0, 36.0, 44.0]
    deltas = torch.tensor([[0.5, 0.1, -0.3, 0.2], [1.0] * 4])
    target = encode(box, goal, head.bbox_coder)
    sample = RoIOutputs(
        facts=read_facts(model).rois[0],
        boxes=torch.tensor([[0.0, *box], [0.0, 5.0, 5.0, 5.0, 5.0]]),
        logits=None,
        deltas=deltas.requires_grad_(),
        labels=torch.tensor([1, 3]),
        label_weights=torch.ones(2),
        targets=torch.tensor([goal if decoded else target, [0.0] * 4]),
        target_weights=torch.tensor([[1.0] * 4, [0.0] * 4]),
        avg_factor=2,
    )
    theirs = encode(box, [12.5, 8.5, 35.0, 45.0], teacher_coder)
    method = FasterRCNNDistillation(
        hint=None,
        bounded=dict(
            type='mmkd.TeacherBoundedRegressionLoss',
            bounded=not unbounded,
            loss_weight=1.0,
        ),
    )
    loss = method._bounded_loss(
        sample,
        sample.deltas,
        torch.tensor([theirs, [0.5] * 4]),
        teacher_coder,
        sample.target_weights,
    )
    theirs = encode(box, decode(box, theirs, teacher_coder), head.bbox_coder)
    ours = deltas[0].tolist()
    expected = bounded(ours, target, theirs)
    if unbounded:
        expected = bounded(ours, theirs, theirs)
    assert expected > 0
    assert loss.item() == pytest.approx(expected / 2, rel=1e-4)
    loss.backward()
    assert sample.deltas.grad.isfinite().all()
    assert sample.deltas.grad[0].abs().min() > 0
    assert sample.deltas.grad[1].tolist() == [0.0] * 4


# ----------------------------------------------------- the mixture of losses


def total(losses):
    """As MMEngine sums them."""
    return sum(
        sum(loss) if isinstance(loss, list) else loss
        for name, loss in losses.items()
        if 'loss' in name
    )


@pytest.mark.parametrize('name', ['fpn', 'cascade', 'mask'])
def test_the_total_is_the_formula(name, pairs, monkeypatch):
    mu, lambda_reg, nu, gamma = 0.3, 2.0, 0.25, 0.7
    pair = pairs(name)
    losses, method = pair.distil(
        mu=mu,
        lambda_reg=lambda_reg,
        bounded=dict(type='mmkd.TeacherBoundedRegressionLoss', loss_weight=nu),
        hint=dict(type='mmkd.FeatureHint', loss_weight=gamma),
    )
    seen = SeenLosses(pair, monkeypatch)
    parts = expected_parts(pair, seen, method)
    stock = {k: tiny_sum(v) for k, v in seen.losses.items()}
    expected = 0.0
    for key, loss in stock.items():
        factor = 1.0
        if key.endswith('cls'):
            factor = mu
        elif key.endswith('bbox'):
            factor = lambda_reg
        if 'loss' in key:
            expected += factor * loss
            assert tiny_sum(losses[key]) == pytest.approx(factor * loss)
    for key, part in parts.items():
        factor = gamma if key == 'hint' else 1 - mu
        if key.endswith('bounded'):
            factor = lambda_reg * nu
        expected += factor * part
        assert losses[f'kd.loss_{key}'].item() == pytest.approx(
            factor * part, rel=2e-4
        )
    assert total(losses).item() == pytest.approx(expected, rel=1e-4)


def tiny_sum(loss):
    return float(sum(loss) if isinstance(loss, list) else loss)


def test_a_scaled_loss_stays_a_list_of_levels(pairs):
    losses, _ = pairs('fpn').distil()
    assert isinstance(losses['loss_rpn_cls'], list)
    assert len(losses['loss_rpn_cls']) == 5


@pytest.mark.parametrize('weight', [0.25, 0.5, 1.0])
def test_loss_weight_interpolates_between_stock_and_distilled(weight, pairs):
    pair = pairs('fpn')
    options = dict(mu=0.2, lambda_reg=3.0)
    stock = tiny.seeded_loss(pair.student, pair.inputs, pair.samples)
    full, _ = pair.distil(**options)
    mixed, _ = pair.distil(**options, loss_weight=weight)
    torch.testing.assert_close(
        total(mixed), (1 - weight) * total(stock) + weight * total(full)
    )
    for name, loss in stock.items():
        if 'loss' in name:
            expected = (1 - weight) * tiny_sum(loss) + weight * tiny_sum(
                full[name]
            )
            assert tiny_sum(mixed[name]) == pytest.approx(expected)


def test_weight_0_is_the_stock_loss(pairs):
    pair = pairs('fpn')
    stock = tiny.seeded_loss(pair.student, pair.inputs, pair.samples)
    losses, _ = pair.distil(loss_weight=0.0)
    assert losses.keys() == stock.keys()
    assert torch.equal(total(losses), total(stock))


def test_above_1_only_the_distillation_grows(pairs):
    pair = pairs('fpn')
    once, _ = pair.distil()
    twice, _ = pair.distil(loss_weight=2.0)
    for name, loss in once.items():
        factor = 2 if name.startswith('kd.') else 1
        assert tiny_sum(twice[name]) == pytest.approx(factor * tiny_sum(loss))


PARTS = {'rpn_soft', 'rpn_bounded', 'rcn_soft', 'rcn_bounded', 'hint'}


@pytest.mark.parametrize(
    ('options', 'parts', 'halved', 'tripled'),
    [
        (
            {},
            PARTS,
            {'loss_rpn_cls', 'loss_cls'},
            {'loss_rpn_bbox', 'loss_bbox'},
        ),
        (
            dict(rpn=False),
            {'rcn_soft', 'rcn_bounded', 'hint'},
            {'loss_cls'},
            {'loss_bbox'},
        ),
        (
            dict(rcn=False),
            {'rpn_soft', 'rpn_bounded', 'hint'},
            {'loss_rpn_cls'},
            {'loss_rpn_bbox'},
        ),
        (
            dict(soft=None),
            {'rpn_bounded', 'rcn_bounded', 'hint'},
            set(),
            {'loss_rpn_bbox', 'loss_bbox'},
        ),
        (
            dict(bounded=None, hint=None),
            {'rpn_soft', 'rcn_soft'},
            {'loss_rpn_cls', 'loss_cls'},
            {'loss_rpn_bbox', 'loss_bbox'},
        ),
        (dict(soft=None, bounded=None), {'hint'}, set(), set()),
    ],
)
def test_parts_can_be_left_out(options, parts, halved, tripled, pairs):
    pair = pairs('mask')
    stock = tiny.seeded_loss(pair.student, pair.inputs, pair.samples)
    losses, _ = pair.distil(mu=0.5, lambda_reg=3.0, **options)
    assert {k[8:] for k in losses if k.startswith('kd.loss_')} == parts
    for name, loss in stock.items():
        factor = 0.5 if name in halved else 3.0 if name in tripled else 1.0
        assert tiny_sum(losses[name]) == pytest.approx(factor * tiny_sum(loss))


# --------------------------------------------------------------- gradients


def test_gradients_reach_the_student_and_never_the_teacher(pairs):
    pair = pairs('fpn')
    before = copy.deepcopy(pair.teacher.model.state_dict())
    pair.student.zero_grad()
    losses, method = pair.distil()
    distilled = {k: v for k, v in losses.items() if k.startswith('kd.')}
    total(distilled).backward()
    for name in (
        'backbone.conv1',
        'neck.fpn_convs.0.conv',
        'rpn_head.rpn_cls',
        'rpn_head.rpn_reg',
        'roi_head.bbox_head.fc_cls',
        'roi_head.bbox_head.fc_reg',
    ):
        grad = pair.student.get_submodule(name).weight.grad
        assert grad.abs().sum() > 0, name
    assert all(p.grad.abs().sum() > 0 for p in method.parameters())
    assert all(p.grad is None for p in pair.teacher.model.parameters())
    after = pair.teacher.model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)


def test_a_student_equal_to_its_teacher():
    """Hint and bounded loss are 0, the soft loss is at its minimum."""
    pair = RCNNPair(FRCNN(), FRCNN())
    pair.student.load_state_dict(pair.network.state_dict())
    pair.student.eval()  # as the teacher: running statistics
    losses, _ = pair.distil(
        mu=0.0,
        soft=dict(
            type='mmkd.WeightedSoftCrossEntropyLoss', background_weight=1.0
        ),
        hint=dict(type='mmkd.FeatureHint', adapt=False),
    )
    for name in ('hint', 'rpn_bounded', 'rcn_bounded'):
        assert losses[f'kd.loss_{name}'].item() == 0
    pair.student.zero_grad()
    soft = losses['kd.loss_rpn_soft'] + losses['kd.loss_rcn_soft']
    soft.backward()
    assert soft > 0.1
    largest = max(
        p.grad.abs().max()
        for p in pair.student.parameters()
        if p.grad is not None
    )
    assert largest < 1e-5
    # Away from the teacher, it is greater.
    with torch.no_grad():
        pair.student.roi_head.bbox_head.fc_cls.bias += torch.tensor(
            [0.5, -0.5, 0.2, 0.0]
        )
    moved, _ = pair.distil(
        mu=0.0,
        hint=None,
        soft=dict(
            type='mmkd.WeightedSoftCrossEntropyLoss', background_weight=1.0
        ),
    )
    assert moved['kd.loss_rcn_soft'] > 1.005 * losses['kd.loss_rcn_soft']


def test_half_precision_of_the_heads_is_safe(pairs):
    pair = pairs('other deltas')
    exact, _ = pair.distil()

    def in_float32(*call):
        # MMCV's NMS and RoIAlign know no bfloat16 on the CPU.
        return apply_to_all(call[-1], torch.Tensor.float)

    hooks = [
        part.register_forward_hook(in_float32)
        for model in (pair.student, pair.teacher.model)
        for part in (model.neck, model.rpn_head)
    ]
    seen = []
    head = pair.student.roi_head.bbox_head
    hooks.append(head.register_forward_hook(lambda *call: seen.append(call)))
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses, _ = pair.distil()
    for hook in hooks:
        hook.remove()
    assert seen[-1][-1][0].dtype == torch.bfloat16
    total(losses).backward()
    assert all(
        p.grad is None or p.grad.isfinite().all()
        for p in pair.student.parameters()
    )
    for name in PARTS:
        assert losses[f'kd.loss_{name}'].dtype == torch.float32
    for name in ('rpn_soft', 'rcn_soft', 'hint'):
        name = f'kd.loss_{name}'
        assert losses[name].item() == pytest.approx(
            exact[name].item(), rel=0.05
        )


def apply_to_all(outputs, change):
    if isinstance(outputs, torch.Tensor):
        return change(outputs)
    return type(outputs)(apply_to_all(item, change) for item in outputs)


# -------------------------------------------------------- what does not fit


def prepare(student, teacher, **options):
    method = FasterRCNNDistillation(hint=None, **options)
    method.prepare(
        StepRecord(tiny.build(student)),
        as_teacher(StepRecord(tiny.build(teacher))),
    )


ONE_STAGE = (
    r'fits Faster, Mask, Cascade and Double-Head R-CNN .*the {} is RetinaNet '
    r'\(bbox_head=RetinaHead\): it has no RoI box head.*mmkd.FeatureHint'
)


def test_one_stage_detectors_are_refused():
    with pytest.raises(ConfigError, match=ONE_STAGE.format('student')):
        prepare(tiny.retinanet(), FRCNN())
    with pytest.raises(ConfigError, match=ONE_STAGE.format('teacher')):
        prepare(FRCNN(), tiny.retinanet())


OTHER_ANCHORS = dict(rpn_head__anchor_generator__scales=[4])


def test_other_anchors_do_not_matter_without_the_rpn():
    pair = RCNNPair(FRCNN(), FRCNN(**OTHER_ANCHORS))
    losses, _ = pair.distil(rpn=False)
    assert losses['kd.loss_rcn_soft'] > 0
    prepare(FRCNN(), FRCNN(**OTHER_ANCHORS), rpn=False)


def test_only_what_is_distilled_has_to_fit():
    """Guided anchors need no RPNHead, SABL's boxes no deltas."""
    guided = FRCNN()
    stock = tiny.stock('guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py')
    guided.rpn_head, guided.train_cfg.rpn = stock.rpn_head, stock.train_cfg.rpn
    with pytest.raises(ConfigError, match=r'rpn=False leaves the RPN out'):
        prepare(guided, guided)
    prepare(guided, guided, rpn=False)
    sabl = FRCNN()
    sabl.roi_head.bbox_head = tiny.sabl_head()
    for options in ({}, dict(bounded=None, lambda_reg=2.0)):
        with pytest.raises(ConfigError, match=r'bounded=None leaves the box'):
            prepare(sabl, sabl, **options)
    prepare(sabl, sabl, bounded=None)
    prepare(sabl, sabl, rcn=False)


def test_features_alone_fit_any_detector():
    method = FasterRCNNDistillation(soft=None, bounded=None)
    one = tiny.build(tiny.retinanet())
    outputs = blank_pass(one, method.student_paths, torch.device('cpu'))
    method.prepare(outputs, as_teacher(outputs))


def test_other_classifiers_are_refused():
    with pytest.raises(
        ConfigError, match=r'use_sigmoid is True in the student and False'
    ):
        prepare(FRCNN(**SIGMOID_RCN), FRCNN())
    prepare(FRCNN(**SIGMOID_RCN), FRCNN(), soft=None)  # boxes can still meet


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(mu=1.5), 'mu must be between 0 and 1, got 1.5'),
        (dict(mu=-0.1), 'mu must be between 0 and 1'),
        (dict(lambda_reg=-1), 'lambda_reg must be at least 0, got -1'),
        (dict(loss_weight=-1), r'FasterRCNND.*loss_weight must be at least 0'),
        (dict(soft=None, bounded=None, hint=None), 'has nothing to do'),
        (dict(rpn=False, rcn=False), r'no use for soft and bounded'),
        (dict(m=0.5), r'no option "m". Did you mean "mu"'),
        (
            dict(soft=dict(type='mmkd.WeightedSoftCrossEntropyLos')),
            r'FasterRCNNDistillation.soft: type .* Did you mean '
            '"mmkd.WeightedSoftCrossEntropyLoss"',
        ),
        (
            dict(bounded=dict(type='mmkd.TeacherBoundedRegressionLoss', n=1)),
            r'FasterRCNNDistillation.bounded .* has no option "n"',
        ),
        (
            dict(
                soft=dict(
                    type='mmkd.WeightedSoftCrossEntropyLoss', use_sigmoid=True
                )
            ),
            'soft: use_sigmoid=True does not belong in a config',
        ),
    ],
)
def test_options_outside_their_range(options, message):
    cfg = dict(type='mmkd.FasterRCNNDistillation', **options)
    with pytest.raises(ConfigError, match=message):
        build_checked(METHODS, cfg, 'methods.kd')


def test_defaults_are_the_papers():
    method = FasterRCNNDistillation()
    assert (method.mu, method.lambda_reg) == (0.5, 1.0)
    assert method.soft.background_weight == 1.5
    assert (method.bounded.loss_weight, method.bounded.margin) == (0.5, 0.0)
    assert method.hint.loss_weight == 0.5
    assert method.hint.adapt
