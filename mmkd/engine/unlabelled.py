"""Set up the images without labels that a config describes."""

import logging
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from mmengine.logging import print_log

from mmkd.core.unlabelled import check_options_of
from mmkd.data.datasets import wrapped
from mmkd.data.errors import some
from mmkd.data.unlabelled.blank import BlankImages
from mmkd.data.unlabelled.leakage import leaked
from mmkd.data.unlabelled.sources import find_images
from mmkd.data.unlabelled.stream import UnlabelledStream
from mmkd.data.unlabelled.views import STRONG, UnlabelledImages, default_weak
from mmkd.detectors.source import class_names
from mmkd.errors import ConfigError
from mmkd.teachers.geometry import record_moves

WHERE = 'distillation.unlabelled'


def open_stream(cfg: Config, seed: int) -> UnlabelledStream | None:
    """Return the batches of ``distillation.unlabelled``; None without it.

    Its ``batch_size``, ``num_workers`` and ``weak`` are taken from the
    student's training where they are missing: the numbers from
    ``train_dataloader``, the weak view from resize and flip of its pipeline.

    Args:
        cfg: The config of the run.
        seed: The seed of the run.

    Raises:
        ConfigError: If a number is out of range, or a transform unknown.
        DataError: If there are no images.
    """
    options = (cfg.get('distillation') or {}).get('unlabelled')
    if options is None:
        return None
    check_options_of(options)
    if not options.get('weight', 1.0):
        return None
    loader = cfg.get('train_dataloader') or {}
    size = options.get('batch_size', loader.get('batch_size', 1))
    workers = options.get('num_workers', loader.get('num_workers', 0))
    for name, value, least in (
        ('batch_size', size, 1),
        ('num_workers', workers, 0),
    ):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if not whole or value < least:
            raise ConfigError(
                f'{WHERE}.{name} must be a whole number of at least {least}, '
                f'got {value!r}.'
            )
    weak = options.get('weak')
    if weak is None:
        test = _steps((cfg.get('test_dataloader') or {}).get('dataset'))
        weak = default_weak([*_steps(loader.get('dataset'))], [*test])
    dataset = UnlabelledImages(
        find_images(options['dataset']),
        weak,
        options.get('strong', STRONG),
        seed,
    )
    for view in ('weak', 'strong'):
        record_moves(getattr(dataset, view), f'{WHERE}.{view}')
    stream = UnlabelledStream(
        dataset, size, workers, get_rank(), get_world_size()
    )
    print_log(_described(stream), 'current')
    return stream


def blank_loader(cfg: Config, stream: UnlabelledStream) -> dict[str, Any]:
    """Return what takes the place of ``train_dataloader`` without labels.

    Args:
        cfg: The config of the run.
        stream: The unlabelled images.
    """
    images = BlankImages(len(stream.dataset), class_names({}, cfg))
    return dict(
        batch_size=stream.batch_size,
        num_workers=0,
        sampler=dict(type='DefaultSampler', shuffle=False),
        dataset=images,
    )


def say_leaks(stream: UnlabelledStream, dataset: Any) -> None:
    """Warn of unlabelled images that also stand in the validation set.

    Args:
        stream: The unlabelled images.
        dataset: The built data set of the validation.
    """
    found = leaked(stream.dataset.images, dataset)
    if found:
        pairs = some(a if a == b else f'{a} (is {b})' for a, b in found)
        print_log(
            f'{WHERE}.dataset: {len(found)} of its {len(stream.dataset)} '
            f'images also stand in the validation set: {pairs}. The student '
            'learns from them, so what it scores there is too good. Take '
            'them out of the unlabelled images.',
            'current',
            logging.WARNING,
        )


def _described(stream: UnlabelledStream) -> str:
    """Describe in a line of the log what the images are."""
    data = stream.dataset
    weak, strong = (
        [type(step).__name__ for step in each.transforms] if each else []
        for each in (data.weak, data.strong)
    )
    return (
        f'Unlabelled images: {len(data)}, {stream.batch_size} in a batch of '
        f'each process; the teacher sees them after '
        f'{", ".join(weak) or "no change"}; the student after '
        f'{", ".join(strong) or "no change"} in addition'
    )


def _steps(dataset: Any) -> Iterator[Any]:
    """Yield the steps of all pipelines of a data set, the inner ones first."""
    if not dataset:
        return
    for inner in wrapped(dataset)[:1]:
        yield from _steps(inner)
    yield from dataset.get('pipeline') or ()
    if dataset.get('type') == 'MultiImageMixDataset':
        yield dict(type='MultiImageMixDataset')
