"""How good is the teacher on the student's own validation data?"""

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
    """Evaluates each teacher before training, as the student will be.

    It sees the first ``evaluate`` validation images through the student's
    pipeline and its own normalisation; its classes are mapped to the
    student's by name. An AP far from the published one, or 0, tells of a
    wrong checkpoint, class order or channel order before the long run.
    That the checkpoint fits the config exactly is checked in any case.

    Args:
        evaluate: Number of images, at least 1; all, where there are fewer.
    """

    priority = 'VERY_HIGH'

    def __init__(self, *, evaluate: int = 100) -> None:
        if evaluate < 1:
            raise ConfigError(f'evaluate must be at least 1, got {evaluate}')
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
    """Metrics of the teacher on the first validation images.

    Every process of a distributed run takes its share.
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
            metric.img_ids = ids  # the objects of other images are not missed
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
    """Predictions with the student's labels, of the shared classes alone."""
    if classes.identical:
        return instances
    labels = classes.to_student[instances.labels]
    instances.labels = labels
    return instances[labels >= 0]
