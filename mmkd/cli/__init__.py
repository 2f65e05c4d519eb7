"""The console command ``mmkd``."""

from .main import main

__all__ = ['main']
