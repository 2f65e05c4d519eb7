"""What all teachers of boxes have in common."""

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import MMLogger

from mmkd.core.distiller import build_distiller
from mmkd.data.batch import Batch
from mmkd.errors import ConfigError
from mmkd.registry import TEACHERS
from mmkd.teachers.detections import (
    DetectionsTeacher,
    Found,
    check_choices,
    class_list,
    path_of,
)
from mmkd.teachers.view import TeacherContext
from tests.helpers import tiny_detectors as tiny
from tests.helpers.teaching import ReadBoxes

BOXES = [[10, 20, 30, 40], [0, 0, 50, 50], [90, 90, 99, 99]]


@TEACHERS.register_module()
class Fixed(DetectionsTeacher):
    """Finds the same in every image."""

    def find(self, batch, log):
        log['asked'] = len(batch.data_samples)
        found = Found(
            np.array(BOXES, np.float32),
            np.array([0.5, 0.9, 0.1], np.float32),
            np.array([1, 0, 3]),
        )
        return [found for _ in batch.data_samples]


def teacher_of(**options):
    context = TeacherContext(tiny.build(tiny.retinanet()), tiny.CLASSES)
    options = dict(classes=['dog', 'cat', 'fox', 'cow']) | options
    return Fixed(context=context, **options)


def sample_of(shape, **meta):
    return DetDataSample(metainfo=dict(img_shape=shape, **meta))


def test_boxes_land_where_the_student_sees_them():
    teacher = teacher_of(min_visible=0)
    half = np.diag([0.5, 0.5, 1.0])
    flip = np.array([[-1, 0, 60], [0, 1, 0], [0, 0, 1]])
    samples = [
        sample_of((60, 60), homography_matrix=half),
        # By half, flipped, and all from x = 20 on is cut off.
        sample_of((60, 20), homography_matrix=flip @ half),
    ]
    batch = Batch(torch.zeros(2, 3, 64, 64), samples)
    first, second = teacher.view(batch).detections
    expected = [[5, 10, 15, 20], [0, 0, 25, 25], [45, 45, 49.5, 49.5]]
    torch.testing.assert_close(first.bboxes, torch.tensor(expected))
    assert first.labels.tolist() == [1, 0, 3]
    torch.testing.assert_close(first.scores, torch.tensor([0.5, 0.9, 0.1]))
    torch.testing.assert_close(
        second.bboxes, torch.tensor([[10.5, 45, 15.0, 49.5]])
    )
    assert second.labels.tolist() == [3]


def test_a_box_of_which_little_is_left_is_dropped():
    # Of (0, 0, 50, 50), 20 of 50 columns are left: .4 of it.
    batch = Batch(torch.zeros(1, 3, 64, 64), [sample_of((64, 20))])
    for least, left in ((0.39, [1, 0]), (0.41, [1])):
        found = teacher_of(min_visible=least).view(batch).detections
        assert found[0].labels.tolist() == left


def test_labels_are_of_its_own_classes():
    teacher = teacher_of()
    assert teacher.class_map.student == tiny.CLASSES
    # Its dog, cat, fox and cow are the student's 1, 0, none and 2.
    assert teacher.class_map.to_student.tolist() == [1, 0, -1, 2]
    named = teacher_of(classes='coco', class_map=dict(cat='horse'))
    assert named.classes[17] == 'horse'
    assert named.class_map.to_student[17] == 0


def test_numbers_for_the_log_are_those_of_the_view():
    batch = Batch(torch.zeros(1, 3, 64, 64), [sample_of((64, 64))])
    view = teacher_of().view(batch)
    assert view.statistics() == {}
    assert view.detections is view.detections
    assert view.statistics() == {'asked': 1}


@pytest.mark.parametrize(
    'meta', [dict(scale_factor=(0.5, 1)), dict(flip=True)]
)
def test_a_sample_without_the_record_is_refused(meta):
    sample = sample_of((64, 64), img_path='a.jpg', **meta)
    view = teacher_of().view(Batch(torch.zeros(1, 3, 64, 64), [sample]))
    with pytest.raises(ConfigError, match=r'of a\.jpg has no homography'):
        view.detections  # noqa: B018


def test_an_image_without_a_file_is_refused():
    """As the made-up images that `mmkd benchmark` measures with."""
    assert path_of(sample_of((9, 9), img_path='a.jpg')) == 'a.jpg'
    with pytest.raises(ConfigError, match='a data sample has no img_path'):
        path_of(sample_of((9, 9)))


def test_pixels_are_what_the_pipeline_has_made():
    """Normalised by the student's preprocessor and taken back: no change."""
    rng = np.random.default_rng(0)
    for flipped in (True, False):
        model = tiny.retinanet(data_preprocessor__bgr_to_rgb=flipped)
        student = tiny.build(model)
        teacher = Fixed(
            classes=tiny.CLASSES,
            context=TeacherContext(student, tiny.CLASSES),
            sees='batch',
        )
        shapes = (40, 60), (50, 30)
        images = [
            rng.integers(0, 256, (3, *shape), np.uint8) for shape in shapes
        ]
        data = student.data_preprocessor(
            dict(
                inputs=[torch.from_numpy(image) for image in images],
                data_samples=[sample_of(shape) for shape in shapes],
            )
        )
        batch = Batch(data['inputs'], data['data_samples'])
        for seen, bgr in zip(teacher.pixels(batch), images, strict=True):
            assert (seen == bgr.transpose(1, 2, 0)[..., ::-1]).all()
            assert seen.dtype == np.uint8


def test_a_batch_is_seen_as_it_is():
    """Boxes in pixels of the batch are not moved once more."""
    meta = dict(scale_factor=(0.5, 0.5), homography_matrix=np.eye(3) / 2)
    batch = Batch(torch.zeros(1, 3, 64, 64), [sample_of((100, 100), **meta)])
    found = teacher_of(sees='batch').view(batch).detections[0]
    assert found.bboxes.tolist() == BOXES


def test_a_method_reads_them_beside_the_stock_loss():
    cfg = dict(
        teacher=dict(type='mmkd.Fixed', classes=['dog', 'cat', 'fox', 'cow']),
        methods=dict(read=dict(type='mmkd.ReadBoxes')),
    )
    student = tiny.build(tiny.retinanet())
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    inputs, samples = tiny.batch_for(student, objects=2)
    stock = tiny.seeded_loss(student, inputs, samples)
    distiller.attach()
    losses = tiny.seeded_loss(student, inputs, samples)
    method = distiller.methods.read
    assert isinstance(method, ReadBoxes)
    assert [found.labels.tolist() for found in method.read] == [
        [1, 0, 3] for _ in samples
    ]
    assert losses['teacher.asked'] == len(samples)
    for name, loss in stock.items():
        assert all(map(torch.equal, losses[name], loss))


def test_a_method_that_needs_more_lists_who_fits():
    cfg = dict(
        teacher=dict(type='mmkd.Fixed', classes=tiny.CLASSES),
        methods=dict(kd=dict(type='mmkd.KD')),
    )
    with pytest.raises(ConfigError) as caught:
        build_distiller(cfg, tiny.build(tiny.retinanet()), tiny.CLASSES)
    text = str(caught.value)
    assert 'Fixed gives detections. Its boxes are all that is known' in text
    assert 'Teachers that give it: EnsembleTeacher, FrozenDetector' in text


def test_known_lists_of_classes():
    assert class_list('voc')[:2] == ('aeroplane', 'bicycle')
    by_id = class_list('coco91')
    assert len(by_id) == 91
    assert [by_id[i] for i in (1, 13, 44, 90)] == [
        *('person', 'stop sign', 'bottle', 'toothbrush')
    ]
    assert by_id[12] == 'no class (12)'
    assert len({*by_id}) == 91
    assert [n for n in by_id if 'no class' not in n] == [*class_list('coco')]


@pytest.mark.parametrize('classes', ['pascal', [], [1, 2], None])
def test_what_is_no_list_of_classes(classes):
    with pytest.raises(ConfigError, match='known lists coco, voc, coco91'):
        class_list(classes)


def test_options_outside_their_range():
    with pytest.raises(ConfigError, match="one of 'file', 'batch', got 'a'"):
        teacher_of(sees='a')
    with pytest.raises(ConfigError, match='min_visible must be between'):
        teacher_of(min_visible=2)
    for value in (True, -0.1, 'a', float('nan')):
        with pytest.raises(ConfigError, match='score_thr must be between 0'):
            check_choices(1, score_thr=value)
    for most in (0, 1.5, True):
        with pytest.raises(ConfigError, match='max_per_image must be a whole'):
            check_choices(most)


def test_a_data_set_without_class_names(logged):
    student = tiny.build(tiny.retinanet())
    MMLogger.get_current_instance()
    context = TeacherContext(student, ('0', '1', '2'), named=False)
    teacher = Fixed(classes=['a', 'b', 'c'], context=context)
    assert teacher.class_map.identical
    assert 'names no classes' in logged[-1]
    with pytest.raises(ConfigError, match='it has 4, the student 3'):
        Fixed(classes=['a', 'b', 'c', 'd'], context=context)
