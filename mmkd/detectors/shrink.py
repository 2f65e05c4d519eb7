"""Stock configs at toy scale: narrow layers, few photos, read small.

Nothing else in a config is changed, and what is built from it is real, but
does not learn anything useful. It serves to try a pair on any machine.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmdet.structures.mask import BitmapMasks
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData, PixelData

RESNETS = ('ResNet', 'ResNeXt')
WIDTHS = {
    **{64: 8, 96: 16, 128: 16},
    **{256: 32, 384: 32, 512: 32, 1024: 32, 2048: 64},
}
"""The narrow value of each width."""
STAGES = [8, 16, 32, 64]
"""The widths of the narrow ResNet's stages."""
SCALE = (128, 96)
"""The size in which photos are read, (width, height) in pixels."""


# --------------------------------------------------------------------- model


def small_model(model: Any, *, narrow: bool = True) -> ConfigDict:
    """Return a narrow copy of a model's config that downloads nothing.

    Models on other backbones than a ResNet or an hourglass have small
    variants of their own and keep their widths.

    Args:
        model: ``model`` of a stock config.
        narrow: False keeps the stock widths.
    """
    backbone = model.get('backbone', {}).get('type')
    narrow = narrow and backbone in (*RESNETS, 'HourglassNet')
    small = ConfigDict(_shrink(model, narrow=narrow))
    if 'roi_head' in small:
        few_boxes(small)
    for step in small.get('data_preprocessor', {}).get('batch_augments') or ():
        if step.type == 'BatchFixedSizePad':
            step.size = SCALE[::-1]
    if narrow and small.get('bbox_head', {}).get('type') == 'DDODHead':
        small.bbox_head.use_dcn = False  # larger than the smallest maps
    if narrow and 'decoder' in small:
        small.bbox_head.embed_dims = 32
        small.num_queries = 20
    return small


def _shrink(cfg: Any, key: str = '', *, narrow: bool) -> Any:
    if isinstance(cfg, Mapping):
        result = {
            k: _shrink(v, k, narrow=narrow)
            for k, v in cfg.items()
            if k != 'pretrained'
        }
        init = result.get('init_cfg')
        # Of MMEngine's initialisers, only Pretrained has a checkpoint; PVT
        # leaves out its type.
        if isinstance(init, dict) and 'checkpoint' in init:
            result['init_cfg'] = None
        if key == 'backbone' and narrow and cfg['type'] in RESNETS:
            result.update(type='ResNet', depth=18, base_channels=8)
            result.update(frozen_stages=-1, norm_eval=False)
            for option in ('groups', 'base_width', 'dcn', 'style'):
                result.pop(option, None)
        return result
    if isinstance(cfg, list | tuple):
        if narrow and key == 'in_channels':
            return STAGES[-len(cfg) :]
        return type(cfg)(_shrink(item, key, narrow=narrow) for item in cfg)
    wide = key.endswith(('channels', 'channel', 'dims', 'num_feats'))
    return WIDTHS[cfg] if narrow and wide and cfg in WIDTHS else cfg


def few_boxes(model: ConfigDict) -> None:
    """Reduce proposals and sampled boxes, if the detector has them."""
    few = dict(nms_pre=50, max_per_img=30)
    rcnn = model.train_cfg.rcnn
    for stage in rcnn if isinstance(rcnn, list) else [rcnn]:
        if 'sampler' in stage:
            stage.sampler.num = 16
    if 'rpn_proposal' in model.train_cfg:
        model.train_cfg.rpn_proposal.update(few)
    if model.test_cfg.get('rpn'):
        model.test_cfg.rpn.update(few)


# ---------------------------------------------------------------------- data


def small_data(
    cfg: Config, root: Path, *, images: int = 8, batch: int = 2
) -> None:
    """Let a COCO config read a few photos at :data:`SCALE`.

    Args:
        cfg: The config, changed in place.
        root: A folder in COCO's layout.
        images: The number of images to train on; 4 are for validation.
        batch: The number of images in a batch.
    """
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(
            batch_size=batch, num_workers=0, persistent_workers=False
        )
        count = images if split == 'train' else 4
        small_dataset(loader.dataset, root, count)
    for evaluator in (cfg.val_evaluator, cfg.test_evaluator):
        evaluator.ann_file = f'{root}/annotations/instances_val2017.json'


def small_dataset(
    dataset: ConfigDict,
    root: Path,
    images: int,
    scale: tuple[int, int] = SCALE,
) -> None:
    """Let a data set and those that it wraps read a few small images."""
    for step in dataset.get('pipeline', ()):
        small_step(step, scale)
    if 'dataset' in dataset:
        small_dataset(dataset.dataset, root, images, scale)
    else:
        dataset.data_root = f'{root}/'
        dataset.indices = images


def small_step(step: ConfigDict, scale: tuple[int, int] = SCALE) -> None:
    """Let a transform of a pipeline make small images, (width, height)."""
    for option in ('scale', 'scales', 'img_scale', 'crop_size', 'size'):
        if option in step:
            several = isinstance(step[option], list)
            step[option] = [scale] * len(step[option]) if several else scale
    if step.type == 'RandomAffine':
        step.border = tuple(-side // 2 for side in scale)  # of a mosaic
    if step.type == 'RandomChoice':
        step.transforms = [[dict(type='Resize', scale=scale, keep_ratio=True)]]


def noise_batch(
    sizes: Sequence[tuple[int, int]] = ((96, 128), (96, 128)),
    objects: int | Sequence[int] = 2,
    classes: int = 3,
    seed: int = 0,
    *,
    masks: bool = False,
    extras: bool = False,
) -> dict[str, list]:
    """Return images of noise with objects, as a data loader gives them.

    Args:
        sizes: (height, width) of each image in pixels.
        objects: The number in each image, one for all or one each.
        classes: The number of classes; labels are below it.
        seed: The seed of everything that is drawn.
        masks: Give the objects masks.
        extras: Give the images a semantic map and proposals, too.

    Returns:
        A dict with ``inputs``, (3, H, W) uint8 each, and ``data_samples``
        with boxes as xyxy in pixels.
    """
    random = np.random.default_rng(seed)
    counts = [objects] * len(sizes) if isinstance(objects, int) else objects
    inputs, samples = [], []
    for number, ((height, width), count) in enumerate(
        zip(sizes, counts, strict=True)
    ):
        image = random.integers(0, 256, (3, height, width), dtype=np.uint8)
        inputs.append(torch.from_numpy(image))
        corner = random.uniform(2, 30, (count, 2))
        size = random.uniform(24, 60, (count, 2))
        boxes = torch.from_numpy(np.hstack([corner, corner + size])).float()
        instances = InstanceData(
            bboxes=boxes,
            labels=torch.from_numpy(random.integers(0, classes, count)),
        )
        if masks:
            instances.masks = BitmapMasks(
                random.integers(0, 2, (count, height, width), dtype=np.uint8),
                height,
                width,
            )
        sample = DetDataSample(
            metainfo=dict(
                img_id=number,
                img_shape=(height, width),
                ori_shape=(height, width),
                scale_factor=(1.0, 1.0),
            )
        )
        sample.gt_instances = instances
        sample.ignored_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long)
        )
        if extras:
            semantic = random.integers(0, classes, (1, height, width))
            sample.gt_sem_seg = PixelData(sem_seg=torch.from_numpy(semantic))
            sample.proposals = InstanceData(bboxes=boxes + 2.0)
        samples.append(sample)
    return dict(inputs=inputs, data_samples=samples)
