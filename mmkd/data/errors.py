"""How errors about data are worded."""

from collections.abc import Iterable

from mmkd.errors import DataError

COCO_REMEDY = (
    'For COCO run `mmkd prepare coco` (with `--from FOLDER` for a local '
    'copy); repair or replace any other data.'
)
VOC_REMEDY = COCO_REMEDY.replace('COCO', 'VOC').replace('coco', 'voc')


def data_error(
    where: object, expected: str, got: str, remedy: str
) -> DataError:
    """Word an error in one line: where, expected, got, remedy."""
    return DataError(f'{where}: expected {expected}, got {got}. {remedy}')


def some(names: Iterable[object], shown: int = 3) -> str:
    """Join the first few names, and say how many more there are."""
    names = list(names)
    more = len(names) - shown
    text = ', '.join(str(name) for name in names[:shown])
    return text + (f' and {more} more' if more > 0 else '')
