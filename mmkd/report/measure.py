"""What the demo measures: precision, size and speed of detectors."""

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.apis import init_detector
from mmdet.registry import DATASETS
from mmengine.analysis import get_model_complexity_info
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.evaluator import Evaluator

Boxes = np.ndarray
"""(N, 4), xyxy, in pixels."""


@dataclass
class Figures:
    """What is measured of one network; precisions from 0 to 1."""

    AP: float
    AP50: float
    AP75: float
    parameters: int
    gflops: float
    ms: float


@dataclass
class Tile:
    """A validation tile, RGB, with its trees as boxes."""

    name: str
    pixels: np.ndarray
    trees: Boxes


@dataclass
class Detections:
    """Boxes on one tile and the score of each."""

    boxes: Boxes
    scores: np.ndarray


def measure(
    networks: Mapping[str, tuple[Config, Path]], rounds: int = 3
) -> tuple[dict[str, Figures], list[Tile], dict[str, list[Detections]]]:
    """Evaluate networks on the validation tiles of the first one's config.

    Args:
        networks: Name to config and checkpoint.
        rounds: Timed passes over the tiles, after one that warms up.

    Returns:
        Per network its figures, the tiles, per network its detections.
    """
    models = {
        name: init_detector(config.copy(), str(checkpoint), device='cpu')
        for name, (config, checkpoint) in networks.items()
    }
    config = next(iter(networks.values()))[0]
    dataset = DATASETS.build(config.val_dataloader.dataset)
    batches = [pseudo_collate([dataset[i]]) for i in range(len(dataset))]
    outputs, _ = detect(models, batches)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        for name, seconds in detect(models, batches)[1].items():
            times[name] += seconds
    figures = {}
    for name, model in models.items():
        evaluator = Evaluator(config.val_evaluator)
        evaluator.dataset_meta = dataset.metainfo
        evaluator.process(data_samples=outputs[name])
        found = evaluator.evaluate(len(dataset))
        figures[name] = Figures(
            AP=found['coco/bbox_mAP'],
            AP50=found['coco/bbox_mAP_50'],
            AP75=found['coco/bbox_mAP_75'],
            parameters=sum(p.numel() for p in model.parameters()),
            gflops=count_flops(model, batches[0]) / 1e9,
            ms=1000 * statistics.median(times[name]),
        )
    detections = {
        name: [as_detections(sample.pred_instances) for sample in samples]
        for name, samples in outputs.items()
    }
    return figures, [as_tile(batch) for batch in batches], detections


def detect(
    models: Mapping[str, Any], batches: list[Any]
) -> tuple[dict[str, list[Any]], dict[str, list[float]]]:
    """Per network its outputs and the seconds each batch took.

    Each batch goes through all networks before the next: a machine's speed
    changes while it works. One thread.
    """
    torch.set_num_threads(1)
    outputs: dict[str, list[Any]] = {name: [] for name in models}
    times: dict[str, list[float]] = {name: [] for name in models}
    for batch in batches:
        for name, model in models.items():
            start = time.perf_counter()
            with torch.inference_mode():
                outputs[name] += model.test_step(batch)
            times[name].append(time.perf_counter() - start)
    return outputs, times


def count_flops(model: Any, batch: Any) -> float:
    """FLOPs of one image, counted as MMDetection's get_flops.py does."""
    data = model.data_preprocessor(batch)
    model.forward = partial(model.forward, data_samples=data['data_samples'])
    try:
        counted = get_model_complexity_info(
            model,
            None,
            inputs=data['inputs'],
            show_table=False,
            show_arch=False,
        )
    finally:
        del model.forward
    return float(counted['flops'])


def as_tile(batch: Any) -> Tile:
    sample = batch['data_samples'][0]
    pixels = batch['inputs'][0].permute(1, 2, 0).numpy()[..., ::-1]
    trees = sample.gt_instances.bboxes.numpy()
    return Tile(Path(sample.img_path).stem, pixels, trees)


def as_detections(instances: Any) -> Detections:
    return Detections(instances.bboxes.numpy(), instances.scores.numpy())
