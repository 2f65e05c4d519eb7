"""Images without labels, and a teacher that says what it is told to."""

from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.structures import InstanceData

from mmkd.registry import TEACHERS
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.view import DETECTIONS, Teacher, TeacherView
from tests.helpers import made_data, toy

BOXES = ((0.1, 0.1, 0.6, 0.7), (0.3, 0.2, 0.9, 0.9), (0.0, 0.5, 0.4, 1.0))
SCORES = (0.95, 0.92, 0.3)
LABELS = (2, 0, 1)


class ToldView(TeacherView):
    """The same boxes in every image, as shares of its size."""

    def __init__(self, teacher: 'ToldBoxes', samples: Any, device: Any):
        self.class_map, self.cache = teacher.class_map, {}
        self.teacher, self.samples, self.device = teacher, samples, device

    @property
    def detections(self) -> list[InstanceData]:
        found = []
        for sample in self.samples:
            empty = sample.get('img_id') in self.teacher.empty
            height, width = sample.img_shape[:2]
            size = torch.tensor([width, height] * 2, device=self.device)
            boxes = torch.tensor(self.teacher.boxes, device=self.device)
            every = InstanceData(
                bboxes=boxes * size,
                scores=torch.tensor(self.teacher.scores, device=self.device),
                labels=torch.tensor(self.teacher.labels, device=self.device),
            )
            found.append(every[:0] if empty else every)
        return found


@TEACHERS.register_module(name='ToldBoxes')
class ToldBoxes(Teacher):
    """It finds what it is told to; nothing in the images that are empty."""

    gives = frozenset({DETECTIONS})

    def __init__(
        self, *, context, boxes=BOXES, scores=SCORES, labels=LABELS, empty=()
    ):
        self.boxes, self.scores, self.labels = boxes, scores, labels
        self.empty = empty
        self.class_map = ClassMap(context.classes, context.classes)

    def view(self, batch):
        return ToldView(self, batch.data_samples, batch.inputs.device)

    def blank(self, device):
        return ToldView(self, (), device)


def folder() -> Path:
    """The folder of the unlabelled images."""
    return made_data.root() / 'coco_tiny' / 'val2017'


def unlabelled(cfg: Config, **options: Any) -> Config:
    """Give a toy run unlabelled images, two in a batch."""
    cfg.distillation.unlabelled = dict(
        dataset=str(folder()), batch_size=2, num_workers=0, **options
    )
    return cfg


def pseudo(
    work_dir: Path, base: str = toy.RETINANET, **options: Any
) -> Config:
    """A toy run that learns from what the teacher is told to find."""
    return toy.distilled(
        work_dir,
        base,
        teacher=dict(type='ToldBoxes'),
        methods=dict(pseudo=dict(type='mmkd.PseudoLabels')),
        **options,
    )
