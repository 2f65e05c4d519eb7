"""Hold the methods' shares of the gradient by their weights."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, cast

import torch
from mmengine.dist import all_reduce, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor
from torch.autograd.graph import GradientEdge

from mmkd.core.distiller import Distiller, Losses
from mmkd.core.gradients import gradient, gradient_edges
from mmkd.core.method import Method
from mmkd.core.reach import SCALE, wrappers_of
from mmkd.detectors.blank import blank_pass
from mmkd.detectors.record import StepRecord, tensors_in
from mmkd.engine.distilled import distiller_of
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS
from mmkd.utils import nearest

from .loss_check import scaler_of

Part = tuple[str, ...]
"""The paths of the modules at whose outputs gradients are measured."""
REST = ''
"""Stands among the methods for all losses that are not balanced."""
LARGEST_STEP = 10.0
"""The largest change of a factor by one measurement."""
PATIENCE = 3
"""Measurements in a row that cannot be used, after which the hook waits."""


@dataclass
class Measurement:
    """What was measured in a step, on its way from the device."""

    scales: dict[str, float]
    """The balanced methods of the step, with the factors that the losses of
    each had from schedules and from the balance."""
    parts: list[Part]
    values: Tensor
    """A row for the rest and for each method: the norm of the gradient at
    each part, then for each part above 0 where the losses depend on it in any
    process, and last the size of the losses."""


@HOOKS.register_module()
class GradientBalanceHook(Hook):
    r"""Hold each method's share of the gradient by its weight.

    A published weight suits the pair of networks that it was found for. This
    hook multiplies the weight of a method by a factor :math:`\lambda`, which
    begins at 1, and changes it whenever the method's share leaves
    :math:`\rho \pm \delta`:

    .. math::
        p_m = \frac{\|g_m\|}{\|g_\text{rest}\| + \sum_k \|g_k\|}, \qquad
        \lambda_m \leftarrow \lambda_m
        \frac{p^* (1 - p_m)}{p_m (1 - p^*)},

    with :math:`p^*` the nearer of :math:`\rho - \delta` and
    :math:`\rho + \delta`, and a change of 0.1 to 10 times. :math:`g_m` is the
    gradient of the method's losses, and :math:`g_\text{rest}` that of all
    losses that are not balanced, above all the task's. Both are taken with
    respect to the output of a part of the student: the modules that the
    method taps, if they are in the backbone or the neck, and otherwise the
    neck (without one, the backbone).

    The factor multiplies those of ``WeightScheduleHook``. :math:`\rho` is the
    share at a schedule's factor of 1; a warm-up or a decay therefore lowers
    the share, and is not made up for. A method of weight 0 stays at 0. Where a
    method ties networks that train together, its share is that in the student,
    and its factor counts for all of them. A method without a loss of its own
    (LAD) is left as it is.

    A measurement takes a backward pass from the losses to that part, for the
    rest and for each method: in every ``interval``-th iteration, and again in
    the next one after a change by the largest step. The training itself does
    not change, nothing waits for the result, and it is used from the next
    iteration on. Processes of a distributed run average the squared norms, so
    that all of them have the share of one process with the whole batch.
    ``balance/<method>.share`` and ``balance/<method>.factor``, with which it
    was measured, are logged.

    Source: Liao et al., "RT-DETRv4: Painlessly Furthering Real-Time Object
    Detection with Vision Foundation Models", 2025,
    https://arxiv.org/abs/2510.25257 (its adaptive weight, GAM). In the
    official code, RT-DETRs/RT-DETRv4, the share is another: that of the
    encoder's parameters in the L1 norm of the whole gradient, whichever loss
    it comes from. It is averaged over an epoch; the weight moves once an
    epoch, to the farther bound, in the first process only; and it is set back
    to a default where the share is 0, which it always is without distributed
    training, and in the last epochs.

    Args:
        share: :math:`\rho` of every method, above 0 and below 1; or a dict
            from the names of methods to the share of each, which leaves the
            others as they are.
        tolerance: :math:`\delta`, at least 0 and below the share.
        part: The path of a module of the student, such as
            ``'backbone.layer4'``, at whose output every share is measured.
        interval: Iterations from one measurement to the next, at least 1.
        smoothing: How much the average of earlier norms counts beside a new
            one, at least 0 and below 1. The first ones count alike.
        bounds: The least and the largest factor.

    Raises:
        ConfigError: If an option is outside its range, a method is unknown or
            has no loss, or the gradient does not arrive at the part.
        TapError: If the part does not exist.

    Example:
        >>> from mmkd.engine.hooks.gradient_balance import change
        >>> round(change(0.5, 0.2, 0.3), 3)  # 3/7 of the rest, not as large
        0.429
        >>> [change(share, 0.2, 0.3) for share in (0.0, 0.25, 1.0)]
        [10.0, 1.0, 0.1]
    """

    not_resumed = ('_runner', '_observing', '_edges', '_measurement', '_said')

    def __init__(
        self,
        *,
        share: float | Mapping[str, float] = 0.3,
        tolerance: float = 0.05,
        part: str | None = None,
        interval: int = 50,
        smoothing: float = 0.7,
        bounds: Sequence[float] = (1e-3, 1e3),
    ) -> None:
        shares = [*share.values()] if isinstance(share, Mapping) else [share]
        _check(
            'share',
            share,
            'above 0 and below 1',
            bool(shares) and all(0 < value < 1 for value in shares),
        )
        _check(
            'tolerance',
            tolerance,
            'at least 0 and below the share',
            0 <= tolerance < min(shares, default=1),
        )
        _check(
            'interval',
            interval,
            'a whole number of at least 1',
            type(interval) is int and interval >= 1,
        )
        _check(
            'smoothing',
            smoothing,
            'at least 0 and below 1',
            0 <= smoothing < 1,
        )
        least, most = bounds
        _check(
            'bounds',
            bounds,
            'a number above 0 up to 1, and a finite one from 1',
            0 < least <= 1 <= most < math.inf,
        )
        self.share, self.tolerance = share, tolerance
        self.part, self.interval = part, interval
        self.smoothing, self.least, self.most = smoothing, least, most
        self._runner: Any = None
        self._parts: dict[str, Part] = {}
        self._due = False
        self._observing = ExitStack()
        self._edges: Mapping[str, list[GradientEdge]] = {}
        self._measurement: Measurement | None = None
        self._norms: dict[str, dict[str, float]] = {}
        self._counts: dict[str, int] = {}
        self._unused = 0
        self._said: set[tuple[str, str]] = set()

    # ------------------------------------------------------ what is balanced

    def before_train(self, runner: Runner) -> None:
        self._runner = runner
        distiller = self._distiller
        methods = cast(Mapping[str, Method], distiller.methods)
        self._parts = {
            name: self._part_of(methods[name])
            for name in self._balanced(methods)
        }
        total = sum(self._share_of(n) + self.tolerance for n in self._parts)
        if total >= 1:
            raise ConfigError(
                f'GradientBalanceHook.share: {", ".join(self._parts)} would '
                f'have {total:.3g} of the gradient, with the tolerances, and '
                'leave nothing to the task. Give each of them a smaller '
                f'share, such as {0.5 / len(self._parts):.2g}.'
            )
        distiller.observers.append(self.observe)

    def _balanced(self, methods: Mapping[str, Method]) -> list[str]:
        """Return the names of the methods that are to be balanced."""
        lossless = [n for n, m in methods.items() if not has_losses(type(m))]
        if not isinstance(self.share, Mapping):
            for name in lossless:
                self._runner.logger.warning(
                    f'GradientBalanceHook leaves "{name}" as it is: '
                    f'{_without_loss(type(methods[name]))}'
                )
            return [name for name in methods if name not in lossless]
        for name in self.share:
            if name not in methods:
                raise ConfigError(
                    f'GradientBalanceHook: there is no method "{name}". '
                    f'{nearest(name, methods)}'
                )
            if name in lossless:
                raise ConfigError(
                    f'GradientBalanceHook: "{name}" cannot have a share: '
                    f'{_without_loss(type(methods[name]))} Leave it out.'
                )
        return list(self.share)

    def _share_of(self, name: str) -> float:
        share = self.share
        return share[name] if isinstance(share, Mapping) else share

    def _part_of(self, method: Method) -> Part:
        """Return the deepest modules that a method and the task reach."""
        resolved = StepRecord(self._distiller.student).resolved
        if self.part is not None:
            return (resolved(self.part),)
        paths = tuple(dict.fromkeys(map(resolved, method.student_paths)))
        roots = {path.partition('.')[0] for path in paths}
        if paths and roots <= {'backbone', 'neck'}:
            return paths
        return (resolved('neck'),)

    @property
    def _distiller(self) -> Distiller:
        return distiller_of(self._runner)

    # ------------------------------------------------------------- measuring

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: object = None
    ) -> None:
        self._due = self._due or runner.iter % self.interval == 0
        if self._due and self._parts:
            paths = [path for part in self._parts.values() for path in part]
            self._edges = self._observing.enter_context(
                gradient_edges(self._distiller.student, paths)
            )

    def close(self) -> None:
        """Leave the student as it was."""
        self._observing.close()

    def observe(
        self, task: Losses, distilled: dict[str, dict[str, Tensor]]
    ) -> None:
        """Measure the gradients if that is due, without waiting for them.

        Args:
            task: The networks' own losses, by name.
            distilled: Each active method's losses, by name.
        """
        self.close()
        edges, self._edges = self._edges, {}
        active = [name for name in self._parts if name in distilled]
        if not (self._due and active):
            return
        losses = {n: tuple(part.values()) for n, part in distilled.items()}
        own = tensors_in([v for k, v in task.items() if 'loss' in k])
        others = [losses[name] for name in losses if name not in active]
        rows = [sum(others, own), *(losses[name] for name in active)]
        parts = list(dict.fromkeys(self._parts[name] for name in active))
        for part in parts:
            self._check_edges(part, edges)
        if not _alike(rows):
            return
        self._due = False
        self._measurement = Measurement(
            {name: self._distiller.factor(name) for name in active},
            parts,
            self._values(rows, parts, edges),
        )

    def _values(
        self,
        rows: Sequence[Sequence[Tensor]],
        parts: Sequence[Part],
        edges: Mapping[str, Sequence[GradientEdge]],
    ) -> Tensor:
        """Return :attr:`Measurement.values`, equal in all processes."""
        paths = [path for part in parts for path in part]
        flat = [edge for path in paths for edge in edges[path]]
        scale = self._loss_scale(next(x.device for row in rows for x in row))
        values = []
        for losses in rows:
            scaled = [scale * loss for loss in losses]
            found = gradient(scaled, flat, self._distiller.student)
            arrived = {
                id(edge): g
                for edge, g in zip(flat, found, strict=True)
                if g is not None
            }
            here = [
                [
                    arrived[id(edge)]
                    for path in part
                    for edge in edges[path]
                    if id(edge) in arrived
                ]
                for part in parts
            ]
            values += [_square(each, scale) for each in here]
            values += [scale.new_tensor(bool(each)) for each in here]
            values.append(_size(losses, scale))
        matrix = torch.stack(values).view(len(rows), -1)
        all_reduce(matrix, 'mean')
        norms = matrix[:, : len(parts)]
        norms.sqrt_().div_(scale)
        return matrix

    def _loss_scale(self, device: torch.device) -> Tensor:
        """Return what losses are multiplied by, lest gradients vanish.

        With a gradient scaler that is as much as in the training.
        """
        one = torch.ones((), device=device)
        wrappers = wrappers_of(self._runner.optim_wrapper)
        scalers = [s for s in map(scaler_of, wrappers) if s is not None]
        return scalers[0].scale(one) if scalers else SCALE * one

    def _check_edges(
        self, part: Part, edges: Mapping[str, Sequence[GradientEdge]]
    ) -> None:
        """Refuse a part whose output has no gradient."""
        if any(edges[path] for path in part):
            return
        student = self._distiller.student
        device = next(student.parameters()).device
        for path in part:
            blank_pass(student, part, device).features(path)
        raise ConfigError(
            f'GradientBalanceHook: the output of {_quoted(part)} has no '
            'gradient, because it and all before it are frozen, or it lies '
            'within a checkpointed block. Set `part` to a module that trains, '
            "such as part='neck'."
        )

    # ------------------------------------------------------------- balancing

    def after_train_iter(
        self, runner: Runner, *_: object, **__: object
    ) -> None:
        # By now MMEngine has waited for the step's losses.
        measurement, self._measurement = self._measurement, None
        if measurement is not None:
            self._use(measurement)

    def _use(self, measurement: Measurement) -> None:
        """Change the factors by what was measured."""
        rows = measurement.values.tolist()
        count = len(measurement.parts)
        if not all(math.isfinite(x) for row in rows for x in row[:count]):
            self._skip()
            return
        self._unused = 0
        for name, row in zip((REST, *measurement.scales), rows, strict=True):
            self._check_arrives(name, measurement.parts, row)
            self._average(name, measurement, row[:count])
        names = list(measurement.scales)
        for name in names:
            self._log(name, self._share(name, names))
        for name in names:  # each beside what the ones before have become
            self._change(name, self._share(name, names))

    def _skip(self) -> None:
        """Try again, some times: a gradient scaler has to find its scale."""
        self._unused += 1
        self._due = self._unused < PATIENCE
        if not self._due:
            self._warn_once(
                REST,
                'finite',
                f'the gradients of {PATIENCE} measurements in a row were NaN '
                'or infinite, and were not used. All weights stay as they '
                'are until one is finite.',
            )

    def _check_arrives(
        self, name: str, parts: Sequence[Part], row: Sequence[float]
    ) -> None:
        """Refuse a part at which the gradient never arrives."""
        arrives, size = row[len(parts) : -1], row[-1]
        if name in self._counts:
            return
        for part, found in zip(parts, arrives, strict=True):
            if found or (name and (part != self._parts[name] or not size)):
                continue
            whose = f'of "{name}"' if name else 'of other losses'
            raise ConfigError(
                f'GradientBalanceHook: no gradient {whose} arrives at '
                f'{_quoted(part)}, so there is no share to hold. Set `part` '
                'to a module before all that the method reads and before the '
                "student's heads, such as part='backbone.layer2'."
            )

    def _average(
        self, name: str, measurement: Measurement, norms: Sequence[float]
    ) -> None:
        """Average the norms at a schedule's and the balance's factor of 1."""
        scale = measurement.scales.get(name, 1.0)
        count = self._counts.get(name, 0)
        weight = max(1 - self.smoothing, 1 / (count + 1))
        known = self._norms.setdefault(name, {})
        for part, norm in zip(measurement.parts, norms, strict=True):
            new = norm / scale
            old = known.get(_quoted(part), new)
            known[_quoted(part)] = old + weight * (new - old)
        self._counts[name] = count + 1

    def _share(self, name: str, names: Iterable[str]) -> float:
        """Return a method's share among those that were measured."""
        part, factors = _quoted(self._parts[name]), self._distiller.balances
        norms = {
            each: factors[each] * self._norms[each][part] for each in names
        }
        total = self._norms[REST][part] + sum(norms.values())
        return norms[name] / total if total else 0.0

    def _change(self, name: str, share: float) -> None:
        """Change a method's factor by its share."""
        middle, factors = self._share_of(name), self._distiller.balances
        low, high = middle - self.tolerance, middle + self.tolerance
        step, old = change(share, low, high), factors[name]
        new = min(max(step * old, self.least), self.most)
        factors[name] = new
        if new != old and step in (LARGEST_STEP, 1 / LARGEST_STEP):
            self._due = True
        if not share:
            self._warn_once(
                name,
                'zero',
                f'"{name}" has no gradient at {_quoted(self._parts[name])}. '
                f'Its weight grows up to {self.most:g} times the one of the '
                'config.',
            )
        elif new != step * old:
            self._warn_once(
                name,
                'bound',
                f'the weight of "{name}" has reached {new:g} times the one '
                f'of the config, a bound of the hook, and its share is '
                f'{share:.3g} instead of {middle:g}. Change its loss_weight, '
                'or `bounds`.',
            )

    def _log(self, name: str, share: float) -> None:
        hub = self._runner.message_hub
        hub.update_scalar(f'train/balance/{name}.share', share)
        factor = self._distiller.balances[name]
        hub.update_scalar(f'train/balance/{name}.factor', factor)

    def _warn_once(self, name: str, what: str, text: str) -> None:
        if (name, what) not in self._said:
            self._said.add((name, what))
            self._runner.logger.warning(f'GradientBalanceHook: {text}')


def change(share: float, low: float, high: float) -> float:
    """Return by how much a weight changes, from 0.1 to 10 times.

    Args:
        share: The share that its method has.
        low: The least share that it may have.
        high: The largest.
    """
    if low <= share <= high:
        return 1.0
    aim = low if share < low else high
    if not share:
        return LARGEST_STEP
    factor = aim * (1 - share) / (share * (1 - aim))
    return min(max(factor, 1 / LARGEST_STEP), LARGEST_STEP)


def has_losses(method: type[Method]) -> bool:
    """Return whether a method has losses, and does not only steer."""
    return method.forward is not Method.forward


def _without_loss(method: type[Method]) -> str:
    return (
        f"{method.__name__} steers the student's own losses and has none of "
        'its own, so its weight only switches it on or off.'
    )


def _check(option: str, value: object, must_be: str, valid: bool) -> None:
    if not valid:
        raise ConfigError(
            f'GradientBalanceHook.{option} must be {must_be}, got {value!r}'
        )


def _quoted(part: Part) -> str:
    return ', '.join(f'"{path}"' for path in part)


def _alike(rows: Sequence[Sequence[Tensor]]) -> bool:
    """Return whether all processes can take the same backward passes.

    Otherwise some would wait for others (SyncBN).
    """
    if not is_distributed():
        return True
    can = torch.tensor([float(any(x.requires_grad for x in r)) for r in rows])
    mean = can.clone()
    all_reduce(mean, 'mean')
    return torch.equal(mean, can)


def _square(gradients: Sequence[Tensor], zero: Tensor) -> Tensor:
    squares = [
        torch.linalg.vector_norm(g, dtype=torch.float32).square()
        for g in gradients
    ]
    return sum(squares, torch.zeros_like(zero))


def _size(losses: Sequence[Tensor], zero: Tensor) -> Tensor:
    sizes = [loss.detach().abs().sum().float() for loss in losses]
    return sum(sizes, torch.zeros_like(zero))
