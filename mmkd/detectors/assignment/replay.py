"""Assignments that are made by one head and trained on by another.

The heads of one-stage detectors call ``assigner.assign(pred_instances, ...)``
once per image, in order. An assigner that reads predictions is *dynamic*: its
result for one network's predictions can teach another.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from mmdet.models.task_modules.assigners import AssignResult, BaseAssigner
from mmengine.logging import MessageHub
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.detectors.record import intercepted, replaced
from mmkd.errors import AssignmentError
from mmkd.utils import alone

Recorded = dict[str, list[tuple[InstanceData, AssignResult]]]
"""Each image's predictions and assignment, by the assigner's attribute."""

INITIAL = 'initial_assigner'
"""Static assigners of the first epochs are replaced by predictions, because a
teacher's are good from the start."""


def assigners_of(head: Any) -> dict[str, Any]:
    """Return a head's assigners by attribute, each once."""
    found: dict[str, Any] = {}
    for name, value in vars(head).items():
        if name == INITIAL or not isinstance(value, BaseAssigner):
            continue
        if not any(value is other for other in found.values()):
            found[name] = value
    # TOODHead also keeps the assigner of its first epochs in this name.
    if 'alignment_assigner' in found:
        found = {'alignment_assigner': found['alignment_assigner']}
    if 'cls_assigner' in found:  # DDODHead has one for each branch
        found.pop('assigner', None)
    return found


class _AllAssigned(Exception):
    """Ends a loss of which only the assignment is wanted."""


@torch.no_grad()
def record_assignments(
    head: Any,
    outputs: Sequence[Any],
    gt_instances: Sequence[InstanceData],
    metas: Sequence[Mapping[str, Any]],
    ignored: Sequence[InstanceData | None] | None = None,
) -> Recorded:
    """Let a head assign its priors on given outputs.

    The head's own ``loss_by_feat`` runs until every image is assigned. No
    loss is computed, nothing that the head counts changes, and no process
    waits for another.

    Args:
        head: A dense head with assigners.
        outputs: The result of its forward pass.
        gt_instances: Each image's objects, labels in the head's classes.
        metas: Each image's meta data.
        ignored: Each image's regions to ignore.
    """
    assigners = assigners_of(head)
    recorded: Recorded = {name: [] for name in assigners}
    expected = len(assigners) * len(metas)

    def recorder(name: str, assigner: Any) -> Any:
        def assign(
            pred_instances: InstanceData, *args: Any, **kwargs: Any
        ) -> AssignResult:
            result = type(assigner).assign(
                assigner, pred_instances, *args, **kwargs
            )
            recorded[name].append((pred_instances, result))
            if sum(map(len, recorded.values())) == expected:
                raise _AllAssigned
            return result

        return assign

    with ExitStack() as stack:
        stack.enter_context(alone())
        stack.enter_context(past_initial_epochs(head))
        stack.enter_context(_ended_by_skipped_images(head, expected))
        if 'cls_assigner' in assigners:
            stack.enter_context(_branches_in_turn(head))
        for name, assigner in assigners.items():
            stack.enter_context(
                replaced(assigner, 'assign', recorder(name, assigner))
            )
        with suppress(_AllAssigned):
            head.loss_by_feat(
                *outputs,
                gt_instances,
                metas,
                batch_gt_instances_ignore=ignored,
            )
    return recorded


@contextmanager
def _ended_by_skipped_images(head: Any, expected: int) -> Iterator[None]:
    """End the loss after the last image, even if it is not assigned.

    YOLOX asks its assigner only about images with objects.
    """
    done = itertools.count(1)

    def count(*_: Any, **__: Any) -> None:
        if next(done) == expected:
            raise _AllAssigned

    if not hasattr(head, '_get_targets_single'):
        yield
        return
    with intercepted(head, '_get_targets_single', count):
        yield


@contextmanager
def _branches_in_turn(head: Any) -> Iterator[None]:
    """Let DDOD assign for its boxes right after its classes.

    Its loss would compute that of the classes in between, and count their
    positives.
    """
    of_classes = head.get_cls_targets

    def both(*args: Any, **kwargs: Any) -> Any:
        of_classes(*args, **kwargs)
        return head.get_reg_targets(*args, **kwargs)

    with replaced(head, 'get_cls_targets', both):
        yield


@contextmanager
def past_initial_epochs(head: Any) -> Iterator[None]:
    """Let a head that starts with a static assigner use its dynamic one."""
    if not hasattr(head, 'initial_epoch'):
        yield
        return
    hub = MessageHub.get_current_instance()
    if 'epoch' not in hub.runtime_info:  # before the training loop
        hub.update_info('epoch', 0)
    with replaced(head, 'initial_epoch', 0):
        yield


@contextmanager
def replayed(
    head: Any, recorded: Recorded, *, quality: str = 'student'
) -> Iterator[None]:
    """Let a head's own loss train on recorded assignments.

    Args:
        head: A dense head whose priors are those of the recorded one.
        recorded: The result of :func:`record_assignments` for these images.
        quality: ``'student'`` takes soft targets (IoU, alignment) from the
            trained head's own boxes, ``'teacher'`` takes the recorded ones.
    """
    with ExitStack() as stack:
        stack.enter_context(past_initial_epochs(head))
        for (name, assigner), images in zip(
            assigners_of(head).items(), recorded.values(), strict=True
        ):
            player = _Player(name, assigner, iter(images), quality)
            stack.enter_context(replaced(assigner, 'assign', player))
        yield


class _Player:
    """Stands in for an assigner's ``assign``."""

    def __init__(
        self,
        name: str,
        assigner: Any,
        images: Iterator[tuple[InstanceData, AssignResult]],
        quality: str,
    ) -> None:
        self.name, self.assigner = name, assigner
        self.images, self.quality = images, quality

    def __call__(
        self,
        pred_instances: InstanceData,
        *args: Any,
        gt_instances: InstanceData | None = None,
        **kwargs: Any,
    ) -> AssignResult:
        predicted, theirs = next(self.images)
        if gt_instances is None:
            gt_instances = args[0]
        if len(predicted.priors) != len(pred_instances.priors):
            raise AssignmentError(
                f'{self.name}: the assignment has '
                f'{len(predicted.priors)} priors, the trained head has '
                f'{len(pred_instances.priors)} on this image. Give both '
                'heads the same allowed_border.'
            )
        owner = theirs.gt_inds
        positive = owner > 0
        object_ = (owner - 1).clamp(min=0)
        labels = torch.full_like(owner, -1)
        if len(gt_instances):
            labels = gt_instances.labels[object_].where(positive, labels)
        result = AssignResult(
            theirs.num_gts, owner, theirs.max_overlaps, labels=labels
        )
        for name in ('assign_metrics',):  # TaskAlignedAssigner's
            if hasattr(theirs, name):
                setattr(result, name, getattr(theirs, name))
        if self.quality == 'student' and len(gt_instances):
            self._own_quality(
                result, pred_instances, gt_instances, positive, object_, args
            )
        return result

    def _own_quality(
        self,
        result: AssignResult,
        pred_instances: InstanceData,
        gt_instances: InstanceData,
        positive: Tensor,
        object_: Tensor,
        args: tuple,
    ) -> None:
        """Return the IoU (and TOOD's alignment) of the head's own boxes."""
        boxes = gt_instances.bboxes
        boxes = boxes if isinstance(boxes, Tensor) else boxes.tensor
        overlaps = self.assigner.iou_calculator(
            pred_instances.bboxes, boxes[object_], is_aligned=True
        )
        # Stock assigners mark background priors in this way, or with 0.
        result.max_overlaps = torch.where(
            positive, overlaps, result.max_overlaps
        )
        if hasattr(result, 'assign_metrics'):
            alpha, beta = args[-2:]
            scores = pred_instances.scores.gather(
                1, result.labels.clamp(min=0)[:, None]
            )[:, 0]
            metric = scores**alpha * overlaps**beta
            result.assign_metrics = metric.where(positive, 0).detach()


def same_priors(ours: Recorded, theirs: Recorded) -> bool:
    """Return whether two heads were given the same priors to assign."""
    return all(
        a.priors.shape == b.priors.shape
        and torch.allclose(a.priors.float(), b.priors.float())
        for one, other in zip(ours.values(), theirs.values(), strict=True)
        for (a, _), (b, _) in zip(one, other, strict=True)
    )


def reads_predictions(recorded: Recorded) -> bool:
    """Return whether the recorded assigners were given predictions."""
    return bool(recorded) and all(
        images and all('bboxes' in p and 'scores' in p for p, _ in images)
        for images in recorded.values()
    )
