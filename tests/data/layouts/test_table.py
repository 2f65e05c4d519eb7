"""Tables of boxes, under the headers that tools write."""

import csv

import pytest

from mmkd.data.layouts import find_data
from mmkd.errors import DataError
from tests.helpers import own_data as own

PHOTOS = {n: row for n, row in own.photos(12).items() if row[1]}
KNOWN = own.known(PHOTOS)
HALVES = {'train': list(PHOTOS)[::2], 'val': list(PHOTOS)[1::2]}


def rows_of(names, form):
    for name in names:
        (width, height), objects = PHOTOS[name]
        for kind, (x0, y0, x1, y1) in objects:
            yield form(f'{name}.jpg', width, height, kind, x0, y0, x1, y1)


def put(root, file, header, form, names=PHOTOS, images='images', mark=','):
    for name in names:
        own.draw(root / images / f'{name}.jpg', PHOTOS[name][0])
    path = own.write(root / file, '')
    with path.open('w', newline='', encoding='utf-8') as out:
        writer = csv.writer(out, delimiter=mark)
        if header:
            writer.writerow(header.split(','))
        writer.writerows(rows_of(names, form))
    return path


def tensorflow(n, w, h, c, x0, y0, x1, y1):
    return n, w, h, c, x0, y0, x1, y1


TENSORFLOW = 'filename,width,height,class,xmin,ymin,xmax,ymax'


def openimages(n, w, h, c, x0, y0, x1, y1):
    return n[:-4], 'x', c, 1, x0 / w, x1 / w, y0 / h, y1 / h, 0


@pytest.mark.parametrize(
    ('header', 'form'),
    [
        (TENSORFLOW, tensorflow),
        (
            '',  # RetinaNet's
            lambda n, w, h, c, *box: (f'images/{n}', *box, c),
        ),
        (
            'ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf',
            openimages,
        ),
        (
            'image_id,x,y,w,h,label',
            lambda n, w, h, c, x0, y0, x1, y1: (
                n,
                *(x0, y0, x1 - x0, y1 - y0),
                c,
            ),
        ),
        (
            'label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name,'
            'image_width,image_height',
            lambda n, w, h, c, x0, y0, x1, y1: (
                c,
                *(x0, y0, x1 - x0, y1 - y0),
                *(n, w, h),
            ),
        ),
        (
            'Image Path,Class Name,x1,y1,x2,y2',
            lambda n, w, h, c, *box: (f'/old/disk/images/{n}', c, *box),
        ),
    ],
)
def test_headers(tmp_path, header, form):
    put(tmp_path / 'x', 'labels.csv', header, form)
    data = find_data(str(tmp_path / 'x'))
    assert own.delivered(data) == KNOWN
    assert not data.faults
    again = find_data(str(tmp_path / 'x/labels.csv'))
    assert own.delivered(again) == KNOWN


def test_a_column_with_the_box(tmp_path):
    """As in Kaggle's wheat: no class, and a list as text."""

    def form(n, w, h, c, x0, y0, x1, y1):
        return n[:-4], w, h, f'[{x0}.0, {y0}.0, {x1 - x0}.0, {y1 - y0}]', 'x'

    put(tmp_path / 'x', 'train.csv', 'image_id,width,height,bbox,source', form)
    data = find_data(str(tmp_path / 'x'))
    assert data.classes == ('object',)
    found = own.delivered(data)
    assert {n: [b for _, b in rows] for n, rows in found.items()} == {
        n: sorted(b for _, b in rows) for n, rows in KNOWN.items()
    }


def test_roboflow(tmp_path):
    for split, names in HALVES.items():
        folder = 'valid' if split == 'val' else split
        file = f'{folder}/_annotations.csv'
        put(tmp_path / 'x', file, TENSORFLOW, tensorflow, names, folder)
    data = find_data(str(tmp_path / 'x'))
    for split, names in HALVES.items():
        expected = {name: KNOWN[name] for name in names}
        assert own.delivered(data, split) == expected


def test_tensorflow_tests_where_others_validate(tmp_path):
    for split, names in HALVES.items():
        file = 'train_labels.csv' if split == 'train' else 'test_labels.csv'
        put(tmp_path / 'x', file, TENSORFLOW, tensorflow, names)
    # Each table leaves the images of the other alone.
    data = find_data(str(tmp_path / 'x'))
    assert set(own.delivered(data, 'val')) == set(HALVES['val'])
    assert not data.faults


def test_a_column_of_splits_and_semicolons(tmp_path):
    def form(n, w, h, c, *box):
        return n, c, *box, 'valid' if n[:-4] in HALVES['val'] else 'TRAIN'

    header = 'image,label,xmin,ymin,xmax,ymax,split'
    put(tmp_path / 'x', 'a.csv', header, form, mark=';')
    data = find_data(str(tmp_path / 'x'))
    assert set(own.delivered(data, 'val')) == set(HALVES['val'])


def test_faults_and_images_without_objects(tmp_path):
    path = put(tmp_path / 'x', 'a.csv', TENSORFLOW, tensorflow)
    own.draw(tmp_path / 'x/images/negative.jpg', (9, 9))
    own.draw(tmp_path / 'x/images/bare.jpg', (9, 9))
    first = next(iter(PHOTOS))
    with path.open('a') as file:
        file.write(f'{first}.jpg,9,9,cat,1,2,x,4\n')
        file.write(f'{first}.jpg,9,9,,1,2,3,4\n')
        file.write('gone.jpg,9,9,cat,1,2,3,4\n\n')
        file.write('negative.jpg,9,9,,,,,\n')
    data = find_data(str(tmp_path / 'x'))
    count = 1 + sum(map(len, KNOWN.values()))
    assert data.faults == {
        'rows that cannot be read': [
            f"a.csv, row {count + 1}: '{first}.jpg,9,9,cat,1,2,x,4'",
            f"a.csv, row {count + 2}: '{first}.jpg,9,9,,1,2,3,4'",
        ],
        'rows of an image that is not there': [
            f"a.csv, row {count + 3}: 'gone.jpg'"
        ],
        'images without a row': ['images/bare.jpg'],
    }
    assert own.delivered(data) == KNOWN | {'negative': []}


def test_another_table(tmp_path):
    path = own.write(tmp_path / 'results.csv', 'epoch,loss\n1,2\n')
    with pytest.raises(DataError, match="got 'epoch, loss'"):
        find_data(str(path))
