"""Facts of two-stage detectors, and checks of which pairs fit."""

import inspect
from typing import Any

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from torch import Tensor

from mmkd.errors import ConfigError

from .facts import DetectorFacts, RPNFacts

FITTING = 'Faster, Mask, Cascade and Double-Head R-CNN'


def deltas_of_label(deltas: Tensor, labels: Tensor) -> Tensor:
    """Select the 4 deltas of each box's label, from (N, 4K) to (N, 4).

    The background has no deltas of its own and gets those of the last class,
    which nobody uses. Class-agnostic deltas (N, 4) are returned as they are.
    """
    per_class = deltas.unflatten(1, (-1, 4))
    index = labels.clamp(max=per_class.shape[1] - 1)
    return per_class.gather(1, index[:, None, None].expand(-1, 1, 4))[:, 0]


def check_two_stage(
    facts: DetectorFacts,
    role: str,
    method: str,
    *,
    rpn: bool = True,
    rcn: bool = True,
    deltas: bool = True,
) -> None:
    """Check that the needed parts of a two-stage detector can be read.

    Args:
        facts: The facts of the detector.
        role: ``'student'`` or ``'teacher'``, for the message.
        method: The name of the method, for the message.
        rpn: Whether the RPN is read.
        rcn: Whether the RoI head's labels and class logits are read.
        deltas: Whether the RoI head's boxes and their targets are read, too.

    Raises:
        ConfigError: If they cannot be read; the message names what fits.
    """
    reason = _why_unfit_rpn(facts) if rpn else None
    if rcn:  # a one-stage detector lacks this first
        reason = _why_unfit_rcn(facts, deltas) or reason
    if reason is None:
        return
    needed = ['an anchor-based RPNHead'] * rpn
    needed += ['a RoI head with BBoxHeads'] * rcn
    parts = [
        f'{name}={type(getattr(facts.model, name)).__name__}'
        for name in ('rpn_head', 'roi_head', 'bbox_head')
        if getattr(facts.model, name, None) is not None
    ]
    raise ConfigError(
        f'{method} fits {FITTING} ({" and ".join(needed)}); the {role} is '
        f'{facts.name} ({", ".join(parts) or "no heads"}): '
        f'{reason}. For any other detector use mmkd.FeatureHint, which '
        'distils features.'
    )


def _why_unfit_rpn(facts: DetectorFacts) -> str | None:
    rpn = facts.rpn
    if rpn is not None and (rpn.head is None or isinstance(rpn.head, RPNHead)):
        return None
    return (
        'its proposals do not come from an RPNHead; rpn=False leaves the RPN '
        'out'
    )


def _why_unfit_rcn(facts: DetectorFacts, deltas: bool) -> str | None:
    if not facts.rois:
        return 'it has no RoI box head'
    if facts.model is None:
        return None
    for stage in facts.rois:
        head, name, kind = stage.head, stage.kind, type(stage.head)
        if not isinstance(head, BBoxHead):
            return f'its {name} is not a BBoxHead'
        if hasattr(head, 'num_instance'):
            return f'its {name} predicts several objects per RoI'
        if kind.loss_and_target is not BBoxHead.loss_and_target:
            return f'its {name} has a loss_and_target of its own'
        if deltas and kind.get_targets is not BBoxHead.get_targets:
            return (
                f'its {name} has targets other than labels and deltas; '
                'bounded=None leaves the boxes out'
            )
    return _why_unfit_roi_head(facts.model.roi_head)


def _why_unfit_roi_head(roi_head: Any) -> str | None:
    name = type(roi_head).__name__
    forward = inspect.signature(roi_head._bbox_forward).parameters
    needed = [p for p in forward.values() if p.default is p.empty]
    if [p.name for p in needed] not in (['x', 'rois'], ['stage', 'x', 'rois']):
        return f'its {name} scores boxes from more than features and RoIs'
    for extra in ('with_semantic', 'with_glbctx'):
        if getattr(roi_head, extra, False):
            return f'its {name} adds context to the RoIs ({extra})'
    if hasattr(roi_head, 'num_branch'):
        return f'its {name} trains several branches of every image'
    if not _asks_loss_and_target(roi_head):
        return (
            f'its {name} makes the box loss itself, without the '
            'loss_and_target of its box head, where targets are read'
        )
    return None


def _asks_loss_and_target(roi_head: Any) -> bool:
    """False where the box loss gets its targets in another way (PISA)."""
    names = inspect.unwrap(roi_head.bbox_loss).__code__.co_names
    return 'loss_and_target' in names or 'get_targets' not in names


def check_same_anchors(student: RPNFacts, teacher: RPNFacts) -> None:
    """Check that both RPNs have the same anchors at every position.

    Raises:
        ConfigError: If they differ.
    """
    ours, theirs = student.generator, teacher.generator
    same = list(ours.strides) == list(theirs.strides) and all(
        a.shape == b.shape and torch.allclose(a.cpu(), b.cpu())
        for a, b in zip(ours.base_anchors, theirs.base_anchors, strict=True)
    )
    if not same:
        raise ConfigError(
            "the RPNs cannot be distilled: the student's anchors (strides "
            f'{list(ours.strides)}, {ours.num_base_priors} per position) are '
            f"not the teacher's (strides {list(theirs.strides)}, "
            f'{theirs.num_base_priors} per position, or other shapes). Give '
            'both the same anchor_generator, or set rpn=False.'
        )


def check_same_classifiers(
    student: DetectorFacts,
    teacher: DetectorFacts,
    *,
    remedy: str = 'set soft=None or rcn=False',
) -> None:
    """Check that the RoI heads' logits have the same meaning in each stage.

    Args:
        student: The facts of the student.
        teacher: The facts of the teacher.
        remedy: What to do if they have not, for the message.

    Raises:
        ConfigError: If they have not.
    """
    for stage, own in enumerate(student.rois):
        other = teacher.rois[min(stage, len(teacher.rois) - 1)]
        for role, facts in (('student', own), ('teacher', other)):
            head = facts.head
            if head is None:
                continue
            if head.custom_activation or head.custom_cls_channels:
                raise ConfigError(
                    f'the RoI head of stage {stage} of the {role} classifies '
                    f'through {type(head.loss_cls).__name__}, whose logits '
                    'are not those of a softmax over classes and background. '
                    f'Use CrossEntropyLoss in both networks, or {remedy}.'
                )
        if own.sigmoid != other.sigmoid:
            raise ConfigError(
                f'the RoI heads of stage {stage} cannot be distilled: '
                f'use_sigmoid is {own.sigmoid} in the student and '
                f'{other.sigmoid} in the teacher. Train both with the '
                f'same kind of classifier, or {remedy}.'
            )
