"""What the processes of a distributed test import (``custom_imports``)."""

import json
from pathlib import Path

from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from torch.nn.modules.batchnorm import _BatchNorm


@HOOKS.register_module(name='ToyWriteLosses')
class WriteLosses(Hook):
    """Writes the losses of each process, and a sum of its weights."""

    def __init__(self, folder: str) -> None:
        self.path = Path(folder) / f'rank{get_rank()}.json'
        self.lines: list[dict[str, float]] = []

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None, outputs=None
    ) -> None:
        model = getattr(runner.model, 'module', runner.model)
        line = {key: value.item() for key, value in outputs.items()}
        parameters = dict(model.named_parameters())
        adapters = [v for k, v in parameters.items() if 'distillation' in k]
        line['weights'] = sum(
            v.double().abs().sum().item() for v in parameters.values()
        )
        line['adapters'] = sum(v.double().abs().sum().item() for v in adapters)
        self.lines.append(line)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.lines))


@HOOKS.register_module(name='ToyFrozenNorms')
class FrozenNorms(Hook):
    """All batch norm normalises by its running statistics."""

    def before_train_iter(
        self, runner: Runner, batch_idx: int, data_batch=None
    ) -> None:
        for module in runner.model.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
