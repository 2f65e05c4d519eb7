"""What two-stage detectors have in common, and which pairs can meet."""

import inspect
from typing import Any

import torch
from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from torch import Tensor

from .outputs import box_heads
from .utils import ConfigError

FITTING = (
    'Faster, Mask, Cascade and Double-Head R-CNN (an anchor-based RPNHead '
    'and a RoI head with BBoxHeads)'
)


def deltas_of_label(deltas: Tensor, labels: Tensor) -> Tensor:
    """The 4 deltas of each box' label: (N, 4K) to (N, 4).

    Background has no deltas of its own; it gets the last class', which
    nobody uses. Class-agnostic deltas (N, 4) are every label's.
    """
    per_class = deltas.unflatten(1, (-1, 4))
    index = labels.clamp(max=per_class.shape[1] - 1)
    return per_class.gather(1, index[:, None, None].expand(-1, 1, 4))[:, 0]


def uses_sigmoid(head: Any) -> bool:
    """Whether a head's classes are independent binary problems."""
    return bool(getattr(head.loss_cls, 'use_sigmoid', False))


def same_coder(ours: Any, theirs: Any) -> bool:
    """Whether two box coders give the same deltas."""
    return type(ours) is type(theirs) and vars(ours) == vars(theirs)


def check_two_stage(model: Any, role: str, method: str) -> None:
    """Check that a detector has an RPN and RoI heads that can be read.

    Args:
        model: The detector.
        role: ``'student'`` or ``'teacher'``, for the message.
        method: The method that asks, for the message.

    Raises:
        ConfigError: If it has not; names what fits.
    """
    reason = _why_unfit(model)
    if reason is None:
        return
    parts = [
        f'{name}={type(getattr(model, name)).__name__}'
        for name in ('rpn_head', 'roi_head', 'bbox_head')
        if getattr(model, name, None) is not None
    ]
    raise ConfigError(
        f'{method} fits {FITTING}; the {role} is {type(model).__name__} '
        f'({", ".join(parts) or "no heads"}): {reason}. For any other '
        'detector use mmkd.FeatureHint, which distils features.'
    )


def _why_unfit(model: Any) -> str | None:
    heads = box_heads(model)
    if not heads:
        return 'it has no RoI box head'
    if not isinstance(getattr(model, 'rpn_head', None), RPNHead):
        return 'its proposals do not come from an RPNHead'
    for head in heads:
        name = type(head).__name__
        if not isinstance(head, BBoxHead):
            return f'its {name} is no BBoxHead'
        if any(
            getattr(type(head), method) is not getattr(BBoxHead, method)
            for method in ('get_targets', 'loss_and_target')
        ):
            return f'its {name} has targets other than labels and deltas'
    return _why_unfit_roi_head(model.roi_head)


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
    return None


def check_same_anchors(student: Any, teacher: Any) -> None:
    """Check that both RPNs have the same anchors at every position.

    Raises:
        ConfigError: If they differ.
    """
    ours = student.rpn_head.prior_generator
    theirs = teacher.rpn_head.prior_generator
    same = list(ours.strides) == list(theirs.strides) and all(
        a.shape == b.shape and torch.allclose(a.cpu(), b.cpu())
        for a, b in zip(ours.base_anchors, theirs.base_anchors, strict=True)
    )
    if not same:
        raise ConfigError(
            "the RPNs cannot be distilled: the student's anchors (strides "
            f'{list(ours.strides)}, {ours.num_base_priors} a position) are '
            f"not the teacher's (strides {list(theirs.strides)}, "
            f'{theirs.num_base_priors} a position, or other shapes). Give '
            'both the same anchor_generator, or set rpn=False.'
        )


def check_same_classifiers(
    student: Any, teacher: Any, *, remedy: str = 'set soft=None or rcn=False'
) -> None:
    """Check that the RoI heads' logits mean the same, stage by stage.

    Args:
        student: The student's detector.
        teacher: The teacher's detector.
        remedy: What to do otherwise, for the message.

    Raises:
        ConfigError: If they do not.
    """
    heads = box_heads(teacher)
    for stage, head in enumerate(box_heads(student)):
        other = heads[min(stage, len(heads) - 1)]
        for role, each in (('student', head), ('teacher', other)):
            if each.custom_activation or each.custom_cls_channels:
                raise ConfigError(
                    f'the RoI head of stage {stage} of the {role} classifies '
                    f'through {type(each.loss_cls).__name__}, whose logits '
                    'are not those of a softmax over classes and background. '
                    f'Use CrossEntropyLoss in both networks, or {remedy}.'
                )
        if uses_sigmoid(head) != uses_sigmoid(other):
            raise ConfigError(
                f'the RoI heads of stage {stage} cannot be distilled: '
                f'use_sigmoid is {uses_sigmoid(head)} in the student and '
                f'{uses_sigmoid(other)} in the teacher. Train both with the '
                f'same kind of classifier, or {remedy}.'
            )
