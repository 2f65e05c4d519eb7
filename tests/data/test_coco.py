import json

import pytest

from mmkd.data import (
    CocoAnnotations,
    check_coco_annotations,
    object_classes,
)
from mmkd.errors import DataError
from tests.helpers.layouts import coco_content

NAMES = ('a.jpg', 'sub/b.jpg')


@pytest.fixture
def check(tmp_path):
    """Write annotations and check them."""

    def check(content, *images, **options):
        path = tmp_path / 'labels.json'
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        path.write_bytes(content)
        return check_coco_annotations(path, *images, **options)

    return check


def test_counts(check, tmp_path):
    (tmp_path / 'images' / 'sub').mkdir(parents=True)
    for name in NAMES:
        (tmp_path / 'images' / name).touch()
    found = check(coco_content(NAMES), tmp_path / 'images')
    assert found == {'images': 2, 'annotations': 2, 'categories': 1}


@pytest.mark.parametrize(('split', 'boxes'), [('train', 705), ('val', 815)])
def test_real_annotations(shared_data, split, boxes):
    root = shared_data / 'coco_tiny'
    labels = root / 'annotations' / f'instances_{split}2017.json'
    found = check_coco_annotations(labels, root / f'{split}2017')
    assert found == {'images': 80, 'annotations': boxes, 'categories': 80}


def test_a_real_file_cut_off_anywhere(shared_data, check):
    source = shared_data / 'coco_tiny/annotations/instances_val2017.json'
    whole = source.read_bytes().rstrip()
    for share in (0.1, 0.35, 0.62, 0.9, 1):
        cut = whole[: int(len(whole) * share) - 1]
        with pytest.raises(DataError, match=r'ends midway|at line') as info:
            check(cut)
        assert 'mmkd prepare coco' in str(info.value)


def one_box(box):
    content = coco_content()
    content['annotations'][1]['bbox'] = box
    return content


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'got an empty file'),
        (b' \n', 'got an empty file'),
        (b'{"images": [', r'ends midway, after 12 bytes'),
        (b'{"images": ["a', r'ends midway'),
        (b'{"images": [1, }', r'at line 1, column'),
        (b'\xff\xfe\x00', r'bytes that are not JSON'),
        (b'[' * 100_000, r'bytes that are not JSON'),
        (b'[]', r'a list \(a file of results\?\)'),
        (b'3', r'object of COCO annotations, got a int'),
        (b'{}', r"the key 'images', got no key"),
        ({'info': 1}, r"the key 'images', got only 'info'"),
        (coco_content(images=[]), r'a list of images, got an empty one'),
        (
            coco_content(annotations=[]),
            r'a list of annotations, got an empty one',
        ),
        (coco_content(categories={}), r'a list of categories, got a dict'),
        (coco_content(images=[3]), r'images\[0\]: .* got a int'),
        (
            coco_content(images=[{'id': 7, 'file_name': None, 'width': 4}]),
            r'images\[0\]: .*, got file_name=None, no height',
        ),
        (
            coco_content(images=coco_content()['images'] * 2),
            r'images: expected each id once, got 2 used more than once: 1, 2',
        ),
        (coco_content(categories=[{'id': [1], 'name': 'x'}]), r'id=\[1\]'),
        (
            coco_content(images=coco_content()['images'][:1]),
            r'got 1 with an unknown image_id: ids 2\.',
        ),
        (
            coco_content(categories=[{'id': 1, 'name': 'cat'}]),
            r'got 2 with an unknown category_id: ids 1, 2\.',
        ),
        (one_box([1, 2, 3]), 'annotation 2: expected bbox as 4'),
        (one_box([1, 2, 3, None]), 'annotation 2: expected bbox as 4'),
        (one_box([1, 2, 3, float('nan')]), r'annotation 2: .* got \[1, 2, 3'),
        (one_box(['1'] * 4), 'annotation 2: expected bbox as 4'),
    ],
)
def test_it_names_what_is_wrong(check, tmp_path, content, message):
    with pytest.raises(DataError, match=message) as info:
        check(content)
    assert str(info.value).startswith(str(tmp_path / 'labels.json'))
    assert '\n' not in str(info.value)


def test_a_missing_file_and_a_folder(tmp_path):
    with pytest.raises(DataError, match=r'got nothing\. Ask Ann'):
        check_coco_annotations(tmp_path / 'no.json', remedy='Ask Ann')
    with pytest.raises(DataError, match='directory'):
        check_coco_annotations(tmp_path)


def test_missing_images(check, tmp_path):
    images = tmp_path / 'images'
    with pytest.raises(DataError, match='the folder of images, got nothing'):
        check(coco_content(NAMES), images)
    images.mkdir()
    (images / 'a.jpg').touch()
    (images / 'b.jpg').touch()  # not where it is looked for
    with pytest.raises(DataError, match=r'got 1 missing: sub/b\.jpg\.'):
        check(coco_content(NAMES), images)
    with pytest.raises(
        DataError, match=r'5 missing: 7\.jpg, 8\.jpg, 9\.jpg and 2 more'
    ):
        check(coco_content([f'{i}.jpg' for i in range(7, 12)]), images)


def test_without_annotations(check):
    content = coco_content()
    del content['annotations']
    with pytest.raises(DataError, match="the key 'annotations'"):
        check(content)
    assert check(content, annotated=False)['annotations'] == 0


@pytest.mark.parametrize(
    ('box', 'expected', 'noted'),
    [
        ((1, 2, 3, 4), [[1, 2, 2, 2]], 'nowhere'),
        ((-5, -5, 5, 5), [[0, 0, 5, 5]], 'clipped'),
        ((8, 7, 15, 15), [[8, 7, 2, 1]], 'clipped'),
        ((10, 2, 12, 4), [], 'dropped'),  # touches from outside
        ((3, 3, 3, 7), [], 'dropped'),
        ((5, 3, 3, 7), [], 'dropped'),
    ],
)
def test_boxes_are_clipped_to_their_image(box, expected, noted):
    labels = CocoAnnotations(['cat'])
    labels.add_image('large.jpg', 99, 99)
    labels.add_image('a.jpg', 10, 8)
    labels.add_box('cat', box, note='it')
    rows = labels.content['annotations']
    assert [row['bbox'] for row in rows] == expected
    assert labels.clipped == ['it'] * (noted == 'clipped')
    assert labels.dropped == ['it'] * (noted == 'dropped')


def test_whole_numbers_are_written_as_such():
    labels = CocoAnnotations(['dog', 'cat'])
    labels.add_image('a.jpg', 10, 10)
    labels.add_box('cat', (1.0, 2.0, 4.0, 4.5), crowd=True)
    assert json.dumps(labels.content['annotations']) == (
        '[{"id": 1, "image_id": 1, "category_id": 2, "bbox": [1, 2, 3, 2.5], '
        '"area": 7.5, "iscrowd": 1}]'
    )


@pytest.mark.parametrize('parent', [['x'], {}, 5, None])
def test_a_supercategory_of_another_kind_groups_nothing(parent):
    rows = [
        dict(id=i, name=n, supercategory=parent) for i, n in enumerate('ab')
    ]
    content = dict(images=[], annotations=[], categories=rows)
    assert object_classes('x.json', content) == (['a', 'b'], [])
