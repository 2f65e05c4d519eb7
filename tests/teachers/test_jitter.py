"""How much a RoI head's boxes vary."""

import pytest
import torch
from mmengine.structures import InstanceData

from mmkd.data.batch import Batch
from mmkd.teachers.jitter import box_variation
from tests.helpers import tiny_detectors as tiny


def view_of(model):
    teacher = tiny.wrap(tiny.in_eval(tiny.build(model, seed=3)))
    inputs, samples = tiny.batch_for(teacher.model)
    return teacher.view(Batch(inputs, samples))


@pytest.mark.parametrize('agnostic', [False, True])
def test_against_a_loop(agnostic):
    """Moved boxes one by one, through the head of MMDetection."""
    model = tiny.faster_rcnn(roi_head__bbox_head__reg_class_agnostic=agnostic)
    view = view_of(model)
    chosen = [each[:3] for each in view.detections]
    for each in chosen:
        each.index = torch.arange(len(each))
    assert all(len(each) == 3 for each in chosen)
    torch.manual_seed(4)
    found = box_variation(view, chosen, times=5, scale=0.1)
    torch.manual_seed(4)
    noise = torch.randn(5, 6, 4)
    head = view.model.roi_head
    for number, each in enumerate(chosen):
        for row in range(3):
            box = each.bboxes[row]
            size = (box[2:] - box[:2]).clamp(min=1).repeat(2)
            refined = []
            for time in range(5):
                moved = box + 0.1 * size * noise[time, 3 * number + row]
                roi = torch.cat([torch.tensor([float(number)]), moved])
                with torch.no_grad():
                    out = head._bbox_forward(view.maps, roi[None])
                deltas = out['bbox_pred'].view(-1, 4)
                label = 0 if agnostic else int(each.labels[row])
                decoded = head.bbox_head.bbox_coder.decode(
                    moved[None], deltas[label][None]
                )
                refined.append(decoded[0])
            refined = torch.stack(refined)
            mean = refined.mean(0)
            size = (mean[2:] - mean[:2]).clamp(min=1).repeat(2)
            expected = (refined.std(0) / size).mean()
            assert float(found[number][row]) == pytest.approx(
                float(expected), rel=1e-4
            )


def test_boxes_that_are_not_moved_do_not_vary():
    view = view_of(tiny.cascade_rcnn())
    chosen = [
        InstanceData(index=torch.arange(min(2, len(each))))
        for each in view.detections
    ]
    found = box_variation(view, chosen, scale=0.0)
    assert all(float(each.max()) < 1e-5 for each in found)


def test_no_boxes():
    view = view_of(tiny.faster_rcnn())
    none = InstanceData(index=torch.zeros(0, dtype=torch.long))
    assert [len(x) for x in box_variation(view, [none, none])] == [0, 0]
