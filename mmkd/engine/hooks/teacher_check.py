"""Evaluate the teachers on the student's own validation data."""

import copy

import torch
from mmdet.evaluation import CocoMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import InstanceData

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
    cfg = copy.deepcopy(runner.cfg.val_dataloader)
    cfg.update(num_workers=0, persistent_workers=False)
    cfg.dataset.indices = list(range(images))
    loader = Runner.build_dataloader(cfg)
    dataset = loader.dataset
    evaluator = runner.build_evaluator(copy.deepcopy(runner.cfg.val_evaluator))
    evaluator.dataset_meta = dataset.metainfo
    ids = [dataset.get_data_info(i)['img_id'] for i in range(len(dataset))]
    for metric in evaluator.metrics:
        if isinstance(metric, CocoMetric):
            metric.img_ids = ids  # objects in other images are not counted
    for batch in loader:
        results = teacher.model.test_step(batch)
        for sample in results:
            sample.pred_instances = in_student_classes(
                sample.pred_instances, teacher.class_map
            )
        evaluator.process(data_samples=results, data_batch=batch)
    return evaluator.evaluate(len(dataset))


def in_student_classes(
    instances: InstanceData, classes: ClassMap
) -> InstanceData:
    """Keep predictions of the shared classes, with the student's labels."""
    if classes.identical:
        return instances
    labels = classes.to_student[instances.labels]
    instances.labels = labels
    return instances[labels >= 0]
