"""Evaluate detectors on their data: scores, detections, single pictures."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.apis import init_detector
from mmdet.evaluation.functional import bbox_overlaps
from mmengine.registry import init_default_scope
from mmengine.runner import Runner

from mmkd.data import read_json
from mmkd.data.checkpoint_loader import safe_checkpoints, trusts
from mmkd.data.files import real_path
from mmkd.engine.data_guard import name_unreadable_images
from mmkd.errors import CheckpointError, ConfigError
from mmkd.teachers.build import build_teacher, changed, descriptions
from mmkd.teachers.speed import SPEED_OPTIONS
from mmkd.teachers.view import Teacher, TeacherContext

from .bootstrap import ClassHits, hits_of
from .eval_coco import Scores, evaluation_of, scores_of
from .work_dir import WorkDir, kind_of

Truth = dict[str, Any]
"""Annotations in COCO's form."""
DRAWN = 0.5
"""Boxes of a lower score are not drawn, unless another score is given."""


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
    metric: str = 'AP'
    """The figure that the runs are judged by: AP, or AP50 if VOC's mAP was."""
    scores: dict[str, Scores] = field(default_factory=dict)
    hits: dict[str, list[ClassHits]] = field(default_factory=dict)
    parameters: dict[str, int] = field(default_factory=dict)
    teachers: dict[str, Teacher] = field(default_factory=dict)
    """The frozen teachers of each distilled run."""
    taught: dict[str, list[str]] = field(default_factory=dict)
    """The names of those that were evaluated for it."""
    models: dict[str, Any] = field(default_factory=dict)
    """These teachers' networks by their names."""
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
        evaluator = evaluation_of(self.truth, rows, 'bbox')
        self.scores[name] = scores_of(evaluator, self.truth)
        self.hits[name] = hits_of(evaluator)
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
    evaluation = Evaluation(
        truth_of(loaders[0].dataset), pictures, metric_of(runs[0])
    )
    for run, loader in zip(runs[1:], loaders[1:], strict=True):
        theirs = list(read_pictures(loader.dataset))
        if {p.id: p.path.name for p in pictures} != {
            p.id: p.path.name for p in theirs
        }:
            raise ConfigError(
                f'{run.name} was tested on other images than '
                f'{runs[0].name}: {loader.dataset.ann_file}. Give work dirs '
                'that share their test_dataloader.'
            )
    for run, loader in zip(runs, loaders, strict=True):
        classes = loader.dataset.metainfo['classes']
        evaluation.add(run.name, load_model(run), loader, classes)
    add_teachers(evaluation, runs, limit)
    return evaluation


def metric_of(run: WorkDir) -> str:
    """The figure that is nearest to what a run was validated by."""
    given = run.config.get('test_evaluator') or []
    kinds = [kind_of(each) for each in (given if is_list(given) else [given])]
    voc = 'VOCMetric' in kinds and 'CocoMetric' not in kinds
    return 'AP50' if voc else 'AP'


def is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


# ------------------------------------------------------------------ teachers


def add_teachers(
    evaluation: Evaluation, runs: Sequence[WorkDir], limit: int | None
) -> None:
    """Build the frozen teachers; evaluate those that no run has trained."""
    known: list[tuple[str, Any]] = []
    several = len(sources_of(runs)) > 1
    for run in runs:
        if not run.distils:
            continue
        student, loader = load_model(run), load_data(run, limit)
        try:
            classes = loader.dataset.metainfo['classes']
            context = TeacherContext(
                student, classes, class_aliases=run.class_aliases
            )
            plain = changed(run.teacher, without_speed)
            teacher = build_teacher(plain, context).to(context.device)
        except (CheckpointError, ConfigError, OSError) as error:
            note = f'{run.name}: its teacher cannot be shown: {error}'
            evaluation.notes.append(note)
            continue
        evaluation.teachers[run.name] = teacher
        for name, source in descriptions(run.teacher).items():
            if not needs_evaluation(source, runs):
                continue
            full = next((n for n, other in known if other == source), None)
            if full is None:
                full = f'{name} of {run.name}' if several else name
                known.append((full, source))
                network = teacher.networks[name]
                evaluation.models[full] = network.model
                evaluation.add(full, network.model, loader, network.classes)
            evaluation.taught.setdefault(run.name, []).append(full)


def sources_of(runs: Sequence[WorkDir]) -> list[Any]:
    """The descriptions of the teachers to be evaluated, each once."""
    found: list[Any] = []
    for run in runs:
        for source in descriptions(run.teacher).values():
            if source not in found and needs_evaluation(source, runs):
                found.append(source)
    return found


def needs_evaluation(teacher: Any, runs: Sequence[WorkDir]) -> bool:
    """Tell from its description whether a teacher has to be evaluated.

    It need not be if its weights are random, as in smoke tests, or if its
    checkpoint lies in the work dir of one of the runs.
    """
    if not isinstance(teacher, Mapping) or 'checkpoint' not in teacher:
        return True  # the name of a published one
    if teacher['checkpoint'] is None:
        return False
    folder = real_path(teacher['checkpoint']).parent
    return all(folder != run.folder for run in runs)


def without_speed(options: dict[str, Any]) -> dict[str, Any]:
    """Remove cache, compilation and the like from a description."""
    dropped = {*SPEED_OPTIONS, 'cache'}
    return {k: v for k, v in options.items() if k not in dropped}


# ---------------------------------------------------------------- detections


def load_model(run: WorkDir) -> Any:
    """Build the detector of a run, ready to detect."""
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    with safe_checkpoints(trusts(run.config)):
        return init_detector(
            copy.deepcopy(run.config), run.checkpoint, device=device
        )


def load_data(run: WorkDir, limit: int | None = None) -> Any:
    """Build the loader of a run's test data, with a limit the first ones."""
    init_default_scope(run.config.get('default_scope', 'mmdet'))
    config = copy.deepcopy(run.config.test_dataloader)
    if 'datasets' in config.dataset:
        raise ConfigError(
            f'{run.name}: its test_dataloader.dataset joins '
            f'{len(config.dataset.datasets)} data sets, and a page evaluates '
            'on one. Set test_dataloader to one of them in its config.'
        )
    if limit is not None:
        config.dataset.indices = limit
    loader = Runner.build_dataloader(config)
    name_unreadable_images(loader.dataset)
    return loader


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


def f1(truth: Objects, found: Objects) -> float:
    """Twice the objects found, by the number of objects and boxes.

    It is 1 for a picture without objects in which nothing is found.
    """
    right, _ = match(truth, found)
    total = len(truth.boxes) + len(found.boxes)
    return float(2 * right.sum() / total) if total else 1.0


def best_score(classes: Sequence[ClassHits]) -> float:
    """The score from which on boxes are drawn: that of the best F1.

    F1 is that of all images and classes together, at an IoU of 0.5; the
    score is one of 0.05, 0.06 to 0.95. Without a box that finds an object it
    is :data:`DRAWN`.
    """
    steps = np.arange(5, 96) / 100
    objects = sum(hits.objects.sum() for hits in classes)
    right, both = np.zeros(len(steps)), np.zeros(len(steps))
    for hits in classes:
        above = hits.scores >= steps[:, None]
        right += (above & hits.right[0]).sum(1)
        both += (above & (hits.right[0] | hits.wrong[0])).sum(1)
    if not right.any():
        return DRAWN
    return float(steps[np.argmax(2 * right / (objects + both))])


def rank(
    pictures: Sequence[Picture], scores: Mapping[str, float]
) -> list[tuple[float, Picture]]:
    """Return the pictures with what was gained on each, the least first.

    Args:
        pictures: The pictures.
        scores: One or two networks, and the score from which on the boxes of
            each are drawn. It is these boxes that count: in F1, or in that of
            the second network less that of the first.
    """
    gained = []
    for picture in pictures:
        f1s = [
            f1(picture.truth, picture.found[name].above(score))
            for name, score in scores.items()
        ]
        gained.append((f1s[-1] - sum(f1s[:-1]), picture))
    return sorted(gained, key=lambda pair: pair[0])
