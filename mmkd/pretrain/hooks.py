"""What a pretraining measures while it runs, and writes at its end."""

from pathlib import Path
from typing import Any

import torch
from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmkd.engine.next_steps import short_path
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS
from mmkd.utils import isolated_random_state

from .crops import object_crops
from .export import export_backbones
from .images import find_objects
from .measures import alignment, knn_accuracy, uniformity
from .model import ContrastivePretraining

CHUNK = 64
"""So many images go through a network at once."""
IMAGES = 256
"""So many images at most show alignment and uniformity."""
OBJECTS = 2000
"""So many objects at most are classified by their neighbours."""


def pretrained(runner: Runner) -> ContrastivePretraining:
    return getattr(runner.model, 'module', runner.model)


@HOOKS.register_module()
class RepresentationHook(Hook):
    """Measure the representations of each network every few epochs.

    Alignment and uniformity are those of the projections of up to 256 images,
    in two views that are the same each time. With ``annotations``, up to 2000
    objects are cut out of their images and classified by their neighbours in
    the backbone's features (:func:`~mmkd.pretrain.measures.knn_accuracy`).
    The numbers are logged, as ``<network>/knn`` and so on, and stand in
    ``scalars.json``. The random numbers of the training stay as they are.

    Args:
        interval: The number of epochs between two measurements; the last
            epoch is always measured.
        annotations: A file in COCO's format, or labelled data in a common
            layout, of which the validation split is taken, if there is one.

    Raises:
        ConfigError: If the interval is below 1.
    """

    priority = 'NORMAL'
    not_resumed = ('_views', '_objects')

    def __init__(
        self, *, interval: int = 1, annotations: str | None = None
    ) -> None:
        if interval < 1:
            raise ConfigError(
                'RepresentationHook.interval must be at least 1, got '
                f'{interval}.'
            )
        self.interval, self.annotations = interval, annotations
        self._views: Tensor | None = None
        self._objects: tuple[Tensor, Tensor, Tensor] | None = None

    @master_only
    def before_train(self, runner: Runner) -> None:
        dataset: Any = runner.train_loop.dataloader.dataset
        step = max(len(dataset) / IMAGES, 1.0)
        places = [int(n * step) for n in range(int(len(dataset) / step))]
        with isolated_random_state(0):
            crops = torch.stack([dataset[i]['inputs'] for i in places])
            # kept as bytes: they are few, and distorted only once
            views = pretrained(runner).views(crops)
        self._views = (255 * views).round().to(torch.uint8).cpu()
        if self.annotations is None:
            return
        pictures, classes = find_objects(self.annotations)
        self._objects = object_crops(pictures, classes, dataset.size, OBJECTS)
        labels = self._objects[1]
        counts = torch.bincount(labels, minlength=len(classes)).tolist()
        named = zip(classes, counts, strict=True)
        runner.logger.info(
            f'Neighbours classify {len(labels)} objects of '
            f'{self.annotations}: '
            f'{", ".join(f"{name} {count}" for name, count in named)}'
        )

    @master_only
    def after_train_epoch(self, runner: Runner) -> None:
        done = runner.epoch + 1
        if done % self.interval and done < runner.max_epochs:
            return
        found = self.measure(pretrained(runner))
        text = '  '.join(f'{k}: {v:.4f}' for k, v in found.items())
        runner.logger.info(f'Epoch(val) [{done}]  {text}')
        runner.visualizer.add_scalars(
            found, step=done, file_path=f'{runner.timestamp}.json'
        )

    @torch.no_grad()
    def measure(self, model: ContrastivePretraining) -> dict[str, float]:
        """Return the measures of each network by name."""
        modes = [(module, module.training) for module in model.modules()]
        found = {}
        try:
            model.eval()
            for name, network in model.networks.items():
                if self._objects is not None:
                    crops, labels, images = self._objects
                    features = _through(network.features, crops, network)
                    whole, mean = knn_accuracy(features, labels, images)
                    found[f'{name}/knn'] = whole
                    found[f'{name}/knn_class_mean'] = mean
                if self._views is not None and len(self._views) > 2:
                    projected = _through(network, self._views, network)
                    first, second = projected.chunk(2)
                    found[f'{name}/alignment'] = alignment(first, second)
                    found[f'{name}/uniformity'] = uniformity(first)
        finally:
            for module, mode in modes:
                module.training = mode
        return found


def _through(function: Any, images: Tensor, network: Any) -> Tensor:
    """Compute what a function of images (N, 3, H, W), uint8, returns."""
    device = network.mean.device
    return torch.cat(
        [function(part.to(device) / 255).cpu() for part in images.split(CHUNK)]
    )


@HOOKS.register_module()
class ExportBackbonesHook(Hook):
    """Write the backbones as stock checkpoints when the training ends.

    They are ``<work_dir>/<network>_backbone.pth``; see
    :func:`~mmkd.pretrain.export.export_backbones`.
    """

    priority = 'LOW'

    @master_only
    def after_train(self, runner: Runner) -> None:
        meta = dict(epoch=runner.epoch, iter=runner.iter)
        files = export_backbones(
            pretrained(runner), Path(runner.work_dir), meta
        )
        for name, file in files.items():
            path = short_path(str(file))
            runner.logger.info(
                f'The backbone of {name} is {path}. A config begins with it '
                f'by\n  model = dict(backbone=dict(init_cfg=dict(\n'
                f"      type='Pretrained', checkpoint={path!r}, "
                f"prefix='backbone.')))\nor on the command line by\n"
                f'  mmkd train CONFIG --cfg-options '
                f'model.backbone.init_cfg.type=Pretrained '
                f'model.backbone.init_cfg.checkpoint={path} '
                f'model.backbone.init_cfg.prefix=backbone.'
            )
