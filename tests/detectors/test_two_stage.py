"""Which two-stage detectors can be read, and which pairs can meet."""

import pytest
import torch
from mmdet.models.roi_heads.bbox_heads import Shared2FCBBoxHead
from torch import nn

from mmkd.detectors.facts import read_facts, same_coder
from mmkd.detectors.two_stage import (
    check_same_anchors,
    check_same_classifiers,
    check_two_stage,
    deltas_of_label,
)
from mmkd.errors import ConfigError
from tests.helpers import tiny_detectors as tiny

FRCNN, CASCADE = tiny.faster_rcnn, tiny.cascade_rcnn
OTHER_ANCHORS = dict(rpn_head__anchor_generator__scales=[4])


def check(model, **parts):
    facts = read_facts(tiny.build(model))
    check_two_stage(facts, 'student', 'ThisMethod', **parts)


def check_pair(pair_check, student, teacher):
    facts = [read_facts(tiny.build(model)) for model in (student, teacher)]
    if pair_check is check_same_anchors:
        facts = [each.rpn for each in facts]
    pair_check(*facts)


def test_each_box_has_the_deltas_of_its_label():
    deltas = torch.arange(24.0).view(2, 12)
    assert deltas_of_label(deltas, torch.tensor([1, 0])).tolist() == [
        [4, 5, 6, 7],
        [12, 13, 14, 15],
    ]
    # The background's are the last class', which nobody uses.
    assert deltas_of_label(deltas, torch.tensor([3, 2])).tolist() == [
        [8, 9, 10, 11],
        [20, 21, 22, 23],
    ]


def test_class_agnostic_deltas_are_every_labels():
    deltas = torch.arange(8.0).view(2, 4)
    assert torch.equal(deltas_of_label(deltas, torch.tensor([3, 0])), deltas)


def test_no_boxes_have_no_deltas():
    none = deltas_of_label(torch.zeros(0, 12), torch.zeros(0).long())
    assert none.shape == (0, 4)


@pytest.mark.parametrize(
    'model',
    [FRCNN(), tiny.c4(), tiny.mask_rcnn(), CASCADE(), tiny.double_head()],
)
def test_these_fit(model):
    check(model)
    check_pair(check_same_anchors, model, model)
    check_pair(check_same_classifiers, model, model)


def test_coders_are_compared_by_what_they_compute():
    first, second, other = (
        tiny.build(model).rpn_head.bbox_coder
        for model in (
            FRCNN(),
            FRCNN(),
            FRCNN(rpn_head__bbox_coder__target_stds=[1.0, 1.0, 1.0, 0.5]),
        )
    )
    assert same_coder(first, second)
    assert not same_coder(first, other)


def test_classifiers_are_told_apart():
    sigmoid = dict(roi_head__bbox_head__loss_cls__use_sigmoid=True)
    assert read_facts(tiny.build(FRCNN(**sigmoid))).rois[0].sigmoid
    assert not read_facts(tiny.build(FRCNN())).rois[0].sigmoid


@pytest.mark.parametrize(
    'changes',
    [
        OTHER_ANCHORS,
        dict(rpn_head__anchor_generator__ratios=[1.0]),
        dict(rpn_head__anchor_generator__strides=[8, 16, 32, 64, 128]),
    ],
)
def test_other_anchors_are_refused(changes):
    with pytest.raises(
        ConfigError,
        match=r"anchors \(strides .* not the teacher's .*set rpn",
    ):
        check_pair(check_same_anchors, FRCNN(), FRCNN(**changes))


def test_c4_and_fpn_differ_in_anchors():
    with pytest.raises(ConfigError, match=r'strides \[\(4, 4\).*\[\(16, 16\)'):
        check_pair(check_same_anchors, FRCNN(), tiny.c4())


SEESAW = dict(
    roi_head__bbox_head__loss_cls=dict(
        _delete_=True,
        type='SeesawLoss',
        num_classes=3,
    )
)


def test_classifiers_with_logits_of_their_own_are_refused():
    with pytest.raises(
        ConfigError, match=r'stage 0 of the teacher .* through SeesawLoss'
    ):
        check_pair(check_same_classifiers, FRCNN(), FRCNN(**SEESAW))


def test_heads_with_targets_of_their_own_are_refused():
    model = FRCNN()
    model.roi_head.bbox_head = tiny.sabl_head()
    with pytest.raises(
        ConfigError,
        match=r'SABLHead has targets other than labels and deltas; bounded=No',
    ):
        check(model)
    check(model, deltas=False)
    check(model, rcn=False)


def test_other_region_proposals_are_refused():
    model = FRCNN()
    guided = tiny.stock('guided_anchoring/ga-faster-rcnn_r50_fpn_1x_coco.py')
    model.rpn_head = guided.rpn_head
    model.train_cfg.rpn = guided.train_cfg.rpn
    with pytest.raises(
        ConfigError,
        match=r'RPNHead and a RoI head with BBoxHeads.*rpn_head=GARPNHead.*'
        r'proposals do not come from an RPNHead; rpn=False leaves the RPN out',
    ):
        check(model)
    check(model, rpn=False)


def test_one_stage_detectors_have_no_part():
    with pytest.raises(
        ConfigError,
        match=r'\(an anchor-based RPNHead\); .* RetinaNet .*its proposals do',
    ):
        check(tiny.retinanet(), rcn=False)
    with pytest.raises(
        ConfigError,
        match=r'\(a RoI head with BBoxHeads\); .* it has no RoI box head',
    ):
        check(tiny.retinanet(), rpn=False)
    check(tiny.retinanet(), rpn=False, rcn=False)


def test_a_box_loss_past_the_targets_that_are_read_is_refused():
    """PISA's RoI head changes the weights between targets and loss."""
    model = FRCNN()
    model.roi_head.type = 'PISARoIHead'
    with pytest.raises(
        ConfigError, match=r'its PISARoIHead makes the box loss itself, with'
    ):
        check(model, rpn=False, deltas=False)
    model.roi_head.type = 'DynamicRoIHead'  # asks for both
    model.train_cfg.rcnn.dynamic_rcnn = dict(
        iou_topk=75,
        beta_topk=10,
        update_iter_interval=100,
        initial_iou=0.4,
        initial_beta=1.0,
    )
    model.roi_head.bbox_head.loss_bbox = dict(type='SmoothL1Loss', beta=1.0)
    check(model)


def test_box_heads_with_a_loss_of_their_own_are_refused():
    class Own(Shared2FCBBoxHead):
        def loss_and_target(self, *args, **kwargs):
            raise NotImplementedError

    class Several(Shared2FCBBoxHead):
        num_instance = 2

    student = tiny.build(FRCNN())
    for kind, message in (
        (Own, 'its Own has a loss_and_target of its own'),
        (Several, 'its Several predicts several objects per RoI'),
    ):
        student.roi_head.bbox_head.__class__ = kind
        facts = read_facts(student)
        with pytest.raises(ConfigError, match=message):
            check_two_stage(facts, 'student', 'X', rpn=False, deltas=False)


def test_roi_heads_that_need_more_than_rois_are_refused():
    class WithContext(nn.Module):
        def _bbox_forward(self, x, rois, context):
            raise NotImplementedError

    student = tiny.build(FRCNN())
    roi_head = WithContext()
    roi_head.bbox_head = student.roi_head.bbox_head
    student.roi_head = roi_head
    with pytest.raises(
        ConfigError, match='WithContext scores boxes from more than features'
    ):
        check_two_stage(read_facts(student), 'student', 'ThisMethod')


def test_roi_heads_of_several_branches_are_refused():
    model = tiny.c4()
    model.roi_head.update(
        type='TridentRoIHead', num_branch=3, test_branch_idx=1
    )
    with pytest.raises(
        ConfigError, match='TridentRoIHead trains several branches of every'
    ):
        check(model)


def test_roi_heads_with_context_are_refused():
    model = CASCADE()
    model.roi_head.update(
        type='HybridTaskCascadeRoIHead',
        semantic_roi_extractor=dict(
            model.roi_head.bbox_roi_extractor, featmap_strides=[8]
        ),
        semantic_head=dict(
            type='FusedSemanticHead',
            num_ins=5,
            fusion_level=1,
            num_convs=1,
            in_channels=16,
            conv_out_channels=16,
            num_classes=4,
            loss_seg=dict(type='CrossEntropyLoss', ignore_index=255),
        ),
    )
    with pytest.raises(
        ConfigError, match=r'TaskCascadeRoIHead adds context .*with_semantic'
    ):
        check(model)
    model.roi_head.update(semantic_head=None, semantic_roi_extractor=None)
    check(model)
