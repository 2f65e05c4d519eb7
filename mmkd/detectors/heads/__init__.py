"""Detection heads that stock configs can switch to."""

from .cop import COPHead

__all__ = ['COPHead']
