"""Real data sets in other layouts, and what a run makes of them."""

import csv
import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from mmkd.data.layouts import find_data
from tests.helpers import own_data as own


@pytest.fixture
def cells(shared_data):
    """By name of a photo of BCCD: its size, and its objects as written."""
    root = shared_data / 'bccd/BCCD'
    found = {}
    for path in sorted((root / 'Annotations').glob('*.xml'))[:60]:
        tree = ElementTree.parse(path)
        size = [int(tree.findtext(f'size/{k}')) for k in ('width', 'height')]
        objects = []
        for node in tree.findall('object'):
            box = [
                int(node.findtext(f'bndbox/{key}'))
                for key in ('xmin', 'ymin', 'xmax', 'ymax')
            ]
            if box[0] < box[2] and box[1] < box[3]:
                objects.append((node.findtext('name'), tuple(box)))
        found[path.stem] = (size, objects)
    return root, found


def test_blood_cells(cells, tmp_path, monkeypatch):
    """As YOLO, as VOC without lists and as a table: the same boxes."""
    monkeypatch.chdir(tmp_path)
    source, photos = cells
    names = ('RBC', 'WBC', 'Platelets')
    for name, (size, objects) in photos.items():
        for folder in ('yolo/images', 'voc', 'table'):
            path = tmp_path / folder / f'{name}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(source / 'JPEGImages' / path.name)
        lines = own.yolo(size, objects, names)
        own.write(tmp_path / f'yolo/labels/{name}.txt', lines)
        xml = tmp_path / f'voc/{name}.xml'
        xml.symlink_to(source / 'Annotations' / xml.name)
    own.write(tmp_path / 'yolo/classes.txt', '\n'.join(names))
    with (tmp_path / 'table/boxes.csv').open('w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['filename', 'class', 'xmin', 'ymin', 'xmax', 'ymax'])
        for name, (_, objects) in photos.items():
            writer.writerows((f'{name}.jpg', k, *box) for k, box in objects)
    expected = own.known(photos)
    for layout in ('yolo', 'voc', 'table'):
        data = find_data(str(tmp_path / layout))
        assert set(data.classes) == set(names)
        assert own.delivered(data) == expected
        assert not data.faults


def test_coco(shared_data, tmp_path, monkeypatch):
    """One file with the photos of both splits, in folders of their own."""
    monkeypatch.chdir(tmp_path)
    source = shared_data / 'coco_tiny'
    (tmp_path / 'one/images').mkdir(parents=True)
    joined = dict(images=[], annotations=[])
    for split in ('train2017', 'val2017'):
        (tmp_path / 'one/images' / split).symlink_to(source / split)
        path = source / f'annotations/instances_{split}.json'
        content = json.loads(path.read_text())
        joined['images'] += content['images']
        joined['annotations'] += content['annotations']
        joined['categories'] = content['categories']
    own.write(tmp_path / 'one/result.json', json.dumps(joined))
    data = find_data('one')
    original = find_data(str(source))
    assert data.classes == original.classes
    assert own.delivered(data) == own.delivered(original)
    rows = {'train': 0, 'val': 0}
    for split in rows:
        path = Path(f'data/one/annotations/{split}.json')
        content = json.loads(path.read_text())
        rows[split] = {row['category_id'] for row in content['annotations']}
    images = {}
    for row in joined['annotations']:
        images.setdefault(row['category_id'], set()).add(row['image_id'])
    places = {row['id']: i + 1 for i, row in enumerate(joined['categories'])}
    for category, photos in images.items():
        if len(photos) > 1:  # 70 classes, most of them rare
            assert all(places[category] in used for used in rows.values())
