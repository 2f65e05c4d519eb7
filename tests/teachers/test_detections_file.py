"""A teacher that is a file of boxes."""

import json

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample

from mmkd.data.batch import Batch
from mmkd.errors import ConfigError, DataError
from mmkd.teachers.build import build_teacher
from mmkd.teachers.view import TeacherContext
from tests.helpers import made_data, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.teaching import LAST, ReadBoxes, dataset_of, raw_boxes

COCO = toy.stock_classes()


@pytest.fixture(scope='module')
def student():
    return tiny.build(tiny.retinanet())


@pytest.fixture
def truth():
    folder = made_data.root() / 'coco_tiny' / 'annotations'
    return json.loads((folder / 'instances_train2017.json').read_text())


def teacher_of(student, file, **options):
    context = TeacherContext(student, COCO)
    cfg = dict(type='mmkd.DetectionsFile', file=str(file), **options)
    return build_teacher(cfg, context)


def written(tmp_path, content, name='boxes.json'):
    path = tmp_path / name
    path.write_text(json.dumps(content))
    return path


def test_the_ground_truth_as_a_file_is_the_ground_truth(
    student, photos, tmp_path
):
    """Through resizing, flips and crops, in the loader's own samples."""
    path = photos / 'coco_tiny' / 'annotations' / 'instances_train2017.json'
    teacher = teacher_of(student, path, min_visible=0)
    dataset = dataset_of(
        dict(type='Resize', scale=(200, 150), keep_ratio=True),
        dict(type='RandomFlip', prob=0.5),
        dict(
            type='RandomCrop',
            crop_size=(0.7, 0.7),
            crop_type='relative_range',
            allow_negative_crop=True,
        ),
    )
    teacher.prepare_data(dataset)
    np.random.seed(0)
    samples = [dataset[index]['data_samples'] for index in range(8)]
    view = teacher.view(Batch(torch.zeros(8, 3, 8, 8), samples))
    for found, sample in zip(view.detections, samples, strict=True):
        expected = sample.gt_instances
        torch.testing.assert_close(
            found.bboxes, expected.bboxes.tensor, atol=0.01, rtol=0
        )
        assert torch.equal(found.labels, expected.labels)
        assert (found.scores == 1).all()


def test_results_with_their_annotations(student, tmp_path, truth):
    about = written(tmp_path, truth, 'about.json')
    image, kind = truth['images'][0], truth['categories'][2]
    row = dict(image_id=image['id'], category_id=kind['id'], score=0.5)
    rows = [row | dict(bbox=[1, 2, 30, 40]), row | dict(bbox=[0, 0, 9, 9])]
    rows[1]['score'] = 0.2
    teacher = teacher_of(
        student,
        written(tmp_path, rows),
        annotations=str(about),
        score_thr=0.3,
    )
    meta = dict(
        img_shape=(99, 99), img_id=0, img_path=f'/x/{image["file_name"]}'
    )
    batch = Batch(torch.zeros(1, 3, 99, 99), [DetDataSample(metainfo=meta)])
    found = teacher.view(batch).detections[0]
    assert found.bboxes.tolist() == [[1, 2, 31, 42]]
    assert teacher.classes[found.labels[0]] == kind['name']


def test_images_by_id(student, tmp_path, truth):
    number = truth['images'][1]['id']
    row = dict(image_id=number, category_id=5, score=1.0, bbox=[1, 1, 8, 8])
    path = written(tmp_path, [row])
    teacher = teacher_of(student, path, classes={5: 'dog'})
    dataset = dataset_of()
    teacher.prepare_data(dataset)
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    (index,) = [i for i, info in enumerate(infos) if info['img_id'] == number]
    sample = dataset[index]['data_samples']
    found = teacher.view(Batch(torch.zeros(1, 3, 8, 8), [sample])).detections
    assert found[0].bboxes.tolist() == [[1, 1, 9, 9]]


def test_none_of_the_images_is_known(student, tmp_path, truth):
    for image in truth['images']:
        image['file_name'] = 'other_' + image['file_name']
    teacher = teacher_of(student, written(tmp_path, truth))
    dataset = dataset_of()
    with pytest.raises(DataError) as caught:
        teacher.prepare_data(dataset)
    text = str(caught.value)
    assert 'got other_' in text
    assert dataset.get_data_info(0)['img_path'] in text
    assert "match='id'" in text
    # By their ids they are the same images.
    teacher_of(student, tmp_path / 'boxes.json', match='id').prepare_data(
        dataset
    )


def test_some_images_are_not_known(student, tmp_path, truth, logged):
    known = truth['images'][:3]
    ids = {image['id'] for image in known}
    truth['images'] = known
    truth['annotations'] = [
        row for row in truth['annotations'] if row['image_id'] in ids
    ]
    teacher = teacher_of(student, written(tmp_path, truth))
    dataset = dataset_of(filter_cfg=None)
    teacher.prepare_data(dataset)
    total = len(dataset)
    assert (
        f'nothing about {total - 3} of {total} training images' in logged[-1]
    )


def test_boxes_on_images_of_another_size(student, tmp_path, truth):
    for image in truth['images']:
        image['width'] *= 2
    teacher = teacher_of(student, written(tmp_path, truth))
    with pytest.raises(DataError, match=r'images of another size, such as'):
        teacher.prepare_data(dataset_of())


def test_what_is_left_out_is_said_once(student, tmp_path, truth, logged):
    objects = [row for row in truth['annotations'] if not row['iscrowd']]
    for row in objects[:2]:
        row['bbox'] = [9000, 0, 5, 5]
    teacher_of(student, written(tmp_path, truth))
    what = '2 boxes without area inside of their image are left out'
    assert len([text for text in logged if what in text]) == 1


def test_classes_of_something_else(student, tmp_path, truth):
    truth['categories'] = [
        dict(row, name=f'kind {row["id"]}') for row in truth['categories']
    ]
    with pytest.raises(ConfigError, match=r'share no class name.*kind 1'):
        teacher_of(student, written(tmp_path, truth))


def test_a_pipeline_that_cannot_be_followed(student, tmp_path, truth):
    teacher = teacher_of(student, written(tmp_path, truth))
    dataset = dataset_of(dict(type='Expand'))
    with pytest.raises(ConfigError, match='Expand may move pixels without'):
        teacher.prepare_data(dataset)
    assert 'homography_matrix' not in dataset.pipeline.transforms[-1].meta_keys
    assert LAST['type'] == 'PackDetInputs'


def test_options(student, tmp_path, truth):
    path = written(tmp_path, truth)
    with pytest.raises(ConfigError, match='a file knows the original images'):
        teacher_of(student, path, sees='batch')
    with pytest.raises(ConfigError, match="match must be 'name' or 'id'"):
        teacher_of(student, path, match='path')
    with pytest.raises(ConfigError, match='has no option "cache"'):
        teacher_of(student, path, cache=dict(dir='x'))


def test_a_training_learns_from_a_file(tmp_path, truth):
    """The runner asks the images for what the teacher needs to know."""
    for row in truth['annotations']:
        row['score'] = 0.75
    path = written(tmp_path, truth)
    cfg = toy.distilled(
        tmp_path / 'run',
        toy.RETINANET,
        methods=dict(read=dict(type='mmkd.ReadBoxes')),
        teacher=dict(type='mmkd.DetectionsFile', file=str(path)),
    )
    runner = toy.train(cfg)
    method = runner.distiller.methods.read
    assert isinstance(method, ReadBoxes)
    found = sum(len(each) for each in method.read)
    assert found > 0
    dataset = runner.train_dataloader.dataset
    sizes = {
        len(raw_boxes(dataset.get_data_info(i))) for i in range(len(dataset))
    }
    assert all(len(each) in sizes for each in method.read)
    assert all((each.scores == 0.75).all() for each in method.read)
    state = toy.load(tmp_path / 'run' / 'epoch_1.pth')['state_dict']
    assert not any('teacher' in key for key in state)
