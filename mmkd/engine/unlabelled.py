"""Set up the images without labels that a config describes."""

from collections.abc import Iterator, Mapping
from typing import Any

from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size

from mmkd.data.datasets import wrapped
from mmkd.data.unlabelled.sources import find_images
from mmkd.data.unlabelled.stream import UnlabelledStream
from mmkd.data.unlabelled.views import STRONG, UnlabelledImages, default_weak
from mmkd.errors import ConfigError

WHERE = 'distillation.unlabelled'


def open_stream(
    options: Mapping[str, Any], cfg: Config, seed: int
) -> UnlabelledStream:
    """Return the batches of ``distillation.unlabelled``.

    Args:
        options: Its ``dataset``, ``batch_size``, ``num_workers``, ``weak``
            and ``strong``. Those that are missing are taken from the
            student's training: the numbers from ``train_dataloader``, the
            weak view from resize and flip of its pipeline.
        cfg: The config of the run.
        seed: The seed of the run.

    Raises:
        ConfigError: If a number is out of range, or a transform unknown.
        DataError: If there are no images.
    """
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
    return UnlabelledStream(
        dataset, size, workers, get_rank(), get_world_size()
    )


def described(stream: UnlabelledStream) -> str:
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
