"""Annotations on disk: check them, and convert VOC to COCO.

The package needs the standard library only, so data can be prepared on a
machine where neither torch nor mmdet is installed. Whatever a user can cause
is raised as :class:`DataError`: one line that says where, what was expected,
what was found, and the remedy.
"""

from mmkd.errors import DataError

from .coco import check_coco_annotations
from .conversion import (
    Conversion,
    clip_box,
    coco_annotation,
    coco_categories,
    coco_image,
    voc_to_coco,
)
from .errors import COCO_REMEDY, VOC_REMEDY, data_error
from .files import StrPath, read_json, replacing, write_json
from .voc import Box, VocImage, VocObject, read_voc_xml, voc_check

__all__ = [
    'COCO_REMEDY',
    'VOC_REMEDY',
    'Box',
    'Conversion',
    'DataError',
    'StrPath',
    'VocImage',
    'VocObject',
    'check_coco_annotations',
    'clip_box',
    'coco_annotation',
    'coco_categories',
    'coco_image',
    'data_error',
    'read_json',
    'read_voc_xml',
    'replacing',
    'voc_check',
    'voc_to_coco',
    'write_json',
]
