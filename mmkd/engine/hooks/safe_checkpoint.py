"""Save checkpoints so that a run can be killed at any moment."""

import os.path as osp
from collections import deque
from pathlib import Path

from mmengine.dist import is_main_process
from mmengine.hooks import CheckpointHook
from mmengine.runner import Runner

from mmkd.data.checkpoint_file import write_atomically
from mmkd.registry import HOOKS


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

    def _save_checkpoint_with_step(
        self, runner: Runner, step: int, meta: dict
    ) -> None:
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
            write_atomically(
                osp.join(runner.work_dir, 'last_checkpoint'),
                lambda path: Path(path).write_text(str(self.last_ckpt)),
            )
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
        former: list[str] = []
        self.file_backend.remove = former.append
        try:
            super()._save_best_checkpoint(runner, metrics)
        finally:
            del self.file_backend.remove
        if not self.save_best:
            return
        many = getattr(self, 'best_ckpt_path_dict', {})
        best = (getattr(self, 'best_ckpt_path', None), *many.values())
        for path in former:
            if path not in best:
                folder, name = osp.split(path)
                for network in ('', *peers_of(runner)):
                    self._remove(osp.join(folder, network, name))

    def _remove(self, path: str) -> None:
        if self.file_backend.isfile(path):
            self.file_backend.remove(path)


def peers_of(runner: Runner) -> list[str]:
    """Return the names of the networks that train beside the student."""
    distiller = getattr(runner, 'distiller', None)
    return list(distiller.peers) if distiller is not None else []
