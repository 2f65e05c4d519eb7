"""Stock losses in which objects weigh less and regions are ignored."""

import copy

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.dense_heads import DETRHead
from mmdet.structures.bbox import bbox_overlaps
from mmengine.structures import InstanceData

from mmkd.detectors.assignment.weighted import (
    TARGETS,
    WEIGHTS,
    check_weighable,
    kind_of,
    takes_soft_targets,
    weighted_objects,
    with_objects,
)
from mmkd.detectors.facts import read_facts
from mmkd.detectors.record import StepRecord, replaced
from mmkd.errors import ConfigError
from tests.detectors.test_queries import built as transformer
from tests.helpers import tiny_dense
from tests.helpers import tiny_detectors as tiny

EXTRA = torch.tensor([[70.0, 50.0, 120.0, 92.0]])
"""An object in the corner that no object of the images reaches."""
REGION = torch.tensor([[64.0, 40.0, 128.0, 96.0]])
NONE = torch.zeros(0, 4)
KINDS = {
    'retinanet': lambda: tiny.build(tiny.retinanet()),
    'atss': lambda: tiny.build(tiny_dense.atss()),
    'gfl': lambda: tiny.build(tiny.gfl()),
    'faster': lambda: tiny.build(tiny.faster_rcnn()),
    'cascade': lambda: tiny.build(tiny.cascade_rcnn()),
    'detr': lambda: tiny.build(tiny.detr()),
    'two-stage': lambda: transformer('two-stage'),
    'dino': lambda: transformer('dino'),
}


@pytest.fixture(scope='module')
def models():
    """Each detector is built once, and set back before it is used."""
    made = {}

    def get(name):
        if name not in made:
            model = KINDS[name]()
            made[name] = model, copy.deepcopy(model.state_dict())
        model, state = made[name]
        model.load_state_dict(state)
        return model

    return get


def batch_of(model):
    """Two images whose objects leave the lower right corner alone."""
    inputs, samples = tiny.batch_for(model)
    for sample in samples:
        boxes = sample.gt_instances.bboxes
        sample.gt_instances.bboxes = boxes.clamp(max=62.0)
    return inputs, samples


def completed(samples, weight=1.0, regions=NONE, target=1.0):
    """The first image has one more object, and regions to ignore."""
    result = []
    for number, sample in enumerate(samples):
        own, more = sample.gt_instances, int(number == 0)
        count = len(own.bboxes)
        objects = InstanceData(
            bboxes=torch.cat([own.bboxes, EXTRA[:more]]),
            labels=torch.cat([own.labels, own.labels.new_ones(more)]),
        )
        weights = torch.tensor([1.0] * count + [weight] * more)
        setattr(objects, WEIGHTS, weights)
        setattr(objects, TARGETS, torch.tensor([target] * (count + more)))
        result.append(with_objects(sample, objects, regions if more else NONE))
    return result


def stock_samples(samples):
    """The same objects as in :func:`completed`, known to any stock head."""
    result = copy.deepcopy(samples)
    own = result[0].gt_instances
    result[0].gt_instances = InstanceData(
        bboxes=torch.cat([own.bboxes, EXTRA]),
        labels=torch.cat([own.labels, own.labels.new_ones(1)]),
    )
    return result


def weighted(model, inputs, samples):
    with weighted_objects(model):
        return tiny.seeded_loss(model, inputs, samples)


def flat(losses):
    """All losses as numbers, without accuracies."""
    return {
        f'{name}.{i}': part.item()
        for name, value in losses.items()
        if 'loss' in name
        for i, part in enumerate(value if isinstance(value, list) else [value])
    }


# ------------------------------------------------------ against stock training


@pytest.mark.parametrize('name', KINDS)
def test_weight_1_is_stock_training_on_more_objects(models, name):
    model = models(name)
    inputs, samples = batch_of(model)
    stock = tiny.seeded_loss(model, inputs, stock_samples(samples))
    state = copy.deepcopy(model.state_dict())
    model = models(name)
    found = weighted(model, inputs, completed(samples))
    assert flat(found) == flat(stock)
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize('name', KINDS)
def test_losses_are_linear_in_the_weight(models, name):
    """Assignments do not depend on it, and so every loss is a straight line.

    Both the losses of classes and those of boxes change.
    """
    values = {}
    for weight in (0.2, 0.6, 1.0):
        model = models(name)
        inputs, samples = batch_of(model)
        values[weight] = flat(
            weighted(model, inputs, completed(samples, weight))
        )
    changed = set()
    for loss, whole in values[1.0].items():
        low, middle = values[0.2][loss], values[0.6][loss]
        assert middle == pytest.approx((low + whole) / 2, rel=1e-4, abs=1e-6)
        if abs(whole - low) > 1e-5 * abs(whole):
            changed.add(loss.rpartition('.')[0].removeprefix('s0.'))
    assert any('cls' in loss for loss in changed)
    assert any('bbox' in loss for loss in changed)
    if name == 'dino':
        assert {'dn_loss_cls', 'dn_loss_bbox', 'dn_loss_iou'} <= changed
        assert {'enc_loss_cls', 'enc_loss_bbox'} <= changed
    if name in ('faster', 'cascade'):
        assert {'loss_rpn_cls', 'loss_rpn_bbox'} <= changed
    if name == 'gfl':
        assert 'loss_dfl' in changed
    if name == 'atss':
        assert 'loss_centerness' in changed


@pytest.mark.parametrize('name', KINDS)
def test_it_leaves_no_trace(models, name):
    model = models(name)
    parts = [
        part
        for module in model.modules()
        for part in (module, getattr(module, 'assigner', None))
        if part is not None
    ]
    before = [set(vars(part)) for part in parts]
    inputs, samples = batch_of(model)
    given = copy.deepcopy(samples)
    weighted(model, inputs, completed(samples, 0.5, REGION))
    new = [
        set(vars(part)) - kept
        for part, kept in zip(parts, before, strict=True)
    ]
    assert not any(name for names in new for name in names if name[0] != '_')
    for sample, kept in zip(samples, given, strict=True):
        assert sample.gt_instances.keys() == kept.gt_instances.keys()
        assert torch.equal(
            sample.gt_instances.bboxes, kept.gt_instances.bboxes
        )


# --------------------------------------------------------------- the formulas


def focal(logits, labels, weights):
    """Sigmoid focal loss of rows, by its formula: gamma 2, alpha 1/4."""
    target = F.one_hot(labels, logits.shape[1] + 1)[:, :-1].double()
    p = logits.double().sigmoid()
    loss = -0.25 * target * (1 - p) ** 2 * p.log()
    loss = loss - 0.75 * (1 - target) * p**2 * (1 - p).log()
    return (loss.sum(1) * weights).sum()


def iof(box, regions):
    """The share of a box within a region, the largest one."""
    x1, y1, x2, y2 = box
    shares = [0.0]
    for a, b, c, d in regions.tolist():
        width = max(min(x2, c) - max(x1, a), 0)
        height = max(min(y2, d) - max(y1, b), 0)
        shares.append(width * height / ((x2 - x1) * (y2 - y1)))
    return max(shares)


def test_retinanet_by_its_formula(models):
    """Every anchor, with weights by what it is assigned to."""
    model = models('retinanet')
    inputs, samples = batch_of(model)
    weight = 0.3
    found = weighted(model, inputs, completed(samples, weight, REGION))
    record = StepRecord(model)
    with record.recording(), torch.no_grad():
        tiny.seeded_loss(model, inputs, stock_samples(samples))
    labels, weights, targets, box_weights, number = record.dense_targets[0]
    labels, weights = torch.cat(labels, 1), torch.cat(weights, 1).double()
    targets, box_weights = (
        torch.cat(x, 1).double() for x in (targets, box_weights)
    )
    head = model.bbox_head
    outputs = record.raw('bbox_head')
    sizes = [level.shape[-2:] for level in outputs[0]]
    anchors = torch.cat(head.prior_generator.grid_priors(sizes, device='cpu'))
    boxes = head.bbox_coder.decode(anchors, targets[0].float())
    ignored = 0
    for i, anchor in enumerate(anchors.tolist()):
        if labels[0, i] < 3:
            if torch.allclose(boxes[i], EXTRA[0], atol=0.1):
                weights[0, i] *= weight
                box_weights[0, i] *= weight
        elif iof(anchor, REGION) >= 0.5:
            ignored += weights[0, i].item()
            weights[0, i] = 0
    assert ignored > 10
    assert 0 < (weights == weight).sum() < (labels < 3).sum()
    logits, deltas = (
        torch.cat(
            [x.permute(0, 2, 3, 1).flatten(1).view(2, -1, c) for x in xs], 1
        )
        for xs, c in zip(outputs, (3, 4), strict=True)
    )
    loss_cls = focal(logits.flatten(0, 1), labels.flatten(), weights.flatten())
    assert sum(found['loss_cls']).item() == pytest.approx(
        (loss_cls / number).item(), rel=1e-4
    )
    loss_bbox = ((deltas.double() - targets).abs() * box_weights).sum()
    assert sum(found['loss_bbox']).item() == pytest.approx(
        (loss_bbox / number).item(), rel=1e-4
    )


def test_gfl_by_its_formula(models):
    """The quality focal loss with weights and softer targets; boxes."""
    model = models('gfl')
    inputs, samples = batch_of(model)
    weight, target = 0.3, 0.8
    changed = completed(samples, weight, target=target)
    found = weighted(model, inputs, changed)
    head = model.bbox_head
    record = StepRecord(model)
    with record.recording(), torch.no_grad():
        tiny.seeded_loss(model, inputs, stock_samples(samples))
    anchors, labels, label_weights, targets, _, number = record.dense_targets[
        0
    ]
    outputs = record.raw('bbox_head')
    loss_cls = loss_bbox = loss_dfl = total = 0.0
    for level in range(len(labels)):
        scores, bins = (
            x[level].permute(0, 2, 3, 1).flatten(0, 2) for x in outputs
        )
        stride = head.prior_generator.strides[level][0]
        label = labels[level].flatten()
        priors, boxes = (x[level].reshape(-1, 4) for x in (anchors, targets))
        logits = scores.double()
        quality = torch.zeros_like(logits)
        weights = label_weights[level].flatten().double()
        for i in (label < 3).nonzero()[:, 0].tolist():
            centre = (priors[i, :2] + priors[i, 2:]) / 2 / stride
            rows = bins[i].view(4, -1).double()
            steps = torch.arange(rows.shape[1], dtype=torch.double)
            sides = (rows.softmax(1) * steps).sum(1)
            box = torch.cat([centre - sides[:2], centre + sides[2:]])[None]
            goal = (boxes[i] / stride).double()[None]
            mine = weight if torch.allclose(boxes[i], EXTRA[0]) else 1.0
            weights[i] *= mine
            iou = bbox_overlaps(box, goal)[0, 0]
            quality[i, label[i]] = target * iou
            sure = logits[i].sigmoid().max()
            total += sure
            giou = bbox_overlaps(box, goal, mode='giou')[0, 0]
            loss_bbox += mine * sure * (1 - giou)
            goals = torch.cat([centre - goal[0, :2], goal[0, 2:] - centre])
            goals = goals.clamp(0, head.reg_max - 0.1)
            for row, side in zip(rows.log_softmax(1), goals, strict=True):
                low = int(side)
                part = (low + 1 - side) * row[low] + (side - low) * row[
                    low + 1
                ]
                loss_dfl -= mine * sure * part / 4
        bce = F.binary_cross_entropy_with_logits(
            logits, quality, reduction='none'
        )
        # stock: background and other classes have the target 0
        scale = (quality - logits.sigmoid()) ** 2
        loss_cls += ((bce * scale).sum(1) * weights).sum()
    weights = head.loss_bbox.loss_weight, head.loss_dfl.loss_weight
    for name, expected in (
        ('loss_cls', loss_cls / number),
        ('loss_bbox', weights[0] * loss_bbox / max(total, 1)),
        ('loss_dfl', weights[1] * loss_dfl / max(total, 1)),
    ):
        value = sum(found[name]).item()
        assert value == pytest.approx(float(expected), rel=1e-3), name


def test_detr_by_its_formula(models):
    """Every query of every layer, with weights by what it is matched with."""
    model = models('detr')
    inputs, samples = batch_of(model)
    weight = 0.3
    calls = []
    own = type(model.bbox_head)._get_targets_single

    def watch(scores, boxes, objects, meta):
        found = own(model.bbox_head, scores, boxes, objects, meta)
        calls.append((scores, boxes, meta, *found))
        return found

    with replaced(model.bbox_head, '_get_targets_single', watch):
        tiny.seeded_loss(model, inputs, stock_samples(samples))
    # A region where the first query of the first image is.
    scores, boxes, meta, labels, *_ = calls[0]
    spare = (labels == 3).nonzero()[0, 0]
    height, width = meta['img_shape']
    size = torch.tensor([width, height] * 2)
    x, y, w, h = boxes[spare].tolist()
    region = torch.tensor([[x - w, y - h, x + w, y + h]]) * size
    found = weighted(
        model, inputs, completed(samples, weight, region.detach())
    )
    layer = [0.0, 0.0, 0.0]
    positives = negatives = 0
    for number, (scores, boxes, _, labels, _, targets, *_) in enumerate(
        calls[-2:]
    ):
        weights, of_boxes = torch.ones(len(labels)), torch.zeros(len(labels))
        for i, label in enumerate(labels.tolist()):
            x, y, w, h = targets[i].tolist()
            goal = torch.tensor([x - w / 2, y - h / 2, x + w / 2, y + h / 2])
            if label < 3:
                positives += 1
                extra = torch.allclose(goal * size, EXTRA[0], atol=0.01)
                of_boxes[i] = weights[i] = weight if extra else 1.0
            else:
                negatives += 1
                x, y, w, h = boxes[i].tolist()
                box = torch.tensor(
                    [x - w / 2, y - h / 2, x + w / 2, y + h / 2]
                )
                weights[i] = model.bbox_head.bg_cls_weight
                if number == 0 and iof((box * size).tolist(), region) >= 0.5:
                    weights[i] = 0.0
        ce = F.cross_entropy(scores, labels, reduction='none')
        layer[0] = layer[0] + (ce * weights).sum()
        layer[1] = layer[1] + ((boxes - targets).abs().sum(1) * of_boxes).sum()
        xyxy = [
            torch.cat([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1)
            * size
            for b in (boxes, targets)
        ]
        giou = bbox_overlaps(*xyxy, mode='giou', is_aligned=True)
        layer[2] = layer[2] + ((1 - giou) * of_boxes).sum()
    count = positives + model.bbox_head.bg_cls_weight * negatives
    head = model.bbox_head
    expected = dict(
        loss_cls=head.loss_cls.loss_weight * layer[0] / count,
        loss_bbox=head.loss_bbox.loss_weight * layer[1] / positives,
        loss_iou=head.loss_iou.loss_weight * layer[2] / positives,
    )
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value.item(), rel=1e-4), (
            name
        )


def test_denoising_queries_by_hand(models):
    """Three objects in two groups: positives, then what is too far off."""
    head = models('dino').bbox_head
    objects = InstanceData(
        bboxes=torch.tensor([[0.0, 0, 10, 10]] * 3), labels=torch.arange(3)
    )
    setattr(objects, WEIGHTS, torch.tensor([1.0, 0.5, 0.2]))
    meta = dict(num_denoising_queries=12, num_denoising_groups=2)
    with weighted_objects(models('dino')):
        _, weights, _, boxes, *_ = head._get_dn_targets_single(
            objects, dict(img_shape=(96, 128)), meta
        )
    one = [1.0, 0.5, 0.2, 1.0, 0.5, 0.2]
    assert weights.tolist() == pytest.approx(2 * one)
    assert boxes[:, 0].tolist() == pytest.approx(
        2 * [1.0, 0.5, 0.2, 0.0, 0.0, 0.0]
    )


# ------------------------------------------------------------ two-stage heads


@pytest.mark.parametrize('name', ['faster', 'cascade'])
def test_rois_and_anchors_of_two_stages(models, name):
    """The weight of each sample is that of what it is assigned to."""
    model = models(name)
    inputs, samples = batch_of(model)
    record = StepRecord(model)
    with weighted_objects(model), record.recording():
        tiny.seeded_loss(model, inputs, completed(samples, 0.3, REGION))
    parts = [(record.anchors, 1)]
    for stage, rois in enumerate(record.rois):
        parts.append((rois, 3))
        assert rois.facts.head is model.roi_head.bbox_head or stage < 3
    for part, background in parts:
        boxes = part.boxes[:, -4:]
        image = part.boxes[:, 0] if part.index is None else part.index[0]
        coder = part.facts.coder
        goals = coder.decode(boxes, part.targets)
        weights = set()
        for i in range(len(boxes)):
            if part.labels[i] == background:
                assert part.label_weights[i] == 1
                assert not (
                    image[i] == 0 and iof(boxes[i].tolist(), REGION) >= 0.5
                )
                continue
            extra = torch.allclose(goals[i], EXTRA[0], atol=0.5)
            expected = 0.3 if extra else 1.0
            assert part.label_weights[i].item() == pytest.approx(expected)
            assert part.target_weights[i].tolist() == pytest.approx(
                [expected] * 4
            )
            weights.add(expected)
        assert weights == {0.3, 1.0}


def test_without_the_region_there_are_samples_in_it(models):
    model = models('faster')
    inputs, samples = batch_of(model)
    record = StepRecord(model)
    with weighted_objects(model), record.recording():
        tiny.seeded_loss(model, inputs, completed(samples, 0.3))
    for part, background in ((record.anchors, 1), (record.rois[0], 3)):
        image = part.boxes[:, 0] if part.index is None else part.index[0]
        inside = [
            iof(box, REGION) >= 0.5 for box in part.boxes[:, -4:].tolist()
        ]
        spared = (part.labels == background) & (image == 0)
        assert (torch.tensor(inside) & spared).any()


# ------------------------------------------------------------------ what fits


def test_what_heads_are_taken_for(models):
    assert kind_of(models('dino').bbox_head) is DETRHead
    assert takes_soft_targets(read_facts(models('gfl')))
    for name in KINDS:
        check_weighable(read_facts(models(name)), 'TeacherBoxes')
        if name != 'gfl':
            assert not takes_soft_targets(read_facts(models(name)))


@pytest.mark.parametrize(
    ('build', 'why'),
    [
        (lambda: tiny.build(tiny.fcos()), 'its FCOSHead makes targets or l'),
        (lambda: tiny.build(tiny_dense.paa()), 'its PAAHead makes targets'),
        (lambda: tiny.build(tiny_dense.tood()), 'its TOODHead makes targets'),
        (lambda: tiny.build(tiny_dense.rtmdet()), 'its RTMDetSepBNHead mak'),
        (lambda: tiny.build(tiny_dense.yolox()), 'its YOLOXHead makes targ'),
        (lambda: transformer('ddq'), 'its DDQDETRHead makes targets'),
        (lambda: tiny.build(tiny.mask_rcnn()), 'its objects need masks'),
    ],
)
def test_other_detectors_are_refused(build, why):
    with pytest.raises(ConfigError, match=why) as caught:
        check_weighable(read_facts(build()), 'TeacherBoxes')
    assert 'RetinaNet, ATSS, GFL, Faster and Cascade' in str(caught.value)


def test_weights_of_all_positives_are_not_supported_in_atss():
    model = tiny.build(tiny_dense.atss())
    model.bbox_head.train_cfg.pos_weight = 2.0
    with pytest.raises(ConfigError, match='pos_weight weights its classes'):
        check_weighable(read_facts(model), 'TeacherBoxes')
