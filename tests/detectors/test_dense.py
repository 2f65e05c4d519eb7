"""Dense heads of every family, read by structure."""

import pytest
import torch
from mmengine.logging import MessageHub

from mmkd.detectors.blank import blank_pass
from mmkd.detectors.dense import read_dense, student_dense, student_targets
from mmkd.detectors.dense_checks import (
    check_dense,
    check_is_dense,
    check_same_priors,
)
from mmkd.detectors.facts import read_facts
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError, TapError
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny

SIZES = ((96, 128), (128, 96))


def ssd():
    model = toy.small_model(
        toy.stock('ssd/ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py').model
    )
    model.data_preprocessor.batch_augments = None
    model.bbox_head.num_classes = 3
    return model


def yolov3():
    model = toy.small_model(
        toy.stock('yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py').model
    )
    model.bbox_head.num_classes = 3
    return model


def vfnet():
    return tiny.merged(
        tiny.stock('vfnet/vfnet_r50_fpn_1x_coco.py'),
        backbone=tiny.BACKBONE,
        neck=tiny_dense.NECK,
        bbox_head={**tiny_dense.HEAD, 'feat_channels': 32},
    )


def yolof():
    model = toy.small_model(
        toy.stock('yolof/yolof_r50-c5_8xb8-1x_coco.py').model
    )
    model.bbox_head.num_classes = 3
    return model


def small(name):
    model = toy.small_model(toy.stock(name).model)
    model.bbox_head.num_classes = 3
    return model


FOVEA = 'foveabox/fovea_r50_fpn_4xb4-1x_coco.py'
SABL = 'sabl/sabl-retinanet_r50_fpn_1x_coco.py'
REPPOINTS = 'reppoints/reppoints-bbox_r50_fpn-gn_head-gn-grid_1x_coco.py'
AUTO_ASSIGN = 'autoassign/autoassign_r50-caffe_fpn_1x_coco.py'
FREE_ANCHOR = 'free_anchor/freeanchor_r50_fpn_1x_coco.py'
GUIDED = 'guided_anchoring/ga-retinanet_r50-caffe_fpn_1x_coco.py'

# Config, sigmoid, channels of a box, a quality of its own, priors a point.
HEADS = {
    'retinanet': (tiny.retinanet, True, 4, False, 9),
    'fcos': (tiny.fcos, True, 4, True, 1),
    'atss': (tiny_dense.atss, True, 4, True, 1),
    'gfl': (tiny.gfl, True, 68, False, 1),
    'paa': (tiny_dense.paa, True, 4, True, 1),
    'tood': (tiny_dense.tood, True, 4, False, 1),
    'vfnet': (vfnet, True, 4, False, 1),
    'rtmdet': (tiny_dense.rtmdet, True, 4, False, 1),
    'yolox': (tiny_dense.yolox, True, 4, True, 1),
    'ddod': (tiny_dense.ddod, True, 4, True, 1),
    'yolof': (yolof, True, 4, False, 5),
    'yolov3': (yolov3, True, 4, True, 3),
    'ssd': (ssd, False, 4, False, 6),
}


@pytest.fixture(autouse=True)
def late_epoch():
    """TOOD assigns otherwise in its first epochs."""
    MessageHub.get_current_instance().update_info('epoch', 9)


def step(config, **options):
    """A detector and what its loss has produced on a batch."""
    model = tiny.build(config)
    inputs, samples = tiny.batch_for(model, **{'sizes': SIZES, **options})
    outputs = StepRecord(model)
    with outputs.recording():
        losses = tiny.seeded_loss(model, inputs, samples)
    return outputs, samples, losses


@pytest.mark.parametrize('name', HEADS)
def test_a_head_of_every_family(name):
    """Shapes, and labels that belong to the image and the place."""
    config, sigmoid, box, quality, count = HEADS[name]
    outputs, samples, _ = step(config())
    dense = student_dense(outputs)
    priors = count * sum(h * w for h, w in dense.sizes)
    assert dense.logits.shape == (2, priors, 3 + (not sigmoid))
    assert dense.sigmoid == sigmoid
    assert dense.regression.shape == (2, priors, box)
    assert (dense.bins is not None) == (box == 68)
    if quality:
        assert dense.quality.shape == (2, priors)
    else:
        assert dense.quality is None
    assert len(dense.priors) == len(dense.centres) == priors
    targets = student_targets(outputs, samples)
    assert targets.labels.shape == targets.weights.shape == (2, priors)
    inside = dense.inside(samples)
    assert not targets.weights[~inside].any()
    assert 0 < inside.sum() < inside.numel()
    assert 0 < targets.positive.sum() == targets.number
    for image, sample in enumerate(samples):
        boxes = sample.gt_instances.bboxes
        labels = sample.gt_instances.labels.tolist()
        for prior in targets.positive[image].nonzero()[:, 0].tolist():
            label = targets.labels[image, prior].item()
            own = boxes[[i for i, k in enumerate(labels) if k == label]]
            assert len(own), 'a label of another image'
            # YOLOF and SSD take anchors whose centre is near the object.
            centre = dense.centres[prior]
            slack = 64 if name in ('yolof', 'ssd', 'yolov3', 'yolox') else 8
            near = (centre > own[:, :2] - slack) & (
                centre < own[:, 2:] + slack
            )
            assert near.all(1).any(), 'a prior far from its object'


def test_the_predictions_are_the_heads_own():
    """Position by position, on RetinaNet with its nine anchors."""
    outputs, _, _ = step(tiny.retinanet())
    dense = student_dense(outputs)
    scores, deltas = outputs.raw('bbox_head')
    start = 0
    for score, delta in zip(scores, deltas, strict=True):
        height, width = score.shape[-2:]
        for row, column, anchor in (
            (0, 0, 0),
            (height - 1, 0, 8),
            (0, width - 1, 4),
        ):
            prior = start + (row * width + column) * 9 + anchor
            for image in range(2):
                logits = score[image, anchor * 3 : anchor * 3 + 3, row, column]
                box = delta[image, anchor * 4 : anchor * 4 + 4, row, column]
                assert torch.equal(dense.logits[image, prior], logits)
                assert torch.equal(dense.regression[image, prior], box)
        start += height * width * 9


def test_bins_are_four_distributions():
    outputs, _, _ = step(tiny.gfl())
    maps = outputs.raw('bbox_head')[1]
    bins = student_dense(outputs).bins
    assert bins.shape[-2:] == (4, 17)
    row, column, side, bin_ = 3, 2, 1, 5
    width = maps[0].shape[-1]
    assert torch.equal(
        bins[1, row * width + column, side, bin_],
        maps[0][1, side * 17 + bin_, row, column],
    )


def test_probabilities_become_logits():
    """TOOD's head returns probabilities, not logits."""
    outputs, _, _ = step(tiny_dense.tood())
    dense = student_dense(outputs)
    probabilities = outputs.raw('bbox_head')[0][0]
    assert probabilities.min() > 0
    assert probabilities.max() < 1
    height, width = probabilities.shape[-2:]
    torch.testing.assert_close(
        dense.logits[:, : height * width].sigmoid(),
        probabilities.permute(0, 2, 3, 1).reshape(2, -1, 3),
    )


def test_tiny_probabilities_learn():
    """Those of TOOD are roots of two; the logit's gradient is 1/2 of each."""
    model = tiny_dense.build(tiny_dense.tood())
    head = model.bbox_head
    with torch.no_grad():
        for layer in (head.tood_cls, head.cls_prob_module[-1]):
            layer.weight.zero_()
            layer.bias.fill_(-18.0)
    inputs, samples = tiny.batch_for(model, sizes=SIZES)
    record = StepRecord(model)
    with record.recording():
        tiny.seeded_loss(model, inputs, samples)
    dense = student_dense(record)
    assert record.raw('bbox_head')[0][0].max() < 1e-6
    images, priors, _ = dense.logits.shape
    dense.logits.sum().backward()
    torch.testing.assert_close(
        head.tood_cls.bias.grad,
        torch.full_like(head.tood_cls.bias, 0.5 * images * priors),
    )


def test_paas_final_assignment_counts():
    """What its first step assigns is not yet what it trains on."""
    model = tiny_dense.build(tiny_dense.paa())
    inputs, samples = tiny.batch_for(model, sizes=SIZES)
    outputs, seen = StepRecord(model), []
    handle = model.bbox_head.loss_cls.register_forward_pre_hook(
        lambda _, args: seen.append(args)
    )
    with outputs.recording():
        tiny.seeded_loss(model, inputs, samples)
    handle.remove()
    targets = student_targets(outputs, samples)
    trained = seen[-1][1]  # behind the costs of the first step
    assert torch.equal(targets.labels.flatten(), trained.flatten())
    assert not torch.equal(trained.flatten(), seen[0][1].flatten())


def watched_step(config):
    """The same step, and what the stock class loss was called with."""
    model = tiny.spread(tiny_dense.build(config), 0)
    inputs, samples = tiny.batch_for(model, sizes=SIZES)
    outputs, seen = StepRecord(model), []
    model.bbox_head.loss_cls.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    with outputs.recording():
        tiny.seeded_loss(model, inputs, samples)
    dense = student_dense(outputs)
    return dense, student_targets(outputs, samples), samples, seen


def test_yolox_trains_classes_on_positives_alone():
    dense, targets, samples, seen = watched_step(tiny_dense.yolox())
    ((rows, soft),) = [args for args, _ in seen]
    assert torch.equal(dense.logits[targets.positive], rows)
    assert torch.equal(targets.labels[targets.positive], soft.argmax(-1))
    expected = targets.positive & dense.inside(samples)
    assert torch.equal(targets.weights, expected.float())
    assert 0 < expected.sum() < expected.numel()


def test_yolov3_trains_classes_on_positives_alone():
    dense, targets, samples, seen = watched_step(yolov3())
    weights = torch.cat([kwargs['weight'] for _, kwargs in seen], 1)[..., 0]
    expected = weights * dense.inside(samples)
    assert torch.equal(targets.weights, expected)
    assert torch.equal(targets.positive.float(), weights)
    assert 0 < expected.sum() < expected.numel()


def test_foveaboxes_flat_targets():
    """Each prior has the label that its own logits are trained on."""
    dense, targets, _, seen = watched_step(small(FOVEA))
    ((rows, labels),) = [args for args, _ in seen]
    trained = dict(
        zip(map(tuple, rows.tolist()), labels.tolist(), strict=True)
    )
    assert len(trained) == rows.shape[0], 'logits that are equal'
    ours = [trained[tuple(row)] for row in dense.logits.flatten(0, 1).tolist()]
    assert targets.labels.flatten().tolist() == ours
    assert {0, 1, 2, 3} >= set(ours) > {3}
    # Exponents, which its coder does not decode.
    assert dense.regression is None


def test_reppoints_trains_classes_on_its_second_assignment():
    dense, targets, samples, seen = watched_step(small(REPPOINTS))
    for column, ours in ((1, targets.labels), (2, targets.weights)):
        stock = torch.cat([args[column].view(2, -1) for args, _ in seen], 1)
        inside = dense.inside(samples)
        assert torch.equal(ours[inside], stock[inside])


def test_sabls_priors_are_its_squares():
    dense, targets, samples, seen = watched_step(small(SABL))
    stock = torch.cat([args[1].view(2, -1) for args, _ in seen], 1)
    assert torch.equal(targets.labels, stock)
    assert targets.positive.any()
    assert dense.regression is None
    assert dense.priors.shape == (dense.logits.shape[1], 4)
    assert 0 < dense.inside(samples).sum() < targets.labels.numel()


def test_inside_is_where_the_image_is():
    outputs, samples, _ = step(tiny.fcos(), sizes=((100, 128), (128, 90)))
    dense = student_dense(outputs)
    inside = dense.inside(samples)
    for image, (height, width) in enumerate(((100, 128), (128, 90))):
        for prior, (x, y) in enumerate(dense.centres.tolist()):
            assert inside[image, prior] == (x < width and y < height)


def test_an_image_without_objects():
    outputs, samples, _ = step(tiny.gfl(), objects=(0, 0))
    targets = student_targets(outputs, samples)
    assert not targets.positive.any()
    assert targets.number == 1
    assert [len(part) for part in targets.index] == [0, 0]


def test_the_index_names_the_positives():
    outputs, samples, _ = step(tiny.gfl())
    targets = student_targets(outputs, samples)
    pairs = list(zip(*(part.tolist() for part in targets.index), strict=True))
    assert pairs == [
        tuple(pair) for pair in targets.positive.nonzero().tolist()
    ]
    assert pairs


def test_derived_once_a_step():
    outputs, samples, _ = step(tiny.gfl())
    assert student_dense(outputs) is student_dense(outputs)
    assert student_targets(outputs, samples) is student_targets(
        outputs, samples
    )


def test_recording_leaves_the_losses_as_they_were():
    _, _, recorded = step(tiny.gfl())
    model = tiny.build(tiny.gfl())
    plain = tiny.seeded_loss(model, *tiny.batch_for(model, sizes=SIZES))
    assert toy.same(recorded, plain)
    assert 'get_targets' not in vars(model.bbox_head)


# ------------------------------------------------------------------ refusals


def blank(config):
    return blank_pass(tiny.build(config), (), torch.device('cpu'))


@pytest.mark.parametrize(
    ('config', 'message'),
    [
        (tiny.detr(), r'X fits .* the student is DETR: its queries do not'),
        (tiny.faster_rcnn(), r'the student is FasterRCNN: it has no dense'),
        (small(GUIDED), r'its GARetinaHead predicts its anchors, and as a te'),
        (
            toy.small_model(toy.stock('rpn/rpn_r50_fpn_1x_coco.py').model),
            r'is RPN: it tells objects from background, but not classes. Use',
        ),
        (
            small(FREE_ANCHOR),
            r'X asks which priors the student trains on which object; the '
            r'loss of its FreeAnchorRetinaHead makes no assignment .*paa_rea',
        ),
        (
            small(AUTO_ASSIGN),
            r'assignment of the AutoAssignHead cannot be read: none of',
        ),
    ],
)
def test_detectors_without_a_dense_head(config, message):
    with pytest.raises(ConfigError, match=message):
        check_dense(blank(config), 'student', 'X')


def test_nobody_reads_what_a_teacher_assigns():
    record = blank(small(FREE_ANCHOR))
    check_is_dense(record.facts, 'teacher', 'X')
    assert student_dense(record).logits.shape[0] == 1


@pytest.mark.parametrize('name', ['ddod', 'fsaf'])
def test_trying_the_assignment_leaves_no_trace(name):
    """DDOD's loss counts what it has seen, FSAF's writes into its lists."""
    fsaf = small('fsaf/fsaf_r50_fpn_1x_coco.py')
    outputs = blank(tiny_dense.ddod() if name == 'ddod' else fsaf)
    head, raw = outputs.model.bbox_head, outputs.raw('bbox_head')
    maps = [list(part) for part in raw]
    counts = {k: str(v) for k, v in vars(head).items() if 'num' in k}
    check_dense(outputs, 'student', 'X')
    assert counts == {k: str(v) for k, v in vars(head).items() if 'num' in k}
    for before, after in zip(maps, raw, strict=True):
        assert all(a is b for a, b in zip(before, after, strict=True))


def test_an_output_of_another_structure():
    facts = head(tiny.retinanet())
    maps = [torch.zeros(1, 27, 4, 4)] * 5
    read_dense(facts, (maps, maps))
    with pytest.raises(ConfigError, match=r'RetinaHead .* expected a tuple'):
        read_dense(facts, maps)
    with pytest.raises(
        ConfigError,
        match=r'channels, expected 3 for each of \[9, 9, 9, 9, 9\]',
    ):
        read_dense(facts, ([torch.zeros(1, 9, 4, 4)] * 5,))


def test_assignments_that_cannot_be_read():
    model = tiny.merged(
        tiny.retinanet(), bbox_head=dict(type='FreeAnchorRetinaHead')
    )
    model.bbox_head.loss_cls = dict(type='FocalLoss')
    outputs, samples, _ = step(model)
    with pytest.raises(
        TapError, match=r'FreeAnchorRetinaHead of RetinaNet has'
    ):
        student_targets(outputs, samples)
    outputs, samples, _ = step(small(AUTO_ASSIGN))
    with pytest.raises(
        ConfigError, match=r'assignment of the AutoAssignHead cannot be read'
    ):
        student_targets(outputs, samples)


def head(config):
    return read_facts(tiny.build(config)).dense


def anchors(**options):
    generator = {**tiny.retinanet().bbox_head.anchor_generator, **options}
    return tiny.retinanet(bbox_head__anchor_generator=generator)


def test_priors_that_correspond():
    check_same_priors(head(tiny.gfl()), head(tiny_dense.atss()), 'X')
    check_same_priors(
        head(tiny.gfl()), head(tiny_dense.atss()), 'X', centres=True
    )
    check_same_priors(head(tiny.gfl()), head(tiny.fcos()), 'X')


@pytest.mark.parametrize(
    ('student', 'teacher', 'centres', 'message'),
    [
        (
            tiny.retinanet(),
            anchors(strides=[4, 8, 16, 32, 64]),
            False,
            r'X: the priors .* student has the strides \[\(8, 8\).*\[\(4, 4\)',
        ),
        (
            tiny.retinanet(),
            tiny.gfl(),
            False,
            r'per point \[9, 9, 9, 9, 9\], the teacher \[1, 1, 1, 1, 1\]',
        ),
        (
            tiny.retinanet(),
            anchors(octave_base_scale=8),
            False,
            r'several anchors per point of the two dense heads have diff',
        ),
        (
            tiny.gfl(),
            tiny.fcos(),
            True,
            r'first centres \[\(0.0, 0.0\).*, the teacher \[\(4.0, 4.0\)',
        ),
    ],
)
def test_priors_that_do_not(student, teacher, centres, message):
    with pytest.raises(ConfigError, match=message):
        check_same_priors(head(student), head(teacher), 'X', centres=centres)
