"""Which logits of a student meet which of its teacher."""

import pytest
import torch

from mmkd.methods.class_logits import ClassLogits, shared_labels
from mmkd.teachers.class_map import ClassMap


def test_labels_of_equal_classes_stay():
    labels = torch.tensor([0, 2, 1, 3, -1])
    assert shared_labels(labels, ClassMap('abc', 'abc')) is labels


@pytest.mark.parametrize('shape', [(7,), (1, 7)])
def test_labels_are_counted_through_the_shared_classes(shape):
    """Student a b c d, teacher d x b: shared are b (0) and d (1)."""
    labels = torch.tensor([0, 1, 2, 3, 4, -1, 1]).view(shape)
    expected = torch.tensor([-1, 0, -1, 1, 2, -1, 0]).view(shape)
    classes = ClassMap('abcd', 'dxb')
    assert torch.equal(shared_labels(labels, classes), expected)


@pytest.fixture
def pair():
    return ClassLogits(
        prefix='',
        student=torch.arange(8.0).view(4, 2),
        teacher=torch.arange(8.0, 16.0).view(4, 2),
        sigmoid=True,
        labels=torch.tensor([2, 1, -1, 0]),
        weights=torch.tensor([1.0, 0.5, 0.0, 2.0]),
        images=torch.tensor([0, 0, 1, 1]),
        avg_factor=4.0,
        classes=2,
        scale=3.0,
    )


def test_only_objects(pair):
    objects = pair.objects()
    assert objects.student.tolist() == [[2, 3], [6, 7]]
    assert objects.teacher.tolist() == [[10, 11], [14, 15]]
    assert objects.labels.tolist() == [1, 0]
    assert objects.weights.tolist() == [0.5, 2.0]
    assert objects.images.tolist() == [0, 1]
    assert (objects.avg_factor, objects.scale) == (4.0, 3.0)


def test_the_weighted_average(pair):
    """3 (1 * 1 + 0.5 * 2 + 0 * 3 + 2 * 4) / 4."""
    assert pair.average(torch.tensor([1.0, 2.0, 3.0, 4.0])).item() == 7.5


def test_what_has_no_label_has_no_weight(pair):
    labelled = pair.labelled()
    assert labelled.labels.tolist() == [2, 1, 0, 0]
    assert labelled.weights.tolist() == [1.0, 0.5, 0.0, 2.0]
    pair.weights[2] = 3.0
    assert pair.labelled().weights.tolist() == [1.0, 0.5, 0.0, 2.0]
