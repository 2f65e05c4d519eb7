"""What the taps record is what the detector computed, and nothing stays."""

import copy
import itertools

import pytest
import torch
from mmengine.structures import InstanceData

from mmkd.detectors.facts import box_heads, stage_of
from mmkd.detectors.record import (
    StepRecord,
    flatten_levels,
    intercepted,
    tensors_in,
)
from mmkd.errors import TapError
from tests.helpers import tiny_detectors as tiny

VARIANTS = {
    'fpn': tiny.faster_rcnn(),
    'c4': tiny.c4(),
    'mask': tiny.mask_rcnn(),
    'double head': tiny.double_head(),
    'cascade': tiny.cascade_rcnn(),
    'softmax rpn': tiny.faster_rcnn(rpn_head__loss_cls__use_sigmoid=False),
    'sigmoid rois': tiny.faster_rcnn(
        roi_head__bbox_head__loss_cls__use_sigmoid=True
    ),
    'class-agnostic': tiny.faster_rcnn(
        roi_head__bbox_head__reg_class_agnostic=True
    ),
    'iou loss': tiny.faster_rcnn(
        rpn_head__reg_decoded_bbox=True,
        rpn_head__loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
        roi_head__bbox_head__reg_decoded_bbox=True,
        roi_head__bbox_head__loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
    ),
}


@pytest.fixture(scope='module', params=VARIANTS)
def recorded(request):
    """A detector, its step's stock losses and what the taps recorded."""
    model = tiny.build(VARIANTS[request.param])
    batch = tiny.batch_for(
        model,
        objects=(3, 1),
        sizes=((96, 128), (80, 100)),
        masks=request.param == 'mask',
    )
    outputs = StepRecord(model)
    with outputs.recording():
        losses = tiny.seeded_loss(model, *batch)
    return model, losses, outputs


def traces(model):
    """Everything that recording could leave on a detector."""
    return {
        name: (
            len(module._forward_hooks),
            len(module._forward_pre_hooks),
            {k for k in vars(module) if callable(getattr(type(module), k, 0))},
        )
        for name, module in model.named_modules()
    }


def rpn_loss_of(sample):
    """MMDetection's RPN loss, from the sampled anchors alone."""
    head = sample.facts.head
    cls = head.loss_cls(
        sample.logits,
        sample.labels,
        sample.label_weights,
        avg_factor=sample.avg_factor,
    )
    deltas = sample.deltas
    if head.reg_decoded_bbox:
        deltas = head.bbox_coder.decode(sample.boxes, deltas)
    bbox = head.loss_bbox(
        deltas,
        sample.targets,
        sample.target_weights,
        avg_factor=sample.avg_factor,
    )
    return cls, bbox


def rcn_loss_of(sample):
    """MMDetection's RoI loss, from the sampled RoIs alone."""
    head = sample.facts.head
    cls = head.loss_cls(
        sample.logits,
        sample.labels,
        sample.label_weights,
        avg_factor=sample.avg_factor,
    )
    bbox = torch.zeros(())
    for row, label in enumerate(sample.labels.tolist()):
        if label == head.num_classes:
            continue
        column = 0 if head.reg_class_agnostic else 4 * label
        deltas = sample.deltas[row, column : column + 4][None]
        if head.reg_decoded_bbox:
            deltas = head.bbox_coder.decode(
                sample.boxes[row, 1:][None], deltas
            )
        bbox = bbox + head.loss_bbox(
            deltas,
            sample.targets[row][None],
            sample.target_weights[row][None],
            avg_factor=sample.avg_factor,
        )
    return cls, bbox


# ------------------------------------------------------- what was trained on


def test_the_sampled_anchors_give_the_stock_rpn_loss(recorded):
    _, losses, outputs = recorded
    cls, bbox = rpn_loss_of(outputs.anchors)
    torch.testing.assert_close(cls, sum(losses['loss_rpn_cls']))
    torch.testing.assert_close(bbox, sum(losses['loss_rpn_bbox']))
    assert bbox > 0


def test_the_sampled_rois_give_the_stock_roi_loss(recorded):
    model, losses, outputs = recorded
    assert len(outputs.rois) == len(box_heads(model))
    for stage, sample in enumerate(outputs.rois):
        prefix, weight = '', 1.0
        if len(box_heads(model)) > 1:
            prefix = f's{stage}.'
            weight = model.roi_head.stage_loss_weights[stage]
        cls, bbox = rcn_loss_of(sample)
        assert sample.facts.head is box_heads(model)[stage]
        torch.testing.assert_close(weight * cls, losses[f'{prefix}loss_cls'])
        torch.testing.assert_close(weight * bbox, losses[f'{prefix}loss_bbox'])
        assert bbox > 0


def test_sampled_anchors_are_those_of_the_generator(recorded):
    """Anchor number i of the index is the i-th of the anchor generator."""
    model, _, outputs = recorded
    sample = outputs.anchors
    sizes = [score.shape[-2:] for score in outputs.raw('rpn_head')[0]]
    anchors = torch.cat(
        model.rpn_head.prior_generator.grid_priors(sizes, device='cpu')
    )
    image, number = sample.index
    assert torch.equal(sample.boxes, anchors[number])
    assert set(image.tolist()) == {0, 1}
    assert len(sample.boxes) == sample.avg_factor == 2 * 48
    positive = sample.labels == 0
    assert (sample.target_weights[positive] == 1).all()
    assert (sample.target_weights[~positive] == 0).all()


def test_predictions_keep_their_gradient(recorded):
    model, _, outputs = recorded
    outputs.anchors.logits.sum().backward(retain_graph=True)
    assert model.rpn_head.rpn_cls.weight.grad.abs().sum() > 0
    outputs.rois[0].deltas.sum().backward(retain_graph=True)
    assert box_heads(model)[0].fc_reg.weight.grad.abs().sum() > 0
    model.zero_grad()


def code(image, channel, anchor, x, y, level):
    """A number that says where it belongs."""
    return (
        image
        + 10 * channel
        + 100 * anchor
        + 1000 * x
        + 10_000 * y
        + 100_000 * level
    )


@pytest.mark.parametrize('channels', [1, 2, 4])
def test_flattened_levels_are_in_the_order_of_the_anchors(channels):
    generator = tiny.build(VARIANTS['fpn']).rpn_head.prior_generator
    sizes = [(6, 8), (3, 4), (2, 2), (1, 1), (1, 1)]
    maps = []
    for level, (height, width) in enumerate(sizes):
        values = torch.zeros(2, 3 * channels, height, width)
        for index in itertools.product(
            range(2), range(3), range(channels), range(height), range(width)
        ):
            image, anchor, channel, y, x = index
            values[image, anchor * channels + channel, y, x] = code(
                image, channel, anchor, x, y, level
            )
        maps.append(values)
    flat = flatten_levels(maps, channels)
    anchors = generator.grid_priors(sizes, device='cpu')
    assert flat.shape == (2, sum(map(len, anchors)), channels)
    position = 0
    for level, level_anchors in enumerate(anchors):
        stride = generator.strides[level][0]
        for x1, y1, x2, y2 in level_anchors.tolist():
            # The ratios 0.5, 1 and 2 are height : width.
            ratio = (y2 - y1) / (x2 - x1)
            anchor = min(range(3), key=lambda i: abs((0.5, 1, 2)[i] - ratio))
            x, y = round((x1 + x2) / 2 / stride), round((y1 + y2) / 2 / stride)
            for image, channel in itertools.product(range(2), range(channels)):
                assert flat[image, position, channel] == code(
                    image, channel, anchor, x, y, level
                )
            position += 1


# --------------------------------------------------------- nothing is left


def test_recording_changes_no_loss_and_leaves_no_trace():
    model = tiny.build(VARIANTS['fpn'])
    batch = tiny.batch_for(model)
    state = copy.deepcopy(model.state_dict())
    plain = tiny.seeded_loss(model, *batch)
    model.load_state_dict(state)
    before = traces(model)
    outputs = StepRecord(model, ['backbone.layer1'])
    with outputs.recording():
        assert traces(model) != before
        losses = tiny.seeded_loss(model, *batch)
    assert traces(model) == before
    assert plain.keys() == losses.keys()
    for name, loss in plain.items():
        assert torch.equal(
            torch.stack(tensors_in(loss)),
            torch.stack(tensors_in(losses[name])),
        )


def test_no_trace_is_left_by_a_step_that_fails():
    model = tiny.build(VARIANTS['cascade'])
    batch = tiny.batch_for(model)
    before = traces(model)
    outputs = StepRecord(model, ['neck'])
    del batch[1][1].gt_instances.labels
    with pytest.raises(AttributeError), outputs.recording():
        tiny.seeded_loss(model, *batch)
    assert outputs.features('neck')
    assert traces(model) == before


def test_a_copy_made_after_recording_is_clean():
    model = tiny.build(VARIANTS['fpn'])
    before = traces(model)
    with StepRecord(model).recording():
        tiny.seeded_loss(model, *tiny.batch_for(model))
    twin = copy.deepcopy(model)
    assert traces(twin) == before
    assert twin.rpn_head.get_targets.__self__ is twin.rpn_head


def test_interception_leaves_anothers_shadow_in_place():
    class Owner:
        def value(self, x):
            return x

    owner, seen = Owner(), []
    owner.value = shadow = lambda x: 10 * x
    with intercepted(owner, 'value', lambda *call: seen.append(call)):
        assert owner.value(2) == 20
    assert owner.value is shadow
    del owner.value
    with intercepted(owner, 'value', lambda *call: seen.append(call)):
        assert owner.value(3) == 3
    assert 'value' not in vars(owner)
    assert seen == [(20, 2), (3, 3)]


# ------------------------------------------------------------------- taps


def test_taps_hold_what_the_modules_returned():
    model = tiny.build(VARIANTS['fpn'])
    batch = tiny.batch_for(model)
    paths = ['backbone', 'neck', 'backbone.layer2', 'rpn_head.rpn_conv']
    outputs = StepRecord(model, paths)
    seen = []
    handle = model.backbone.layer2.register_forward_hook(
        lambda module, args, output: seen.append(output)
    )
    with outputs.recording():
        tiny.seeded_loss(model, *batch)
    handle.remove()
    (layer2,) = outputs.features('backbone.layer2')
    assert layer2 is seen[0]
    backbone = outputs.features('backbone')
    assert [f.shape[1] for f in backbone] == [8, 16, 32, 64]
    assert layer2 is backbone[1]
    neck = outputs.features('neck')
    assert [tuple(f.shape[-2:]) for f in neck] == [
        (24, 32),
        (12, 16),
        (6, 8),
        (3, 4),
        (2, 2),
    ]
    # A module that runs on every level gives its outputs in their order.
    shared = outputs.features('rpn_head.rpn_conv')
    assert [f.shape[-2:] for f in shared] == [f.shape[-2:] for f in neck]


def test_neck_is_the_backbone_where_there_is_none():
    model = tiny.build(VARIANTS['c4'])
    batch = tiny.batch_for(model)
    outputs = StepRecord(model, ['neck'])
    with outputs.recording():
        model.extract_feat(batch[0])
    assert outputs.features('neck')[0] is outputs.features('backbone')[0]


def test_tensors_in_nested_outputs():
    a, b, c = (torch.full((1,), float(i)) for i in range(3))
    assert tensors_in({'x': [a, (b,)], 'y': None, 'z': c}) == (a, b, c)
    assert tensors_in(InstanceData()) == ()
    assert tensors_in(a) == (a,)


@pytest.mark.parametrize(
    ('path', 'stage'),
    [
        ('roi_head.bbox_head.2.fc_cls', 2),
        ('roi_head.bbox_roi_extractor.1', 1),
        ('roi_head', None),
        ('roi_head.bbox_head', None),
        ('backbone.layer1.0', None),
    ],
)
def test_stage_of_a_cascade(path, stage):
    assert stage_of(tiny.build(VARIANTS['cascade']), path) == stage


def test_a_detector_without_stages_has_none():
    model = tiny.build(VARIANTS['fpn'])
    assert stage_of(model, 'roi_head.bbox_head.shared_fcs.1') is None
    retinanet = tiny.build(tiny.retinanet())
    assert stage_of(retinanet, 'roi_head.bbox_head.1') is None
    assert box_heads(retinanet) == []


# ------------------------------------------------------------------ errors


def test_a_tap_that_never_fires_lists_what_did():
    model = tiny.build(VARIANTS['fpn'])
    outputs = StepRecord(model, ['roi_head.bbox_head.fc_cls', 'neck'])
    with outputs.recording():
        model.extract_feat(tiny.batch_for(model)[0])
    message = (
        r'"roi_head.bbox_head.fc_cls" of FasterRCNN never fired: the module '
        r'did not run.*Fired: neck'
    )
    with pytest.raises(TapError, match=message):
        outputs.features('roi_head.bbox_head.fc_cls')


def test_a_misspelt_tap_says_the_nearest():
    model = tiny.build(VARIANTS['fpn'])
    outputs = StepRecord(model, ['backbone.layr2'])
    with outputs.recording():
        model.extract_feat(tiny.batch_for(model)[0])
    message = (
        'no such module. Did you mean "backbone.layer2"?.*has '
        'data_preprocessor, backbone, neck, rpn_head, roi_head'
    )
    with pytest.raises(TapError, match=message):
        outputs.features('backbone.layr2')


def test_a_one_stage_detector_has_no_samples():
    model = tiny.build(tiny.retinanet())
    outputs = StepRecord(model)
    with outputs.recording():
        tiny.seeded_loss(model, *tiny.batch_for(model))
    with pytest.raises(TapError, match='RetinaNet has trained no RPN'):
        _ = outputs.anchors
    with pytest.raises(TapError, match='RetinaNet has trained no RoI'):
        _ = outputs.rois
