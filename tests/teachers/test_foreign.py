"""Detectors that run on single images: what they find is kept."""

import os
import shutil

import cv2
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample

from mmkd.data.batch import Batch
from mmkd.errors import ConfigError, PictureError
from mmkd.teachers.detections import Found
from mmkd.teachers.foreign import ForeignDetector, read_image
from mmkd.teachers.view import TeacherContext
from tests.helpers import tiny_detectors as tiny


class Brightest(ForeignDetector):
    """Finds one box, whose score is the brightness; it counts its runs."""

    def __init__(self, *, version=1, fails=(), **options):
        student = tiny.build(tiny.retinanet())
        context = TeacherContext(student, tiny.CLASSES)
        super().__init__(tiny.CLASSES, context=context, **options)
        self.identify(version)
        self.ran, self.fails, self.named = 0, fails, []

    def detect(self, images, names):
        self.ran += len(images)
        self.named += names
        torch.rand(1)  # a model may draw, and must not shift the student's
        return [
            None
            if os.path.basename(name) in self.fails
            else Found(
                np.array([[0, 0, 8, 8]], np.float32),
                np.array([image.mean() / 255], np.float32),
                np.array([1]),
            )
            for image, name in zip(images, names, strict=True)
        ]


@pytest.fixture
def files(tmp_path):
    paths = []
    for number in range(3):
        path = tmp_path / f'{number}.png'
        cv2.imwrite(str(path), np.full((16, 16, 3), 60 * number, np.uint8))
        paths.append(str(path))
    return paths


def batch_of(paths, inputs=None):
    samples = [
        DetDataSample(metainfo=dict(img_shape=(16, 16), img_path=path))
        for path in paths
    ]
    inputs = torch.zeros(len(paths), 3, 32, 32) if inputs is None else inputs
    return Batch(inputs, samples)


def scores(teacher, batch):
    view = teacher.view(batch)
    found = [float(each.scores.sum()) for each in view.detections]
    return found, view.statistics()['cache_hits']


def test_each_image_is_looked_at_once(files):
    teacher = Brightest()
    expected = [0, pytest.approx(60 / 255), pytest.approx(120 / 255)]
    assert scores(teacher, batch_of(files[:2])) == (expected[:2], 0)
    assert scores(teacher, batch_of(files)) == (expected, pytest.approx(2 / 3))
    assert scores(teacher, batch_of(files[::-1])) == (expected[::-1], 1)
    assert teacher.ran == 3


def test_an_image_that_is_twice_in_a_batch(files):
    teacher = Brightest()
    found, _ = scores(teacher, batch_of([files[1], files[1]]))
    assert found[0] == found[1] > 0
    assert teacher.ran == 1


def test_a_cache_on_disk_is_shared_by_runs(files, tmp_path):
    options = dict(cache=dict(dir=str(tmp_path / 'cache')))
    first = Brightest(**options)
    expected, _ = scores(first, batch_of(files))
    second = Brightest(**options)
    assert scores(second, batch_of(files)) == (expected, 1)
    assert second.ran == 0
    boxes = second.view(batch_of(files)).detections[2].bboxes
    assert boxes.tolist() == [[0, 0, 8, 8]]
    other = Brightest(version=2, **options)
    assert scores(other, batch_of(files))[1] == 0
    assert other.ran == 3


def test_a_file_that_has_changed_is_looked_at_again(files, tmp_path):
    teacher = Brightest(cache=dict(dir=str(tmp_path / 'cache')))
    scores(teacher, batch_of(files))
    cv2.imwrite(files[0], np.full((16, 16, 3), 200, np.uint8))
    os.utime(files[0], ns=(1, 1))
    found, hits = scores(teacher, batch_of(files))
    assert found[0] == pytest.approx(200 / 255)
    assert hits == pytest.approx(2 / 3)


def test_a_copy_of_a_file_is_the_same_image(files, tmp_path):
    teacher = Brightest()
    scores(teacher, batch_of(files))
    copy = tmp_path / 'copy.png'
    shutil.copyfile(files[2], copy)
    assert scores(teacher, batch_of([str(copy)]))[1] == 1


def test_the_pixels_of_a_batch_are_the_key(files):
    """The augmented image counts, whatever its file is called."""
    teacher = Brightest(sees='batch')
    inputs = torch.zeros(2, 3, 32, 32)
    inputs[1, :, :16, :16] = 1.0
    found, hits = scores(teacher, batch_of(files[:2], inputs))
    assert hits == 0
    assert found[1] > found[0]
    again, hits = scores(teacher, batch_of(files[1:][::-1], inputs))
    assert (again, hits) == (found, 1)
    # What lies in the padding is no part of the image.
    inputs[:, :, 20:] = 5.0
    assert scores(teacher, batch_of(files[:2], inputs))[1] == 1


def test_an_image_that_was_passed_over_is_tried_again(files):
    teacher = Brightest(fails=['1.png'])
    found, _ = scores(teacher, batch_of(files))
    assert found[1] == 0
    teacher.fails = ()
    assert scores(teacher, batch_of(files))[0][1] > 0
    assert teacher.named.count(files[1]) == 2


def test_no_random_number_and_no_gradient(files):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    scores(Brightest(), batch_of(files))
    torch.manual_seed(3)
    teacher = Brightest()
    torch.manual_seed(3)
    scores(teacher, batch_of(files))
    assert torch.equal(torch.rand(1), expected)


def test_images_are_rgb_and_turned_as_the_training_turns_them(tmp_path):
    image = np.zeros((4, 6, 3), np.uint8)
    image[..., 2] = 200  # OpenCV's last channel is red
    cv2.imwrite(str(tmp_path / 'a.png'), image)
    assert read_image(str(tmp_path / 'a.png'))[0, 0].tolist() == [200, 0, 0]


def test_an_image_that_is_damaged_or_missing(tmp_path):
    for name, content in (('a.jpg', b'no image'), ('b.jpg', b'')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PictureError, match=f'{name}: expected an image, '):
            read_image(str(tmp_path / name))
    with pytest.raises(PictureError, match=r'c\.jpg: expected an image for'):
        read_image(str(tmp_path / 'c.jpg'))


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(ConfigError, match='cannot hold a cache'):
        Brightest(cache=dict(dir=str(tmp_path / 'file' / 'x')))
    with pytest.raises(ConfigError, match='has no option "size"'):
        Brightest(cache=dict(dir='a', size=3))
