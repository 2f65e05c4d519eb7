"""A teacher's detections where the student sees them."""

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData

from mmkd.data.batch import Batch
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.seen import same_geometry, seen_objects, with_objects
from mmkd.teachers.view import TeacherView

FLIPPED = np.array([[-1.0, 0, 40], [0, 1, 0], [0, 0, 1]])
HALF = np.diag([0.5, 0.5, 1.0])


class View(TeacherView):
    detections = None

    def __init__(self, *found, student=('a', 'b'), teacher=('a', 'b')):
        self.class_map = ClassMap(student, teacher)
        self.cache = {}
        self.detections = [
            InstanceData(
                bboxes=torch.tensor(boxes, dtype=torch.float).view(-1, 4),
                labels=torch.tensor(labels, dtype=torch.long),
                scores=torch.linspace(0.9, 0.5, len(labels)),
            )
            for boxes, labels in found
        ]


def batch(strong, weak=None, shape=(30, 40)):
    def view(homography, shape):
        meta = dict(img_shape=shape)
        if homography is not None:
            meta['homography_matrix'] = homography
        sample = DetDataSample(metainfo=meta)
        return Batch(torch.zeros(1, 3, *shape), [sample])

    one = view(strong, shape)
    return Batch(one.inputs, one.data_samples, weak=view(weak, (30, 40)))


def test_boxes_follow_the_geometry():
    """The box 10, 5, 30, 20 mirrored at the middle of 40 pixels."""
    view = View(([[10, 5, 25, 20]], [1]))
    (found,) = seen_objects(view, batch(FLIPPED @ HALF, HALF))
    assert torch.equal(found.bboxes, torch.tensor([[15.0, 5, 30, 20]]))
    assert found.labels.tolist() == [1]


def test_the_same_geometry_moves_nothing():
    boxes = [[1.1, 2.2, 30.3, 20.4]]
    view = View((boxes, [0]))
    for each in (batch(HALF, HALF), batch(None)):
        view.cache.clear()
        (found,) = seen_objects(view, each)
        assert torch.equal(found.bboxes, torch.tensor(boxes))
        assert same_geometry(each)
    assert not same_geometry(batch(FLIPPED, None))
    assert not same_geometry(batch(None, None, shape=(20, 40)))


def test_boxes_end_at_the_border_of_the_students_view():
    """What is left of a box has at least one pixel to each side."""
    boxes = [[-9, -9, 60, 50], [38.5, 0, 50, 9], [39.5, 0, 50, 9]]
    view = View((boxes, [0, 0, 0]))
    (found,) = seen_objects(view, batch(None))
    assert found.bboxes.tolist() == [[0, 0, 40, 30], [38.5, 0, 40, 9]]
    assert found.index.tolist() == [0, 1]
    assert found.scores.tolist() == pytest.approx([0.9, 0.7])


def test_classes_are_the_students():
    box = [5, 5, 20, 20]
    view = View(
        ([box] * 3, [0, 1, 2]), student=('b', 'c'), teacher=('a', 'c', 'b')
    )
    (found,) = seen_objects(view, batch(None))
    assert found.labels.tolist() == [1, 0]
    assert found.index.tolist() == [1, 2]


def test_the_teachers_own_detections_stay():
    view = View(([[-9, -9, 60, 50]], [0]))
    before = view.detections[0].bboxes.clone()
    seen_objects(view, batch(None))
    seen_objects(view, batch(None))
    assert torch.equal(view.detections[0].bboxes, before)


def test_objects_become_the_ground_truth():
    each = batch(FLIPPED)
    objects = seen_objects(View(([[1, 2, 9, 8], [3, 3, 9, 9]], [1, 0])), each)
    (sample,) = with_objects(each, objects)
    assert torch.equal(sample.gt_instances.bboxes, objects[0].bboxes)
    assert sample.gt_instances.labels.tolist() == [1, 0]
    assert len(sample.ignored_instances) == 0
    assert sample.img_shape == (30, 40)
    assert 'gt_instances' not in each.data_samples[0]
