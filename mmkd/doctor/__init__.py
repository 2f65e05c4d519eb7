"""Looks for what silently ruins a distillation, before the long run."""

from .examination import diagnose
from .report import Report

__all__ = ['Report', 'diagnose']
