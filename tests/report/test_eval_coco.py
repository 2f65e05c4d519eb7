import contextlib
import io
import json
import random

import numpy as np
import pytest
import torch
from mmdet.evaluation import CocoMetric
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmkd.cli import main
from mmkd.report import eval_coco


@pytest.fixture
def write(tmp_path):
    def write(content, name):
        path = tmp_path / name
        path.write_text(
            content if isinstance(content, str) else json.dumps(content)
        )
        return path

    return write


@pytest.fixture
def report(tmp_path, capsys):
    """Run a command line; its JSON, output and error output."""

    def report(*args):
        path = tmp_path / 'report.json'
        status = main(['eval', *map(str, args), '--json', str(path)])
        out, err = capsys.readouterr()
        assert status == 0, err
        return json.loads(path.read_text()), out, err

    return report


@pytest.fixture
def fails(capsys):
    """Run a command line that ends with an error."""

    def fails(*args, match):
        assert main(['eval', *map(str, args)]) == 1
        out, err = capsys.readouterr()
        assert out == '' or '--json' in args
        *_, error = err.splitlines()
        assert error.startswith('error: ')
        assert match in error, error

    return fails


# -------------------------------------------------------------- by hand


def truth():
    """One image; two cats of 20 x 20 pixels, one dog of 50 x 50."""
    boxes = [(1, [0, 0, 20, 20]), (1, [100, 0, 20, 20]), (2, [0, 99, 50, 50])]
    return {
        'images': [
            {'id': 5, 'file_name': 'x.jpg', 'width': 200, 'height': 200},
            {'id': 6, 'file_name': 'y.jpg', 'width': 200, 'height': 200},
        ],
        'annotations': [
            {
                'id': number,
                'image_id': 5,
                'category_id': category,
                'bbox': box,
                'area': box[2] * box[3],
                'iscrowd': 0,
            }
            for number, (category, box) in enumerate(boxes, start=1)
        ],
        'categories': [
            {'id': 1, 'name': 'cat'},
            {'id': 2, 'name': 'dog'},
            {'id': 3, 'name': 'bee'},
        ],
    }


def detection(category, box, score, image=5):
    return {
        'image_id': image,
        'category_id': category,
        'bbox': box,
        'score': score,
    }


# Cats: found, missed, found. Precision is 1 up to recall 1/2, then 2/3; of
# the 101 recalls, 51 are up to 1/2.
CAT = (51 * 1 + 50 * 2 / 3) / 101
# Dog: 50 x 31 of its 50 x 50, an IoU of .62: found at .5, .55 and .6.
DOG = 3 / 10


def detections():
    return [
        detection(1, [0, 0, 20, 20], 0.9),
        detection(1, [50, 50, 20, 20], 0.8),
        detection(1, [100, 0, 20, 20], 0.7),
        detection(2, [0, 99, 50, 31], 0.6),
    ]


def rows_of(scores):
    keys = ('name', 'objects', 'AP', 'AP50')
    return [[row[key] for key in keys] for row in scores['classes']]


def test_figures_by_hand(write, report):
    result = write(detections(), 'x.bbox.json')
    found, out, err = report(result, write(truth(), 'truth.json'))
    assert found['result']['figures'] == pytest.approx(
        {
            'AP': (CAT + DOG) / 2,
            'AP50': (CAT + 1) / 2,
            'AP75': CAT / 2,
            'APs': CAT,
            'APm': DOG,
            'APl': None,
            # a recall of 1/2 with one box, for the cats
            'AR1': (1 / 2 + DOG) / 2,
            'AR10': (1 + DOG) / 2,
            'AR100': (1 + DOG) / 2,
            'ARs': 1.0,
            'ARm': DOG,
            'ARl': None,
        }
    )
    assert rows_of(found['result']) == [
        ['cat', 2, pytest.approx(CAT), pytest.approx(CAT)],
        ['dog', 1, pytest.approx(DOG), pytest.approx(1)],
        ['bee', 0, None, None],
    ]
    assert f'{result}: 4 detections on 1 of 2 images' in out
    lines = [line.split() for line in out.splitlines()]
    assert ['AP', 'IoU', '.50:.95', f'{50 * (CAT + DOG):.2f}'] in lines
    assert lines[-1][0] == 'ARl'
    assert lines[-1][-1] == '-'
    assert err == ''


def test_difference_by_hand(write, report):
    better = detections()
    better[3]['bbox'] = [0, 99, 50, 50]  # the dog, exactly
    del better[1]  # the miss among the cats
    found, out, _ = report(
        write(better, 'new.bbox.json'),
        write(truth(), 'truth.json'),
        '--baseline',
        write(detections(), 'old.bbox.json'),
        '--per-class',
    )
    assert found['result']['figures']['AP'] == pytest.approx(1)
    assert found['baseline']['figures']['AP'] == pytest.approx((CAT + DOG) / 2)
    change = found['difference']
    assert change['figures']['AP'] == pytest.approx(1 - (CAT + DOG) / 2)
    assert change['figures']['AP75'] == pytest.approx(1 - CAT / 2)
    assert change['figures']['APl'] is None
    assert rows_of(change) == [
        ['cat', 2, pytest.approx(1 - CAT), pytest.approx(1 - CAT)],
        ['dog', 1, pytest.approx(0.7), pytest.approx(0)],
        ['bee', 0, None, None],
    ]
    lines = [line.split() for line in out.splitlines()]
    cat = f'{100 * CAT:.2f}', f'{100 * (1 - CAT):+.2f}'
    assert ['cat', '2', '100.00', *cat, '100.00', *cat] in lines
    assert [
        *('dog', '1', '100.00', '30.00', '+70.00'),
        *('100.00', '100.00', '+0.00'),
    ] in lines
    assert ['bee', '0', *'------'] in lines


def test_no_detection_at_all(write, report):
    found, out, err = report(
        write([], 'x.bbox.json'),
        write(truth(), 'truth.json'),
        '--baseline',
        write(detections(), 'old.bbox.json'),
    )
    values = found['result']['figures']
    # there is no large object
    assert {name for name, v in values.items() if v is None} == {'APl', 'ARl'}
    assert {v for v in values.values() if v is not None} == {0.0}
    assert [row['AP'] for row in found['result']['classes']] == [0, 0, None]
    assert found['difference']['figures']['AP50'] == pytest.approx(
        -(CAT + 1) / 2
    )
    assert 'warning: ' in err
    assert 'x.bbox.json: no detection at all' in err
    assert '0 detections on 0 of 2 images' in out


def test_crowds_are_not_counted(write, report):
    labels = truth()
    labels['annotations'][2]['iscrowd'] = 1
    del labels['annotations'][0]['iscrowd']  # absent means no
    found, _, _ = report(
        write(detections(), 'x.bbox.json'), write(labels, 'truth.json')
    )
    assert found['result']['figures']['AP'] == pytest.approx(CAT)
    counts = [row['objects'] for row in found['result']['classes']]
    assert counts == [2, 0, 0]


def test_first_images_only(write, report):
    labels = truth()
    more = dict(labels['annotations'][0], id=9, image_id=6)
    labels['annotations'].append(more)
    paths = write(detections(), 'x.json'), write(labels, 'truth.json')
    whole, _, _ = report(*paths)
    first, out, _ = report(*paths, '--images', 1)
    assert first['result']['figures']['AP'] == pytest.approx((CAT + DOG) / 2)
    assert whole['result']['figures']['AP'] < (CAT + DOG) / 2 - 0.05
    assert first['result']['classes'][0]['objects'] == 2
    assert whole['result']['classes'][0]['objects'] == 3
    assert (first['images'], whole['images']) == (1, 2)
    assert 'evaluated on the first 1 images' in out


def test_annotation_id_0_is_told(write, report):
    labels = truth()
    for row in labels['annotations']:
        row['id'] -= 1
    found, _, err = report(
        write(detections(), 'x.json'), write(labels, 'truth.json')
    )
    assert 'annotation id 0' in err
    # it is true, indeed
    assert found['result']['figures']['AP'] < (CAT + DOG) / 2 - 0.05


# -------------------------------------------------- against others, on photos


@pytest.fixture
def photos(photos, write):
    """Annotations of at most 30 photos."""
    path = photos / 'coco_tiny/annotations/instances_val2017.json'
    labels = json.loads(path.read_text())
    labels['images'] = labels['images'][:30]
    kept = {row['id'] for row in labels['images']}
    labels['annotations'] = [
        row for row in labels['annotations'] if row['image_id'] in kept
    ]
    return write(labels, 'photos.json')


def noisy(path, seed):
    """Detections near the objects, with misses and wrong classes."""
    draw = random.Random(seed)
    labels = json.loads(path.read_text())
    classes = [row['id'] for row in labels['categories']]
    found = []
    for row in labels['annotations']:
        if draw.random() < 0.2:
            continue
        x, y, width, height = row['bbox']
        box = [
            x + width * draw.gauss(0, 0.08),
            y + height * draw.gauss(0, 0.08),
            width * draw.uniform(0.8, 1.2),
            height * draw.uniform(0.8, 1.2),
        ]
        category = row['category_id']
        if draw.random() < 0.2:
            category = draw.choice(classes)
        found.append(detection(category, box, draw.random(), row['image_id']))
    return found


def reference(path, results, kind='bbox'):
    """The evaluator of pycocotools, after its own documentation."""
    with contextlib.redirect_stdout(io.StringIO()):
        labels = COCO(str(path))
        evaluator = COCOeval(labels, labels.loadRes(str(results)), kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def test_figures_are_those_of_pycocotools(write, report, photos):
    result = write(noisy(photos, 1), 'x.bbox.json')
    found, _, _ = report(result, photos)
    expected = reference(photos, result)
    figures = found['result']['figures']
    assert list(figures.values()) == expected.stats.tolist()
    assert 0.1 < figures['AP'] < 0.9
    classes = {row['name']: row for row in found['result']['classes']}
    assert len(classes) == 80
    numbers = {row['name']: i for i, row in expected.cocoGt.cats.items()}
    for name in ('person', 'car', 'bottle', 'chair'):
        number = numbers[name]
        expected.params.catIds = [number]
        with contextlib.redirect_stdout(io.StringIO()):
            expected.evaluate()
            expected.accumulate()
            expected.summarize()
        row = classes[name]
        ap, ap50 = expected.stats[:2]
        assert (row['AP'] is None) == (ap == -1)
        if row['AP'] is not None:
            assert row['AP'] == pytest.approx(ap)
            assert row['AP50'] == pytest.approx(ap50)


def test_masks(write, report, fails, photos):
    with contextlib.redirect_stdout(io.StringIO()):
        labels = COCO(str(photos))
    results = []
    for row in noisy(photos, 2):
        nearest = min(
            labels.imgToAnns[row['image_id']],
            key=lambda known: np.abs(
                np.subtract(known['bbox'], row['bbox'])
            ).sum(),
        )
        mask = labels.annToRLE(nearest)
        mask['counts'] = mask['counts'].decode()
        mask['size'] = list(map(int, mask['size']))
        results.append({**row, 'segmentation': mask})
    only_masks = [{**row} for row in results]
    for row in only_masks:
        del row['bbox']
    result = write(only_masks, 'x.segm.json')
    found, _, _ = report(result, photos, '--type', 'segm')
    expected = reference(photos, result, 'segm').stats.tolist()
    assert list(found['result']['figures'].values()) == expected
    # boxes beside the masks change nothing
    found, _, _ = report(write(results, 'y.json'), photos, '--type', 'segm')
    assert list(found['result']['figures'].values()) == expected

    fails(result, photos, match='--type bbox, got no bbox, only image_id')
    mask = only_masks[3]['segmentation']
    only_masks[3]['segmentation'] = {**mask, 'size': [3, 4]}
    bad = write(only_masks, 'z.json')
    fails(bad, photos, '--type', 'segm', match='a mask of size')
    only_masks[3]['segmentation'] = [[0, 0, 1, 1, 2, 2]]
    bad = write(only_masks, 'z.json')
    fails(bad, photos, '--type', 'segm', match='that is not a compressed RLE')


def test_it_reads_what_mmdet_writes(tmp_path, report, photos):
    labels = json.loads(photos.read_text())
    names = [row['name'] for row in labels['categories']]
    order = {
        row['id']: place for place, row in enumerate(labels['categories'])
    }
    metric = CocoMetric(
        ann_file=str(photos),
        metric='bbox',
        classwise=True,
        outfile_prefix=str(tmp_path / 'x'),
    )
    metric.dataset_meta = {'classes': names}
    rows = noisy(photos, 3)
    for image in labels['images']:
        mine = [row for row in rows if row['image_id'] == image['id']]
        boxes = torch.tensor([row['bbox'] for row in mine]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        classes = [order[row['category_id']] for row in mine]
        sample = {
            'img_id': image['id'],
            'ori_shape': (image['height'], image['width']),
            'pred_instances': {
                'bboxes': boxes,
                'scores': torch.tensor([row['score'] for row in mine]),
                'labels': torch.tensor(classes, dtype=torch.long),
            },
        }
        metric.process({}, [sample])
    with contextlib.redirect_stdout(io.StringIO()):
        expected = metric.evaluate(size=len(labels['images']))
    found, _, _ = report(tmp_path / 'x.bbox.json', photos)
    figures = found['result']['figures']
    for mine, theirs in (
        *(('AP', 'mAP'), ('AP50', 'mAP_50'), ('AP75', 'mAP_75')),
        *(('APs', 'mAP_s'), ('APm', 'mAP_m'), ('APl', 'mAP_l')),
    ):
        value = expected[f'coco/bbox_{theirs}']
        assert figures[mine] == pytest.approx(value, abs=6e-4)
    person = next(
        row for row in found['result']['classes'] if row['name'] == 'person'
    )
    value = expected['coco/person_precision']
    assert person['AP'] == pytest.approx(value, abs=6e-4)


# ------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('content', 'match'),
    [
        ('', 'a JSON file, got an empty file'),
        ('[{"image_id": 5,', 'ends midway'),
        ('{"a": 1}', 'a list of detections, got a dict'),
        (truth(), 'a list of detections, got annotations'),
        ([3], 'entry 0: expected a detection of --type bbox, got a int'),
        (
            [*detections(), {'image_id': 5, 'category_id': 1, 'score': 1}],
            'entry 4: expected a detection of --type bbox, got no bbox',
        ),
        ([detection(1, [1, 2, 3], 0.5)], 'bbox=[1, 2, 3], which is not 4'),
        ([detection(1, [1, 2, 3, None], 0.5)], 'None in its score or box'),
        ([detection(1, [1, 2, 3, 4], float('nan'))], 'nan in its score or'),
        ([detection([1], [1, 2, 3, 4], 0.5)], 'category_id=[1]'),
        (
            [
                detection(1, [1, 2, 3, 4], 0.5, n)
                for n in (5, 6, 7, 8, 9, 9, 10)
            ]
            + [detection(1, [1, 2, 3, 4], 0.5, '5')],
            'expected detections of the images in the annotations, got 6 '
            'that name others: 7, 8, 9 and 2 more. Give what `mmkd test',
        ),
        (
            [*detections(), detection(0, [1, 2, 3, 4], 0.5)],
            'of the categories in the annotations, got 1 that name others: 0.',
        ),
    ],
)
def test_bad_results(write, fails, content, match):
    labels, good = write(truth(), 'truth.json'), write(detections(), 'x.json')
    bad = write(content, 'bad.json')
    fails(bad, labels, match=match)
    fails(bad, labels, match=str(bad))
    fails(good, labels, '--baseline', bad, match=match)


def test_bad_files(write, fails, tmp_path):
    labels, good = write(truth(), 'truth.json'), write(detections(), 'x.json')
    fails(tmp_path / 'no.json', labels, match='got nothing')
    fails(good, tmp_path / 'no.json', match='got nothing')
    fails(good, good, match='a list (a file of results?)')
    fails(good, write('{"images": []}', 'y.json'), match='list of images')
    fails(good, labels, '--type', 'segm', match='masks, got 3 without one')


# ------------------------------------------------------------ hostile files


def mask(counts, size=(200, 200), image=5):
    row = detection(1, [0, 0, 1, 1], 0.5, image)
    return [{**row, 'segmentation': {'size': [*size], 'counts': counts}}]


def with_masks(content=None):
    labels = truth()
    for row in labels['annotations']:
        x, y, w, h = row['bbox']
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        row['segmentation'] = content or [polygon]
    return labels


def runs(*lengths):
    """COCO's compressed encoding of runs, written anew."""
    text = ''
    for i, run in enumerate(lengths):
        x = run - lengths[i - 2] if i > 2 else run
        more = True
        while more:
            code, x = x & 0x1F, x >> 5
            more = x != (-1 if code & 0x10 else 0)
            text += chr(48 + code + 0x20 * more)
    return text


def test_a_mask_by_hand(write, report):
    """The first 20 rows of the first 20 columns: the first cat."""
    found = [0]
    for _ in range(20):
        found += [20, 180]
    found[-1] += 200 * 180
    result = write(mask(runs(*found)), 'x.json')
    labels = write(with_masks(), 'truth.json')
    scores, _, _ = report(result, labels, '--type', 'segm')
    assert scores['result']['classes'][0]['AP50'] == pytest.approx(51 / 101)


@pytest.mark.parametrize(
    ('counts', 'match'),
    [
        (runs(2**31, 2**31), 'a mask of 4,294,967,296 pixels'),
        (runs(1, 40_000), 'a mask of 40,001 pixels'),
        (runs(10, 20), 'a mask of 30 pixels'),
        (runs(40_000, *[0] * 50_000), 'in 50,001 runs'),
        (runs(-5, 40_005), 'which is no RLE'),
        (runs(40_000)[:-1] + 'o', 'which is no RLE'),  # it reads on
        ('o' * 20 + '0', 'which is no RLE'),
        ('\u00e9', 'which is no RLE'),
        ('\x7f', 'which is no RLE'),
        ('', 'a mask of 0 pixels'),
        ([40_000], 'no compressed RLE'.replace('no', 'not a', 1)),
    ],
)
def test_masks_that_are_not_of_their_image(write, fails, counts, match):
    result = write(mask(counts), 'x.json')
    labels = write(with_masks(), 'truth.json')
    fails(result, labels, '--type', 'segm', match=match)


@pytest.mark.parametrize('size', [(200, 201), (True, 200), (2e2, 200), (1,)])
def test_sizes_of_masks(write, fails, size):
    result = write(mask(runs(40_000), size), 'x.json')
    labels = write(with_masks(), 'truth.json')
    fails(result, labels, '--type', 'segm', match='a mask of size')


@pytest.mark.parametrize(
    ('segmentation', 'match'),
    [
        ([[0, 0, 1e9, 0, 1e9, 1e9]], 'with the coordinate 1000000000.0'),
        ([[0, 0, float('nan'), 0, 1, 1]], 'with the coordinate nan'),
        ([[0, 0, True, 0, 1, 1]], 'with the coordinate True'),
        ([[0, 0, 1, 1]], 'a polygon of 2 points'),
        ([[0, 0, 1, 1, 2]], 'the polygon [0, 0, 1, 1, 2]'),
        ([0, 0, 1, 1, 2, 2], 'the polygon 0'),
        ([[0, 0, 400, 400, 0, 400] * 6000], 'pixels around one object'),
        ({'size': [200, 200], 'counts': [40_000.0]}, 'counts=[40000.0]'),
        ({'size': [200, 200], 'counts': [-1, 40_001]}, 'counts=[-1, 40001]'),
        ({'size': [200, 200], 'counts': [2**40]}, 'a mask of 1,099,511'),
        ({'size': [200, 200]}, 'counts=None'),
        ('x', "segmentation='x'"),
    ],
)
def test_annotations_with_odd_masks(write, fails, segmentation, match):
    labels = write(with_masks(segmentation), 'truth.json')
    good = write(mask(runs(40_000)), 'x.json')
    fails(good, labels, '--type', 'segm', match=match)


@pytest.mark.parametrize(
    ('key', 'text', 'match'),
    [
        ('score', 'true', 'True in its score'),
        ('score', 'NaN', 'nan in its score'),
        ('score', '1e999', 'inf in its score'),
        ('score', '9' * 5000, 'a number of more than 4,300 digits'),
        ('score', '9' * 4000, 'a huge number in its score'),
        ('score', '[' * 9000 + ']' * 9000, 'too deep in one another'),
        ('score', '"0.5"', "'0.5' in its score"),
        ('bbox', '[1, 2, 3, true]', 'True in its score or box'),
        ('bbox', '[1, 2, -3, 4]', 'which is less than nothing'),
        ('bbox', '[1, 2, 3, 1e200]', '1e+200 in its score or box'),
        ('image_id', 'true', 'image_id=True'),
        ('image_id', '5.0', 'image_id=5.0'),
        ('category_id', 'null', 'category_id=None'),
        ('category_id', '9' * 4000, 'category_id=a huge number'),
    ],
)
def test_values_that_are_no_numbers(write, fails, key, text, match):
    rows = json.dumps([{**detections()[0], key: '@'}]).replace('"@"', text)
    labels = write(truth(), 'truth.json')
    fails(write(rows, 'x.json'), labels, match=match)


@pytest.mark.parametrize(
    ('table', 'key', 'value'),
    [
        ('images', 'id', True),
        ('images', 'width', -5),
        ('images', 'width', True),
        ('images', 'height', float('inf')),
        ('images', 'id', '5'),
        ('annotations', 'bbox', [1, 2, -3, 4]),
        ('annotations', 'bbox', [1, 2, 10**400, 4]),
        ('annotations', 'area', float('nan')),
        ('annotations', 'area', -1),
        ('annotations', 'iscrowd', 'no'),
        ('annotations', 'id', 2**60),
        ('categories', 'id', '2'),
        ('categories', 'name', None),
    ],
)
def test_annotations_that_are_no_numbers(write, fails, table, key, value):
    labels = truth()
    labels[table][-1][key] = value
    good = write(detections(), 'x.json')
    fails(good, write(labels, 'truth.json'), match='truth.json')


def test_objects_whose_ids_are_texts(write, report):
    labels = truth()
    for row in labels['annotations']:
        row['id'] = f'object {row["id"]}'
    result = write(detections(), 'x.json')
    found, _, _ = report(result, write(labels, 'a.json'))
    assert found == report(result, write(truth(), 'b.json'))[0]


def test_a_report_that_cannot_be_written(write, fails, tmp_path):
    paths = write(detections(), 'x.json'), write(truth(), 'truth.json')
    (tmp_path / 'file').touch()
    out = tmp_path / 'file' / 'report.json'
    fails(*paths, '--json', out, match=f'{out}: expected a writable file')


def test_images_from_one(capsys):
    with pytest.raises(SystemExit):
        eval_coco.main(['a', 'b', '--images', '0'])
    assert '--images takes a number from 1' in capsys.readouterr().err
