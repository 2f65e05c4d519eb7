"""The base of all methods that compare feature maps."""

import math
from collections.abc import Sequence

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.core.method import Method
from mmkd.detectors.adapters import (
    build_adapter,
    check_levels,
    check_sizes,
    resize_to,
)
from mmkd.detectors.facts import DetectorFacts
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.losses.maps import OUTSIDE, full_weights
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.view import FEATURES, TeacherView


class FeatureMethod(Method):
    """A method that compares features of paired levels.

    A subclass implements :meth:`forward` with the help of :meth:`pairs`, and
    :meth:`build_layers` if it trains more than the adapters. Student maps of
    another size are resized (bilinear), never cropped. Features have no
    classes. A dense head's class scores are therefore compared only where
    both networks have the same classes in the same order, or with
    ``adapt=True``.

    Args:
        source: Module path in the student: ``'neck'`` (in detectors without
            one, the backbone), ``'backbone'``, or any other module whose
            output is a map (B, C, H, W) of every image, a tensor per level.
        teacher_source: Module path in the teacher; the same by default.
        levels: The student's levels to use, counted from 0; all by default.
        teacher_levels: The teacher's levels to pair with them; the same
            numbers by default.
        adapt: Whether a 1x1 convolution leads from the student's to the
            teacher's width: True for every level, None where the widths
            differ, False for none.
        resize: Allow sizes that differ by a factor, not only by rounding.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If the features cannot be compared.
        TapError: If a source never produced anything.
    """

    needs = (FEATURES,)
    needs_labels = False

    images_only = True
    """Whether features must be maps of whole images, with known padding."""

    adaptable = True
    """Whether ``adapt`` is an option. If not, its own layers adapt."""

    def __init__(
        self,
        *,
        source: str = 'neck',
        teacher_source: str | None = None,
        levels: Sequence[int] | None = None,
        teacher_levels: Sequence[int] | None = None,
        adapt: bool | None = None,
        resize: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        if not self.adaptable and adapt is not None:
            raise ConfigError(
                f'{type(self).__name__} has no option "adapt": it has '
                'adaptation layers of its own. Leave it out.'
            )
        self.source = source
        self.teacher_source = teacher_source or source
        self.levels = self._checked_levels('levels', levels)
        self.teacher_levels = self.levels
        if teacher_levels is not None:
            self.teacher_levels = self._checked_levels(
                'teacher_levels', teacher_levels
            )
        self.adapt = adapt
        self.resize = resize
        self.adapters = nn.ModuleList()
        self._class_scores = False
        self.where = f'{type(self).__name__} on "{source}"'

    @property
    def student_paths(self) -> Sequence[str]:
        return (self.source,)

    @property
    def teacher_paths(self) -> Sequence[str]:
        return (self.teacher_source,)

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        ours = student.features(self.source)
        theirs = teacher.features(self.teacher_source, student, self.source)
        ours, theirs = self._chosen(ours, theirs)
        if self.images_only:
            self._check_maps(ours, theirs)
        self._class_scores = (
            self.adaptable
            and not self.adapt
            and _are_class_scores(student.facts, self.source, ours)
            and _are_class_scores(teacher.facts, self.teacher_source, theirs)
        )
        self.adapters = nn.ModuleList(
            self.build_adapter(s, t, f'{self.where}, level {i}')
            for i, (s, t) in enumerate(zip(ours, theirs, strict=True))
        )
        check_sizes(ours, theirs, resize=self.resize, where=self.where)
        self.build_layers(ours, theirs)

    def build_adapter(
        self, student: Tensor, teacher: Tensor, where: str
    ) -> nn.Module:
        """Build the layer between the features of one level."""
        adapt = self.adapt
        if adapt is None:
            adapt = student.shape[1:2] != teacher.shape[1:2]
        return build_adapter(student, teacher, adapt=adapt, where=where)

    def build_layers(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        """Build the layers that the method trains besides the adapters.

        Args:
            student: The student's tapped features of one blank image.
            teacher: The teacher's features that are paired with them.
        """

    def pairs(
        self, student: StepRecord, teacher: TeacherView
    ) -> list[tuple[Tensor, Tensor]]:
        """Return each level's adapted, resized feature and the teacher's."""
        ours = student.features(self.source)
        theirs = teacher.features(self.teacher_source, student, self.source)
        ours, theirs = self._chosen(ours, theirs)
        if self._class_scores:
            self._check_classes(teacher.class_map)
        self._check_images(ours, theirs)
        return [
            (resize_to(adapter(s), t.shape), t.detach())
            for adapter, s, t in zip(self.adapters, ours, theirs, strict=True)
        ]

    def _chosen(
        self, student: tuple[Tensor, ...], teacher: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        ours = _choose(student, self.levels, self.where)
        theirs = _choose(teacher, self.teacher_levels, self.where)
        check_levels(ours, theirs, self.where)
        return ours, theirs

    def _check_maps(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        for role, path, features in (
            ('student', self.source, student),
            ('teacher', self.teacher_source, teacher),
        ):
            for feature in features:
                if feature.dim() != 4 or path.startswith('roi_head.'):
                    raise ConfigError(
                        f'{self.where}: the {role}\'s "{path}" must give '
                        'maps (B, C, H, W) of whole images, got '
                        f'{tuple(feature.shape)}. Tap the neck, the backbone '
                        'or a convolution before the RoIs, or use '
                        'mmkd.FeatureHint.'
                    )

    def _check_classes(self, classes: ClassMap) -> None:
        if not classes.identical:
            raise ConfigError(
                f'{self.where}: class scores are compared channel by channel, '
                'so both networks must have the same classes in the same '
                f'order, got {", ".join(classes.student)} in the student and '
                f'{", ".join(classes.teacher)} in the teacher. Use mmkd.KD, '
                'which compares the classes that both have, or set '
                'adapt=True.'
            )

    def _check_images(
        self, student: Sequence[Tensor], teacher: Sequence[Tensor]
    ) -> None:
        for s, t in zip(student, teacher, strict=True):
            if len(s) != len(t):
                raise ConfigError(
                    f'{self.where}: the student\'s "{self.source}" gives '
                    f"{len(s)} maps for the batch, the teacher's "
                    f'"{self.teacher_source}" {len(t)}: a module that sees '
                    'an image several times, as the branches of TridentNet '
                    'do, has no single map to compare. Tap a module before '
                    'it, such as an earlier layer of the backbone.'
                )

    def _checked_levels(
        self, option: str, levels: Sequence[int] | None
    ) -> tuple[int, ...] | None:
        if levels is None:
            return None
        if (
            not isinstance(levels, Sequence)
            or not levels
            or any(not isinstance(level, int) or level < 0 for level in levels)
        ):
            raise ConfigError(
                f'{type(self).__name__}.{option} must be a list of level '
                f'numbers from 0, got {levels!r}; leave it out for all '
                'levels.'
            )
        return tuple(levels)


def _are_class_scores(
    facts: DetectorFacts, path: str, features: Sequence[Tensor]
) -> bool:
    """Return whether a tap in a dense head has a channel per class."""
    if facts.dense is None or not path.startswith('bbox_head'):
        return False
    widths = [facts.dense.columns * n for n in facts.dense.priors_per_point]
    return any(feature.shape[1] in widths for feature in features)


def _choose(
    features: tuple[Tensor, ...], levels: Sequence[int] | None, where: str
) -> tuple[Tensor, ...]:
    if levels is None:
        return features
    if any(level >= len(features) for level in levels):
        raise ConfigError(
            f'{where}: the levels {list(levels)} are asked for, but there '
            f'are {len(features)} (0 to {len(features) - 1}).'
        )
    return tuple(features[level] for level in levels)


def image_weights(
    data_samples: Sequence[DetDataSample], maps: Tensor
) -> Tensor | None:
    """Return weights that average maps over each image without its padding.

    Args:
        data_samples: One per map, with ``img_shape`` and, from the data
            preprocessor, ``batch_input_shape``.
        maps: (B, C, H, W).

    Returns:
        (B, 1, H, W), 1/n on the n positions of the image and 0 on padding;
        None where nothing is padded (or for vectors).

    Raises:
        ConfigError: If there is not one map per image.
    """
    if maps.dim() != 4:
        return None
    extents = image_extents(data_samples, maps)
    if extents is None:
        return None
    images, _, height, width = maps.shape
    weights = torch.zeros(images, 1, height, width, device=maps.device)
    for weight, (rows, columns) in zip(weights, extents, strict=True):
        weight[:, :rows, :columns] = 1 / (rows * columns)
    return weights


def image_extents(
    data_samples: Sequence[DetDataSample], maps: Tensor
) -> list[tuple[int, int]] | None:
    """Return which part of each map is image; the rest is padding.

    Args:
        data_samples: One per map, with ``img_shape`` and, from the data
            preprocessor, ``batch_input_shape``.
        maps: (B, C, H, W).

    Returns:
        The rows and columns of each image, which start at 0; None where
        nothing is padded.

    Raises:
        ConfigError: If there is not one map per image.
    """
    images, _, height, width = maps.shape
    if images != len(data_samples):
        raise ConfigError(
            f'a tapped map holds {images} images, the batch '
            f'{len(data_samples)}: padding cannot be told apart. Tap a module '
            'that sees every image once, such as the neck.'
        )
    shapes = [sample.img_shape[:2] for sample in data_samples]
    full = data_samples[0].metainfo.get('batch_input_shape', shapes[0])
    if all(tuple(shape) == tuple(full) for shape in shapes):
        return None
    return [
        (math.ceil(h * height / full[0]), math.ceil(w * width / full[1]))
        for h, w in shapes
    ]


def position_weights(
    data_samples: Sequence[DetDataSample], maps: Tensor
) -> Tensor:
    """:func:`image_weights`, (B, 1, H, W), also where nothing is padded."""
    weights = image_weights(data_samples, maps)
    return full_weights(maps) if weights is None else weights


def spatial_attention(
    maps: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    """Return how much stronger a position is than the others of its image.

    Args:
        maps: (B, C, H, W), float32.
        weights: Weights of :func:`position_weights`, (B, 1, H, W).
        temperature: The divisor of the mean sizes over the channels.

    Returns:
        (B, 1, H, W): the softmax over an image's positions, times their
        number; 0 on padding.
    """
    return _of_positions(maps.abs(), weights, temperature)


def channel_attention(
    maps: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    """Return how much stronger a channel is than the others of its image.

    Args:
        maps: (B, C, H, W), float32.
        weights: Weights of :func:`position_weights`, (B, 1, H, W).
        temperature: The divisor of the mean sizes over the positions.

    Returns:
        (B, C, 1, 1): the softmax over the channels, times their number.
    """
    return _of_channels(maps.abs(), weights, temperature)


def both_attentions(
    maps: Tensor, weights: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """:func:`spatial_attention` and :func:`channel_attention` at once."""
    sizes = maps.abs()
    return (
        _of_positions(sizes, weights, temperature),
        _of_channels(sizes, weights, temperature),
    )


def _of_positions(
    sizes: Tensor, weights: Tensor, temperature: float
) -> Tensor:
    inside = weights > 0
    sizes = sizes.mean(1, keepdim=True) / temperature
    share = sizes.masked_fill(~inside, OUTSIDE).flatten(2).softmax(-1)
    return share.view_as(sizes) * inside.sum((2, 3), keepdim=True)


def _of_channels(sizes: Tensor, weights: Tensor, temperature: float) -> Tensor:
    sizes = sum_over_positions(sizes, weights) / temperature
    return sizes.shape[1] * sizes.softmax(1)[..., None, None]


def sum_over_positions(maps: Tensor, weights: Tensor) -> Tensor:
    """Return each channel's weighted sum over its positions.

    Args:
        maps: (B, C, H, W).
        weights: (B, 1, H, W).

    Returns:
        (B, C), without a pass that writes the products.
    """
    return (maps.flatten(2) @ weights.flatten(2).mT)[..., 0]
