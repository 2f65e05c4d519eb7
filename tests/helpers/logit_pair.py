"""A student, a teacher and one method on what their heads predict."""

import contextlib

import torch

from mmkd.core.distiller import build_distiller
from tests.helpers import tiny_detectors as tiny
from tests.helpers.tiny_detectors import spread

SIZES = ((96, 128), (128, 96))
"""Two images that pad each other."""


class LogitPair:
    """One method between two tiny detectors with random weights."""

    def __init__(
        self,
        method,
        student,
        teacher=None,
        *,
        classes=tiny.CLASSES,
        teacher_classes=tiny.CLASSES,
        **options,
    ):
        self.student = spread(tiny.build(student, seed=1, spread=5), 1)
        config = dict(
            model=teacher or student,
            test_dataloader=dict(
                dataset=dict(metainfo=dict(classes=teacher_classes))
            ),
        )
        cfg = dict(
            teacher=dict(config=config, checkpoint=None),
            methods=dict(m=dict(type=f'mmkd.{method}', **options)),
        )
        self.distiller = build_distiller(cfg, self.student, classes, seed=0)
        self.method = self.distiller.methods['m']
        self.teacher = self.distiller.teacher.model
        # The running statistics of a batch: as if it had been trained.
        trained = tiny.build(teacher or student, seed=2, spread=5)
        self.teacher.load_state_dict(
            tiny.in_eval(spread(trained, 2)).state_dict()
        )

    def batch(self, **options):
        options = {'sizes': SIZES, **options}
        return tiny.batch_for(self.student, **options)

    def step(self, **options):
        """The losses of a distilled step on a batch."""
        self.inputs, self.samples = self.batch(**options)
        self.distiller.attach()
        try:
            return tiny.seeded_loss(self.student, self.inputs, self.samples)
        finally:
            self.distiller.detach()

    def losses(self, **options):
        """The method's losses alone, by the names that it gives them."""
        losses = self.step(**options)
        return {
            name.removeprefix('m.loss_'): loss
            for name, loss in losses.items()
            if name.startswith('m.')
        }

    def stock_losses(self):
        """Those of the same batch without distillation."""
        return tiny.seeded_loss(self.student, self.inputs, self.samples)

    def equal(self):
        """Give the student the teacher's weights and mode."""
        self.student.load_state_dict(self.teacher.state_dict())
        self.student.eval()


def rows(model, inputs, part=0, channels=3):
    """A dense head's maps as float64 rows, level by level.

    Returns:
        Per level (B, H * W * A, channels), computed anew.
    """
    with torch.no_grad():
        maps = model.bbox_head(model.extract_feat(inputs))[part]
    return [
        torch.stack(
            [
                image.permute(1, 2, 0).reshape(-1, channels)
                for image in level.double()
            ]
        )
        for level in maps
    ]


class Seen(list):
    """What the student's own classification loss was called with."""


@contextlib.contextmanager
def watching(loss):
    """Record the arguments of a loss module."""
    seen = Seen()
    handle = loss.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def seen_targets(pair):
    """Labels, weights and normaliser from the stock loss' own arguments.

    Returns:
        Labels (B, N) and weights (B, N), joined over the levels, and what
        the classification loss is divided by.
    """
    with watching(pair.student.bbox_head.loss_cls) as seen:
        pair.stock_losses()
    images = len(pair.samples)
    labels, weights = [], []
    for (_, target, *rest), kwargs in seen:
        label = target[0] if isinstance(target, tuple) else target
        weight = kwargs.get('weight', rest[0] if rest else None)
        if len(seen) == 1:  # FCOS: all levels at once
            sizes = [
                level.shape[1] for level in rows(pair.student, pair.inputs)
            ]
            parts = label.split([images * size for size in sizes])
            labels = [part.reshape(images, -1) for part in parts]
            weights = [torch.ones_like(part) for part in labels]
        else:
            labels.append(label.reshape(images, -1))
            weights.append(weight.reshape(images, -1))
    return (
        torch.cat(labels, 1),
        torch.cat(weights, 1),
        seen[0][1]['avg_factor'],
    )
