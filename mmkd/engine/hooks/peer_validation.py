"""Evaluate the networks that train beside the student."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.evaluator import Evaluator
from mmengine.hooks import Hook
from mmengine.runner import Runner, autocast

from mmkd.engine.distilled import distiller_of
from mmkd.registry import HOOKS
from mmkd.utils import isolated_random_state


@HOOKS.register_module()
class PeerValidationHook(Hook):
    """Evaluate every peer at each validation of the student.

    The metrics are logged beside the student's, as ``<peer>/<metric>``.
    ``save_best`` may name one of them: the best weights of the peer are then
    in its folder. Where the evaluator writes results (``outfile_prefix``),
    each peer's files are named ``<prefix>.<peer>…``. The runner registers the
    hook if there are peers.
    """

    priority = 'ABOVE_NORMAL'  # while the averaged weights (EMA) are in place

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        if metrics is None or not runner.train_loop:
            return
        for name, peer in distiller_of(runner).peers.items():
            with isolated_random_state():
                theirs = evaluate(runner, peer.model, name)
            for key, value in theirs.items():
                metrics[f'{name}/{key}'] = value
                runner.message_hub.update_scalar(f'val/{name}/{key}', value)


@torch.no_grad()
def evaluate(runner: Runner, model: Any, name: str) -> dict[str, float]:
    """Evaluate a detector on the validation data of a run.

    Args:
        runner: The runner, with a validation loop.
        model: The detector. Its modes of training are left as they were.
        name: The detector's name, for the names of files.

    Returns:
        The metrics by name.
    """
    loop = runner.val_loop
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        for batch in loop.dataloader:
            with autocast(enabled=getattr(loop, 'fp16', False)):
                results = model.val_step(batch)
            loop.evaluator.process(data_samples=results, data_batch=batch)
        with _own_files(loop.evaluator, name):
            return loop.evaluator.evaluate(len(loop.dataloader.dataset))
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _own_files(evaluator: Evaluator, name: str) -> Iterator[None]:
    """Let the metrics write beside the student's files, not over them."""
    writing = {
        metric: metric.outfile_prefix
        for metric in evaluator.metrics
        if getattr(metric, 'outfile_prefix', None)
    }
    try:
        for metric, prefix in writing.items():
            metric.outfile_prefix = f'{prefix}.{name}'
        yield
    finally:
        for metric, prefix in writing.items():
            metric.outfile_prefix = prefix
