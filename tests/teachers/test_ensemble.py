"""Several teachers as their mean."""

import copy
import re

import pytest
import torch

from mmkd.data.batch import Batch
from mmkd.doctor import diagnose
from mmkd.errors import ConfigError
from tests.helpers import several, tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.several import CLASSES, Taught, described, rows, student_of

TURNED = ('bus', 'cat', 'car', 'dog', 'yak', 'cow')
FRCNN = dict(hint=None)
METHODS = {
    ('KD', 'retinanet'): {},
    ('DKD', 'retinanet'): {},
    ('DIST', 'retinanet'): {},
    ('SoftLabelDistillation', 'retinanet'): {},
    ('KD', 'ssd'): {},
    ('KD', 'yolov3'): {},
    ('LD', 'gfl'): {},
    ('KD', 'faster_rcnn'): {},
    ('FasterRCNNDistillation', 'faster_rcnn'): FRCNN,
    ('FasterRCNNDistillation', 'cascade_rcnn'): FRCNN,
}


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def ssd():
    """A softmax head, whose last column is the background."""
    return tiny.merged(
        tiny.retinanet(),
        bbox_head=dict(
            loss_cls=dict(
                _delete_=True, type='CrossEntropyLoss', use_sigmoid=False
            )
        ),
    )


def yolov3():
    """A head that gives box, object and classes in one map."""
    return tiny.merged(
        tiny.stock('yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py'),
        backbone=dict(widen_factor=0.25, init_cfg=None),
        neck=dict(in_channels=[80, 24, 8], out_channels=[16, 16, 16]),
        bbox_head=dict(in_channels=[16, 16, 16], out_channels=[16, 16, 16]),
    )


def model_of(kind):
    own = dict(ssd=ssd, yolov3=yolov3)
    return own[kind]() if kind in own else getattr(tiny, kind)()


def taught_by_mean(student, model, *classes, **methods):
    methods = {
        name: dict(type=f'mmkd.{name}', **options)
        for name, options in methods.items()
    }
    teachers = [described(model, names) for names in classes]
    return Taught(student, dict(mean=teachers), methods)


def put_in_order(network, before, after):
    """Permute the classes of all classifiers of a network."""
    index = [before.index(name) for name in after]
    for name, layer in network.named_modules():
        if name.endswith(('retina_cls', 'gfl_cls', 'fc_cls')):
            turn(layer, 0, index)
        if name.endswith('fc_reg') and layer.out_features > 4:
            turn(layer, 0, [4 * i + k for i in index for k in range(4)])
        if 'convs_pred.' in name:
            turn(layer, 5, index)


def turn(layer, before, index):
    """The classes' rows of each prior; others stay."""
    with torch.no_grad():
        for values in (layer.weight, layer.bias):
            for start in range(before, len(values), width(layer, index)):
                part = values[start : start + len(index)].clone()
                values[start : start + len(index)] = part[index]


def width(layer, index):
    """How many rows a prior has: with box and object, or a background."""
    if len(layer.bias) == 3 * (5 + len(index)):  # YOLOv3
        return 5 + len(index)
    return len(index) + (len(layer.bias) % len(index) != 0)


@pytest.mark.parametrize('classes', [CLASSES, TURNED], ids=['same', 'turned'])
@pytest.mark.parametrize(('method', 'kind'), METHODS)
def test_the_mean_of_equal_teachers_is_one_of_them(method, kind, classes):
    """Also where they list their classes in another order."""
    model, options = model_of(kind), {method: METHODS[method, kind]}
    student = student_of(model)
    taught = taught_by_mean(student, model, classes, CLASSES, **options)
    one = Taught(
        student,
        described(model, CLASSES),
        {method: dict(type=f'mmkd.{method}', **METHODS[method, kind])},
    )
    state = one.networks['teacher'].state_dict()
    for network in taught.networks.values():
        network.load_state_dict(state)
    put_in_order(taught.networks['teacher_1'], CLASSES, classes)
    expected, found = one.losses(), taught.losses()
    assert found.keys() == expected.keys()
    assert any(v > 0 for k, v in found.items() if k.startswith(f'{method}.'))
    for name, loss in expected.items():
        if isinstance(loss, torch.Tensor) and name.startswith(method):
            torch.testing.assert_close(
                found[name], loss, rtol=1e-4, atol=1e-6, msg=name
            )
        else:
            assert toy.same(found[name], loss), name


def test_of_a_dense_head():
    """KD towards the mean of both networks' logits, in plain numbers."""
    model = tiny.retinanet()
    student = student_of(model)
    taught = taught_by_mean(student, model, CLASSES, TURNED, KD={})
    loss = taught.losses()['KD.loss_cls']
    weights, number = several.stock_weights(taught)
    with torch.no_grad():
        ours = rows(student, taught.inputs).double().sigmoid()
        first, second = (
            rows(network, taught.inputs).double()
            for network in taught.networks.values()
        )
    total = 0.0
    for column, name in enumerate(CLASSES):
        z = (first[..., column] + second[..., TURNED.index(name)]) / 2
        p, q = z.sigmoid(), ours[..., column]
        kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        total += (weights * kl).sum().item()
    assert loss.item() == pytest.approx(total / number, rel=1e-4)


def test_of_rois_and_anchors():
    """What the methods read of a two-stage teacher, class by class."""
    model = tiny.faster_rcnn()
    student = student_of(model)
    taught = taught_by_mean(
        student, model, CLASSES, TURNED, FasterRCNNDistillation=FRCNN
    )
    seen = []
    method = taught.distiller.methods['FasterRCNNDistillation']
    method.register_forward_pre_hook(lambda _, args: seen.append(args[:2]))
    taught.losses()
    (outputs, view), networks = seen[0], list(taught.networks.values())
    (sample,) = outputs.rois
    logits, deltas, _ = view.score_rois(sample, 0)
    with torch.no_grad():
        maps = [n.extract_feat(taught.inputs) for n in networks]
        found = [
            network.roi_head._bbox_forward(levels, sample.boxes)
            for network, levels in zip(networks, maps, strict=True)
        ]
    for column, name in enumerate(CLASSES):
        other = TURNED.index(name)
        expected = found[0]['cls_score'][:, column]
        expected = (expected + found[1]['cls_score'][:, other]) / 2
        torch.testing.assert_close(logits[:, column], expected)
        for k in range(4):
            expected = found[0]['bbox_pred'][:, 4 * column + k]
            expected = (expected + found[1]['bbox_pred'][:, 4 * other + k]) / 2
            torch.testing.assert_close(deltas[:, 4 * column + k], expected)
    background = (found[0]['cls_score'] + found[1]['cls_score'])[:, -1] / 2
    torch.testing.assert_close(logits[:, -1], background)
    assert logits.shape[1] == 7

    anchors = outputs.anchors
    scores, boxes, _ = view.score_anchors(anchors)
    image, anchor = anchors.index
    for row in range(0, len(image), 7):
        parts = []
        for network, levels in zip(networks, maps, strict=True):
            with torch.no_grad():
                cls, reg = network.rpn_head(levels)
            parts.append(at(cls, reg, int(image[row]), int(anchor[row])))
        expected = [sum(values) / 2 for values in zip(*parts, strict=True)]
        torch.testing.assert_close(
            torch.cat([scores[row], boxes[row]]), torch.stack(expected)
        )


def at(cls, reg, image, anchor):
    """One anchor's score and 4 deltas: level, row, column, ratio."""
    for scores, deltas in zip(cls, reg, strict=True):
        ratios, height, width = scores.shape[1:]
        if anchor < ratios * height * width:
            place, ratio = divmod(anchor, ratios)
            y, x = divmod(place, width)
            box = [deltas[image, 4 * ratio + k, y, x] for k in range(4)]
            return [scores[image, ratio, y, x], *box]
        anchor -= ratios * height * width
    raise AssertionError('no such anchor')


def test_within_a_list():
    model = tiny.retinanet()
    student = student_of(model)
    mean = dict(mean=[described(model, CLASSES), described(model, TURNED)])
    taught = Taught(
        student,
        [dict(mean, label='both'), described(model, ('yak', 'van'))],
        dict(kd=dict(type='mmkd.KD')),
    )
    names = ['teacher_both_1', 'teacher_both_2', 'teacher_2']
    assert list(taught.networks) == names
    alone = Taught(student, mean, dict(kd=dict(type='mmkd.KD')))
    for number in '12':
        alone.networks[f'teacher_{number}'].load_state_dict(
            taught.networks[f'teacher_both_{number}'].state_dict()
        )
    losses = taught.losses()
    assert losses['kd.loss_cls_both'].item() == pytest.approx(
        alone.losses()['kd.loss_cls'].item() / 2
    )
    assert losses['kd.loss_cls_2'] > 0


def test_zero_weight_is_stock_bit_for_bit():
    model = tiny.faster_rcnn()
    taught = taught_by_mean(
        student_of(model),
        model,
        CLASSES,
        TURNED,
        FasterRCNNDistillation=dict(FRCNN, loss_weight=0.0),
    )
    assert toy.same(taught.losses(), taught.stock_losses())


def test_copies_share_the_teachers():
    model = tiny.retinanet()
    taught = taught_by_mean(student_of(model), model, CLASSES, TURNED, KD={})
    taught.distiller.attach()
    other = copy.deepcopy(taught.student)
    taught.distiller.detach()
    assert other.distillation.teacher is taught.distiller.teacher


# --------------------------------------------------------------------- errors


def no_mean(first, second, **method):
    """The message for a mean of two teachers."""
    method = {'type': 'mmkd.KD', **method}
    with pytest.raises(ConfigError) as error:
        Taught(
            student_of(first['config']['model']),
            {'mean': [first, second]},
            dict(m=method),
        )
    return str(error.value)


def retina(classes=CLASSES, **options):
    return described(tiny.retinanet(**options), classes)


def two_stage(**options):
    return described(tiny.faster_rcnn(**options), CLASSES)


COARSE = dict(strides=[16, 32, 64, 128, 256])
DIFFERING = {
    'classes': (
        retina(),
        retina(('cat', 'pig')),
        r"the classes that only one knows: \['bus', .*\] and \['pig'\]",
    ),
    'heads': (
        retina(),
        described(tiny.fcos(), CLASSES),
        'the bbox_head: RetinaHead and FCOSHead',
    ),
    'stages': (
        retina(),
        two_stage(),
        'teacher_1 and teacher_2 have no mean; they differ in the rpn_head',
    ),
    'classifier': (
        retina(),
        described(ssd(), CLASSES),
        'the classifier of the bbox_head: sigmoid and softmax',
    ),
    'strides': (
        retina(),
        retina(bbox_head__anchor_generator__strides=COARSE['strides']),
        'the strides of the bbox_head',
    ),
    'anchors': (
        retina(),
        retina(bbox_head__anchor_generator__octave_base_scale=2),
        'the first priors of the bbox_head',
    ),
    'coder': (
        retina(),
        retina(bbox_head__bbox_coder__target_stds=[0.1, 0.1, 0.2, 0.2]),
        'the box coder of the bbox_head: DeltaXYWHBBoxCoder',
    ),
    'bins': (
        described(tiny.gfl(), CLASSES),
        described(tiny.gfl(bbox_head__reg_max=8), CLASSES),
        'reg_max of the bbox_head: 16 and 8',
    ),
    'scores': (
        described(tiny_dense.tood(), CLASSES),
        described(
            tiny_dense.tood(bbox_head__loss_cls__activated=False), CLASSES
        ),
        'the scores of the bbox_head: probabilities and logits',
    ),
    'RPN': (
        two_stage(),
        two_stage(rpn_head__anchor_generator__scales=[4]),
        'the first priors of the rpn_head',
    ),
    'agnostic': (
        two_stage(),
        two_stage(roi_head__bbox_head__reg_class_agnostic=True),
        'reg_class_agnostic of RoI stage 0: False and True',
    ),
    'RoI coder': (
        two_stage(),
        two_stage(
            roi_head__bbox_head__bbox_coder__target_stds=[0.2, 0.2, 0.4, 0.4]
        ),
        'the box coder of RoI stage 0',
    ),
    'cascade': (
        two_stage(),
        described(tiny.cascade_rcnn(), CLASSES),
        'the number of RoI stages: 1 and 3',
    ),
    'levels': (
        retina(),
        retina(backbone__strides=(1, 2, 2, 1)),
        'the output shapes',
    ),
}


@pytest.mark.parametrize('case', DIFFERING)
def test_teachers_that_differ_have_no_mean(case):
    first, second, expected = DIFFERING[case]
    message = no_mean(first, second)
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(message)
    assert 'Teachers that differ teach one by one, in a list' in message


@pytest.mark.parametrize(
    ('method', 'expected'),
    [
        ('FeatureHint', r'needs features from its teacher.*list \(teacher=\['),
        (
            'CrossKD',
            r'm \(CrossKD\) needs features, a head of .* single teacher',
        ),
        ('FasterRCNNDistillation', r'Set hint=None to do without'),
        ('LAD', r'm \(LAD\) needs a head of MMDetection.*heads that assign'),
        ('SoLAD', 'heads that assign'),
    ],
)
def test_methods_that_need_a_single_network(method, expected):
    message = no_mean(retina(), retina(), type=f'mmkd.{method}')
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(message)


@pytest.mark.parametrize(
    ('teacher', 'expected'),
    [
        (dict(mean=[]), r'mean must be a list .*got \[\]'),
        (dict(mean=retina()), 'mean must be a list'),
        (dict(mean=[retina()]), 'at least two teachers, got one'),
        (dict(mean=[retina()] * 2, checkpoint=None), 'no option "checkpoint"'),
        (
            dict(mean=[retina(), dict(mean=[retina()] * 2)]),
            'takes descriptions of single',
        ),
        (dict(mean=[retina(), [retina()]]), 'takes descriptions of single'),
        (
            dict(mean=[retina(), dict(retina(), label='1')]),
            'two teachers have the label "1"',
        ),
    ],
)
def test_descriptions(teacher, expected):
    student = student_of(tiny.retinanet())
    with pytest.raises(ConfigError, match=expected):
        Taught(student, teacher, dict(m=dict(type='mmkd.KD')))


def test_features_have_no_mean():
    model = tiny.retinanet()
    taught = taught_by_mean(student_of(model), model, CLASSES, CLASSES, KD={})
    taught.losses()
    batch = Batch(taught.inputs, taught.samples)
    view = taught.distiller.teacher.view(batch)
    with pytest.raises(ConfigError, match='features of several networks'):
        view.features('neck', None)
    with pytest.raises(ConfigError, match='features of several networks'):
        _ = view.maps


# ------------------------------------------------------------------- training


def test_the_doctor_looks_at_each(tmp_path):
    cfg = toy.distilled(
        tmp_path, toy.RETINANET, methods=dict(kd=dict(type='mmkd.KD'))
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    teachers = []
    for seed in range(2):
        torch.manual_seed(seed)
        network = toy.detector(copy.deepcopy(cfg.model))
        path = tmp_path / f'{seed}.pth'
        torch.save(dict(state_dict=network.state_dict()), path)
        config = toy.teacher_config(cfg)
        if seed:
            names = toy.stock_classes()[::-1]
            dataset = config['test_dataloader']['dataset']
            dataset['metainfo'] = dict(classes=names)
        teachers.append(dict(config=config, checkpoint=str(path)))
    cfg.distillation.teacher = dict(mean=teachers)
    report = diagnose(cfg)
    assert not report.stops
    text = report.text()
    assert "teacher_2's order of classes is free" in text
    pixels = '\n'.join(report.sections['Pixels'])
    assert re.search(r"teacher_1  .* the student's, as it is", pixels)
    assert 'padding changes no loss' in text
