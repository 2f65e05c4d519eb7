"""A teacher that is replaced between rounds of training."""

import pytest
import torch

from mmkd.core.distiller import build_distiller
from mmkd.data.batch import Batch
from mmkd.errors import CheckpointError, ConfigError
from mmkd.teachers.build import build_teacher
from mmkd.teachers.view import TeacherContext
from tests.helpers import faster
from tests.helpers import tiny_detectors as tiny

METHODS = dict(pkd=dict(type='mmkd.PKD'), kd=dict(type='mmkd.KD'))


def distiller_of(path, seed, **options):
    teacher = faster.saved(tiny.retinanet(), path, seed)
    student = tiny.build(tiny.retinanet(), seed=1)
    cfg = dict(teacher={**teacher, **options}, methods=METHODS)
    return build_distiller(cfg, student, tiny.CLASSES)


@pytest.mark.parametrize(
    'options',
    [
        {},
        dict(fold_bn=True),
        dict(channels_last=True, autocast='bfloat16'),
        dict(fold_bn=True, cache=True),
    ],
)
def test_it_teaches_as_if_built_with_the_new_weights(tmp_path, options):
    if 'cache' in options:
        options = {**options, 'cache': dict(dir=str(tmp_path / 'cache'))}
    first = distiller_of(tmp_path, 7, **options)
    batch = tiny.batch_for(first.student)
    before = faster.losses_of(first, batch)
    new = faster.trained(tiny.retinanet(), 8)
    first.set_teacher(new.state_dict())
    second = distiller_of(tmp_path, 8, **options)
    expected = faster.losses_of(second, batch)
    found = faster.losses_of(first, batch)
    assert found.keys() == expected.keys() == before.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name])
        assert not torch.equal(found[name], before[name])
    teacher = first.teacher.model
    assert not any(module.training for module in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())


def test_entries_of_other_weights_are_not_read(tmp_path):
    """The identity of the cache changes with the weights."""
    distiller = distiller_of(tmp_path, 7, cache=dict(dir=str(tmp_path / 'c')))
    batch = Batch(*tiny.batch_for(distiller.student))
    shares = []
    for weights in (None, None, 8):
        if weights is not None:
            new = faster.trained(tiny.retinanet(), weights)
            distiller.set_teacher(new.state_dict())
        view = distiller.teacher.view(batch)
        assert len(view.maps)
        shares.append(view.statistics()['cache_hits'])
    assert shares == [0.0, 1.0, 0.0]


def test_weights_that_do_not_fit(tmp_path):
    distiller = distiller_of(tmp_path, 7)
    weights = distiller.teacher.model.state_dict()
    kept = {k: v.clone() for k, v in weights.items()}
    other = tiny.build(tiny.gfl()).state_dict()
    with pytest.raises(CheckpointError, match=r'the new weights .* missing'):
        distiller.set_teacher(other)
    for name, value in distiller.teacher.model.state_dict().items():
        assert torch.equal(value, kept[name])


def test_another_teacher_altogether(tmp_path):
    distiller = distiller_of(tmp_path, 7)
    described = faster.saved(tiny.retinanet(), tmp_path, 8)
    context = TeacherContext(distiller.student, tiny.CLASSES, ('neck',))
    distiller.set_teacher(build_teacher(described, context))
    batch = tiny.batch_for(distiller.student)
    expected = faster.losses_of(distiller_of(tmp_path, 8), batch)
    found = faster.losses_of(distiller, batch)
    assert all(torch.equal(found[k], expected[k]) for k in expected)


def test_without_a_teacher():
    peers = dict(second=dict(config=dict(model=tiny.retinanet())))
    student = tiny.build(tiny.retinanet())
    cfg = dict(peers=peers, methods=dict(dml=dict(type='mmkd.DML')))
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    with pytest.raises(ConfigError, match='NoTeacher has no weights'):
        distiller.set_teacher(student.state_dict())
