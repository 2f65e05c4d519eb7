"""Write pretrained backbones as checkpoints of their own."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmkd.data.checkpoint_file import write_atomically
from mmkd.version import __version__

from .model import ContrastivePretraining

PREFIX = 'backbone.'
"""What the keys of a detector's backbone begin with."""


def export_backbones(
    model: ContrastivePretraining, folder: Path, meta: Mapping[str, Any]
) -> dict[str, Path]:
    """Write the backbone of each network under its stock names.

    The keys are those that it has in a checkpoint of its detector
    (``backbone.conv1.weight``), so that each serves as the ``init_cfg`` of a
    stock backbone, with ``prefix='backbone.'``, and as ``load_from``.

    Args:
        model: The networks.
        folder: Where the files are written.
        meta: What else the files are to say of themselves.

    Returns:
        For each network its file.
    """
    files = {}
    for name, network in model.networks.items():
        state = network.backbone.state_dict(prefix=PREFIX)
        content = dict(
            meta=dict(meta, mmkd=__version__, pretrained=name),
            state_dict={k: v.detach().cpu() for k, v in state.items()},
        )
        files[name] = folder / f'{name}_backbone.pth'
        write_atomically(
            str(files[name]), functools.partial(torch.save, content)
        )
    return files
