"""Watch for what is not finite, and for losses that are always 0."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, is_distributed
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd.core.distiller import Losses
from mmkd.core.reach import wrappers_of
from mmkd.detectors.record import tensors_in
from mmkd.engine.finite import finite, how_to_go_on, in_words, shows_finite
from mmkd.errors import ConfigError, NonFiniteError, NonFiniteLossError
from mmkd.registry import HOOKS

SKIPPED = 50
"""A gradient scaler that has skipped as many steps in a row does not recover:
it has halved its scale each time, and fewer halvings take it below 1."""
GradScaler = getattr(torch.amp, 'GradScaler', torch.cuda.amp.GradScaler)

GRADIENT = 'the gradient'

Watched = str | nn.Parameter
"""The name of a loss, or the parameter whose gradient is watched."""


class _Late:
    """Bools that are on their way from a device to the host."""

    def __init__(self, watched: list[Watched], ok: Tensor, steps: int) -> None:
        self.watched, self.steps = watched, steps
        self.at_once = is_host(ok.device)
        self._ok = ok.to('cpu', non_blocking=ok.is_cuda)
        self._event = torch.cuda.Event() if ok.is_cuda else None
        if self._event is not None:
            self._event.record()

    def read(self) -> list[bool]:
        """Wait until they have arrived; the last one is that of all."""
        if self._event is not None:
            self._event.synchronize()
        return self._ok.tolist()


def is_host(device: torch.device) -> bool:
    """Return whether values on a device can be read without waiting."""
    return device.type == 'cpu'


@HOOKS.register_module()
class LossCheckHook(Hook):
    """Stop at what is NaN or infinite; warn of a loss that stays 0.

    Watched are the losses of the student, its peers and the methods (those
    with "loss" in their names, which are added up), and the gradients that an
    optimiser is about to use. Where networks train together, the one that
    diverges is named. All processes of a distributed run stop together.

    On a CPU, training stops before the optimiser's step. Of the gradient of a
    weight it reads a part that shows any output whose gradient is not finite
    (``mmkd.engine.finite.shows_finite``), and all of it only then; a single
    number elsewhere stops the next iteration, whose losses it makes NaN, and
    no checkpoint takes it. On a GPU all is read, but nothing
    waits for the check: losses are copied to the host during the backward
    pass, and stop the step in a run of one process; what is known later is
    read at the end of the iteration, when MMEngine has read the losses, and
    the error says that the optimiser has used it.

    In mixed precision, a gradient scaler skips the steps whose gradients are
    not finite and lowers its scale. These are no error, but losses that are
    not finite are, and so are 50 steps in a row that are skipped.

    Args:
        patience: After this number of iterations, at least 1, the hook warns
            once of each loss that was exactly 0 in all of them.

    Raises:
        ConfigError: If ``patience`` is below 1.
    """

    priority = 'LOW'  # before a checkpoint is saved
    not_resumed = (
        *('_noted', '_late', '_norms', '_found', '_stepped', '_shared'),
        *('_steps', '_undo', '_scaled', '_own'),
    )

    def __init__(self, *, patience: int = 50) -> None:
        if patience < 1:
            raise ConfigError(
                f'LossCheckHook.patience must be at least 1, got {patience}.'
            )
        self.patience = patience
        self._runner: Any = None
        self._peers: tuple[str, ...] = ()
        self._own: tuple[str, ...] = ()
        self._noted: list[tuple[list[Watched], Tensor]] = []
        self._late: list[_Late] = []
        self._norms: dict[int, Tensor] = {}
        self._found: dict[int, Tensor] = {}
        self._stepped: set[int] = set()
        self._steps = 0
        self._shared = False
        self._scaled: list[tuple[OptimWrapper, Any]] = []
        self._skipped: list[int] = []
        self._undo: list[Callable[[], object]] = []
        self._largest: dict[str, Tensor] = {}
        self._seen = 0

    # ------------------------------------------------------ what is watched

    def before_train(self, runner: Runner) -> None:
        self._runner = runner
        distiller = getattr(runner, 'distiller', None)
        if distiller is None:
            wrapped = is_model_wrapper(runner.model)
            model = runner.model.module if wrapped else runner.model
            handle = model.register_forward_hook(self._observe_output)
            self._undo.append(handle.remove)
        else:
            self._peers = tuple(getattr(distiller, 'peers', ()))
            distiller.observers.append(self.observe)
        wrappers = wrappers_of(runner.optim_wrapper)
        scaled = ((each, scaler_of(each)) for each in wrappers)
        self._scaled = [pair for pair in scaled if pair[1] is not None]
        self._skipped = [0] * len(self._scaled)
        for wrapper in wrappers:
            handle = wrapper.optimizer.register_step_pre_hook(self._before)
            self._undo.append(handle.remove)
            self._remember_norm(wrapper)

    def close(self) -> None:
        """Leave the model and the optimisers as they were."""
        while self._undo:
            self._undo.pop()()

    def _observe_output(self, _: nn.Module, __: Any, output: Any) -> None:
        """Observe the losses of a model that has no distiller."""
        if isinstance(output, Mapping) and torch.is_grad_enabled():
            self.observe(dict(output), {})

    def observe(
        self, task: Losses, distilled: dict[str, dict[str, Tensor]]
    ) -> None:
        """Record the losses of a step without waiting for their values.

        Args:
            task: The networks' own losses, by name.
            distilled: Each method's losses, by name.
        """
        methods = {
            k: v.detach()
            for part in distilled.values()
            for k, v in part.items()
        }
        own = {
            name: torch.stack([part.detach().mean() for part in parts]).sum()
            for name, loss in task.items()
            if 'loss' in name and (parts := tensors_in(loss))
        }
        self._own = tuple(own)
        losses = {**methods, **own}
        if not losses:
            return
        values = torch.stack(list(losses.values()))
        self._noted.append(([*losses], values.isfinite()))
        if not (is_host(values.device) or is_distributed()):
            self._share()  # it is copied during the backward pass
        if self._seen < self.patience:
            for name, value in zip(methods, values.abs(), strict=False):
                largest = self._largest.get(name, value)
                self._largest[name] = torch.maximum(largest, value)

    def _remember_norm(self, wrapper: OptimWrapper) -> None:
        """Keep the norm that clipping computes, which saves another one."""
        clip = getattr(wrapper, 'clip_func', None)
        if clip is not torch.nn.utils.clip_grad_norm_:
            return
        number = id(wrapper.optimizer)

        def remembered(*args: Any, **kwargs: Any) -> Tensor:
            self._norms[number] = norm = clip(*args, **kwargs)
            return norm

        wrapper.clip_func = remembered

        self._undo.append(
            functools.partial(setattr, wrapper, 'clip_func', clip)
        )

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Check what an optimiser is about to use."""
        found = getattr(optimizer, 'found_inf', None)
        if found is not None:  # it skips the step itself
            self._found[id(optimizer)] = found.to(
                'cpu', non_blocking=found.is_cuda
            )
            return
        used = [
            parameter
            for group in optimizer.param_groups
            for parameter in group['params']
            if parameter.grad is not None
        ]
        at_once = all(is_host(p.device) for p in used[:1])
        if not (at_once or is_distributed()):
            self.check()
        norm = self._norms.pop(id(optimizer), None)
        if norm is None or (at_once and not norm.isfinite()):
            gradients = [parameter.grad for parameter in used]
            if at_once and shows_finite(gradients):
                ok = torch.ones(1, dtype=torch.bool)
                self._noted.append(([GRADIENT], ok))
            else:
                self._noted.append((used, finite(gradients)))
        elif not at_once:
            self._noted.append(([f'{GRADIENT} norm'], norm.isfinite()[None]))
        self._share()
        if at_once:
            self.check()
        self._stepped.add(id(optimizer))
        self._steps += 1

    # ------------------------------------------------------- what was found

    def _share(self) -> None:
        """Send what was noted to the host, and to the other processes."""
        noted, self._noted, self._shared = self._noted, [], True
        watched = [each for names, _ in noted for each in names]
        parts = [ok for _, ok in noted if len(ok)]
        if not (parts or is_distributed()):
            return
        ok = torch.cat(parts) if parts else torch.ones(1, dtype=torch.bool)
        whole = ok.all()[None].int()
        all_reduce(whole, 'min')
        answers = torch.cat([ok, whole.bool()])
        self._late.append(_Late(watched, answers, self._steps))

    def check(self) -> None:
        """Read what was watched, and stop if something is not finite.

        Raises:
            NonFiniteLossError: If a loss is not finite; the message names it.
            NonFiniteError: If a gradient is not finite.
        """
        late, self._late = self._late, []
        for each in late:
            *oks, whole = each.read()
            if not whole:
                pairs = zip(each.watched, oks, strict=False)
                broken = [
                    self._named(watched) for watched, ok in pairs if not ok
                ]
                raise self._error(broken, used=self._steps > each.steps)

    def _named(self, watched: Watched) -> str:
        if isinstance(watched, str):
            return watched
        for name, each in self._runner.model.named_parameters():
            if each is watched:
                return f'{GRADIENT} of {name.removeprefix("module.")}'
        return f'{GRADIENT} of a weight without a name'

    def _owner(self, name: str) -> str:
        """Return the network whose own loss has this name."""
        peer = name.partition('.')[0]
        return peer if peer in self._peers else 'student'

    def _error(self, broken: list[str], *, used: bool) -> NonFiniteError:
        """Say what is not finite in any of the processes."""
        by_process = all_gather_object(broken)
        names = list(dict.fromkeys(n for each in by_process for n in each))
        losses = [name for name in names if not name.startswith(GRADIENT)]
        own = [name for name in losses if name in self._own]
        # A broken network also breaks the losses of those it teaches.
        named = own or losses or names
        where = [
            str(number)
            for number, each in enumerate(by_process)
            if any(name in named for name in each)
        ]
        text = in_words(named) if named is names else ', '.join(named)
        text += ' is NaN or infinite'
        if len(where) < len(by_process):
            text += f' in process {" and ".join(where)}'
        when = 'after the optimiser had' if used else 'before the optimiser'
        text += (
            f'; training stopped {when} used it. {self._situation()}'
            f'{self._remedy(own, losses)}'
        )
        return (NonFiniteLossError if losses else NonFiniteError)(text)

    def _situation(self) -> str:
        """Say what the weights are, and what they can be replaced with."""
        state = getattr(self._runner, 'finite', None)
        if state is None:
            return ''
        wrapped = is_model_wrapper(self._runner.model)
        model = self._runner.model.module if wrapped else self._runner.model
        problems = state.problems(model.state_dict(), {})
        weights = (
            f'Not finite in memory are also {in_words(problems)}. '
            if problems
            else ''
        )
        return f'{weights}{how_to_go_on(self._runner.finite_checkpoint)} '

    def _remedy(self, own: Sequence[str], losses: Sequence[str]) -> str:
        if own and self._peers:
            networks = dict.fromkeys(map(self._owner, own))
            listed = ', '.join(f'"{network}"' for network in networks)
            return (
                f'It is {listed} that diverged: lower its learning rate (that '
                'of a peer is in its own optim_wrapper) or clip gradients.'
            )
        if losses and not own:
            return (
                'Lower the learning rate or the loss_weight of '
                f'"{losses[0].partition(".")[0]}", warm it up '
                '(mmkd.WeightScheduleHook), or clip gradients.'
            )
        return 'Lower the learning rate, warm it up, or clip gradients.'

    def after_train_iter(
        self, runner: Runner, *_: object, **__: object
    ) -> None:
        self.check()
        if not self._shared:  # no optimiser has taken a step
            self._share()
            if self._late and self._late[-1].at_once:
                self.check()
        self._count_skipped()
        self._stepped.clear()
        self._shared = False
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

    def after_train(self, runner: Runner) -> None:
        self.check()

    def _count_skipped(self) -> None:
        """Count the steps in a row that a gradient scaler has skipped.

        Raises:
            NonFiniteError: If there are too many.
        """
        for index, (wrapper, scaler) in enumerate(self._scaled):
            number = id(wrapper.optimizer)
            found = self._found.pop(number, None)
            if number in self._stepped or (found is not None and not found):
                self._skipped[index] = 0
            elif wrapper.should_update():
                self._skipped[index] += 1
            if self._skipped[index] >= SKIPPED:
                raise NonFiniteError(
                    f'{GRADIENT} was NaN or infinite in {SKIPPED} optimiser '
                    'steps in a row, all of which were skipped, while the '
                    'losses were finite: the loss scale has fallen to '
                    f'{scaler.get_scale():g}, and does not help. '
                    f"{self._situation()}Train in bfloat16 (dtype='bfloat16' "
                    'in optim_wrapper) or without mixed precision.'
                )


def scaler_of(wrapper: OptimWrapper) -> Any:
    """Return the gradient scaler of a wrapper, if it has one at work."""
    for value in vars(wrapper).values():
        if isinstance(value, GradScaler) and value.is_enabled():
            return value
    return None
