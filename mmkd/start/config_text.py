"""The config that `mmkd distill` writes: a delta on the stock student."""

import hashlib
import inspect
import os.path as osp
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmengine.config import Config

from mmkd.core.method import Method
from mmkd.data.files import path_hint, wrong_path
from mmkd.data.layouts import Data
from mmkd.detectors.source import find_in_model_index, load_config
from mmkd.engine.hooks import GradientBalanceHook
from mmkd.engine.hooks.gradient_balance import has_losses
from mmkd.errors import ConfigError
from mmkd.registry import METHODS, MODELS, TEACHERS
from mmkd.utils import nearest

from .cfg_options import merge, set_options
from .own_data import check_monitors, data_entries
from .pair import Pair, refusal
from .schedule import schedule_entries
from .text import plain, pretty

HEAD = '# Written by `mmkd distill` ({mark}); edit it as you like.'
SHORT = {
    'FasterRCNNDistillation': 'frcnn',
    'FeatureHint': 'hint',
    'OneTeacherSeveralStudents': 'one_teacher',
    'SoftLabelDistillation': 'soft_label',
}
P2_TO_P5 = P3_TO_P6 = dict(levels=[0, 1, 2, 3])


def _fgd(*weights: float) -> dict[str, float]:
    kinds = ('foreground', 'background', 'attention', 'relation')
    return {f'{k}_weight': w for k, w in zip(kinds, weights, strict=True)}


PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    # yzd-v/MGD: cascade_mask_rcnn_…_distill_faster_rcnn_r50_fpn_2x_coco.py
    'MGD': {'two-stage': P2_TO_P5 | dict(mask_ratio=0.45, loss_weight=5e-7)},
    # yzd-v/FGD: fgd_faster_rcnn_r101_…, fgd_reppoints_r101_…, fgd_fcos_r101_…
    # and fgd_yoloxl_distill_yoloxm_coco.py; its GFL has RetinaNet's
    'FGD': {
        'two-stage': P2_TO_P5 | _fgd(5e-5, 2.5e-5, 5e-5, 5e-7),
        'anchor-free': _fgd(1.6e-3, 8e-4, 8e-4, 8e-6),
        'FCOSHead': dict(temperature=0.8),
        'YOLOXHead': _fgd(2e-3, 1e-3, 1e-3, 1e-5),
    },
    # open-mmlab/mmrazor: pkd_fpn_faster-rcnn_r101_faster-rcnn_r50_2x_coco.py,
    # pkd_fpn_retina_x101_… and pkd_fpn_reppoints_x101-dcn_…
    'PKD': {
        'two-stage': P2_TO_P5,
        'one-stage': dict(loss_weight=10.0),
        'anchor-free': dict(loss_weight=10.0),
        'RetinaHead': P3_TO_P6,
        'RepPointsHead': P3_TO_P6,
    },
    # HikariTJU/LD: ld_r50_gflv1_r101_fpn_coco_1x.py
    'LD': {'GFLHead': dict(kd_weight=10.0)},
    # open-mmlab/mmrazor: fbkd_fpn_faster-rcnn_r101_faster-rcnn_r50_1x_coco.py
    'FBKD': {
        'two-stage': P2_TO_P5
        | dict(pooling=[16, 8, 4, 4], reduction=[4, 4, 2, 2])
    },
    # pppppM/mmdetection-distiller: RetinaNet X101 to R50, 2x
    'CWD': {'RetinaHead': P3_TO_P6 | dict(loss_weight=5.0)},
    # jbwang1997/CrossKD: crosskd_r50_…_r101_…; the weights of its FCOS belong
    # to another loss of boxes and another normaliser
    'CrossKD': {
        'RetinaHead': dict(box_weight=1.0),
        'GFLHead': dict(box_weight=4.0),
        'ATSSHead': dict(box_weight=1.0, quality_weight=1.0),
        'FCOSHead': dict(layer=2),
    },
    # cybercore-co-ltd/CoLAD
    'LAD': {'PAAHead': dict(box_weighting='none')},
    'SoLAD': {'PAAHead': dict(box_weighting='none')},
    'SoftLabelDistillation': {'PAAHead': dict(task_loss=False)},
}
"""What official configs set otherwise than the defaults of a method's class:
for a kind of student (:func:`kind_of`), or a head that both networks have."""
UNSAID: dict[str, dict[str, Any]] = {
    'FeatureHint': dict(loss=dict(type='mmkd.HintLoss')),
    'SoLAD': dict(
        soft=dict(cls_weight=2.0, iou_weight=10.0, box_weight=1.3)
        | dict(min_iou=0.5, gamma=0.5)
    ),
}
"""What None stands for."""


FILES_THAT_TEACH = {
    '.onnx': 'mmkd.OnnxDetector',
    '.json': 'mmkd.DetectionsFile',
    '.csv': 'mmkd.DetectionsFile',
    '.tsv': 'mmkd.DetectionsFile',
}
"""The kind of teacher that a file is, by how its name ends."""
PATHS = ('file', 'annotations')
"""Options of teachers that are paths."""


def methods() -> dict[str, type[Method]]:
    """Every registered method by a short name in lower case."""
    METHODS.import_from_location()
    kinds = {cls.__name__: cls for cls in METHODS.module_dict.values()}
    return {
        SHORT.get(name, name.lower()): kinds[name] for name in sorted(kinds)
    }


def find_method(name: str) -> str:
    """The config's ``type`` of a method's short name.

    Raises:
        ConfigError: If there is none; says the nearest.
    """
    known = methods()
    if name not in known:
        raise ConfigError(f'no method "{name}". {nearest(name, known)}')
    if known[name].learns_from != 'teacher':
        raise ConfigError(
            f'{name} ties networks that train together (`peers`), and has no '
            'teacher: see the configs of it.'
        )
    return f'mmkd.{known[name].__name__}'


def teacher_options(
    name: str,
    checkpoint: str | None,
    prefix: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The value of ``distillation.teacher`` for what the user names.

    Args:
        name: A name in MMDetection's model index, a config, the type of a
            registered teacher, such as ``mmkd.FrozenDetector``, an ONNX file,
            a file of detections, or a function, ``module:function``.
        checkpoint: The weights of a config.
        prefix: What comes before the teacher's names in the checkpoint.
        options: Further options of the teacher. Paths may be relative.

    Raises:
        ConfigError: If the name is unknown, a config has no checkpoint, or
            another kind of teacher has one.
    """
    more = dict(options or {})
    for key in PATHS:
        if isinstance(more.get(key), str):
            more[key] = osp.abspath(osp.expanduser(more[key]))
    if found := _foreign(name):
        if checkpoint or prefix:
            raise ConfigError(
                f'the teacher {name} ({found["type"]}) holds all that it '
                'needs: leave out --teacher-checkpoint and --teacher-prefix.'
            )
        return found | more
    return _registered_or_detector(name, checkpoint, prefix) | more


def _foreign(name: str) -> dict[str, Any] | None:
    """Describe a teacher that is a file or a function, by its name."""
    kind = FILES_THAT_TEACH.get(osp.splitext(name)[1].lower())
    if kind is not None and '::' not in name and '://' not in name:
        if not osp.isfile(name):
            raise ConfigError(
                f'the teacher {name} {wrong_path(name)}. {path_hint(name)}'
                'Give the path of a file.'
            )
        return {'type': kind, 'file': osp.abspath(name)}
    if re.fullmatch(r'[\w.]+:[\w.]+', name):
        return {'type': 'mmkd.PythonDetector', 'function': name}
    return None


def _registered_or_detector(
    name: str, checkpoint: str | None, prefix: str | None
) -> dict[str, Any]:
    TEACHERS.import_from_location()
    if name.rpartition('.')[2] in TEACHERS.module_dict:
        return {'type': name}
    if checkpoint is not None and '://' not in checkpoint:
        checkpoint = osp.abspath(checkpoint)
    if '::' not in name and not name.endswith('.py'):
        find_in_model_index(name)
        options = {'name': name}
    elif checkpoint is None:
        raise ConfigError(
            f'the teacher {name} is a config: give its weights, too, with '
            '--teacher-checkpoint.'
        )
    else:
        options = {'config': name if '::' in name else osp.abspath(name)}
    if checkpoint:
        options['checkpoint'] = checkpoint
    return options | ({'prefix': prefix} if prefix else {})


def stock_name(student: str) -> str:
    """The config of a student, whose name in the model index will do."""
    if '::' in student or student.endswith('.py'):
        return student
    if osp.exists(student):
        return student  # which the error is about
    path = find_in_model_index(student)['config']
    return f'mmdet::{path.partition("configs/")[2]}'


# ------------------------------------------------------------------- options


def kind_of(model: Mapping[str, Any]) -> str:
    """Two-stage, one-stage (with anchors), anchor-free or DETR.

    Args:
        model: A detector's part of its config.
    """
    if 'roi_head' in model:
        return 'two-stage'
    if 'decoder' in model:
        return 'DETR'
    head = model.get('bbox_head') or {}
    anchors = any('anchor_generator' in option for option in head)
    return 'one-stage' if anchors else 'anchor-free'


def published(
    name: str, student: Mapping[str, Any], teacher: Mapping[str, Any]
) -> dict[str, Any]:
    """The entries of :data:`PUBLISHED` for a method and two networks."""
    heads = [
        (m.get('bbox_head') or {}).get('type') for m in (student, teacher)
    ]
    found: dict[str, Any] = {}
    for key in (kind_of(student), heads[0] if heads[0] == heads[1] else None):
        entries = PUBLISHED.get(name.removeprefix('mmkd.'), {})
        found |= entries.get(key or '', {})
    if not student.get('neck'):
        found.pop('levels', None)  # a C4 detector has one
    return found


def options_of(name: str, changed: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a class of mmkd with every option and its value.

    Args:
        name: ``mmkd.X``, a method or a loss.
        changed: What is otherwise than the defaults.
    """
    MODELS.import_from_location()
    classes = {**MODELS.module_dict, **METHODS.module_dict}
    short = name.removeprefix('mmkd.')
    options = defaults(classes[short]) | UNSAID.get(short, {}) | {**changed}
    for key, value in options.items():
        if isinstance(value, Mapping) and 'type' in value:
            options[key] = options_of(value['type'], dict(value))
    return dict(type=name) | options


def defaults(cls: type) -> dict[str, Any]:
    """The options of a class, and those that it hands on to its base."""
    found: dict[str, Any] = {}
    for base in inspect.getmro(cls)[:-1]:
        parameters = inspect.signature(base).parameters.values()
        for parameter in parameters:
            if parameter.kind is parameter.KEYWORD_ONLY:
                found.setdefault(parameter.name, parameter.default)
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            break
    if not getattr(cls, 'adaptable', True):
        del found['adapt']  # it has layers of its own
    return found


# -------------------------------------------------------------------- config


@dataclass
class Written:
    """A config that distils, as text, and what was chosen for it.

    Attributes:
        chosen: A line with the reason for each choice.
    """

    text: str
    chosen: list[str]


@dataclass(frozen=True)
class Wishes:
    """What the user wants otherwise than the stock student has it.

    Attributes:
        epochs: The length of the training.
        batch_size: The images of a batch on each GPU.
        load_from: The weights that the student begins with.
        balance: The share of the gradient at which each method is held.
        unlabelled: ``distillation.unlabelled``: ``dataset``, ``weight`` and
            ``alone``.
        options: Entries of the config, by dotted keys.
    """

    epochs: int | None = None
    batch_size: int | None = None
    load_from: str | None = None
    balance: float | None = None
    unlabelled: Mapping[str, Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def write_config(
    student: str,
    teacher: Mapping[str, Any],
    names: Sequence[str],
    data: Data | None = None,
    imports: Sequence[str] = (),
    wishes: Wishes = Wishes(),
    *,
    tried: bool = True,
) -> Written:
    """The file: a stock base, its data if they are others, distillation.

    All options of the methods are in it, with their values.

    Args:
        student: The stock config.
        teacher: :func:`teacher_options`.
        names: The short names of the methods; none for training without a
            teacher.
        data: None for the student's own.
        imports: Modules that register methods or teachers of the user's own.
        wishes: What else is to be otherwise.
        tried: Whether both networks are built, to choose what they decide.

    Raises:
        ConfigError: If something cannot be done with such a student, or a
            method does not fit the two networks.
    """
    base = student if '::' in student else osp.abspath(student)
    config = load_config(base)
    entries: dict[str, Any] = {}
    chosen: list[str] = []
    if imports:
        entries['custom_imports'] = dict(imports=list(imports))
    if data is not None:
        changed, chosen = data_entries(config, data)
        merge(entries, changed)
        config = _read(base, entries)
    changed, why = schedule_entries(
        config,
        osp.basename(base),
        epochs=wishes.epochs,
        batch_size=wishes.batch_size,
        images=None if data is None else data.images,
        own_data=data is not None,
        trained=bool(wishes.load_from or config.get('load_from')),
    )
    merge(entries, changed)
    if wishes.load_from:
        entries['load_from'] = wishes.load_from
    entries['runner_type'] = 'mmkd.DistillationRunner'
    comment: list[str] = []
    if names:
        network = config_of(teacher)
        options, comment = published_methods(names, config, network)
        if tried and network is not None:
            classes = None if data is None else data.classes
            options, lines = fitted(options, Pair(config, network, classes))
            comment += lines
            why += lines
        entries['distillation'] = dict(teacher=dict(teacher), methods=options)
        if wishes.unlabelled is not None:
            config = _read(base, entries)
            changed = unlabelled_entry(names, config, wishes.unlabelled)
            entries['distillation']['unlabelled'] = changed
    if wishes.balance is not None:
        hook = balance_hook(names, wishes.balance)
        own = entries.get('custom_hooks') or plain(config).get('custom_hooks')
        entries['custom_hooks'] = [*(own or []), hook]
    config = _read(base, entries)
    if wishes.options:
        why += set_options(entries, config, wishes.options)
    check_monitors(config)
    return Written(_text(base, entries, comment), chosen + why)


def check_images(
    names: Sequence[str], unlabelled: Mapping[str, Any] | None
) -> None:
    """Refuse methods of unlabelled images where there are none.

    Raises:
        ConfigError: If there are none.
    """
    lacking = [name for name in names if methods()[name].only_unlabelled]
    if lacking and unlabelled is None:
        raise ConfigError(
            f'{", ".join(lacking)} learns from images without labels. Say '
            'where they are: --unlabelled FOLDER.'
        )


def unlabelled_entry(
    names: Sequence[str], config: Config, wishes: Mapping[str, Any]
) -> dict[str, Any]:
    """The value of ``distillation.unlabelled``, with every option.

    Args:
        names: The short names of the methods.
        config: The student's config.
        wishes: Its ``dataset``, ``weight`` and ``alone``.

    Raises:
        ConfigError: If no method learns from images without labels.
    """
    known = methods()
    if all(known[name].needs_labels for name in names):
        fitting = [n for n, kind in known.items() if not kind.needs_labels]
        raise ConfigError(
            f'--unlabelled: {", ".join(names)} needs labels. These do not: '
            f'{", ".join(fitting)}.'
        )
    loader = config.train_dataloader
    return dict(
        dataset=wishes['dataset'],
        batch_size=loader.batch_size,
        num_workers=loader.get('num_workers', 0),
        weight=wishes['weight'],
        score_thr=0.5,
        alone=wishes['alone'],
    )


def balance_hook(names: Sequence[str], share: float) -> dict[str, Any]:
    """The hook that holds each method's share of the gradient.

    Args:
        names: The short names.
        share: The share.

    Raises:
        ConfigError: If no method has losses, or the share is no share.
    """
    GradientBalanceHook(share=share)
    if not any(has_losses(methods()[name]) for name in names):
        raise ConfigError(
            f"--balance: {', '.join(names)} steers the student's own "
            'losses and has none of its own, so there is no share to hold. '
            'Leave it out.'
        )
    return dict(type='mmkd.GradientBalanceHook', share=share)


def published_methods(
    names: Sequence[str], student: Config, teacher: Config | None
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """All options of methods, and a comment on each.

    Args:
        names: Their short names.
        student: The student's config.
        teacher: The teacher's; None for another kind of teacher.
    """
    options, comments = {}, []
    for short in names:
        name = find_method(short)
        model = {} if teacher is None else teacher.model
        changed = published(name, student.model, model)
        options[short] = options_of(name, changed)
        comment = f'Every option of {name}, which its docstring explains.'
        if changed:
            comment += (
                f' Published for such a student ({kind_of(student.model)}): '
                f'{", ".join(changed)}.'
            )
        comments.append(comment)
    return options, comments


def fitted(
    options: Mapping[str, dict[str, Any]], pair: Pair
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Let methods fit two networks; a line for each choice.

    Raises:
        ConfigError: If some of them cannot; it says which can.
    """
    chosen, why = {}, []
    for name, each in options.items():
        chosen[name], lines = pair.choose(name, each)
        why += lines
    pair.check(chosen)
    if reasons := pair.misfits(chosen):
        fitting = [
            n for n, reason in tried_methods(pair).items() if not reason
        ]
        raise refusal(reasons, fitting)
    return chosen, why


def tried_methods(pair: Pair) -> dict[str, str]:
    """Why each of mmkd's methods does not fit a pair; empty if it does."""
    names = [n for n, cls in methods().items() if cls.learns_from == 'teacher']
    options, _ = published_methods(names, pair.configs[0], pair.configs[1])
    chosen = {name: pair.choose(name, o)[0] for name, o in options.items()}
    reasons = pair.misfits(chosen)
    return {name: reasons.get(name, '') for name in names}


def config_of(teacher: Mapping[str, Any]) -> Config | None:
    """The config of a teacher; None if it is no frozen detector."""
    if 'type' in teacher:
        return None
    if 'name' in teacher:
        teacher = {**find_in_model_index(teacher['name']), **teacher}
    return load_config(teacher['config'])


def _read(base: str, entries: Mapping[str, Any]) -> Config:
    return Config.fromstring(_text(base, entries), '.py')


def _text(
    base: str, entries: Mapping[str, Any], comments: Sequence[str] = ()
) -> str:
    parts = [f'_base_ = [{base!r}]', '']
    for name, value in entries.items():
        if name == 'distillation':
            parts += [
                textwrap.indent(textwrap.fill(each, 77), '# ')
                for each in comments
            ]
        parts += [f'{name} = {pretty(value)}']
    text = '\n'.join(parts) + '\n'
    mark = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f'{HEAD.format(mark=mark)}\n{text}'


def is_as_written(text: str) -> bool:
    """Whether nobody has edited the text of a config."""
    head, _, rest = text.partition('\n')
    mark = hashlib.sha256(rest.encode()).hexdigest()[:8]
    return head == HEAD.format(mark=mark)
