"""Assignments that one head makes and another is trained on."""

import copy

import pytest
import torch

from mmkd.detectors.assignment.replay import record_assignments, replayed
from mmkd.errors import AssignmentError
from tests.helpers import tiny_dense
from tests.helpers import tiny_detectors as tiny


def test_heads_that_leave_out_other_priors():
    """An ``allowed_border`` drops the priors that leave the image."""
    config = tiny_dense.atss()
    ours, theirs = tiny.build(config), tiny.build(config)
    head = theirs.bbox_head
    head.train_cfg = copy.deepcopy(head.train_cfg)
    head.train_cfg.allowed_border = 0
    inputs, samples = tiny.batch_for(ours)
    objects = [sample.gt_instances for sample in samples]
    metas = [sample.metainfo for sample in samples]
    with torch.no_grad():
        outputs = head(theirs.extract_feat(inputs))
    recorded = record_assignments(head, outputs, objects, metas)
    message = r'has \d+ priors, .* on this image\. Give both heads the same'
    with (
        replayed(ours.bbox_head, recorded),
        pytest.raises(AssignmentError, match=message),
    ):
        ours.loss(inputs, samples)
