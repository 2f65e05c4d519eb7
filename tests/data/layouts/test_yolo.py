"""YOLO's layout in the forms that its tools write."""

import json
from pathlib import Path

import pytest

from mmkd.data.layouts import find_data
from mmkd.data.layouts.yolo import parse
from mmkd.errors import DataError
from tests.helpers import own_data as own

NAMES = f'names: {json.dumps(own.CLASSES, ensure_ascii=False)}\n'
PHOTOS = own.photos()
HALVES = {'train': list(PHOTOS)[::2], 'val': list(PHOTOS)[1::2]}


def put(root, images, labels, names, suffix='.jpg', empty=True):
    """Photos and their labels into two folders; some have an empty file."""
    for number, name in enumerate(names):
        size, objects = PHOTOS[name]
        own.draw(root / images / f'{name}{suffix}', size)
        if objects or (empty and number % 2):
            text = own.yolo(size, objects)
            own.write(root / labels / f'{name}.txt', text)


def by_kind(root, start='images/{}', labels='labels/{}', val='val'):
    for split, names in HALVES.items():
        split = val if split == 'val' else split
        put(root, start.format(split), labels.format(split), names)


def ultralytics(root):
    by_kind(root)
    names = ''.join(f'  {i}: {n}\n' for i, n in enumerate(own.CLASSES))
    own.write(
        root / 'data.yaml',
        'path: /content/drive/mine\ntrain: images/train\nval: images/val\n'
        f'test:\nnames:\n{names}',
    )


def roboflow(root):
    by_kind(root, '{}/images', '{}/labels', 'valid')
    own.write(root / 'README.roboflow.txt', 'Annotated\n')
    own.write(
        root / 'data.yaml',
        'train: ../train/images\nval: ../valid/images\n'
        f'test: ../test/images\n\nnc: 3\n{NAMES}',
    )


def lists_of_files(root):
    by_kind(root)
    for split in ('train', 'val'):
        paths = sorted((root / 'images' / split).iterdir())
        lines = [f'./images/{split}/{path.name}\n' for path in paths]
        own.write(root / f'{split}.txt', ''.join(lines))
    text = f'path: .\ntrain: train.txt\nval: val.txt\n{NAMES}'
    own.write(root / 'dataset.yaml', text)


def lists_of_folders(root):
    put(root, 'images/a', 'labels/a', HALVES['train'][:2])
    put(root, 'images/b', 'labels/b', HALVES['train'][2:])
    put(root, 'images/c', 'labels/c', HALVES['val'])
    text = f'train: [images/a, images/b]\nval:\n  - images/c\n{NAMES}'
    own.write(root / 'my.yaml', text)


def whole_folder_of_a_split(root):
    """Ultralytics finds images/ and labels/ in it."""
    by_kind(root, '{}/images', '{}/labels')
    own.write(root / 'data.yaml', f'train: train\nval: val\n{NAMES}')


def windows(root):
    by_kind(root)
    text = f'train: C:\\data\\mine\\images\\train\nval: images\\val\n{NAMES}'
    own.write(root / 'data.yaml', text)


def darknet(root):
    """As CVAT exports it."""
    put(root, 'obj_train_data', 'obj_train_data', PHOTOS)
    own.write(root / 'obj.names', '\n'.join(own.CLASSES) + '\n')
    for split, names in HALVES.items():
        lines = (f'data/obj_train_data/{name}.jpg\n' for name in names)
        own.write(root / f'{split}.txt', ''.join(lines))
    own.write(
        root / 'obj.data',
        'classes = 3\ntrain = data/train.txt\nvalid = data/val.txt\n'
        'names = data/obj.names\nbackup = backup/\n',
    )


def no_yaml(root):
    by_kind(root)
    own.write(root / 'classes.txt', '\n'.join(own.CLASSES))


def no_yaml_of_roboflow(root):
    by_kind(root, '{}/images', '{}/labels', 'valid')
    own.write(root / 'train/labels/classes.txt', '\n'.join(own.CLASSES))


def beside(root):
    by_kind(root, '{}', '{}')
    own.write(root / 'obj.names', '\n'.join(own.CLASSES))


FORMS = (
    ultralytics,
    roboflow,
    lists_of_files,
    lists_of_folders,
    whole_folder_of_a_split,
    windows,
    darknet,
    no_yaml,
    no_yaml_of_roboflow,
    beside,
)


@pytest.mark.parametrize('form', FORMS, ids=lambda form: form.__name__)
def test_both_splits(tmp_path, form):
    root = tmp_path / 'my data'
    form(root)
    before = own.tree(root)
    data = find_data(str(root))
    assert data.classes == own.CLASSES
    for split, names in HALVES.items():
        expected = own.known({name: PHOTOS[name] for name in names})
        assert own.delivered(data, split) == expected
    assert not data.faults
    assert own.tree(root) == before  # nothing is written there
    assert find_data('data/my data').classes == own.CLASSES


class TestOneSet:
    def make(self, root, folders=('images', 'labels')):
        put(root, *folders, PHOTOS)
        own.write(root / 'classes.txt', '\n'.join(own.CLASSES))
        return root

    @pytest.mark.parametrize(
        'folders', [('images', 'labels'), ('.', '.'), ('a/b', 'a/b')]
    )
    def test_a_split_is_made(self, tmp_path, folders):
        data = find_data(str(self.make(tmp_path / 'mine', folders)))
        assert own.delivered(data) == own.known(PHOTOS)
        assert len(own.delivered(data, 'val')) == 2
        assert 'seed 0' in data.summary[4]

    def test_the_folder_of_images_or_of_both(self, tmp_path):
        self.make(tmp_path / 'zip' / 'mine')
        for path in ('zip', 'zip/mine', 'zip/mine/images'):
            data = find_data(str(tmp_path / path))
            assert own.delivered(data) == own.known(PHOTOS)

    def test_classes_without_names(self, tmp_path):
        root = self.make(tmp_path / 'mine')
        (root / 'classes.txt').unlink()
        data = find_data(str(root))
        assert data.classes == ('class_0', 'class_1', 'class_2')
        assert 'numbered' in data.summary[3]
        label = root / 'labels/photo 1.txt'
        label.write_text(f'{10**8} .5 .5 .1 .1\n')  # no list of that length
        assert find_data(str(root)).classes[-1] == 'class_100000000'


def test_the_yaml_stands_for_its_folder(tmp_path):
    ultralytics(tmp_path / 'mine')
    data = find_data(str(tmp_path / 'mine/data.yaml'))
    assert data == find_data(str(tmp_path / 'mine'))
    assert Path(data.train['data_root']).name == 'mine'


def test_another_yaml(tmp_path):
    ultralytics(tmp_path / 'mine')
    own.write(tmp_path / 'mine/dataset.yaml', f'train: images\n{NAMES}')
    (tmp_path / 'mine/data.yaml').rename(tmp_path / 'mine/animals.yml')
    data = find_data(str(tmp_path / 'mine/animals.yml'))
    assert own.delivered(data) == own.known(PHOTOS)
    assert Path(data.train['data_root']).name == 'animals'


def test_names_that_yaml_takes_for_other_things(tmp_path):
    by_kind(tmp_path / 'mine')
    text = 'train: images/train\nval: images/val\nnames: [no, 007, 1e3]\n'
    own.write(tmp_path / 'mine/data.yaml', text)
    assert find_data(str(tmp_path / 'mine')).classes == ('no', '007', '1e3')


def test_suffixes_and_equal_names(tmp_path):
    """The same name in two folders, and letters that ASCII does not have."""
    root = tmp_path / 'ζώα ü'
    suffixes = ('.JPG', '.jpeg', '.png', '.BMP', '.webp', '.Jpg')
    expected = {}
    for number, suffix in enumerate(suffixes):
        for split in ('train', 'val'):
            size, objects = PHOTOS[f'photo {number + 1}']
            path = root / f'images/{split}/α β {number}{suffix}'
            own.draw(path, size)
            label = root / f'labels/{split}/α β {number}.txt'
            own.write(label, own.yolo(size, objects))
            expected[str(path)] = own.known({'x': (size, objects)})['x']
    own.write(
        root / 'data.yaml', f'train: images/train\nval: images/val\n{NAMES}'
    )
    data = find_data(str(root))
    assert own.delivered(data, key=str) == expected
    content = json.loads(Path('data/ζώα ü/annotations/train.json').read_text())
    assert content['images'][0]['file_name'] == 'images/train/α β 0.JPG'


class TestForms:
    """A box, an outline, four corners, keypoints, a score."""

    def read(self, root, *lines, yaml=''):
        for number in range(4):
            own.draw(root / f'images/{number}.png', (100, 50))
            own.write(root / f'labels/{number}.txt', '\n'.join(lines))
        own.write(root / 'data.yaml', f'train: images\nnames: [a, b]\n{yaml}')
        data = find_data(str(root))
        return own.delivered(data)['0'], data

    def test_outlines(self, tmp_path):
        found, data = self.read(
            tmp_path / 'x',
            '0 0.1 0.2 0.5 0.2 0.3 0.8',
            '1 0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8 ',
            '1 0.1 0.2 0.5 0.2 0.5 0.8 0.1 0.8 0.1 0.5 0.9',  # with a score
        )
        box = (10.0, 10.0, 50.0, 40.0)
        assert found == [('a', box), ('b', box), ('b', box)]
        assert '8 outlines, read as the boxes' in data.summary[2]
        assert '4 with 4 corners' in data.summary[2]

    def test_a_score(self, tmp_path):
        found, data = self.read(tmp_path / 'x', '0 0.3 0.5 0.4 0.6 0.97')
        assert found == [('a', (10.0, 10.0, 50.0, 40.0))]
        assert '4 with a score, left out' in data.summary[2]

    def test_keypoints(self, tmp_path):
        line = '0 0.3 0.5 0.4 0.6 ' + '0.9 0.9 2 ' * 3
        found, _ = self.read(tmp_path / 'x', line, yaml='kpt_shape: [3, 3]\n')
        assert found == [('a', (10.0, 10.0, 50.0, 40.0))]

    def test_whole_numbers_as_floats(self):
        assert parse('1.000e+00 0.5 0.5 0.1 0.1')[0] == 1

    def test_what_can_be_represented_is_passed_on(self, tmp_path):
        root = tmp_path / 'x'
        self.read(root, '0 0.5 0.5 -0.2 0.4', '1 1.5 0.5 0.2 0.4')
        rows = json.loads(Path('data/x/annotations/val.json').read_text())
        boxes = [row['bbox'] for row in rows['annotations'][:2]]
        assert boxes == [[60, 15, -20, 20], [140, 15, 20, 20]]


class TestFaults:
    """What cannot be used is left out and named."""

    def make(self, root):
        for number in range(12):
            own.draw(root / f'images/{number}.jpg', (40, 40))
            own.write(root / f'labels/{number}.txt', '0 .5 .5 .25 .25\n' * 3)
        own.write(root / 'data.yaml', 'train: images\nnames: [a, b]\n')
        return root

    @pytest.mark.parametrize(
        ('line', 'kind', 'why'),
        [
            ('0 .5 .5', 'lines that cannot be read', '3 values instead of 5'),
            ('0 .5 .5 .1 x', 'lines that cannot be read', 'no numbers'),
            ('0 .5 .5 .1 nan', 'lines that cannot be read', 'no finite'),
            ('cat .5 .5 .1 .1', 'lines that cannot be read', 'no numbers'),
            ('-1 .5 .5 .1 .1', 'lines that cannot be read', '-1 is no number'),
            ('1.5 .5 .5 .1 .1', 'lines that cannot be read', '1.5 is no numb'),
            (
                '7 .5 .5 .1 .1',
                'lines with a class that has no name',
                '7, of 2',
            ),
        ],
    )
    def test_a_line(self, tmp_path, line, kind, why):
        root = self.make(tmp_path / 'x')
        good = '0 .5 .5 .25 .25\n'
        own.write(root / 'labels/3.txt', f'{good}\n{line}\n{good}')
        data = find_data(str(root))
        assert list(data.faults) == [kind]
        (place,) = data.faults[kind]
        assert place.startswith('labels/3.txt, line 3: ')
        assert why in place
        box = ('a', (15.0, 15.0, 25.0, 25.0))
        assert own.delivered(data)['3'] == [box, box]
        assert f'left out: {kind} (1)' in data.summary[2]

    def test_images_and_label_files(self, tmp_path):
        root = self.make(tmp_path / 'x')
        (root / 'images/1.jpg').write_bytes(b'')
        (root / 'images/2.jpg').write_bytes(b'<html>')
        (root / 'images/3.jpg').unlink()
        (root / 'labels/4.txt').unlink()
        (root / 'labels/4.txt').mkdir()
        data = find_data(str(root))
        assert data.faults == {
            'images that cannot be opened': [
                'images/1.jpg: an empty file',
                'images/2.jpg: no image, or of a kind that is not known',
            ],
            'label files without an image': ['labels/3.txt'],
            'label files that cannot be read': [
                'labels/4.txt: expected labels, got "Is a directory". A line '
                'of YOLO is "class x_centre y_centre width height".'
            ],
        }
        assert set(own.delivered(data)) == {'0', *map(str, range(5, 12))}

    def test_a_list(self, tmp_path):
        root = self.make(tmp_path / 'x')
        lines = ''.join(f'images/{n}.jpg\n' for n in range(14))
        own.write(root / 'all.txt', lines)
        own.write(root / 'data.yaml', 'train: all.txt\nnames: [a]\n')
        data = find_data(str(root))
        assert data.faults == {
            'images of a list that are not there': [
                "all.txt, line 13: 'images/12.jpg'",
                "all.txt, line 14: 'images/13.jpg'",
            ]
        }

    def test_mostly_faulty(self, tmp_path):
        root = self.make(tmp_path / 'x')
        for path in (root / 'labels').iterdir():
            path.write_text('0 .5 .5 .1 .1\n' + '0 320 240\n' * 2)
        with pytest.raises(DataError, match='12 that can and 24 that cannot'):
            find_data(str(root))

    def test_no_images(self, tmp_path):
        own.write(tmp_path / 'x/data.yaml', 'train: a/images\nnames: [a]\n')
        with pytest.raises(DataError, match='looked for train: a/images'):
            find_data(str(tmp_path / 'x'))

    def test_no_labels(self, tmp_path):
        own.draw(tmp_path / 'x/images/1.jpg', (9, 9))
        own.write(tmp_path / 'x/data.yaml', 'train: images\nnames: [a]\n')
        with pytest.raises(DataError, match='got 1 images and none'):
            find_data(str(tmp_path / 'x'))

    def test_a_broken_yaml(self, tmp_path):
        self.make(tmp_path / 'x')
        own.write(tmp_path / 'x/data.yaml', 'train: [images\nnames: [a')
        with pytest.raises(DataError, match='expected a YAML file'):
            find_data(str(tmp_path / 'x'))
