"""The run that is examined, at its first iteration, and its steps."""

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.core.distiller import Distiller, Losses
from mmkd.data.batch import Batch
from mmkd.detectors.record import replaced
from mmkd.engine.checkpoint import ATTACHED
from mmkd.utils import isolated_random_state

from .report import Report

SEED = 0


@dataclass
class Step:
    """The losses of one step, still with their graph."""

    task: dict[str, Tensor]
    """The stock losses by name, each a scalar."""
    distilled: dict[str, dict[str, Tensor]]
    """The weighted losses of each method."""
    total: Tensor
    random_state: Tensor
    """PyTorch's random state after the step."""


@dataclass
class Patient:
    """A run whose training is about to begin."""

    runner: Any
    stock: Any
    """A stock student, built from the config, with the run's weights."""
    raw: Any
    """A batch of the train loader."""
    inputs: Tensor
    samples: Sequence[DetDataSample]
    report: Report

    @classmethod
    def of(cls, runner: Any, stock: nn.Module, report: Report) -> 'Patient':
        """Take the first batch of a run's train loader."""
        raw = next(iter(runner.train_loop.dataloader))
        _hold_unlabelled(runner)
        runner.distiller.student.train()
        inputs, samples = preprocessed(runner.distiller.student, raw)
        stock = stock.to(inputs.device).train()
        return cls(runner, stock, raw, inputs, samples, report)

    def on(self, raw: Any) -> 'Patient':
        """Return the same patient with another batch."""
        _hold_unlabelled(self.runner)
        inputs, samples = preprocessed(self.student, raw)
        other = copy.copy(self)
        other.raw, other.inputs, other.samples = raw, inputs, samples
        return other

    def __post_init__(self) -> None:
        self.state = cloned(self.student)
        # Some heads count what they have seen, in plain attributes.
        self.counts = {
            model: noted(model) for model in (self.student, self.stock)
        }

    @property
    def distiller(self) -> Distiller:
        return self.runner.distiller

    @property
    def student(self) -> Any:
        return self.distiller.student

    @property
    def device(self) -> torch.device:
        return self.inputs.device

    @property
    def batch(self) -> Batch:
        return Batch(self.inputs, self.samples)

    @property
    def networks(self) -> dict[str, Any]:
        """The teachers and the peers, by name."""
        return {
            name: part.model
            for part_of in (self.distiller.networks, self.distiller.peers)
            for name, part in part_of.items()
        }

    @property
    def steers(self) -> bool:
        """Whether a method changes the student's own losses."""
        methods: Any = self.distiller.methods.values()
        return any(m.steers or m.task_factors() for m in methods)

    def plain_step(self) -> Step | None:
        """Take the stock student's step; None, with a note, if it fails."""
        self.restore(self.stock)
        try:
            return self._step(self.stock)
        except Exception as error:  # stock code, any reason
            self.report.say('Losses', f'the plain step fails: {error!r}')
            return None

    def distilled_step(self, scale: float = 1.0) -> Step:
        """Take the distilled step, with every weight times ``scale``."""
        distiller = self.distiller
        self.restore(self.student)
        scales = dict.fromkeys(distiller.methods, scale)
        with replaced(distiller, 'scales', scales):
            return self._step(self.student)

    def next_step(self) -> Step:
        """Take the distilled step from where the student stands."""
        return self._step(self.student)

    def distributed_step(self, wrapper: nn.Module) -> Step:
        """Take the distilled step through a wrapper of the student."""
        self.restore(self.student)
        return self._step(wrapper)

    def restore(self, model: nn.Module) -> None:
        """Put a student back to where training would begin, in place."""
        model.load_state_dict(
            {k: self.state[k] for k in model.state_dict() if k in self.state}
        )
        for module, attributes in self.counts[model]:
            vars(module).update(copy.deepcopy(attributes))

    def _step(self, model: nn.Module) -> Step:
        seen: dict[str, Any] = {}
        observe = functools.partial(_keep, seen)
        self.distiller.observers.append(observe)
        try:
            # The random numbers of peers depend on the step.
            with (
                isolated_random_state(SEED),
                replaced(self.distiller, 'steps', 0),
            ):
                losses = model(
                    self.inputs, copy.deepcopy(self.samples), mode='loss'
                )
                state = torch.get_rng_state()
        finally:
            self.distiller.observers.remove(observe)
        return Step(
            summed(seen.get('task', losses)),
            seen.get('distilled', {}),
            self.student.parse_losses(losses)[0],
            state,
        )


def _keep(
    seen: dict[str, Any],
    task: Losses,
    distilled: dict[str, dict[str, Tensor]],
) -> None:
    seen.update(task=task, distilled=distilled)


def summed(losses: Losses) -> dict[str, Tensor]:
    """Return the losses that count, each as a scalar."""
    return {
        name: torch.stack(
            [v.mean() for v in (x if isinstance(x, list) else [x])]
        ).sum()
        for name, x in losses.items()
        if 'loss' in name
    }


def preprocessed(model: Any, raw: Any) -> tuple[Tensor, list[DetDataSample]]:
    """Return a batch after a network's data preprocessor.

    Batch augmentations are left out, because they would hide which pixels
    another network should see.
    """
    preprocessor = model.data_preprocessor
    augments = getattr(preprocessor, 'batch_augments', None)
    if augments is not None:
        preprocessor.batch_augments = None
    try:
        data = preprocessor(copy.deepcopy(raw), training=True)
    finally:
        if augments is not None:
            preprocessor.batch_augments = augments
    return data['inputs'], data['data_samples']


def noted(model: nn.Module) -> list[tuple[nn.Module, dict[str, Any]]]:
    """Return the numbers in plain attributes of every module."""
    return [
        (module, copy.deepcopy(found))
        for module in model.modules()
        if (found := {k: v for k, v in vars(module).items() if numbers(v)})
    ]


def numbers(value: Any) -> bool:
    """Return whether a value is a number or a list of numbers."""
    if isinstance(value, list):
        return all(map(numbers, value))
    return isinstance(value, int | float)


def cloned(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a network's state dict."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def own_state(student: nn.Module) -> dict[str, Tensor]:
    """Return the student's own part of its state dict."""
    return {
        k: v
        for k, v in student.state_dict().items()
        if not k.startswith(f'{ATTACHED}.')
    }


def _hold_unlabelled(runner: Any) -> None:
    """Let all steps from now on see the same unlabelled images, new ones."""
    unlabelled, stream = runner.distiller.unlabelled, runner.unlabelled_stream
    if unlabelled is not None and stream is not None:
        batches = itertools.repeat(next(stream))
        unlabelled.stream = map(copy.deepcopy, batches)
