"""Feature fusion and self-distillation of networks in training (FFSD)."""

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from mmkd.core.method import Method
from mmkd.data.batch import Batch
from mmkd.detectors.adapters import resize_to
from mmkd.detectors.auxiliary import fresh_copy, head_loss
from mmkd.detectors.dense_checks import check_dense
from mmkd.detectors.facts import DenseFacts
from mmkd.detectors.record import StepRecord
from mmkd.errors import ConfigError
from mmkd.peers.view import networks_of
from mmkd.registry import METHODS
from mmkd.teachers.view import TeacherView

from .feature_base import position_weights
from .kd import class_kl
from .mutual import mutual_kl, mutual_losses
from .mutual_logits import check_mutual, mutual_logits

STAGES = tuple(f'backbone.layer{number}' for number in range(1, 5))
EPSILON = 1e-12


@METHODS.register_module()
class FFSD(Method):
    r"""Common students are fused, and the student, the leader, learns from it.

    The K peers are the common students. The student is the leader, and the
    only network that is meant for use. With the attention
    :math:`A(F) = \mathrm{mean}_c F^2` and
    :math:`d(x, y) = \mathrm{mean}((x / \|x\| - y / \|y\|)^2)` over the
    positions of an image (not of its padding), averaged over images and FPN
    levels:

    * ``mutual_<peer>``: DML among the common students, with T.
    * ``fusion``, ``fusion_kl``: the levels of their necks, without gradient,
      are joined and fused by a depthwise 3x3 and a 1x1 convolution, each
      with BN and ReLU, to :math:`F_f`. A copy of the leader's head on it
      learns the stock task, and :math:`T^2 \mathrm{KL}(\bar z \| z_f)`
      towards the common students' mean logits.
    * ``kd_student``: :math:`T^2 \mathrm{KL}(\mathrm{sg}[z_f] \| z_0)`.
    * ``features_student``: :math:`\lambda_f [d(A(F_0), \mathrm{sg}[A(F_f)])
      + d(A(t(F_0)), \mathrm{sg}[A(\mathrm{concat})])]`, t a 1x1 convolution.
    * ``module_<network>``: a chain of transposed convolutions rebuilds the
      shallower stages of the backbone, :math:`G_l`, from the deepest, with
      the mean squared error times ``module_weight``, without a gradient into
      the network.
    * ``sd_<network>``: :math:`\lambda \sum_l d(A(F_l), \mathrm{sg}[A(G_l)])`,
      with :math:`\lambda_f` for the leader, :math:`\lambda_{div}` for common
      students.
    * ``div_<peer>``: :math:`\lambda_{div}` times the mean squared difference
      of the normalised :math:`A(F_i)` and a target from the previous common
      student: the lowest third of its normalised attention y stays, and the
      rest becomes :math:`\|y\| - y` with :math:`\|y\| = 1`.

    ``div``, ``sd`` and ``module`` apply to every network except the first
    common student. Both :math:`\lambda` rise as
    :math:`\exp(-5 (1 - e / 5)^2)` over the epochs e.

    Source: Li, Lin, Ji, Ye, Tian, Wu, Tian, "Distilling a Powerful Student
    Model via Online Knowledge Distillation", 2021,
    https://arxiv.org/abs/2103.14473, and its code SJLeo/FFSD, for
    classification. For detectors, our choices are neck levels instead of the
    last stage, a dense head instead of the classifier, and one fusion for all
    levels. All modules train in one step with the student's optimiser; the
    code has an optimiser for each network and trains the chain after the
    students. With ``clip_grad`` the method's layers are clipped together, so
    lower ``module_weight`` there. UNVERIFIED: that t is a plain 1x1
    convolution, and the norm in the target of ``div``.

    Args:
        temperature: T, above 0.
        feature_weight: :math:`\lambda_f`, at least 0.
        diversity_weight: :math:`\lambda_{div}`, at least 0.
        module_weight: Weight of the rebuilt maps, at least 0.
        ramp_epochs: Epochs over which both :math:`\lambda` rise; 0 for none.
        stages: Module paths of all networks' backbone stages, shallow first,
            at least two.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is out of range, there are fewer than two
            peers, or their heads are not dense or do not fit.
        TapError: If a stage does not exist.
    """

    learns_from: ClassVar[str] = 'peers'

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        feature_weight: float = 10.0,
        diversity_weight: float = 1e-5,
        module_weight: float = 1000.0,
        ramp_epochs: int = 5,
        stages: Sequence[str] = STAGES,
        loss_weight: float = 1.0,
    ) -> None:
        super().__init__(loss_weight=loss_weight)
        self.check_positive(temperature=temperature)
        self.check_not_negative(
            feature_weight=feature_weight,
            diversity_weight=diversity_weight,
            module_weight=module_weight,
            ramp_epochs=ramp_epochs,
        )
        if len(stages) < 2:
            raise ConfigError(
                'FFSD.stages needs the deepest stage and at least one before '
                f'it, got {tuple(stages)}'
            )
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.diversity_weight = diversity_weight
        self.module_weight = module_weight
        self.ramp_epochs, self.stages = ramp_epochs, tuple(stages)

    @property
    def student_paths(self) -> Sequence[str]:
        return ('neck', *self.stages)

    @property
    def peer_paths(self) -> Sequence[str]:
        return ('neck', *self.stages)

    def prepare(self, student: StepRecord, teacher: TeacherView) -> None:
        networks = networks_of(student)
        if len(networks) < 3:
            raise ConfigError(
                'FFSD fuses at least two common students, which are '
                f'distillation.peers; there are {len(student.peers)}.'
            )
        for name, outputs in networks.items():
            check_dense(outputs, name, 'FFSD')
        check_mutual(networks, 'FFSD')
        widths = {n: _width(n, o) for n, o in networks.items()}
        own = widths.pop('student')
        joined = sum(widths.values())
        facts = student.facts.dense
        assert facts is not None
        self.fusion = Fusion(joined, own, facts)
        self.transform = nn.Conv2d(own, joined, 1)
        self.decoders: Any = nn.ModuleDict(
            {
                name: StageDecoder(self._stage_maps(networks[name]))
                for name in self._self_distilled(networks)
            }
        )

    def forward(
        self,
        student: StepRecord,
        teacher: TeacherView,
        batch: Batch,
    ) -> dict[str, Tensor]:
        common, ramp = student.peers, self._ramp(batch.epoch)
        mutual = mutual_losses(common, batch.data_samples, self.temperature)
        losses = {f'mutual_{name}': loss for name, loss in mutual.items()}
        losses |= self._diversity(common, batch.data_samples, ramp)
        losses |= self._self_distillation(
            networks_of(student), batch.data_samples, ramp
        )
        losses |= self._fused(student, batch.data_samples, ramp)
        return losses

    def _fused(
        self,
        student: StepRecord,
        data_samples: Sequence[DetDataSample],
        ramp: float,
    ) -> dict[str, Tensor]:
        """Fuse the common students, and let the leader learn from it."""
        common = student.peers.values()
        levels = zip(*(o.features('neck') for o in common), strict=True)
        joined = [torch.cat(maps, dim=1).detach() for maps in levels]
        fused = tuple(map(self.fusion, joined))
        task, outputs = head_loss(self.fusion, fused, data_samples)
        pairs = [mutual_logits(outputs, o, data_samples)[0] for o in common]
        mean = torch.stack([pair.teacher.detach() for pair in pairs]).mean(0)
        pair = dataclasses.replace(pairs[0], teacher=mean)
        own = student.features('neck')
        transformed = [self.transform(level) for level in own]
        near = distance(own, fused, data_samples)
        near = near + distance(transformed, joined, data_samples)
        return {
            'fusion': task,
            'fusion_kl': class_kl(pair, self.temperature),
            'kd_student': mutual_kl(
                student, [outputs], data_samples, self.temperature
            ),
            'features_student': ramp * self.feature_weight * near,
        }

    def _self_distillation(
        self,
        networks: Mapping[str, StepRecord],
        data_samples: Sequence[DetDataSample],
        ramp: float,
    ) -> dict[str, Tensor]:
        losses = {}
        for name in self._self_distilled(networks):
            *shallow, deep = self._stage_maps(networks[name])
            rebuilt = self.decoders[name](deep.detach(), shallow)
            error = torch.stack(
                [
                    mean_square(g, f.detach(), data_samples)
                    for g, f in zip(rebuilt, shallow, strict=True)
                ]
            ).sum()
            leader = name == 'student'
            weight = self.feature_weight if leader else self.diversity_weight
            near = len(shallow) * distance(shallow, rebuilt, data_samples)
            losses[f'module_{name}'] = self.module_weight * error
            losses[f'sd_{name}'] = ramp * weight * near
        return losses

    def _diversity(
        self,
        common: Mapping[str, StepRecord],
        data_samples: Sequence[DetDataSample],
        ramp: float,
    ) -> dict[str, Tensor]:
        losses = {}
        maps = [outputs.features('neck') for outputs in common.values()]
        for name, before, own in zip(
            list(common)[1:], maps[:-1], maps[1:], strict=True
        ):
            each = []
            for level, other in zip(own, before, strict=True):
                weights = position_weights(data_samples, level)
                target = shifted(unit_attention(other, weights), weights)
                difference = unit_attention(level, weights) - target.detach()
                square = (weights * difference**2).sum((1, 2, 3))
                each.append(square.mean())
            total = torch.stack(each).mean()
            losses[f'div_{name}'] = ramp * self.diversity_weight * total
        return losses

    def _self_distilled(self, networks: Mapping[str, StepRecord]) -> list[str]:
        """Return all networks except the first common student."""
        leader, _, *others = networks
        return [leader, *others]

    def _stage_maps(self, outputs: StepRecord) -> list[Tensor]:
        return [outputs.features(path)[-1] for path in self.stages]

    def _ramp(self, epoch: int) -> float:
        if epoch >= self.ramp_epochs:
            return 1.0
        return math.exp(-5 * (1 - epoch / self.ramp_epochs) ** 2)


class Fusion(nn.Module):
    """Fuses common students' joined maps, with a head on the result.

    Args:
        joined: The sum of the common students' widths.
        width: The leader's width.
        facts: The facts of the leader's head, of which a copy is trained.
    """

    def __init__(self, joined: int, width: int, facts: DenseFacts) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(joined, joined, 3, padding=1, groups=joined, bias=False),
            nn.BatchNorm2d(joined),
            nn.ReLU(),
            nn.Conv2d(joined, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.bbox_head: Any = fresh_copy(facts)

    def forward(self, joined: Tensor) -> Tensor:
        return self.layers(joined)


class StageDecoder(nn.Module):
    """Rebuilds a backbone's shallower stages from its deepest.

    Args:
        stages: The maps of all stages, shallow first.
    """

    def __init__(self, stages: Sequence[Tensor]) -> None:
        super().__init__()
        widths = [stage.shape[1] for stage in reversed(stages)]
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(deep, shallow, 4, stride=2, padding=1),
                nn.BatchNorm2d(shallow),
                nn.ReLU(),
            )
            for deep, shallow in itertools.pairwise(widths)
        )

    def forward(self, deep: Tensor, shallow: Sequence[Tensor]) -> list[Tensor]:
        """Rebuild maps of the sizes of ``shallow``, in their order."""
        rebuilt = []
        for layer, like in zip(self.layers, reversed(shallow), strict=True):
            deep = resize_to(layer(deep), like.shape)
            rebuilt.append(deep)
        return rebuilt[::-1]


def unit_attention(feature: Tensor, weights: Tensor) -> Tensor:
    """Return the attention of (B, C, H, W) as unit vectors (B, 1, H, W).

    ``weights`` are those of :func:`position_weights`; padding is 0.
    """
    attention = feature.float().square().mean(1, keepdim=True)
    attention = attention * (weights > 0)
    norm = attention.flatten(1).norm(dim=1).clamp(min=EPSILON)
    return attention / norm.view(-1, 1, 1, 1)


def distance(
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    data_samples: Sequence[DetDataSample],
) -> Tensor:
    """Return d of the attentions, averaged over levels; targets are fixed."""
    each = []
    for level, target in zip(maps, targets, strict=True):
        weights = position_weights(data_samples, level)
        ours = unit_attention(level, weights)
        theirs = unit_attention(target, weights).detach()
        square = (weights * (ours - theirs) ** 2).sum((1, 2, 3))
        each.append(square.mean())
    return torch.stack(each).mean()


def shifted(attention: Tensor, weights: Tensor) -> Tensor:
    """Return the target that turns attention elsewhere.

    Args:
        attention: The unit vectors y, (B, 1, H, W).
        weights: 0 on padding.

    Returns:
        (B, 1, H, W): y on the lowest third of each image's positions, 1 - y
        on the rest.
    """
    flat, inside = attention.flatten(1), weights.flatten(1) > 0
    ordered = flat.masked_fill(~inside, torch.inf).sort(dim=1).values
    third = inside.sum(1, keepdim=True) // 3
    low = attention < ordered.gather(1, third).view(-1, 1, 1, 1)
    return torch.where(low, attention, 1 - attention)


def mean_square(
    maps: Tensor, targets: Tensor, data_samples: Sequence[DetDataSample]
) -> Tensor:
    """Return the mean squared error over channels, positions and images."""
    weights = position_weights(data_samples, maps)
    square = F.mse_loss(maps.float(), targets.float(), reduction='none')
    square = square.mean(1, keepdim=True)
    return (weights * square).sum((1, 2, 3)).mean()


def _width(name: str, outputs: StepRecord) -> int:
    """Return the width of all levels of a network's neck."""
    widths = {level.shape[1] for level in outputs.features('neck')}
    if len(widths) > 1:
        raise ConfigError(
            'FFSD fuses all levels by the same layers; the neck of '
            f'"{name}" has levels of {sorted(widths)} channels. Use a neck '
            'of one width, such as FPN.'
        )
    return widths.pop()
