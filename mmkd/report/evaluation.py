"""Evaluate detectors on their data: scores, detections, single pictures."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.apis import init_detector
from mmdet.evaluation.functional import average_precision, bbox_overlaps
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmkd.data import read_json
from mmkd.errors import CheckpointError, ConfigError
from mmkd.teachers.build import build_teacher, changed, descriptions
from mmkd.teachers.speed import SPEED_OPTIONS
from mmkd.teachers.view import Teacher, TeacherContext

from .eval_coco import Scores, evaluate
from .work_dir import WorkDir

Truth = dict[str, Any]
"""Annotations in COCO's form."""
LOWEST = 0.05
"""Boxes of a lower score do not count in the score of a single picture."""
DRAWN = 0.5
"""Boxes of a lower score are not drawn."""


@dataclass
class Objects:
    """Boxes (N, 4), xyxy in pixels of the file, with names and scores (N)."""

    boxes: np.ndarray
    names: np.ndarray
    scores: np.ndarray

    def above(self, score: float) -> 'Objects':
        """Return those of that score or a higher one."""
        kept = self.scores >= score
        return Objects(self.boxes[kept], self.names[kept], self.scores[kept])


@dataclass
class Picture:
    """An image of the data, its objects, and what each run has found in it."""

    id: Any
    path: Path
    truth: Objects
    found: dict[str, Objects] = field(default_factory=dict)


@dataclass
class Evaluation:
    """What several runs, and then their teachers, find on the same images."""

    truth: Truth
    pictures: list[Picture]
    scores: dict[str, Scores] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    teachers: dict[str, Teacher] = field(default_factory=dict)
    """The frozen teachers of each distilled run."""
    notes: list[str] = field(default_factory=list)
    """Why a run's teacher is missing."""

    def add(
        self, name: str, model: Any, loader: Any, classes: Sequence[str]
    ) -> None:
        """Evaluate a detector on the images, which the loader gives."""
        pictures = {picture.id: picture for picture in self.pictures}
        with torch.inference_mode():
            for batch in loader:
                for sample in model.test_step(batch):
                    found = as_objects(sample.pred_instances, classes)
                    pictures[sample.img_id].found[name] = found
        rows = results_of(self.pictures, name, self.truth)
        self.scores[name] = evaluate(self.truth, rows, 'bbox')
        self.parameters[name] = sum(p.numel() for p in model.parameters())


def evaluate_runs(
    runs: Sequence[WorkDir], limit: int | None = None
) -> Evaluation:
    """Evaluate last checkpoints on the test data of the first run's config.

    The frozen teachers of distilled runs are evaluated too, on the images as
    the run's student sees them, unless their own work dirs are among the runs.

    Args:
        runs: The trainings. Each reads the images by its own test pipeline.
        limit: Take only this many images, the first ones.

    Raises:
        ConfigError: If their test data are not the same images.
    """
    loaders = [load_data(run, limit) for run in runs]
    pictures = list(read_pictures(loaders[0].dataset))
    evaluation = Evaluation(truth_of(loaders[0].dataset), pictures)
    for run, loader in zip(runs, loaders, strict=True):
        theirs = [picture.id for picture in read_pictures(loader.dataset)]
        if {picture.id for picture in pictures} != set(theirs):
            raise ConfigError(
                f'{run.name} was tested on other images than '
                f'{runs[0].name}: {loader.dataset.ann_file}. Give work dirs '
                'that share their test_dataloader.'
            )
        classes = loader.dataset.metainfo['classes']
        evaluation.add(run.name, load_model(run), loader, classes)
    add_teachers(evaluation, runs, limit)
    return evaluation


# ------------------------------------------------------------------ teachers


def add_teachers(
    evaluation: Evaluation, runs: Sequence[WorkDir], limit: int | None
) -> None:
    """Build the frozen teachers; evaluate those that no run has trained."""
    known: list[Any] = []
    for run in runs:
        if not run.distils:
            continue
        student, loader = load_model(run), load_data(run, limit)
        try:
            classes = loader.dataset.metainfo['classes']
            context = TeacherContext(student, classes)
            plain = changed(run.teacher, without_speed)
            teacher = build_teacher(plain, context).to(context.device)
        except (CheckpointError, ConfigError, OSError) as error:
            note = f'{run.name}: its teacher cannot be shown: {error}'
            evaluation.notes.append(note)
            continue
        evaluation.teachers[run.name] = teacher
        for name, source in descriptions(run.teacher).items():
            if source in known or not needs_evaluation(source, runs):
                continue
            known.append(source)
            network = teacher.networks[name]
            evaluation.add(
                f'{name} of {run.name}', network.model, loader, network.classes
            )


def needs_evaluation(teacher: Any, runs: Sequence[WorkDir]) -> bool:
    """Tell from its description whether a teacher has to be evaluated.

    It need not be if its weights are random, as in smoke tests, or if its
    checkpoint lies in the work dir of one of the runs.
    """
    if not isinstance(teacher, Mapping) or 'checkpoint' not in teacher:
        return True  # the name of a published one
    if teacher['checkpoint'] is None:
        return False
    folder = Path(teacher['checkpoint']).resolve().parent
    return all(folder != run.folder for run in runs)


def without_speed(options: dict[str, Any]) -> dict[str, Any]:
    """Remove cache, compilation and the like from a description."""
    dropped = {*SPEED_OPTIONS, 'cache'}
    return {k: v for k, v in options.items() if k not in dropped}


# ---------------------------------------------------------------- detections


def load_model(run: WorkDir) -> Any:
    """Build the detector of a run, ready to detect."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    return init_detector(
        copy.deepcopy(run.config), run.checkpoint, device=device
    )


def load_data(run: WorkDir, limit: int | None = None) -> Any:
    """Build the loader of a run's test data, with a limit the first ones."""
    init_default_scope(run.config.get('default_scope', 'mmdet'))
    config = copy.deepcopy(run.config.test_dataloader)
    if limit is not None:
        config.dataset.indices = limit
    return Runner.build_dataloader(config)


def as_objects(instances: Any, classes: Sequence[str]) -> Objects:
    instances = instances.numpy()
    names = [classes[label] for label in instances.labels]
    return Objects(instances.bboxes, np.array(names, str), instances.scores)


# --------------------------------------------------------------- annotations


def read_pictures(dataset: Any) -> Iterator[Picture]:
    """Read the images of a data set, without the objects to be ignored."""
    classes = dataset.metainfo['classes']
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        objects = [i for i in info['instances'] if not i['ignore_flag']]
        truth = Objects(
            np.array([i['bbox'] for i in objects], float).reshape(-1, 4),
            np.array([classes[i['bbox_label']] for i in objects], str),
            np.ones(len(objects)),
        )
        yield Picture(info['img_id'], Path(info['img_path']), truth)


def truth_of(dataset: Any) -> Truth:
    """Return a data set's annotations in COCO's form.

    They come from its JSON file if it has one, because the areas by which
    objects are small or large are those of masks there. Without such a file,
    the areas are those of boxes.
    """
    classes = dataset.metainfo['classes']
    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    images = {info['img_id'] for info in infos}
    if str(dataset.ann_file).endswith('.json'):
        data = read_json(dataset.ann_file)
        kept = [c for c in data['categories'] if c['name'] in classes]
        ids = {category['id'] for category in kept}
        rows = [
            {'iscrowd': 0, **row}
            for row in data['annotations']
            if row['image_id'] in images and row['category_id'] in ids
        ]
    else:
        kept = [{'id': i, 'name': name} for i, name in enumerate(classes)]
        boxes = [(f['img_id'], i) for f in infos for i in f['instances']]
        rows = [
            {
                'id': number,
                'image_id': image,
                'category_id': instance['bbox_label'],
                **box_of(instance['bbox']),
                'iscrowd': int(instance['ignore_flag']),
            }
            for number, (image, instance) in enumerate(boxes, start=1)
        ]
    return {
        'images': [{'id': image} for image in sorted(images)],
        'categories': kept,
        'annotations': rows,
    }


def box_of(xyxy: Any) -> dict[str, Any]:
    """Return a box as COCO has it, and its area."""
    left, top, right, bottom = map(float, xyxy)
    width, height = right - left, bottom - top
    return {'bbox': [left, top, width, height], 'area': width * height}


def results_of(pictures: Any, run: str, truth: Truth) -> list[dict[str, Any]]:
    """Return a run's detections in COCO's form, classes matched by name."""
    ids = {row['name']: row['id'] for row in truth['categories']}
    return [
        {
            'image_id': picture.id,
            'category_id': ids[name],
            'bbox': box_of(box)['bbox'],
            'score': float(score),
        }
        for picture in pictures
        for found in [picture.found[run]]
        for box, name, score in zip(
            found.boxes, found.names, found.scores, strict=True
        )
        if name in ids
    ]


# ------------------------------------------------------------ one picture


def match(truth: Objects, found: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Tell which boxes find an object, and which objects are found.

    As in COCO's evaluation at an IoU of 0.5: by falling score, each box takes
    the object of its class that it overlaps most among those not taken.
    """
    overlaps = bbox_overlaps(found.boxes, truth.boxes)
    overlaps[found.names[:, None] != truth.names] = 0
    right = np.zeros(len(found.boxes), bool)
    seen = np.zeros(len(truth.boxes), bool)
    for index in np.argsort(-found.scores, kind='stable'):
        free = np.where(seen, 0, overlaps[index])
        if free.max(initial=0) >= 0.5:
            right[index] = seen[free.argmax()] = True
    return right, seen


def picture_ap(truth: Objects, found: Objects) -> float:
    """AP50 of one picture with objects, over all classes taken together.

    It is the area below the curve of precision over recall, where each
    detection is right or wrong within its class.
    """
    found = found.above(LOWEST)
    right, _ = match(truth, found)
    hits = right[np.argsort(-found.scores, kind='stable')].cumsum()
    precision = hits / np.arange(1, len(hits) + 1)
    return float(average_precision(hits / len(truth.boxes), precision))


def rank(
    pictures: Sequence[Picture], runs: Sequence[str]
) -> list[tuple[float, Picture]]:
    """Return the pictures that have objects with a score, the worst first.

    The score is the AP50 of a single run; with more runs, it is the lead of
    the second over the first.
    """
    scored = []
    for picture in pictures:
        if len(picture.truth.boxes):
            found = [picture.found[run] for run in runs[:2]]
            aps = [picture_ap(picture.truth, each) for each in found]
            scored.append(
                (aps[0] if len(aps) == 1 else aps[1] - aps[0], picture)
            )
    return sorted(scored, key=lambda pair: pair[0])
