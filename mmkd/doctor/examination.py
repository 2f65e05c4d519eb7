"""The examination: build the run, stop at its first iteration, look."""

import copy
import tempfile
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, RUNNERS, DefaultScope
from mmengine.runner import Runner

from mmkd.detectors.record import replaced
from mmkd.errors import CheckpointError, ConfigError, DataError, TapError

from .conditions import check_class_order, check_half_precision, check_padding
from .distributed import check_distributed
from .losses import check_losses
from .networks import check_classes, check_modes, check_precision, watched
from .patient import Patient
from .report import Report
from .step import check_cost, check_zero_weight, describe_taps
from .weights import check_checkpoint_file, check_loaded

USER_ERRORS = (CheckpointError, ConfigError, DataError, TapError)


def diagnose(cfg: Config, *, evaluate: int = 0) -> Report:
    """Examine a config that distils.

    The run is built as its runner builds it, up to the moment when it would
    train. One batch of its train loader goes through the plain and the
    distilled step. Only a temporary folder is written to.

    Args:
        cfg: The config, with ``runner_type`` and ``distillation``.
        evaluate: How many validation images the teacher is evaluated on.

    Returns:
        A report of what was seen and what is wrong.
    """
    report = Report()
    try:
        with tempfile.TemporaryDirectory() as folder:
            runner, stock = _build(cfg, folder)

            def examine() -> None:
                _examine(runner, stock, report, folder, evaluate)

            with replaced(runner.train_loop, 'run', examine):
                runner.train()
    except USER_ERRORS as error:
        report.find(str(error))
    return report


def _build(cfg: Config, folder: str) -> tuple[Any, Any]:
    """Build the runner, and a stock student that nothing has touched."""
    if not cfg.get('distillation') or not cfg.get('runner_type'):
        raise ConfigError(
            'the config does not distil: it needs `distillation` and '
            "runner_type='mmkd.DistillationRunner'."
        )
    cfg = copy.deepcopy(cfg)
    model = copy.deepcopy(cfg.model)
    cfg.work_dir = folder
    cfg.log_level = 'ERROR'
    cfg.resume = False
    if cfg.get('visualizer'):
        cfg.visualizer.vis_backends = []
        cfg.visualizer.name = f'doctor {folder}'
    cfg.experiment_name = f'doctor {folder}'
    runner = RUNNERS.build(cfg)
    if not isinstance(runner, Runner):
        raise ConfigError(f'{cfg.runner_type} is not a runner of MMEngine.')
    with DefaultScope.overwrite_default_scope('mmdet'):
        return runner, MODELS.build(model)


def _examine(
    runner: Any, stock: Any, report: Report, folder: str, evaluate: int
) -> None:
    if runner.distiller is None:
        raise ConfigError('the runner has attached no distiller.')
    check_loaded(runner, stock, report)
    if evaluate:
        check_precision(runner, evaluate, report)
    check_classes(runner, report)
    check_checkpoint_file(runner, stock, folder, report)
    patient = Patient.of(runner, stock, report)
    with watched(patient):
        describe_taps(patient)
    check_losses(patient)
    check_modes(patient)
    check_zero_weight(patient)
    check_padding(patient)
    check_class_order(patient)
    check_half_precision(patient)
    check_distributed(patient)
    check_cost(patient)
