"""Steps of real detectors whose methods are balanced, without a runner."""

import copy
import logging
import uuid
from types import SimpleNamespace

import torch
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper

from mmkd.core.distiller import build_distiller
from mmkd.engine.hooks import GradientBalanceHook
from tests.helpers import tiny_detectors as tiny


class Steps:
    """A hook, a distiller, and the little of a runner that the hook needs."""

    def __init__(self, distiller, **options):
        self.distiller, self.student = distiller, distiller.student
        options = {'interval': 1, 'smoothing': 0.0, **options}
        self.hook = GradientBalanceHook(**options)
        self.warnings = []
        logger = logging.Logger('balance')
        logger.addFilter(lambda r: self.warnings.append(r.getMessage()))
        optimizer = torch.optim.SGD(self.student.parameters(), lr=0.1)
        self.runner = SimpleNamespace(
            distiller=distiller,
            iter=0,
            logger=logger,
            message_hub=MessageHub.get_instance(uuid.uuid4().hex),
            optim_wrapper=OptimWrapper(optimizer),
        )
        distiller.observers.append(self.see)
        self.hook.before_train(self.runner)
        distiller.attach()
        self.factors = distiller.balances
        self.expected = {}

    def see(self, task, distilled):
        """Compute the shares by a backward pass for each, in another way."""
        norms = {
            name: self.norm([sum(losses.values())])
            for name, losses in distilled.items()
            if losses
        }
        own = [
            part.sum()
            for name, loss in task.items()
            if 'loss' in name
            for part in (loss if isinstance(loss, list) else [loss])
        ]
        total = self.norm(own) + sum(norms.values())
        self.expected = {name: norm / total for name, norm in norms.items()}

    def norm(self, losses):
        if not losses:
            return 0.0
        squares = [
            g.double().square().sum()
            for g in torch.autograd.grad(
                sum(losses), self.maps, retain_graph=True, allow_unused=True
            )
            if g is not None
        ]
        return float(sum(squares)) ** 0.5

    def __call__(self, **batch):
        """Take a step; returns the shares that are logged in it."""
        logged = self.runner.message_hub.log_scalars
        logged.clear()
        self.hook.before_train_iter(self.runner, 0)
        neck = self.student.neck
        handle = neck.register_forward_hook(self.keep)
        try:
            tiny.seeded_loss(
                self.student, *tiny.batch_for(self.student, **batch)
            )
        finally:
            handle.remove()
        self.hook.after_train_iter(self.runner)
        self.runner.iter += 1
        return {
            name: logged[f'train/balance/{name}.share'].current()
            for name in self.factors
            if f'train/balance/{name}.share' in logged
        }

    def keep(self, _, __, output):
        self.maps = list(output)


def distilled(methods, model=None, teacher=None):
    model = tiny.retinanet() if model is None else model
    loader = dict(dataset=dict(metainfo=dict(classes=tiny.CLASSES)))
    source = dict(model=teacher or model, test_dataloader=loader)
    student = tiny.spread(tiny.build(model, seed=1, spread=5), 1)
    distiller = build_distiller(
        dict(
            teacher=dict(config=source, checkpoint=None),
            methods=copy.deepcopy(methods),
        ),
        student,
        tiny.CLASSES,
    )
    drawn = tiny.spread(tiny.build(model, seed=9, spread=5), 9)
    distiller.teacher.model.load_state_dict(tiny.in_eval(drawn).state_dict())
    return distiller
