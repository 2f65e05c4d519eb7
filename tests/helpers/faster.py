"""A tiny student and a trained tiny teacher, with options of the teacher."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.core.distiller import build_distiller
from tests.helpers import tiny_dense as dense
from tests.helpers import tiny_detectors as tiny


def trained(config, seed=7):
    """A detector in eval mode whose norms all do something of their own."""
    model = tiny.in_eval(dense.build(config, seed=seed))
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            for value, low, high in (
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
                (module.running_mean, -0.3, 0.3),
            ):
                nn.init.uniform_(value, low, high, generator=generator)
    return model


def saved(config, path, seed=7):
    """The description of a teacher with the weights of :func:`trained`."""
    file = path / f'teacher_{seed}.pth'
    torch.save({'state_dict': trained(config, seed).state_dict()}, file)
    dataset = dict(metainfo=dict(classes=tiny.CLASSES))
    source = dict(model=config, test_dataloader=dict(dataset=dataset))
    return dict(config=source, checkpoint=str(file))


def distiller_of(config, teacher, methods, **options):
    """A distiller around a student of the config, the same every time."""
    student = dense.build(config, seed=1)
    cfg = dict(teacher={**teacher, **options}, methods=methods)
    return build_distiller(cfg, student, tiny.CLASSES)


def losses_of(distiller, batch):
    """What distillation adds to a step."""
    distiller.attach()
    try:
        losses = tiny.seeded_loss(distiller.student, *batch)
    finally:
        distiller.detach()
    return {k: v.detach() for k, v in losses.items() if '.loss' in k}


def apart(ours, theirs):
    """The largest relative difference of two steps' distilled losses."""
    assert ours.keys() == theirs.keys()
    pairs = [(ours[name].item(), theirs[name].item()) for name in theirs]
    pairs = [pair for pair in pairs if pair != (0, 0)]  # nothing to teach
    assert len(pairs) >= 3
    return max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs)
