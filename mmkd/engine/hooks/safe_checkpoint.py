"""Save checkpoints so that a run can be killed at any moment."""

import os.path as osp
from collections import deque
from pathlib import Path
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmkd.data.files import write_text
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS
from mmkd.utils import nearest


@HOOKS.register_module()
class SafeCheckpointHook(CheckpointHook):
    """A checkpoint hook that keeps the old file until the new one is complete.

    MMEngine's hook removes the oldest checkpoint and the former best one
    *before* it writes the new one, and rewrites ``last_checkpoint`` in place.
    If a run with ``max_keep_ckpts=1`` is killed in between, nothing is left.
    This hook saves the new checkpoint, points to it, then removes the old
    one, and each step is atomic. The options are those of
    :class:`mmengine.hooks.CheckpointHook`, which
    :class:`~mmkd.engine.runner.DistillationRunner` replaces by this one.
    """

    keep_ckpt_ids: deque[int]
    last_ckpt: str | None
    _judging = False
    _again: tuple[Any, ...] | None = None
    not_resumed = ('_former',)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._former: list[str] = []

    def before_train(self, runner: Runner) -> None:
        """Know what the run that is resumed has saved last, and not removed.

        MMEngine knows of no checkpoint until this process has saved one. It
        would not save it again when the validation that comes first is the
        best.
        """
        super().before_train(runner)
        if runner._resume:
            known = runner.message_hub.runtime_info
            self.last_ckpt = self.last_ckpt or known.get('last_ckpt')
            self._former = list(known.get('former_best', ()))
            self._remove_former(runner)

    def after_val(self, runner: Runner) -> None:
        """Save again what was saved before a validation that was the best.

        By now all hooks know the result. The former best goes last, because
        until then the latest checkpoint names it.
        """
        if self._again is not None:
            again, self._again = self._again, None
            runner.message_hub.update_info('former_best', self._former)
            self._save_checkpoint_with_step(runner, *again)
        self._remove_former(runner)

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict
    ) -> None:
        if self._judging:
            self._again = step, meta
            return
        kept = list(self.keep_ckpt_ids) if self.max_keep_ckpts > 0 else []
        if step not in kept:
            kept.append(step)
        if self.max_keep_ckpts > 0:
            # It lists those to be removed, too: a resumed run removes them.
            runner.message_hub.update_info('keep_ckpt_ids', kept)
        filename = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, filename)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        runner.save_checkpoint(
            self.out_dir,
            filename,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            pointer = Path(runner.work_dir, 'last_checkpoint')
            write_text(pointer, str(self.last_ckpt))
        if self.max_keep_ckpts > 0:
            if is_main_process():
                for outdated in kept[: -self.max_keep_ckpts]:
                    name = self.filename_tmpl.format(outdated)
                    for network in ('', *peers_of(runner)):
                        self._remove(osp.join(self.out_dir, network, name))
            kept = kept[-self.max_keep_ckpts :]
            self.keep_ckpt_ids = deque(kept, self.max_keep_ckpts)
            runner.message_hub.update_info('keep_ckpt_ids', kept)

    def _save_best_checkpoint(self, runner: Runner, metrics: dict) -> None:
        if self.save_best:
            metrics = self._judged(runner, metrics)
            if not metrics:
                return
        self.file_backend.remove = self._former.append
        self._judging = True
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            self._judging = False
            del self.file_backend.remove
        if self._again is None:
            self._remove_former(runner)

    def _judged(self, runner: Runner, metrics: dict) -> dict:
        """Add None for what is to be judged and was not measured.

        A metric gives nothing for a network that has detected nothing, and
        MMEngine's hook would end the training with a ``KeyError``.

        Raises:
            ConfigError: If ``save_best`` names a metric that is misspelt:
                others of the same network and kind are there.
        """
        metrics = dict(metrics)
        others = (*peers_of(runner), 'ensemble')
        own = [n for n in metrics if n.partition('/')[0] not in others]
        for key in self.key_indicators:
            if key in metrics or (key == 'auto' and own):
                continue
            kind = key.rpartition('/')[0]
            same = [n for n in metrics if n.rpartition('/')[0] == kind]
            if kind and same:
                raise ConfigError(
                    f'save_best: the validation gives no "{key}". '
                    f'{nearest(key, metrics)}'
                )
            runner.logger.warning(
                f'save_best: this validation gave no "{key}", as of a '
                'network that detects nothing; no best checkpoint is saved. '
                f'It gave {", ".join(metrics) or "nothing"}.'
            )
            if key == 'auto':  # it would choose a metric of another network
                return {}
            metrics[key] = None
        return metrics

    def _remove_former(self, runner: Runner) -> None:
        """Remove what was the best, in the folder of this run alone."""
        former, self._former = self._former, []
        many = getattr(self, 'best_ckpt_path_dict', {})
        best = (getattr(self, 'best_ckpt_path', None), *many.values())
        kept = {osp.basename(path) for path in best if path}
        for name in {osp.basename(path) for path in former} - kept:
            for network in ('', *peers_of(runner)):
                self._remove(osp.join(self.out_dir, network, name))
        runner.message_hub.update_info('former_best', [])

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)


def peers_of(runner: Runner) -> list[str]:
    """Return the names of the networks that train beside the student."""
    distiller = getattr(runner, 'distiller', None)
    return list(distiller.peers) if distiller is not None else []
