"""The stock loss on a teacher's boxes (Xu et al., ICCV 2021)."""

import logging
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmengine.logging import print_log
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.core.gradients import untouched
from mmkd.core.method import Method, Need
from mmkd.data.batch import Batch
from mmkd.detectors.blank import PROBE_SIZE, image_channels, probe_sample
from mmkd.detectors.passes import images_of, loss_of
from mmkd.detectors.record import StepRecord, tensors_in
from mmkd.errors import ConfigError
from mmkd.registry import METHODS
from mmkd.teachers.jitter import box_variation
from mmkd.teachers.seen import seen_objects, with_objects
from mmkd.teachers.view import DETECTIONS, ROIS, TeacherView
from mmkd.utils import nearest

TOLD = 10
"""The most frequent classes are listed."""
BOXES = re.compile('bbox|iou|dfl|reg|xy|wh|offset|pts|centerness')
"""The parts of stock losses that are about the places of boxes."""


@METHODS.register_module()
class PseudoLabels(Method):
    r"""The student's own loss on unlabelled images with the teacher's boxes.

    .. math::
        L = \frac{|I|}{B} \, L_{stock}\bigl(I, \{(b, c) : s \ge t_c\}\bigr)

    The teacher detects objects in the weak view of each of the B images.
    Those with a score s of at least the threshold :math:`t_c` of their class
    are the ground truth of the strong view, where they are moved to and
    clipped. The student's stock loss trains on the images I that have some,
    whatever the detector is: one-stage, two-stage or a transformer. Its parts
    keep their names: ``loss_rpn_cls`` becomes
    ``<method>.unlabelled_loss_rpn_cls``. A mask head of a RoI head is left
    out, because boxes have no masks.

    An image in which the threshold leaves nothing is left out of the loss,
    because it may still hold objects. The factor lets each other image weigh
    as much as it does in a batch in which all have boxes. With
    ``background=True`` such images count as background. SoftTeacher does so,
    unless no image of the batch has a box.

    With ``max_variation``, boxes whose place the teacher is not sure of train
    the classes, but not the boxes: those that vary more if the teacher's RoI
    head starts from moved ones (``mmkd.teachers.jitter.box_variation``). Where
    a batch has such boxes, the student's heads run twice.

    The log has the number of boxes in an image (``boxes_per_image``). After
    every ``report_every`` images one line counts the boxes by class, or warns
    that the threshold leaves nothing.

    Source: Xu, Zhang, Hu, Wang, Wang, Wei, Bai, Liu, "End-to-End
    Semi-Supervised Object Detection with Soft Teacher", ICCV 2021,
    https://arxiv.org/abs/2106.09018, whose threshold is 0.9, with the weight
    4 where a batch has 4 times as many unlabelled images as labelled ones.
    There the teacher is the student's mean, the background is weighted by the
    teacher's scores, and boxes of a variation of 0.02 or more do not train
    the regression of the RoI head.

    Args:
        score_thr: The threshold, 0 to 1, or one for each class by its name;
            the key ``'default'`` is for all others (0.9 without it).
        top_k: At most as many boxes of an image are used, those of the
            highest scores; None for all.
        background: Whether images without boxes count as background.
        max_variation: Boxes that vary more do not train boxes; 0.02 in
            SoftTeacher. It takes a teacher with a RoI head. None for no
            limit.
        report_every: The number of images after which a line tells what was
            used, at least 1.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is outside its range, a class is unknown,
            or the student cannot learn from boxes alone.
    """

    needs: Sequence[Need] = (DETECTIONS,)
    without: Mapping[str, str] = {ROIS: 'max_variation=None'}
    needs_labels = False
    only_unlabelled = True
    any_geometry = True
    thresholds: Tensor

    def __init__(
        self,
        *,
        score_thr: float | Mapping[str, float] = 0.9,
        top_k: int | None = None,
        background: bool = False,
        max_variation: float | None = None,
        report_every: int = 1000,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        by_class = score_thr
        if not isinstance(by_class, Mapping):
            by_class = {'default': by_class}
        for name, value in by_class.items():
            self.check_not_negative(score_thr=value)
            self.check_option(
                value <= 1, 'score_thr', value, f'at most 1 ({name})'
            )
        if top_k is not None:
            self.check_whole(1, top_k=top_k)
        self.check_choice((True, False), background=background)
        if max_variation is not None:
            self.check_positive(max_variation=max_variation)
            self.needs = (DETECTIONS, ROIS)
        self.max_variation = max_variation
        self.check_whole(1, report_every=report_every)
        self.score_thr = dict(by_class)
        self.top_k, self.background = top_k, background
        self.report_every = report_every
        self.parts: list[str] = []
        """The names of the student's losses."""
        self._classes: Sequence[str] = ()
        self._counted = _Counted()

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        self._classes = teacher.class_map.student
        known = {*self._classes, 'default'}
        for name in self.score_thr:
            if name not in known:
                raise ConfigError(
                    f'PseudoLabels.score_thr: the student has no class '
                    f'"{name}". {nearest(name, known)}'
                )
        self.register_buffer(
            'thresholds', self._thresholds(), persistent=False
        )
        self.parts = self._try(student.model)

    def forward(
        self, student: StepRecord, teacher: TeacherView, batch: Batch
    ) -> dict[str, Tensor]:
        found = seen_objects(teacher, batch)
        chosen = [self._chosen(each) for each in found]
        self._count(found, chosen)
        images = [
            i for i, each in enumerate(chosen) if self.background or len(each)
        ]
        if not images:
            means = [each.mean() for each in tensors_in(student.maps)]
            zero = 0.0 * torch.stack(means).sum()  # with a graph
            return dict.fromkeys(self.parts, zero)
        losses = self._stock_losses(student, batch, chosen, images)
        steady = self._steady(teacher, chosen)
        if sum(map(len, steady)) < sum(map(len, chosen)):
            sure = self._stock_losses(student, batch, steady, images)
            losses |= {k: v for k, v in sure.items() if BOXES.search(k)}
        share = len(images) / len(chosen)
        return {part: share * loss for part, loss in losses.items()}

    def _chosen(self, found: InstanceData) -> InstanceData:
        """Return the detections that are used, the surest first."""
        kept = found[found.scores >= self.thresholds[found.labels]]
        if self.top_k is not None and len(kept) > self.top_k:
            kept = kept[kept.scores.topk(self.top_k).indices]
        return kept

    def _steady(
        self, teacher: TeacherView, chosen: Sequence[InstanceData]
    ) -> Sequence[InstanceData]:
        """Return the boxes of whose place the teacher is sure."""
        if self.max_variation is None:
            return chosen
        variation = box_variation(teacher, chosen)
        return [
            each[values <= self.max_variation]
            for each, values in zip(chosen, variation, strict=True)
        ]

    def _stock_losses(
        self,
        student: StepRecord,
        batch: Batch,
        chosen: Sequence[InstanceData],
        images: Sequence[int],
    ) -> dict[str, Tensor]:
        """Return the student's losses on some of the images, by part."""
        samples = with_objects(batch, chosen)
        maps, inputs = student.maps, batch.inputs
        if len(images) < len(chosen):
            index = torch.tensor(images).to(inputs.device, non_blocking=True)
            maps, inputs = images_of(maps, index), inputs[index]
            samples = [samples[i] for i in images]
        return _by_part(loss_of(student.model, maps, inputs, samples))

    def _thresholds(self) -> Tensor:
        default = self.score_thr.get('default', 0.9)
        return torch.tensor(
            [self.score_thr.get(name, default) for name in self._classes]
        )

    def _try(self, model: Any) -> list[str]:
        """Return the names of a detector's losses on boxes of a blank image.

        Raises:
            ConfigError: If it needs more than boxes, such as masks.
        """
        device = next(model.parameters()).device
        size = (1, image_channels(model), PROBE_SIZE, PROBE_SIZE)
        image = torch.linspace(-1, 1, math.prod(size), device=device)
        blank = Batch(image.view(size), [probe_sample()])
        box = torch.tensor([[8.0, 8.0, 200.0, 180.0]], device=device)
        label = torch.zeros(1, dtype=torch.long, device=device)
        objects = [InstanceData(bboxes=box, labels=label)]
        modes = [(module, module.training) for module in model.modules()]
        try:
            with untouched(model), torch.no_grad():
                model.train()
                maps = model.extract_feat(blank.inputs)
                samples = with_objects(blank, objects)
                losses = loss_of(model, maps, blank.inputs, samples)
        except Exception as error:  # any detector, any reason
            raise ConfigError(
                f'PseudoLabels: {type(model).__name__} cannot learn from '
                f'boxes alone: its loss on them ended with {error!r}. Use a '
                'detector of boxes as the student.'
            ) from error
        finally:
            for module, mode in modes:
                module.training = mode
        return [*_by_part(losses)]

    # ------------------------------------------------------- what is logged

    def _count(
        self, found: Sequence[InstanceData], chosen: Sequence[InstanceData]
    ) -> None:
        """Count boxes without waiting for a device, and tell now and then."""
        number = sum(map(len, chosen))
        boxes = self.thresholds.new_tensor(number / len(chosen))
        used = sum(len(each) > 0 for each in chosen)
        self.statistics = {
            'boxes_per_image': boxes,
            'used_images': boxes.new_tensor(used / len(chosen)),
        }
        counted = self._counted
        counted.add(found, chosen, len(self._classes))
        if counted.images >= self.report_every:
            self._tell(counted)
            self._counted = _Counted()

    def _tell(self, counted: '_Counted') -> None:
        """Tell what was used of the last images, in a line of the log."""
        if counted.boxes == 0:
            print_log(
                f'PseudoLabels: score_thr has left no box in '
                f'{counted.images} images, so the student learns nothing from '
                f'them. {counted.best()} Lower score_thr, check that the '
                "teacher knows the student's classes, or take a better "
                'teacher.',
                'current',
                logging.WARNING,
            )
            return
        numbers = counted.by_class.tolist()
        pairs = sorted(
            zip(numbers, self._classes, strict=True), key=lambda pair: -pair[0]
        )
        shown = ', '.join(f'{name} {n}' for n, name in pairs[:TOLD] if n)
        without = [name for n, name in pairs if not n]
        print_log(
            f'PseudoLabels: {counted.boxes} boxes in {counted.images} images, '
            f'{counted.used} of which have some: {shown}'
            + (f'; none of {len(without)} classes' if without else ''),
            'current',
        )


class _Counted:
    """What was used of the images since the last line of the log."""

    def __init__(self) -> None:
        self.images = self.boxes = self.used = 0
        self.by_class = torch.zeros(0, dtype=torch.long)
        self.highest = torch.zeros(0)

    def add(
        self,
        found: Sequence[InstanceData],
        chosen: Sequence[InstanceData],
        classes: int,
    ) -> None:
        """Count a batch, whose numbers may still be on their way."""
        labels = torch.cat([each.labels for each in chosen])
        scores = torch.cat([each.scores for each in found])
        if not len(self.by_class):
            self.by_class = labels.new_zeros(classes)
            self.highest = scores.new_zeros(())
        ones = torch.ones_like(labels)
        self.by_class = self.by_class.index_add(0, labels, ones)
        if len(scores):
            self.highest = torch.maximum(self.highest, scores.max())
        self.images += len(chosen)
        self.boxes += len(labels)
        self.used += sum(len(each) > 0 for each in chosen)

    def best(self) -> str:
        """Say what the highest score was."""
        highest = float(self.highest) if self.highest.numel() else 0.0
        if not highest:
            return "The teacher has found nothing of the student's classes."
        return f'The highest score of the teacher was {highest:.2f}.'


def _by_part(losses: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the scalars of stock losses, named without ``loss_``."""
    found = {}
    for name, loss in losses.items():
        if 'loss' in name:
            part = re.sub(r'(^|\.)loss_', r'\1', name).replace('.', '_')
            terms = [each.mean() for each in tensors_in(loss)]
            found[part] = torch.stack(terms).sum()
    return found
