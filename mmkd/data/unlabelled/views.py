"""The weak and the strong view of each image without labels."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.registry import TRANSFORMS
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import HorizontalBoxes
from mmengine.logging import print_log
from mmengine.registry import DefaultScope
from torch.utils.data import Dataset

from mmkd.errors import ConfigError, DataError, PictureError
from mmkd.utils import isolated_random_state

from .sources import Images

WHERE = 'distillation.unlabelled'
COLOURS = [
    [dict(type=name)]
    for name in (
        *('AutoContrast', 'Brightness', 'Color', 'ColorTransform'),
        *('Contrast', 'Equalize', 'Posterize', 'Sharpness', 'Solarize'),
    )
]
STRONG = (dict(type='RandAugment', aug_space=COLOURS, aug_num=1),)
"""What the student's view has in addition, unless the config says otherwise:
one of SoftTeacher's changes of colours, which leave every pixel in place."""
RESIZES = (
    *('Resize', 'RandomResize', 'RandomChoiceResize', 'FixShapeResize'),
    'FixScaleResize',
)
FLIPS = ('RandomFlip',)
MIXES = (
    *('Mosaic', 'MixUp', 'CachedMosaic', 'CachedMixUp', 'CopyPaste'),
    'MultiImageMixDataset',
)
"""What joins several images; the resizes beside it are made for that."""
META = (
    *('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'),
    *('flip', 'flip_direction', 'homography_matrix'),
)
TRIES = 100
"""As many images in a row may be unreadable."""


class UnlabelledImages(Dataset):
    """Two views of each image: one for the teacher, one for the student.

    The weak view is resized and flipped. The strong view is the weak one with
    further changes. What belongs to a position of the endless stream is a
    function of the seed and the position alone: the image (each pass over
    them has an order of its own) and all random numbers of its views. Global
    random states stay as they are.

    Args:
        images: The images.
        weak: The transforms of the weak view, after the image was read.
            ``Pad`` is applied to both views at their ends.
        strong: The transforms of the strong view, after the weak ones. If
            empty, both views are the same.
        seed: The seed of the stream.

    Raises:
        ConfigError: If a transform is unknown or joins several images.
    """

    def __init__(
        self,
        images: Images,
        weak: Sequence[Mapping[str, Any]],
        strong: Sequence[Mapping[str, Any]] = STRONG,
        seed: int = 0,
    ) -> None:
        self.images, self.seed = images, seed
        pads = [step for step in weak if step.get('type') == 'Pad']
        geometry = [step for step in weak if step not in pads]
        self.weak = _composed(geometry, 'weak')
        self.strong = _composed(strong, 'strong') if strong else None
        self.pad = _composed(pads, 'weak')
        self.meta_keys = META
        """What the data samples say; a teacher may ask for more."""
        self._order: tuple[int, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Return what an image is called, as a data set of MMDetection does.

        A frame of a video is no file: its ``img_path`` names it.
        """
        return dict(img_path=self.images.name(index), img_id=index)

    @property
    def pipeline(self) -> tuple[Compose, Compose]:
        """The transforms of the view that the teacher sees."""
        return self.weak, self.pad

    def __getitem__(self, position: int) -> dict[str, Any]:
        """Return the views at a position of the endless stream.

        Returns:
            ``weak`` and, where it differs, ``strong``, each with ``inputs``
            (3, H, W), uint8, and ``data_samples``; and the names of the
            images that could not be read, which are ``skipped``.

        Raises:
            DataError: If no image can be read.
        """
        image, index, skipped = self._read(position)
        name = self.images.name(index)
        results = dict(
            img=image,
            img_id=index,
            img_path=name,
            img_shape=image.shape[:2],
            ori_shape=image.shape[:2],
            # Some transforms ask for them, RandomAffine for one.
            gt_bboxes=HorizontalBoxes(torch.zeros(0, 4)),
            gt_bboxes_labels=np.zeros(0, np.int64),
            gt_ignore_flags=np.zeros(0, bool),
        )
        with isolated_random_state(_mixed(self.seed, position)):
            weak = self._applied(self.weak, results)
            views = {'weak': weak}
            if self.strong is not None:
                own = {**weak, 'img': weak['img'].copy()}
                views['strong'] = self._applied(self.strong, own)
            packed = {
                key: self._packed(self._applied(self.pad, view))
                for key, view in views.items()
            }
        return {**packed, 'skipped': skipped}

    def _read(self, position: int) -> tuple[np.ndarray, int, list[str]]:
        """Return the image at a position, or the next that can be read."""
        skipped: list[str] = []
        last: Exception | None = None
        for following in range(min(TRIES, len(self))):
            index = self._index(position + following)
            try:
                return self.images.read(index), index, skipped
            except PictureError as error:
                skipped.append(self.images.name(index))
                last = error
        raise DataError(
            f'{WHERE}.dataset: {len(skipped)} images in a row cannot be read, '
            f'the last one: {last} Check the images.'
        ) from last

    def _index(self, position: int) -> int:
        """Return which image is at a position, in the order of its pass."""
        number, place = divmod(position, len(self))
        if self._order is None or self._order[0] != number:
            generator = np.random.default_rng([self.seed, number])
            self._order = number, generator.permutation(len(self))
        return int(self._order[1][place])

    def _packed(self, results: dict[str, Any]) -> dict[str, Any]:
        image = results['img']
        if image.ndim < 3:
            image = image[..., None]
        image = np.ascontiguousarray(image.transpose(2, 0, 1))
        meta = {key: results[key] for key in self.meta_keys if key in results}
        meta.setdefault('scale_factor', (1.0, 1.0))
        return dict(
            inputs=torch.from_numpy(image),
            data_samples=DetDataSample(metainfo=meta),
        )

    def _applied(self, steps: Compose, results: dict[str, Any]) -> Any:
        found = steps(results)
        if found is None:
            raise ConfigError(
                f'{WHERE}: a transform has refused '
                f'{results["img_path"]} and given nothing. Take transforms '
                'that keep every image.'
            )
        return found


def _composed(steps: Sequence[Mapping[str, Any]], view: str) -> Compose:
    for step in steps:
        if not isinstance(step, Mapping) or 'type' not in step:
            raise ConfigError(
                f'{WHERE}.{view} must be a list of transforms, such as '
                f"[dict(type='RandomFlip', prob=0.5)]; got {step!r} in it."
            )
        if step['type'] in MIXES:
            raise ConfigError(
                f'{WHERE}.{view}: {step["type"]} joins several images, which '
                'have no common teacher view. Leave it out.'
            )
    with DefaultScope.overwrite_default_scope('mmdet'):
        try:
            return Compose([TRANSFORMS.build(dict(step)) for step in steps])
        except (KeyError, TypeError) as error:
            raise ConfigError(f'{WHERE}.{view}: {error}') from error


def _mixed(seed: int, position: int) -> int:
    """Return a seed of 32 bits for a position."""
    state = np.random.SeedSequence([seed, position]).generate_state(1)
    return int(state[0])


def default_weak(
    training: Sequence[Any], test: Sequence[Any]
) -> list[dict[str, Any]]:
    """Return resize, flip and padding of a student's own pipeline.

    Where its training joins several images (Mosaic, MixUp), whose resizes
    are made for that, the resize is that of its test. Of a choice among
    transforms, the first is taken.

    Args:
        training: The steps of its training pipeline, and of what wraps it.
        test: The steps of its test pipeline.
    """
    steps = list(_flat(training))
    mixes = any(step.get('type') in MIXES for step in steps)
    resizes = _of(steps, RESIZES)
    if mixes or not resizes:
        resizes = _of(_flat(test), RESIZES)
    if not resizes:
        print_log(
            f'{WHERE}: neither the training nor the test pipeline of the '
            'student resizes its images, so they are not resized. Set '
            f'{WHERE}.weak to change that.',
            'current',
            logging.WARNING,
        )
    pads = [] if mixes else _of(steps, ('Pad',))
    return [*resizes[:1], *_of(steps, FLIPS)[:1], *pads[:1]]


def _flat(steps: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield single steps; of a choice, those of its first branch."""
    for step in steps:
        inner = step.get('transforms')
        if step.get('type') == 'RandomChoice' and inner:
            first = inner[0]
            yield from _flat(first if isinstance(first, list) else [first])
        elif inner:
            yield from _flat(inner)
        else:
            yield step


def _of(steps: Any, kinds: Sequence[str]) -> list[dict[str, Any]]:
    return [dict(step) for step in steps if step.get('type') in kinds]
