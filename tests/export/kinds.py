"""The detectors that the export is tried on, and a table of what it finds.

python -m tests.export.kinds >> docs/how_to/export.md
"""

import sys
import warnings

import cv2
import torch

from mmkd.detectors.graph import detector_graph
from mmkd.detectors.shrink import small_model
from mmkd.export.canvas import Canvas
from mmkd.export.check import check
from mmkd.export.command import finish
from tests.helpers import made_data
from tests.helpers import tiny_detectors as tiny
from tests.helpers.lively import lively, photos

WIDE = ('CenterNet', 'Conditional DETR')
"""What `small_model` cannot make narrow."""
PADDED = ('YOLOX', 'RTMDet')
"""What is padded by its pipeline."""
SQUARE = ('YOLOX', 'RTMDet', 'YOLOv3', 'CenterNet')


def exported(name, config):
    """Return a lively detector, its canvas, and its graph."""
    torch.manual_seed(0)
    model_cfg = small_model(tiny.stock(config), narrow=name not in WIDE)
    if name == 'DETR':
        model_cfg.num_queries = 100  # as many as it gives boxes
    shape = (320, 320) if name in SQUARE else (224, 320)
    model = lively(tiny.build(model_cfg), shape)
    canvas = Canvas(*shape, padding=114.0 if name in PADDED else None)
    graph = finish(detector_graph(model, shape, canvas.padding), {})
    return model, canvas, graph


def pictures(number):
    """Real photos where they are, else drawn ones."""
    folder = made_data.SHARED / 'coco_tiny' / 'val2017'
    paths = sorted(folder.glob('*.jpg'))[:number]
    return [cv2.imread(str(path)) for path in paths] or photos(number, seed=1)


def row(name, config):
    try:
        model, canvas, graph = exported(name, config)
    except Exception as error:  # SSD's own, say
        return f'| {name} | {error} | | | |'
    found = check(model, graph, canvas, pictures(4))
    lone = found.only_torch + found.only_onnx
    return (
        f'| {name} | {found.boxes} | {lone or "none"} | '
        f'{found.pixels:.1g} px | {found.score:.1g} |'
    )


def main(*names):
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    for name in names or KINDS:
        print(row(name, {**KINDS, **OTHERS}[name]), flush=True)


KINDS = {
    'RetinaNet': 'retinanet/retinanet_r50_fpn_1x_coco.py',
    'FCOS': 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'ATSS': 'atss/atss_r50_fpn_1x_coco.py',
    'GFL': 'gfl/gfl_r50_fpn_1x_coco.py',
    'PAA': 'paa/paa_r50_fpn_1x_coco.py',
    'TOOD': 'tood/tood_r50_fpn_1x_coco.py',
    'DDOD': 'ddod/ddod_r50_fpn_1x_coco.py',
    'VFNet': 'vfnet/vfnet_r50_fpn_1x_coco.py',
    'FSAF': 'fsaf/fsaf_r50_fpn_1x_coco.py',
    'FreeAnchor': 'free_anchor/freeanchor_r50_fpn_1x_coco.py',
    'FoveaBox': 'foveabox/fovea_r50_fpn_4xb4-1x_coco.py',
    'AutoAssign': 'autoassign/autoassign_r50-caffe_fpn_1x_coco.py',
    'RepPoints': 'reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py',
    'YOLOF': 'yolof/yolof_r50-c5_8xb8-1x_coco.py',
    'CenterNet': 'centernet/centernet_r18_8xb16-crop512-140e_coco.py',
    'RTMDet': 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'YOLOX': 'yolox/yolox_tiny_8xb8-300e_coco.py',
    'YOLOv3': 'yolo/yolov3_mobilenetv2_8xb24-320-300e_coco.py',
    'Faster R-CNN': 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py',
    'Mask R-CNN': 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'Cascade R-CNN': 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'Double-Head R-CNN': 'double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py',
    'DETR': 'detr/detr_r50_8xb2-150e_coco.py',
    'Conditional DETR': (
        'conditional_detr/conditional-detr_r50_8xb2-50e_coco.py'
    ),
    'DAB-DETR': 'dab_detr/dab-detr_r50_8xb2-50e_coco.py',
    'Deformable DETR': 'deformable_detr/deformable-detr_r50_16xb2-50e_coco.py',
    'DINO': 'dino/dino-4scale_r50_8xb2-12e_coco.py',
}
"""A stock config of each kind, on a light backbone where there is one."""
OTHERS = {
    'Libra R-CNN': 'libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py',
    'SSD': 'ssd/ssd300_coco.py',
    'Sparse R-CNN': 'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'DDQ': 'ddq/ddq-detr-4scale_r50_8xb2-12e_coco.py',
}
"""Those that do not export."""

if __name__ == '__main__':
    sys.exit(main(*sys.argv[1:]))
