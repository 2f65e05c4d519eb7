"""With weight 0, each method leaves each kind of student as it trains alone.

Its losses, gradients, weights after a step and random numbers are those of
stock training, bit for bit; a student that a method is not made for is
refused instead.
"""

import copy
import functools
import inspect
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.optim import OptimWrapper

from mmkd import methods
from mmkd.core.distiller import build_distiller
from mmkd.core.method import Method
from mmkd.engine.hooks import WeightScheduleHook
from mmkd.errors import ConfigError
from mmkd.peers.peer import add_to_optimizer
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny

STUDENTS = {
    'paa': tiny_dense.paa,  # one-stage, its assignment read off predictions
    'gfl': tiny.gfl,  # one-stage, with distributions of box sides
    'rcnn': tiny.faster_rcnn,  # two-stage
    'detr': tiny.detr,  # transformer
}
ANY = ('paa', 'gfl', 'rcnn', 'detr')
LOGITS = ('paa', 'gfl', 'rcnn')
DENSE = ('paa', 'gfl')
ONE, TWO = ('one',), ('one', 'two')
# Method: the students that it is made for, its peers, and its options.
TABLE = {
    'FeatureHint': (ANY, (), {}),
    'CWD': (ANY, (), {}),
    'PKD': (ANY, (), {}),
    'FGD': (ANY, (), {}),
    'FoundationFeatures': (ANY, (), {}),
    'MGD': (ANY, (), {}),
    'FBKD': (ANY, (), {}),
    'TaT': (ANY, (), {}),
    'KD': (LOGITS, (), {}),
    'DKD': (LOGITS, (), {}),
    'DIST': (LOGITS, (), {}),
    'LD': (('gfl',), (), {}),
    'CrossKD': (DENSE, (), dict(layer=1)),
    'FasterRCNNDistillation': (('rcnn',), (), {}),
    'LAD': (('paa',), (), {}),
    'SoftLabelDistillation': (('paa',), (), {}),
    'SoLAD': (('paa',), (), {}),
    'TeacherBoxes': (('gfl', 'rcnn', 'detr'), (), {}),
    'CoLAD': (('paa',), ONE, {}),
    'DML': (LOGITS, ONE, {}),
    'OneTeacherSeveralStudents': (LOGITS, ONE, {}),
    'DCM': (DENSE, ONE, {}),
    'FFSD': (DENSE, TWO, {}),
}
SGD = dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=1e-4)
CLIP = dict(max_norm=1.0)


def test_every_shipped_method_is_here():
    shipped = {
        method.__name__  # which several names may have
        for method in vars(methods).values()
        if inspect.isclass(method)
        and issubclass(method, Method)
        # see tests/core/test_unlabelled.py
        and not method.only_unlabelled
    }
    assert set(TABLE) == shipped - {'Method'}


def wide(config):
    """The same with a backbone of twice the width: other features."""
    widths = [2 * width for width in config.neck.in_channels]
    return tiny.merged(
        config, backbone__base_channels=16, neck__in_channels=widths
    )


def distilled(method, name, **options):
    """A student that learns by a method, attached."""
    _, peers, needed = TABLE[method]
    config = STUDENTS[name]()
    classes = dict(dataset=dict(metainfo=dict(classes=tiny.CLASSES)))
    described = dict(model=wide(config), test_dataloader=classes)
    cfg = dict(
        teacher=dict(config=described, checkpoint=None),
        peers={p: dict(config=dict(model=config)) for p in peers},
        methods=dict(m=dict(type=f'mmkd.{method}', **needed, **options)),
    )
    student = seeded(name)
    distiller = build_distiller(cfg, student, tiny.CLASSES, seed=5)
    distiller.attach()
    return student


@functools.cache
def built(name):
    return tiny.build(STUDENTS[name](), seed=1, spread=5)


def seeded(name):
    """A student, from where on every random number counts."""
    student = copy.deepcopy(built(name))
    random.seed(7)
    np.random.seed(7)
    torch.manual_seed(7)
    return student


def random_numbers():
    """What is drawn next from each global generator."""
    return [random.random(), np.random.rand(), torch.rand(()).item()]


def trained(student):
    """What an iteration of training computes, and what it leaves."""
    distiller = getattr(student, 'distillation', None)
    own = [p for n, p in student.named_parameters() if '.peers.' not in n]
    options = {k: v for k, v in SGD.items() if k != 'type'}
    wrapper = OptimWrapper(torch.optim.SGD(own, **options), clip_grad=CLIP)
    if distiller is not None and distiller.peers:
        cfg = dict(optimizer=SGD, clip_grad=CLIP)
        adapters = distiller.methods.parameters()
        add_to_optimizer(wrapper, distiller.peers, cfg, adapters)
    batch = tiny.batch_for(student, sizes=((64, 96), (96, 64)))
    losses = student(*batch, mode='loss')
    wrapper.backward(student.parse_losses(losses)[0])
    wrapper.step()
    named = of_student(dict(student.named_parameters()))
    return SimpleNamespace(
        losses=losses,
        gradients={k: p.grad for k, p in named.items()},
        weights=of_student(student.state_dict()),
        random=random_numbers(),
    )


def of_student(named):
    return {k: v for k, v in named.items() if 'distillation.' not in k}


@functools.cache
def stock(name):
    return trained(seeded(name))


def assert_stock(found, name, peers):
    expected = stock(name)
    beside = {k for k in found.losses if k.partition('.')[0] in peers}
    assert {k.partition('.')[0] for k in beside} == set(peers)
    own = {k: v for k, v in found.losses.items() if k not in beside}
    assert toy.same(own, expected.losses)
    assert toy.same(found.gradients, expected.gradients)
    assert toy.same(found.weights, expected.weights)
    assert found.random == expected.random


@pytest.mark.parametrize('name', STUDENTS)
@pytest.mark.parametrize('method', TABLE)
def test_weight_0_is_the_stock_step(method, name):
    fits, peers, _ = TABLE[method]
    if name not in fits:
        with pytest.raises(ConfigError, match=method):
            distilled(method, name, loss_weight=0.0)
        return
    student = distilled(method, name, loss_weight=0.0)
    assert_stock(trained(student), name, peers)
    # The same by a schedule that begins at 0.
    student = distilled(method, name)
    distiller = student.distillation
    assert distiller.active_methods()
    run = SimpleNamespace(distiller=distiller, iter=0, max_iters=9)
    WeightScheduleHook(warmup=4).before_train_iter(run, 0)
    assert_stock(trained(student), name, peers)


@pytest.mark.parametrize('name', STUDENTS)
def test_what_is_compared_can_differ(name):
    """Weights move, and random numbers are drawn where there are such."""
    run, before = stock(name), seeded(name).state_dict()
    moved = [k for k in before if not torch.equal(before[k], run.weights[k])]
    assert len(moved) > len(before) / 2
    drawn = run.random != random_numbers()
    assert drawn == (name in ('rcnn', 'detr'))
