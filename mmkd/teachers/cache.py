"""A cache on disk of a teacher's outputs for images it has seen before."""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import mmcv
import mmdet
import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.data.batch import Batch
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.utils import check_options

from .disk_cache import DiskCache, fast_hash
from .frozen import FrozenDetector, FrozenView
from .probe import difference, probe
from .speed import changed, eagerly

SOURCES = (
    *('detectors/facts', 'detectors/heads/cop', 'detectors/passes'),
    *('detectors/record', 'detectors/source', 'teachers/cache'),
    *('teachers/fold_bn', 'teachers/frozen', 'teachers/renormalize'),
    *('teachers/speed', 'teachers/speed_up'),
)
"""The modules of mmkd that decide what a teacher's outputs are."""
TOLERANCE = 1e-3
"""A share of an output's largest value; rounding makes about 1e-5."""


class TeacherCache:
    """Keeps what a teacher has computed, by image and output.

    The key of an entry is a hash of everything that its value depends on:
    the pixels as the teacher gets them, padding included (and so whatever
    the pipeline has done to the image); the teacher's weights, config and
    options; the precision of the step and the device; the versions of
    PyTorch, MMCV and MMDetection; the text of mmkd's own modules that compute
    it (``SOURCES``); and which output it is. Entries are therefore never out
    of date, and nothing about the pipeline has to be declared.

    Args:
        teacher: The teacher with its weights and options, on its device.
        config: The config of its model.
        dir: The folder of the cache. Runs and processes may share it.
        max_gib: The limit of its size, in GiB.

    Raises:
        ConfigError: If an option is wrong, or if the teacher's outputs for
            an image depend on the other images of the batch.
    """

    def __init__(
        self,
        teacher: FrozenDetector,
        config: Mapping[str, Any],
        *,
        dir: str,
        max_gib: float = 10.0,
    ) -> None:
        _check_independent(teacher)
        versions = torch.__version__, mmcv.__version__, mmdet.__version__
        facts = (versions, teacher.speed, config)
        digest = fast_hash(_code())
        digest.update(repr(facts).encode())
        for name, value in teacher.model.state_dict().items():
            digest.update(f'{name} {value.dtype} {value.shape}'.encode())
            digest.update(_bytes(value))
        self._identity = digest.digest()
        self.disk = open_cache(dir, max_gib)

    def open_view(self, teacher: FrozenDetector, batch: Batch) -> 'CachedView':
        """Return the teacher's view of a batch, read through this cache."""
        return CachedView(teacher, batch, self)

    def key(self, image: Tensor, sample: DetDataSample) -> str:
        """Return the key of a padded image (3, H, W) of the teacher."""
        device = image.device.type
        half = torch.is_autocast_enabled(device)
        facts = (
            device,
            torch.cuda.get_device_name(image.device) if image.is_cuda else '',
            torch.get_autocast_dtype(device) if half else None,
            tensorfloat32(),
            image.dtype,
            tuple(image.shape),
            tuple(sample.img_shape),
        )
        digest = fast_hash(self._identity)
        digest.update(repr(facts).encode())
        digest.update(_bytes(image))
        return digest.hexdigest()


def check_cache_options(cfg: Any) -> dict[str, Any]:
    """Check and return the options of ``distillation.teacher.cache``.

    Raises:
        ConfigError: If one is missing, unknown or outside its range.
    """
    where = 'distillation.teacher.cache'
    if not isinstance(cfg, Mapping) or not isinstance(cfg.get('dir'), str):
        raise ConfigError(
            f'{where} must be a dict with the folder "dir" and, if needed, '
            f'"max_gib", got {cfg!r}. Example: dict(dir="work_dirs/cache", '
            'max_gib=20).'
        )
    check_options(where, cfg, ('dir', 'max_gib'))
    size = cfg.get('max_gib', 1)
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise ConfigError(f'{where}.max_gib must be a number, got {size!r}.')
    if not 0 < size < math.inf:
        raise ConfigError(
            f'{where}.max_gib must be above 0 and finite, got {size}.'
        )
    return dict(cfg)


def open_cache(dir: str, max_gib: float = 10.0) -> DiskCache:
    """Open the folder of a cache, or make it.

    Raises:
        ConfigError: If it cannot be written.
    """
    try:
        return DiskCache(dir, int(max_gib * 2**30))
    except OSError as error:
        raise ConfigError(
            f'distillation.teacher.cache.dir: {dir} cannot hold a cache '
            f'({error}). Give a folder that this process can write.'
        ) from error


def tensorfloat32() -> tuple[bool, ...]:
    """Return whether a GPU multiplies and convolves in TensorFloat-32."""
    backends: Any = torch.backends
    matmul, cudnn = backends.cuda.matmul, backends.cudnn
    if not hasattr(matmul, 'fp32_precision'):  # before PyTorch 2.9
        return matmul.allow_tf32, cudnn.allow_tf32
    parts = matmul, cudnn.conv
    return tuple(part.fp32_precision == 'tf32' for part in parts)


def _code() -> bytes:
    """Return the text of the modules in ``SOURCES``."""
    folder = Path(__file__).parents[1]
    return b''.join((folder / f'{s}.py').read_bytes() for s in SOURCES)


def _bytes(value: Tensor) -> Any:
    flat = value.detach().cpu().contiguous().flatten()
    return flat.view(torch.uint8).numpy()


def _check_independent(teacher: FrozenDetector) -> None:
    """Check that an image's outputs are the same in any batch."""
    with eagerly(teacher.speed):
        both = probe(teacher, (0, 1))
        first, second = probe(teacher, (0,)), probe(teacher, (1,))
    joined = {
        part: [
            torch.cat(torch.atleast_1d(a, b))
            for a, b in zip(first[part], second.get(part, ()), strict=False)
        ]
        for part in first
    }
    worst, where = difference(joined, both)
    if worst > TOLERANCE:
        raise ConfigError(
            f'distillation.teacher.cache: what {type(teacher.model).__name__} '
            'computes for an image is not the same in another batch: '
            f'{where} differs by {worst:.2g} of its largest value. Remove the '
            'cache.'
        )


class CachedView(FrozenView):
    """The view of a batch of which the cache may know parts.

    Images that the cache does not know are computed together and kept. RoI
    heads always run, on the cached feature maps, because the student's RoIs
    are new in every step.
    """

    def __init__(
        self, teacher: FrozenDetector, batch: Batch, entries: TeacherCache
    ) -> None:
        super().__init__(teacher, batch)
        self._teacher, self._entries = teacher, entries
        self._live: dict[tuple[int, ...], FrozenView] = {}
        self._features: dict[str, tuple[Tensor, ...]] = {}
        self.asked = self.hits = 0
        """How many outputs of single images were looked up, and found."""

    @functools.cached_property
    def maps(self) -> tuple[Tensor, ...]:
        return self._known('maps', lambda live: live.maps)

    @functools.cached_property
    def rpn(self) -> tuple[list[Tensor], list[Tensor]]:
        return self._known('rpn', lambda live: live.rpn)

    @functools.cached_property
    def raw_dense(self) -> Any:
        return self._known('dense', lambda live: live.raw_dense)

    def statistics(self) -> dict[str, float]:
        """Return the share of what was looked up in the cache that it knew."""
        if not self.asked:
            return {}
        return {'cache_hits': self.hits / self.asked}

    def features(
        self, path: str, student: StepRecord, student_path: str | None = None
    ) -> tuple[Tensor, ...]:
        if path.partition('.')[0] == 'roi_head':
            return super().features(path, student, student_path)
        if path not in self._features:
            self._features[path] = self._known(
                f'features {path}', lambda live: live.features(path, student)
            )
        return self._features[path]

    @functools.cached_property
    def _keys(self) -> list[str]:
        images = self._renormalize(
            self._batch.inputs, self._batch.data_samples
        )
        return [
            self._entries.key(image, sample)
            for image, sample in zip(
                images, self._batch.data_samples, strict=True
            )
        ]

    def _known(self, part: str, read: Callable[[FrozenView], Any]) -> Any:
        """Return a part of the outputs, from the cache where it knows them."""
        disk = self._entries.disk
        keys = [f'{key} {part}' for key in self._keys]
        images = [disk.read(key) for key in keys]
        missing = [i for i, image in enumerate(images) if image is None]
        self.asked += len(images)
        self.hits += len(images) - len(missing)
        if missing:
            fresh = read(self._computed(tuple(missing)))
            for row, i in enumerate(missing):
                images[i] = changed(fresh, functools.partial(_image, row))
                disk.write(keys[i], images[i])
            if len(missing) == len(images):
                return fresh
        return _joined(images, self._batch.inputs.device)

    def _computed(self, images: tuple[int, ...]) -> FrozenView:
        if images not in self._live:
            batch = self._batch
            index = torch.tensor(images, device=batch.inputs.device)
            chosen = [batch.data_samples[i] for i in images]
            part = Batch(batch.inputs[index], chosen)
            self._live[images] = FrozenView(self._teacher, part)
        return self._live[images]


def _image(row: int, batch: Tensor) -> Tensor:
    # A clone, because the whole batch would be written for a mere slice.
    return batch[row].detach().cpu().clone()


def _joined(images: Sequence[Any], device: torch.device) -> Any:
    """Join nested outputs of single images into those of a batch."""
    first = images[0]
    if isinstance(first, Tensor):
        return torch.stack(list(images)).to(device)
    if isinstance(first, Mapping):
        return {k: _joined([i[k] for i in images], device) for k in first}
    if isinstance(first, list | tuple):
        parts = zip(*images, strict=True)
        return type(first)(_joined(part, device) for part in parts)
    return first
