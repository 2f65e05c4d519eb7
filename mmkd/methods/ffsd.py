"""Feature fusion and self-distillation of networks in training (FFSD)."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
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
from mmkd.utils import Official

from .feature_base import position_weights
from .kd import class_kl
from .mutual import mutual_kl, mutual_losses
from .mutual_logits import check_mutual, mutual_logits

STAGES = tuple(f'backbone.layer{number}' for number in range(1, 5))
DECODER_INPUTS = ('fused', 'own')
EPSILON = 1e-12


@METHODS.register_module()
class FFSD(Method):
    r"""Common students are fused, and the student, the leader, learns from it.

    The K peers are the common students. The student is the leader, and the
    only network that is meant for use. With the attention
    :math:`A(F) = \mathrm{mean}_c F^2` and
    :math:`d(x, y) = \mathrm{mean}((x / \|x\| - y / \|y\|)^2)` over the
    channels and positions of an image (not of its padding), averaged over
    images and, unless a sum is written, over FPN levels:

    * ``mutual_<peer>``: DML among the common students, with T.
    * ``fusion``, ``fusion_kl``: the levels of their necks, without gradient,
      are joined and fused by a depthwise 3x3 and a 1x1 convolution, each
      with BN and ReLU, to :math:`F_f`. A copy of the leader's head on it
      learns the stock task, and :math:`T^2 \mathrm{KL}(\bar z \| z_f)`
      towards the common students' mean logits.
    * ``kd_student``: :math:`T^2 \mathrm{KL}(\mathrm{sg}[z_f] \| z_0)`.
    * ``features_student``: :math:`\lambda_f [d(A(F_0), \mathrm{sg}[A(F_f)])
      + d(A(t(F_0)), \mathrm{sg}[A(\mathrm{concat})])]`. The layers of t are
      those of the fusion, from the leader's width to that of the joined maps.
    * ``div_<peer>``: :math:`\lambda_{div} \, \mathrm{mean}((A(F_i) /
      \|A(F_i)\| - v)^2)`. The target v turns the attention away from that
      of the previous common student: with :math:`a = A(F_{i-1})` and
      :math:`y = a / \|a\|`, the lowest third of y stays, and the rest
      becomes :math:`\|a\| - y`. The position at the limit, the largest of
      the third, becomes :math:`\|a\| / 2`.
    * ``module_<network>``: a chain of transposed convolutions (3x3, stride 2,
      without bias, each with BN and ReLU) rebuilds the shallower stages
      :math:`F_l` of the network's backbone from its deepest map :math:`F_i`,
      as :math:`G_l`: :math:`\lambda_m \sum_l [d(G_l, \mathrm{sg}[F_l])
      + d(A(G_l), \mathrm{sg}[A(F_l)])]`, without a gradient into the
      network.
    * ``sd_<network>``: :math:`\lambda \sum_l d(A(F_l), \mathrm{sg}[A(G'_l)])`,
      with :math:`\lambda_f` for the leader, :math:`\lambda_{div}` for common
      students. :math:`G'_l` is what the same chain makes of another map, with
      its running statistics: of :math:`F_f` for the leader, and of
      :math:`F_{i-1} + (v - y) \|a\| / C`, in each of C channels, for common
      students.

    ``div``, ``sd`` and ``module`` apply to every network except the first
    common student. All :math:`\lambda` (``feature_weight``,
    ``diversity_weight`` and ``module_weight``) rise as
    :math:`\exp(-5 (1 - e / 5)^2)` over the epochs; the first is e = 1.

    Source: Li, Lin, Ji, Ye, Tian, Wu, Tian, "Distilling a Powerful Student
    Model via Online Knowledge Distillation", 2021,
    https://arxiv.org/abs/2103.14473. Formulas, layers and weights are those
    of its code, SJLeo/FFSD, which is for classification. There, the last
    stage of the backbone is what the classifier reads, and so both the map
    that is fused and the deepest map of the chain. For detectors, these are
    our choices: the levels of the neck, which the head reads, take its place;
    a dense head takes that of the classifier; one fusion and one t serve all
    levels. The chain starts at the level of the size of the deepest stage.
    Where the previous common student is of another width, the chain gets its
    channels in turn, from the first on, until there are enough. All modules
    train in one step with the student's optimiser; the code has an optimiser
    for each network and trains the chain after the students with Adam, to
    which the scale of ``module_weight`` makes no difference.

    Args:
        temperature: T, above 0.
        feature_weight: :math:`\lambda_f`, at least 0.
        diversity_weight: :math:`\lambda_{div}`, at least 0.
        module_weight: :math:`\lambda_m`, at least 0.
        ramp_epochs: Epochs over which all :math:`\lambda` rise; 0 for none.
        stages: Module paths of all networks' backbone stages, shallow first,
            at least two. All but the deepest are rebuilt.
        decoder_input: What ``sd`` rebuilds the stages from: ``'fused'``, the
            maps above, as in the code, or ``'own'``, the network's own
            deepest map, as in the abstract.
        loss_weight: Weight of the method.

    Raises:
        ConfigError: If an option is out of range, there are fewer than two
            peers, or their heads are not dense or do not fit.
        TapError: If a stage does not exist.
    """

    learns_from: ClassVar[str] = 'peers'
    official = (
        Official(
            code='https://github.com/SJLeo/FFSD',
            compared='tests/methods/test_ffsd.py::TestOfficialCode',
            options=dict(
                temperature=2.0,
                feature_weight=10.0,
                diversity_weight=1e-5,
                module_weight=1000.0,
                ramp_epochs=5,
                decoder_input='fused',
            ),
            differs=(
                'it trains classifiers, with an optimiser for each network; '
                'the levels of the neck take the place of the last stage, a '
                'dense head that of the classifier'
            ),
        ),
    )

    def __init__(
        self,
        *,
        temperature: float = 2.0,
        feature_weight: float = 10.0,
        diversity_weight: float = 1e-5,
        module_weight: float = 1000.0,
        ramp_epochs: int = 5,
        stages: Sequence[str] = STAGES,
        decoder_input: str = 'fused',
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
        self.check_choice(DECODER_INPUTS, decoder_input=decoder_input)
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
        self.decoder_input = decoder_input

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
        self.transform = fusing_layers(own, joined)
        self.decoders: Any = nn.ModuleDict()
        self.levels: dict[str, int] = {}
        for name in self._self_distilled(networks):
            *shallow, deepest = self._stage_maps(networks[name])
            neck = networks[name].features('neck')
            self.levels[name] = nearest_size(neck, deepest)
            self.decoders[name] = StageDecoder(
                [*shallow, neck[self.levels[name]]]
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
        fused, of_fusion = self._fused(student, batch.data_samples, ramp)
        losses |= self._self_distillation(
            networks_of(student), fused, batch.data_samples, ramp
        )
        return losses | of_fusion

    def _fused(
        self,
        student: StepRecord,
        data_samples: Sequence[DetDataSample],
        ramp: float,
    ) -> tuple[Sequence[Tensor], dict[str, Tensor]]:
        """Fuse the common students, and let the leader learn from it."""
        common = student.peers.values()
        levels = zip(*(o.features('neck') for o in common), strict=True)
        joined = [torch.cat(maps, dim=1).detach() for maps in levels]
        fused = tuple(map(self.fusion, joined))
        task, outputs = head_loss(self.fusion, fused, data_samples)
        pairs = [mutual_logits(outputs, o, data_samples)[0] for o in common]
        mean = torch.stack([pair.teacher.detach() for pair in pairs]).mean(0)
        pair = pairs[0].replace(teacher=mean)
        own = student.features('neck')
        transformed = [self.transform(level) for level in own]
        near = attention_distance(own, fused, data_samples)
        near = near + attention_distance(transformed, joined, data_samples)
        return fused, {
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
        fused: Sequence[Tensor],
        data_samples: Sequence[DetDataSample],
        ramp: float,
    ) -> dict[str, Tensor]:
        losses = {}
        for name in self._self_distilled(networks):
            decoder = self.decoders[name]
            shallow = self._stage_maps(networks[name])[:-1]
            deepest = networks[name].features('neck')[self.levels[name]]
            leader = name == 'student'
            weight = self.feature_weight if leader else self.diversity_weight
            with torch.no_grad():
                source = self._decoded(name, networks, fused, data_samples)
                targets = decoder.in_eval(source, shallow)
            near = attention_distance(shallow, targets, data_samples)
            rebuilt = decoder(deepest.detach(), shallow)
            error = distance(
                rebuilt, shallow, data_samples
            ) + attention_distance(rebuilt, shallow, data_samples)
            scale = ramp * len(shallow)  # d is averaged over the stages
            losses[f'module_{name}'] = self.module_weight * scale * error
            losses[f'sd_{name}'] = weight * scale * near
        return losses

    def _decoded(
        self,
        name: str,
        networks: Mapping[str, StepRecord],
        fused: Sequence[Tensor],
        data_samples: Sequence[DetDataSample],
    ) -> Tensor:
        """Return the map from which a network's targets are rebuilt."""
        level = self.levels[name]
        own = networks[name].features('neck')[level]
        if self.decoder_input == 'own':
            return own
        if name == 'student':
            return fused[level]
        names = list(networks)
        before = networks[names[names.index(name) - 1]]
        other = before.features('neck')[level]
        turned = turned_away(other, position_weights(data_samples, other))
        width, given = own.shape[1], other.shape[1]
        if width == given:
            return turned
        return turned[:, torch.arange(width, device=own.device) % given]

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
                target = shifted(attention(other.detach()), weights)
                difference = unit(attention(level), weights) - target
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

    def _ramp(self, complete: int) -> float:
        """Return the part of the weights; the first epoch is number 1."""
        epoch = complete + 1
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
        self.layers = fusing_layers(joined, width)
        self.bbox_head: Any = fresh_copy(facts)

    def forward(self, joined: Tensor) -> Tensor:
        return self.layers(joined)


def fusing_layers(width: int, result: int) -> nn.Sequential:
    """Return depthwise 3x3 and 1x1 convolutions, initialised as in the code.

    Args:
        width: The number of channels of the input.
        result: That of the output.
    """
    depthwise = nn.Conv2d(width, width, 3, 1, 1, groups=width, bias=False)
    pointwise = nn.Conv2d(width, result, 1, bias=False)
    for layer in (depthwise, pointwise):
        nn.init.kaiming_normal_(layer.weight, mode='fan_out')
    return nn.Sequential(
        depthwise,
        nn.BatchNorm2d(width),
        nn.ReLU(),
        pointwise,
        nn.BatchNorm2d(result),
        nn.ReLU(),
    )


class StageDecoder(nn.Module):
    """Rebuilds a backbone's shallower stages from a network's deepest map.

    Args:
        stages: The maps of all stages, shallow first.
    """

    def __init__(self, stages: Sequence[Tensor]) -> None:
        super().__init__()
        widths = [stage.shape[1] for stage in reversed(stages)]
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(
                    deep, shallow, 3, 2, 1, output_padding=1, bias=False
                ),
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

    def in_eval(self, deep: Tensor, shallow: Sequence[Tensor]) -> list[Tensor]:
        """Rebuild them with the running statistics, which stay as they are."""
        training = self.training
        try:
            return self.eval()(deep, shallow)
        finally:
            self.train(training)


def nearest_size(levels: Sequence[Tensor], like: Tensor) -> int:
    """Return the number of the level whose size is nearest to a map's."""
    return min(
        range(len(levels)),
        key=lambda i: abs(math.log(levels[i].shape[-1] / like.shape[-1])),
    )


def attention(feature: Tensor) -> Tensor:
    """Return A, (B, 1, H, W), of a map (B, C, H, W)."""
    return feature.float().square().mean(1, keepdim=True)


def norms(maps: Tensor, weights: Tensor) -> Tensor:
    """Return the norm of each image's map without padding, (B, 1, 1, 1)."""
    inside = maps * (weights > 0)
    return inside.flatten(1).norm(dim=1).view(-1, 1, 1, 1)


def unit(maps: Tensor, weights: Tensor) -> Tensor:
    """Return maps (B, C, H, W) of norm 1 within each image, 0 on padding.

    ``weights`` are those of :func:`position_weights`.
    """
    maps = maps.float() * (weights > 0)
    return maps / norms(maps, weights).clamp(min=EPSILON)


def distance(
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    data_samples: Sequence[DetDataSample],
) -> Tensor:
    """Return d, averaged over the pairs of maps; targets are fixed."""
    each = []
    for level, target in zip(maps, targets, strict=True):
        weights = position_weights(data_samples, level)
        difference = unit(level, weights) - unit(target, weights).detach()
        square = difference.square().mean(1, keepdim=True)
        each.append((weights * square).sum((1, 2, 3)).mean())
    return torch.stack(each).mean()


def attention_distance(
    maps: Sequence[Tensor],
    targets: Sequence[Tensor],
    data_samples: Sequence[DetDataSample],
) -> Tensor:
    """Return d of the attentions, averaged over the pairs of maps."""
    ours, theirs = ([*map(attention, each)] for each in (maps, targets))
    return distance(ours, theirs, data_samples)


def shifted(attention: Tensor, weights: Tensor) -> Tensor:
    r"""Return the target v that turns attention elsewhere.

    Args:
        attention: A of a map, (B, 1, H, W).
        weights: 0 on padding.

    Returns:
        (B, 1, H, W): with :math:`y = A / \|A\|`, y on the lowest third of
        each image's positions, :math:`\|A\| / 2` on the largest of these,
        and :math:`\|A\| - y` on the rest.
    """
    inside, y = weights.flatten(1) > 0, unit(attention, weights)
    ordered = y.flatten(1).masked_fill(~inside, torch.inf).sort(dim=1).values
    third = (inside.sum(1, keepdim=True) // 3).clamp(min=1)
    limit = ordered.gather(1, third - 1).view(-1, 1, 1, 1)
    norm = norms(attention, weights)
    high = torch.where(y > limit, norm - y, norm / 2)
    return torch.where(y < limit, y, high)


def turned_away(feature: Tensor, weights: Tensor) -> Tensor:
    """Return features (B, C, H, W) with their attention turned elsewhere.

    Args:
        feature: (B, C, H, W).
        weights: 0 on padding, where the features stay as they are.
    """
    own = attention(feature)
    turn = shifted(own, weights) - unit(own, weights)
    turn = turn * norms(own, weights) * (weights > 0)
    return feature + turn / feature.shape[1]


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
