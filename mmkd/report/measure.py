"""Measure how fast detectors are, and how much they compute."""

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.dataset import pseudo_collate

from .evaluation import load_data, load_model
from .work_dir import WorkDir


def measure(
    runs: Sequence[WorkDir], rounds: int = 3
) -> dict[str, dict[str, float]]:
    """Measure detectors on the test images of the first run, on one thread.

    Args:
        runs: The trainings.
        rounds: Timed passes over the images, after one that warms up.

    Returns:
        For each run ``gflops`` of one image, where a multiply-add counts as
        one, and ``ms``, the median time of one image.
    """
    torch.set_num_threads(1)
    models = {run.name: load_model(run).cpu() for run in runs}
    dataset = load_data(runs[0]).dataset
    batches = [pseudo_collate([dataset[i]]) for i in range(len(dataset))]
    passes = [pass_over(batches, models) for _ in range(rounds + 1)]
    return {
        name: {
            'gflops': count_flops(model, batches[0]) / 1e9,
            'ms': 1000
            * statistics.median(
                seconds for times in passes[1:] for seconds in times[name]
            ),
        }
        for name, model in models.items()
    }


def pass_over(
    batches: Sequence[Any], models: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Return the seconds that each batch takes in each network.

    Each batch goes through all networks before the next one does, because a
    machine's speed changes while it works.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    for batch in batches:
        for name, model in models.items():
            start = time.perf_counter()
            with torch.inference_mode():
                model.test_step(batch)
            times[name].append(time.perf_counter() - start)
    return times


def count_flops(model: Any, batch: Any) -> float:
    """Count the FLOPs of one image as MMDetection's get_flops.py does."""
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
