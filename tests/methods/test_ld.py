"""Localization distillation on real detectors with distributions."""

import copy
import math
import statistics

import numpy as np
import pytest
import torch
from mmdet.models.dense_heads import LDHead

from mmkd.errors import ConfigError
from mmkd.methods.ld import valuable_region
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import LogitPair, rows, seen_targets


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def outputs(model, inputs):
    with torch.no_grad():
        return model.bbox_head(model.extract_feat(inputs))


def stock_ld(pair, temperature):
    """The main region's loss as MMDetection's own LDHead computes it."""
    config = copy.deepcopy(tiny.gfl().bbox_head)
    config.update(
        type=LDHead,
        loss_ld=dict(
            type='KnowledgeDistillationKLDivLoss',
            loss_weight=0.25,
            T=temperature,
        ),
        train_cfg=tiny.gfl().train_cfg,
    )
    head = tiny.MODELS.build({'_scope_': 'mmdet', **config})
    losses = head.loss_by_feat(
        *outputs(pair.student, pair.inputs),
        [sample.gt_instances for sample in pair.samples],
        [sample.metainfo for sample in pair.samples],
        outputs(pair.teacher, pair.inputs)[1],
    )
    return sum(loss.item() for loss in losses['loss_ld'])


@pytest.mark.parametrize('temperature', [10, 2])
def test_the_main_region_is_mmdetections(temperature):
    pair = LogitPair('LD', tiny.gfl(), temperature=temperature)
    losses = pair.losses()
    assert losses.keys() == {'main', 'vlr'}
    expected = stock_ld(pair, temperature)
    assert expected > 0.01
    assert losses['main'].item() == pytest.approx(expected, rel=1e-4)


def divergence(student, teacher, temperature):
    """Of one prior: the sum over sides of the mean over bins."""
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = ((z / temperature).softmax(0) for z in (s, t))
        total += (q * (q / p).log()).sum().item() / len(s)
    return temperature**2 * total


def iou_and_diou(a, b):
    """Of two xyxy boxes, as in the paper of DIoU."""
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    area = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b))
    iou = inter / (area - inter)
    centre = (a[0] + a[2] - b[0] - b[2]) ** 2 + (
        a[1] + a[3] - b[1] - b[3]
    ) ** 2
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (
        max(a[3], b[3]) - min(a[1], b[1])
    ) ** 2
    return iou, iou - centre / 4 / diagonal


def naive_region(anchors, valid, level_sizes, boxes, gamma, topk):
    """Object by object and anchor by anchor."""
    weights = [0.0] * len(anchors)
    for box in boxes:
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        pairs = [iou_and_diou(anchor, box) for anchor in anchors]
        looked_at, start = [], 0
        for size in level_sizes:
            level = [i for i in range(start, start + size) if valid[i]]
            level.sort(
                key=lambda i, x=x, y=y: (
                    ((anchors[i][0] + anchors[i][2]) / 2 - x) ** 2
                    + ((anchors[i][1] + anchors[i][3]) / 2 - y) ** 2
                )
            )
            looked_at += level[:topk]
            start += size
        ious = [pairs[i][0] for i in looked_at]
        threshold = statistics.mean(ious) + statistics.stdev(ious)
        for i, (iou, diou) in enumerate(pairs):
            if valid[i] and gamma * threshold <= diou < threshold:
                weights[i] = max(weights[i], iou)
    return weights


@pytest.mark.parametrize(('gamma', 'topk'), [(0.25, 9), (0.6, 3)])
def test_the_valuable_region(gamma, topk):
    """Distances without ties, and anchors that lie in the padding."""
    generator = torch.Generator().manual_seed(0)
    corners = 100 * torch.rand(60, 2, generator=generator)
    sizes = 20 + 40 * torch.rand(60, 2, generator=generator)
    anchors = torch.cat([corners, corners + sizes], 1)
    valid = torch.rand(60, generator=generator) > 0.2
    boxes = anchors[[3, 30, 55]] + torch.tensor([3.0, -2.0, 6.0, 1.0])
    result = valuable_region(
        anchors, valid, [40, 15, 5], boxes, gamma=gamma, topk=topk
    )
    expected = naive_region(
        anchors.double().tolist(),
        valid.tolist(),
        [40, 15, 5],
        boxes.double().tolist(),
        gamma,
        topk,
    )
    assert sum(weight > 0 for weight in expected) > 3
    torch.testing.assert_close(result, torch.tensor(expected))


def test_the_valuable_region_by_hand():
    """One object, four anchors that are shifted copies of its box."""
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    shifts = torch.tensor([0.0, 2.0, 5.0, 10.0])
    anchors = box.repeat(4, 1)
    anchors[:, [0, 2]] += shifts[:, None]
    # IoU 1, 8/12, 5/15, 0: mean .5, standard deviation .430; the threshold
    # is .930, its quarter .233. DIoU: 1, .667 - 4/244, .333 - 25/325, < 0.
    result = valuable_region(
        anchors, torch.ones(4).bool(), [4], box, gamma=0.25, topk=9
    )
    torch.testing.assert_close(result, torch.tensor([0.0, 2 / 3, 1 / 3, 0.0]))


def test_no_objects_have_no_region():
    anchors = torch.rand(5, 4)
    region = valuable_region(
        anchors,
        torch.ones(5).bool(),
        [5],
        torch.zeros(0, 4),
        gamma=0.2,
        topk=9,
    )
    assert region.tolist() == [0] * 5


def regions(pair):
    """Both regions' weights, and each prior's divergence, in plain floats."""
    labels, weights, _ = seen_targets(pair)
    scores = torch.cat(rows(pair.student, pair.inputs), 1).sigmoid()
    bins, bins_t = (
        torch.cat(rows(model, pair.inputs, 1, 68), 1).view(2, -1, 4, 17)
        for model in (pair.student, pair.teacher)
    )
    head = pair.student.bbox_head
    sizes = [
        level.shape[2:] for level in outputs(pair.student, pair.inputs)[0]
    ]
    anchors = torch.cat(head.prior_generator.grid_priors(sizes, device='cpu'))
    main = scores.amax(-1) * (labels < 3)
    vlr = torch.tensor(
        [
            naive_region(
                anchors.tolist(),
                (weights[image] > 0).tolist(),
                [h * w for h, w in sizes],
                sample.gt_instances.bboxes.tolist(),
                0.25,
                9,
            )
            for image, sample in enumerate(pair.samples)
        ]
    )
    return main, vlr, bins, bins_t


def weighted(weights, bins, bins_t):
    total = 0.0
    for image, prior in weights.nonzero().tolist():
        total += weights[image, prior].item() * divergence(
            bins[image, prior], bins_t[image, prior], 10
        )
    return total


def test_both_regions():
    """The official sums: divided by 4 sides, and by 16 in the VLR."""
    pair = LogitPair('LD', tiny.gfl(), loss_weight=2.0)
    losses = pair.losses()
    main, vlr, *bins = regions(pair)
    assert main.count_nonzero() > 2
    assert vlr.count_nonzero() > 2
    assert losses['main'].item() == pytest.approx(
        2 * 0.25 * weighted(main, *bins) / 4, rel=1e-4
    )
    assert losses['vlr'].item() == pytest.approx(
        2 * 0.25 * weighted(vlr, *bins) / 16, rel=1e-4
    )
    losses['vlr'].backward()
    assert pair.student.bbox_head.gfl_reg.weight.grad.abs().sum() > 0
    assert pair.student.bbox_head.gfl_cls.weight.grad is None
    assert all(p.grad is None for p in pair.teacher.parameters())


def test_normalized():
    pair = LogitPair(
        'LD', tiny.gfl(), normalize=True, main_weight=3.0, vlr_weight=5.0
    )
    losses = pair.losses()
    main, vlr, *bins = regions(pair)
    for name, weight, region in (('main', 3, main), ('vlr', 5, vlr)):
        expected = weight * weighted(region, *bins) / 4 / max(region.sum(), 1)
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-4)


def test_the_valuable_region_can_be_left_out():
    assert LogitPair('LD', tiny.gfl(), vlr_weight=0).losses().keys() == {
        'main'
    }
    assert LogitPair('LD', tiny.gfl(), main_weight=0).losses().keys() == {
        'vlr'
    }


def test_classes_do_not_matter():
    """A teacher with other classes teaches boxes as well."""
    other = tiny.gfl(bbox_head__num_classes=2)
    pair = LogitPair('LD', tiny.gfl(), other, teacher_classes=('sky', 'cat'))
    losses = pair.losses()
    main, _, *bins = regions(pair)
    assert losses['main'].item() == pytest.approx(
        0.25 * weighted(main, *bins) / 4, rel=1e-4
    )


def test_an_equal_student_has_nothing_to_learn():
    pair = LogitPair('LD', tiny.gfl())
    pair.equal()
    assert [loss.item() for loss in pair.losses().values()] == [0, 0]


def test_images_without_objects():
    pair = LogitPair('LD', tiny.gfl())
    losses = pair.losses(objects=(0, 0))
    assert [loss.item() for loss in losses.values()] == [0, 0]
    sum(losses.values()).backward()
    assert pair.student.bbox_head.gfl_reg.weight.grad is not None


def test_zero_weight_is_the_stock_loss():
    pair = LogitPair('LD', tiny.gfl(), loss_weight=0.0)
    assert toy.same(pair.step(), pair.stock_losses())


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(temperature=0), r'LD.temperature must be above 0, got 0'),
        (dict(main_weight=-1), r'LD.main_weight must be at least 0, got -1'),
        (dict(vlr_weight=-1), r'LD.vlr_weight must be at least 0, got -1'),
        (dict(gamma=1.5), r'LD.gamma must be between 0 and 1, got 1.5'),
        (dict(topk=0), r'LD.topk must be at least 1, got 0'),
        (dict(topk=9.5), r'LD.topk must be a whole number, got 9.5'),
        (dict(topk=True), r'LD.topk must be a number, got True'),
        (dict(temperature=math.nan), r'LD.temperature must be above 0, got n'),
        (dict(temperature=math.inf), r'LD.temperature must be finite, got in'),
        (dict(temperature='10'), r"LD.temperature must be a number, got '10'"),
        (dict(vlr_weight=math.inf), r'LD.vlr_weight must be finite, got inf'),
        (dict(main_weight=None), r'LD.main_weight must be a number, got None'),
        (dict(loss_weight=False), r'LD.loss_weight must be a number, got Fal'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build_checked(METHODS, dict(type='mmkd.LD', **options), 'ld')


def test_numbers_of_numpy_are_numbers():
    options = dict(topk=np.int64(3), temperature=np.float32(2))
    build_checked(METHODS, dict(type='mmkd.LD', **options), 'ld')


@pytest.mark.parametrize(
    ('student', 'teacher', 'message'),
    [
        (
            tiny_dense.atss(),
            tiny.gfl(),
            r"the student's ATSSHead predicts none. Use GFLHead in both",
        ),
        (tiny.gfl(), tiny_dense.atss(), r"teacher's ATSSHead predicts none"),
        (
            tiny.gfl(),
            tiny.gfl(bbox_head__reg_max=8),
            r'is 16 in the student and 8 in the teacher. Give both the same',
        ),
        (
            tiny.gfl(),
            tiny.gfl(bbox_head__anchor_generator__strides=[4, 8, 16, 32, 64]),
            r'LD: the priors of the two dense heads do not correspond',
        ),
        (
            tiny.faster_rcnn(),
            tiny.gfl(),
            r'student is FasterRCNN: it has no d',
        ),
    ],
)
def test_pairs_that_do_not_fit(student, teacher, message):
    with pytest.raises(ConfigError, match=message):
        LogitPair('LD', student, teacher)
