"""Steps, epochs and random numbers are explicit: no runner is asked."""

import torch

from mmkd.core.distiller import build_distiller
from mmkd.core.method import Method
from mmkd.registry import METHODS
from tests.helpers import tiny_detectors as tiny


@METHODS.register_module()
class SeesBatches(Method):
    """Notes what it is told of time."""

    def forward(self, student, teacher, batch):
        self.seen = (batch.step, batch.epoch, batch.unlabelled)
        return {}


def with_peer(**methods):
    model = tiny.faster_rcnn()
    peers = dict(second=dict(config=dict(model=model)))
    cfg = dict(peers=peers, methods=methods or {})
    return build_distiller(cfg, tiny.build(model), tiny.CLASSES, seed=3)


def peer_losses(distiller, batch):
    distiller.attach()
    try:
        losses = tiny.seeded_loss(distiller.student, *batch)
    finally:
        distiller.detach()
    return [
        value.item()
        for name, found in losses.items()
        if name.startswith('second.loss')
        for value in (found if isinstance(found, list) else [found])
    ]


def test_a_peer_draws_other_numbers_in_every_step():
    """Its samplers choose other boxes, whatever the global state is."""
    distiller = with_peer()
    batch = tiny.batch_for(distiller.student, objects=6)
    first, second = (peer_losses(distiller, batch) for _ in range(2))
    assert first != second
    distiller.steps = 0  # as a resumed run sets it
    assert peer_losses(distiller, batch) == first
    assert peer_losses(distiller, batch) == second


def test_its_numbers_are_those_of_the_seed():
    batch = tiny.batch_for(with_peer().student, objects=6)
    found = [peer_losses(with_peer(), batch) for _ in range(2)]
    assert found[0] == found[1]


def test_steps_and_epochs():
    teacher = dict(config=dict(model=tiny.retinanet()), checkpoint=None)
    cfg = dict(teacher=teacher, methods=dict(m=dict(type='SeesBatches')))
    student = tiny.build(tiny.retinanet())
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    method, seen = distiller.methods['m'], []
    batch = tiny.batch_for(student)
    for length in (None, 2, 2, 2):
        distiller.epoch_length = length
        with torch.no_grad():
            distiller.loss(*batch)
        seen.append(method.seen)
    assert seen == [(0, 0, None), (1, 0, None), (2, 1, None), (3, 1, None)]
