"""Several teachers of different classes, one by one."""

import copy
import re
import shutil

import pytest
import torch
from mmengine.registry import RUNNERS

from mmkd.core.distiller import build_distiller
from mmkd.doctor import diagnose
from mmkd.engine.runner import DistillationRunner
from mmkd.errors import ConfigError
from mmkd.teachers.build import descriptions as by_name
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy
from tests.helpers.several import (
    CARS,
    CLASSES,
    PETS,
    Taught,
    described,
    rows,
    stock_weights,
    student_of,
)

FEATURES = {
    'FeatureHint': dict(adapt=True),
    'CWD': {},
    'PKD': {},
    'MGD': {},
    'TaT': {},
    'FGD': {},
    'FBKD': {},
}
METHODS = {
    **{(name, 'retinanet'): o for name, o in FEATURES.items()},
    ('KD', 'retinanet'): dict(temperature=2.0),
    ('DKD', 'retinanet'): {},
    ('DIST', 'retinanet'): {},
    ('SoftLabelDistillation', 'retinanet'): {},
    ('CrossKD', 'retinanet'): dict(layer=1),
    ('LD', 'gfl'): {},
    ('KD', 'faster_rcnn'): {},
    ('DKD', 'cascade_rcnn'): {},
    ('FasterRCNNDistillation', 'faster_rcnn'): {},
    ('FasterRCNNDistillation', 'cascade_rcnn'): dict(mu=0.25),
}
"""Method and kind of detector to the method's options."""


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def two(model, **options):
    """Descriptions of two teachers, of the pets and of the others."""
    return [
        described(model, PETS, label='pets', **options),
        described(model, CARS, **options),
    ]


def alone(taught, label):
    """The same student with one teacher of a list, of equal weights."""
    cfg = by_name(taught.described)[f'teacher_{label}']
    single = Taught(taught.student, cfg, taught.methods)
    single.networks['teacher'].load_state_dict(
        taught.networks[f'teacher_{label}'].state_dict()
    )
    for name, method in taught.distiller.methods.items():
        state = method.of_teacher[label].state_dict()
        single.distiller.methods[name].load_state_dict(state)
    return single


def by_two(kind, weight=1.0, **methods):
    model = getattr(tiny, kind)()
    methods = {
        name: dict(type=f'mmkd.{name}', loss_weight=weight, **options)
        for name, options in methods.items()
    }
    taught = Taught(student_of(model), two(model), methods)
    taught.described, taught.methods = two(model), methods
    return taught


@pytest.mark.parametrize(('method', 'kind'), METHODS)
def test_each_teaches_as_it_would_alone(method, kind):
    """With half the weight, and its own adapters."""
    taught = by_two(kind, 3.0, **{method: METHODS[method, kind]})
    singles = {label: alone(taught, label) for label in ('pets', '2')}
    losses, expected = taught.losses(), {}
    for label, single in singles.items():
        for name, loss in single.losses().items():
            if name.startswith(f'{method}.'):
                name, loss = f'{name}_{label}', loss / 2
            expected[name] = loss
    assert losses.keys() == expected.keys()
    for name, loss in expected.items():
        ours = losses[name]
        assert toy.same(ours, loss) or ours.item() == pytest.approx(
            loss.item(), rel=1e-5
        ), name
    named = [name for name in losses if name.startswith(f'{method}.')]
    assert len(named) >= 2
    for label in singles:
        assert sum(losses[n] for n in named if n.endswith(label)) > 0
    # They are different teachers: the comparison says which is which.
    other = [n.removesuffix('2') + 'pets' for n in named if n.endswith('2')]
    assert any(
        losses[a].item() != losses[b].item()
        for a, b in zip(
            [n for n in named if n.endswith('2')], other, strict=True
        )
    )


@pytest.mark.parametrize(
    ('weight', 'factor'), [(1, 0.5), (0.5, 0.75), (2, 0.5)]
)
def test_factors_of_the_student_s_losses_apply_once(weight, factor):
    taught = by_two('faster_rcnn', weight, FasterRCNNDistillation={})
    losses = taught.losses()
    stock = taught.stock_losses()
    assert losses['loss_cls'].item() == pytest.approx(
        factor * stock['loss_cls'].item()
    )
    assert losses['loss_bbox'].item() == stock['loss_bbox'].item()


def test_equal_teachers_are_as_strong_as_one():
    model = tiny.retinanet()
    kd = dict(kd=dict(type='mmkd.KD'))
    student = student_of(model)
    taught = Taught(student, [described(model, CLASSES)] * 3, kd)
    one = Taught(student, described(model, CLASSES), kd)
    for network in taught.networks.values():
        network.load_state_dict(one.networks['teacher'].state_dict())
    parts = [v for k, v in taught.losses().items() if '.' in k]
    assert len(parts) == 3
    assert sum(parts).item() == pytest.approx(
        one.losses()['kd.loss_cls'].item()
    )


def test_a_list_has_the_gradient_of_the_mean_of_probabilities():
    """Of KD, as the docstring of MeanTeacher says."""
    model = tiny.retinanet()
    student = student_of(model)
    taught = Taught(
        student,
        [described(model, CLASSES)] * 2,
        dict(kd=dict(type='mmkd.KD')),
    )
    losses = taught.losses()
    total = losses['kd.loss_cls_1'] + losses['kd.loss_cls_2']
    weight = student.bbox_head.retina_cls.bias
    (gradient,) = torch.autograd.grad(total, weight)
    weights, number = stock_weights(taught)
    maps = [rows(m, taught.inputs) for m in taught.networks.values()]
    ours = rows(student, taught.inputs)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(
        ours, (maps[0].sigmoid() + maps[1].sigmoid()) / 2, reduction='none'
    )
    reference = (entropy * weights[..., None]).sum() / number
    (expected,) = torch.autograd.grad(reference, weight)
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-6)


# ---------------------------------------------------------------- class sets


@pytest.mark.parametrize(
    'classes',
    [
        ('yak', 'cat'),
        (*CLASSES, 'van', 'pig'),
        CLASSES[::-1],
        ('pig', 'bus', 'van', 'cow'),
    ],
    ids=['subset', 'superset', 'reordered', 'overlapping'],
)
def test_each_teaches_the_classes_that_it_shares(classes):
    """KD of the second teacher, computed in plain numbers, by name."""
    model = tiny.retinanet()
    student = student_of(model)
    taught = Taught(
        student,
        [described(model, PETS), described(model, classes)],
        dict(kd=dict(type='mmkd.KD')),
    )
    losses = taught.losses()
    weights, number = stock_weights(taught)
    network, width = taught.networks['teacher_2'], len(classes)
    with torch.no_grad():
        ours = rows(student, taught.inputs).double().sigmoid()
        theirs = rows(network, taught.inputs, columns=width).double()
    theirs, total = theirs.sigmoid(), 0.0
    for name in set(CLASSES) & set(classes):
        p = theirs[..., classes.index(name)]
        q = ours[..., CLASSES.index(name)]
        kl = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        total += (weights * kl).sum().item()
    assert losses['kd.loss_cls_2'].item() == pytest.approx(
        total / number / 2, rel=1e-4
    )


def test_each_sees_its_own_pixels():
    model = tiny.retinanet()
    other = tiny.retinanet(
        data_preprocessor=dict(
            type='DetDataPreprocessor', mean=[9.0] * 3, std=[50.0] * 3
        )
    )
    taught = Taught(
        student_of(model),
        [described(model, CLASSES), described(other, CLASSES)],
        dict(kd=dict(type='mmkd.KD')),
    )
    seen = {}
    for name, network in taught.networks.items():
        network.backbone.register_forward_pre_hook(
            lambda _, args, name=name: seen.update({name: args[0]})
        )
    taught.losses(sizes=((96, 128), (96, 128)))
    raw = torch.stack(tiny.raw_batch(objects=4, classes=6)['inputs'])
    assert torch.equal(seen['teacher_1'], taught.inputs)
    torch.testing.assert_close(
        seen['teacher_2'], (raw.flip(1).float() - 9) / 50, rtol=0, atol=1e-5
    )


# ------------------------------------------------------------- the list alone


def test_zero_weight_is_stock_bit_for_bit():
    taught = by_two('faster_rcnn', 0.0, FasterRCNNDistillation={}, KD={})
    losses = taught.losses()
    stock = taught.stock_losses()
    assert toy.same(losses, stock)


def test_names():
    first, second, third = ({'name': n} for n in 'abc')
    assert by_name(first) == {'teacher': first}
    assert by_name('a') == {'teacher': 'a'}
    labelled = dict(second, label='x')
    assert by_name([first, labelled, 'c']) == {
        'teacher_1': first,
        'teacher_x': second,
        'teacher_3': 'c',
    }
    assert by_name([dict(mean=[first, labelled]), third]) == {
        'teacher_1_1': first,
        'teacher_1_x': second,
        'teacher_2': third,
    }


def test_copies_share_the_teachers():
    taught = by_two('retinanet', KD={})
    taught.distiller.attach()
    other = copy.deepcopy(taught.student)
    taught.distiller.detach()
    theirs = other.distillation.networks
    for name, network in taught.distiller.networks.items():
        assert theirs[name] is network


ONE = described(tiny.retinanet(), CLASSES)
KD = dict(type='mmkd.KD')
ERRORS = {
    'none': ([], KD, 'teacher is an empty list'),
    'a label twice': (
        [dict(ONE, label='a'), dict(ONE, label='a')],
        KD,
        'two teachers have the label "a"',
    ),
    'a label that is a number in use': (
        [ONE, dict(ONE, label='1')],
        KD,
        'two teachers have the label "1"',
    ),
    'no word': ([dict(ONE, label='a.b')], KD, "'a.b' cannot be a label"),
    'a reserved word': ([dict(ONE, label='keys')], KD, "'keys' cannot be"),
    'a label alone': (dict(ONE, label='a'), KD, 'has no option "label"'),
    'a list in a list': ([[ONE]], KD, 'the list holds another list'),
    'unknown option': (
        [ONE, dict(ONE, chekpoint=None)],
        KD,
        'teacher_2: distillation.teacher has no option "chekpoint"',
    ),
    'disjoint classes': (
        [ONE, described(tiny.retinanet(), ('van',))],
        KD,
        r'teacher_2: the teacher and the student share no class name.*van',
    ),
    'LAD': (
        [ONE, ONE],
        dict(type='mmkd.LabelAssignmentDistillation'),
        r'methods\.m \(LAD\) steers .* which only one .* a list of 2',
    ),
    'SoLAD': ([ONE], dict(type='mmkd.SoLAD'), 'a list of 1'),
    'a teacher that does not fit': (
        [ONE, described(tiny.fcos(), CLASSES)],
        KD,
        'teacher_2: KD: the priors of the two dense heads do not correspond',
    ),
}


@pytest.mark.parametrize('case', ERRORS)
def test_errors(case):
    teacher, method, message = ERRORS[case]
    student = student_of(tiny.retinanet())
    with pytest.raises(ConfigError, match=message):
        Taught(student, teacher, dict(m=method))


def test_a_method_on_peers_learns_from_none_of_a_list():
    student = student_of(tiny.retinanet())
    peers = dict(p=dict(config=ONE['config']))
    cfg = dict(
        teacher=[ONE, ONE],
        peers=peers,
        methods=dict(m=dict(type='mmkd.OneTeacherSeveralStudents')),
    )
    with pytest.raises(ConfigError, match='teaches no method on peers: One'):
        build_distiller(cfg, student, CLASSES)
    cfg['methods'] = dict(
        dml=dict(type='mmkd.MutualLearning'), kd=dict(type='mmkd.KD')
    )
    distiller = build_distiller(cfg, student, CLASSES)
    inputs, samples = tiny.batch_for(student)
    distiller.attach()
    losses = tiny.seeded_loss(student, inputs, samples)
    distiller.detach()
    assert {'kd.loss_cls_1', 'kd.loss_cls_2'} < losses.keys()
    assert any(name.startswith('dml.') for name in losses)


# ------------------------------------------------------------------- training


def several(tmp_path, **options):
    """A training with two teachers; the first has the classes reversed."""
    cfg = toy.distilled(
        tmp_path,
        toy.RETINANET,
        methods=dict(
            kd=dict(type='mmkd.KD'),
            hint=dict(type='mmkd.FeatureHint', adapt=True),
        ),
        **options,
    )
    cfg.distillation.teacher = []
    for seed, classes in enumerate((toy.stock_classes()[::-1], None)):
        torch.manual_seed(seed)
        network = toy.detector(copy.deepcopy(cfg.model))
        path = tmp_path / f'{seed}.pth'
        torch.save(dict(state_dict=network.state_dict()), path)
        config = toy.teacher_config(cfg)
        if classes:
            dataset = config['test_dataloader']['dataset']
            dataset['metainfo'] = dict(classes=classes)
        teacher = dict(config=config, checkpoint=str(path))
        cfg.distillation.teacher.append(teacher)
    cfg.distillation.teacher[0]['label'] = 'turned'
    return cfg


@RUNNERS.register_module()
class SpoilsSecond(DistillationRunner):
    """Initialises the second teacher again."""

    def _attach(self):
        super()._attach()
        network = self.distiller.networks['teacher_2'].model
        torch.nn.init.normal_(network.backbone.conv1.weight)


class TestTraining:
    def test_resumes_exactly_and_leaves_a_stock_checkpoint(self, tmp_path):
        cfg = several(tmp_path, epochs=2, images=4)
        cfg.work_dir = str(tmp_path / 'whole')
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        record = toy.Record()
        toy.train(copy.deepcopy(cfg), record)
        assert {
            'kd.loss_cls_turned',
            'kd.loss_cls_2',
            'hint.loss_hint_turned',
            'hint.loss_hint_2',
        } < record.losses[0].keys()
        again = copy.deepcopy(cfg)
        again.work_dir, again.resume = str(tmp_path / 'resumed'), True
        (tmp_path / 'resumed').mkdir()
        shutil.copy(tmp_path / 'whole/epoch_1.pth', tmp_path / 'resumed')
        resumed = toy.Record()
        toy.train(again, resumed)
        assert resumed.losses == record.losses[len(record.losses) // 2 :]
        whole, other = (
            toy.load(tmp_path / f'{name}/epoch_2.pth')
            for name in ('whole', 'resumed')
        )
        for key in ('state_dict', 'optimizer'):
            assert toy.same(whole[key], other[key])
        kept = [c['distillation']['state_dict'] for c in (whole, other)]
        assert toy.same(*kept)
        prefix = 'distillation.methods.hint.of_teacher'
        assert {name.rsplit('.', 3)[0] for name in kept[0]} == {
            f'{prefix}.turned',
            f'{prefix}.2',
        }
        stock = toy.detector(copy.deepcopy(cfg.model))
        stock.load_state_dict(whole['state_dict'], strict=True)

    def test_the_doctor_looks_at_each(self, tmp_path):
        cfg = several(tmp_path, images=2)
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        report = diagnose(copy.deepcopy(cfg))
        assert not report.stops
        text = report.text()
        assert "teacher_turned's order of classes is free" in text
        pixels = '\n'.join(report.sections['Pixels'])
        for name in ('teacher_turned', 'teacher_2'):
            assert re.search(
                f"{name}  .* (the student's, as it is|converted)", pixels
            )
            assert f'hint, {name}' in text
        cfg.runner_type = 'SpoilsSecond'
        (finding,) = diagnose(cfg).stops
        assert 'the teacher_2 was initialised again after' in finding
