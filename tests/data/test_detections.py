"""Files of detections are read, and what is wrong with them is named."""

import json

import pytest

from mmkd.data.detections import OUTSIDE, ByName, read_detections
from mmkd.errors import DataError

IMAGES = [
    dict(id=7, file_name='train/a.jpg', width=100, height=80),
    dict(id=9, file_name='b.jpg', width=60, height=40),
]
CATEGORIES = [dict(id=18, name='dog'), dict(id=3, name='car')]


def annotation(number, **changes):
    row = dict(id=number, image_id=7, category_id=3, bbox=[10, 20, 30, 40])
    return row | dict(area=1200, iscrowd=0) | changes


def result(**changes):
    row = dict(image_id=7, category_id=18, bbox=[1, 2, 3, 4], score=0.5)
    return row | changes


def content(*rows):
    return dict(images=IMAGES, categories=CATEGORIES, annotations=list(rows))


@pytest.fixture
def write(tmp_path):
    def write(data, name='a.json'):
        path = tmp_path / name
        path.write_text(data if isinstance(data, str) else json.dumps(data))
        return path

    return write


def test_annotations_with_scores(write):
    rows = annotation(1, score=0.25), annotation(2, image_id=9, category_id=18)
    file = read_detections(write(content(*rows)))
    assert file.classes == ('dog', 'car')
    first, second = file.images[7], file.images[9]
    assert (first.name, first.size) == ('train/a.jpg', (80, 100))
    assert (first.boxes, first.scores) == ([(10, 20, 40, 60)], [0.25])
    assert first.labels == [1]
    # Clipped to 60 x 40; a box of a person has no score, and counts as 1.
    assert second.boxes == [(10, 20, 40, 40)]
    assert (second.scores, second.labels) == ([1.0], [0])
    assert not file.dropped


def test_annotations_without_any_object(write):
    file = read_detections(write(content()))
    assert [image.boxes for image in file.images.values()] == [[], []]


def test_results_and_what_names_them(write):
    about = write(content(annotation(1)), 'about.json')
    rows = [result(), result(category_id=3, score=1, bbox=[90, 70, 30, 30])]
    file = read_detections(write(rows), about)
    assert file.images[7].boxes == [(1, 2, 4, 6), (90, 70, 100, 80)]
    assert file.images[7].labels == [0, 1]
    assert file.images[9].boxes == []


def test_results_by_numbers(write):
    rows = [result(image_id=3), result(image_id='x', category_id=3)]
    with pytest.raises(DataError, match='a list of results, which numbers'):
        read_detections(write(rows))
    file = read_detections(write(rows), classes={18: 'dog', '3': 'car'})
    assert file.classes == ('dog', 'car')
    assert file.images[3].labels == [0]
    assert file.images['x'].labels == [1]
    with pytest.raises(DataError, match='1 detections with another one: 3'):
        read_detections(write(rows), classes={18: 'dog'})


TABLE = """image,class,xmin,ymin,xmax,ymax,score
a.jpg,dog,1,2,3,4,.5
a.jpg,cat,1,2,30,40,.75
b.jpg,,,,,,
"""


def test_a_table(write):
    file = read_detections(write(TABLE, 'a.csv'))
    assert file.classes == ('cat', 'dog')
    assert file.images['a.jpg'].boxes == [(1, 2, 3, 4), (1, 2, 30, 40)]
    assert file.images['a.jpg'].labels == [1, 0]
    assert file.images['a.jpg'].scores == [0.5, 0.75]
    assert file.images['b.jpg'].boxes == []


def test_a_table_of_numbers(write):
    text = 'filename,width,height,class_id,x,y,w,h\na.jpg,20,10,1,5,5,99,2\n'
    path = write(text, 'a.csv')
    file = read_detections(path, classes=['cat', 'dog'])
    assert file.classes == ('cat', 'dog')
    image = file.images['a.jpg']
    assert (image.boxes, image.labels) == ([(5, 5, 20, 7)], [1])
    assert image.size == (10, 20)
    with pytest.raises(DataError, match='classes from 0 to 0, got 1'):
        read_detections(path, classes=['cat'])


def test_rows_that_cannot_be_read_are_counted(write):
    text = TABLE + 'c.jpg,dog,nan,2,3,4,.5\nc.jpg,dog,1,2,3,4,50\n'
    file = read_detections(write(text, 'a.csv'))
    assert 'c.jpg' not in file.images
    ((what, count),) = file.dropped.items()
    assert count == 2
    assert 'rows that cannot be read (such as row 5' in what


def test_a_table_in_fractions(write):
    text = 'image,class,xmin,ymin,xmax,ymax\na.jpg,dog,.1,.2,.3,.4\n'
    with pytest.raises(DataError, match='got fractions of the image'):
        read_detections(write(text, 'a.csv'))


@pytest.mark.parametrize(
    'box', [[200, 10, 5, 5], [-20, 10, 20, 5], [10, 10, 0, 5], [1, 900, 1, 9]]
)
def test_boxes_outside_of_their_image_are_counted(write, box):
    file = read_detections(write(content(annotation(1, bbox=box))))
    assert file.images[7].boxes == []
    assert file.dropped == {OUTSIDE: 1}


@pytest.mark.parametrize(
    ('rows', 'message'),
    [
        ([result(bbox=[1, 2, -3, 4])], 'entry 0: .*less than nothing'),
        ([result(), result(score=float('nan'))], 'entry 1: .*nan in its'),
        ([result(score=70)], 'entry 0: .*score=70'),
        ([result(bbox=[1, 2, 3])], 'which is not 4 numbers'),
        ([result(image_id=1)], 'image_id is in .*1 with another one: 1'),
        ([result(category_id=99)], 'category_id is in .*another one: 99'),
        (['x'], 'entry 0: expected a detection .* got a str'),
        ([dict(image_id=7)], 'no category_id, only image_id'),
    ],
)
def test_results_that_are_none(write, rows, message):
    about = write(content(annotation(1)), 'about.json')
    with pytest.raises(DataError, match=message):
        read_detections(write(rows), about)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(score=1.5), 'annotation 1: expected a score from 0 to 1'),
        (dict(score='high'), "got 'high'"),
        (dict(bbox=[0, 0, -1, 4]), 'expected bbox as 4 numbers'),
        (dict(image_id=1), 'unknown image_id'),
    ],
)
def test_annotations_that_are_none(write, changes, message):
    with pytest.raises(DataError, match=message):
        read_detections(write(content(annotation(1, **changes))))


def test_crowds_are_left_out(write):
    file = read_detections(write(content(annotation(1, iscrowd=1))))
    assert (file.images[7].boxes, file.dropped) == ([], {'crowds': 1})


def test_files_that_are_none(write):
    for text in ('', '[{', '3'):
        with pytest.raises(DataError):
            read_detections(write(text))
    with pytest.raises(DataError, match='columns of an image'):
        read_detections(write('a,b\n1,2\n', 'a.csv'))


def test_names_fit_the_end_of_paths():
    names = ByName({'train/1.jpg': 'a', 'val/1.jpg': 'b', '2.jpg': 'c'})
    assert names.find('/data/train/1.jpg') == 'a'
    assert names.find('/data/val/1.jpg') == 'b'
    assert names.find('/data/test/1.jpg') is None
    assert names.find('x/2.jpg') == 'c'
    assert names.find('12.jpg') is None
    assert names.find('1.jpg') is None  # of two, nobody knows which
    whole = ByName({'/home/me/x/3.jpg': 'd', 'C:\\photos\\4.jpg': 'e'})
    assert whole.find('x/3.jpg') == 'd'
    assert whole.find('/other/photos/4.jpg') is None
    assert whole.find('photos/4.jpg') == 'e'
