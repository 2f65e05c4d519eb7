"""Localization distillation on real detectors with distributions."""

import copy
import math
import statistics

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import LDHead

from mmkd.detectors.dense import read_dense
from mmkd.detectors.facts import read_facts
from mmkd.errors import ConfigError
from mmkd.methods.ld import valuable_region
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import LogitPair, rows, seen_targets
from tests.helpers.loss_references import kl, softmax


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def small_anchors():
    """Objects are assigned on several levels: anchors of 2 strides, not 8."""
    return tiny.gfl(bbox_head__anchor_generator__octave_base_scale=2)


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


def iou_and_diou(a, b, overlap):
    """Of an anchor and an object, xyxy, as in the paper of DIoU.

    With the overlap 'iof', the intersection is divided by the anchor's area,
    as in the official code of LD.
    """
    width = max(0.0, min(a[2], b[2]) - max(a[0], b[0]))
    height = max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
    inter = width * height
    areas = [(c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)]
    iou = inter / (sum(areas) - inter)
    first = iou if overlap == 'iou' else inter / areas[0]
    centre = (a[0] + a[2] - b[0] - b[2]) ** 2 + (
        a[1] + a[3] - b[1] - b[3]
    ) ** 2
    diagonal = (max(a[2], b[2]) - min(a[0], b[0])) ** 2 + (
        max(a[3], b[3]) - min(a[1], b[1])
    ) ** 2
    return iou, first - centre / 4 / diagonal


def naive_region(anchors, valid, level_sizes, boxes, gamma, topk, overlap):
    """Object by object and anchor by anchor."""
    weights = [0.0] * len(anchors)
    for box in boxes:
        x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
        pairs = [iou_and_diou(anchor, box, overlap) for anchor in anchors]
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


@pytest.mark.parametrize('overlap', ['iof', 'iou'])
@pytest.mark.parametrize(('gamma', 'topk'), [(0.25, 9), (0.6, 3)])
def test_the_valuable_region(gamma, topk, overlap):
    """Distances without ties, and anchors that lie in the padding."""
    generator = torch.Generator().manual_seed(0)
    corners = 100 * torch.rand(60, 2, generator=generator)
    sizes = 20 + 40 * torch.rand(60, 2, generator=generator)
    anchors = torch.cat([corners, corners + sizes], 1)
    valid = torch.rand(60, generator=generator) > 0.2
    boxes = anchors[[3, 30, 55]] + torch.tensor([3.0, -2.0, 6.0, 1.0])
    result = valuable_region(
        anchors,
        valid,
        [40, 15, 5],
        boxes,
        overlap=overlap,
        gamma=gamma,
        topk=topk,
    )
    both = {
        each: naive_region(
            anchors.double().tolist(),
            valid.tolist(),
            [40, 15, 5],
            boxes.double().tolist(),
            gamma,
            topk,
            each,
        )
        for each in ('iof', 'iou')
    }
    expected = both[overlap]
    assert both['iof'] != both['iou']
    assert sum(weight > 0 for weight in expected) > 3
    torch.testing.assert_close(result, torch.tensor(expected))


@pytest.mark.parametrize(
    ('overlap', 'expected'),
    [('iou', [0.0, 0.0, 1 / 3]), ('iof', [0.0, 0.16, 1 / 3])],
)
def test_the_valuable_region_by_hand(overlap, expected):
    """The object's box, a small anchor in its corner, and a shifted copy.

    IoU: 1, .16, .333 with the mean .498 and the standard deviation .443; the
    threshold is .941, its quarter .235. The squared distances of the centres
    are 0, 18 of 200 and 25 of 325, so that the DIoU is 1, .07, .256. Of the
    anchors, 1, 1 and .5 lie in the object; that minus the distances is 1,
    .91, .423.
    """
    box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    anchors = torch.tensor(
        [[0.0, 0.0, 10.0, 10.0], [0.0, 0.0, 4.0, 4.0], [5.0, 0.0, 15.0, 10.0]]
    )
    result = valuable_region(
        anchors,
        torch.ones(3).bool(),
        [3],
        box,
        overlap=overlap,
        gamma=0.25,
        topk=9,
    )
    torch.testing.assert_close(result, torch.tensor(expected))


def test_no_objects_have_no_region():
    anchors = torch.rand(5, 4)
    region = valuable_region(
        anchors,
        torch.ones(5).bool(),
        [5],
        torch.zeros(0, 4),
        overlap='iof',
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
                pair.method.vlr_overlap,
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


@pytest.mark.parametrize('overlap', ['iof', 'iou'])
def test_both_regions(overlap):
    """The official sums: divided by 4 sides, and by 16 in the VLR."""
    pair = LogitPair('LD', tiny.gfl(), loss_weight=2.0, vlr_overlap=overlap)
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


def official_kl(pred, soft_label, temperature):
    """The official KL of rows of logits, the mean over their columns."""
    target = (soft_label / temperature).softmax(1)
    log = (pred / temperature).log_softmax(1)
    return F.kl_div(log, target, reduction='none').mean(1) * temperature**2


def official_losses(pair):
    """The three losses as the official head adds them up, level by level."""
    _, vlr, *_ = regions(pair)
    labels, weights, _ = seen_targets(pair)
    head = pair.student.bbox_head
    maps = head(pair.student.extract_feat(pair.inputs))
    sizes = [level.shape[2] * level.shape[3] for level in maps[0]]
    levels = zip(
        *maps,
        *outputs(pair.teacher, pair.inputs),
        *(part.split(sizes, 1) for part in (labels, weights, vlr)),
        strict=True,
    )
    total = dict(main=0.0, vlr=0.0, kd=0.0)
    for scores, reg, soft_label, soft_reg, label, weight, valuable in levels:
        scores, reg, soft_label, soft_reg = (
            part.double().permute(0, 2, 3, 1).reshape(-1, part.shape[1])
            for part in (scores, reg, soft_label, soft_reg)
        )
        label, weight, valuable = (
            part.reshape(-1) for part in (label, weight, valuable)
        )
        positive = ((label >= 0) & (label < 3)).nonzero()[:, 0]
        remaining = (valuable > 0).nonzero()[:, 0]
        main = scores.detach().sigmoid().amax(1)
        for name, chosen, importance, divisor in (
            ('main', positive, main, 4),
            ('vlr', remaining, valuable, 16),
        ):
            divergence = official_kl(
                reg[chosen].reshape(-1, 17),
                soft_reg[chosen].reshape(-1, 17),
                10,
            )
            importance = importance[chosen].repeat_interleave(4)
            total[name] += 0.25 * (importance * divergence).sum() / divisor
        if len(positive):
            divergence = official_kl(scores[positive], soft_label[positive], 2)
            divergence = (weight[positive] * divergence).sum()
            total['kd'] += 10 * divergence / len(positive)
    return total


class TestOfficialCode:
    """Values and gradients of HikariTJU/LD's ``LDHead.loss_single``."""

    # 8 and 12 of 32 pixels are padding: anchors there are assigned as well.
    SIZES = ((88, 116), (88, 116))

    @pytest.mark.parametrize('name', ['main', 'vlr', 'kd'])
    def test_values_and_gradients(self, name):
        pair = LogitPair('LD', small_anchors(), kd_weight=10.0)
        loss = pair.losses(sizes=self.SIZES)[name]
        expected = official_losses(pair)[name]
        assert expected > 0.01
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        parameters = [
            p
            for name, p in pair.student.named_parameters()
            if name.startswith(('bbox_head.', 'neck.'))
        ]
        ours, theirs = (
            torch.autograd.grad(
                value, parameters, retain_graph=True, allow_unused=True
            )
            for value in (loss, expected)
        )
        assert sum(gradient is not None for gradient in theirs) > 8
        for gradient, reference in zip(ours, theirs, strict=True):
            if reference is None:
                assert gradient is None or not gradient.any()
            else:
                torch.testing.assert_close(
                    gradient, reference, rtol=1e-3, atol=1e-5
                )

    def test_anchors_in_the_padding_count(self):
        """They are assigned, and ATSS' threshold is taken from them."""
        pair = LogitPair('LD', tiny.gfl(), main_weight=0)
        loss = pair.losses(sizes=self.SIZES)['vlr']
        expected = official_losses(pair)['vlr'].item()
        assert loss.item() == pytest.approx(expected, rel=1e-4)
        _, vlr, *_ = regions(pair)
        facts = read_facts(pair.student).dense
        dense = read_dense(facts, outputs(pair.student, pair.inputs))
        assert (vlr * ~dense.inside(pair.samples)).any()


@pytest.mark.parametrize(
    ('teacher_classes', 'columns'),
    [
        (tiny.CLASSES, ([0, 1, 2], [0, 1, 2])),
        (tiny.CLASSES[::-1], ([0, 1, 2], [2, 1, 0])),
        (('cow', 'sky', 'cat'), ([0, 2], [2, 0])),
    ],
)
def test_the_classes_of_the_positives(teacher_classes, columns):
    """Level by level, over the classes that both networks have."""
    pair = LogitPair(
        'LD',
        small_anchors(),
        kd_weight=3.0,
        kd_temperature=4.0,
        teacher_classes=teacher_classes,
    )
    losses = pair.losses()
    labels, *_ = seen_targets(pair)
    ours, theirs = (
        rows(model, pair.inputs) for model in (pair.student, pair.teacher)
    )
    expected, parts = 0.0, []
    for label, s, t in zip(
        labels.split([level.shape[1] for level in ours], 1),
        ours,
        theirs,
        strict=True,
    ):
        divergences = []
        for image, prior in (label < 3).nonzero().tolist():
            if label[image, prior].item() in columns[0]:
                q, q_t = (
                    softmax(z[image, prior][index].tolist(), 4.0)
                    for z, index in zip((s, t), columns, strict=True)
                )
                divergences.append(4.0**2 * kl(q_t, q) / len(q))
        if divergences:
            parts.append(len(divergences))
            expected += statistics.fmean(divergences)
    assert len(parts) > 1
    assert len(set(parts)) > 1
    assert losses['kd'].item() == pytest.approx(3 * expected, rel=1e-4)
    losses['kd'].backward()
    assert pair.student.bbox_head.gfl_cls.weight.grad.abs().sum() > 0
    assert pair.student.bbox_head.gfl_reg.weight.grad is None
    assert all(p.grad is None for p in pair.teacher.parameters())


def test_normalizing_leaves_the_classes_alone():
    losses = [
        LogitPair('LD', tiny.gfl(), kd_weight=10.0, normalize=value).losses()
        for value in (True, False)
    ]
    assert losses[0]['main'] != losses[1]['main']
    assert losses[0]['kd'] == losses[1]['kd'] > 0


@pytest.mark.parametrize('images', [2, 3, 4])
def test_by_images(images):
    """The official sums at 2 images, and an average over any number."""
    ours, official = (
        LogitPair('LD', tiny.gfl(), kd_weight=10.0, **options).losses(
            sizes=((96, 128),) * images
        )
        for options in ({}, dict(normalize=False))
    )
    for name in ('main', 'vlr'):
        assert official[name] > 0
        expected = official[name].item() * 2 / images
        assert ours[name].item() == pytest.approx(expected, rel=1e-5)
    assert ours['kd'] == official['kd']


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
    pair = LogitPair('LD', tiny.gfl(), kd_weight=10.0)
    pair.equal()
    assert [loss.item() for loss in pair.losses().values()] == [0, 0, 0]


def test_images_without_objects():
    pair = LogitPair('LD', tiny.gfl(), kd_weight=10.0)
    losses = pair.losses(objects=(0, 0))
    assert [loss.item() for loss in losses.values()] == [0, 0, 0]
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
        (dict(kd_weight=-1), r'LD.kd_weight must be at least 0, got -1'),
        (dict(kd_temperature=0), r'LD.kd_temperature must be above 0, got 0'),
        (
            dict(vlr_overlap='diou'),
            r"LD.vlr_overlap must be one of 'iof', 'iou', got 'diou'",
        ),
        (dict(normalize='mean'), r"LD.normalize must be one of 'images', "),
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


def test_one_shared_class():
    """Its softmax is constant; boxes are distilled all the same."""
    with pytest.warns(UserWarning, match=r'share only one \(cat\). Set kd_w'):
        pair = LogitPair(
            'LD',
            tiny.gfl(),
            teacher_classes=('cat', 'sky', 'sea'),
            kd_weight=10.0,
        )
    assert pair.losses().keys() == {'main', 'vlr'}
