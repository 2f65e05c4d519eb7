"""Small data sets on disk, in the layouts of COCO and VOC."""

import json


def coco_content(names=('1.jpg', '2.jpg'), category='cat', **changes):
    """COCO annotations of some images with one box each."""
    numbers = range(1, len(names) + 1)
    content = {
        'images': [
            {'id': n, 'file_name': name, 'width': 40, 'height': 30}
            for n, name in zip(numbers, names, strict=True)
        ],
        'annotations': [
            {
                'id': n,
                'image_id': n,
                'category_id': 3,
                'bbox': [1, 2, 3.5, 4],
                'area': 14.0,
            }
            for n in numbers
        ],
        'categories': [{'id': 3, 'name': category}],
    }
    return {**content, **changes}


def make_coco(root):
    """The folders of COCO 2017, with two photos per split."""
    for split in ('train', 'val'):
        (root / f'{split}2017').mkdir(parents=True)
        for name in ('1.jpg', '2.jpg'):
            (root / f'{split}2017' / name).write_text(f'{split} {name}')
        path = root / 'annotations' / f'instances_{split}2017.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco_content()))
    return root


def voc_xml(*objects, size=(40, 30)):
    """VOC's XML of objects, each a class, a box and optionally a flag."""
    nodes = ''
    for name, box, *difficult in objects:
        keys = zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)
        # labelling tools write the corners in any order
        corners = ''.join(sorted(f'<{key}>{v}</{key}>' for key, v in keys))
        nodes += (
            f'<object><name>{name}</name><bndbox>{corners}</bndbox>'
            f'<difficult>{int(any(difficult))}</difficult>'
            '<part><name>head</name><bndbox><xmin>1</xmin></bndbox></part>'
            '</object>'
        )
    return (
        f'<annotation><size><width>{size[0]}</width><height>{size[1]}</height>'
        f'</size>{nodes}</annotation>'
    )


def make_voc(root, split, labels):
    """One split in the layout of VOC; ``labels`` maps names to XML."""
    for folder in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name, xml in labels.items():
        (root / 'Annotations' / f'{name}.xml').write_text(xml)
        (root / 'JPEGImages' / f'{name}.jpg').write_text(name)
    path = root / 'ImageSets' / 'Main' / f'{split}.txt'
    path.write_text(''.join(f'{name}\n' for name in labels))
    return root
