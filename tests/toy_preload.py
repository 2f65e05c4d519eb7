"""Imported by the process that all jobs of the tests are forked from."""

import mmdet.apis
import torch
import toy

import mmkd.hooks
import mmkd.methods
import mmkd.runner

torch.set_num_threads(1)

__all__ = ['mmdet', 'mmkd', 'toy']
