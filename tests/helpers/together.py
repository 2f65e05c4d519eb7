"""Tiny detectors that train together, and one method among them."""

import copy

import torch

from mmkd.core.distiller import build_distiller
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import SIZES, spread

WIDE = dict(
    backbone=dict(tiny.BACKBONE, base_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
)


def wide(config):
    """The same with a backbone of twice the width."""
    return tiny.merged(config, **WIDE)


class Networks:
    """A student, its peers, maybe a teacher, and methods among them.

    Args:
        methods: Their configs by name.
        student: Config of its model.
        peers: Configs of their models by name.
        teacher: Config of a frozen one.
        trained: Config of a teacher that trains with them.
    """

    def __init__(
        self, methods, student, peers, teacher=None, twins=False, trained=None
    ):
        self.student = spread(tiny.build(student, seed=1, spread=5), 1)
        cfg = dict(
            peers={
                name: dict(config=dict(model=model))
                for name, model in peers.items()
            },
            methods=methods,
        )
        if teacher is not None:
            source = dict(
                model=teacher,
                test_dataloader=dict(
                    dataset=dict(metainfo=dict(classes=tiny.CLASSES))
                ),
            )
            cfg['teacher'] = dict(config=source, checkpoint=None)
        if trained is not None:
            model = dict(model=trained)
            cfg['teacher'] = dict(config=model, trainable=True)
            peers = {**peers, 'teacher': trained}
        self.distiller = build_distiller(cfg, self.student, tiny.CLASSES)
        self.peers = {n: p.model for n, p in self.distiller.peers.items()}
        for seed, (name, model) in enumerate(self.peers.items(), 2):
            seed = 1 if twins else seed
            drawn = spread(tiny.build(peers[name], seed=seed, spread=5), seed)
            model.load_state_dict(drawn.state_dict())
        if teacher is not None:
            self.teacher = self.distiller.teacher.model
            drawn = spread(tiny.build(teacher, seed=9, spread=5), 9)
            self.teacher.load_state_dict(tiny.in_eval(drawn).state_dict())

    @property
    def all(self):
        return {'student': self.student, **self.peers}

    def batch(self, **options):
        options = {'sizes': SIZES, **options}
        return tiny.batch_for(self.student, **options)

    def losses(self, batch):
        """All losses of a step."""
        self.distiller.attach()
        try:
            return tiny.seeded_loss(self.student, *batch)
        finally:
            self.distiller.detach()

    def of_method(self, batch, name='m'):
        """The method's alone, by the names that it gives them."""
        prefix = f'{name}.loss_'
        return {
            key.removeprefix(prefix): loss
            for key, loss in self.losses(batch).items()
            if key.startswith(prefix)
        }

    def gets_gradient(self, loss):
        """The networks of which some weight has a gradient from a loss."""
        found = set()
        for name, model in self.all.items():
            grads = torch.autograd.grad(
                loss,
                [p for p in model.parameters() if p.requires_grad],
                retain_graph=True,
                allow_unused=True,
            )
            if any(g is not None and g.abs().sum() > 0 for g in grads):
                found.add(name)
        return found


def stock_losses(networks, batch):
    """Each network's stock losses of training alone."""
    return {
        name: {
            key: copy.deepcopy(value)
            for key, value in tiny.seeded_loss(model, *batch).items()
        }
        for name, model in networks.all.items()
    }
