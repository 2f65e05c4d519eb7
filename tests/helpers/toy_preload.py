"""Imported by the process that all jobs of the tests are forked from."""

import mmdet.apis
import torch

import mmkd.engine.hooks
import mmkd.engine.runner
import mmkd.methods
from tests.helpers import toy

torch.set_num_threads(1)

__all__ = ['mmdet', 'mmkd', 'toy']
