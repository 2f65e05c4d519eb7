import pytest
from pycocotools.coco import COCO

from mmkd.data import (
    check_coco_annotations,
    read_voc_xml,
    voc_check,
    voc_to_coco,
    write_json,
)
from mmkd.errors import DataError
from tests.helpers.layouts import make_voc, voc_xml


@pytest.fixture
def voc(tmp_path):
    labels = {
        'b': voc_xml(('dog', (1, 1, 10, 20))),
        'a': voc_xml(
            ('cat', (5, 6, 5, 6)),
            ('cat', (30, 20, 45, 31), True),
            ('dog', (2.5, 3, 8, 9)),
        ),
    }
    return make_voc(tmp_path / 'VOC', 'train', labels)


def test_xml_reads_objects_and_not_their_parts():
    xml = voc_xml(('cat', (1, 2, 3, 4.5), True))
    image = read_voc_xml(xml.encode(), 'x')
    assert (image.width, image.height) == (40, 30)
    assert [(o.name, o.box, o.difficult) for o in image.objects] == [
        ('cat', (1, 2, 3, 4.5), True)
    ]


ENTITIES = ''.join(
    f'<!ENTITY e{n} "{f"&e{n - 1};" * 10 if n else "x" * 10}">'
    for n in range(10)
)


@pytest.mark.parametrize(
    ('xml', 'message'),
    [
        ('', 'got an empty file'),
        (voc_xml()[:60], 'got malformed XML'),
        ('<annotation/>', r'a number in <size/width>, got none'),
        (voc_xml(size=('wide', 30)), r"<size/width>, got 'wide'"),
        (voc_xml(size=(0, 30)), 'the size of the image, got 0 x 30'),
        (voc_xml(('', (1, 2, 3, 4))), 'a <name> in each <object>'),
        (voc_xml(('cat', (1, 2, 'nan', 4))), r"<bndbox/xmax>, got 'nan'"),
        # a bomb: few bytes that stand for gigabytes
        (f'<!DOCTYPE a [{ENTITIES}]><a>&e9;</a>', 'got malformed XML'),
    ],
)
def test_xml_names_what_is_wrong(xml, message):
    with pytest.raises(DataError, match=message) as info:
        read_voc_xml(xml.encode(), 'x.xml')
    assert str(info.value).startswith('x.xml: ')


def xml(text, encoding='utf-8', start=''):
    head = f'<?xml version="1.0" encoding="{encoding}"?>{start}'
    size = '<size><width>9</width><height>9</height></size>'
    return f'{head}<annotation>{size}{text}</annotation>'.encode()


def laughs():
    entities = '<!ENTITY a "lol">' + ''.join(
        f'<!ENTITY {new} "{f"&{old};" * 10}">'
        for old, new in zip('abcdefghi', 'bcdefghij', strict=True)
    )
    name = '<object><name>&j;</name></object>'
    return xml(name, start=f'<!DOCTYPE x [{entities}]>')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (xml('', 'klingon'), r'malformed XML \(unknown encoding'),
        (xml('', 'utf-7'), 'malformed XML'),
        (xml('', 'big5'), 'malformed XML'),
        (laughs(), 'malformed XML'),
        (xml('<object><name>&x;</name></object>'), 'undefined entity'),
        (xml('<object><name>a</name></object>'), 'in <bndbox/xmin>, got none'),
        (b'\xff\xfe<\0', 'malformed XML'),
        (xml('').replace(b'>9<', b'>-9<'), 'the size of the image'),
        (xml('').replace(b'>9<', b'>nan<'), 'a number in <size/width>'),
        (xml('').replace(b'>9<', b'>1e400<'), 'a number in <size/width>'),
        (xml('').replace(b'>9<', b'>%s<' % (b'9' * 5000)), 'a number in'),
    ],
)
def test_xml_of_an_attacker(content, message):
    with pytest.raises(DataError, match=message) as info:
        read_voc_xml(content, 'x.xml')
    assert len(str(info.value)) < 1000


def test_xml_that_is_deep(tmp_path):
    """It is read, and let go, however deep it is."""
    deep = xml('<a>' * 200_000 + '</a>' * 200_000)
    assert read_voc_xml(deep, 'x.xml').objects == ()


def test_xml_that_is_large(voc):
    path = next((voc / 'Annotations').glob('*.xml'))
    path.write_bytes(path.read_bytes() + b' ' * (1 << 24))
    with pytest.raises(DataError, match='more than 16,777,216 bytes'):
        voc_check(voc, 'train')


@pytest.mark.parametrize('name', ['../x', '/etc/x', 'a/../../x', '\ufeffx'])
def test_lists_that_lead_elsewhere(voc, name):
    path = voc / 'ImageSets' / 'Main' / 'train.txt'
    path.write_text(f'{name}\n')
    with pytest.raises(DataError, match=r'lead out of|a byte order mark'):
        voc_check(voc, 'train')


def test_check_counts(voc):
    assert voc_check(voc, 'train') == {'images': 2, 'objects': 4}
    assert voc_check(voc, 'train', classes=('dog', 'cat'))['objects'] == 4


def test_check_takes_real_data(shared_data):
    root = shared_data / 'bccd' / 'BCCD'
    found = [voc_check(root, split) for split in ('train', 'val', 'test')]
    assert [count['images'] for count in found] == [205, 87, 72]
    assert sum(count['objects'] for count in found) == 4888


def test_check_names_what_is_wrong(voc):
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


def test_conversion_by_hand(voc):
    done = voc_to_coco([(voc, 'train')], ['cat', 'dog'])
    keys = ('id', 'file_name', 'width', 'height')
    assert done.content['images'] == [
        dict(zip(keys, (1, 'b.jpg', 40, 30), strict=True)),
        dict(zip(keys, (2, 'a.jpg', 40, 30), strict=True)),
    ]
    keys = ('id', 'image_id', 'category_id', 'bbox', 'area', 'iscrowd')
    assert [tuple(row) for row in done.content['annotations']] == [keys] * 3
    assert [tuple(row.values()) for row in done.content['annotations']] == [
        (1, 1, 2, [1, 1, 9, 19], 171, 0),
        (2, 2, 1, [30, 20, 10, 10], 100, 1),  # left the image by 5 and 1
        (3, 2, 2, [2.5, 3, 5.5, 6], 33.0, 0),
    ]
    assert done.content['categories'] == [
        {'id': 1, 'name': 'cat'},
        {'id': 2, 'name': 'dog'},
    ]
    assert done.dropped == ['a cat 5 6 5 6']
    assert done.clipped == ['a cat 30 20 45 31']


def test_conversion_of_indices_from_one(voc):
    done = voc_to_coco([(voc, 'train')], ['cat', 'dog'], one_based=True)
    # pixels 1 to 10 are the ten leftmost; pixel 5 alone has an area
    assert [row['bbox'] for row in done.content['annotations']] == [
        [0, 0, 10, 20],
        [4, 5, 1, 1],
        [29, 19, 11, 11],
        [1.5, 2, 6.5, 7],
    ]
    assert done.dropped == []
    assert done.clipped == ['a cat 30 20 45 31']


def test_conversion_joins_folders(voc, tmp_path):
    other = tmp_path / 'more' / 'VOC'
    make_voc(other, 'test', {'a': voc_xml(('cat', (0, 0, 2, 2)))})
    done = voc_to_coco(
        [(voc, 'train'), (other, 'test')],
        ['cat', 'dog'],
        relative_to=tmp_path,
    )
    images, boxes = done.content['images'], done.content['annotations']
    assert [(row['id'], row['file_name']) for row in images] == [
        (1, 'VOC/JPEGImages/b.jpg'),
        (2, 'VOC/JPEGImages/a.jpg'),
        (3, 'more/VOC/JPEGImages/a.jpg'),
    ]
    assert [row['id'] for row in boxes] == [1, 2, 3, 4]
    assert boxes[-1]['image_id'] == 3


def test_conversion_of_real_data(shared_data, tmp_path):
    root = shared_data / 'bccd' / 'BCCD'
    classes = ('RBC', 'WBC', 'Platelets')
    done = voc_to_coco([(root, 'val')], classes)
    path = tmp_path / 'val.json'
    assert write_json(path, done.content)
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
