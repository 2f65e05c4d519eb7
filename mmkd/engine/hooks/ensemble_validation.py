"""Evaluate the networks that train together as an ensemble."""

from collections.abc import Sequence

from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmkd.engine.distilled import distiller_of
from mmkd.errors import ConfigError
from mmkd.peers.ensemble import EnsembleDetector
from mmkd.registry import HOOKS
from mmkd.utils import isolated_random_state, nearest

from .peer_validation import evaluate


@HOOKS.register_module()
class EnsembleValidationHook(Hook):
    """Evaluate the ensemble of networks at each validation.

    Its metrics are logged as ``ensemble/<metric>`` beside the student's.
    ``save_best`` may name one of them: it then keeps the files of all
    networks.

    Args:
        members: Names of peers, and ``'student'``; by default all networks.
            It is best to leave out a peer that teaches.
        fusion: ``'boxes'`` or ``'logits'``, see
            :class:`~mmkd.peers.ensemble.EnsembleDetector`.
        iou_threshold: Boxes whose IoU is larger are merged. By default the
            threshold follows from the members' own NMS.

    Raises:
        ConfigError: If a member does not exist, or the members do not fit
            together.
    """

    priority = 'ABOVE_NORMAL'  # while the averaged weights (EMA) are in place

    def __init__(
        self,
        *,
        members: Sequence[str] | None = None,
        fusion: str = 'boxes',
        iou_threshold: float | None = None,
    ) -> None:
        self.members, self.fusion = members, fusion
        self.iou_threshold = iou_threshold
        self.ensemble: EnsembleDetector

    def before_train(self, runner: Runner) -> None:
        distiller = distiller_of(runner)
        networks = {'student': distiller.student}
        networks.update((n, p.model) for n, p in distiller.peers.items())
        names = networks if self.members is None else self.members
        for name in names:
            if name not in networks:
                raise ConfigError(
                    'EnsembleValidationHook.members: there is no network '
                    f'"{name}". {nearest(name, networks)}'
                )
        self.ensemble = EnsembleDetector(
            [networks[name] for name in names],
            fusion=self.fusion,
            iou_threshold=self.iou_threshold,
        )

    def after_val_epoch(
        self, runner: Runner, metrics: dict[str, float] | None = None
    ) -> None:
        if metrics is None or not hasattr(self, 'ensemble'):
            return
        with isolated_random_state():
            theirs = evaluate(runner, self.ensemble, 'ensemble')
        for key, value in theirs.items():
            metrics[f'ensemble/{key}'] = value
            runner.message_hub.update_scalar(f'val/ensemble/{key}', value)
