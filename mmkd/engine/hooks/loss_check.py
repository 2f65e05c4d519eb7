"""Watch for losses that are not finite, or that are always 0."""

import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict
from mmengine.runner import Runner
from torch import Tensor

from mmkd.core.distiller import Losses
from mmkd.engine.distilled import distiller_of
from mmkd.errors import ConfigError, NonFiniteLossError
from mmkd.registry import HOOKS


@HOOKS.register_module()
class LossCheckHook(Hook):
    """Stop at a distillation loss that is not finite; warn if one stays 0.

    Where networks train together, their own losses are watched as well, and
    the network that diverges is named.

    Training stops before the optimiser's step, so that the weights and the
    last checkpoint are intact. On a GPU the result of the check is copied to
    the host while the backward pass runs, and costs no waiting of its own.

    Args:
        patience: After this number of iterations, at least 1, the hook warns
            once of each loss that was exactly 0 in all of them.

    Raises:
        ConfigError: If ``patience`` is below 1.
    """

    priority = 'VERY_LOW'

    def __init__(self, *, patience: int = 50) -> None:
        if patience < 1:
            raise ConfigError(
                f'LossCheckHook.patience must be at least 1, got {patience}.'
            )
        self.patience = patience
        self._peers: tuple[str, ...] = ()
        self._names: list[str] = []
        self._owners: dict[str, str] = {}
        self._finite: Tensor | None = None
        self._copied: torch.cuda.Event | None = None
        self._largest: dict[str, Tensor] = {}
        self._seen = 0

    def before_train(self, runner: Runner) -> None:
        distiller = distiller_of(runner)
        self._peers = tuple(getattr(distiller, 'peers', ()))
        distiller.observers.append(self.observe)
        wrapper = runner.optim_wrapper
        several = isinstance(wrapper, OptimWrapperDict)
        for each in wrapper.values() if several else [wrapper]:
            each.optimizer.register_step_pre_hook(lambda *_: self.check())

    def observe(
        self, task: Losses, distilled: dict[str, dict[str, Tensor]]
    ) -> None:
        """Record the losses of a step without waiting for their values.

        Args:
            task: The networks' own losses, by name.
            distilled: Each method's losses, by name.
        """
        losses = {k: v for part in distilled.values() for k, v in part.items()}
        own = task if self._peers else {}
        for name, loss in own.items():
            if 'loss' in name:
                levels = loss if isinstance(loss, list) else [loss]
                losses[name] = torch.stack([v.mean() for v in levels]).sum()
        if not losses:
            return
        values = torch.stack([v.detach() for v in losses.values()])
        self._names = list(losses)
        self._owners = {n: self._owner(n) for n in own}
        self._finite = values.isfinite().to('cpu', non_blocking=True)
        if values.is_cuda:
            self._copied = torch.cuda.Event()
            self._copied.record()
        if self._seen < self.patience:
            for name, value in zip(losses, values.abs(), strict=True):
                if name in own:
                    continue
                largest = self._largest.get(name, value)
                self._largest[name] = torch.maximum(largest, value)

    def check(self) -> None:
        """Check the losses of the last step.

        Raises:
            NonFiniteLossError: If one is not finite; the message names it.
        """
        if self._finite is None:
            return
        if self._copied is not None:
            self._copied.synchronize()
        finite, self._finite = self._finite.tolist(), None
        broken = [
            name
            for name, ok in zip(self._names, finite, strict=True)
            if not ok
        ]
        if broken:
            raise NonFiniteLossError(self._explained(broken))

    def _owner(self, name: str) -> str:
        """Return the network whose own loss has this name."""
        peer = name.partition('.')[0]
        return peer if peer in self._peers else 'student'

    def _explained(self, broken: list[str]) -> str:
        own = [name for name in broken if name in self._owners]
        # A broken network also breaks the losses of those it teaches.
        names = own or broken
        remedy = (
            'Lower the learning rate or the loss_weight of '
            f'"{names[0].partition(".")[0]}", warm it up '
            '(mmkd.WeightScheduleHook), or clip gradients.'
        )
        if own:
            networks = dict.fromkeys(self._owners[name] for name in own)
            listed = ', '.join(f'"{network}"' for network in networks)
            remedy = (
                f'It is {listed} that diverged: lower its learning rate (that '
                'of a peer is in its own optim_wrapper) or clip gradients.'
            )
        return (
            f'{", ".join(names)} is NaN or infinite; training stopped before '
            'the optimiser used it, and the last checkpoint is intact. '
            f'{remedy}'
        )

    def after_train_iter(
        self, runner: Runner, *_: object, **__: object
    ) -> None:
        # A gradient scaler skips the optimiser's step, and the check with it.
        self.check()
        self._seen += 1
        if self._seen == self.patience:
            for name, largest in self._largest.items():
                if largest.item() == 0:
                    runner.logger.warning(
                        f'{name} was exactly 0 in each of the first '
                        f'{self.patience} iterations: it teaches nothing. Is '
                        'the teacher the same network as the student, or a '
                        'worse one, or is a weight in the config 0?'
                    )
            self._largest.clear()
