"""mmkd: object-detection distillation for MMDetection 3."""

from .version import __version__

__all__ = ['__version__']
