"""Label-assignment distillation on every head that assigns dynamically."""

import copy
import itertools
import math

import pytest
import torch
from mmdet.models.dense_heads import LADHead
from mmdet.models.utils import unpack_gt_instances
from mmengine.structures import InstanceData

from mmkd.core.distiller import build_distiller
from mmkd.detectors.record import StepRecord, intercepted
from mmkd.errors import ConfigError
from tests.helpers import paa_authors as authors
from tests.helpers import tiny_dense as dense
from tests.helpers import tiny_detectors as tiny

LAD = 'mmkd.LabelAssignmentDistillation'
HEADS = dict(paa=dense.paa, **dense.DYNAMIC)


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


class LADPair:
    """A student, a teacher of other weights, and one method."""

    def __init__(
        self,
        config,
        method=LAD,
        teacher=None,
        classes=tiny.CLASSES,
        same=False,
        **options,
    ):
        self.student = dense.build(config, seed=1)
        teacher_cfg = dict(
            config=dict(
                model=teacher or config,
                train_dataloader=dict(
                    dataset=dict(metainfo=dict(classes=classes))
                ),
            ),
            checkpoint=None,
        )
        self.distiller = build_distiller(
            dict(
                teacher=teacher_cfg,
                methods=dict(lad=dict(type=method, **options)),
            ),
            self.student,
            tiny.CLASSES,
        )
        self.teacher = self.distiller.teacher.model
        other = dense.build(teacher or config, seed=1 if same else 2)
        self.teacher.load_state_dict(other.state_dict())
        tiny.in_eval(self.teacher, classes=len(classes))
        if same:  # in eval mode both compute the same
            self.student.load_state_dict(self.teacher.state_dict())
            self.student.eval()
        for model in (self.student, self.teacher):
            if hasattr(model.bbox_head, 'initial_epoch'):
                model.bbox_head.initial_epoch = 0  # TOOD is past its start

    def batch(self, **options):
        options = {'sizes': ((160, 192), (160, 192)), 'objects': 3, **options}
        return tiny.batch_for(self.student, **options)

    def stock(self, batch):
        head = self.student.bbox_head
        state = copy.deepcopy(
            {k: v for k, v in vars(head).items() if k[0] != '_'}
        )
        try:
            return tiny.seeded_loss(self.student, *batch)
        finally:  # DDOD counts positives from step to step
            vars(head).update(state)

    def losses(self, batch):
        self.distiller.attach()
        try:
            return self.stock(batch)
        finally:
            self.distiller.detach()


def scalars(losses):
    return {
        name: (sum(v) if isinstance(v, list | tuple) else v).item()
        for name, v in losses.items()
    }


def assigned(model, compute):
    """Each image's assignment as the loss' own target methods return it."""
    found = []
    with intercepted(
        model.bbox_head,
        '_get_targets_single',
        lambda result, *_, **__: found.append(result),
    ):
        compute()
    return found


# -- what the student is trained on -----------------------------------------


@pytest.mark.parametrize('name', HEADS)
def test_a_teacher_that_is_the_student_changes_nothing(name):
    pair = LADPair(HEADS[name](), same=True)
    batch = pair.batch()
    stock = scalars(pair.stock(batch))
    assert scalars(pair.losses(batch)) == pytest.approx(stock, rel=1e-6)


@pytest.mark.parametrize('quality', ['student', 'teacher'])
@pytest.mark.parametrize('name', dense.DYNAMIC)
def test_positives_are_the_teachers(name, quality):
    pair = LADPair(HEADS[name](), quality=quality)
    batch = pair.batch(objects=[3, 5])
    theirs = assigned(
        pair.teacher,
        lambda: tiny.seeded_loss(pair.teacher, *batch),
    )
    own = assigned(pair.student, lambda: pair.stock(batch))
    guided = assigned(pair.student, lambda: pair.losses(batch))
    # YOLOX: foreground; others: labels.
    place = 0 if name == 'yolox' else 1
    if name == 'ddod':  # classes and boxes, two images each
        assert len(theirs) == len(guided) == 4
    for a, b in zip(theirs, guided, strict=True):
        assert torch.equal(a[place], b[place])
    assert any(
        not torch.equal(a[place], b[place])
        for a, b in zip(own, guided, strict=True)
    )


def iou(a, b):
    """IoU of two boxes (x1, y1, x2, y2), in floats."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0) * max(height, 0)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return inner / max(sum(areas) - inner, 1e-6)


def test_tood_uses_the_teacher_from_the_first_epoch():
    pair = LADPair(dense.tood())
    batch = pair.batch()
    expected = scalars(pair.losses(batch))
    pair.student.bbox_head.initial_epoch = 4
    assert scalars(pair.losses(batch)) == expected
    assert scalars(pair.stock(batch)) != expected
    assert pair.student.bbox_head.initial_epoch == 4


@pytest.mark.parametrize('quality', ['student', 'teacher'])
def test_quality_of_rtmdet_by_hand(quality):
    """The soft target is the IoU of that network's box with its object."""
    pair = LADPair(dense.rtmdet(), quality=quality)
    batch = pair.batch(objects=2)
    results = assigned(pair.student, lambda: pair.losses(batch))
    whose = pair.student if quality == 'student' else pair.teacher
    outputs = StepRecord(whose)
    with torch.no_grad(), outputs.recording():
        tiny.seeded_loss(whose, *batch)
    head = whose.bbox_head
    maps = outputs.raw('bbox_head')[1]
    priors = head.prior_generator.grid_priors(
        [m.shape[-2:] for m in maps], with_stride=True, device='cpu'
    )
    distances = [m.permute(0, 2, 3, 1).flatten(1, 2) for m in maps]
    checked = 0
    for image, result in enumerate(results):
        _, labels, _, targets, metrics = result[:5]
        points = torch.cat(priors)[:, :2].tolist()
        ltrb = torch.cat([d[image] for d in distances]).tolist()
        for i in (labels < 3).nonzero().flatten().tolist():
            (x, y), (left, top, right, bottom) = points[i], ltrb[i]
            box = (x - left, y - top, x + right, y + bottom)
            expected = iou(box, targets[i].tolist())
            assert metrics[i].item() == pytest.approx(expected, abs=1e-5)
            checked += 1
    assert checked >= 3


def test_alignment_of_tood_by_hand():
    """Score and IoU of the student, normalised in each object."""
    pair = LADPair(dense.tood())
    batch = pair.batch(sizes=((160, 192),), objects=1)
    outputs = StepRecord(pair.student)
    with torch.no_grad(), outputs.recording():
        tiny.seeded_loss(pair.student, *batch)
    scores, boxes = outputs.raw('bbox_head')
    (result,) = assigned(pair.student, lambda: pair.losses(batch))
    _, labels, _, targets, metrics = result
    scores = torch.cat([s[0].flatten(1).T for s in scores]).tolist()
    strides = [8, 16, 32, 64, 128]
    boxes = torch.cat(
        [b[0].flatten(1).T * s for b, s in zip(boxes, strides, strict=True)]
    ).tolist()
    positive = (labels < 3).nonzero().flatten().tolist()
    overlaps = [iou(boxes[i], targets[i].tolist()) for i in positive]
    aligned = [
        scores[i][labels[i].item()] * overlap**6
        for i, overlap in zip(positive, overlaps, strict=True)
    ]
    factor = max(overlaps) / (max(aligned) + 1e-7)
    for i, value in zip(positive, aligned, strict=True):
        expected = value * factor
        assert metrics[i].item() == pytest.approx(expected, rel=1e-3)
    assert len(positive) > 3


# -- PAA against MMDetection's LADHead --------------------------------------


def lad_reference(pair, batch, classes=None):
    """MMDetection's LAD: the teacher's assignment, the student's losses."""
    inputs, samples = batch
    gts, ignored, metas = unpack_gt_instances(copy.deepcopy(samples))
    if classes is not None:
        for gt in gts:
            gt.labels = torch.tensor(classes)[gt.labels]
    with torch.no_grad():
        outs = pair.teacher.bbox_head(pair.teacher.extract_feat(inputs))
        teacher_head = copy.copy(pair.teacher.bbox_head)
        teacher_head.__class__ = LADHead
        assignment = list(
            teacher_head.get_label_assignment(*outs, gts, metas, ignored)
        )
    if classes is not None:
        names = {t: s for s, t in enumerate(classes)}
        background = pair.teacher.bbox_head.num_classes
        assignment[0] = torch.tensor(
            [
                3 if n == background else names[n]
                for n in assignment[0].tolist()
            ]
        )
    student_head = copy.copy(pair.student.bbox_head)
    student_head.__class__ = LADHead
    outs = pair.student.bbox_head(pair.student.extract_feat(inputs))
    return student_head.loss_by_feat(
        *outs, gts, metas, ignored, label_assignment_results=assignment
    )


BATCHES = {
    'several': dict(objects=[3, 6]),
    'one empty': dict(objects=[0, 4]),
    'one each': dict(objects=1),
    'other sizes': dict(sizes=((160, 192), (128, 160)), objects=[2, 5]),
}


@pytest.mark.parametrize('name', BATCHES)
def test_equals_lad_head(name):
    pair = LADPair(dense.paa(), box_weighting='none')
    batch = pair.batch(**BATCHES[name])
    expected = scalars(lad_reference(pair, batch))
    assert scalars(pair.losses(batch)) == pytest.approx(expected, rel=1e-5)
    stock = scalars(pair.stock(batch))
    assert stock['loss_cls'] != pytest.approx(expected['loss_cls'], rel=1e-3)


def test_gradients_equal_those_of_lad_head():
    pair = LADPair(dense.paa(), box_weighting='none')
    batch = pair.batch()
    grads = []
    for losses in (lad_reference(pair, batch), pair.losses(batch)):
        pair.student.zero_grad()
        sum(losses.values()).backward()
        grads.append([p.grad.clone() for p in pair.student.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_iou_weighting_is_the_stock_loss_on_the_same_positives():
    """sum(u * giou) / sum(u), against the official sum(giou) / n."""
    both = {}
    for weighting in ('iou', 'none'):
        pair = LADPair(dense.paa(), box_weighting=weighting)
        boxes = []
        batch = pair.batch()
        loss = pair.student.bbox_head.loss_bbox

        def note(result, pred, target, *_, boxes=boxes, **__):
            boxes[:] = pred, target

        with intercepted(loss, 'forward', note):
            both[weighting] = scalars(pair.losses(batch))
        pred, target = boxes
    each = loss(pred, target, reduction_override='none')
    weights = [
        iou(a, b) for a, b in zip(pred.tolist(), target.tolist(), strict=True)
    ]
    expected = sum(
        w * e for w, e in zip(weights, each.tolist(), strict=True)
    ) / sum(weights)
    assert both['iou'].pop('loss_bbox') == pytest.approx(expected, rel=1e-4)
    assert both['none'].pop('loss_bbox') == pytest.approx(
        each.mean().item(), rel=1e-5
    )
    assert both['iou'] == both['none']


class TestOfficialCode:
    """The teacher's assignment by loops, the student's losses in float64."""

    @pytest.mark.parametrize('single', [False, True])
    @pytest.mark.parametrize('objects', [[2, 4], [0, 3]])
    def test_values_and_gradients(self, objects, single):
        pair = LADPair(dense.paa(), box_weighting='none')
        batch = pair.batch(objects=objects)
        if single:
            networks = [pair.student, pair.teacher]
            batch = authors.with_a_single_candidate(networks, batch)
        calls = authors.stock_calls(pair.teacher, batch)
        owners = [int(owner) for owner in calls[-1][5]]
        assert (owners.count(0) == 1) == single
        positives, _ = authors.assigned([calls])
        assert sum(map(len, positives)) > 1
        authors.assert_same_training(
            pair.student,
            pair.losses(batch),
            *authors.losses(pair.student, batch, calls, positives),
        )


# -- classes -----------------------------------------------------------------


@pytest.mark.parametrize('name', HEADS)
def test_classes_are_mapped_by_name(name):
    """A teacher with its classes in another order teaches the same."""
    swapped = ('dog', 'bird', 'cat', 'cow')
    config, teacher = HEADS[name](), HEADS[name](bbox_head__num_classes=4)
    teacher = tiny.merged(teacher)
    teacher.bbox_head.num_classes = 4
    pair = LADPair(config, teacher=teacher, classes=swapped)
    batch = pair.batch(objects=4)
    plain = LADPair(config)
    order = [swapped.index(c) for c in tiny.CLASSES]
    states = plain.teacher.state_dict()
    for key, value in pair.teacher.state_dict().items():
        if value.shape != states[key].shape:  # the classifier
            value = value[order]
        states[key].copy_(value)
    expected = scalars(plain.losses(batch))
    assert scalars(pair.losses(batch)) == pytest.approx(expected, rel=1e-5)


def test_a_class_that_the_teacher_does_not_know():
    teacher = dense.paa()
    teacher.bbox_head.num_classes = 2
    pair = LADPair(dense.paa(), teacher=teacher, classes=('cat', 'cow'))
    with pytest.raises(ConfigError, match='does not know dog'):
        pair.losses(pair.batch())


# -- objects that are missing or odd -----------------------------------------


@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('objects', [0, [0, 1]])
def test_images_without_objects(name, objects):
    pair = LADPair(HEADS[name]())
    losses = pair.losses(pair.batch(objects=objects))
    total = sum(map(math.fabs, scalars(losses).values()))
    assert math.isfinite(total)


@pytest.mark.parametrize('name', HEADS)
def test_ignored_regions(name):
    """They reach both networks' assigners as in the stock loss."""
    pair = LADPair(HEADS[name](), same=True)
    inputs, samples = pair.batch()
    for sample in samples:
        sample.ignored_instances = InstanceData(
            bboxes=torch.tensor([[0.0, 0.0, 120.0, 120.0]]),
            labels=torch.zeros(1, dtype=torch.long),
        )
    if name == 'paa':
        pair.student.bbox_head.assigner.ignore_iof_thr = 0.5
    stock = scalars(pair.stock((inputs, samples)))
    guided = scalars(pair.losses((inputs, samples)))
    assert guided == pytest.approx(stock, rel=1e-6)


@pytest.mark.parametrize('keep', [False, True])
def test_an_object_with_one_candidate(keep):
    """Without a positive, as in MMDetection; or with it, if asked for."""
    pair = LADPair(dense.paa(), keep_single=keep)
    inputs, samples = pair.batch(sizes=((160, 192),), objects=1)
    head = pair.student.bbox_head
    (anchor, *_), *_ = head.prior_generator.grid_priors(
        [(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)], device='cpu'
    )
    samples[0].gt_instances.bboxes[0] = anchor  # alone above 0.95
    head.assigner.pos_iou_thr = head.assigner.neg_iou_thr = 0.95
    losses = scalars(pair.losses((inputs, samples)))
    assert (losses['loss_bbox'] > 0) == keep


# -- the promise --------------------------------------------------------------


@pytest.mark.parametrize('name', HEADS)
def test_building_leaves_the_head_as_it_was(name):
    """DDOD counts the positives that its loss has seen."""
    fresh = dense.build(HEADS[name](), seed=1).bbox_head
    head = LADPair(HEADS[name]()).student.bbox_head
    names = [n for n, v in vars(fresh).items() if isinstance(v, int | list)]
    assert {n: vars(head)[n] for n in names if n != 'initial_epoch'} == {
        n: vars(fresh)[n] for n in names if n != 'initial_epoch'
    }


@pytest.mark.parametrize('name', HEADS)
def test_switched_off_is_stock(name):
    pair = LADPair(HEADS[name](), loss_weight=0)
    batch = pair.batch()
    assert scalars(pair.losses(batch)) == scalars(pair.stock(batch))


def test_nothing_is_left_on_the_student():
    for make in HEADS.values():
        pair = LADPair(make())
        parts = [
            module
            for module in itertools.chain(
                pair.student.modules(), [pair.student.bbox_head.__dict__]
            )
            if not isinstance(module, dict)
        ]
        before = [set(vars(part)) for part in parts]
        pair.losses(pair.batch())
        assert [set(vars(part)) - {'epoch'} for part in parts] == [
            names - {'epoch'} for names in before
        ]


# -- pairs that do not fit ----------------------------------------------------


@pytest.mark.parametrize('make', [dense.atss, tiny.retinanet, tiny.fcos])
def test_static_assignment(make):
    with pytest.raises(ConfigError, match=r'static.*PAA, TOOD, RTMDet'):
        LADPair(make())


def test_an_assigner_that_the_loss_never_asks():
    """FreeAnchor has one and assigns by itself: LAD would change nothing."""
    head = dict(
        type='FreeAnchorRetinaHead',
        loss_bbox=dict(type='SmoothL1Loss', beta=0.11, loss_weight=0.75),
    )
    config = tiny.merged(tiny.retinanet(), bbox_head=head)
    with pytest.raises(ConfigError, match='is not made by its assigner'):
        LADPair(config)


def test_two_stage():
    with pytest.raises(ConfigError, match='one-stage'):
        LADPair(tiny.faster_rcnn())


def test_transformer():
    with pytest.raises(ConfigError, match='one-stage'):
        LADPair(tiny.detr())


def test_other_kinds_of_heads():
    with pytest.raises(ConfigError, match=r'same kind|priors'):
        LADPair(dense.paa(), teacher=dense.tood())


def test_other_priors():
    teacher = dense.paa(
        bbox_head__anchor_generator__octave_base_scale=4,
    )
    teacher.bbox_head.anchor_generator.octave_base_scale = 4
    with pytest.raises(ConfigError, match='priors'):
        LADPair(dense.paa(), teacher=teacher)


@pytest.mark.parametrize(
    'options',
    [dict(box_weighting='giou'), dict(quality='mine'), dict(loss_weight=-1)],
)
def test_bad_options(options):
    with pytest.raises(ConfigError):
        LADPair(dense.paa(), **options)


def test_box_weighting_is_for_paa():
    with pytest.raises(ConfigError, match='is for PAA'):
        LADPair(dense.tood(), box_weighting='none')


def test_two_methods_that_steer():
    with pytest.raises(ConfigError, match='only one can'):
        build_distiller(
            dict(
                teacher=dict(config=dict(model=dense.paa()), checkpoint=None),
                methods=dict(a=dict(type=LAD), b=dict(type='mmkd.SoLAD')),
            ),
            dense.build(dense.paa()),
            tiny.CLASSES,
        )
