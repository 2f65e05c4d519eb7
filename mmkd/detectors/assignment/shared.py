"""PAA heads of several networks that train on one assignment."""

import functools
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from mmkd.detectors.facts import DenseFacts
from mmkd.detectors.record import replaced

from .colearning import Indicator, Switched, switch
from .paa import Candidates, assigned_by, flat_predictions, unweighted_boxes


class SharedAssignment:
    """A step in which the losses wait until every network has predicted.

    Args:
        heads: The facts of each network's PAA head, by the network's name.
        indicator: The function that decides which network provides the costs
            of a group.
        weighted_boxes: Whether box losses are weighted by IoU, as in stock
            PAA.
        keep_single: Whether an object's only candidate is positive.
    """

    switched: Switched
    """The costs on which the networks agree, once all have predicted."""

    def __init__(
        self,
        heads: Mapping[str, DenseFacts],
        indicator: Indicator,
        *,
        weighted_boxes: bool,
        keep_single: bool,
    ) -> None:
        self.heads = {name: facts.head for name, facts in heads.items()}
        self.indicator = indicator
        self.weighted_boxes, self.keep_single = weighted_boxes, keep_single
        self._calls: dict[str, tuple[tuple, dict, dict]] = {}

    @contextmanager
    def steering(self) -> Iterator[None]:
        """Let the heads' own losses share the assignment in the context."""
        with ExitStack() as stack:
            for name, head in self.heads.items():
                arrive = functools.partial(self._arrive, name)
                stack.enter_context(replaced(head, 'loss_by_feat', arrive))
            yield

    def _arrive(self, name: str, *args: Any, **kwargs: Any) -> dict:
        """Stand in for a head's ``loss_by_feat``.

        Returns:
            A dict for the losses; the last network to arrive fills them all.
        """
        losses: dict[str, Any] = {}
        self._calls[name] = (args, kwargs, losses)
        if len(self._calls) == len(self.heads):
            for each in self.heads:
                self._finish(each)
        return losses

    def _finish(self, name: str) -> None:
        head = self.heads[name]
        args, kwargs, losses = self._calls[name]
        with ExitStack() as stack:
            stack.enter_context(
                assigned_by(head, self._costs, keep_single=self.keep_single)
            )
            if not self.weighted_boxes:
                stack.enter_context(unweighted_boxes(head))
            losses.update(type(head).loss_by_feat(head, *args, **kwargs))

    def _costs(self, candidates: Candidates, *_: Tensor) -> Tensor:
        """Return the shared costs; every network has the same candidates."""
        if not hasattr(self, 'switched'):
            each = [
                candidates.costs(
                    head, *flat_predictions(head, self._calls[name][0])
                )
                for name, head in self.heads.items()
            ]
            self.switched = switch(candidates, each, self.indicator)
        return self.switched.costs
