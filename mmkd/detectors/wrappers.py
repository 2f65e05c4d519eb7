"""Models that are not a detector, but have one inside."""

from mmdet.models import BaseDetector
from torch import nn

from mmkd.errors import ConfigError

MOST = 3
"""How many of the detectors inside are named."""


def check_is_detector(model: nn.Module, who: str) -> None:
    """Refuse a wrapper, whose parts are not where methods look for them.

    Such are semi-supervised detectors (``SoftTeacher``), trackers, models for
    test-time augmentation, averages (EMA), wrappers for distributed training
    and ensembles. All of them have a whole detector as a part.

    Args:
        model: The network.
        who: What it is in the distillation, for the message.

    Raises:
        ConfigError: If a part of it is a detector.
    """
    inside = {
        name: type(part).__name__
        for name, part in model.named_modules()
        if name and isinstance(part, BaseDetector)
    }
    if inside:
        kind, first = type(model).__name__, next(iter(inside.values()))
        named = [f'{name}: {part}' for name, part in inside.items()]
        more = ', …' if len(named) > MOST else ''
        raise ConfigError(
            f'the {who} is {kind}, a wrapper of whole detectors '
            f'({", ".join(named[:MOST])}{more}). Distillation works on a '
            f'detector itself, such as {first}: make what {kind} wraps the '
            '`model` of a config of its own. The wrapper can then start from '
            'its weights.'
        )
