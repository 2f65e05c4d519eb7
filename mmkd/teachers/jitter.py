"""How sure a two-stage teacher is of the place of its boxes."""

from collections.abc import Sequence

import torch
from mmengine.structures import InstanceData
from torch import Tensor

from mmkd.detectors.record import RoIOutputs, as_tensor
from mmkd.detectors.two_stage import deltas_of_label

from .view import TeacherView


def box_variation(
    view: TeacherView,
    chosen: Sequence[InstanceData],
    *,
    times: int = 10,
    scale: float = 0.06,
) -> list[Tensor]:
    r"""Return how much boxes vary if the RoI head starts from moved ones.

    .. math::
        u = \frac{1}{4} \sum_{k \in \{x_1, y_1, x_2, y_2\}}
            \frac{\mathrm{std}_j\, \hat b_{j,k}}{s_k}, \qquad
        \hat b_j = \mathrm{RoI head}(b + \sigma\, s\, \epsilon_j)

    with normal :math:`\epsilon_j` and s the width and height of the mean box
    (at least one pixel). Of a cascade, the last stage refines.

    Source: Xu et al., "End-to-End Semi-Supervised Object Detection with Soft
    Teacher", ICCV 2021, https://arxiv.org/abs/2106.09018, with 10 moved boxes
    and :math:`\sigma = 0.06`. What it calls a variance is this deviation.

    Args:
        view: The view of a teacher with a RoI head.
        chosen: For each image ``index`` (n,) into the view's detections.
        times: The number of moved boxes.
        scale: :math:`\sigma`.

    Returns:
        (n,) for each image.
    """
    found = [
        each[kept.index]
        for each, kept in zip(view.detections, chosen, strict=True)
    ]
    boxes = torch.cat([as_tensor(each.bboxes).float() for each in found])
    counts = [len(each) for each in found]
    if not len(boxes):
        return [boxes.new_zeros(0) for _ in found]
    images = torch.arange(len(found), device=boxes.device).repeat_interleave(
        torch.tensor(counts, device=boxes.device), output_size=len(boxes)
    )
    sides = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1).repeat(1, 2)
    noise = torch.randn(times, *boxes.shape, device=boxes.device)
    moved = boxes + scale * sides * noise  # (times, n, 4)
    rois = torch.cat(
        [images.to(boxes).expand(times, -1)[..., None], moved], dim=-1
    )
    labels = torch.cat([each.labels for each in found]).repeat(times)
    stage = len(view.facts.rois) - 1
    scores = view.score_rois(_sample(view, rois.flatten(0, 1)), stage)
    assert scores.deltas is not None
    deltas = deltas_of_label(scores.deltas.float(), labels)
    refined = scores.coder.decode(moved.flatten(0, 1), deltas)
    refined = refined.view_as(moved)
    mean = refined.mean(0)
    sides = (mean[:, 2:] - mean[:, :2]).clamp(min=1).repeat(1, 2)
    return list((refined.std(0) / sides).mean(-1).split(counts))


def _sample(view: TeacherView, rois: Tensor) -> RoIOutputs:
    """Return RoIs (N, 5) in the form in which a teacher scores them."""
    none = rois.new_zeros(len(rois))
    return RoIOutputs(
        facts=view.facts.rois[-1],
        boxes=rois,
        logits=None,
        deltas=None,
        labels=none.long(),
        label_weights=none,
        targets=rois[:, 1:],
        target_weights=torch.zeros_like(rois[:, 1:]),
        avg_factor=len(rois),
    )
