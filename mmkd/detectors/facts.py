"""Facts about a detector's heads, as data.

Other rooms learn from these facts what a head is. They compare and print them,
and pass them to functions of this room. Only this room looks into the head
itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdet.models.dense_heads import (
    ATSSHead,
    FCOSHead,
    GFLHead,
    PAAHead,
    RetinaHead,
)
from mmdet.models.detectors import RPN
from mmdet.models.roi_heads.mask_heads import FusedSemanticHead
from mmdet.models.seg_heads.base_semantic_head import BaseSemanticHead
from torch import nn

WITH_BOXES = (ATSSHead, FCOSHead, GFLHead, PAAHead, RetinaHead)
"""Heads whose boxes can be read from their own output. Subclasses are left
out, because they refine boxes in ways of their own."""
HEADS = (
    'bbox_head',
    'mask_head',
    'panoptic_head',
    'query_head',
    'roi_head',
    'segm_head',
)
"""The parts of a detector that classify objects of the data set's classes."""


@dataclass(frozen=True, eq=False)
class DenseFacts:
    """What the numbers that a dense head predicts mean.

    A teacher that is not a detector of MMDetection also describes its
    predictions by such facts, without a ``head``.
    """

    kind: str
    """The name of the head's class."""
    classes: int
    sigmoid: bool
    """Whether classes are independent binary problems. If not, they are a
    softmax whose last column is the background."""
    columns: int
    """The number of channels of the class map for each prior."""
    generator: Any
    """The generator of the priors, one of MMDetection's."""
    coder: Any = None
    """The coder of the boxes, one of MMDetection's, if the head has one."""
    reg_max: int | None = None
    """The largest bin, if box sides are distributions (DFL)."""
    probabilities: bool = False
    """Whether the head returns probabilities instead of logits."""
    anchor_type: str | None = None
    norm_on_bbox: bool = False
    """Whether distances are counted in strides instead of pixels."""
    head: Any = None

    @property
    def strides(self) -> list[tuple[int, ...]]:
        """The stride of each level in pixels, (x, y)."""
        return [tuple(stride) for stride in self.generator.strides]

    @property
    def priors_per_point(self) -> list[int]:
        """The number of priors at a position of each level."""
        return list(self.generator.num_base_priors)

    @property
    def has_anchors(self) -> bool:
        """Whether priors are anchors; if not, they are points."""
        return hasattr(self.generator, 'base_anchors')

    @property
    def has_boxes(self) -> bool:
        """Whether boxes can be read from the head's own output."""
        return type(self.head) in WITH_BOXES

    def first_priors(self) -> list[list[list[float]]]:
        """The priors at the first position of each level, in pixels."""
        ones = [(1, 1)] * self.generator.num_levels
        grids = self.generator.grid_priors(ones, device='cpu')
        return [priors.tolist() for priors in grids]


@dataclass(frozen=True, eq=False)
class RPNFacts:
    """What the numbers that an RPN predicts mean."""

    kind: str
    columns: int
    """1 for a sigmoid, 2 for a softmax (object, background)."""
    generator: Any
    coder: Any
    decoded_targets: bool = False
    """Whether regression targets are xyxy pixels instead of deltas."""
    head: Any = None


@dataclass(frozen=True, eq=False)
class RoIFacts:
    """What the numbers that one stage of a RoI head predicts mean."""

    kind: str
    classes: int
    sigmoid: bool
    coder: Any
    class_agnostic: bool = False
    with_boxes: bool = True
    """Whether the stage regresses boxes."""
    decoded_targets: bool = False
    """Whether regression targets are xyxy pixels instead of deltas."""
    weight: float = 1.0
    """The weight of the stage in the stock loss of a cascade."""
    head: Any = None


@dataclass(frozen=True, eq=False)
class DetectorFacts:
    """The heads that a detector has."""

    name: str
    """The name of the detector's class."""
    classes: int | None
    """The number of classes of its box heads, if it has any."""
    dense: DenseFacts | None = None
    rpn: RPNFacts | None = None
    rois: tuple[RoIFacts, ...] = ()
    """The facts of each stage; empty for one-stage detectors."""
    model: Any = None

    @property
    def is_two_stage(self) -> bool:
        return bool(self.rois)


def read_facts(model: Any) -> DetectorFacts:
    """Read the facts about the heads of one of MMDetection's detectors."""
    head = getattr(model, 'bbox_head', None)
    return DetectorFacts(
        name=type(model).__name__,
        classes=class_count(model),
        dense=None if priors_of(head) is None else _dense_facts(head),
        rpn=_rpn_facts(getattr(model, 'rpn_head', None)),
        rois=tuple(
            _roi_facts(model, stage) for stage in range(len(box_heads(model)))
        ),
        model=model,
    )


def _dense_facts(head: Any) -> DenseFacts:
    loss = getattr(head, 'loss_cls', None)
    return DenseFacts(
        kind=type(head).__name__,
        classes=getattr(head, 'num_classes', 0),
        sigmoid=bool(getattr(head, 'use_sigmoid_cls', True)),
        columns=getattr(
            head, 'num_attrib', getattr(head, 'cls_out_channels', 0)
        ),
        generator=priors_of(head),
        coder=getattr(head, 'bbox_coder', None),
        reg_max=getattr(head, 'reg_max', None),
        probabilities=bool(getattr(loss, 'activated', False)),
        anchor_type=getattr(head, 'anchor_type', None),
        norm_on_bbox=bool(getattr(head, 'norm_on_bbox', False)),
        head=head,
    )


def _rpn_facts(head: Any) -> RPNFacts | None:
    if head is None:
        return None
    return RPNFacts(
        kind=type(head).__name__,
        columns=getattr(head, 'cls_out_channels', 1),
        generator=priors_of(head),
        coder=getattr(head, 'bbox_coder', None),
        decoded_targets=bool(getattr(head, 'reg_decoded_bbox', False)),
        head=head,
    )


def _roi_facts(model: Any, stage: int) -> RoIFacts:
    heads = box_heads(model)
    head = heads[stage]
    weights = getattr(model.roi_head, 'stage_loss_weights', None)
    return RoIFacts(
        kind=type(head).__name__,
        classes=getattr(head, 'num_classes', 0),
        sigmoid=bool(
            getattr(getattr(head, 'loss_cls', None), 'use_sigmoid', False)
        ),
        coder=getattr(head, 'bbox_coder', None),
        class_agnostic=bool(getattr(head, 'reg_class_agnostic', False)),
        with_boxes=bool(getattr(head, 'with_reg', True)),
        decoded_targets=bool(getattr(head, 'reg_decoded_bbox', False)),
        weight=weights[stage] if weights and len(heads) > 1 else 1.0,
        head=head,
    )


def box_heads(model: Any) -> list[Any]:
    """Return the RoI head's box heads, one per stage, or an empty list."""
    heads = getattr(getattr(model, 'roi_head', None), 'bbox_head', None)
    if heads is None:
        return []
    return list(heads) if isinstance(heads, nn.ModuleList) else [heads]


def class_count(model: Any) -> int | None:
    """Return the number of classes of the first box head, if any."""
    heads = box_heads(model) or [getattr(model, 'bbox_head', None)]
    return getattr(heads[0], 'num_classes', None)


def class_counts(model: Any) -> dict[str, int]:
    """Return the number of classes of every part of a detector that has one.

    Left out are what tells objects from background only (RPNs), what
    segments by classes of its own (semantic heads), and what takes the number
    from a head.

    Returns:
        The numbers by the option that sets each, heads before what is in
        them, such as ``roi_head.bbox_head.0.num_classes``.
    """
    return {
        f'{path}.{_class_option(module)}': module.num_classes
        for path, module in model.named_modules()
        if isinstance(getattr(module, 'num_classes', None), int)
        and module.num_classes > 0
        and path.partition('.')[0] in HEADS
        and 'rpn_head' not in path.split('.')
        and not isinstance(module, BaseSemanticHead | FusedSemanticHead)
        and not getattr(module, 'class_agnostic', False)
    }


def numbered_classes(model: Any) -> tuple[str, ...]:
    """Return names for the classes of a detector whose data have none."""
    return tuple(f'class {i}' for i in range(class_count(model) or 1))


def _class_option(module: Any) -> str:
    if hasattr(module, 'num_things_classes'):
        return 'num_things_classes + num_stuff_classes'
    return 'num_classes'


def box_class_names(model: Any, names: Sequence[str]) -> tuple[str, ...]:
    """Return the names of the classes that have boxes.

    They are the first ones of a panoptic data set, whose last ones (stuff)
    only a semantic head knows.
    """
    fusion = getattr(model, 'panoptic_fusion_head', None)
    heads = box_heads(model)
    if fusion is None or not heads or len(names) != fusion.num_classes:
        return tuple(names)
    return tuple(names)[: fusion.num_things_classes]


def stage_of(model: Any, path: str) -> int | None:
    """Return the stage of a cascade that the module at ``path`` belongs to.

    ``'roi_head.bbox_head.2.fc_cls'`` belongs to stage 2 (counted from 0).
    """
    parts = path.split('.')
    if parts[0] != 'roi_head' or len(parts) < 3:
        return None
    parent = getattr(getattr(model, 'roi_head', None), parts[1], None)
    return int(parts[2]) if isinstance(parent, nn.ModuleList) else None


def priors_of(head: Any) -> Any:
    """Return the generator of a dense head's priors, or None."""
    squares = getattr(head, 'square_anchor_generator', None)
    return getattr(head, 'prior_generator', squares)


def is_class_agnostic(model: Any) -> bool:
    """Return whether a detector tells objects from background only."""
    return isinstance(model, RPN)


def same_coder(student: Any, teacher: Any) -> bool:
    """Return whether two box coders give the same deltas."""
    return type(student) is type(teacher) and vars(student) == vars(teacher)


def class_layers(model: nn.Module, classes: int) -> list[Any]:
    """Return the last layers of class scores, A times K or K + 1 wide."""
    heads = box_heads(model) or [getattr(model, 'bbox_head', None)]
    return [
        module
        for head in heads
        if head is not None
        for name, module in head.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        and 'cls' in name
        and 'convs' not in name.partition('.')[0]
        and (
            module.weight.shape[0] % classes == 0
            or module.weight.shape[0] == classes + 1
        )
    ]
