"""Data on disk: check annotations, convert them, and download data sets.

Everything is converted to COCO's format through :class:`CocoAnnotations`, one
module per layout (``voc``). The room needs neither torch nor mmdet, except in
``checkpoint_file``. Whatever a user can cause is raised as
:class:`~mmkd.errors.DataError`: one line that says where, what was expected,
what was found, and the remedy.
"""

from .coco import (
    Box,
    CocoAnnotations,
    check_coco_annotations,
    object_classes,
)
from .errors import data_error
from .files import read_json, replacing, write_json
from .voc import (
    VocImage,
    read_voc_file,
    read_voc_xml,
    voc_check,
    voc_to_coco,
)

__all__ = [
    'Box',
    'CocoAnnotations',
    'VocImage',
    'check_coco_annotations',
    'data_error',
    'object_classes',
    'read_json',
    'read_voc_file',
    'read_voc_xml',
    'replacing',
    'voc_check',
    'voc_to_coco',
    'write_json',
]
