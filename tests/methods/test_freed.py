"""What a step has produced is freed with it, not some steps later.

What refers to itself waits for Python's garbage collector, which knows
nothing of how much memory tensors take: on a GPU the maps of former steps
would pile up.
"""

import gc
import weakref

import pytest

from mmkd.detectors.record import StepRecord, tensors_in
from mmkd.teachers.frozen import FrozenView
from tests.helpers import tiny_dense
from tests.helpers import tiny_detectors as tiny
from tests.helpers.together import Networks

DENSE = (
    *('KD', 'DKD', 'DIST', 'LD', 'CrossKD', 'FeatureHint', 'CWD', 'PKD'),
    *('FGD', 'MGD', 'FBKD', 'TaT'),
)
ASSIGNED = ('LabelAssignmentDistillation', 'SoLAD', 'SoftLabelDistillation')
DML = dict(type='mmkd.MutualLearning', box_weight=1.0)
MAPS = dict(DML, features=dict(type='mmkd.PKD'))
SEVERAL = dict(type='mmkd.OneTeacherSeveralStudents')


@pytest.fixture
def made(monkeypatch):
    """Weak references to all outputs that are made."""
    found = []
    for cls in (StepRecord, FrozenView):

        def init(self, *args, _original=cls.__init__, **kwargs):
            _original(self, *args, **kwargs)
            found.append(weakref.ref(self))

        monkeypatch.setattr(cls, '__init__', init)
    gc.collect()
    gc.disable()
    yield found
    gc.enable()


def check_freed(networks, made):
    batch = networks.batch()
    made.clear()
    losses = networks.losses(batch)
    assert len(made) > 1
    sum(v.sum() for v in tensors_in([*losses.values()])).backward()
    del losses
    assert [r() for r in made if r() is not None] == []


@pytest.mark.parametrize('method', DENSE)
def test_with_a_teacher(made, method):
    options = dict(layer=1) if method == 'CrossKD' else {}
    methods = {'m': dict(type=f'mmkd.{method}', **options)}
    check_freed(Networks(methods, tiny.gfl(), {}, tiny.gfl()), made)


def test_with_a_two_stage_teacher(made):
    methods = {'m': dict(type='mmkd.FasterRCNNDistillation')}
    config = tiny.faster_rcnn()
    check_freed(Networks(methods, config, {}, config), made)


@pytest.mark.parametrize('method', ASSIGNED)
def test_with_an_assignment(made, method):
    methods = {'m': dict(type=f'mmkd.{method}')}
    config = tiny_dense.paa()
    check_freed(Networks(methods, config, {}, config), made)


@pytest.mark.parametrize('config', [tiny.gfl(), tiny.faster_rcnn()])
@pytest.mark.parametrize('method', [DML, MAPS, SEVERAL])
def test_with_peers(made, config, method):
    teacher = config if method is SEVERAL else None
    networks = Networks({'m': method}, config, {'second': config}, teacher)
    check_freed(networks, made)


@pytest.mark.parametrize(
    ('method', 'peers', 'trained'),
    [
        (SEVERAL, 1, True),
        (dict(type='mmkd.DCM'), 1, False),
        (dict(type='mmkd.FFSD'), 2, False),
    ],
)
def test_with_added_parts(made, method, peers, trained):
    config = tiny.gfl()
    names = ('first', 'second')[:peers]
    networks = Networks(
        {'m': method},
        config,
        dict.fromkeys(names, config),
        trained=config if trained else None,
    )
    check_freed(networks, made)
