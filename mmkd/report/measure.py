"""Measure how fast detectors are, and how much they compute."""

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from mmengine.analysis import get_model_complexity_info
from mmengine.dataset import pseudo_collate
from mmengine.logging import MMLogger, print_log
from torch import nn

from .evaluation import load_data, load_model
from .work_dir import WorkDir


def measure(
    runs: Sequence[WorkDir],
    rounds: int = 3,
    *,
    others: Mapping[str, nn.Module] | None = None,
    images: int | None = None,
    seconds: float = math.inf,
    device: str = 'cpu',
) -> dict[str, dict[str, float | None]]:
    """Measure detectors on the test images of the first run.

    On a CPU they run on one thread.

    Args:
        runs: The trainings.
        rounds: Timed passes over the images.
        others: More detectors, by name.
        images: The number of images, at even distances; None takes all.
        seconds: The time after which no other image is begun.
        device: Where they run.

    Returns:
        For each run ``gflops`` of one image, where a multiply-add counts as
        one (None where it cannot be counted), and ``ms``, the median time of
        one image.
    """
    models = {run.name: load_model(run).to(device) for run in runs}
    models |= {k: v.to(device) for k, v in (others or {}).items()}
    dataset = load_data(runs[0]).dataset
    step = -(-len(dataset) // (images or len(dataset)))
    batches = [
        pseudo_collate([dataset[i]]) for i in range(0, len(dataset), step)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = timed([batches[0], *batches * rounds], models, seconds)
    finally:
        torch.set_num_threads(threads)
    return {
        name: {
            'gflops': count_flops(model, batches[0]),
            'ms': 1000 * statistics.median(times[name]),
        }
        for name, model in models.items()
    }


def timed(
    batches: Sequence[Any], models: Mapping[str, Any], seconds: float
) -> dict[str, list[float]]:
    """Return the seconds that each batch but the first takes each network.

    Each batch goes through all networks before the next one does, because a
    machine's speed changes while it works. Three batches are timed at least,
    however long they take.
    """
    times: dict[str, list[float]] = {name: [] for name in models}
    begin = time.perf_counter()
    for number, batch in enumerate(batches):
        if number > 3 and time.perf_counter() - begin > seconds:
            break
        for name, model in models.items():
            start = time.perf_counter()
            with torch.inference_mode():
                model.test_step(batch)
            if next(model.parameters()).is_cuda:
                torch.cuda.synchronize()
            if number:  # the first one warms up
                times[name].append(time.perf_counter() - start)
    return times


def count_flops(model: Any, batch: Any) -> float | None:
    """Count the GFLOPs of one image as MMDetection's get_flops.py does.

    Returns:
        The number; None for a network that cannot be traced.
    """
    data = model.data_preprocessor(batch)
    model.forward = partial(model.forward, data_samples=data['data_samples'])
    logger = MMLogger.get_current_instance()
    level = logger.level
    logger.setLevel('ERROR')  # it warns of every kind of layer
    try:
        counted = get_model_complexity_info(
            model,
            None,
            inputs=data['inputs'],
            show_table=False,
            show_arch=False,
        )
    except Exception as error:  # whatever tracing a network may raise
        print_log(f'FLOPs cannot be counted: {error!r}', 'current')
        return None
    finally:
        logger.setLevel(level)
        del model.forward
    return float(counted['flops']) / 1e9
