"""What is raised of data that cannot be used."""

from collections.abc import Iterable

from mmkd.errors import DataError

COCO_REMEDY = (
    'For COCO run `python tools/prepare_data.py coco` (with `--from FOLDER` '
    'for a local copy); mend or replace any other data.'
)
VOC_REMEDY = (
    'For VOC run `python tools/prepare_data.py voc` (with `--from FOLDER` '
    'for a local copy); mend or replace any other data.'
)


def data_error(
    where: object, expected: str, got: str, remedy: str
) -> DataError:
    """The one line of every error: where, expected, got, remedy."""
    return DataError(f'{where}: expected {expected}, got {got}. {remedy}')


def some(names: Iterable[object], shown: int = 3) -> str:
    """The first few names and how many more there are."""
    names = list(names)
    more = len(names) - shown
    text = ', '.join(str(name) for name in names[:shown])
    return text + (f' and {more} more' if more > 0 else '')
