"""Data errors before training, in the words of the user's folders."""

import codecs
import json
import pickle
import re
import shutil

import cv2
import pytest
from mmengine.config import Config

from mmkd.data import pictures
from mmkd.engine.data_guard import (
    check_images,
    diagnose,
    explain_data_error,
    name_unreadable_images,
)
from mmkd.errors import DataError, PictureError
from tests.helpers import made_data, toy


@pytest.fixture
def coco(tmp_path):
    """Four photos in COCO's layout, to be damaged."""
    source = made_data.root() / 'coco_tiny'
    root = tmp_path / 'data' / 'coco'
    for split in ('train2017', 'val2017'):
        (root / split).mkdir(parents=True)
        (root / 'annotations').mkdir(exist_ok=True)
        name = f'annotations/instances_{split}.json'
        content = json.loads((source / name).read_text())
        content['images'] = content['images'][:4]
        ids = {image['id'] for image in content['images']}
        content['annotations'] = [
            a for a in content['annotations'] if a['image_id'] in ids
        ]
        (root / name).write_text(json.dumps(content))
        for image in content['images']:
            file = f'{split}/{image["file_name"]}'
            shutil.copy(source / file, root / file)
    return root


def config(work_dir, root):
    cfg = toy.distilled(work_dir, images=None)
    for split in ('train', 'val', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.data_root = f'{root}/'
        dataset.indices = None
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = f'{root}/annotations/instances_val2017.json'
    return cfg


REMEDY = r'mmkd prepare coco'
TRAIN = 'annotations/instances_train2017.json'
VAL = 'annotations/instances_val2017.json'


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def without_images(path):
    content = json.loads(path.read_text())
    content['images'] = []
    path.write_text(json.dumps(content))


def foreign_classes(path):
    content = json.loads(path.read_text())
    for number, category in enumerate(content['categories']):
        category['name'] = f'part {number}'
    path.write_text(json.dumps(content))


DAMAGES = {
    'no folder': (
        lambda root: shutil.rmtree(root),
        rf'instances_train2017\.json: .*coco does not exist\). Run `{REMEDY}',
    ),
    'no annotations': (
        lambda root: (root / TRAIN).unlink(),
        rf'{TRAIN}: expected.*does not exist.*{REMEDY}',
    ),
    'empty file': (
        lambda root: (root / TRAIN).write_bytes(b''),
        rf'{TRAIN}.*empty.*{REMEDY}',
    ),
    'cut off': (lambda root: cut(root / TRAIN), rf'{TRAIN}.*{REMEDY}'),
    'no json': (
        lambda root: (root / TRAIN).write_text('<html>'),
        rf'{TRAIN}.*{REMEDY}',
    ),
    'a list': (
        lambda root: (root / TRAIN).write_text('[1, 2]'),
        rf'{TRAIN}.*list.*{REMEDY}',
    ),
    'a byte order mark': (
        lambda root: (root / TRAIN).write_bytes(
            codecs.BOM_UTF8 + (root / TRAIN).read_bytes()
        ),
        r'cannot be read as UTF-8: .* without a byte order mark',
    ),
    'no images': (
        lambda root: without_images(root / TRAIN),
        rf'{TRAIN}.*images.*{REMEDY}',
    ),
    'other classes': (
        lambda root: foreign_classes(root / TRAIN),
        r'data set is empty.*classes in metainfo',
    ),
    'a missing image': (
        lambda root: next((root / 'train2017').iterdir()).unlink(),
        rf'1 of 4 images.*train2017/0.*\.jpg.*{REMEDY}',
    ),
    'no image folder': (
        lambda root: shutil.rmtree(root / 'train2017'),
        rf'4 of 4 images.*{REMEDY}',
    ),
    'no validation annotations': (
        lambda root: (root / VAL).unlink(),
        rf'{VAL}: expected.*{REMEDY}',
    ),
    'a missing validation image': (
        lambda root: next((root / 'val2017').iterdir()).unlink(),
        rf'1 of 4 images.*val2017.*{REMEDY}',
    ),
}


@pytest.mark.parametrize('damage', DAMAGES)
def test_a_run_says_what_is_wrong_with_the_data(tmp_path, coco, damage):
    spoil, message = DAMAGES[damage]
    cfg = config(tmp_path / 'run', coco)
    spoil(coco)
    with pytest.raises(DataError, match=message):
        toy.train(cfg)
    assert not list((tmp_path / 'run').glob('*.pth'))


def test_the_metric_s_own_annotations(tmp_path, coco):
    cfg = config(tmp_path / 'run', coco)
    cfg.val_evaluator.ann_file = f'{coco}/annotations/other.json'
    with pytest.raises(DataError, match=rf'other\.json: .*{REMEDY}'):
        toy.train(cfg)


def test_test_data(tmp_path, coco):
    cfg = config(tmp_path / 'run', coco)
    cut(coco / VAL)
    with pytest.raises(DataError, match=VAL):
        toy.build(cfg).test()


def test_whole_data_pass(tmp_path, coco):
    cfg = config(tmp_path / 'run', coco)
    dataset = cfg.train_dataloader.dataset
    for split in ('train', 'val'):
        diagnose(cfg[f'{split}_dataloader'].dataset)
    # wrapped ones are looked into
    diagnose(dict(type='RepeatDataset', dataset=dataset))
    diagnose(dict(type='ConcatDataset', datasets=[dataset, dataset]))
    cut(coco / TRAIN)
    for wrapped in (
        dict(type='RepeatDataset', dataset=dataset),
        dict(type='ConcatDataset', datasets=[dataset, dataset]),
    ):
        with pytest.raises(DataError, match=TRAIN):
            diagnose(wrapped)


def test_voc(tmp_path):
    root = tmp_path / 'bccd'
    shutil.copytree(made_data.root() / 'bccd' / 'BCCD', root / 'BCCD')
    dataset = dict(
        type='VOCDataset',
        data_root=str(root),
        ann_file='BCCD/ImageSets/Main/val.txt',
        data_prefix=dict(sub_data_root='BCCD/'),
    )
    diagnose(dataset)
    name = (root / dataset['ann_file']).read_text().split()[0]
    (root / 'BCCD' / 'Annotations' / f'{name}.xml').write_text('<annotation>')
    remedy = r'mmkd prepare bccd'
    with pytest.raises(DataError, match=rf'{name}\.xml.*{remedy}'):
        diagnose(dataset)


def test_folders_of_nobody_we_know(tmp_path):
    dataset = dict(ann_file=str(tmp_path / 'mine.json'))
    with pytest.raises(DataError, match='Mend the file, or correct data_root'):
        diagnose(dataset)


def test_other_errors_pass():
    cfg = Config(dict(train_dataloader=dict(dataset=dict(type='No'))))
    with (
        pytest.raises(KeyError, match='No'),
        explain_data_error(cfg, 'train'),
    ):
        raise KeyError('No')
    with (
        pytest.raises(RuntimeError, match='else'),
        explain_data_error(cfg, 'train'),
    ):
        raise RuntimeError('something else')


class Images:
    """A data set of paths."""

    def __init__(self, *paths, backend_args=None):
        self.paths, self.backend_args = paths, backend_args

    def __len__(self):
        return len(self.paths)

    def get_data_info(self, index):
        return {'img_path': self.paths[index]}


def test_images_elsewhere_are_not_looked_for(tmp_path):
    check_images(Images('s3://bucket/a.jpg', 'https://site/b.jpg'))
    check_images(Images('/no/a.jpg', backend_args=dict(backend='petrel')))
    with pytest.raises(
        DataError, match=re.escape('1 of 2 images') + '.*no/b.jpg'
    ):
        check_images(Images('s3://bucket/a.jpg', f'{tmp_path}/no/b.jpg'))


# ------------------------------------------------------ images that are broken


def test_an_empty_image_is_named_before_training(tmp_path, coco):
    cfg = config(tmp_path / 'run', coco)
    path = next((coco / 'val2017').iterdir())
    path.write_bytes(b'')
    with pytest.raises(
        DataError, match=rf'1 of 4 images .* empty .*{path.name}\. .*{REMEDY}'
    ):
        toy.train(cfg)


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('mixed', [False, True])
def test_a_damaged_image_is_named_when_it_is_read(
    tmp_path, coco, workers, mixed
):
    cfg = config(tmp_path / 'run', coco)
    for path in (coco / 'train2017').iterdir():
        cut(path)
    cfg.train_dataloader.num_workers = workers
    if mixed:
        dataset = cfg.train_dataloader.dataset
        steps = dataset.pipeline
        dataset.pipeline = steps[:2]
        cfg.train_dataloader.dataset = dict(
            type='MultiImageMixDataset', dataset=dataset, pipeline=steps[2:]
        )
        cfg.train_dataloader.pop('batch_sampler')
    with pytest.raises(
        PictureError,
        match=r'^.*/train2017/0\d+\.jpg: expected an image, got a file that '
        r'is damaged .* bytes\)\. Copy or prepare it again[^\n]*$',
    ):
        toy.train(cfg)


@pytest.mark.parametrize('decoder_refuses', [False, True])
def test_a_picture_with_too_many_pixels_is_named(
    tmp_path, coco, monkeypatch, decoder_refuses
):
    """By its header, before it is decoded or after OpenCV has refused."""
    cfg = config(tmp_path / 'run', coco)
    monkeypatch.setenv(pictures.VARIABLE, '100')
    if decoder_refuses:
        monkeypatch.setattr(pictures, '_decoder_has', [100])

        def refuse(*_, **__):
            raise cv2.error('pixels <= CV_IO_MAX_IMAGE_PIXELS')

        monkeypatch.setattr(cv2, 'imdecode', refuse)
    with pytest.raises(
        PictureError,
        match=r'^.*/train2017/0\d+\.jpg: expected an image of at most 100 '
        r'pixels, got one of \d+ x \d+\. Cut it',
    ):
        toy.train(cfg)


def test_an_error_that_is_not_the_image_s_stays_as_it_is(tmp_path, coco):
    cfg = config(tmp_path / 'run', coco)
    cfg.train_dataloader.dataset.pipeline.insert(
        2, dict(type='RandomCrop', crop_size=(1, 1), crop_type='absolute')
    )
    runner = toy.build(cfg)
    dataset = runner.train_dataloader.dataset
    dataset.pipeline.transforms.insert(0, lambda results: results['no'])
    name_unreadable_images(dataset)
    with pytest.raises(KeyError, match='no'):
        dataset[0]


def test_a_named_data_set_is_still_its_own_copy(coco, tmp_path):
    cfg = config(tmp_path / 'run', coco)
    dataset = toy.build(cfg).val_dataloader.dataset
    name_unreadable_images(dataset)
    ids = [dataset.get_data_info(i)['img_id'] for i in range(len(dataset))]
    for copied in (
        dataset.get_subset([2, 1]),
        pickle.loads(pickle.dumps(dataset.get_subset([2, 1]))),
    ):
        found = copied[0]['data_samples'].img_id
        assert found == ids[2]
