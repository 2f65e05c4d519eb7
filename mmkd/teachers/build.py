"""Build what ``distillation.teacher`` of a config describes."""

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log
from torch import Tensor, nn

from mmkd.detectors.facts import box_class_names
from mmkd.detectors.source import (
    build_trained,
    build_untrained,
    check_class_count,
    class_names,
    find_in_model_index,
    load_config,
    load_strictly,
)
from mmkd.detectors.wrappers import check_is_detector
from mmkd.errors import ConfigError
from mmkd.registry import TEACHERS
from mmkd.utils import (
    check_options,
    find_class,
    isolated_random_state,
    option_names,
)

from .cache import TeacherCache, check_cache_options
from .detections_file import DetectionsFile
from .encoder import FoundationEncoder as FoundationEncoder  # registers it
from .ensemble import EnsembleTeacher
from .frozen import FrozenDetector
from .onnx_detector import OnnxDetector
from .python_detector import PythonDetector
from .renormalize import check_channels
from .several import SeveralTeachers, log_name, named
from .speed import Speed
from .speed_up import speed_up
from .view import NoTeacher, Teacher, TeacherContext

WHERE = 'distillation.teacher'
MISSING: Any = object()


def build_teacher(cfg: Any, context: TeacherContext) -> Teacher:
    """Build the teacher that ``distillation.teacher`` describes.

    Args:
        cfg: A dict with the ``type`` of a registered teacher and its options.
            There are short forms: a dict without ``type`` is the frozen
            detector of :func:`frozen_detector`; a string is the name of a
            model in MMDetection's index; with a list of descriptions, each
            of them teaches; and with ``dict(mean=[...])`` their mean does.
            None or an empty description means that there is no teacher.
        context: What the teacher is told about the training.

    Raises:
        ConfigError: If a description is wrong, or the teachers do not fit.
        CheckpointError: If a checkpoint does not fit its config exactly.
    """
    if not cfg:
        return NoTeacher()
    options = spelled_out(cfg)
    kind = find_class(TEACHERS, options.pop('type'), WHERE)
    options.pop('_scope_', None)  # a base in another package adds it
    known = option_names(kind)
    if known is not None:
        check_options(WHERE, options, known - {'context'})
    try:
        return kind(context=context, **options)
    except ConfigError:
        raise
    except TypeError as error:
        name = getattr(kind, '__name__', kind)
        raise ConfigError(f'{WHERE} ({name}): {error}') from error


def spelled_out(cfg: Any) -> dict[str, Any]:
    """Return a description without short forms, a dict with ``type``."""
    if isinstance(cfg, str):
        return dict(type='mmkd.FrozenDetector', name=cfg)
    if isinstance(cfg, list | tuple):
        return dict(type='mmkd.SeveralTeachers', teachers=list(cfg))
    if not isinstance(cfg, Mapping):
        raise ConfigError(
            f'{WHERE} must be a dict, the name of a model in '
            f"MMDetection's index, or a list of these, got {cfg!r}."
        )
    options = dict(cfg)
    if 'type' in options:
        return options
    if 'mean' in options:
        check_options(WHERE, options, ('mean',))
        return dict(type='mmkd.EnsembleTeacher', teachers=options['mean'])
    return dict(type='mmkd.FrozenDetector', **options)


def kind_of(cfg: Any) -> str:
    """Return the name of a description's type, without its scope."""
    kind = spelled_out(cfg)['type']
    name = kind if isinstance(kind, str) else kind.__name__
    return name.rpartition('.')[2]


def descriptions(cfg: Any, name: str = 'teacher') -> dict[str, Any]:
    """Return the description of each frozen detector by its name in logs.

    Teachers of other kinds are left out.
    """
    if not cfg:
        return {}
    kind = kind_of(cfg)
    if kind == 'FrozenDetector':
        return {name: cfg}
    result: dict[str, Any] = {}
    if kind in ('SeveralTeachers', 'EnsembleTeacher'):
        parts = spelled_out(cfg)['teachers']
        for label, each in labelled(parts, WHERE).items():
            result.update(descriptions(each, f'{name}_{label}'))
    return result


def changed(cfg: Any, change: Callable[[dict[str, Any]], Any]) -> Any:
    """Return a description with the options of every detector changed."""
    if isinstance(cfg, list | tuple):
        return [changed(each, change) for each in cfg]
    options = dict(name=cfg) if isinstance(cfg, str) else dict(cfg)
    # Elsewhere a label may stand beside the mean of several.
    kind = kind_of({k: v for k, v in options.items() if k != 'label'})
    if kind in ('SeveralTeachers', 'EnsembleTeacher'):
        key = 'teachers' if 'teachers' in options else 'mean'
        return {**options, key: changed(options[key], change)}
    return change(options) if kind == 'FrozenDetector' else options


# ---------------------------------------------------------- kinds of teachers


def _registered(kind: type[Teacher]) -> Callable[[Any], Any]:
    """Register a function that builds one of the kinds of this room."""

    def register(build: Any) -> Any:
        build.gives = kind.gives
        return TEACHERS.register_module(name=kind.__name__, module=build)

    return register


@_registered(FrozenDetector)
def frozen_detector(
    *,
    context: TeacherContext,
    name: str | None = None,
    config: Any = None,
    checkpoint: str | None = MISSING,
    cfg_options: Mapping[str, Any] | None = None,
    trust_checkpoint: bool = False,
    prefix: str | None = None,
    class_map: Mapping[str, str | None] | None = None,
    fold_bn: bool = False,
    channels_last: bool = False,
    autocast: str | None = None,
    compile: bool = False,
    cache: Mapping[str, Any] | None = None,
) -> FrozenDetector:
    """Build and load a frozen detector of MMDetection.

    Args:
        context: What the teacher is told about the training.
        name: The name of a model in MMDetection's installed model index,
            instead of ``config`` and ``checkpoint``.
        config: A path, ``mmdet::…``, or a config dict.
        checkpoint: A path or URL. None makes an untrained network, with a
            warning.
        cfg_options: Entries of the config to override.
        trust_checkpoint: Allow a pickle that holds more than weights.
        prefix: What comes before the detector's names in a checkpoint that
            holds more than one network, or a wrapped one, such as
            ``'teacher'`` or ``'student.module'``. Other keys are left out.
        class_map: The teacher's name of some of the student's classes, such
            as ``dict(sofa='couch')``, or None for a class that it is not to
            teach. The others are matched by name, whose known spellings are
            ``mmkd.data.class_names.ALIASES`` and
            ``distillation.class_aliases``.
        fold_bn: See :class:`~mmkd.teachers.speed.Speed`.
        channels_last: See :class:`~mmkd.teachers.speed.Speed`.
        autocast: See :class:`~mmkd.teachers.speed.Speed`.
        compile: See :class:`~mmkd.teachers.speed.Speed`.
        cache: Options of :class:`~mmkd.teachers.cache.TeacherCache`, which
            keeps on disk what the teacher has computed.

    Raises:
        ConfigError: If the description is incomplete or unknown.
        CheckpointError: If the checkpoint does not fit the config exactly.
    """
    if name is not None:
        found = find_in_model_index(name)
        config = found['config'] if config is None else config
        if checkpoint is MISSING:
            checkpoint = found['checkpoint']
    _check_given(config, checkpoint)
    speed = Speed(fold_bn, channels_last, autocast, compile)
    entries = None if cache is None else check_cache_options(cache)
    settings = load_config(config)
    _override(settings, cfg_options)
    with isolated_random_state():
        model, meta = build_trained(
            settings.model,
            checkpoint,
            trust=bool(trust_checkpoint),
            prefix=prefix,
        )
    check_is_detector(model, 'teacher')
    check_channels(context.student, model, WHERE)
    classes = _classes_of(model, meta, settings, context)
    teacher = FrozenDetector(
        model,
        classes,
        student=context.student,
        student_classes=context.student_classes(classes),
        paths=context.paths,
        class_map=class_map,
        class_aliases=context.class_aliases,
    )

    def equip() -> None:
        if speed != Speed():
            speed_up(teacher, speed, context.device)
        if entries is not None:
            teacher.cache = TeacherCache(
                teacher.to(context.device), settings.model.to_dict(), **entries
            )

    def rebuild(weights: Mapping[str, Tensor]) -> None:
        fresh = build_untrained(settings.model)
        load_strictly(fresh, weights, 'the new weights of the teacher')
        teacher.model = fresh.eval().requires_grad_(False)
        teacher.speed, teacher.cache = Speed(), None
        equip()
        teacher.to(context.device)

    equip()
    teacher.rebuild = rebuild
    return teacher


@_registered(SeveralTeachers)
def several_teachers(
    *, context: TeacherContext, teachers: Sequence[Any]
) -> SeveralTeachers:
    """Build teachers that teach one by one.

    Args:
        context: What the teachers are told about the training.
        teachers: Their descriptions. Each may carry a ``label`` for the log;
            without labels they are numbered.
    """
    built = {}
    for label, cfg in labelled(teachers, WHERE).items():
        if isinstance(cfg, list | tuple):
            raise ConfigError(
                f'{WHERE}: the list holds another list, {cfg!r}. Write all '
                'teachers into one list.'
            )
        with named(log_name(label)):
            built[label] = build_teacher(cfg, context)
    return SeveralTeachers(built)


@_registered(EnsembleTeacher)
def ensemble_teacher(
    *, context: TeacherContext, teachers: Sequence[Any]
) -> EnsembleTeacher:
    """Build one teacher that is the mean of several frozen detectors.

    Args:
        context: What the teachers are told about the training.
        teachers: Their descriptions. Each may carry a ``label`` for the log.
    """
    built = {}
    for label, cfg in labelled(teachers, f'{WHERE}.mean').items():
        if kind_of(cfg) != 'FrozenDetector':
            raise ConfigError(
                f'{WHERE}.mean takes descriptions of single teachers that '
                f'are detectors of MMDetection, got {cfg!r}. Write all of '
                'them into one list.'
            )
        with named(log_name(label)):
            teacher = build_teacher(cfg, context)
            assert isinstance(teacher, FrozenDetector)
            built[label] = teacher
    return EnsembleTeacher(built)


for _kind in (DetectionsFile, OnnxDetector, PythonDetector):
    TEACHERS.register_module(module=_kind)


# -------------------------------------------------------------------- options


def labelled(cfgs: Any, where: str) -> dict[str, Any]:
    """Return the descriptions by label, without the labels in them.

    Raises:
        ConfigError: If there are none, or labels are not words or not unique.
    """
    if not isinstance(cfgs, list | tuple) or not cfgs:
        raise ConfigError(
            f'{where} must be a list of descriptions of teachers, such as '
            f'[dict(config=..., checkpoint=...), ...], got {cfgs!r}.'
        )
    found: dict[str, Any] = {}
    for number, cfg in enumerate(cfgs, 1):
        label = str(number)
        if isinstance(cfg, Mapping) and 'label' in cfg:
            cfg = dict(cfg)
            label = cfg.pop('label')
            _check_label(label, where)
        if label in found:
            raise ConfigError(
                f'{where}: two teachers have the label "{label}". Give each '
                'a label of its own.'
            )
        found[label] = cfg
    return found


def _check_label(label: Any, where: str) -> None:
    word = isinstance(label, str) and label.replace('_', '').isalnum()
    if not word or hasattr(nn.ModuleDict(), label):
        raise ConfigError(
            f'{where}: {label!r} cannot be a label, because labels are parts '
            'of the names of losses and weights. Choose a word such as "coco".'
        )


def _check_given(config: Any, checkpoint: Any) -> None:
    if config is None:
        raise ConfigError(
            f'{WHERE} needs a "config" (a path, "mmdet::…" or a dict) and a '
            '"checkpoint", or the "name" of a model in MMDetection\'s index.'
        )
    if checkpoint is MISSING:
        raise ConfigError(
            f'{WHERE} has no "checkpoint". Give the path or URL of its '
            'trained weights, or checkpoint=None for an untrained teacher in '
            'a smoke test.'
        )


def _override(config: Config, options: Mapping[str, Any] | None) -> None:
    if options:
        check_options(
            f'{WHERE}.cfg_options: its config',
            (key.partition('.')[0] for key in options),
            config,
        )
        config.merge_from_dict(dict(options))


def _classes_of(
    model: Any,
    meta: Mapping[str, Any],
    config: Config,
    context: TeacherContext,
) -> tuple[str, ...]:
    """Return the teacher's class names, or the student's with a warning."""
    classes = class_names(meta, config)
    if classes is None:
        classes = tuple(context.classes)
        print_log(
            "Neither the teacher's checkpoint nor its config names its "
            f"classes. The student's are assumed: {', '.join(classes)}",
            'current',
            logging.WARNING,
        )
    check_class_count(model, classes, WHERE, 'its checkpoint or config')
    return box_class_names(model, classes)
