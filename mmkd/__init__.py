"""mmkd: object-detection distillation for MMDetection 3."""

from importlib.util import find_spec

from .version import __version__

_missing = [
    name
    for name in ('torch', 'mmengine', 'mmcv', 'mmdet')
    if find_spec(name) is None
]
if _missing:
    raise ImportError(
        f'mmkd needs {", ".join(_missing)}, which this Python does not have. '
        'Install PyTorch first (https://pytorch.org), then '
        '`pip install mmkd[mmdet]`, or run `make install` in a clone of '
        'mmkd.'
    )

__all__ = ['__version__']
