"""Which methods fit two networks, and the options that they decide.

The networks are built without weights and look at one blank image, before
anything is loaded or downloaded.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from mmkd.core.checks import check_gives, check_one_steers
from mmkd.core.method import Method
from mmkd.detectors.blank import PROBE_SIZE, blank_pass
from mmkd.detectors.facts import box_class_names, numbered_classes
from mmkd.detectors.record import StepRecord
from mmkd.detectors.source import build_untrained, class_names
from mmkd.detectors.towers import tower_depth
from mmkd.errors import ConfigError, MMKDError
from mmkd.methods.crosskd import CrossKD
from mmkd.methods.feature_base import FeatureMethod
from mmkd.registry import METHODS
from mmkd.teachers.frozen import FrozenDetector
from mmkd.utils import build_checked, find_class, isolated_random_state

CPU = torch.device('cpu')
BY_LEVEL = ('pooling', 'reduction')
"""Options of FBKD with a number for each level."""


class Pair:
    """A student and a frozen teacher, both without weights.

    Args:
        student: The student's config.
        teacher: The teacher's.
        classes: The student's classes; those of its own data by default.

    Raises:
        ConfigError: If one of them cannot be built.
    """

    def __init__(
        self,
        student: Config,
        teacher: Config,
        classes: Sequence[str] | None = None,
    ) -> None:
        self.configs = student, teacher
        with isolated_random_state():
            self.student: Any = _built('student', student)
            model: Any = _built('teacher', teacher)
        ours = _names(self.student, classes or class_names({}, student))
        theirs = _names(model, class_names({}, teacher))
        try:
            self.teacher = self._frozen(model, theirs, ours)
        except ConfigError:
            # Its checkpoint, which is not read here, may have other names.
            numbers = _numbers(self.student), _numbers(model)
            self.teacher = self._frozen(model, numbers[1], numbers[0])
        self._necks = (
            blank_pass(self.student, ['neck'], CPU),
            blank_pass(model, ['neck'], CPU),
        )

    def _frozen(
        self, model: Any, theirs: Sequence[str], ours: Sequence[str]
    ) -> FrozenDetector:
        return FrozenDetector(
            model, theirs, student=self.student, student_classes=ours
        )

    def choose(
        self, name: str, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Choose the options of a method that depend on both networks.

        Args:
            name: The method's short name, for the reasons.
            options: All of its options, with ``type``.

        Returns:
            The options, and a line with the reason for each that has changed.
        """
        kind = find_class(METHODS, options['type'], name)
        changed: dict[str, Any] = {}
        why: list[str] = []
        if not isinstance(kind, type):
            pass
        elif issubclass(kind, FeatureMethod) and options['source'] == 'neck':
            changed, why = self._levels(options)
        elif issubclass(kind, CrossKD):
            changed, why = self._layer(options['layer'])
        return {**options, **changed}, [f'{name}: {line}' for line in why]

    def misfits(self, methods: Mapping[str, Any]) -> dict[str, str]:
        """Say why methods do not fit; those that do are left out.

        Args:
            methods: Their options by name, as in ``distillation.methods``.
        """
        reasons: dict[str, str] = {}
        built: dict[str, Method] = {}
        for name, options in methods.items():
            try:
                built[name] = build_checked(METHODS, options, name)
                check_gives(name, built[name], self.teacher)
            except MMKDError as error:
                reasons[name] = str(error)
        student = self._seen(self.student, built, 'student_paths')
        self.teacher.paths = _paths(built, 'teacher_paths')
        teacher = self.teacher.blank(CPU)
        for name, method in built.items():
            if name in reasons:
                continue
            try:
                with isolated_random_state():
                    method.prepare(student, teacher)
            except MMKDError as error:
                reasons[name] = str(error)
            except Exception as error:  # of any method, for any reason
                reasons[name] = f'{type(error).__name__}: {error}'
        return reasons

    def check(self, methods: Mapping[str, Any]) -> None:
        """Check that methods can be combined.

        Raises:
            ConfigError: If several of them steer the assignment.
        """
        check_one_steers(
            {k: build_checked(METHODS, o, k) for k, o in methods.items()}
        )

    # -- options -----------------------------------------------------------

    def _levels(
        self, options: Mapping[str, Any]
    ) -> tuple[dict[str, Any], list[str]]:
        """Pair the levels of both necks that have the same stride."""
        ours, theirs = map(_strides, self._necks)
        if not ours or not theirs:
            return {}, []
        given = options['levels'] or range(len(ours))
        wanted = [level for level in given if level < len(ours)]
        left = dict(enumerate(theirs))
        pairs = []
        for level in wanted:
            same = [k for k, stride in left.items() if stride == ours[level]]
            if same:
                pairs.append((level, same[0]))
                del left[same[0]]
        necks = (
            f"{_listed(ours)} in the student's neck, {_listed(theirs)} in "
            "the teacher's"
        )
        if not pairs:
            mine, other = _nearest(ours, theirs)
            return (
                dict(levels=[mine], teacher_levels=[other], resize=True),
                [
                    f'level {mine} with level {other} of the teacher, '
                    f'resized: no stride is in both ({necks})'
                ],
            )
        whole = [(level, level) for level in given]
        if pairs == whole and (options['levels'] or len(ours) == len(theirs)):
            return {}, []
        chosen: dict[str, Any] = dict(levels=[s for s, _ in pairs])
        chosen['teacher_levels'] = [t for _, t in pairs]
        kept = [wanted.index(level) for level, _ in pairs]
        for option in BY_LEVEL:
            if option in options:
                values = list(options[option])
                chosen[option] = [
                    values[min(k, len(values) - 1)] for k in kept
                ]
        shared = _listed([ours[s] for s, _ in pairs])
        return chosen, [
            f'levels {chosen["levels"]}, of the teacher '
            f'{chosen["teacher_levels"]}: the strides {shared} are in both '
            f'({necks})'
        ]

    def _layer(self, layer: int) -> tuple[dict[str, Any], list[str]]:
        """Leave one layer of the shorter towers behind the crossing."""
        networks = self.student, self.teacher.model
        depths = [tower_depth(network) for network in networks]
        least = min(depths)
        if least < 1 or layer < least:
            return {}, []
        return dict(layer=least - 1), [
            f'layer={least - 1}: the towers have {depths[0]} layers in the '
            f"student's head, {depths[1]} in the teacher's, and one has to "
            'follow'
        ]

    @staticmethod
    def _seen(
        model: Any, methods: Mapping[str, Method], paths: str
    ) -> StepRecord:
        return blank_pass(model, _paths(methods, paths), CPU)


def refusal(reasons: Mapping[str, str], fitting: Sequence[str]) -> ConfigError:
    """Say why methods do not fit, and which do."""
    why = '; '.join(f'{name}: {text}' for name, text in reasons.items())
    return ConfigError(
        f'{", ".join(reasons)} cannot distil this pair. {why} Methods that '
        f'fit: {", ".join(fitting) or "none"}.'
    )


def _built(role: str, config: Config) -> Any:
    try:
        return build_untrained(config.model)
    except MMKDError:
        raise
    except Exception as error:  # of any network, for any reason
        raise ConfigError(
            f'the {role}, {config.model.get("type")}, cannot be built: '
            f'{type(error).__name__}: {error}'
        ) from error


def _paths(methods: Mapping[str, Method], kind: str) -> tuple[str, ...]:
    found = [p for method in methods.values() for p in getattr(method, kind)]
    return tuple(dict.fromkeys(found))


def _names(model: Any, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return _numbers(model)
    return box_class_names(model, tuple(names))


def _numbers(model: Any) -> tuple[str, ...]:
    return tuple(numbered_classes(model))


def _strides(record: StepRecord) -> list[int]:
    """Return the strides of a neck's levels, as powers of 2."""
    try:
        maps: Sequence[Tensor] = record.features('neck')
    except MMKDError:
        return []
    if any(feature.dim() != 4 for feature in maps):
        return []
    return [
        2 ** round(math.log2(PROBE_SIZE / max(feature.shape[2:])))
        for feature in maps
    ]


def _nearest(ours: Sequence[int], theirs: Sequence[int]) -> tuple[int, int]:
    """Return the two levels whose strides differ least."""
    return min(
        ((s, t) for s in range(len(ours)) for t in range(len(theirs))),
        key=lambda pair: abs(math.log2(ours[pair[0]] / theirs[pair[1]])),
    )


def _listed(strides: Sequence[int]) -> str:
    return ', '.join(map(str, strides))
