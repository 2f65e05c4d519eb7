"""Co-learning label-assignment distillation (CoLAD)."""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar

from mmdet.structures import DetDataSample
from torch import Tensor

from mmkd.core.method import Method
from mmkd.detectors.assignment.colearning import (
    Switched,
    find_indicator,
    switch,
)
from mmkd.detectors.assignment.fit import dense_head, is_paa
from mmkd.detectors.assignment.paa import (
    Candidates,
    assigned_by,
    check_stock_paa,
    flat_predictions,
)
from mmkd.detectors.dense_checks import check_same_priors
from mmkd.detectors.record import Outputs, replaced
from mmkd.errors import ConfigError
from mmkd.registry import METHODS

from .lad import BOX_WEIGHTINGS, unweighted_boxes


@METHODS.register_module()
class CoLearningAssignment(Method):
    r"""CoLAD: networks that train together on one shared assignment.

    The student and its peers each train by their own stock PAA loss, on the
    same positives. For every image, object and level, the costs of the
    pre-assigned candidates are those of the network with the larger
    indicator (:func:`.switch`); from there on it
    is PAA: the cheapest of each level are joined, so that one mixture can
    hold costs of several networks.

    The networks may differ in depth and width, not in their priors; each
    starts from its own initialisation or checkpoint. For heads of PAA alone:
    other dynamic assigners keep their costs to themselves.

    The share of the groups that a network has decided is logged as
    ``<method>.share_<network>``.

    Source: Nguyen et al., "Improving Object Detection by Label Assignment
    Distillation", WACV 2022, https://arxiv.org/abs/2108.10520. Its official
    code does not survive an image without candidates, nor an object with one;
    equal indicators go to its second network, here to the student.

    Args:
        indicator: ``'std_mean'``, ``'fisher'``, or the name of a function in
            :data:`mmkd.registry.INDICATORS`.
        box_weighting: See
            :class:`~mmkd.methods.lad.LabelAssignmentDistillation`.
        keep_single: An object's only candidate is positive.
        loss_weight: 0 switches the sharing off: each network trains alone.

    Raises:
        ConfigError: If an option is unknown or the networks do not fit.
    """

    needs: ClassVar[str] = 'peers'

    def __init__(
        self,
        *,
        indicator: str = 'std_mean',
        box_weighting: str = 'iou',
        keep_single: bool = False,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_choice(BOX_WEIGHTINGS, box_weighting=box_weighting)
        self.indicator = find_indicator(
            indicator, f'{type(self).__name__}.indicator'
        )
        self.box_weighting, self.keep_single = box_weighting, keep_single

    def prepare(self, student: Outputs, teacher: Outputs) -> None:
        name = type(self).__name__
        for role, outputs in {'student': student, **student.peers}.items():
            head = dense_head(outputs, name)
            if not is_paa(head):
                raise ConfigError(
                    f'{name} fits PAA heads; the {role} has '
                    f'{type(head).__name__}.'
                )
            check_stock_paa(head, f'{name} ({role})')
            check_same_priors(student.model.bbox_head, head, name, shapes=True)

    @contextmanager
    def guide(
        self,
        student: Outputs,
        teacher: Any,
        data_samples: Sequence[DetDataSample],
    ) -> Iterator[None]:
        networks = {'student': student, **student.peers}
        heads = {name: o.model.bbox_head for name, o in networks.items()}
        step = _SharedStep(self, heads)
        with ExitStack() as stack:
            for name, head in heads.items():
                arrive = functools.partial(step.arrive, name)
                stack.enter_context(replaced(head, 'loss_by_feat', arrive))
            yield
        self.statistics = {
            f'share_{name}': share
            for name, share in zip(heads, step.switched.share, strict=True)
        }


class _SharedStep:
    """One step: the losses wait until every network has predicted."""

    switched: Switched

    def __init__(
        self, method: CoLearningAssignment, heads: dict[str, Any]
    ) -> None:
        self.method, self.heads = method, heads
        self.calls: dict[str, tuple[tuple, dict, dict]] = {}

    def arrive(self, name: str, *args: Any, **kwargs: Any) -> dict:
        """Instead of a head's ``loss_by_feat``.

        Returns:
            A dict for the losses; the last network to arrive fills them all.
        """
        losses: dict[str, Any] = {}
        self.calls[name] = (args, kwargs, losses)
        if len(self.calls) == len(self.heads):
            for each in self.heads:
                self._finish(each)
        return losses

    def _finish(self, name: str) -> None:
        head = self.heads[name]
        args, kwargs, losses = self.calls[name]
        with ExitStack() as stack:
            stack.enter_context(
                assigned_by(
                    head, self.costs, keep_single=self.method.keep_single
                )
            )
            if self.method.box_weighting == 'none':
                stack.enter_context(unweighted_boxes(head))
            losses.update(type(head).loss_by_feat(head, *args, **kwargs))

    def costs(self, candidates: Candidates, *_: Tensor) -> Tensor:
        """The shared costs; the candidates are every network's."""
        if not hasattr(self, 'switched'):
            each = [
                candidates.costs(
                    head, *flat_predictions(head, self.calls[name][0])
                )
                for name, head in self.heads.items()
            ]
            self.switched = switch(candidates, each, self.method.indicator)
        return self.switched.costs
