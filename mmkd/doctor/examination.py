"""The examination: build the run, stop at its first iteration, look."""

import copy
import tempfile
from collections.abc import Callable
from typing import Any

from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from mmkd.data.checkpoint_loader import safe_checkpoints, trusts
from mmkd.detectors.record import replaced
from mmkd.engine.runner import check_runner, runner_class
from mmkd.errors import CheckpointError, ConfigError, DataError, TapError

from .balance import check_balance
from .conditions import check_class_order, check_half_precision, check_padding
from .data import check_data
from .distributed import check_distributed
from .losses import check_losses
from .networks import check_classes, check_modes, check_precision, watched
from .pair import check_pair
from .patient import Patient
from .report import Report
from .step import check_cost, check_zero_weight, describe_taps
from .weights import check_checkpoint_file, check_loaded, check_starts

USER_ERRORS = (CheckpointError, ConfigError, DataError, TapError)


def diagnose(
    cfg: Config,
    *,
    evaluate: int = 0,
    sample: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> Report:
    """Examine a config that distils.

    The run is built as its runner builds it, up to the moment when it would
    train. One batch of its train loader goes through the plain and the
    distilled step. Only a temporary folder is written to.

    Args:
        cfg: The config, with ``runner_type`` and ``distillation``.
        evaluate: How many validation images the teacher is evaluated on.
        sample: How many images are decoded before (see :func:`check_data`).
        progress: Is called with what is examined next.

    Returns:
        A report of what was seen and what is wrong.
    """
    report = Report()
    try:
        progress('the data')
        check_data(cfg, report, sample)
        if report.stops:
            report.say('Networks', 'not examined: mend the data first')
            return report
        with tempfile.TemporaryDirectory() as folder:
            progress('the config')
            runner, stock = _build(cfg, folder)

            def examine() -> None:
                _examine(runner, stock, report, folder, evaluate, progress)

            with (
                safe_checkpoints(trusts(cfg)),
                replaced(runner.train_loop, 'run', examine),
            ):
                check_starts(stock)
                runner.train()
    except USER_ERRORS as error:
        report.find(str(error))
    except Exception as error:
        if not report.stops:
            raise
        # Most likely because of them.
        report.find(f'then it fails with {type(error).__name__}: {error}')
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
    check_runner(cfg, 'the config')
    runner = runner_class(cfg).from_cfg(cfg)
    with DefaultScope.overwrite_default_scope('mmdet'):
        return runner, MODELS.build(model)


def _examine(
    runner: Any,
    stock: Any,
    report: Report,
    folder: str,
    evaluate: int,
    progress: Callable[[str], None],
) -> None:
    if runner.distiller is None:
        raise ConfigError('the runner has attached no distiller.')
    progress('weights and classes')
    check_loaded(runner, stock, report)
    check_pair(runner, report)
    if evaluate:
        check_precision(runner, evaluate, report)
    check_classes(runner, report)
    check_checkpoint_file(runner, stock, folder, report)
    progress('the losses of a step')
    patient = Patient.of(runner, stock, report)
    with watched(patient):
        describe_taps(patient)
    check_losses(patient)
    progress('the balance over a few steps')
    check_balance(patient)
    progress('weight 0, padding, precision')
    check_modes(patient)
    check_zero_weight(patient)
    check_padding(patient)
    check_class_order(patient)
    check_half_precision(patient)
    check_distributed(patient)
    progress('the cost')
    check_cost(patient)
