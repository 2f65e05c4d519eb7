"""Evaluate the teachers on the student's own validation data."""

import copy
from typing import Any

import torch
from mmdet.evaluation import CocoMetric
from mmdet.evaluation.evaluator import MultiDatasetsEvaluator
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch.utils.data import Dataset

from mmkd.engine.distilled import distiller_of
from mmkd.errors import ConfigError
from mmkd.registry import HOOKS
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.frozen import FrozenDetector
from mmkd.utils import isolated_random_state


@HOOKS.register_module()
class TeacherCheckHook(Hook):
    """Evaluate each teacher before training, in the way the student will be.

    The teacher sees the first ``evaluate`` validation images through the
    student's pipeline and its own normalisation. Its classes are mapped to
    the student's by name. If its AP is 0 or far from the published one, the
    checkpoint, the order of the classes or that of the channels is wrong: you
    know before the long run. With or without this hook, a checkpoint has to
    fit its config exactly.

    Args:
        evaluate: The number of images, at least 1; fewer if the data set has
            fewer.

    Raises:
        ConfigError: If ``evaluate`` is below 1, or the config has no
            validation.
    """

    priority = 'VERY_HIGH'

    def __init__(self, *, evaluate: int = 100) -> None:
        if evaluate < 1:
            raise ConfigError(
                'TeacherCheckHook.evaluate must be at least 1, got '
                f'{evaluate}.'
            )
        self.evaluate = evaluate

    def before_train(self, runner: Runner) -> None:
        distiller = distiller_of(runner)
        if runner.cfg.get('val_dataloader') is None:
            raise ConfigError(
                'TeacherCheckHook needs a val_dataloader and val_evaluator.'
            )
        images = min(self.evaluate, len(runner.val_dataloader.dataset))
        for name, teacher in distiller.networks.items():
            with isolated_random_state():
                metrics = evaluate_teacher(runner, teacher, images)
            shown = '  '.join(f'{k}: {v:.4g}' for k, v in metrics.items())
            runner.logger.info(
                f'The {name} on {images} validation images: '
                f'{shown or "no detections, no metrics"}'
            )
            runner.visualizer.add_scalars(
                {f'{name}/{k}': float(v) for k, v in metrics.items()}, step=0
            )


@torch.no_grad()
def evaluate_teacher(
    runner: Runner, teacher: FrozenDetector, images: int
) -> dict[str, float]:
    """Evaluate a teacher on the first validation images of a run.

    Every process of a distributed run takes its share.

    Args:
        runner: The runner, whose config has a validation.
        teacher: The teacher.
        images: How many images it is evaluated on.

    Returns:
        The metrics by name.
    """
    dataset = FirstImages(runner.val_dataloader.dataset, images)
    cfg = copy.deepcopy(dict(runner.cfg.val_dataloader))
    cfg.update(num_workers=0, persistent_workers=False, dataset=dataset)
    loader = Runner.build_dataloader(cfg)
    evaluator = runner.build_evaluator(copy.deepcopy(runner.cfg.val_evaluator))
    evaluator.dataset_meta = dataset.metainfo
    # MMDetection's evaluator of several sets has a metric for each.
    apart = isinstance(evaluator, MultiDatasetsEvaluator)
    for number, metric in enumerate(evaluator.metrics):
        if isinstance(metric, CocoMetric):
            # Objects in other images are not counted.
            metric.img_ids = dataset.image_ids(number if apart else None)
    for batch in loader:
        results = teacher.model.test_step(batch)
        for sample in results:
            sample.pred_instances = in_student_classes(
                sample.pred_instances, teacher.class_map
            )
        evaluator.process(data_samples=results, data_batch=batch)
    return evaluator.evaluate(len(dataset))


class FirstImages(Dataset):
    """The first images of a built data set.

    Of one that joins others, it has the first ones of each, in proportion to
    their sizes, and at least one.

    Args:
        dataset: The data set.
        count: How many images, at most.
    """

    def __init__(self, dataset: Any, count: int) -> None:
        self.dataset = dataset
        total = len(dataset)
        ends = getattr(dataset, 'cumulative_sizes', [total])
        self.indices: list[int] = []
        self.ends: list[int] = []
        for start, end in zip([0, *ends[:-1]], ends, strict=True):
            share = max(1, count * (end - start) // total)
            self.indices += range(start, min(start + share, end))
            self.ends.append(len(self.indices))
        self.metainfo = copy.deepcopy(dataset.metainfo)
        metas = self.metainfo
        for meta in metas if isinstance(metas, list) else [metas]:
            if 'cumulative_sizes' in meta:
                meta['cumulative_sizes'] = self.ends

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Any:
        return self.dataset[self.indices[index]]

    def get_data_info(self, index: int) -> dict[str, Any]:
        """Return the annotations of an image."""
        return self.dataset.get_data_info(self.indices[index])

    def image_ids(self, part: int | None = None) -> list[Any]:
        """Return the ids of the images, or of those of one part."""
        start, end = 0, len(self)
        if part is not None:
            start, end = ([0, *self.ends])[part : part + 2]
        return [self.get_data_info(i)['img_id'] for i in range(start, end)]


def in_student_classes(
    instances: InstanceData, classes: ClassMap
) -> InstanceData:
    """Keep predictions of the shared classes, with the student's labels."""
    if classes.identical:
        return instances
    labels = classes.to_student[instances.labels]
    instances.labels = labels
    return instances[labels >= 0]
