"""Users' data in many layouts, and what MMDetection makes of them."""

from pathlib import Path

import numpy as np

from tests.helpers.layouts import voc_xml

CLASSES = ('cat', 'dog', 'naïve fox')
SIZES = ((64, 48), (48, 64), (80, 80))
PIPELINE = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='PackDetInputs', meta_keys=('img_path', 'ori_shape')),
]


def photos(count=8, boxes=None):
    """By name: the size of each photo and its objects, (class, xyxy).

    Every fourth photo has no objects. The boxes are whole numbers.
    """
    rng = np.random.default_rng(7)
    found = {}
    for number in range(count):
        width, height = SIZES[number % len(SIZES)]
        objects = []
        for index in range(number % 4 if boxes is None else boxes):
            x, y = rng.integers(0, (width - 12, height - 12))
            w, h = rng.integers(4, 12, 2)
            name = CLASSES[(number + index) % len(CLASSES)]
            objects.append((name, (x, y, x + w, y + h)))
        found[f'photo {number}'] = ((width, height), objects)
    return found


def draw(path: Path, size, exif: int = 0) -> None:
    """Write a small real image, with an EXIF orientation if one is given."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    width, height = size
    rng = np.random.default_rng(len(path.name))
    pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
    content = Image.Exif()
    if exif:
        content[0x0112] = exif
    Image.fromarray(pixels).save(path, exif=content)


def yolo(size, objects, names=CLASSES):
    """The lines of a label file, as exact as numbers are."""
    width, height = size
    lines = []
    for name, (x0, y0, x1, y1) in objects:
        centre = (x0 + x1) / 2 / width, (y0 + y1) / 2 / height
        values = (*centre, (x1 - x0) / width, (y1 - y0) / height)
        numbers = ' '.join(repr(float(value)) for value in values)
        lines.append(f'{names.index(name)} {numbers}\n')
    return ''.join(lines)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding='utf-8')
    return path


def coco(names, first=1, categories=CLASSES, **changes):
    """COCO's content of photos under the names of files.

    Args:
        names: The name of each file to size and objects.
        first: The first id.
    """
    content = dict(
        images=[
            dict(id=first + i, file_name=name, width=size[0], height=size[1])
            for i, (name, (size, _)) in enumerate(names.items())
        ],
        annotations=[],
        categories=[dict(id=i + 1, name=n) for i, n in enumerate(categories)],
    )
    for index, (_, objects) in enumerate(names.values()):
        for name, (x0, y0, x1, y1) in objects:
            box = [int(v) for v in (x0, y0, x1 - x0, y1 - y0)]
            row = dict(id=first + len(content['annotations']))
            row |= dict(image_id=first + index, bbox=box, iscrowd=0)
            row |= dict(category_id=categories.index(name) + 1)
            row |= dict(area=box[2] * box[3], segmentation=[])
            content['annotations'].append(row)
    return content | changes


def xml(size, objects):
    return voc_xml(*objects, size=size)


def known(photos):
    """What is to be delivered: by file's stem the sorted objects."""
    return {
        name: sorted((c, tuple(map(float, box))) for c, box in objects)
        for name, (_, objects) in photos.items()
    }


def dataset(data, split):
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    return DATASETS.build(
        dict(
            getattr(data, split),
            metainfo=dict(classes=data.classes),
            pipeline=PIPELINE,
            test_mode=True,
            serialize_data=False,  # which collects garbage, slowly
            _scope_='mmdet',
        )
    )


def delivered(data, *splits, key=lambda path: Path(path).stem):
    """What MMDetection's data sets deliver, by file's stem.

    Every image is loaded, and has the size that its annotations say.
    """
    found = {}
    for split in splits or ('train', 'val', 'test'):
        if getattr(data, split) is None:
            continue
        built = dataset(data, split)
        for index in range(len(built)):
            info = built.get_data_info(index)
            item = built[index]
            shape = tuple(item['inputs'].shape[1:])
            assert shape == (info['height'], info['width']), info['img_path']
            sample = item['data_samples']
            boxes = sample.gt_instances.bboxes
            boxes = np.asarray(getattr(boxes, 'tensor', boxes)).round(3)
            labels = sample.gt_instances.labels.tolist()
            name = key(info['img_path'])
            assert name not in found, f'{name} is there twice'
            found[name] = sorted(
                (data.classes[label], tuple(map(float, box)))
                for label, box in zip(labels, boxes, strict=True)
            )
    return found


def tree(root):
    """All files below a folder with their content."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob('*'))
        if path.is_file()
    }
