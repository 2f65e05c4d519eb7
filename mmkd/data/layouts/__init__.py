"""Data in any common layout: found, read, and converted to COCO's format.

One module per layout (``yolo``, ``coco``, ``voc``, ``table``) finds it in a
folder and reads it into a :class:`~.reading.Reading`, which ``convert`` splits
and writes. What MMDetection reads as it stands is not converted.

Supervision reads some of these layouts as well. It is not used here, because
it stops at the first line that it cannot read, refuses boxes that can be
passed on, draws a mask for each polygon (1.5 GB for 200 photos), and takes one
folder of images and one of labels.
"""

from .data import FOLDERS, Data
from .find import find_data, prepare, read_data
from .reading import Picture, Reading

__all__ = [
    'FOLDERS',
    'Data',
    'Picture',
    'Reading',
    'find_data',
    'prepare',
    'read_data',
]
