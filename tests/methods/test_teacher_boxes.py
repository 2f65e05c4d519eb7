"""A teacher's boxes complete the ground truth of labelled images."""

import copy

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

import mmkd
from mmkd.core.distiller import build_distiller
from mmkd.core.method import Method
from mmkd.detectors.record import replaced
from mmkd.methods import TeacherBoxes
from mmkd.registry import METHODS, TEACHERS
from mmkd.teachers.class_map import ClassMap
from tests.detectors.test_queries import built as transformer
from tests.helpers import tiny_dense
from tests.helpers import tiny_detectors as tiny

FREE = [70.0, 50.0, 120.0, 92.0]
"""A box in the corner that no object of the images reaches."""


@TEACHERS.register_module(force=True)
class GivenBoxes(mmkd.Teacher):
    """Finds what it is told to find, in every image."""

    gives = frozenset({'detections'})

    def __init__(self, *, context, boxes, classes=None):
        self.boxes = boxes
        self.class_map = context.class_map(classes or context.classes)

    def view(self, batch):
        return GivenView(self, len(batch.data_samples))

    def blank(self, device):
        return GivenView(self, 1)


class GivenView(mmkd.TeacherView):
    def __init__(self, teacher, images):
        self.class_map, self.cache = teacher.class_map, {}
        self.boxes, self.images = teacher.boxes, images

    @property
    def detections(self):
        return [found(self.boxes)] * self.images


@METHODS.register_module(force=True)
class GroundTruth(Method):
    """Counts the objects that another method is shown."""

    def forward(self, student, teacher, batch):
        counts = [len(sample.gt_instances) for sample in batch.data_samples]
        self.statistics = {'objects': torch.tensor(float(sum(counts)))}
        return {}


def found(boxes):
    """Detections from rows of (x1, y1, x2, y2, label, score)."""
    rows = torch.tensor(boxes).view(-1, 6)
    return InstanceData(
        bboxes=rows[:, :4], labels=rows[:, 4].long(), scores=rows[:, 5]
    )


def image(objects, *, ignored=None, shape=(100, 200)):
    """An image with objects from rows of (x1, y1, x2, y2, label)."""
    rows = torch.tensor(objects).view(-1, 5)
    sample = DetDataSample(metainfo=dict(img_shape=shape))
    sample.gt_instances = InstanceData(
        bboxes=rows[:, :4], labels=rows[:, 4].long()
    )
    if ignored is not None:
        sample.ignored_instances = InstanceData(bboxes=torch.tensor(ignored))
    return sample


def judge(sample, boxes, classes=None, **options):
    classes = classes or ClassMap(('a', 'b', 'c'), ('a', 'b', 'c'))
    return TeacherBoxes(**options).judge(sample, found(boxes), classes)


class TestJudging:
    CAT = [10.0, 10.0, 50.0, 50.0, 0.0]

    def test_by_hand(self):
        judged = judge(
            image([self.CAT, [100.0, 10.0, 140.0, 50.0, 1.0]]),
            [
                [10.0, 10.0, 50.0, 46.0, 0.0, 0.75],  # IoU .9 with the cat
                [10.0, 10.0, 50.0, 40.0, 0.0, 0.85],  # IoU .75 with it
                [100.0, 10.0, 140.0, 50.0, 2.0, 0.8],  # another class
                [60.0, 60.0, 80.0, 80.0, 0.0, 0.7],  # just sure
                [60.0, 10.0, 80.0, 30.0, 1.0, 0.69],  # just in doubt
                [150.0, 60.0, 180.0, 80.0, 1.0, 0.3],
                [150.0, 10.0, 180.0, 40.0, 1.0, 0.29],  # nothing
            ],
        )
        assert judged.extra.bboxes.tolist() == [
            [100.0, 10.0, 140.0, 50.0],
            [60.0, 60.0, 80.0, 80.0],
        ]
        assert judged.extra.labels.tolist() == [2, 0]
        assert judged.extra.scores.tolist() == pytest.approx([0.8, 0.7])
        assert judged.regions.tolist() == [
            [60.0, 10.0, 80.0, 30.0],
            [150.0, 60.0, 180.0, 80.0],
        ]
        assert judged.partners.tolist() == pytest.approx([0.85, 0.0])

    def test_the_overlap_that_makes_a_partner(self):
        half = [10.0, 10.0, 50.0, 30.0, 0.0, 0.9]  # IoU .5
        less = [10.0, 10.0, 50.0, 29.0, 0.0, 0.9]
        assert not len(judge(image([self.CAT]), [half]).extra)
        assert len(judge(image([self.CAT]), [less]).extra) == 1
        assert len(judge(image([self.CAT]), [half], iou_thr=0.6).extra) == 1

    def test_thresholds(self):
        boxes = [[60.0, 60.0, 80.0, 80.0, 0.0, 0.5]]
        sure = judge(image([self.CAT]), boxes, score_thr=0.5)
        assert (len(sure.extra), len(sure.regions)) == (1, 0)
        doubt = judge(image([self.CAT]), boxes, doubtful_thr=0.5)
        assert (len(doubt.extra), len(doubt.regions)) == (0, 1)
        none = judge(image([self.CAT]), boxes, doubtful_thr=0.7)
        assert (len(none.extra), len(none.regions)) == (0, 0)

    def test_classes_are_those_of_the_student(self):
        classes = ClassMap(('cat', 'dog'), ('yak', 'dog', 'cat'))
        boxes = [
            [60.0, 60.0, 80.0, 80.0, label, 0.9] for label in (0.0, 1.0, 2.0)
        ]
        judged = judge(image([self.CAT]), boxes, classes)
        assert judged.extra.labels.tolist() == [1, 0]  # no yak
        partner = judge(
            image([self.CAT]), [[*self.CAT[:4], 2.0, 0.9]], classes
        )
        assert partner.partners.tolist() == pytest.approx([0.9])

    def test_boxes_that_leave_the_image(self):
        boxes = [
            [180.0, 90.0, 220.0, 120.0, 0.0, 0.9],
            [-10.0, -10.0, 20.0, 5.0, 0.0, 0.9],
            [300.0, 10.0, 340.0, 50.0, 0.0, 0.9],  # all of it
            [60.0, 60.0, 60.5, 80.0, 0.0, 0.9],  # half a pixel
            [80.0, 80.0, 60.0, 60.0, 0.0, 0.9],  # turned round
            [float('nan'), 10.0, 30.0, 40.0, 0.0, 0.9],
            [60.0, 60.0, 80.0, 80.0, 0.0, float('nan')],
        ]
        judged = judge(image([self.CAT]), boxes)
        assert judged.extra.bboxes.tolist() == [
            [180.0, 90.0, 200.0, 100.0],
            [0.0, 0.0, 20.0, 5.0],
        ]
        assert not len(judged.regions)
        assert judged.partners.tolist() == [0]

    def test_crowds_are_the_annotators(self):
        boxes = [
            [60.0, 60.0, 80.0, 80.0, 0.0, 0.9],
            [60.0, 60.0, 80.0, 80.0, 0.0, 0.4],
            [150.0, 60.0, 180.0, 80.0, 0.0, 0.9],
        ]
        crowd = [[50.0, 50.0, 90.0, 70.0]]  # half of the first two
        judged = judge(image([self.CAT], ignored=crowd), boxes)
        assert judged.extra.bboxes.tolist() == [[150.0, 60.0, 180.0, 80.0]]
        assert not len(judged.regions)

    @pytest.mark.parametrize('objects', [[], [CAT]])
    def test_nothing_on_either_side(self, objects):
        judged = judge(image(objects), [])
        assert not len(judged.extra)
        assert judged.partners.tolist() == [0] * len(objects)
        box = [60.0, 60.0, 80.0, 80.0, 0.0, 0.9]
        assert len(judge(image(objects), [box]).extra) == 1


# ------------------------------------------------------------- on detectors

KINDS = {
    'retinanet': lambda: tiny.build(tiny.retinanet()),
    'gfl': lambda: tiny.build(tiny.gfl()),
    'faster': lambda: tiny.build(tiny.faster_rcnn()),
    'dino': lambda: transformer('dino'),
}


def pair(student, boxes, teacher=None, **options):
    cfg = dict(
        teacher=dict(type='GivenBoxes', boxes=boxes, **(teacher or {})),
        methods=dict(
            boxes=dict(type='mmkd.TeacherBoxes', **options),
            truth=dict(type='GroundTruth'),
        ),
    )
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    distiller.attach()
    return distiller


def step(student, inputs, samples):
    """Losses, and the gradients of all parameters."""
    student.zero_grad()
    losses = tiny.seeded_loss(student, inputs, samples)
    student.parse_losses(losses)[0].backward()
    gradients = {
        name: p.grad.clone()
        for name, p in student.named_parameters()
        if p.grad is not None
    }
    return losses, gradients, torch.get_rng_state()


def same(losses, stock):
    return all(
        all(map(torch.equal, losses[name], loss))
        if isinstance(loss, list)
        else torch.equal(losses[name], loss)
        for name, loss in stock.items()
    )


@pytest.mark.parametrize('name', KINDS)
@pytest.mark.parametrize(
    ('boxes', 'options'),
    [
        ([], {}),
        ([[*FREE, 0.0, 0.2]], {}),  # below both thresholds
        ([[*FREE, 0.0, 0.9]], dict(loss_weight=0.0)),
    ],
    ids=['empty', 'unsure', 'off'],
)
def test_nothing_to_add_is_stock_training(name, boxes, options):
    student = KINDS[name]()
    state = copy.deepcopy(student.state_dict())
    batch = tiny.batch_for(student)
    stock, gradients, drawn = step(student, *batch)
    student.load_state_dict(state)
    pair(student, boxes, **options)
    losses, found, also = step(student, *batch)
    assert same(losses, stock)
    assert found.keys() == gradients.keys()
    assert all(torch.equal(found[n], gradients[n]) for n in gradients)
    assert torch.equal(drawn, also)


@pytest.mark.parametrize('name', KINDS)
def test_a_sure_box_is_an_object_for_the_student_alone(name):
    """With a score of 1 it is one that the annotators have not forgotten."""
    student = KINDS[name]()
    state = copy.deepcopy(student.state_dict())
    inputs, samples = tiny.batch_for(student)
    for sample in samples:
        sample.gt_instances.bboxes.clamp_(max=62.0)
    more = copy.deepcopy(samples)
    for sample in more:
        own = sample.gt_instances
        sample.gt_instances = InstanceData(
            bboxes=torch.cat([own.bboxes, torch.tensor([FREE])]),
            labels=torch.cat([own.labels, torch.tensor([1])]),
        )
    stock, gradients, _ = step(student, inputs, more)
    student.load_state_dict(state)
    pair(student, [[*FREE, 1.0, 1.0]])
    losses, found, _ = step(student, inputs, samples)
    assert same(losses, stock)
    assert all(torch.equal(found[n], gradients[n]) for n in gradients)
    assert losses['boxes.extra'] == 1
    assert losses['boxes.doubtful'] == 0
    # the ground truth that other methods read is that of the annotators
    assert losses['truth.objects'] == sum(len(s.gt_instances) for s in samples)


def test_the_loss_weight_multiplies_scores():
    student = KINDS['retinanet']()
    batch = tiny.batch_for(student)
    whole, *_ = step_of(student, batch, 0.8, 0.5)
    half, *_ = step_of(student, batch, 0.4, 1.0, score_thr=0.4)
    assert same(half, {k: v for k, v in whole.items() if 'loss' in k})


def step_of(student, batch, score, weight, **options):
    distiller = pair(
        student, [[*FREE, 1.0, score]], loss_weight=weight, **options
    )
    result = step(student, *batch)
    distiller.detach()
    return result


def test_soft_targets_of_matched_objects():
    """In GFL, the target of a matched object's priors is its IoU times s."""
    student = KINDS['gfl']()
    inputs, samples = tiny.batch_for(student, objects=1)
    own = samples[0].gt_instances
    boxes = [[*own.bboxes[0].tolist(), own.labels[0].item(), 0.6]]
    targets = {}
    for soften in (0.0, 0.5):
        distiller = pair(student, boxes, soften=soften)
        targets[soften] = watched(student, inputs, samples)
        distiller.detach()
    for (labels, stock), (same_labels, soft) in zip(
        targets[0.0], targets[0.5], strict=True
    ):
        assert torch.equal(labels, same_labels)
        positive = (labels < 3) & (stock > 0)
        first = torch.arange(len(labels)) < len(labels) // 2  # image
        factor = torch.where(first & positive, 0.5 + 0.5 * 0.6, 1.0)
        torch.testing.assert_close(soft, stock * factor)
    assert any((labels < 3).any() for labels, _ in targets[0.0])


def watched(student, inputs, samples):
    """The targets that the class loss is given, level by level."""
    seen, loss = [], student.bbox_head.loss_cls
    own = loss.forward

    def watch(pred, target, **kwargs):
        seen.append(target)
        return own(pred, target, **kwargs)

    with replaced(loss, 'forward', watch):
        tiny.seeded_loss(student, inputs, samples)
    return seen


def test_a_loss_without_soft_targets_is_named(logged):
    student = KINDS['retinanet']()
    batch = tiny.batch_for(student, objects=1)
    own = batch[1][0].gt_instances
    stock, *_ = step(student, *batch)
    boxes = [[*own.bboxes[0].tolist(), own.labels[0].item(), 0.6]]
    pair(student, boxes, soften=0.5, doubtful_thr=0.7)
    losses, *_ = step(student, *batch)
    assert same(losses, stock)
    assert any(
        'soften=0.5 is left out: the class loss of' in t for t in logged
    )


def test_a_threshold_that_leaves_nothing_is_named(logged, monkeypatch):
    monkeypatch.setattr('mmkd.methods.teacher_boxes.WAITED', 4)
    student = KINDS['retinanet']()
    pair(student, [[*FREE, 0.0, 0.2]])
    batch = tiny.batch_for(student)  # two images
    for _ in range(5):
        tiny.seeded_loss(student, *batch)
    (text,) = [text for text in logged if text.startswith('TeacherBoxes: in')]
    assert 'in 4 images' in text
    assert 'a score of 0.7 or more. Lower score_thr.' in text


def test_a_teacher_that_is_sure_is_not(logged, monkeypatch):
    monkeypatch.setattr('mmkd.methods.teacher_boxes.WAITED', 4)
    student = KINDS['retinanet']()
    inputs, samples = tiny.batch_for(student)
    own = samples[0].gt_instances
    pair(student, [[*own.bboxes[0].tolist(), own.labels[0].item(), 0.9]])
    for _ in range(5):
        tiny.seeded_loss(student, inputs, samples)
    assert not [text for text in logged if text.startswith('TeacherBoxes: in')]


def test_a_frozen_detector_teaches_it():
    student = KINDS['faster']()
    cfg = dict(
        teacher=dict(config=dict(model=tiny.faster_rcnn()), checkpoint=None),
        methods=dict(
            boxes=dict(
                type='mmkd.TeacherBoxes', score_thr=0.2, doubtful_thr=0.1
            )
        ),
    )
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    distiller.attach()
    losses = tiny.seeded_loss(student, *tiny.batch_for(student))
    assert losses['boxes.extra'] + losses['boxes.doubtful'] > 0
    student.parse_losses(losses)[0].backward()


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (dict(score_thr=0.0), 'score_thr must be above 0'),
        (dict(score_thr=1.5), 'score_thr must be at most 1, got 1.5'),
        (dict(iou_thr=0.0), 'iou_thr must be above 0'),
        (dict(doubtful_thr=0.8), r'at most score_thr \(0.7\), got 0.8'),
        (dict(soften=-0.1), 'soften must be at least 0'),
        (dict(soften=1.1), 'soften must be at most 1'),
    ],
)
def test_wrong_options(options, text):
    with pytest.raises(mmkd.ConfigError, match=text):
        TeacherBoxes(**options)


def test_other_students_are_refused():
    with pytest.raises(mmkd.ConfigError, match='its PAAHead makes targets'):
        pair(tiny.build(tiny_dense.paa()), [])
