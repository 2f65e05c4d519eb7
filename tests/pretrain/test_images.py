"""Which images are trained on, and which objects measure progress."""

import json
from pathlib import Path

import pytest

from mmkd.errors import DataError
from mmkd.pretrain.images import find_images, find_objects
from tests.helpers import made_data, own_data


def names(found):
    return [Path(file).name for file in found.files]


class TestImages:
    def test_all_below_a_folder(self, tmp_path):
        for name in ('b.jpg', 'sub/deeper/a.png', '.hidden.jpg'):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            own_data.draw(tmp_path / name, (100, 90))
        own_data.draw(tmp_path / 'small.jpg', (100, 40))
        (tmp_path / 'notes.txt').write_text('no image')
        (tmp_path / 'broken.jpg').write_bytes(b'no image either')
        (tmp_path / 'empty.png').touch()
        found = find_images(str(tmp_path), 64)
        assert names(found) == ['b.jpg', 'small.jpg', 'a.png']
        assert all(Path(file).is_absolute() for file in found.files)
        first, second, third = found.in_words(64)
        assert first == f'images: 3, all that are below {tmp_path}'
        assert '2 images that cannot be read: ' in second
        assert 'broken.jpg' in second
        assert 'empty.png: an empty file' in second
        assert third.startswith('1 images are smaller than the crops of 64')

    def test_a_training_split_alone(self):
        root = made_data.root()
        for place, count in (('bccd', 12), ('coco_tiny', 12)):
            found = find_images(str(root / place), 64)
            assert len(found.files) == count
            assert not any('val2017' in file for file in found.files)
            assert 'images are left out' in found.source
            assert 'val' in found.source

    def test_a_file_without_annotations(self, tmp_path):
        """As COCO's image_info_unlabeled2017.json."""
        for name in ('one.jpg', 'two.jpg', 'three.jpg'):
            path = tmp_path / 'unlabeled2017' / name
            path.parent.mkdir(exist_ok=True)
            own_data.draw(path, (80, 80))
        file = tmp_path / 'annotations' / 'image_info_unlabeled2017.json'
        file.parent.mkdir()
        rows = [
            dict(id=i, file_name=f'{n}.jpg')
            for i, n in enumerate(('one', 'two'))
        ]
        file.write_text(json.dumps(dict(images=rows, categories=[])))
        found = find_images(str(file), 64)
        assert names(found) == ['one.jpg', 'two.jpg']
        assert found.source == f'those of {file}'
        rows.append(dict(id=9, file_name='gone.jpg'))
        file.write_text(json.dumps(dict(images=rows)))
        with pytest.raises(DataError, match=r'1 missing: gone\.jpg'):
            find_images(str(file), 64)

    def test_no_images(self, tmp_path):
        with pytest.raises(DataError, match='expected images, got none'):
            find_images(str(tmp_path), 64)
        (tmp_path / 'a.jpg').write_bytes(b'x')
        with pytest.raises(DataError, match=r'1 that cannot be read: a\.jp'):
            find_images(str(tmp_path), 64)
        with pytest.raises(DataError, match='nowhere: expected'):
            find_images(str(tmp_path / 'nowhere'), 64)
        other = tmp_path / 'other.json'
        other.write_text('[1]')
        with pytest.raises(DataError, match='with a list of images'):
            find_images(str(other), 64)


class TestObjects:
    def test_of_the_validation_split(self):
        pictures, classes = find_objects(str(made_data.root() / 'bccd'))
        assert len(pictures) == 8
        numbers = {int(p.path.stem) for p in pictures}
        assert numbers == {*made_data.SPLITS['val']}
        assert {*classes} == {i.name for p in pictures for i in p.items}

    def test_of_one_file(self):
        root = made_data.root() / 'coco_tiny'
        file = root / 'annotations' / 'instances_val2017.json'
        pictures, classes = find_objects(str(file))
        rows = json.loads(file.read_text())
        known = {row['id']: row['name'] for row in rows['categories']}
        there = {known[row['category_id']] for row in rows['annotations']}
        assert {*classes} == there
        assert sum(len(p.items) for p in pictures) == len(rows['annotations'])

    def test_one_class_cannot_be_told_apart(self, tmp_path):
        own_data.draw(tmp_path / 'a.jpg', (60, 60))
        box = dict(id=1, image_id=1, category_id=1, bbox=[1, 1, 20, 20])
        content = dict(
            images=[dict(id=1, file_name='a.jpg', width=60, height=60)],
            annotations=[box],
            categories=[dict(id=1, name='cat'), dict(id=2, name='dog')],
        )
        file = tmp_path / 'val.json'
        file.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r'got 1 \(cat\)'):
            find_objects(str(file))
