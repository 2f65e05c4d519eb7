"""One pair of detectors at toy scale, trained two iterations with a method."""

import copy
import logging
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import DATASETS, MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmengine.optim import OptimWrapper
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmkd.core.distiller import build_distiller
from mmkd.core.gradients import gradient, student_parameters
from mmkd.detectors.shrink import (
    SCALE,
    noise_batch,
    small_dataset,
    small_model,
)
from mmkd.detectors.source import class_names, load_config
from mmkd.errors import ConfigError, MMKDError

ITERATIONS = 2
TEACHER_SEED = 1  # the student's is 0
METHODS = {
    'features': dict(type='mmkd.FeatureHint'),
    'class logits': dict(type='mmkd.KD'),
    'RoI': dict(type='mmkd.FasterRCNNDistillation'),
    'assignment': dict(type='mmkd.LAD'),
    'distributions': dict(type='mmkd.LD'),
    'cross-head': dict(type='mmkd.CrossKD'),
}
"""The method that stands for each kind of distillation."""
SIZES: tuple[dict[str, Any], ...] = (
    dict(narrow=True, scale=SCALE),
    dict(narrow=False, scale=SCALE),
    dict(narrow=False, scale=(320, 320)),
)
"""These are tried in turn until the plain step runs."""
WORKS, UNFIT, FAILS = 'works', 'does not fit', 'fails'

Report = Callable[[str, dict[str, Any]], None]


class TrialError(MMKDError, RuntimeError):
    """Raised for a step that ran but did not distil."""


def examine(
    student: str,
    teacher: str,
    features: Mapping[str, Any],
    root: Path,
    report: Report,
) -> None:
    """Try the plain step, then each kind of distillation.

    Args:
        student: The path of a config within MMDetection's configs.
        teacher: The path of the teacher's config; the teacher is untrained,
            with another seed.
        features: Options of the method on features.
        root: The folder of COCO's photos.
        report: A function that is called with a step's name and verdict.
    """
    register_all_modules()
    logging.disable(logging.WARNING)
    trial, verdict = _first_that_runs(student, teacher, root)
    report('plain', verdict)
    if trial is None:
        return
    for kind, method in METHODS.items():
        options = features if kind == 'features' else {}
        report(kind, judged(partial(trial.run, {**method, **options})))


def judged(attempt: Callable[[], Any]) -> dict[str, str]:
    """Return the verdict on a distilled run."""
    try:
        attempt()
    except Exception as error:
        status = UNFIT if isinstance(error, ConfigError) else FAILS
        return dict(status=status, reason=reason(error))
    return dict(status=WORKS, reason='')


def reason(error: Exception) -> str:
    """Return an error's first sentence, with its class if not mmkd's."""
    lines = str(error).strip().splitlines() or ['']
    sentence = re.split(r'(?<=[.]) (?=[A-Z])', lines[0])[0]
    if isinstance(error, ConfigError):
        return sentence
    return f'{type(error).__name__}: {sentence}'


def _first_that_runs(
    student: str, teacher: str, root: Path
) -> tuple['Trial | None', dict[str, Any]]:
    verdict: dict[str, Any] = {}
    for size in SIZES:
        try:
            trial = Trial(student, teacher, root, **size)
            trial.plain()
        except Exception as error:
            verdict = dict(status=FAILS, reason=reason(error))
            continue
        facts = dict(data=trial.data, narrow=size['narrow'])
        return trial, dict(status=WORKS, reason='', **facts)
    return None, verdict


class Trial:
    """A student, the description of its teacher, and a batch.

    Args:
        student: The path of a config within MMDetection's configs.
        teacher: The path of the teacher's config.
        root: The folder of COCO's photos.
        narrow: Whether to make layers narrow, where we know how.
        scale: (width, height) of the photos in pixels.
    """

    def __init__(
        self,
        student: str,
        teacher: str,
        root: Path,
        *,
        narrow: bool,
        scale: tuple[int, int],
    ) -> None:
        cfg = load_config(f'mmdet::{student}')
        self.classes = class_names({}, cfg) or ()
        self.teacher = _untrained(load_config(f'mmdet::{teacher}'), narrow)
        torch.manual_seed(0)
        np.random.seed(0)
        with DefaultScope.overwrite_default_scope('mmdet'):
            self.student = MODELS.build(small_model(cfg.model, narrow=narrow))
            self.student.init_weights()
            self.batch, self.data = _read(cfg, root, scale)
        self.plain_losses: dict[str, float] = {}

    def plain(self) -> None:
        """Train as MMDetection does, and raise if that fails."""
        student = copy.deepcopy(self.student)
        self.plain_losses = self._train(student)[0]

    def run(self, method: Mapping[str, Any]) -> None:
        """Train with a method.

        Raises:
            ConfigError: If the method does not fit the pair.
            TrialError: If it changed nothing, or a loss is not finite.
        """
        student = copy.deepcopy(self.student)
        cfg = dict(
            teacher=copy.deepcopy(self.teacher), methods=dict(trial=method)
        )
        distiller = build_distiller(cfg, student, self.classes, TEACHER_SEED)
        distiller.attach()
        try:
            losses = self._train(student)
        except ConfigError as error:
            text = f'(only said in the first step) {error}'
            raise ConfigError(text) from error
        if losses[0] == self.plain_losses:
            raise TrialError('the first step is that of plain training')

    def _train(self, student: Any) -> list[dict[str, float]]:
        """Return the losses of each iteration."""
        hub = MessageHub.get_current_instance()
        parameters = [p for p in student.parameters() if p.requires_grad]
        optimizer = OptimWrapper(
            torch.optim.SGD(parameters, lr=1e-3),
            clip_grad=dict(max_norm=5.0),
        )
        torch.manual_seed(0)
        np.random.seed(0)
        student.train()
        history = []
        for iteration in range(ITERATIONS):
            hub.update_info('epoch', 0)
            hub.update_info('iter', iteration)
            data = student.data_preprocessor(copy.deepcopy(self.batch), True)
            total, logged = student.parse_losses(student(**data, mode='loss'))
            _check(student, logged)
            optimizer.update_params(total)
            history.append({k: float(v) for k, v in logged.items()})
        return history


def _check(student: nn.Module, losses: Mapping[str, Tensor]) -> None:
    """Check that losses are finite and reach the student."""
    bad = [k for k, v in losses.items() if not torch.isfinite(v).all()]
    if bad:
        raise TrialError(f'{", ".join(bad)} not finite')
    ours = [v for k, v in losses.items() if k.startswith('trial.loss')]
    if not ours:
        return
    gradients = gradient(ours, student_parameters(student), student)
    if not any(g is not None and g.any() for g in gradients):
        raise TrialError('the loss gives the student no gradient')


def _untrained(cfg: Config, narrow: bool) -> dict[str, Any]:
    """Return the description of an untrained teacher."""
    return dict(
        config=dict(
            model=small_model(cfg.model, narrow=narrow).to_dict(),
            test_dataloader=cfg.test_dataloader.to_dict(),
        ),
        checkpoint=None,
    )


def _read(
    cfg: Config, root: Path, scale: tuple[int, int]
) -> tuple[dict[str, Any], str]:
    """Read two photos through the config's pipeline, or make noise."""
    dataset = copy.deepcopy(cfg.train_dataloader.dataset)
    try:
        small_dataset(dataset, root, 4, scale)
        photos = DATASETS.build(dataset)
        return pseudo_collate([photos[i] for i in range(2)]), 'photos'
    except Exception as error:
        classes = len(class_names({}, cfg) or ()) or 1
        batch = noise_batch(
            [scale[::-1]] * 2, classes=classes, masks=True, extras=True
        )
        return batch, f'noise ({reason(error)})'
