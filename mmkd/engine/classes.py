"""The classes of built data sets, and whether the student fits them."""

import logging
from typing import Any

from mmengine.logging import print_log

from mmkd.data.class_names import (
    all_classes_of,
    classes_of,
    named_classes,
    parts,
    spelling,
)
from mmkd.data.errors import some
from mmkd.detectors.source import check_class_count
from mmkd.errors import ConfigError


def training_classes(dataset: Any) -> tuple[str, ...] | None:
    """Return the class names of the training data, whatever wraps them.

    Args:
        dataset: The built data set. If it joins several ones, some may name
            only the first ones of the others' classes.

    Returns:
        The names, or None if no data set has any.

    Raises:
        ConfigError: If the same label is another class in another part.
    """
    for part in parts(dataset):
        _say_order(part, 'train_dataloader.dataset')
    try:
        return all_classes_of(dataset)
    except ValueError as error:
        longest, other = error.args
        raise ConfigError(
            'train_dataloader.dataset joins data sets of different classes: '
            f'{some(longest)} ({len(longest)}) and {some(other)} '
            f'({len(other)}). A label is a number, so it would mean two '
            'classes. Give each data set the same '
            'metainfo=dict(classes=...), in the same order.'
        ) from None


def _say_order(part: Any, where: str) -> None:
    named, names = named_classes(part), classes_of(part)
    if named is None or names is None or named == names:
        return
    pairs = enumerate(zip(named, names, strict=False))
    moved = [f'label {i} is {b}, not {a}' for i, (a, b) in pairs if a != b]
    print_log(
        f'{where}: MMDetection numbers the classes as {part.ann_file} lists '
        f'them, not as metainfo does: {some(moved)}. The teacher is matched '
        'by the order of the file. '
        f'Write metainfo=dict(classes={names!r}), because the checkpoint and '
        'all figures name the classes by it.',
        'current',
        logging.WARNING,
    )


def check_validation(
    student: Any, dataset: Any, training: tuple[str, ...] | None, split: str
) -> None:
    """Check that the student's classes are those that it is validated on.

    Args:
        student: The student's detector.
        dataset: The built data set of the validation.
        training: The class names of the training data.
        split: ``'val'`` or ``'test'``.

    Raises:
        ConfigError: If a data set has another number of classes.
    """
    for number, part in enumerate(parts(dataset)):
        names = classes_of(part)
        if not names:
            continue
        place = '' if part is dataset else f', part {number}'
        where = f'{split}_dataloader.dataset{place}'
        check_class_count(student, names, data=where)
        pairs = list(zip(training or (), names, strict=False))
        other = [f'{a}/{b}' for a, b in pairs if spelling(a) != spelling(b)]
        if other:
            print_log(
                f'{where} names other classes for the same labels than the '
                f'training data: {some(other)}. The metrics compare labels.',
                'current',
                logging.WARNING,
            )
