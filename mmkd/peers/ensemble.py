"""Several detectors as one, for inference."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.model import BaseModel
from mmengine.structures import InstanceData
from torch import nn

from mmkd.detectors.averaging import (
    check_averageable,
    detect_by_mean,
    nms_threshold,
)
from mmkd.detectors.facts import class_count
from mmkd.detectors.source import build_trained, class_names, load_config
from mmkd.errors import CheckpointError, ConfigError
from mmkd.registry import MODELS
from mmkd.utils import check_options, isolated_random_state

FUSIONS = ('boxes', 'logits')
MEMBER_OPTIONS = ('config', 'checkpoint', 'trust_checkpoint')


@MODELS.register_module()
class EnsembleDetector(BaseModel):
    """Several detectors as one, for inference.

    With ``fusion='boxes'`` every member detects by itself, in its own
    normalisation, and their boxes are fused class by class. Boxes that
    overlap become one box, at their mean weighted by the scores. Its score is
    the sum of their scores divided by the number of members, at most their
    mean. This fits any detectors with the same classes; masks are left out.

    With ``fusion='logits'`` the members have the same dense head on the same
    priors. What the heads return (class logits, deltas or bins, centerness)
    is averaged, and the rest (decoding, NMS) runs once. Heads that return
    probabilities (TOOD) have their probabilities averaged.

    Source of the fusion of boxes: Solovyev, Wang, Gabruseva, "Weighted boxes
    fusion", Image and Vision Computing 2021,
    https://arxiv.org/abs/1910.13302, by the library ``ensemble-boxes``.

    A config for ``mmkd test CONFIG`` (there is no checkpoint beside
    those of the members)::

        _base_ = ['mmdet::gfl/gfl_r50_fpn_1x_coco.py']
        model = dict(
            _delete_=True,
            type='mmkd.EnsembleDetector',
            members=[
                dict(config='first.py', checkpoint='first.pth'),
                dict(config='second.py', checkpoint='second.pth'),
            ],
        )

    Args:
        members: At least two: dicts of ``config`` (a path, ``mmdet::…`` or a
            dict), ``checkpoint`` and, for pickles of more than weights,
            ``trust_checkpoint``; or detectors.
        fusion: ``'boxes'`` or ``'logits'``.
        iou_threshold: Boxes with a larger IoU, between 0 and 1, become one;
            only for ``'boxes'``. None takes 0.05 above the largest threshold
            of the members' own NMS, and at least the library's 0.55. At or
            below the threshold of NMS, two boxes would be fused that a single
            member has found to be two objects. (Above it they are still fused
            where another member's box lies between them. Soft-NMS keeps no
            boxes apart.)
        max_per_img: How many of the best fused boxes of an image are kept,
            at least 1.

    Raises:
        ConfigError: If an option is unknown or out of range, the members'
            classes or (for logits) heads differ, or the library is missing.
        CheckpointError: If a checkpoint does not fit its config.
    """

    def __init__(
        self,
        members: Sequence[Mapping[str, Any] | nn.Module],
        *,
        fusion: str = 'boxes',
        iou_threshold: float | None = None,
        max_per_img: int = 100,
    ) -> None:
        super().__init__()
        if fusion not in FUSIONS:
            raise ConfigError(
                f'EnsembleDetector.fusion must be one of {FUSIONS}, got '
                f'{fusion!r}'
            )
        if iou_threshold is not None and not 0 < iou_threshold < 1:
            raise ConfigError(
                'EnsembleDetector.iou_threshold must be between 0 and 1, got '
                f'{iou_threshold}'
            )
        if max_per_img < 1 or len(members) < 2:
            raise ConfigError(
                'EnsembleDetector needs max_per_img of at least 1 and at '
                f'least two members, got {max_per_img} and {len(members)}.'
            )
        self.fusion, self.max_per_img = fusion, max_per_img
        self.members: Any = nn.ModuleList(_build(members))
        if fusion == 'logits':
            if iou_threshold is not None:
                raise ConfigError(
                    "EnsembleDetector.iou_threshold is for fusion='boxes'; "
                    'with logits the NMS of the first member runs. Leave it '
                    'out.'
                )
            where = "EnsembleDetector with fusion='logits'"
            check_averageable(list(self.members), where)
        else:
            self.iou_threshold = _threshold(self.members, iou_threshold)
            _weighted_boxes_fusion()  # is it installed?

    @torch.no_grad()
    def test_step(self, data: Any) -> list[DetDataSample]:
        """Detect in a batch as the data loader gives it."""
        if self.fusion == 'logits':
            return detect_by_mean(list(self.members), data)
        first, *others = (member.test_step(data) for member in self.members)
        for index, sample in enumerate(first):
            found = [sample, *(results[index] for results in others)]
            sample.pred_instances = fuse_boxes(
                [each.pred_instances for each in found],
                sample.ori_shape,
                self.iou_threshold,
                self.max_per_img,
            )
        return first

    def val_step(self, data: Any) -> list[DetDataSample]:
        """Do the same as :meth:`test_step`."""
        return self.test_step(data)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Refuse: an ensemble does not train.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(
            'EnsembleDetector is for inference, by test_step and val_step; '
            'train its members instead.'
        )


def fuse_boxes(
    predictions: Sequence[InstanceData],
    shape: tuple[int, int],
    iou_threshold: float,
    max_per_img: int,
) -> InstanceData:
    """Fuse several detectors' boxes of an image.

    Args:
        predictions: The boxes of each detector: ``bboxes`` (n, 4) as xyxy in
            pixels of the original image, ``scores`` and ``labels`` (n,).
        shape: Height and width of the image.
        iou_threshold: See :class:`EnsembleDetector`.
        max_per_img: See :class:`EnsembleDetector`.

    Returns:
        The same three, sorted by falling score.
    """
    device = predictions[0].bboxes.device
    size = torch.tensor([*shape[::-1]] * 2, dtype=torch.float64)
    parts: list[list] = []
    for each in predictions:
        boxes = (each.bboxes.double().cpu() / size).clamp(0, 1)
        solid = (boxes[:, 2:] > boxes[:, :2]).all(1)
        given = (boxes, each.scores.cpu(), each.labels.cpu())
        parts.append([values[solid].numpy() for values in given])
    fused, scores, labels = _weighted_boxes_fusion()(
        *zip(*parts, strict=True), iou_thr=iou_threshold
    )
    kept = slice(max_per_img)
    return InstanceData(
        bboxes=(torch.as_tensor(fused[kept]) * size).float().to(device),
        scores=torch.as_tensor(scores[kept]).float().to(device),
        labels=torch.as_tensor(labels[kept]).long().to(device),
    )


def _build(members: Sequence[Mapping[str, Any] | nn.Module]) -> list[Any]:
    """Build detectors in eval mode, all with the same classes."""
    models, names = [], []
    for number, member in enumerate(members):
        if isinstance(member, nn.Module):
            models.append(member)
            continue
        where = f'EnsembleDetector.members[{number}]'
        check_options(where, member, MEMBER_OPTIONS)
        if not member.get('config') or not member.get('checkpoint'):
            raise ConfigError(
                f'{where} needs a "config" and a "checkpoint", got '
                f'{sorted(member)}.'
            )
        config = load_config(member['config'])
        model, meta = _load(member, config, where)
        models.append(model.eval())
        names.append(class_names(meta, config))
        if names[-1] != names[0]:
            raise ConfigError(
                f'{where} was trained on the classes {names[-1]}, the first '
                f'member on {names[0]}. Give members of the same classes in '
                'the same order.'
            )
    counts = [class_count(model) for model in models]
    if len(set(counts)) > 1:
        raise ConfigError(
            'EnsembleDetector: the members detect different numbers of '
            f'classes, {counts}. Give members of the same classes.'
        )
    return models


def _threshold(members: Iterable[nn.Module], given: float | None) -> float:
    """Return the given IoU, or one above that of each member's NMS.

    A given IoU that is not above it is used, with a warning.
    """
    own = max(map(nms_threshold, members))
    if given is None:
        base = max(own, 0.5)
        return base + min(0.05, (1 - base) / 2)
    if given <= own:
        print_log(
            f'EnsembleDetector.iou_threshold={given} is not above that of '
            f"the members' NMS ({own}): two boxes that a single member has "
            'found to be two objects become one. Raise it, or leave it out.',
            'current',
            logging.WARNING,
        )
    return given


def _load(
    member: Mapping[str, Any], config: Config, where: str
) -> tuple[nn.Module, dict[str, Any]]:
    trust = bool(member.get('trust_checkpoint', False))
    try:
        with isolated_random_state():
            return build_trained(
                config.model, member['checkpoint'], trust=trust
            )
    except CheckpointError as error:
        raise CheckpointError(f'{where}: {error}') from error


def _weighted_boxes_fusion() -> Any:
    try:
        from ensemble_boxes import weighted_boxes_fusion
    except ImportError as error:
        raise ConfigError(
            "fusion='boxes' needs the package ensemble-boxes: pip install "
            "mmkd[ensemble], or set fusion='logits'."
        ) from error
    return weighted_boxes_fusion
