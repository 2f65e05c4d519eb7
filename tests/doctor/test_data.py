"""Every fault that is planted into healthy data is found, and named."""

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from mmkd.data.drawn import draw, write_coco
from mmkd.data.layouts import Data, find_data
from mmkd.doctor import diagnose
from mmkd.doctor.data import check_data, data_config, say_found
from mmkd.doctor.report import Report
from tests.helpers import made_data, toy

CLASSES = ('circle', 'square', 'star')
SPLITS = {'train': range(1000, 1012), 'val': range(2000, 2008)}


def coco_set(split, folder='.', **options):
    name = f'{split}2017'
    return dict(
        type='CocoDataset',
        data_root=f'{folder}/',
        ann_file=f'annotations/instances_{name}.json',
        data_prefix=dict(img=f'{name}/'),
        metainfo=dict(classes=CLASSES),
        **options,
    )


def voc_set(split, folder='.', **options):
    return dict(
        type='VOCDataset',
        data_root=f'{folder}/',
        ann_file=f'ImageSets/Main/{split}.txt',
        data_prefix=dict(sub_data_root=''),
        metainfo=dict(classes=('RBC', 'WBC', 'Platelets')),
        **options,
    )


class Planted:
    """Healthy data in a layout, to plant a fault in."""

    def __init__(self, root, layout):
        self.root, self.layout = Path(root), layout
        one = coco_set if layout == 'coco' else voc_set
        train = one(
            'train',
            self.root,
            filter_cfg=dict(filter_empty_gt=True, min_size=32),
        )
        train['pipeline'] = [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            dict(type='Resize', scale=(320, 240), keep_ratio=True),
            dict(type='FilterAnnotations', min_gt_bbox_wh=(1, 1)),
        ]
        val = one('val', self.root, test_mode=True)
        self.cfg = Config(
            dict(
                train_dataloader=dict(dataset=train),
                val_dataloader=dict(dataset=val),
                test_dataloader=dict(dataset=val),
            )
        )

    @property
    def train(self):
        return self.cfg.train_dataloader.dataset

    def photo(self, index, split='train'):
        """The path of an image."""
        if self.layout == 'coco':
            return (
                self.root / f'{split}2017' / f'{SPLITS[split][index]:012}.jpg'
            )
        return self.root / 'JPEGImages' / f'{SPLITS[split][index]:06}.jpg'

    def edit(self, change, split='train'):
        """Change COCO annotations: images, annotations, categories."""
        path = self.root / f'annotations/instances_{split}2017.json'
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def box(self, index, split='train', **values):
        """Change entries of an annotation in COCO's layout."""
        self.edit(lambda c: c['annotations'][index].update(values), split)

    def xml(self, index, split='train'):
        """The path of an annotation in VOC's layout."""
        return self.root / 'Annotations' / f'{SPLITS[split][index]:06}.xml'

    def rewrite(self, index, pattern, new, split='train', count=1):
        """Replace a pattern in an annotation in VOC's layout."""
        text = self.xml(index, split).read_text()
        changed, times = re.subn(pattern, new, text, count=count)
        assert times
        self.xml(index, split).write_text(changed)

    def report(self, **options):
        report = Report()
        check_data(self.cfg, report, **options)
        return report


@pytest.fixture(scope='module')
def healthy(tmp_path_factory):
    """The same photos in both layouts."""
    root = tmp_path_factory.mktemp('healthy')
    rng = np.random.default_rng(0)
    for split, keys in SPLITS.items():
        photos = {key: draw(key, rng, 3) for key in keys}
        write_coco(root / 'coco', f'{split}2017', photos, CLASSES)
        made_data.write_voc(root / 'voc', split, photos)
    return root


@pytest.fixture(scope='module')
def notes(healthy):
    """What is noted of the healthy data, in which nothing is found."""
    reports = {k: Planted(healthy / k, k).report() for k in ('coco', 'voc')}
    for report in reports.values():
        assert not report.findings, report.text()
        assert report.notes == ['train: only 12 images.']
    return reports['coco'].notes


@pytest.fixture
def planted(healthy, tmp_path):
    def plant(layout):
        shutil.copytree(healthy / layout, tmp_path / layout)
        return Planted(tmp_path / layout, layout)

    return plant


FAULTS = []


def fault(layout, severity, expected, file=''):
    """Register a fault: its planting, its finding, and the file it names."""

    def register(plant):
        case = (plant, layout, severity, expected, file)
        FAULTS.append(pytest.param(*case, id=f'{layout}-{plant.__name__}'))
        return plant

    return register


def every_box(data, change):
    data.edit(lambda c: [change(a) for a in c['annotations']])


def without_stars(content):
    content['annotations'] = [
        a for a in content['annotations'] if a['category_id'] != 5
    ]


# --------------------------------------------------------------------- classes


@fault('coco', 'warns', 'train: 1 class without a box.*never learnt: star')
def empty_class(data):
    data.edit(without_stars)


@fault('coco', 'warns', 'val: 1 class without a box.*never measured: star')
def empty_in_val(data):
    data.edit(without_stars, 'val')


@fault('coco', 'warns', r'1 class in the annotations that the config does not '
       r'have.*"Star " \(\d+ boxes; the config has "star"\)')  # fmt: skip
def class_with_a_space(data):
    data.edit(lambda c: c['categories'][2].update(name='Star '))


@fault('voc', 'warns', r'"Platelet" \(\d+ boxes; the config has "Platelets"\)')
def singular_class(data):
    for index in range(12):
        text = data.xml(index).read_text()
        data.xml(index).write_text(text.replace('Platelets<', 'Platelet<'))


@fault('voc', 'warns', r'1 class in the annotations.*1 of \d+ boxes are drop'
       r'ped: "WBCs" \(1 box; .*"WBC"\)')  # fmt: skip
def one_misspelt_object(data):
    data.rewrite(1, '<name>RBC<', '<name>WBCs<')


@fault('coco', 'stops', r'train: 3 classes in the annotations.*"c0" .* The '
       'config has: circle, square, star')  # fmt: skip
def other_classes(data):
    def change(content):
        for index, each in enumerate(content['categories']):
            each['name'] = f'c{index}'

    data.edit(change)
    data.cfg.val_dataloader = data.cfg.test_dataloader = None


@fault('coco', 'warns', r'1 box of no class: .* has no category with their '
       r'id: 000000001000.jpg .* category_id 77')  # fmt: skip
def no_category(data):
    data.box(0, category_id=77)


@fault('coco', 'stops', 'val: the same label is another class than in train: '
       '0 is "circle" in .*, 0 is "square" in ')  # fmt: skip
def order_of_categories(data):
    data.edit(
        lambda c: c.update(categories=[c['categories'][i] for i in (1, 0, 2)]),
        'val',
    )


@fault('coco', 'stops', '1 category twice in instances_train2017.json.*"star"')
def category_twice(data):
    data.edit(lambda c: c['categories'].append(dict(id=99, name='star')))


@fault('coco', 'stops', "classes are the text 'star'", "classes=\\('star',\\)")
def class_without_comma(data):
    data.train.metainfo.classes = 'star'
    data.edit(
        lambda c: c.update(
            annotations=[a for a in c['annotations'] if a['category_id'] == 5],
            categories=c['categories'][2:],
        )
    )
    data.train.pop('pipeline')
    data.cfg.val_dataloader = data.cfg.test_dataloader = None


# ----------------------------------------------------------------------- boxes


@fault('coco', 'stops', 'train: .* boxes normalised to 0..1 instead of in pix',
       '000000001000.jpg')  # fmt: skip
def normalised(data):
    every_box(data, lambda a: a.update(bbox=[v / 400 for v in a['bbox']]))


@fault('coco', 'warns', 'train: 1 box normalised to 0..1', '000000001000.jpg')
def one_normalised(data):
    data.box(0, bbox=[0.1, 0.2, 0.3, 0.25])


@fault('voc', 'stops', 'train: .* boxes normalised to 0..1',
       'Annotations/001000.xml')  # fmt: skip
def normalised_xml(data):
    for index in range(12):
        text = data.xml(index).read_text()
        data.xml(index).write_text(
            re.sub(r'(<[xy]m..>)(\d+)', lambda m: f'{m[1]}0.{m[2]:0>3}', text)
        )


@fault('coco', 'warns', '1 box with a width or height of 0 or less, dropped',
       r'000000001000.jpg \(annotation 1\) circle \[.*, -20')  # fmt: skip
def negative_width(data):
    data.edit(lambda c: c['annotations'][0]['bbox'].__setitem__(2, -20))


@fault('voc', 'warns', '1 box with a width or height of 0 or less, of no use',
       'Annotations/001003.xml')  # fmt: skip
def corners_in_reverse(data):
    data.rewrite(3, '<xmax>(.*?)<(.*?)<xmin>(.*?)<', r'<xmax>\3<\2<xmin>\1<')


@fault('coco', 'warns', '1 box with NaN or infinity', '000000001000.jpg')
def not_a_number(data):
    data.box(0, bbox=[float('nan'), 3, 20, 20])


@fault('coco', 'stops', '1 box of other than four numbers',
       r"000000001000.jpg \(annotation 1\) \['3'")  # fmt: skip
def text_coordinates(data):
    data.box(0, bbox=['3', '3', '20', '20'])


@fault('coco', 'stops', '1 box of other than four numbers.*None', '1000.jpg')
def no_box(data):
    data.box(0, bbox=None)


@fault('coco', 'warns', '1 box wholly outside', r'1000.jpg .*\[500, 3, 20, 20')
def outside(data):
    data.box(0, bbox=[500, 3, 20, 20], segmentation=[])


@fault('voc', 'warns', '1 box wholly outside', 'Annotations/001000.xml RBC')
def outside_xml(data):
    text = '<xmax>900</xmax><xmin>800</xmin>'
    data.rewrite(0, '<xmax>.*?<xmin>.*?</xmin>',
                 text[:16] + '<YMAX>' + text[16:])  # fmt: skip
    data.rewrite(0, '<YMAX>', '<ymax>80</ymax>')
    data.rewrite(0, '(<object>.*?)</bndbox>', r'\1</bndbox>')


@fault('coco', 'notes', '1 box partly outside', '000000001000.jpg')
def partly_outside(data):
    data.box(0, bbox=[200, 100, 190, 50], segmentation=[])


@fault('coco', 'stops', r'boxes seem to be \(x0, y0, x1, y1\) and not \(x, y,',
       'train: .*000000001000.jpg')  # fmt: skip
def corners_for_sizes(data):
    def change(a):
        x, y, w, h = a['bbox']
        a.update(bbox=[x, y, x + w, y + h])

    every_box(data, change)


@fault('voc', 'stops', r'boxes seem to be \(x, y, width, height\) and not '
       r'\(xmin', 'train: .*Annotations/001000.xml')  # fmt: skip
def sizes_for_corners(data):
    for index in range(12):
        text = data.xml(index).read_text()
        for axis in 'xy':
            pattern = rf'<{axis}max>(\d+)(.*?)<{axis}min>(\d+)'
            text = re.sub(
                pattern,
                lambda m, a=axis: (
                    f'<{a}max>{int(m[1]) - int(m[3])}{m[2]}<{a}min>{m[3]}'
                ),
                text,
            )
        data.xml(index).write_text(text)


@fault('coco', 'stops', 'boxes seem to be .centre x, centre y, width, height')
def centres_for_corners(data):
    def change(a):
        x, y, w, h = a['bbox']
        a.update(bbox=[x + w / 2, y + h / 2, w, h])

    every_box(data, change)


@fault('coco', 'stops', 'train: x and y seem to be swapped')
def swapped_axes(data):
    def change(a):
        x, y, w, h = a['bbox']
        a.update(bbox=[y, x, h, w])

    every_box(data, change)


@fault('coco', 'warns', '1 box with an "area" of 0 or less, dropped', '1000')
def no_area(data):
    data.box(0, area=0)


@fault('coco', 'stops', '1 annotation without a number as "area"', '1000.jpg')
def missing_area(data):
    data.edit(lambda c: c['annotations'][0].pop('area'))


@fault('coco', 'warns', '1 box of less than a pixel', '000000001000.jpg')
def below_a_pixel(data):
    data.box(0, bbox=[20, 20, 0.5, 30], area=15, segmentation=[])


@fault('coco', 'warns', r'smaller than the pipeline keeps .FilterAnnotations, '
       r'min_gt_bbox_wh=\(70, 70\)\)', '00000')  # fmt: skip
def smaller_than_the_filter(data):
    data.train.pipeline[3].min_gt_bbox_wh = (70, 70)


@fault('voc', 'notes', '12 boxes smaller than bbox_min_size=30', 'Annot')
def few_smaller_than_voc_takes(data):
    data.train.filter_cfg.bbox_min_size = 30


@fault('voc', 'warns', 'smaller than bbox_min_size=60: ignored', 'Annotations')
def smaller_than_voc_takes(data):
    data.train.filter_cfg.bbox_min_size = 60


@fault('coco', 'warns', '.* boxes twice in its image', '000000001000.jpg')
def boxes_twice(data):
    def change(content):
        more = copy.deepcopy(content['annotations'][:4])
        for index, each in enumerate(more):
            each['id'] = 9000 + index
        content['annotations'] += more

    data.edit(change)


@fault('coco', 'stops', '1 annotation id in .* twice, which CocoDataset refus')
def annotation_id_twice(data):
    data.box(1, id=1)


@fault('coco', 'warns', r"1 annotation of images that instances_train2017.js"
       r"on does not have: dropped: annotation 1 of image 55")  # fmt: skip
def annotation_of_no_image(data):
    data.box(0, image_id=55)


@fault('coco', 'stops', 'none of its .* boxes can be used: .* are crowds')
def all_crowds(data):
    every_box(data, lambda a: a.update(iscrowd=1))


@fault('voc', 'stops', 'none of its .* boxes can be used: .*difficult')
def all_difficult(data):
    for index in range(12):
        text = data.xml(index).read_text()
        data.xml(index).write_text(text.replace('ult>0<', 'ult>1<'))


@fault(
    'coco', 'stops', 'train: none of its 12 images has a box', 'instances_t'
)
def split_without_boxes(data):
    data.edit(lambda c: c.update(annotations=[]))


@fault('coco', 'stops', 'train: .*instances_train2017.json has no image')
def empty_split(data):
    data.edit(lambda c: c.update(annotations=[], images=[]))


@fault(
    'coco', 'stops', 'val: .*expected a JSON file, got one that ends midway'
)
def broken_json(data):
    path = data.root / 'annotations/instances_val2017.json'
    path.write_text(path.read_text()[:500])


@fault('coco', 'stops', 'instances_train2017.json cannot be read .TypeError')
def list_for_an_id(data):
    data.box(0, image_id=[1])


@fault('coco', 'stops', 'train: .*results of a detector')
def results_for_annotations(data):
    path = data.root / 'annotations/instances_train2017.json'
    path.write_text(json.dumps(json.loads(path.read_text())['annotations']))


@fault('coco', 'stops', r'without an outline .*with_mask=True', '1000.jpg')
def no_masks(data):
    every_box(data, lambda a: a.pop('segmentation'))
    data.train.pipeline[1].with_mask = True


@fault('coco', 'notes', '1 box whose "area" is larger than the box')
def large_area(data):
    data.box(0, area=10**5)


@fault('coco', 'notes', '1 box not enclosing its outline', '1000.jpg')
def outline_elsewhere(data):
    data.box(0, segmentation=[[1, 1, 9, 1, 9, 9]])


# ---------------------------------------------------------------------- images


@fault('coco', 'warns', '1 image whose width and height are swapped in the',
       '000000001000.jpg .written 213 x 320, loaded 320 x 213')  # fmt: skip
def swapped_size(data):
    data.edit(lambda c: c['images'][0].update(width=213, height=320))
    data.edit(
        lambda c: [
            a.update(bbox=[5, 5, 60, 60], area=900, segmentation=[], iscrowd=1)
            for a in c['annotations']
            if a['image_id'] == 1000
        ]
    )


@fault('coco', 'warns', '1 image of another size than the annotations say',
       '000000001000.jpg .written 320 x 213, loaded 160 x 107')  # fmt: skip
def resized_photo(data):
    with Image.open(data.photo(0)) as image:
        image.resize((160, 107)).save(data.photo(0))


@fault('voc', 'warns', '1 image whose width or height in the annotations is',
       '001000.jpg .written 0 x 0')  # fmt: skip
def no_size(data):
    data.rewrite(0, r'<(width|height)>\d+', r'<\1>0', count=2)
    data.train.filter_cfg.pop('min_size')


def rotate(data):
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(data.photo(0)) as image:
        image.save(data.photo(0), exif=exif, quality=95)


@fault('coco', 'warns', '1 image rotated by its EXIF tag on loading, with a',
       '000000001000.jpg .written 320 x 213, loaded 213 x 320')  # fmt: skip
def exif(data):
    rotate(data)


@fault(
    'voc', 'warns', '1 image rotated by its EXIF tag', '001000.jpg .written'
)
def exif_voc(data):
    rotate(data)


@fault(
    'coco', 'notes', '1 image rotated by an EXIF tag on loading', '1000.jpg'
)
def exif_upside_down(data):
    exif = Image.Exif()
    exif[0x0112] = 3
    with Image.open(data.photo(0)) as image:
        image.save(data.photo(0), exif=exif, quality=95)


@fault('coco', 'stops', 'train: 1 image missing', '000000001000.jpg')
def missing_photo(data):
    data.photo(0).unlink()


@fault('voc', 'stops', 'train: 1 image missing: .*001000.jpg .there is 001000'
       '.png, and VOCDataset reads .jpg alone')  # fmt: skip
def other_suffix(data):
    data.photo(0).rename(data.photo(0).with_suffix('.png'))


@fault('coco', 'stops', '1 image missing: .*there is 000000001000.JPG')
def other_case(data):
    data.photo(0).rename(data.photo(0).with_suffix('.JPG'))


@fault('coco', 'stops', r'12 images missing \(all of the split\)',
       'there is .*train2017/000000001000.jpg')  # fmt: skip
def other_folder(data):
    data.train.data_prefix.img = 'images/'


@fault('voc', 'stops', '1 annotation file missing, at which VOCDataset fails',
       'Annotations/001000.xml')  # fmt: skip
def missing_xml(data):
    data.xml(0).unlink()


@fault(
    'voc', 'stops', '1 annotation file of malformed XML', 'tions/001000.xml'
)
def broken_xml(data):
    data.xml(0).write_text(data.xml(0).read_text()[:-30])


@fault('voc', 'stops', '1 annotation file with coordinates or flags that are '
       'no numbers', 'Annotations/001000.xml')  # fmt: skip
def words_for_coordinates(data):
    data.rewrite(0, r'<xmin>\d+', '<xmin>left')


@fault('coco', 'stops', 'train: 1 image file empty', '000000001000.jpg')
def empty_photo(data):
    data.photo(0).write_bytes(b'')


@fault(
    'coco', 'stops', 'train: 1 image file truncated', '1000.jpg .JPEG, after'
)
def truncated_photo(data):
    content = data.photo(0).read_bytes()
    data.photo(0).write_bytes(content[: len(content) // 2])


@fault('voc', 'stops', 'val: 1 image file truncated', '002000.jpg .PNG, after')
def truncated_png(data):
    image = cv2.imread(str(data.photo(0, 'val')))
    content = cv2.imencode('.png', image)[1].tobytes()
    data.photo(0, 'val').write_bytes(content[:-12])


@fault('coco', 'stops', '1 image file of a kind or damage', '000001000.jpg')
def spoiled_photo(data):
    image = cv2.imread(str(data.photo(0)))
    content = bytearray(cv2.imencode('.png', image)[1].tobytes())
    content[5000:6000] = bytes(1000)
    data.photo(0).write_bytes(content)


@fault('coco', 'stops', '1 image file holding no image', 'a page of HTML')
def web_page(data):
    data.photo(0).write_text('<!DOCTYPE html><html>404</html>')


@fault(
    'coco', 'stops', '1 image file holding no image', 'a pointer of Git LFS'
)
def lfs_pointer(data):
    data.photo(0).write_text('version https://git-lfs.github.com/spec/v1\n')


@fault(
    'coco', 'stops', '1 image file of a kind or damage that OpenCV does not'
)
def format_without_decoder(data):
    with Image.open(data.photo(0)) as image:
        image.save(data.photo(0), 'TGA')


@fault('coco', 'warns', '1 image of 16 bits that uses 12 or less', '1000.jpg')
def dark_16_bits(data):
    gray = cv2.imread(str(data.photo(0)), cv2.IMREAD_GRAYSCALE)
    content = cv2.imencode('.png', gray.astype(np.uint16) * 4)[1]
    data.photo(0).write_bytes(content.tobytes())


@fault('coco', 'warns', '1 image of a single colour', '000000001000.jpg')
def blank_photo(data):
    size = cv2.imread(str(data.photo(0))).shape
    cv2.imwrite(str(data.photo(0)), np.zeros(size, np.uint8))


@fault('coco', 'notes', '1 image in CMYK', '000000001000.jpg')
def cmyk(data):
    with Image.open(data.photo(0)) as image:
        image.convert('CMYK').save(data.photo(0), 'JPEG')


@fault('coco', 'stops', '1 image of other than 3 channels', '000000001000.jpg')
def fourth_channel(data):
    with Image.open(data.photo(0)) as image:
        image.convert('RGBA').save(data.photo(0), 'PNG')
    data.train.pipeline[0].color_type = 'unchanged'


@fault('coco', 'warns', '2 images smaller than min_size=200', '000001004.jpg')
def smaller_than_min_size(data):
    data.train.filter_cfg.min_size = 200


# ------------------------------------------------------------------ duplicates


@fault(
    'coco', 'warns', 'val: 1 image in train as well: .*2000.jpg is .*1000.j'
)
def copied_photo(data):
    shutil.copy(data.photo(0), data.photo(0, 'val'))


@fault('voc', 'warns', 'val: 1 image in train as well, in another file: '
       '.*002000.jpg is .*001000.jpg')  # fmt: skip
def resaved_photo(data):
    image = cv2.imread(str(data.photo(0)))
    image = cv2.convertScaleAbs(image[:, ::-1], alpha=0.9, beta=9)
    quality = [cv2.IMWRITE_JPEG_QUALITY, 50]
    cv2.imwrite(str(data.photo(0, 'val')), image, quality)


@fault('coco', 'warns', 'val: 1 image made from an image of train, by Roboflo')
def augmented_copies(data):
    names = {'train': 'a_jpg.rf.0123abc.jpg', 'val': 'a_jpg.rf.fedc98.jpg'}
    for split, name in names.items():
        data.photo(0, split).rename(data.photo(0, split).with_name(name))
        data.edit(lambda c, n=name: c['images'][0].update(file_name=n), split)


@fault('coco', 'warns', 'val: its 12 images are those of train')
def same_split(data):
    val = copy.deepcopy(data.train)
    val.test_mode = True
    data.cfg.val_dataloader.dataset = val
    data.cfg.test_dataloader.dataset = val


@fault('coco', 'warns', 'train: 1 image in several files with different boxes')
def copy_with_other_boxes(data):
    shutil.copy(data.photo(0), data.photo(5))


@fault('coco', 'warns', 'train: 1 image named by several entries of instances')
def file_name_twice(data):
    def change(content):
        content['images'].append(dict(content['images'][0], id=77))

    data.edit(change)


@fault('coco', 'warns', '1 id of several images.*1000 .*1001.jpg, 0.*1000.j')
def image_id_twice(data):
    def change(content):
        lost = content['images'][0]
        content['images'][:0] = [dict(content['images'][1], id=lost['id'])]

    data.edit(change)


@fault('coco', 'warns', 'val: val_evaluator reads .*train2017.json, another f')
def metric_of_other_data(data):
    path = data.root / 'annotations/instances_train2017.json'
    data.cfg.val_evaluator = dict(type='CocoMetric', ann_file=str(path))


@pytest.mark.parametrize(
    ('plant', 'layout', 'severity', 'expected', 'file'), FAULTS
)
def test_a_fault_is_found(
    plant, layout, severity, expected, file, planted, notes
):
    data = planted(layout)
    plant(data)
    report = data.report()
    new = [f for f in report.notes if f not in notes]
    found = new if severity == 'notes' else getattr(report, severity)
    assert len(found) == 1, report.text()
    assert re.search(expected, found[0]), found
    assert re.search(file, found[0]), found
    if severity != 'notes':
        assert report.findings == found


# -------------------------------------------------------------------- the rest


def test_it_says_what_is_there(healthy):
    report = Planted(healthy / 'coco', 'coco').report()
    text = '\n'.join(report.sections['Data'])
    assert re.search(r'train +12 +12 +90 +87 ', text)
    assert re.search(r'circle +48 \(12\) +34 \(8\)', text)
    assert 'imbalance: 2.67 : 1, circle to square' in text
    assert 'all 20 images decoded' in text
    figures = report.values['data']['val']
    assert figures['boxes'] == 58
    assert figures['classes']['circle'] == (34, 8)
    assert json.dumps(report.values)


def test_many_classes_are_folded(healthy):
    data = Planted(healthy / 'coco', 'coco')
    names = (*CLASSES, *(f'rare {k}' for k in range(1200)))
    data.train.metainfo.classes = names
    data.cfg.val_dataloader = data.cfg.test_dataloader = None
    text = data.report().text()
    assert '1,200 classes of 1,203 without a box in train: rare 0' in text
    assert len(text) < 3000


@pytest.mark.parametrize(
    'wrap',
    [
        lambda d: dict(type='RepeatDataset', times=3, dataset=d),
        lambda d: dict(
            type='ClassBalancedDataset', oversample_thr=1e-3, dataset=d
        ),
        lambda d: dict(type='MultiImageMixDataset', dataset=d, pipeline=[]),
        lambda d: dict(type='ConcatDataset', datasets=[d, d]),
        lambda d: dict(
            type='mmdet.RepeatDataset',
            times=2,
            dataset=dict(type='ConcatDataset', datasets=[d]),
        ),
    ],
)
def test_data_sets_around_it_are_opened(wrap, planted):
    data = planted('voc')
    truncated_photo(data)
    data.cfg.train_dataloader.dataset = wrap(data.train)
    report = data.report()
    assert len(report.findings) == 1
    assert '1 image file truncated' in report.stops[0] or (
        '2 image files truncated' in report.stops[0]
    )


def test_a_data_set_of_ones_own_is_noted(planted):
    data = planted('coco')
    data.train.type = 'LVISV1Dataset'
    report = data.report()
    assert not report.findings
    assert 'train: LVISV1Dataset is not looked into' in report.notes[0]


def test_a_sample_is_drawn_and_said(planted):
    data = planted('coco')
    spoiled_photo(data)
    assert not data.report(sample=0).findings
    text = data.report(sample=5).text()
    assert '5 of 20 images decoded' in text
    assert '--data-sample all' in text
    assert len(data.report(sample=-1).stops) == 1


@pytest.mark.parametrize(
    'plant', [truncated_photo, web_page, exif, resized_photo, dark_16_bits]
)
def test_headers_suffice_for_most(plant, planted):
    data = planted('coco')
    plant(data)
    assert len(data.report(sample=0).findings) == 1


def test_equal_files_are_found_outside_of_the_sample(planted):
    data = planted('coco')
    copied_photo(data)
    assert 'in train as well' in data.report(sample=0).warns[0]


def test_photos_of_a_camera_that_does_not_move_are_no_copies(planted):
    """A small object has moved, and the rest is the same."""
    data = planted('coco')
    image = cv2.imread(str(data.photo(0)))
    for split, x in (('train', 40), ('val', 90)):
        moved = image.copy()
        moved[100:130, x : x + 20] = 0
        cv2.imwrite(str(data.photo(0, split)), moved)
        data.edit(
            lambda c: c['images'][0].update(width=320, height=213), split
        )
    assert not data.report().findings


def test_the_shipped_data_are_healthy():
    root = made_data.SHARED
    if not (root / 'bccd').is_dir():
        pytest.skip(f'needs the data sets in {root}')
    for name, images in (('bccd', 364), ('coco_tiny', 160)):
        report = Report()
        check_data(data_config(find_data(str(root / name))), report)
        assert not report.findings
        assert f'all {images} images decoded' in report.text()


def doctor(*options):
    command = [sys.executable, '-m', 'mmkd', 'doctor', *map(str, options)]
    return subprocess.run(
        command, cwd=toy.ROOT, capture_output=True, text=True
    )


def test_the_command_takes_a_folder(planted, tmp_path):
    data = planted('voc')
    truncated_photo(data)
    path = tmp_path / 'report.json'
    done = doctor('--data-only', data.root, '--json', path)
    assert done.returncode == 1
    assert 'train: 1 image file truncated' in done.stdout
    assert json.loads(path.read_text())['data']['train']['images'] == 12


def test_the_command_takes_a_config_that_does_not_distil(planted, tmp_path):
    data = planted('coco')
    path = tmp_path / 'data.py'
    data.cfg.dump(path)
    done = doctor('--data-only', path, '--data-sample', 3)
    assert done.returncode == 0, done.stderr
    assert '3 of 20 images decoded' in done.stdout
    assert done.stdout.startswith('nothing found, 1 note')


def test_what_was_left_out_of_a_folder_is_told():
    report = Report()
    data = Data(('a',), {}, {}, {})
    data.summary = ('layout: YOLO',)
    data.faults = {'labels with 4 numbers': ['a.txt, line 3: 0 1 2 3']}
    say_found(data, report)
    assert report.sections['Data'][0] == 'layout: YOLO'
    assert 'a.txt, line 3' in report.warns[0]


def test_networks_are_not_built_on_data_that_stop(planted):
    data = planted('coco')
    missing_photo(data)
    report = diagnose(data.cfg)
    assert len(report.stops) == 1
    assert '1 image missing' in report.stops[0]
    assert 'mend the data first' in report.text()
