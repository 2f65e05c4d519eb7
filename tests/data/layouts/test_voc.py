"""Pascal VOC's XML, with lists of splits and without."""

import pytest

from mmkd.data.layouts import find_data
from mmkd.errors import DataError
from tests.helpers import own_data as own

PHOTOS = own.photos()
KNOWN = own.known(PHOTOS)
HALVES = {'train': list(PHOTOS)[::2], 'val': list(PHOTOS)[1::2]}


def put(root, labels, images, names=PHOTOS, suffix='.jpg', change=str):
    for name in names:
        size, objects = PHOTOS[name]
        own.draw(root / images / f'{name}{suffix}', size)
        text = change(own.xml(size, objects))
        own.write(root / labels / f'{name}.xml', text)


def put_lists(root, **lists):
    for name, names in lists.items():
        text = ''.join(f'{each}\n' for each in names)
        own.write(root / f'ImageSets/Main/{name}.txt', text)


def shifted(found, by):
    return {
        name: [(kind, tuple(v + by for v in box)) for kind, box in objects]
        for name, objects in found.items()
    }


def test_lists_are_read_as_they_stand(tmp_path):
    for number, name in enumerate(PHOTOS):
        size, objects = PHOTOS[name]
        own.draw(tmp_path / f'x/JPEGImages/{number}.jpg', size)
        text = own.xml(size, objects)
        own.write(tmp_path / f'x/Annotations/{number}.xml', text)
    put_lists(tmp_path / 'x', train='0246', val='1357')
    data = find_data(str(tmp_path / 'x'))
    assert data.train['type'] == 'VOCDataset'
    assert data.metric['type'] == 'VOCMetric'
    # MMDetection counts VOC's pixels from 1.
    expected = {name[-1]: objects for name, objects in KNOWN.items()}
    assert shifted(own.delivered(data), 1) == expected
    assert set(own.delivered(data, 'train')) == set('0246')
    assert 'train 4 images' in data.summary[4]


class TestListsThatMMDetectionCannotRead:
    def test_other_images(self, tmp_path):
        put(tmp_path / 'x', 'Annotations', 'JPEGImages', suffix='.PNG')
        put_lists(tmp_path / 'x', **HALVES)
        data = find_data(str(tmp_path / 'x'))
        for split, names in HALVES.items():
            expected = {name: KNOWN[name] for name in names}
            assert own.delivered(data, split) == expected

    def test_one_list(self, tmp_path):
        """As CVAT exports it, with quotes where there is a space."""
        put(tmp_path / 'x', 'Annotations', 'JPEGImages')
        names = [f'"{name}"' for name in list(PHOTOS)[:-1]]
        put_lists(tmp_path / 'x', default=names)
        data = find_data(str(tmp_path / 'x'))
        expected = {name: KNOWN[name] for name in list(PHOTOS)[:-1]}
        assert own.delivered(data) == expected

    def test_what_is_missing(self, tmp_path):
        root = tmp_path / 'x'
        put(root, 'Annotations', 'JPEGImages')
        put_lists(root, train=[*HALVES['train'], 'more'], val=HALVES['val'])
        (root / 'Annotations/photo 2.xml').write_text('<annotation>')
        (root / 'JPEGImages/photo 3.jpg').unlink()
        data = find_data(str(root))
        kinds = {kind: len(places) for kind, places in data.faults.items()}
        assert kinds == {
            'images of a list without an annotation file': 1,
            'annotation files that cannot be read': 1,
            'annotation files without an image': 1,
        }
        assert len(own.delivered(data)) == len(PHOTOS) - 2

    def test_pixels_that_count_from_1(self, tmp_path):
        """VOC's own files: the last pixel is inside of the box."""
        start = '<annotation><source><database>The VOC2007 Database'
        start += '</database></source>'

        def change(text):
            return text.replace('<annotation>', start)

        put(tmp_path / 'x', 'Annotations', 'JPEGImages', change=change)
        data = find_data(str(tmp_path / 'x'))
        expected = {
            name: [
                (kind, (x0 - 1, y0 - 1, x1, y1))
                for kind, (x0, y0, x1, y1) in objects
            ]
            for name, objects in KNOWN.items()
        }
        assert own.delivered(data) == expected


@pytest.mark.parametrize(
    ('labels', 'images', 'suffix'),
    [
        ('Annotations', 'JPEGImages', '.JPG'),
        ('annotations', 'images', '.jpeg'),
        ('annotations/xmls', 'images', '.png'),
        ('.', '.', '.bmp'),
        ('labels', 'data/pictures', '.webp'),
    ],
)
def test_without_lists(tmp_path, labels, images, suffix):
    put(tmp_path / 'x', labels, images, suffix=suffix)
    data = find_data(str(tmp_path / 'x'))
    assert own.delivered(data) == KNOWN
    assert len(own.delivered(data, 'val')) == 2
    assert not data.faults


@pytest.mark.parametrize(
    ('labels', 'images'),
    [('{}', '{}'), ('annotations/{}', 'images/{}'), ('{}/xml', '{}/images')],
)
def test_folders_of_splits(tmp_path, labels, images):
    for split, names in HALVES.items():
        split = 'valid' if split == 'val' else split
        folders = labels.format(split), images.format(split)
        put(tmp_path / 'x', *folders, names)
    data = find_data(str(tmp_path / 'x'))
    for split, names in HALVES.items():
        expected = {name: KNOWN[name] for name in names}
        assert own.delivered(data, split) == expected


def test_difficult_objects_are_neither_learnt_nor_counted(tmp_path):
    for number in range(3):
        objects = [('cat', (1, 2, 9, 9)), ('cat', (2, 3, 9, 9), True)]
        own.draw(tmp_path / f'x/{number}.jpg', (20, 20))
        own.write(tmp_path / f'x/{number}.xml', own.xml((20, 20), objects))
    built = own.dataset(find_data(str(tmp_path / 'x')), 'train')
    flags = [i['ignore_flag'] for i in built.get_data_info(0)['instances']]
    assert flags == [0, 1]


def test_faults(tmp_path):
    root = tmp_path / 'x'
    put(root, 'Annotations', 'images')
    own.draw(root / 'images/bare.jpg', (9, 9))
    (root / 'images/photo 1.jpg').write_bytes(b'')
    own.write(root / 'Annotations/alone.xml', own.xml((9, 9), []))
    own.write(root / 'Annotations/no.xml', 'no')
    path = root / 'Annotations/photo 3.xml'
    text = path.read_text()
    broken = text.replace('<name>cat', '<name>', 1)
    broken = broken.replace('<xmin>', '<xmin>x', 1)
    path.write_text(broken)
    data = find_data(str(root))
    assert data.faults['images that cannot be opened'] == [
        'images/photo 1.jpg: an empty file'
    ]
    assert data.faults['images without an annotation file'] == [
        'images/bare.jpg'
    ]
    assert data.faults['annotation files without an image'] == [
        'Annotations/alone.xml'
    ]
    (place,) = data.faults['annotation files that cannot be read']
    assert place.startswith('Annotations/no.xml: expected a VOC annotation')
    places = data.faults['objects without a class or a box']
    assert places[0].startswith('Annotations/photo 3.xml, object 1: no ')
    left = len(KNOWN['photo 3']) - len(places)
    assert len(own.delivered(data)['photo 3']) == left


def test_a_size_that_is_not_given(tmp_path):
    def change(text):
        return text.replace('<width>', '<width>0')

    put(tmp_path / 'x', '.', '.', change=lambda t: t.replace('size>', 'no>'))
    assert own.delivered(find_data(str(tmp_path / 'x'))) == KNOWN


def test_cvats_own_xml(tmp_path):
    own.draw(tmp_path / 'x/images/1.jpg', (9, 9))
    own.write(tmp_path / 'x/annotations.xml', '<annotations></annotations>')
    with pytest.raises(DataError, match="CVAT's own format: export COCO"):
        find_data(str(tmp_path / 'x'))
