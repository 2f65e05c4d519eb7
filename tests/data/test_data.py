import json
import os
from pathlib import Path

import pytest
from pycocotools.coco import COCO

from mmkd.data import (
    check_coco_annotations,
    clip_box,
    coco_annotation,
    read_json,
    read_voc_xml,
    replacing,
    voc_check,
    voc_to_coco,
    write_json,
)
from mmkd.errors import DataError


def coco(**changes):
    """Annotations of two images with one box each."""
    content = {
        'images': [
            {'id': 7, 'file_name': 'a.jpg', 'width': 40, 'height': 30},
            {'id': 8, 'file_name': 'sub/b.jpg', 'width': 40, 'height': 30},
        ],
        'annotations': [
            {
                'id': number,
                'image_id': image,
                'category_id': 3,
                'bbox': [1, 2, 3.5, 4],
                'area': 14.0,
            }
            for number, image in ((1, 7), (2, 8))
        ],
        'categories': [{'id': 3, 'name': 'cat'}],
    }
    return {**content, **changes}


@pytest.fixture
def write(tmp_path):
    def write(content, name='labels.json') -> Path:
        path = tmp_path / name
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        path.write_bytes(content)
        return path

    return write


# ------------------------------------------------------------ COCO's format


def test_coco_check_counts(write, tmp_path):
    (tmp_path / 'images' / 'sub').mkdir(parents=True)
    for name in ('a.jpg', 'sub/b.jpg'):
        (tmp_path / 'images' / name).touch()
    found = check_coco_annotations(write(coco()), tmp_path / 'images')
    assert found == {'images': 2, 'annotations': 2, 'categories': 1}


@pytest.mark.parametrize(('split', 'boxes'), [('train', 705), ('val', 815)])
def test_coco_check_takes_real_annotations(shared_data, split, boxes):
    root = shared_data / 'coco_tiny'
    found = check_coco_annotations(
        root / 'annotations' / f'instances_{split}2017.json',
        root / f'{split}2017',
    )
    assert found == {'images': 80, 'annotations': boxes, 'categories': 80}


def test_coco_check_of_a_real_file_cut_off_anywhere(shared_data, write):
    source = shared_data / 'coco_tiny/annotations/instances_val2017.json'
    whole = source.read_bytes().rstrip()
    for share in (0.1, 0.35, 0.62, 0.9, 1):
        cut = whole[: int(len(whole) * share) - 1]
        with pytest.raises(DataError, match=r'ends midway|at line') as info:
            check_coco_annotations(write(cut))
        assert 'python tools/prepare_data.py coco' in str(info.value)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'got an empty file'),
        (b' \n', 'got an empty file'),
        (b'{"images": [', r'ends midway, after 12 bytes'),
        (b'{"images": ["a', r'ends midway'),
        (b'{"images": [1, }', r'at line 1, column'),
        (b'\xff\xfe\x00', r'bytes that are none'),
        (b'[' * 100_000, r'bytes that are none'),
        (b'[]', r'a list \(a file of results\?\)'),
        (b'3', r'object of COCO annotations, got a int'),
        (b'{}', r"the key 'images', got no key"),
        ({'info': 1}, r"the key 'images', got only 'info'"),
        (coco(images=[]), r'a list of images, got an empty one'),
        (coco(annotations=[]), r'a list of annotations, got an empty one'),
        (coco(categories={}), r'a list of categories, got a dict'),
        (coco(images=[3]), r'images\[0\]: .* got a int'),
        (
            coco(images=[{'id': 7, 'file_name': None, 'width': 4}]),
            r'images\[0\]: .*, got file_name=None, no height',
        ),
        (
            coco(images=coco()['images'] * 2),
            r'images: expected each id once, got 2 used more than once: 7, 8',
        ),
        (coco(categories=[{'id': [1], 'name': 'x'}]), r'id=\[1\]'),
        (
            coco(images=coco()['images'][:1]),
            r'got 1 with an unknown image_id: ids 2\.',
        ),
        (
            coco(categories=[{'id': 1, 'name': 'cat'}]),
            r'got 2 with an unknown category_id: ids 1, 2\.',
        ),
    ],
)
def test_coco_check_names_what_is_wrong(write, content, message):
    path = write(content)
    with pytest.raises(DataError, match=message) as info:
        check_coco_annotations(path)
    assert str(info.value).startswith(str(path))
    assert '\n' not in str(info.value)


@pytest.mark.parametrize(
    'box', [[1, 2, 3], [1, 2, 3, None], [1, 2, 3, float('nan')], ['1'] * 4]
)
def test_coco_check_of_boxes(write, box):
    content = coco()
    content['annotations'][1]['bbox'] = box
    with pytest.raises(DataError, match='annotation 2: expected bbox as 4'):
        check_coco_annotations(write(content))


def test_coco_check_of_a_missing_file_and_of_a_folder(tmp_path):
    with pytest.raises(DataError, match=r'got nothing\. Ask Ann'):
        check_coco_annotations(tmp_path / 'no.json', remedy='Ask Ann')
    with pytest.raises(DataError, match='directory'):
        check_coco_annotations(tmp_path)


def test_coco_check_counts_missing_images(write, tmp_path):
    path = write(coco())
    images = tmp_path / 'images'
    with pytest.raises(DataError, match='the folder of images, got nothing'):
        check_coco_annotations(path, images)
    images.mkdir()
    (images / 'a.jpg').touch()
    (images / 'b.jpg').touch()  # not where it is looked for
    with pytest.raises(DataError, match=r'got 1 missing: sub/b\.jpg\.'):
        check_coco_annotations(path, images)
    many = [dict(coco()['images'][0], id=i, file_name=f'{i}.jpg')
            for i in (7, 8, 9, 10, 11)]  # fmt: skip
    with pytest.raises(
        DataError, match=r'5 missing: 7\.jpg, 8\.jpg, 9\.jpg and 2 more'
    ):
        check_coco_annotations(write(coco(images=many)), images)


def test_coco_check_without_annotations(write):
    content = coco()
    del content['annotations']
    with pytest.raises(DataError, match="the key 'annotations'"):
        check_coco_annotations(write(content))
    found = check_coco_annotations(write(content), annotated=False)
    assert found['annotations'] == 0


# ------------------------------------------------------------- VOC's format

XML = """
<annotation>
  <size><width>{width}</width><height>30</height><depth>3</depth></size>
  {objects}
</annotation>
"""
OBJECT = """
<object>
  <name>{name}</name><difficult>{difficult}</difficult>
  <bndbox>
    <xmax>{box[2]}</xmax><xmin>{box[0]}</xmin>
    <ymax>{box[3]}</ymax><ymin>{box[1]}</ymin>
  </bndbox>
  <part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>
</object>
"""


def voc_xml(*objects, width=40):
    nodes = (
        OBJECT.format(name=name, box=box, difficult=difficult)
        for name, box, difficult in objects
    )
    return XML.format(objects=''.join(nodes), width=width)


def make_voc(root, labels, split='train'):
    """A folder in the layout of VOC with empty images."""
    for folder in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, xml in labels.items():
        (root / 'Annotations' / f'{name}.xml').write_text(xml)
        (root / 'JPEGImages' / f'{name}.jpg').touch()
    names = '\n'.join(labels) + '\n'
    (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text(names)
    return root


@pytest.fixture
def voc(tmp_path):
    return make_voc(
        tmp_path / 'VOC',
        {
            'b': voc_xml(('dog', (1, 1, 10, 20), 0)),
            'a': voc_xml(
                ('cat', (5, 6, 5, 6), 0),
                ('cat', (30, 20, 45, 31), 1),
                ('dog', (2.5, 3, 8, 9), 0),
            ),
        },
    )


def test_voc_xml_reads_objects_and_not_their_parts():
    image = read_voc_xml(voc_xml(('cat', (1, 2, 3, 4.5), 1)).encode(), 'x')
    assert (image.width, image.height) == (40, 30)
    assert [(o.name, o.box, o.difficult) for o in image.objects] == [
        ('cat', (1, 2, 3, 4.5), True)
    ]


@pytest.mark.parametrize(
    ('xml', 'message'),
    [
        ('', 'got an empty file'),
        (voc_xml()[:60], 'got malformed XML'),
        ('<annotation/>', r'a number in <size/width>, got none'),
        (voc_xml(width='wide'), r"<size/width>, got 'wide'"),
        (voc_xml(width=0), 'the size of the image, got 0 x 30'),
        (voc_xml(('', (1, 2, 3, 4), 0)), 'a <name> in each <object>'),
        (voc_xml(('cat', (1, 2, 'nan', 4), 0)), r"<bndbox/xmax>, got 'nan'"),
    ],
)
def test_voc_xml_names_what_is_wrong(xml, message):
    with pytest.raises(DataError, match=message) as info:
        read_voc_xml(xml.encode(), 'x.xml')
    assert str(info.value).startswith('x.xml: ')


def test_voc_check_counts(voc):
    assert voc_check(voc, 'train') == {'images': 2, 'objects': 4}
    assert voc_check(voc, 'train', classes=('dog', 'cat'))['objects'] == 4


def test_voc_check_takes_real_data(shared_data):
    root = shared_data / 'bccd' / 'BCCD'
    found = [voc_check(root, split) for split in ('train', 'val', 'test')]
    assert [count['images'] for count in found] == [205, 87, 72]
    assert sum(count['objects'] for count in found) == 4888


def test_voc_check_names_what_is_wrong(voc):
    with pytest.raises(DataError, match=r'val\.txt: .* got nothing'):
        voc_check(voc, 'val')
    with pytest.raises(DataError, match=r'b\.xml: .* classes cat, got dog'):
        voc_check(voc, 'train', classes=['cat'])
    names = voc / 'ImageSets' / 'Main' / 'train.txt'
    for text, message in (
        ('', 'an empty file'),
        ('a 1\nb -1\n', "2 other lines: 'a 1', 'b -1'"),
        ('a\nb\na\n', '1 more than once: a'),
        ('a\nc\n', r'Annotations: .* got 1 missing: c\.xml'),
    ):
        names.write_text(text)
        with pytest.raises(DataError, match=message):
            voc_check(voc, 'train')
    names.write_text('a\nb\n')
    (voc / 'JPEGImages' / 'b.jpg').unlink()
    with pytest.raises(DataError, match=r'JPEGImages: .* 1 missing: b\.jpg'):
        voc_check(voc, 'train')


def test_voc_to_coco_by_hand(voc):
    done = voc_to_coco([(voc, 'train')], ['cat', 'dog'])
    assert done.coco == {
        'images': [
            {'id': 1, 'file_name': 'b.jpg', 'width': 40, 'height': 30},
            {'id': 2, 'file_name': 'a.jpg', 'width': 40, 'height': 30},
        ],
        'annotations': [
            {
                'id': 1,
                'image_id': 1,
                'category_id': 2,
                'bbox': [1, 1, 9, 19],
                'area': 171,
                'iscrowd': 0,
            },
            {  # leaves the image by 5 and 1 pixels
                'id': 2,
                'image_id': 2,
                'category_id': 1,
                'bbox': [30, 20, 10, 10],
                'area': 100,
                'iscrowd': 1,
            },
            {
                'id': 3,
                'image_id': 2,
                'category_id': 2,
                'bbox': [2.5, 3, 5.5, 6],
                'area': 33.0,
                'iscrowd': 0,
            },
        ],
        'categories': [{'id': 1, 'name': 'cat'}, {'id': 2, 'name': 'dog'}],
    }
    assert done.dropped == ['a cat 5 6 5 6']
    assert done.clipped == ['a cat 30 20 45 31']


def test_voc_to_coco_one_based(voc):
    done = voc_to_coco([(voc, 'train')], ['cat', 'dog'], one_based=True)
    boxes = [row['bbox'] for row in done.coco['annotations']]
    # pixels 1 to 10 are the ten leftmost; pixel 5 alone has an area
    assert boxes == [
        [0, 0, 10, 20],
        [4, 5, 1, 1],
        [29, 19, 11, 11],
        [1.5, 2, 6.5, 7],
    ]
    assert done.dropped == []
    assert done.clipped == ['a cat 30 20 45 31']


def test_voc_to_coco_joins_folders(voc, tmp_path):
    other = make_voc(
        tmp_path / 'more' / 'VOC',
        {'a': voc_xml(('cat', (0, 0, 2, 2), 0))},
        'test',
    )
    done = voc_to_coco(
        [(voc, 'train'), (other, 'test')],
        ['cat', 'dog'],
        relative_to=tmp_path,
    )
    names = [row['file_name'] for row in done.coco['images']]
    assert names == [
        'VOC/JPEGImages/b.jpg',
        'VOC/JPEGImages/a.jpg',
        'more/VOC/JPEGImages/a.jpg',
    ]
    assert [row['id'] for row in done.coco['images']] == [1, 2, 3]
    assert [row['id'] for row in done.coco['annotations']] == [1, 2, 3, 4]
    assert done.coco['annotations'][-1]['image_id'] == 3


def test_voc_to_coco_of_real_data(shared_data, tmp_path):
    root = shared_data / 'bccd' / 'BCCD'
    classes = ('RBC', 'WBC', 'Platelets')
    done = voc_to_coco([(root, 'val')], classes)
    path = tmp_path / 'val.json'
    assert write_json(path, done.coco)
    found = check_coco_annotations(path, root / 'JPEGImages')
    # all but the one box that is a point
    objects = voc_check(root, 'val')['objects']
    assert found['annotations'] == objects - 1 == 1137
    assert done.dropped == ['BloodImage_00338 RBC 504 337 504 337']
    assert done.clipped == []
    loaded = COCO(str(path))
    assert [row['name'] for row in loaded.loadCats([1, 2, 3])] == list(classes)
    image = loaded.imgs[1]
    xml = root / 'Annotations' / image['file_name'].replace('.jpg', '.xml')
    first = read_voc_xml(xml.read_bytes(), xml).objects[0].box
    x, y, width, height = loaded.imgToAnns[1][0]['bbox']
    assert (x, y, x + width, y + height) == first


@pytest.mark.parametrize(
    ('box', 'expected'),
    [
        ((1, 2, 3, 4), (1, 2, 3, 4)),
        ((-5, -5, 5, 5), (0, 0, 5, 5)),
        ((8, 8, 15, 15), (8, 8, 10, 10)),
        ((10, 2, 12, 4), None),  # touches from outside
        ((3, 3, 3, 9), None),
        ((5, 3, 3, 9), None),
    ],
)
def test_clip_box(box, expected):
    assert clip_box(box, (0, 0, 10, 10)) == expected


def test_coco_annotation_writes_whole_numbers_as_such():
    row = coco_annotation(1, 2, 3, (1.0, 2.0, 4.0, 4.5), crowd=True)
    assert json.dumps(row['bbox']) == '[1, 2, 3, 2.5]'
    assert (row['area'], row['iscrowd']) == (7.5, 1)


# ------------------------------------------------------------------ writing


def test_write_json_leaves_what_says_the_same(tmp_path):
    path = tmp_path / 'new' / 'x.json'
    assert write_json(path, {'a': [1, 'ä']})
    os.utime(path, (1, 1))
    assert not write_json(path, {'a': [1, 'ä']})
    assert path.stat().st_mtime == 1
    assert write_json(path, {'a': [2]})
    assert read_json(path) == {'a': [2]}


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_replacing_is_all_or_nothing(tmp_path, error):
    path = tmp_path / 'x'
    path.write_bytes(b'old')

    def write_half():
        with replacing(path) as file:
            file.write(b'ne')
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['x']
