"""Detectors on their data: scores and detections."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.apis import init_detector
from mmengine.runner import Runner
from torch import nn

from mmkd.data import read_json
from mmkd.errors import CheckpointError, ConfigError
from mmkd.teachers.build import build_teacher, changed, descriptions
from mmkd.teachers.speed import SPEED_OPTIONS
from mmkd.teachers.view import Teacher, TeacherContext

from .eval_coco import Scores, evaluate
from .summary import match
from .work_dir import WorkDir

Truth = dict[str, Any]
"""Annotations in COCO's form."""
LOWEST = 0.05
"""Boxes of a lower score do not count in the score of one picture."""


@dataclass
class Objects:
    """Boxes (N, 4), xyxy in pixels of the file, with names and scores."""

    boxes: np.ndarray
    names: list[str]
    scores: np.ndarray

    def above(self, score: float) -> 'Objects':
        """Those of that score or a higher one."""
        kept = np.flatnonzero(self.scores >= score)
        names = [self.names[i] for i in kept]
        return Objects(self.boxes[kept], names, self.scores[kept])


@dataclass
class Picture:
    """An image of the data, its objects, and what each run has found."""

    id: Any
    path: Path
    truth: Objects
    found: dict[str, Objects] = field(default_factory=dict)


@dataclass
class Evaluation:
    """Of several runs, and then of their teachers, on the same images."""

    scores: dict[str, Scores] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    teachers: dict[str, Any] = field(default_factory=dict)
    """Those of each distilled run."""
    notes: list[str] = field(default_factory=list)
    """Why a run's teacher is missing."""


def evaluate_runs(
    runs: Sequence[WorkDir], limit: int | None = None
) -> Evaluation:
    """Evaluate last checkpoints on the test data of the first run's config.

    So are the frozen teachers of distilled runs, unless their own work dirs
    are among the runs: on the images as the run's student is shown them.

    Args:
        runs: Each reads the images in its own way (its test pipeline).
        limit: Take the first so many images only.

    Raises:
        ConfigError: If their test data are not the same images.
    """
    evaluation = Evaluation()
    truth: Truth = {}
    for run in runs:
        model, loader = load(run, limit)
        if not evaluation.pictures:
            truth = truth_of(loader.dataset)
            evaluation.pictures = list(read_pictures(loader.dataset))
        classes = loader.dataset.metainfo['classes']
        if not add_detections(evaluation, run.name, model, loader, classes):
            raise ConfigError(
                f'{run.name} was tested on other images than '
                f'{runs[0].name}: {loader.dataset.ann_file}. Give work dirs '
                'that share their test_dataloader.'
            )
        add_scores(evaluation, run.name, model, truth)
    add_teachers(evaluation, runs, truth, limit)
    return evaluation


def add_detections(
    evaluation: Evaluation,
    name: str,
    model: Any,
    loader: Any,
    classes: Sequence[str],
) -> bool:
    """What a detector finds; False if the images are others."""
    pictures = {picture.id: picture for picture in evaluation.pictures}
    seen = 0
    for sample in detect(model, loader):
        if sample.img_id not in pictures:
            return False
        found = as_objects(sample.pred_instances, classes)
        pictures[sample.img_id].found[name] = found
        seen += 1
    return seen == len(pictures) == len(loader.dataset)


def add_scores(
    evaluation: Evaluation, name: str, model: nn.Module, truth: Truth
) -> None:
    rows = results_of(evaluation.pictures, name, truth)
    evaluation.scores[name] = evaluate(truth, rows, 'bbox')
    parameters = sum(p.numel() for p in model.parameters())
    evaluation.parameters[name] = parameters


# ------------------------------------------------------------------ teachers


def add_teachers(
    evaluation: Evaluation,
    runs: Sequence[WorkDir],
    truth: Truth,
    limit: int | None,
) -> None:
    """Build the frozen teachers; evaluate each that no run has trained."""
    known: list[Any] = []
    for run in runs:
        if not run.distils:
            continue
        student, loader = load(run, limit)
        try:
            teacher = build_plain(run.teacher, student, loader.dataset)
        except (CheckpointError, ConfigError, OSError) as error:
            note = f'{run.name}: its teacher cannot be shown: {error}'
            evaluation.notes.append(note)
            continue
        evaluation.teachers[run.name] = teacher
        for name, source in descriptions(run.teacher).items():
            if source in known or not needs_evaluation(source, runs):
                continue
            known.append(source)
            model = teacher.networks[name].model
            classes = teacher.networks[name].classes
            name = f'{name} of {run.name}'
            add_detections(evaluation, name, model, loader, classes)
            add_scores(evaluation, name, model, truth)


def needs_evaluation(teacher: Any, runs: Sequence[WorkDir]) -> bool:
    """Whether a teacher needs evaluation, by its description.

    Not if its weights are random, as in smoke tests, or its checkpoint lies
    in the work dir of a run.
    """
    if not isinstance(teacher, Mapping) or 'checkpoint' not in teacher:
        return True  # the name of a published one
    if teacher['checkpoint'] is None:
        return False
    folder = Path(teacher['checkpoint']).resolve().parent
    return all(folder != run.folder for run in runs)


def build_plain(description: Any, student: nn.Module, dataset: Any) -> Teacher:
    """The teachers, without what makes them faster in training."""
    context = TeacherContext(student, dataset.metainfo['classes'])
    teacher = build_teacher(changed(description, _without_speed), context)
    return teacher.to(context.device)


def _without_speed(options: dict[str, Any]) -> dict[str, Any]:
    """A description without cache, compilation and the like."""
    dropped = {*SPEED_OPTIONS, 'cache'}
    return {k: v for k, v in options.items() if k not in dropped}


# ---------------------------------------------------------------- detections


def load(run: WorkDir, limit: int | None) -> tuple[nn.Module, Any]:
    """The detector of a run, ready to detect, and its test data."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    config = copy.deepcopy(run.config)
    if limit is not None:
        config.test_dataloader.dataset.indices = limit
    model = init_detector(config, run.checkpoint, device=device)
    return model, Runner.build_dataloader(config.test_dataloader)


def detect(model: Any, loader: Any) -> Iterator[Any]:
    with torch.inference_mode():
        for batch in loader:
            yield from model.test_step(batch)


def as_objects(instances: Any, classes: Sequence[str]) -> Objects:
    instances = instances.cpu()
    return Objects(
        instances.bboxes.numpy(),
        [classes[label] for label in instances.labels],
        instances.scores.numpy(),
    )


# --------------------------------------------------------------- annotations


def read_pictures(dataset: Any) -> Iterator[Picture]:
    """The images of a data set; what is to be ignored is left out."""
    classes = dataset.metainfo['classes']
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        objects = [i for i in info['instances'] if not i['ignore_flag']]
        truth = Objects(
            np.array([i['bbox'] for i in objects], float).reshape(-1, 4),
            [classes[i['bbox_label']] for i in objects],
            np.ones(len(objects)),
        )
        yield Picture(info['img_id'], Path(info['img_path']), truth)


def truth_of(dataset: Any) -> Truth:
    """A data set's annotations in COCO's form.

    From its JSON file if it has one: the areas by which objects are small or
    large are there those of masks. Else areas are those of boxes.
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
            as_annotation(number, image, instance)
            for number, (image, instance) in enumerate(boxes, start=1)
        ]
    return {
        'images': [{'id': image} for image in sorted(images)],
        'categories': kept,
        'annotations': rows,
    }


def as_annotation(
    number: int, image: Any, instance: dict[str, Any]
) -> dict[str, Any]:
    left, top, right, bottom = instance['bbox']
    width, height = right - left, bottom - top
    return {
        'id': number,
        'image_id': image,
        'category_id': instance['bbox_label'],
        'bbox': [left, top, width, height],
        'area': width * height,
        'iscrowd': int(instance['ignore_flag']),
        'ignore': int(instance['ignore_flag']),
    }


def results_of(pictures: Any, run: str, truth: Truth) -> list[dict[str, Any]]:
    """A run's detections in COCO's form; classes meet by their names."""
    ids = {row['name']: row['id'] for row in truth['categories']}
    return [
        {
            'image_id': picture.id,
            'category_id': ids[name],
            'bbox': [*box[:2].tolist(), *(box[2:] - box[:2]).tolist()],
            'score': float(score),
        }
        for picture in pictures
        for box, name, score in zip(
            picture.found[run].boxes,
            picture.found[run].names,
            picture.found[run].scores,
            strict=True,
        )
        if name in ids
    ]


# ------------------------------------------------------------ one picture


def picture_ap(truth: Objects, found: Objects) -> float | None:
    r"""AP50 of one picture, its classes taken together.

    With the detections of all classes by falling score, each right or wrong
    within its class, :math:`\frac{1}{n} \sum p_i` over the right ones, where
    :math:`p_i` is the best precision at that recall or a higher one. None
    without objects.
    """
    if not len(truth.boxes):
        return None
    found = found.above(LOWEST)
    right, _ = match_by_class(truth, found)
    hits = right[np.argsort(-found.scores, kind='stable')]
    precision = np.cumsum(hits) / np.arange(1, len(hits) + 1)
    best = np.maximum.accumulate(precision[::-1])[::-1]
    return float(best[hits].sum() / len(truth.boxes))


def match_by_class(
    truth: Objects, found: Objects, threshold: float = 0.5
) -> tuple[np.ndarray, np.ndarray]:
    """Which boxes find an object of their class; which are found."""
    right = np.zeros(len(found.boxes), bool)
    seen = np.zeros(len(truth.boxes), bool)
    for name in set(truth.names):
        theirs = np.array([n == name for n in found.names], bool)
        wanted = np.array([n == name for n in truth.names], bool)
        right[theirs], seen[wanted] = match(
            found.boxes[theirs],
            found.scores[theirs],
            truth.boxes[wanted],
            threshold,
        )
    return right, seen


def rank(
    pictures: Sequence[Picture], runs: Sequence[str]
) -> list[tuple[float, Picture]]:
    """Pictures with a score, the worst first.

    The score is the AP50 of a single run, or by how much the second one is
    ahead of the first. Pictures without objects have none.
    """
    scored = []
    for picture in pictures:
        aps = [picture_ap(picture.truth, picture.found[r]) for r in runs[:2]]
        if None not in aps:
            score = aps[0] if len(aps) == 1 else aps[1] - aps[0]
            scored.append((score, picture))
    return sorted(scored, key=lambda pair: pair[0])
