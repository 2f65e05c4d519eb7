"""A tiny student that several tiny teachers teach."""

import copy

import torch

from mmkd.core.distiller import build_distiller
from tests.helpers import tiny_detectors as tiny

CLASSES = ('cat', 'dog', 'cow', 'yak', 'bus', 'car')
PETS, CARS = ('dog', 'yak', 'cat'), ('cow', 'car', 'bus')
"""Disjoint; together the student's."""
SIZES = ((96, 128), (128, 96))
"""Two images that pad each other."""
PREDICTING = ('rpn_cls', 'rpn_reg', 'fc_cls', 'fc_reg')


def described(model, classes, **options):
    """The description of an untrained teacher of these classes."""
    loader = dict(dataset=dict(metainfo=dict(classes=classes)))
    config = dict(model=sized(model, classes), test_dataloader=loader)
    return dict(config=config, checkpoint=None, **options)


def sized(model, classes):
    """A model's config for so many classes."""
    model = copy.deepcopy(model)
    head = model.get('bbox_head') or model.roi_head.bbox_head
    for each in head if isinstance(head, list) else [head]:
        each.num_classes = len(classes)
    return model


class Taught:
    """A student, its teachers and methods.

    Teachers whose predictions differ from place to place, each other's too;
    ``seed`` moves all of their weights.
    """

    def __init__(self, student, teacher, methods, classes=CLASSES, seed=0):
        self.student = student
        cfg = dict(teacher=teacher, methods=methods)
        self.distiller = build_distiller(cfg, student, classes)
        for number, network in enumerate(self.networks.values(), 1):
            trained = spread_like(network, seed + 10 * number)
            network.load_state_dict(trained.state_dict())

    @property
    def networks(self):
        return {n: t.model for n, t in self.distiller.networks.items()}

    def losses(self, **options):
        """All losses of a step: the student's own and distillation's."""
        options = {
            'sizes': SIZES,
            'objects': 4,
            'classes': len(CLASSES),
            **options,
        }
        self.inputs, self.samples = tiny.batch_for(self.student, **options)
        self.distiller.attach()
        try:
            return tiny.seeded_loss(self.student, self.inputs, self.samples)
        finally:
            self.distiller.detach()

    def stock_losses(self):
        """Those of the same batch without distillation."""
        return tiny.seeded_loss(self.student, self.inputs, self.samples)


def rows(model, inputs, part=0, columns=6):
    """A dense head's maps anew, (B, N, columns): level, row, column, prior."""
    maps = model.bbox_head(model.extract_feat(inputs))[part]
    return torch.cat(
        [
            level.permute(0, 2, 3, 1).reshape(len(level), -1, columns)
            for level in maps
        ],
        1,
    )


def stock_weights(taught):
    """What RetinaNet's own loss weighs priors with, 0 in the padding.

    Returns:
        (B, N), and what that loss is divided by.
    """
    seen = []
    handle = taught.student.bbox_head.loss_cls.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args, kwargs)), with_kwargs=True
    )
    taught.stock_losses()
    handle.remove()
    weights = [args[2].reshape(len(SIZES), -1) for args, _ in seen]
    strides = taught.student.bbox_head.prior_generator.strides
    maps = taught.student.extract_feat(taught.inputs)
    inside = []
    for sample in taught.samples:
        height, width = sample.img_shape
        inside.append([])
        for level, (stride, _) in zip(maps, strides, strict=True):
            for y in range(level.shape[2]):
                for x in range(level.shape[3]):
                    within = y * stride < height and x * stride < width
                    inside[-1] += [within] * 9
    weights = torch.cat(weights, 1) * torch.tensor(inside)
    return weights, float(seen[0][1]['avg_factor'])


def student_of(model, classes=CLASSES):
    return tiny.spread(tiny.build(sized(model, classes), seed=1, spread=5), 1)


def spread_like(network, seed):
    """A copy with other weights, and statistics as if it were trained."""
    other = copy.deepcopy(network)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in other.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.mul_(1 + 0.3 * noise)
        if name.split('.')[-2] in PREDICTING:
            parameter.copy_(0.5 * noise)
    return tiny.in_eval(tiny.spread(other, seed))
