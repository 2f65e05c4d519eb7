"""Errors that a user can cause; all of them are an :class:`MMKDError`.

Each class also has the built-in class that fits as a base, so that
``except ValueError`` and ``except RuntimeError`` catch it, too.
"""

import os
import sys
import tempfile
from collections import abc
from contextlib import contextmanager
from importlib.util import find_spec

PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet')
"""What mmkd works on, and does not install: which build of them fits is the
user's to say."""


class MMKDError(Exception):
    """The base of all errors that a user can cause and can mend.

    The message says what is wrong and where, what was expected and what was
    found, and how to mend it. The command line prints it without a traceback.

    Example:
        >>> from mmkd.errors import MMKDError
        >>> from mmkd.losses import HintLoss
        >>> try:
        ...     HintLoss(norm='l3')
        ... except MMKDError as error:
        ...     print(error)
        HintLoss.norm must be one of 'l2', 'l1', got 'l3'.
    """

    together = False
    """Whether all processes of a run raise it, and the first one tells it."""


class ConfigError(MMKDError, ValueError):
    """An option in a config or a call is wrong, or does not fit the rest."""


class ShapeError(MMKDError, ValueError):
    """Tensors that belong together have shapes that do not fit."""


class CheckpointError(MMKDError, RuntimeError):
    """A checkpoint cannot be read, written or used."""


class TapError(MMKDError, RuntimeError):
    """A tensor that a method asks for was never computed."""


class AssignmentError(MMKDError, RuntimeError):
    """One network's label assignment does not fit the network it is for."""


class DataError(MMKDError, ValueError):
    """A data set is missing, damaged or empty."""


class PictureError(MMKDError, OSError):
    """A picture cannot be read."""


class NonFiniteError(MMKDError, RuntimeError):
    """A loss, a gradient, a weight or a buffer is NaN or infinite."""

    together = True


class NonFiniteLossError(NonFiniteError):
    """A distillation loss, or a network's own loss, is NaN or infinite."""


class WorkDirError(MMKDError, RuntimeError):
    """A work dir is in use by another training."""


class ExportError(MMKDError, RuntimeError):
    """A detector cannot be exported, or not as what it is."""


class PackageError(MMKDError, ImportError):
    """A package that mmkd works on is not installed."""


def missing_packages() -> PackageError | None:
    """The error to raise where a package that mmkd works on is missing.

    It names all that are missing, and imports none of them.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if not missing:
        return None
    return PackageError(
        f'mmkd needs {", ".join(missing)}, which this Python does not have. '
        'Install PyTorch first (https://pytorch.org), then '
        '`pip install mmkd[mmdet]`, or run `make install` in a clone of mmkd.'
    )


@contextmanager
def hushed() -> abc.Iterator[None]:
    """Keep what libraries and their processes print off the terminal.

    The files behind stdout and stderr are exchanged, because loggers hold
    these streams, and extensions write past them. What was printed is shown
    on stderr after all if an error leaves that no :class:`MMKDError` explains.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    failed = False
    with tempfile.TemporaryFile() as sink:
        try:
            for number in (1, 2):
                os.dup2(sink.fileno(), number)
            yield
        except Exception as error:
            failed = not isinstance(error, MMKDError)
            raise
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
            for number, copy in enumerate(kept, 1):
                os.dup2(copy, number)
                os.close(copy)
            if failed:
                sink.seek(0)
                sys.stderr.write(sink.read().decode(errors='replace'))
