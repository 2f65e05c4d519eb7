"""COCO's format as Roboflow, CVAT, Label Studio and others lay it out."""

import copy
import json
import shutil
from pathlib import Path

import pytest

from mmkd.data.layouts import find_data
from mmkd.errors import DataError
from tests.helpers import own_data as own

PHOTOS = own.photos()
HALVES = {'train': list(PHOTOS)[::2], 'val': list(PHOTOS)[1::2]}
KNOWN = own.known(PHOTOS)


def content(names, form='{}.jpg', **options):
    return own.coco({form.format(n): PHOTOS[n] for n in names}, **options)


def put(root, file, images, names, form='{}.jpg', **options):
    """An annotation file, and the photos in a folder."""
    for name in names:
        own.draw(root / images / f'{name}.jpg', PHOTOS[name][0])
    text = json.dumps(content(names, form, **options))
    return own.write(root / file, text)


GROUP = dict(id=0, name='animals', supercategory='none')


def roboflow(root):
    """Ids from 0, and a category that groups the others."""
    for folder, names in zip(('train', 'valid'), HALVES.values(), strict=True):
        file = f'{folder}/_annotations.coco.json'
        rows = [
            dict(id=i, name=n, supercategory='animals')
            for i, n in enumerate(own.CLASSES, 1)
        ]
        put(root, file, folder, names, first=0, **dict())
        data = json.loads((root / file).read_text())
        data['categories'] = [GROUP, *rows]
        own.write(root / file, json.dumps(data))


def beside(root):
    for split, names in HALVES.items():
        put(root, f'{split}.json', split, names)


def coco(root):
    for split, names in HALVES.items():
        file = f'annotations/instances_{split}2017.json'
        put(root, file, f'{split}2017', names)
        own.write(root / f'annotations/captions_{split}2017.json', '{}')


def below_images(root):
    for split, names in HALVES.items():
        put(root, f'annotations/{split}.json', f'images/{split}', names)


def images_together(root):
    for split, names in HALVES.items():
        put(root, f'{split}_annotations.json', 'images', names)


@pytest.mark.parametrize(
    'form',
    [roboflow, beside, coco, below_images, images_together],
    ids=lambda form: form.__name__,
)
def test_both_splits(tmp_path, form):
    root = tmp_path / 'mine'
    form(root)
    data = find_data(str(root))
    assert data.classes == own.CLASSES
    for split, names in HALVES.items():
        expected = {name: KNOWN[name] for name in names}
        assert own.delivered(data, split) == expected
    assert not data.faults
    # What MMDetection and COCO's evaluation read as it stands is left so.
    assert Path('data').exists() == (form is roboflow)


def test_the_evaluation_finds_every_object_of_roboflows_files(tmp_path):
    """COCO's evaluation takes the annotation with the id 0 for none."""
    from mmdet.evaluation import CocoMetric

    roboflow(tmp_path / 'mine')
    data = find_data(str(tmp_path / 'mine'))
    assert data.groups == ('animals',)
    metric = CocoMetric(ann_file=data.metric['ann_file'], metric='bbox')
    metric.dataset_meta = dict(classes=data.classes)
    built = own.dataset(data, 'val')
    for index in range(len(built)):
        sample = built[index]['data_samples']
        truth = sample.gt_instances
        boxes = getattr(truth.bboxes, 'tensor', truth.bboxes)
        found = dict(bboxes=boxes, labels=truth.labels)
        found['scores'] = truth.labels * 0 + 0.9
        row = dict(sample.metainfo, pred_instances=found)
        row['img_id'] = built.get_data_info(index)['img_id']
        metric.process({}, [row])
    assert metric.evaluate(len(built))['coco/bbox_mAP'] == 1


class TestOneFile:
    """CVAT and Label Studio write one file, and the images somewhere."""

    @pytest.mark.parametrize(
        ('file', 'images', 'form'),
        [
            ('annotations/instances_default.json', 'images/default', '{}.jpg'),
            ('annotations/instances_default.json', 'images', '{}.jpg'),
            ('annotations/instances_default.json', '.', '{}.jpg'),
            ('result.json', 'images', 'images/{}.jpg'),
            ('result.json', 'images', r'images\{}.jpg'),
            ('result.json', 'images', '/data/upload/1/{}.jpg'),
            ('result.json', 'images', '../../label-studio/data/media/{}.jpg'),
            ('result.json', 'a/b', '/data/local-files/?d=x/y/{}.jpg'),
            ('result.json', 'images', '/data/upload/1/0a1b2c3d-{}.jpg'),
            ('labels.json', 'data', '{}.jpg'),
        ],
    )
    def test_a_split_is_made(self, tmp_path, file, images, form):
        put(tmp_path / 'mine', file, images, PHOTOS, form)
        data = find_data(str(tmp_path / 'mine'))
        assert own.delivered(data) == KNOWN
        assert len(own.delivered(data, 'val')) == 2
        assert f'COCO ({file})' in data.summary[0]
        assert not data.faults
        # The file itself is the same data.
        again = find_data(str(tmp_path / 'mine' / file))
        assert own.delivered(again) == KNOWN

    def test_names_with_escapes(self, tmp_path):
        put(tmp_path / 'x', 'result.json', 'images', PHOTOS)
        path = tmp_path / 'x/result.json'
        text = path.read_text().replace('photo ', '/data/upload/photo%20')
        path.write_text(text)
        assert own.delivered(find_data(str(tmp_path / 'x'))) == KNOWN

    def test_equal_names_in_folders(self, tmp_path):
        root, names = tmp_path / 'x', {}
        for number, name in enumerate(PHOTOS):
            own.draw(root / f'pictures/{number}/a.jpg', PHOTOS[name][0])
            names[f'/srv/upload/{number}/a.jpg'] = PHOTOS[name]
        own.write(root / 'result.json', json.dumps(own.coco(names)))
        found = own.delivered(find_data(str(root)), key=lambda p: p[-7:])
        assert found == {
            f'{n}/a.jpg': KNOWN[name] for n, name in enumerate(PHOTOS)
        }

    def test_a_file_of_one_split_brings_the_other(self, tmp_path):
        below_images(tmp_path / 'x')
        path = tmp_path / 'x/annotations/train.json'
        assert find_data(str(path)) == find_data(str(tmp_path / 'x'))

    def test_outlines_stay(self, tmp_path):
        put(tmp_path / 'x', 'a.json', 'images', PHOTOS)
        path = tmp_path / 'x/a.json'
        data = json.loads(path.read_text())
        first = data['annotations'][0]
        first['segmentation'] = [[1, 2, 9, 2, 9, 12.5]]
        del first['bbox'], first['area'], first['iscrowd']
        path.write_text(json.dumps(data))
        find_data(str(tmp_path / 'x'))
        rows = [
            row
            for split in ('train', 'val')
            for row in json.loads(
                Path(f'data/x/annotations/{split}.json').read_text()
            )['annotations']
            if 'segmentation' in row
        ]
        assert [row['segmentation'] for row in rows] == [
            [[1, 2, 9, 2, 9, 12.5]]
        ]
        assert rows[0]['bbox'] == [1, 2, 8, 10.5]
        assert rows[0]['area'] == 84


def test_train_and_test(tmp_path):
    for split, names in HALVES.items():
        split = {'train': 'train', 'val': 'test'}[split]
        put(tmp_path / 'x', f'{split}.json', split, names)
    data = find_data(str(tmp_path / 'x'))
    assert set(own.delivered(data, 'val')) == set(HALVES['val'])
    assert 'test is used for validation' in data.summary[4]


def test_three_splits(tmp_path):
    names = list(PHOTOS)
    for split, part in (('train', names[:4]), ('valid', names[4:6])):
        put(tmp_path / 'x', f'{split}/_annotations.coco.json', split, part)
    put(tmp_path / 'x', 'test/_annotations.coco.json', 'test', names[6:])
    data = find_data(str(tmp_path / 'x'))
    assert data.train['data_prefix'] == dict(img='train/')  # as it stands
    assert own.delivered(data) == KNOWN
    assert set(own.delivered(data, 'test')) == set(names[6:])


def test_files_with_their_classes_in_another_order(tmp_path):
    """A label is a place in the list of a file, not a name."""
    for split, names in HALVES.items():
        order = own.CLASSES if split == 'train' else own.CLASSES[::-1]
        put(tmp_path / 'x', f'{split}.json', split, names, categories=order)
    data = find_data(str(tmp_path / 'x'))
    assert own.delivered(data) == KNOWN


class TestFaults:
    def change(self, root, changes, splits=('all',)):
        """A data set with one change in each list; what was found of it."""
        put(root, 'all.json', 'images', PHOTOS)
        data = json.loads((root / 'all.json').read_text())
        changes(data)
        (root / 'all.json').write_text(json.dumps(data))
        return find_data(str(root))

    def test_each_is_named(self, tmp_path):
        def changes(data):
            rows, images = data['annotations'], data['images']
            rows += copy.deepcopy(rows[:4])
            rows[-1]['category_id'] = 9
            rows[-2]['image_id'] = 99
            rows[-3]['bbox'] = [1, 2, 'x', 4]
            rows[-4] = None
            images += [dict(images[0]), dict(id=50), dict(id=51)]
            images[-1] |= dict(file_name='gone.jpg', width=9, height=9)

        data = self.change(tmp_path / 'x', changes)
        end = len(PHOTOS)
        assert data.faults['images of the annotations that are not there'] == [
            "all.json: 'gone.jpg'"
        ]
        first, second = data.faults['entries of images that cannot be read']
        assert first == f'all.json, images[{end}]: the id 1 again'
        assert second.startswith(f'all.json, images[{end + 1}]: ')
        assert len(data.faults['annotations without a box']) == 2
        unknown = data.faults['annotations of no known image or category']
        assert [text.split(': ')[1] for text in unknown] == [
            'image_id 99',
            'category_id 9',
        ]
        assert own.delivered(data) == KNOWN

    def test_what_can_be_represented_is_passed_on(self, tmp_path):
        given = [[5, 5, -3, 4], [-70, 2, 3, 4], [0.1, 0.2, 0.5, 0.5]]

        def changes(data):
            for row, box in zip(data['annotations'], given, strict=False):
                row['bbox'] = box
            data['images'][3] |= dict(width=999, height=77)

        self.change(tmp_path / 'x', changes)
        found, sizes = [], []
        for split in ('train', 'val'):
            path = Path(f'data/x/annotations/{split}.json')
            content = json.loads(path.read_text())
            found += [row['bbox'] for row in content['annotations']]
            sizes += [(r['width'], r['height']) for r in content['images']]
        assert all(box in found for box in given)
        assert (999, 77) in sizes

    def test_images_that_are_missing_of_a_split(self, tmp_path):
        """MMDetection would stop at the first in the middle of an epoch."""
        beside(tmp_path / 'x')
        gone = HALVES['train'][1]
        (tmp_path / f'x/train/{gone}.jpg').unlink()
        data = find_data(str(tmp_path / 'x'))
        assert data.faults == {
            'images of the annotations that are not there': [
                f"train.json: '{gone}.jpg'"
            ]
        }
        expected = {k: v for k, v in KNOWN.items() if k != gone}
        assert own.delivered(data) == expected

    @pytest.mark.parametrize(
        ('text', 'error'),
        [
            ('{"images": [', 'ends midway'),
            ('[]', 'got a list'),
            ('{"images": [], "annotations": []}', "keys 'images', 'annot"),
        ],
    )
    def test_a_file_that_is_none(self, tmp_path, text, error):
        path = own.write(tmp_path / 'a.json', text)
        with pytest.raises(DataError, match=error):
            find_data(str(path))

    def test_two_files_for_the_same(self, tmp_path):
        put(tmp_path / 'x', 'first.json', 'images', PHOTOS)
        shutil.copy(tmp_path / 'x/first.json', tmp_path / 'x/second.json')
        with pytest.raises(DataError, match=r'2: first\.json, second\.json'):
            find_data(str(tmp_path / 'x'))


@pytest.mark.parametrize('orientation', [3, 5, 6, 7, 8])
def test_boxes_on_the_image_as_it_is_stored(tmp_path, orientation):
    """A training turns it by its EXIF orientation, and so are the boxes."""
    import mmcv
    import numpy as np
    from PIL import Image

    root, rows = tmp_path / 'x', {}
    content = Image.Exif()
    content[0x0112] = orientation
    for number in range(3):
        pixels = np.zeros((40, 60, 3), np.uint8)
        pixels[8:20, 4:36] = 255
        image = Image.fromarray(pixels)
        (root / 'images').mkdir(parents=True, exist_ok=True)
        path = root / f'images/{number}.png'
        image.save(path, exif=content)
        rows[path.name] = ((60, 40), [('cat', (4, 8, 36, 20))])
    own.write(root / 'all.json', json.dumps(own.coco(rows)))
    data = find_data(str(root))
    seen = mmcv.imread(str(root / 'images/0.png'))
    ys, xs = np.nonzero(seen[..., 0])
    box = (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1)
    if orientation == 3:  # its size does not tell: it was labelled as seen
        box = (4, 8, 36, 20)
    expected = [('cat', tuple(map(float, box)))]
    assert own.delivered(data) == dict.fromkeys('012', expected)
