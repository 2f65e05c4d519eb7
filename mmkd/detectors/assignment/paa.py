"""Probabilistic anchor assignment (PAA) of a whole batch at once.

MMDetection's ``PAAHead`` pre-assigns anchors to objects by IoU, computes a
cost for each of these candidates and then loops over images, objects and
levels to keep the best. Here the head's own loss runs up to the costs, and
the rest is done for all objects at once, on any given costs.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from mmdet.models.dense_heads import PAAHead
from torch import Tensor

from mmkd.detectors.dense import DenseOutputs
from mmkd.detectors.record import flatten_levels, intercepted, replaced
from mmkd.errors import ConfigError

from .mixture import positive_samples


@dataclass
class Candidates:
    """The anchors that IoU has pre-assigned to the objects of a batch.

    There are N anchors in each of B images, P candidates, M objects and L
    levels. Anchors are numbered through the batch (image by image, level by
    level), and so are objects.
    """

    anchors: Tensor
    """(B * N, 4), xyxy in pixels."""
    labels: Tensor
    """(B * N,); the background is the number of classes."""
    label_weights: Tensor
    """(B * N,)."""
    targets: Tensor
    """(B * N, 4), xyxy in pixels."""
    target_weights: Tensor
    """(B * N, 4)."""
    index: Tensor
    """(P,), each candidate's anchor, ascending."""
    objects: Tensor
    """(P,), each candidate's object, 0 to M - 1."""
    levels: Tensor
    """(P,), each candidate's level, 0 to L - 1."""
    number_of_objects: int
    number_of_levels: int
    number_of_images: int

    def costs(
        self,
        head: Any,
        class_logits: Tensor,
        deltas: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Return a head's cost of each candidate, (P,), without gradient.

        It is the sum of the focal loss over the classes and the weighted box
        loss.

        Args:
            head: The ``PAAHead`` whose losses are the costs.
            class_logits: Predictions (B, N, K), of this or another head.
            deltas: Predictions (B, N, 4) in the coding of ``head``.
            labels: The anchors' labels in the classes of ``class_logits``, if
                they are not those of the batch.
        """
        with torch.no_grad():
            (costs,) = type(head).get_pos_loss(
                head,
                [self.anchors],
                class_logits.flatten(0, 1).float(),
                deltas.flatten(0, 1).float(),
                self.labels if labels is None else labels,
                self.label_weights,
                self.targets,
                self.target_weights,
                self.index,
            )
        return costs

    def costs_of(
        self, dense: DenseOutputs, labels: Tensor | None = None
    ) -> Tensor:
        """Return the costs (P,) of a PAA head's own predictions."""
        assert dense.regression is not None
        return self.costs(
            dense.facts.head, dense.logits, dense.regression, labels
        )

    def positives(
        self, costs: Tensor, topk: int, *, keep_single: bool = False
    ) -> Tensor:
        """Return which anchors are positive, (B * N,) bool.

        Each object's ``topk`` cheapest candidates of each level are joined
        and separated by :func:`.positive_samples`.

        Args:
            costs: (P,); candidates whose cost is not finite do not count.
            topk: The number of candidates of an object per level.
            keep_single: See :func:`.positive_samples`.
        """
        table, place = self._cheapest(costs, topk)
        table, order = table.sort(dim=1, stable=True)
        chosen = positive_samples(
            table, table.isfinite(), keep_single=keep_single
        )
        anchor = place.gather(1, order)
        # One more place takes what is not chosen: nothing waits for a count.
        flags = torch.zeros(
            len(self.anchors) + 1, dtype=torch.bool, device=costs.device
        )
        flags[torch.where(chosen, anchor, len(self.anchors))] = True
        return flags[:-1]

    def _cheapest(self, costs: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """Return costs and anchors of the ``topk`` cheapest, (M, L * topk)."""
        costs = costs.where(costs.isfinite(), math.inf)
        cells = self.objects * self.number_of_levels + self.levels
        order = costs.argsort(stable=True)
        order = order[cells[order].argsort(stable=True)]
        rank = rank_in_group(cells[order])
        width = self.number_of_levels * topk
        # One more column takes those that are too expensive.
        column = torch.where(
            rank < topk, self.levels[order] * topk + rank, width
        )
        shape = (self.number_of_objects, width + 1)
        table = costs.new_full(shape, math.inf)
        table[self.objects[order], column] = costs[order]
        place = self.index.new_zeros(shape)
        place[self.objects[order], column] = self.index[order]
        return table[:, :-1], place[:, :-1]


def rank_in_group(groups: Tensor) -> Tensor:
    """Return the place of each element within its group.

    Args:
        groups: (P,) ascending.

    Example:
        >>> rank_in_group(torch.tensor([0, 0, 3, 3, 3]))
        tensor([0, 1, 0, 1, 2])
    """
    place = torch.arange(len(groups), device=groups.device)
    return place - torch.searchsorted(groups, groups)


Costs = Callable[[Candidates, Tensor, Tensor], Tensor]
"""A function from candidates, a head's own class logits (B, N, K) and deltas
(B, N, 4) to costs (P,)."""


@contextmanager
def assigned_by(
    head: Any, costs: Costs, *, keep_single: bool = False
) -> Iterator[None]:
    """Let a PAA head's own loss assign its anchors in one go, by ``costs``.

    Within the context, the head's ``loss_by_feat`` runs as it is, except that
    it uses the given costs and that all objects are separated at once.

    Args:
        head: The ``PAAHead`` that is trained.
        costs: The function that gives the candidates' costs.
        keep_single: See :func:`.positive_samples`.
    """
    step = _Step(head, costs, keep_single)
    with ExitStack() as stack:
        stack.enter_context(intercepted(head, 'get_targets', step.begin))
        stack.enter_context(replaced(head, 'get_pos_loss', step.collect))
        stack.enter_context(replaced(head, 'paa_reassign', step.result))
        yield


class _Step:
    """One call of a PAA head's ``loss_by_feat``."""

    def __init__(self, head: Any, costs: Costs, keep_single: bool) -> None:
        self.head, self.costs, self.keep_single = head, costs, keep_single

    def begin(
        self,
        targets: tuple,
        anchors: list,
        _: list,
        gt_instances: list,
        *__: Any,
        **___: Any,
    ) -> None:
        """Begin after ``get_targets``."""
        self.candidates = join_candidates(
            anchors, targets, [len(gt) for gt in gt_instances]
        )
        self.predictions: list[tuple[Tensor, Tensor]] = []
        self.results: Iterator[tuple] | None = None

    def collect(
        self, _: list, class_logits: Tensor, deltas: Tensor, *__: Any
    ) -> tuple[None]:
        """Stand in for ``get_pos_loss``, which is called once per image."""
        self.predictions.append((class_logits.detach(), deltas.detach()))
        return (None,)

    def result(self, *_: Any) -> tuple:
        """Stand in for ``paa_reassign``, called once per image after that."""
        if self.results is None:
            self.results = iter(self._assign())
        return next(self.results)

    def _assign(self) -> list[tuple[Tensor, Tensor, Tensor, int]]:
        candidates = self.candidates
        class_logits, deltas = (
            torch.stack(maps) for maps in zip(*self.predictions, strict=True)
        )
        costs = self.costs(candidates, class_logits, deltas)
        positive = candidates.positives(
            costs, self.head.topk, keep_single=self.keep_single
        )
        labels = candidates.labels.where(positive, self.head.num_classes)
        weights = candidates.target_weights * positive[:, None]
        images = candidates.number_of_images
        counts = positive.view(images, -1).sum(1).tolist()
        return list(
            zip(
                labels.view(images, -1),
                candidates.label_weights.view(images, -1),
                weights.view(images, -1, 4),
                counts,
                strict=True,
            )
        )


def join_candidates(
    anchors: Sequence[Sequence[Tensor]],
    targets: tuple,
    objects: Sequence[int],
) -> Candidates:
    """Join what a PAA head's ``get_targets`` gives for each image.

    Args:
        anchors: Each image's anchors of each level, (n, 4).
        targets: The result of ``PAAHead.get_targets``.
        objects: The number of objects in each image.
    """
    labels, label_weights, boxes, box_weights, index, owners = targets
    flat = torch.cat([torch.cat(list(levels)) for levels in anchors])
    per_image = len(flat) // len(anchors)
    sizes = [len(level) for level in anchors[0]]
    level_of_anchor = torch.arange(
        len(sizes), device=flat.device
    ).repeat_interleave(torch.tensor(sizes, device=flat.device))
    first = [sum(objects[:image]) for image in range(len(objects))]
    return Candidates(
        anchors=flat,
        labels=torch.cat(labels),
        label_weights=torch.cat(label_weights),
        targets=torch.cat(boxes),
        target_weights=torch.cat(box_weights),
        index=torch.cat([i + n * per_image for n, i in enumerate(index)]),
        objects=torch.cat(
            [o + n for n, o in zip(first, owners, strict=True)]
        ).long(),
        levels=torch.cat([level_of_anchor[i] for i in index]),
        number_of_objects=sum(objects),
        number_of_levels=len(sizes),
        number_of_images=len(anchors),
    )


def own_costs(head: Any) -> Costs:
    """Return the costs of plain PAA: those of the head's predictions."""

    def costs(
        candidates: Candidates, class_logits: Tensor, deltas: Tensor
    ) -> Tensor:
        return candidates.costs(head, class_logits, deltas)

    return costs


def flat_predictions(head: Any, outputs: Any) -> tuple[Tensor, Tensor]:
    """Return a head's class logits (B, N, K) and deltas (B, N, 4)."""
    return (
        flatten_levels(outputs[0], head.cls_out_channels),
        flatten_levels(outputs[1], 4),
    )


@contextmanager
def unweighted_boxes(head: Any) -> Iterator[None]:
    """Let a PAA head divide its plain box loss by the number of positives."""
    forward = head.loss_bbox.forward

    def unweighted(
        pred: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        return forward(pred, target, None, len(pred), **options)

    with replaced(head.loss_bbox, 'forward', unweighted):
        yield


def check_stock_paa(head: Any, where: str) -> None:
    """Check that a head assigns as ``PAAHead`` does.

    Raises:
        ConfigError: If it has an assignment of its own, or a mixture whose
            variances are tied.
    """
    name = type(head).__name__
    for method in ('paa_reassign', 'gmm_separation_scheme'):
        if getattr(type(head), method) is not getattr(PAAHead, method):
            raise ConfigError(
                f'{where}: {name} has a "{method}" of its own, which a '
                'batched assignment would ignore. Use PAAHead.'
            )
    if head.covariance_type == 'tied':
        raise ConfigError(
            f"{where}: covariance_type='tied' is not batched; got it from "
            f'{name}. Use "diag" (in one dimension the same as "full" and '
            '"spherical").'
        )
