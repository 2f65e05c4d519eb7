"""The frozen detector that is distilled from."""

import copy
import difflib
import functools
import logging
import os.path as osp
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from mmdet.registry import DATASETS
from mmdet.structures import DetDataSample
from mmdet.utils import register_all_modules
from mmengine.config import Config, ConfigDict
from mmengine.logging import print_log
from mmengine.registry import MODELS, DefaultScope
from mmengine.utils import get_installed_path
from torch import Tensor, nn

from .checkpoint import CheckpointError, load_checkpoint_file
from .outputs import BoxSample, Outputs, flatten_levels
from .utils import ConfigError, check_options, isolated_random_state

TEACHER_OPTIONS = (
    'name',
    'config',
    'checkpoint',
    'cfg_options',
    'trust_checkpoint',
)


class ClassMap:
    """Which class of the student is which of the teacher, by name.

    Args:
        student: The student's class names.
        teacher: The teacher's class names.

    Attributes:
        identical: Both have the same classes in the same order.
        student_index: (S,) the student's indices of the S shared classes.
        teacher_index: (S,) the teacher's indices of the same.
        to_teacher: The teacher's label for each of the student's and, last,
            for the background; -1 for a class the teacher does not know.
        to_student: The student's label for each of the teacher's, or -1.

    Raises:
        ConfigError: If no class is shared.

    Example:
        >>> ClassMap(['cat', 'dog'], ['dog', 'cow']).teacher_index
        tensor([0])
    """

    def __init__(self, student: Sequence[str], teacher: Sequence[str]) -> None:
        self.student, self.teacher = tuple(student), tuple(teacher)
        self.identical = self.student == self.teacher
        self.shared = [name for name in student if name in self.teacher]
        if not self.shared:
            raise ConfigError(
                'the teacher and the student share no class name. Student: '
                f'{", ".join(student)}. Teacher: {", ".join(teacher)}. Use a '
                'teacher of the same classes, or name them alike through '
                'metainfo=dict(classes=...).'
            )
        self.student_index = torch.tensor(
            [self.student.index(name) for name in self.shared]
        )
        self.teacher_index = torch.tensor(
            [self.teacher.index(name) for name in self.shared]
        )
        self.to_teacher = torch.full((len(student) + 1,), -1)
        self.to_teacher[self.student_index] = self.teacher_index
        self.to_teacher[-1] = len(teacher)
        self.to_student = torch.full((len(teacher),), -1)
        self.to_student[self.teacher_index] = self.student_index

    def to(self, device: torch.device | str) -> 'ClassMap':
        """Move the index tensors to ``device``, in place."""
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def __str__(self) -> str:
        if self.identical:
            return f'identical ({len(self.student)} classes)'
        return (
            f'{len(self.shared)} shared by name: {", ".join(self.shared)} '
            f'(student {len(self.student)}, teacher {len(self.teacher)})'
        )


class Renormalize:
    """Turn the student's normalised batch into the teacher's.

    Undoes the student's mean, std and channel order and applies the
    teacher's. What the batch was padded with becomes the teacher's padding.

    Args:
        student: The student's data preprocessor.
        teacher: The teacher's data preprocessor.

    Attributes:
        needed: Whether the two differ at all.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        mean_s, std_s = _mean_std(student)
        mean_t, std_t = _mean_std(teacher)
        self.flip = _flips(student) != _flips(teacher)
        if self.flip:
            mean_s, std_s = mean_s.flip(0), std_s.flip(0)
        # x_t = (x_s * std_s + mean_s - mean_t) / std_t
        self.scale = (std_s / std_t).view(1, -1, 1, 1)
        self.shift = ((mean_s - mean_t) / std_t).view(1, -1, 1, 1)
        self.pad_value = float(getattr(teacher, 'pad_value', 0))
        self.needed = bool(
            self.flip
            or not torch.equal(mean_s, mean_t)
            or not torch.equal(std_s, std_t)
        )

    def __call__(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> Tensor:
        """Convert a batch (B, 3, H, W); equal settings return it as it is."""
        if not self.needed:
            return inputs
        if self.flip:
            inputs = inputs.flip(1)
        self.scale = self.scale.to(inputs)
        self.shift = self.shift.to(inputs)
        result = inputs * self.scale + self.shift
        for image, sample in zip(result, data_samples, strict=True):
            height, width = sample.img_shape[:2]
            image[:, height:] = self.pad_value
            image[:, :, width:] = self.pad_value
        return result


def _mean_std(preprocessor: nn.Module) -> tuple[Tensor, Tensor]:
    if not getattr(preprocessor, '_enable_normalize', False):
        return torch.zeros(3), torch.ones(3)
    mean = preprocessor.mean.detach().cpu().float().flatten().expand(3)
    std = preprocessor.std.detach().cpu().float().flatten().expand(3)
    return mean, std


def _flips(preprocessor: nn.Module) -> bool:
    return bool(getattr(preprocessor, '_channel_conversion', False))


def frozen_pass(compute: Callable[..., Any]) -> Callable[..., Any]:
    """Run a teacher's computation without gradient or random numbers."""

    @functools.wraps(compute)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad(), isolated_random_state():
            return compute(*args, **kwargs)

    return call


class TeacherOutputs:
    """The teacher's view of a batch; each part is computed when first read.

    A method that reads only features pays for backbone and neck alone.
    """

    def __init__(
        self,
        teacher: 'Teacher',
        inputs: Tensor,
        data_samples: Sequence[DetDataSample],
    ) -> None:
        self.model = teacher.model
        self.class_map = teacher.class_map
        self._outputs = Outputs(teacher.model, teacher.paths)
        self._renormalize = teacher.renormalize
        self._inputs, self._data_samples = inputs, data_samples
        self._scores: dict[int, tuple[Tensor, Tensor | None]] = {}

    @functools.cached_property
    @frozen_pass
    def maps(self) -> tuple[Tensor, ...]:
        """What the heads see: the neck's (or backbone's) levels."""
        inputs = self._renormalize(self._inputs, self._data_samples)
        with self._outputs.recording():
            return self.model.extract_feat(inputs)

    @functools.cached_property
    @frozen_pass
    def rpn(self) -> tuple[list[Tensor], list[Tensor]]:
        """Per level logits (B, A*c, H, W) and deltas (B, A*4, H, W)."""
        maps = self.maps
        with self._outputs.recording():
            scores, deltas = self.model.rpn_head(maps)[:2]
        return scores, deltas

    @functools.cached_property
    @frozen_pass
    def dense(self) -> Any:
        """What a one-stage detector's head returns for the maps."""
        maps = self.maps
        with self._outputs.recording():
            return self.model.bbox_head(maps)

    def features(self, path: str, student: Outputs) -> tuple[Tensor, ...]:
        """The output of the module at ``path``, a tensor a level.

        Args:
            path: A module path; what lies in a head makes the head run.
            student: The student's step, whose RoIs the RoI head is given.
        """
        part = path.partition('.')[0]
        if part == 'roi_head':
            for stage, sample in enumerate(student.rois):
                self.score_rois(sample, stage)
        else:
            heads = {'rpn_head': 'rpn', 'bbox_head': 'dense'}
            getattr(self, heads.get(part, 'maps'))
        return self._outputs.features(path)

    def score_anchors(self, sample: BoxSample) -> tuple[Tensor, Tensor]:
        """The teacher's RPN on the student's sampled anchors.

        Returns:
            Logits (N, 1 or 2) and deltas (N, 4) in the teacher's coding.
        """
        scores, deltas = self.rpn
        channels = self.model.rpn_head.cls_out_channels
        return (
            flatten_levels(scores, channels)[sample.index],
            flatten_levels(deltas, 4)[sample.index],
        )

    def score_rois(
        self, sample: BoxSample, stage: int
    ) -> tuple[Tensor, Tensor | None]:
        """The teacher's RoI head on the student's RoIs, on its own features.

        Args:
            sample: The student's sampled RoIs.
            stage: The student's stage; a teacher with fewer uses its last.

        Returns:
            Logits (N, K+1) and deltas (N, 4 or 4K) in the teacher's coding.
        """
        if stage not in self._scores:
            self._scores[stage] = self._score_rois(sample.boxes, stage)
        return self._scores[stage]

    @frozen_pass
    def _score_rois(
        self, rois: Tensor, stage: int
    ) -> tuple[Tensor, Tensor | None]:
        roi_head = self.model.roi_head
        arguments = [self.maps, rois]
        if isinstance(roi_head.bbox_head, nn.ModuleList):
            arguments.insert(0, min(stage, len(roi_head.bbox_head) - 1))
        with self._outputs.recording():
            result = roi_head._bbox_forward(*arguments)
        return result['cls_score'], result['bbox_pred']


class Teacher:
    """A frozen detector, its class map and its view of a student's batch.

    It is no ``nn.Module`` on purpose: as a child of the student it would be
    optimised, saved, averaged (EMA) and put into train mode.

    Args:
        model: The detector with its weights.
        classes: Its class names.
        student: The student's detector, for the normalisation.
        student_classes: The student's class names.
        paths: Module paths that methods read.
    """

    def __init__(
        self,
        model: nn.Module,
        classes: Sequence[str],
        *,
        student: nn.Module,
        student_classes: Sequence[str],
        paths: Iterable[str] = (),
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.classes = tuple(classes)
        self.paths = tuple(paths)
        self.class_map = ClassMap(student_classes, classes)
        self.renormalize = Renormalize(
            student.data_preprocessor, model.data_preprocessor
        )

    def __call__(
        self, inputs: Tensor, data_samples: Sequence[DetDataSample]
    ) -> TeacherOutputs:
        """Look at the student's batch (B, 3, H, W), lazily."""
        return TeacherOutputs(self, inputs, data_samples)

    def __deepcopy__(self, memo: dict[int, Any]) -> 'Teacher':
        return self  # frozen: copies of the student share it

    def to(self, device: torch.device | str) -> 'Teacher':
        """Move the network to ``device``, in place."""
        self.model.to(device)
        self.class_map.to(device)
        return self


def build_teacher(
    cfg: Mapping[str, Any] | str,
    *,
    student: nn.Module,
    student_classes: Sequence[str],
    paths: Iterable[str] = (),
) -> Teacher:
    """Build and load the teacher that ``distillation.teacher`` describes.

    Args:
        cfg: The name of a model in MMDetection's installed model index, or a
            dict with ``name``, or with ``config`` (a path, ``mmdet::…``, a
            config dict) and ``checkpoint`` (a path or URL; None for an
            untrained network, with a warning). ``cfg_options`` overrides
            entries of the config; ``trust_checkpoint`` allows a pickle that
            holds more than weights.
        student: The student's detector.
        student_classes: The student's class names.
        paths: Module paths that methods read.

    Raises:
        ConfigError: If the description is incomplete or unknown.
        CheckpointError: If the checkpoint does not fit the config exactly.
    """
    options = dict(name=cfg) if isinstance(cfg, str) else dict(cfg)
    check_options('distillation.teacher', options, TEACHER_OPTIONS)
    if 'name' in options:
        options = {**find_in_model_index(options.pop('name')), **options}
    if 'config' not in options:
        raise ConfigError(
            'distillation.teacher needs a "config" (a path, "mmdet::…" or a '
            'dict) and a "checkpoint", or the "name" of a model in '
            f"MMDetection's index; got {sorted(options)}."
        )
    if 'checkpoint' not in options:
        raise ConfigError(
            'distillation.teacher has no "checkpoint". Give the path or URL '
            'of its trained weights, or checkpoint=None for an untrained '
            'teacher in a smoke test.'
        )
    config = load_config(options['config'])
    if options.get('cfg_options'):
        config.merge_from_dict(dict(options['cfg_options']))
    with isolated_random_state():
        model, meta = _build_model(
            config.model,
            options['checkpoint'],
            trust=bool(options.get('trust_checkpoint', False)),
        )
    classes = class_names(meta, config)
    if classes is None:
        classes = tuple(student_classes)
        print_log(
            "Neither the teacher's checkpoint nor its config names its "
            f"classes; the student's are assumed: {', '.join(classes)}",
            'current',
            logging.WARNING,
        )
    return Teacher(
        model,
        classes,
        student=student,
        student_classes=student_classes,
        paths=paths,
    )


def load_config(source: str | Mapping[str, Any]) -> Config:
    """A config from a file, an ``mmdet::`` name, or a dict of its own."""
    if isinstance(source, str):
        try:
            return Config.fromfile(source)
        except FileNotFoundError as error:
            raise ConfigError(
                f'the config {source!r} does not exist: {error}. Give a path '
                f'from {osp.abspath(".")} or "mmdet::folder/file.py".'
            ) from None
    config = Config(copy.deepcopy(dict(source)))
    if 'model' not in config:
        raise ConfigError(
            'a config dict needs the key "model" (and names the classes '
            f'through its data sets), got {sorted(config)}. A bare model '
            'dict goes into dict(model=...).'
        )
    return config


@functools.lru_cache(maxsize=1)
def _model_index() -> dict[str, dict[str, Any]]:
    root = osp.join(get_installed_path('mmdet'), '.mim')
    index = Config.fromfile(osp.join(root, 'model-index.yml'))
    models: dict[str, dict[str, Any]] = {}
    for metafile in index.Import:
        content = Config.fromfile(osp.join(root, metafile))
        entries = content.get('Models', content.get('_items', []))
        for entry in entries:
            if 'Weights' in entry and 'Config' in entry:
                models[entry['Name']] = dict(
                    config=osp.join(root, entry['Config']),
                    checkpoint=entry['Weights'],
                )
    return models


def find_in_model_index(name: str) -> dict[str, Any]:
    """The config and checkpoint of a model that MMDetection publishes.

    Raises:
        ConfigError: If the index has no such name; says the nearest ones.

    Example:
        >>> find_in_model_index('paa_r101_fpn_1x_coco')['checkpoint'][-12:]
        '0a1825a4.pth'
    """
    models = _model_index()
    if name not in models:
        close = difflib.get_close_matches(name, models, n=3)
        raise ConfigError(
            f"MMDetection's model index has no {name!r}. Nearest: "
            f'{", ".join(close) or "none"} (of {len(models)} models).'
        )
    return dict(models[name])


def _build_model(
    cfg: Mapping[str, Any], checkpoint: str | None, *, trust: bool
) -> tuple[nn.Module, dict[str, Any]]:
    register_all_modules(init_default_scope=False)
    with DefaultScope.overwrite_default_scope('mmdet'):
        # ImageNet weights would be overwritten at once: never fetch them.
        model = MODELS.build(_without_pretrained(cfg))
    if checkpoint is None:
        model.init_weights()
        message = (
            'THE TEACHER IS UNTRAINED (checkpoint=None): its weights are '
            'random and distillation from it teaches nothing. This is for '
            'smoke tests only.'
        )
        warnings.warn(message, stacklevel=2)
        print_log(message, 'current', logging.WARNING)
        return model, {}
    content = load_checkpoint_file(checkpoint, trust=trust)
    state = {
        key.removeprefix('module.'): value
        for key, value in content['state_dict'].items()
    }
    _load_strictly(model, state, checkpoint)
    meta = content.get('meta')
    return model, meta if isinstance(meta, dict) else {}


def _without_pretrained(cfg: Any) -> Any:
    """A copy of a model's config that initialises nothing from files."""
    if isinstance(cfg, list | tuple):
        return type(cfg)(_without_pretrained(item) for item in cfg)
    if not isinstance(cfg, Mapping):
        return cfg
    result = ConfigDict()
    for key, value in cfg.items():
        if key == 'pretrained':
            value = None
        elif key == 'init_cfg':
            items = value if isinstance(value, list | tuple) else [value]
            kept = [i for i in items if i and i['type'] != 'Pretrained']
            value = kept or None
        result[key] = _without_pretrained(value)
    return result


def _load_strictly(
    model: nn.Module, state: dict[str, Tensor], source: str
) -> None:
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    shapes = [
        f'{key}: config {tuple(own[key].shape)}, '
        f'checkpoint {tuple(state[key].shape)}'
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    problems = [
        f'{len(keys)} {what} (first: {"; ".join(keys[:3])})'
        for what, keys in (
            ('keys are missing', missing),
            ('keys are unexpected', unexpected),
            ('shapes differ', shapes),
        )
        if keys
    ]
    if problems:
        raise CheckpointError(
            f'the checkpoint {source} does not fit the teacher '
            f'{type(model).__name__} of its config: {", ".join(problems)}. '
            'Give the checkpoint that was trained with this config, or the '
            'config of this checkpoint.'
        )
    model.load_state_dict(state)


def class_names(
    meta: Mapping[str, Any], config: Config
) -> tuple[str, ...] | None:
    """Class names from a checkpoint's meta data, else from its config."""
    recorded = meta.get('dataset_meta') or {}
    for source, key in (
        (recorded, 'classes'),
        (recorded, 'CLASSES'),
        (meta, 'CLASSES'),
    ):
        if isinstance(source, Mapping) and source.get(key):
            return _as_names(source[key])
    for loader in ('test_dataloader', 'val_dataloader', 'train_dataloader'):
        dataset = (config.get(loader) or {}).get('dataset')
        names = dataset and _dataset_classes(dataset)
        if names:
            return names
    return None


def _dataset_classes(dataset: Mapping[str, Any]) -> tuple[str, ...] | None:
    metainfo = dataset.get('metainfo') or {}
    if metainfo.get('classes'):
        return _as_names(metainfo['classes'])
    nested = dataset.get('dataset') or (dataset.get('datasets') or [None])[0]
    if nested is not None:
        return _dataset_classes(nested)
    cls = DATASETS.get(dataset['type'])
    names = getattr(cls, 'METAINFO', {}).get('classes')
    return _as_names(names) if names else None


def _as_names(names: str | Sequence[str]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names)

