"""Imported once by the process that all jobs of the tests are forked from."""

import mmdet.apis  # noqa: F401
import torch

import mmkd.hooks
import mmkd.methods
import mmkd.runner
import toy  # noqa: F401

torch.set_num_threads(1)
