"""The weight of a method, also of one within another."""

import pytest
import torch

from mmkd.core.distiller import build_distiller
from mmkd.core.method import Method
from mmkd.registry import METHODS
from tests.helpers import tiny_detectors as tiny


@METHODS.register_module()
class Constant(Method):
    """A loss of 1, which hangs on the student."""

    student_paths = ('neck',)

    def forward(self, student, teacher, batch):
        return {'one': 1 + 0 * student.features('neck')[0].sum()}


@METHODS.register_module()
class Nested(Method):
    """Another method's loss, and one of its own."""

    student_paths = ('neck',)

    def __init__(self, *, inner=1.0, loss_weight=1.0):
        super().__init__(loss_weight=loss_weight)
        self.inner = Constant(loss_weight=inner)

    def forward(self, student, teacher, batch):
        own = torch.tensor(10.0)
        return {'own': own, **self.inner(student, teacher, batch)}


def losses_of(scale=1.0, **options):
    teacher = dict(config=dict(model=tiny.retinanet()), checkpoint=None)
    cfg = dict(teacher=teacher, methods=dict(m=dict(type='Nested', **options)))
    student = tiny.build(tiny.retinanet())
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    distiller.scales['m'] = scale
    losses = distiller.loss(*tiny.batch_for(student))
    return {k: v.item() for k, v in losses.items() if k.startswith('m.')}


@pytest.mark.parametrize(
    ('options', 'own', 'one'),
    [
        ({}, 10.0, 1.0),
        (dict(loss_weight=2.0), 20.0, 2.0),
        (dict(inner=3.0), 10.0, 3.0),
        (dict(loss_weight=2.0, inner=3.0, scale=0.5), 10.0, 3.0),
    ],
)
def test_every_weight_counts_once(options, own, one):
    assert losses_of(**options) == {'m.loss_own': own, 'm.loss_one': one}


def test_forward_is_the_bare_formula():
    method = Constant(loss_weight=5.0)

    class Student:
        @staticmethod
        def features(_):
            return (torch.ones(1),)

    assert method.forward(Student, None, None)['one'].item() == 1
    assert method(Student, None, None)['one'].item() == 5
    assert method(Student, None, None, 0.5)['one'].item() == 2.5


def test_what_methods_declare():
    """Every registered method says what it learns from, as data."""
    METHODS.import_from_location()
    for kind in METHODS.module_dict.values():
        if not kind.__module__.startswith('mmkd.'):
            continue
        assert kind.learns_from in ('teacher', 'peers')
        assert isinstance(kind.needs_labels, bool)
        assert kind.steers == (kind.steer is not Method.steer)
        assert (kind.learns_from == 'teacher') == bool(kind.needs)
