"""FFSD of real detectors, against plain loops."""

import copy
import math

import numpy as np
import pytest
import torch
from mmengine.hooks import Hook

from mmkd.data.batch import Batch
from mmkd.errors import ConfigError, TapError
from mmkd.methods.ffsd import StageDecoder, shifted
from mmkd.utils import isolated_random_state
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy
from tests.helpers.logit_pair import seen_targets, spread
from tests.helpers.together import Networks, wide
from tests.methods.test_dcm import divergence, flat
from tests.methods.test_mutual import Alone as Seen
from tests.methods.test_mutual import (
    dense_reference,
    mutual_run,
    trained_and_resumed,
    where_the_images_are,
)
from tests.peers.test_peer import peer_config

FFSD = dict(type='mmkd.FFSD')
COMMON = ('first', 'second')


def ffsd(config=None, peers=None, **options):
    config = config or tiny.gfl()
    peers = peers or {'first': wide(config), 'second': config}
    networks = Networks({'m': dict(FFSD, **options)}, config, peers)
    networks.method = networks.distiller.methods['m']
    to_epoch(networks, 5)  # from which on the weights are whole
    spread(networks.method.fusion, 7)
    return networks


def to_epoch(networks, number):
    """Let the next step be the first of an epoch."""
    networks.distiller.epoch_length = 100
    networks.distiller.steps = 100 * number


class Computed:
    """What the networks and the method's modules make of a batch."""

    def __init__(self, networks, batch):
        method = networks.method
        self.samples = batch[1]
        with torch.no_grad():
            self.stages, self.necks = {}, {}
            for name, model in networks.all.items():
                self.stages[name] = model.backbone(batch[0])
                self.necks[name] = model.neck(self.stages[name])
            self.joined = [
                torch.cat(levels, 1)
                for levels in zip(
                    *(self.necks[name] for name in COMMON), strict=True
                )
            ]
            self.fused = [method.fusion(level) for level in self.joined]
            self.logits = {
                name: flat(model.bbox_head(self.necks[name])[0])
                for name, model in networks.all.items()
            }
            self.logits['fused'] = flat(method.fusion.bbox_head(self.fused)[0])
            self.transformed = [
                method.transform(level) for level in self.necks['student']
            ]


def inside(feature, sample):
    """The part of an image's map that is not padding, in float64."""
    height, width = feature.shape[-2:]
    rows = math.ceil(sample.img_shape[0] * height / 128)
    columns = math.ceil(sample.img_shape[1] * width / 128)
    return feature[:, :rows, :columns].double().numpy()


def attention(feature):
    """A(F) / ||A(F)|| of one image, by loops over positions."""
    values = [
        float(np.mean([channel[i, j] ** 2 for channel in feature]))
        for i in range(feature.shape[1])
        for j in range(feature.shape[2])
    ]
    norm = math.sqrt(sum(v * v for v in values))
    return [v / norm for v in values]


def d(maps, targets, samples):
    """Averaged over positions, images and levels."""
    total = []
    for level, target in zip(maps, targets, strict=True):
        for f, t, sample in zip(level, target, samples, strict=True):
            x, y = (attention(inside(m, sample)) for m in (f, t))
            total.append(
                sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) / len(x)
            )
    return sum(total) / len(total)


def test_the_fused_head_by_loops():
    networks = ffsd()
    batch = networks.batch()
    losses = networks.of_method(batch)
    computed = Computed(networks, batch)
    _, weights, avg_factor = seen_targets(Seen(networks.student, batch))
    weights = weights * where_the_images_are(networks.student, batch)
    mean = (computed.logits['first'] + computed.logits['second']) / 2
    for name, target, learner in (
        ('fusion_kl', mean, computed.logits['fused']),
        (
            'kd_student',
            computed.logits['fused'],
            computed.logits['student'],
        ),
    ):
        expected = divergence(target, learner, weights, avg_factor, 2.0)
        assert losses[name].item() == pytest.approx(expected, rel=1e-3)
        assert expected > 0.1
    own = networks.method.fusion.bbox_head.loss(
        computed.fused, copy.deepcopy(batch[1])
    )
    task = sum(sum(v) for v in own.values())
    assert losses['fusion'].item() == pytest.approx(task.item(), rel=1e-4)


def test_common_students_learn_from_each_other_alone():
    networks = ffsd()
    batch = networks.batch()
    losses = networks.of_method(batch)
    common = copy.copy(networks)
    common.__class__ = type('Common', (), {'all': networks.peers})
    common.student = networks.student
    expected = dense_reference(common, batch, 2.0)
    for name in COMMON:
        assert losses[f'mutual_{name}'].item() == pytest.approx(
            expected[name], rel=1e-3
        )
    assert 'mutual_student' not in losses


def test_features_by_loops():
    networks = ffsd(diversity_weight=0.5)
    batch = networks.batch()
    losses = networks.of_method(batch)
    computed = Computed(networks, batch)
    near = d(computed.necks['student'], computed.fused, computed.samples)
    near += d(computed.transformed, computed.joined, computed.samples)
    assert losses['features_student'].item() == pytest.approx(
        10 * near, rel=1e-3
    )
    for name, weight in (('student', 10.0), ('second', 0.5)):
        *shallow, deep = computed.stages[name]
        with torch.no_grad():
            rebuilt = networks.method.decoders[name](deep, shallow)
        near = sum(
            d([f], [g], computed.samples)
            for f, g in zip(shallow, rebuilt, strict=True)
        )
        assert losses[f'sd_{name}'].item() == pytest.approx(
            weight * near, rel=1e-3
        )
        error = 0.0
        for f, g in zip(shallow, rebuilt, strict=True):
            for a, b, sample in zip(f, g, computed.samples, strict=True):
                a, b = inside(a, sample), inside(b, sample)
                error += float(((a - b) ** 2).mean()) / len(f)
        assert losses[f'module_{name}'].item() == pytest.approx(
            1000 * error, rel=1e-3
        )


def test_diversity_by_loops():
    networks = ffsd(diversity_weight=2.0)
    batch = networks.batch()
    losses = networks.of_method(batch)
    computed = Computed(networks, batch)
    total = []
    for own, before in zip(
        computed.necks['second'], computed.necks['first'], strict=True
    ):
        for f, g, sample in zip(own, before, computed.samples, strict=True):
            x, y = (attention(inside(m, sample)) for m in (f, g))
            low = sorted(range(len(y)), key=y.__getitem__)[: len(y) // 3]
            target = [v if i in low else 1 - v for i, v in enumerate(y)]
            total.append(
                sum((a - b) ** 2 for a, b in zip(x, target, strict=True))
                / len(x)
            )
    assert losses['div_second'].item() == pytest.approx(
        2.0 * sum(total) / len(total), rel=1e-3
    )
    assert 'div_first' not in losses


def test_a_target_by_hand():
    """A third of six positions stays; the padded two are none of them."""
    y = torch.tensor([[0.1, 0.4, 0.2, 0.6], [0.5, 0.4, 0.0, 0.0]])
    weights = torch.tensor([[1.0, 1, 1, 1], [1, 1, 0, 0]]) / 6
    target = shifted(y[None, None], weights[None, None])[0, 0]
    expected = [[0.1, 0.6, 0.2, 0.4], [0.5, 0.6]]
    assert target[0].tolist() == pytest.approx(expected[0])
    assert target[1, :2].tolist() == pytest.approx(expected[1])


def test_the_weights_rise():
    networks = ffsd(module_weight=0)
    batch = networks.batch()
    whole = networks.of_method(batch)
    for number in (0, 2, 4):
        to_epoch(networks, number)
        losses = networks.of_method(batch)
        factor = math.exp(-5 * (1 - number / 5) ** 2)
        for name in ('features_student', 'sd_student', 'div_second'):
            assert losses[name].item() == pytest.approx(
                factor * whole[name].item(), rel=1e-4
            )
        assert losses['kd_student'].item() == pytest.approx(
            whole['kd_student'].item(), rel=1e-4
        )


def test_whose_gradient_it_is():
    networks = ffsd()
    losses = networks.of_method(networks.batch())
    owners = {
        'fusion': set(),
        'fusion_kl': set(),
        'kd_student': {'student'},
        'features_student': {'student'},
        'module_student': set(),
        'module_second': set(),
        'sd_student': {'student'},
        'sd_second': {'second'},
        'div_second': {'second'},
        'mutual_first': {'first'},
        'mutual_second': {'second'},
    }
    assert losses.keys() == owners.keys()
    for name, owner in owners.items():
        assert networks.gets_gradient(losses[name]) == owner, name
    sum(losses.values()).backward()
    for name, parameter in networks.method.named_parameters():
        assert parameter.grad is not None, name


@pytest.mark.parametrize('objects', [0, [0, 2]])
def test_images_without_objects(objects):
    networks = ffsd()
    losses = networks.losses(networks.batch(objects=objects))
    assert all(v.isfinite() for k, v in losses.items() if k[:2] == 'm.')


def test_zero_weight_is_each_network_alone():
    networks = ffsd(loss_weight=0)
    batch = networks.batch()
    losses = networks.losses(batch)
    alone = tiny.seeded_loss(networks.student, *batch)
    assert toy.same({k: losses[k] for k in alone}, alone)
    for name in COMMON:
        with isolated_random_state():
            theirs = networks.distiller.peers[name].loss(
                Batch(batch[0], copy.deepcopy(batch[1]))
            )
        assert toy.same({k: losses[f'{name}.{k}'] for k in theirs}, theirs)
    assert not any(key.startswith('m.') for key in losses)


def test_stages_of_odd_sizes_are_rebuilt():
    stages = [torch.rand(1, 4, 15, 9), torch.rand(1, 8, 8, 5)]
    decoder = StageDecoder(stages)
    (rebuilt,) = decoder(stages[1], stages[:1])
    assert rebuilt.shape == stages[0].shape


class TestNetworksThatDoNotFit:
    def test_one_common_student(self):
        with pytest.raises(ConfigError, match='there are 1'):
            ffsd(peers={'first': tiny.gfl()})

    def test_two_stage(self):
        rcnn = tiny.faster_rcnn()
        with pytest.raises(ConfigError, match='FFSD fits detectors with a d'):
            ffsd(rcnn, {'first': rcnn, 'second': rcnn})

    def test_a_stage_that_is_not_there(self):
        with pytest.raises(TapError, match='Did you mean "backbone'):
            ffsd(stages=['backbone.layr1', 'backbone.layer4'])

    def test_options(self):
        for options, message in (
            (dict(temperature=0), 'temperature must be above 0'),
            (dict(feature_weight=-1), 'feature_weight must be at least 0'),
            (dict(ramp_epochs=-1), 'ramp_epochs must be at least 0'),
            (dict(stages=['backbone.layer4']), 'at least one before it'),
        ):
            with pytest.raises(ConfigError, match=message):
                ffsd(**options)


def test_a_run_resumes_exactly(tmp_path):
    """With the fusion, the transform and the decoders."""
    cfg = mutual_run(tmp_path, method=dict(FFSD, module_weight=1.0))
    cfg.distillation.peers.second = dict(config=peer_config(cfg, channels=8))
    record = trained_and_resumed(cfg, tmp_path)
    for losses in record.losses:
        assert losses['m.loss_kd_student'] > 0
        assert losses['m.loss_features_student'] > 0


@pytest.mark.parametrize('by_epoch', [True, False])
def test_the_weights_rise_in_a_run(tmp_path, by_epoch):
    """By epochs, also where the loop counts iterations."""
    cfg = mutual_run(tmp_path, method=dict(FFSD, ramp_epochs=2))
    cfg.distillation.peers.second = dict(config=peer_config(cfg, channels=8))
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.param_scheduler = []
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=3)
    if not by_epoch:
        cfg.train_cfg = dict(type='IterBasedTrainLoop', max_iters=6)
        cfg.default_hooks.checkpoint = dict(
            type='CheckpointHook', by_epoch=False, interval=6
        )
    seen = []

    class Ramp(Hook):
        def before_train(self, runner):
            method = runner.distiller.methods['m']
            method.register_forward_pre_hook(
                lambda _, args: seen.append(method._ramp(args[-1].epoch))
            )

    toy.train(cfg, Ramp())
    first, second = math.exp(-5), math.exp(-5 / 4)
    assert seen == pytest.approx([first] * 2 + [second] * 2 + [1.0] * 2)
