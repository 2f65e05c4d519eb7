"""Which of MMDetection's configs stand for its families of detectors."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import mmdet

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'

SKIPPED = {
    'parts of configs': '_base_ common',
    'a listed family with another augmentation of the data': (
        'albu_example instaboost simple_copy_paste'
    ),
    'tracking or re-identification, no detector': (
        'bytetrack deepsort mask2former_vis masktrack_rcnn ocsort qdtrack '
        'reid sort strongsort'
    ),
    'a listed family on another data set': (
        'cityscapes deepfashion dsdl lvis objects365 openimages pascal_voc '
        'v3det wider_face'
    ),
    'lanes, no boxes': 'clrnet',
    'guided by text, which needs a language model': (
        'glip grounding_dino mm_grounding_dino'
    ),
    "MMDetection's own training of a listed family with a teacher": (
        'lad ld soft_teacher'
    ),
    'panoptic or semantic segmentation alone': 'maskformer panoptic_fpn',
    'a collection of settings of listed families': 'misc',
    'a listed family with other initial weights': (
        'resnet_strikes_back selfsup_pretrain'
    ),
}
"""Why folders are left out, and which."""

CHOSEN = {
    'cascade_rcnn': ('cascade-rcnn_r50_fpn_1x_coco.py',),
    'cascade_rpn': ('cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py',),
    'fast_rcnn': ('fast-rcnn_r50_fpn_1x_coco.py',),
    'faster_rcnn': (
        'faster-rcnn_r50_fpn_1x_coco.py',
        'faster-rcnn_r50-caffe_c4-1x_coco.py',
    ),
    'guided_anchoring': (
        'ga-retinanet_r50-caffe_fpn_1x_coco.py',
        'ga-faster-rcnn_r50-caffe_fpn_1x_coco.py',
    ),
    'legacy_1.x': ('faster-rcnn_r50_fpn_1x_coco_v1.py',),
    'mask2former': ('mask2former_r50_8xb2-lsj-50e_coco.py',),
    'mask_rcnn': ('mask-rcnn_r50_fpn_1x_coco.py',),
    'regnet': ('retinanet_regnetx-800MF_fpn_1x_coco.py',),
    'retinanet': ('retinanet_r50_fpn_1x_coco.py',),
    'sabl': (
        'sabl-retinanet_r50_fpn_1x_coco.py',
        'sabl-faster-rcnn_r50_fpn_1x_coco.py',
    ),
    'ssd': (
        'ssd300_coco.py',
        'ssdlite_mobilenetv2-scratch_8xb24-600e_coco.py',
    ),
    'swin': ('mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',),
    'tood': ('tood_r50_fpn_1x_coco.py',),
    'yolo': (
        'yolov3_d53_8xb8-320-273e_coco.py',
        'yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    ),
    'yolox': ('yolox_tiny_8xb8-300e_coco.py',),
}
"""Instead of the first: lighter, more usual, or of two kinds."""


@dataclass(frozen=True)
class Pair:
    """A student's and a teacher's config of MMDetection's."""

    name: str
    student: str
    teacher: str
    features: Mapping[str, Any] = field(default_factory=dict)
    """Options of the method on features: which levels meet."""


FASTER = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
RETINANET = 'retinanet/retinanet_r50_fpn_1x_coco.py'
MASK = 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
FCOS = 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
ATSS = 'atss/atss_r50_fpn_1x_coco.py'
GFL = 'gfl/gfl_r50_fpn_1x_coco.py'
YOLOF = 'yolof/yolof_r50-c5_8xb8-1x_coco.py'
CASCADE = 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py'
SWIN = 'swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
TOOD = 'tood/tood_r50_fpn_1x_coco.py'
DETR = 'detr/detr_r50_8xb2-150e_coco.py'
DEFORMABLE = 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py'
DINO = 'dino/dino-4scale_r50_8xb2-12e_coco.py'
P3_OF_P2 = dict(levels=[0, 1, 2, 3], teacher_levels=[1, 2, 3, 4])
PAIRS = (
    Pair('Faster R-CNN to RetinaNet', RETINANET, FASTER, P3_OF_P2),
    Pair('Cascade R-CNN to Faster R-CNN', FASTER, CASCADE),
    Pair('Mask R-CNN (Swin) to Mask R-CNN', MASK, SWIN),
    Pair('FCOS to RetinaNet', RETINANET, FCOS),
    Pair('FCOS to ATSS', ATSS, FCOS),
    Pair('TOOD to ATSS', ATSS, TOOD),
    Pair('ATSS to GFL', GFL, ATSS),
    Pair('GFL to ATSS', ATSS, GFL),
    Pair('DETR to YOLOF', YOLOF, DETR),
    Pair('DINO to RetinaNet', RETINANET, DINO, dict(levels=[0, 1, 2, 3])),
    Pair(
        'Deformable DETR to Faster R-CNN',
        FASTER,
        DEFORMABLE,
        dict(levels=[1, 2, 3, 4], teacher_levels=[0, 1, 2, 3]),
    ),
)
"""Teacher to student."""


def families() -> dict[str, tuple[str, ...]]:
    """Each folder that is not left out, to its representative configs."""
    folders = sorted(path for path in CONFIGS.iterdir() if path.is_dir())
    skipped = {'__pycache__', *' '.join(SKIPPED.values()).split()}
    return {
        folder.name: CHOSEN.get(folder.name) or (_first(folder),)
        for folder in folders
        if folder.name not in skipped
    }


def _first(folder: Path) -> str:
    """The first config that the folder's metafile names, if it has one."""
    metafile = folder / 'metafile.yml'
    text = metafile.read_text() if metafile.is_file() else ''
    named = (
        Path(unquote(name)).name
        for name in re.findall(r'^\s*Config:\s*(\S+)', text, re.MULTILINE)
    )
    existing = [name for name in named if (folder / name).is_file()]
    return (existing or sorted(p.name for p in folder.glob('*.py')))[0]
