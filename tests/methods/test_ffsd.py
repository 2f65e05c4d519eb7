"""FFSD of real detectors, against plain loops."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mmengine.hooks import Hook

from mmkd.data.batch import Batch
from mmkd.errors import ConfigError, TapError
from mmkd.methods.ffsd import StageDecoder, distance, shifted
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
    return feature.detach()[:, :rows, :columns].double().numpy()


def attention(feature):
    """A(F) of one image, by loops over positions."""
    return [
        float(np.mean([channel[i, j] ** 2 for channel in feature]))
        for i in range(feature.shape[1])
        for j in range(feature.shape[2])
    ]


def norm(values):
    return math.sqrt(sum(v * v for v in values))


def unit(values):
    length = norm(values)
    return [v / length for v in values]


def gap(x, y):
    """D of two lists."""
    pairs = zip(unit(x), unit(y), strict=True)
    return sum((a - b) ** 2 for a, b in pairs) / len(x)


def turned(values):
    """The target of div, of A(F_{i-1}), and the normalised A(F_{i-1})."""
    length, y = norm(values), unit(values)
    *low, limit = sorted(range(len(y)), key=y.__getitem__)[: len(y) // 3]
    target = [v if i in low else length - v for i, v in enumerate(y)]
    target[limit] = length / 2
    return target, y


def d(maps, targets, samples):
    """Averaged over positions, images and levels."""
    total = []
    for level, target in zip(maps, targets, strict=True):
        for f, t, sample in zip(level, target, samples, strict=True):
            total.append(gap(*(attention(inside(m, sample)) for m in (f, t))))
    return sum(total) / len(total)


def d_of_features(maps, targets, samples):
    """Over channels and positions, in place of the attention."""
    total = []
    for f, t, sample in zip(maps, targets, samples, strict=True):
        total.append(gap(*(inside(m, sample).ravel() for m in (f, t))))
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
    networks = ffsd()
    batch = networks.batch()
    losses = networks.of_method(batch)
    computed = Computed(networks, batch)
    near = d(computed.necks['student'], computed.fused, computed.samples)
    near += d(computed.transformed, computed.joined, computed.samples)
    assert losses['features_student'].item() == pytest.approx(
        10 * near, rel=1e-3
    )


def rebuilding(decoder, deep, training):
    """What the layers make of a map, deep first, by their weights."""
    maps = []
    for transposed, bn, _ in decoder.layers:
        deep = F.conv_transpose2d(
            deep, transposed.weight, stride=2, padding=1, output_padding=1
        )
        deep = F.batch_norm(
            deep,
            bn.running_mean.clone(),
            bn.running_var.clone(),
            bn.weight,
            bn.bias,
            training=training,
        ).relu()
        maps.append(deep)
    return maps[::-1]


def widened(feature, width):
    return torch.stack(
        [feature[:, c % feature.shape[1]] for c in range(width)], 1
    )


@pytest.mark.parametrize('decoder_input', ['fused', 'own'])
def test_self_distillation_by_loops(decoder_input):
    config = tiny.gfl()
    narrow = tiny.merged(
        config, neck=dict(out_channels=12), bbox_head=dict(in_channels=12)
    )
    networks = ffsd(
        config,
        {'first': narrow, 'second': wide(config)},
        diversity_weight=0.5,
        decoder_input=decoder_input,
    )
    networks.losses(networks.batch())  # moves the running statistics
    decoders = copy.deepcopy(networks.method.decoders)
    batch = networks.batch()
    losses = networks.of_method(batch)
    computed = Computed(networks, batch)
    samples = computed.samples
    for name, weight in (('student', 10.0), ('second', 0.5)):
        *shallow, deepest = computed.stages[name]
        own = computed.necks[name][2]
        assert own.shape[-2:] == deepest.shape[-2:]
        before = computed.necks['first'][2]
        source = computed.fused[2] if name == 'student' else before.clone()
        if name == 'second':
            for image, sample in zip(source, samples, strict=True):
                part = inside(image, sample)
                target, y = turned(attention(part))
                add = norm(attention(part)) * (np.array(target) - y)
                image[:, : part.shape[1], : part.shape[2]] += torch.tensor(
                    add.reshape(part.shape[1:]) / len(image)
                )
            assert (source.shape[1], own.shape[1]) == (12, 16)
            source = widened(source, 16)
        if decoder_input == 'own':
            source = own
        decoder = decoders[name]
        targets = rebuilding(decoder, source, training=False)
        near = sum(
            d([f], [g], samples) for f, g in zip(shallow, targets, strict=True)
        )
        assert losses[f'sd_{name}'].item() == pytest.approx(
            weight * near, rel=1e-3
        )
        error = sum(
            d_of_features(f, g, samples) + d([f], [g], samples)
            for f, g in zip(
                shallow, rebuilding(decoder, own, training=True), strict=True
            )
        )
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
            x, a = (attention(inside(m, sample)) for m in (f, g))
            if len(a) < 3:
                half = norm(a) / 2
                low = min(unit(a))
                target = [half if v == low else 2 * half - v for v in unit(a)]
            else:
                target, _ = turned(a)
            pairs = zip(unit(x), target, strict=True)
            total.append(sum((v - w) ** 2 for v, w in pairs) / len(x))
    assert losses['div_second'].item() == pytest.approx(
        2.0 * sum(total) / len(total), rel=1e-3
    )
    assert 'div_first' not in losses


def test_a_target_by_hand():
    """A third of nine positions stays, but for the largest of the third.

    The attentions have the norm 2. The padded three are none of them.
    """
    a = torch.tensor([[0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8, 0.6]])
    a = torch.cat([a, torch.tensor([[1.0, 1, 1, 1, 0, 0, 9, 9, 9]])])
    inside = torch.tensor([[1.0] * 9, [1.0] * 6 + [0.0] * 3])
    a[0] *= 2 / a[0].norm()
    target = shifted(a[:, None, None], inside[:, None, None])[:, 0, 0]
    y = (a[0] / 2).tolist()
    expected = [*y[:2], 1, *(2 - v for v in y[3:])]
    assert target[0].tolist() == pytest.approx(expected)
    assert target[1, :6].tolist() == pytest.approx([1.5] * 4 + [1.0] * 2)


def test_the_weights_rise():
    """The first epoch is number 1, and the fifth has the whole weights."""
    networks = ffsd()
    batch = networks.batch()
    whole = networks.of_method(batch)
    ramp = (
        'features_student',
        'module_student',
        'module_second',
        'div_second',
    )
    for number in (0, 2, 3, 4, 5):
        to_epoch(networks, number)
        losses = networks.of_method(batch)
        factor = 1.0
        if number < 5:
            factor = math.exp(-5 * (1 - (number + 1) / 5) ** 2)
        for name in ramp:
            assert losses[name].item() == pytest.approx(
                factor * whole[name].item(), rel=1e-4
            )
        assert losses['kd_student'].item() == pytest.approx(
            whole['kd_student'].item(), rel=1e-4
        )
    to_epoch(networks, 0)
    first = networks.of_method(batch)['features_student'] / whole[ramp[0]]
    assert first.item() == pytest.approx(0.0408, rel=1e-2)


def test_the_ramp_of_self_distillation():
    """Its targets move with the statistics of the chain, so these are held."""
    networks = ffsd(ramp_epochs=2)
    for module in networks.method.decoders.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.0
    batch = networks.batch()
    whole = networks.of_method(batch)
    to_epoch(networks, 0)
    losses = networks.of_method(batch)
    for name in ('sd_student', 'sd_second'):
        assert losses[name].item() == pytest.approx(
            math.exp(-5 / 4) * whole[name].item(), rel=1e-4
        )


def test_the_statistics_of_a_chain_are_those_of_its_training():
    """A pass for the targets neither uses those of the batch nor moves any."""
    networks = ffsd()
    decoder = networks.method.decoders['student']
    bn = decoder.layers[0][1]
    seen = []
    bn.register_forward_hook(lambda module, *_: seen.append(module.training))
    networks.losses(networks.batch())
    assert seen == [False, True]
    assert decoder.training
    assert int(bn.num_batches_tracked) == 1


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
    layer = decoder.layers[0][0]
    assert (layer.kernel_size, layer.output_padding) == ((3, 3), (1, 1))
    assert layer.bias is None


# -------------------------------------------------------------- official code


def official_attention(feature):
    return feature.pow(2).mean(1, keepdim=True)


def official_distance(x, y):
    """Its attention_loss and fusion_loss."""
    x, y = (F.normalize(v.flatten(1)) for v in (x, y))
    return (x - y).pow(2).mean()


def official_turn(y):
    """The target of its diversity_loss, and the normalised y."""
    length = y.flatten(1).norm(dim=1, keepdim=True)
    y = F.normalize(y.flatten(1))
    limit = y.topk(y.shape[1] // 3, largest=False).values[:, -1:]
    return (length / 2 - y) * torch.sign(y - limit) + length / 2, y


def official_diversity(x, y):
    target, _ = official_turn(y)
    return (F.normalize(x.flatten(1)) - target).pow(2).mean()


def official_diversity_target(y):
    attention = official_attention(y)
    length = attention.flatten(1).norm(dim=1, keepdim=True)
    target, unit = official_turn(attention)
    return y + ((target - unit) * length / y.shape[1]).view_as(attention)


def fused_by(layers, x):
    """FusionModule and TransFusionModule, by the weights of the layers."""
    for convolution, bn in (layers[0:2], layers[3:5]):
        if convolution is layers[0]:  # depthwise
            x = F.conv2d(x, convolution.weight, padding=1, groups=x.shape[1])
        else:
            x = F.conv2d(x, convolution.weight)
        x = F.batch_norm(x, None, None, bn.weight, bn.bias, training=True)
        x = x.relu()
    return x


class TestOfficialCode:
    """SJLeo/FFSD, with the levels of necks where it has last stages."""

    @pytest.fixture(scope='class')
    def step(self):
        """A second step, of three networks of one width, without padding."""
        config = tiny.retinanet()
        networks = ffsd(
            config, {'first': config, 'second': config}, diversity_weight=0.5
        )
        options = dict(sizes=((256, 256), (256, 256)))  # levels from 2 x 2 on
        networks.losses(networks.batch(**options))
        method = copy.deepcopy(networks.method)
        batch = networks.batch(**options)
        losses = networks.of_method(batch)
        stages, necks = {}, {}
        for name, model in networks.all.items():
            stages[name] = model.backbone(batch[0])
            necks[name] = model.neck(stages[name])
        return networks, method, losses, stages, necks

    def check(self, step, name, expected):
        """The same value, and the same gradient of all networks."""
        networks, _, losses, *_ = step
        assert losses[name].item() == pytest.approx(expected.item(), rel=1e-3)
        weights = [
            parameter
            for model in networks.all.values()
            for parameter in model.parameters()
            if parameter.requires_grad
        ]
        ours, theirs = (
            torch.cat(
                [
                    g.flatten()
                    for g in torch.autograd.grad(
                        loss,
                        weights,
                        retain_graph=True,
                        materialize_grads=True,
                    )
                ]
            )
            for loss in (losses[name], expected)
        )
        assert theirs.norm() > 0
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()

    def fused(self, step):
        _, method, _, _, necks = step
        joined = [
            torch.cat([a.detach(), b.detach()], 1)
            for a, b in zip(necks['first'], necks['second'], strict=True)
        ]
        layers = method.fusion.layers
        return joined, [fused_by(layers, level).detach() for level in joined]

    def test_diversity(self, step):
        *_, necks = step
        each = [
            official_diversity(
                official_attention(x), official_attention(y.detach())
            )
            for x, y in zip(necks['second'], necks['first'], strict=True)
            if x.shape[-1] > 1  # of 3 positions and more
        ]
        assert len(each) == 5
        self.check(step, 'div_second', 0.5 * sum(each) / 5)

    def test_the_leader_and_the_fusion(self, step):
        _, method, _, _, necks = step
        joined, fused = self.fused(step)
        total = 0
        for x, f, j in zip(necks['student'], fused, joined, strict=True):
            turned = fused_by(method.transform, x)
            total = total + official_distance(
                official_attention(x), official_attention(f)
            )
            total = total + official_distance(
                official_attention(turned), official_attention(j)
            )
        self.check(step, 'features_student', 10 * total / 5)

    @pytest.mark.parametrize(
        ('name', 'weight'), [('student', 10.0), ('second', 0.5)]
    )
    def test_self_distillation(self, step, name, weight):
        _, method, _, stages, necks = step
        source = official_diversity_target(necks['first'][2].detach())
        if name == 'student':
            source = self.fused(step)[1][2]
        targets = rebuilding(method.decoders[name], source, training=False)
        total = sum(
            official_distance(
                official_attention(f), official_attention(g.detach())
            )
            for f, g in zip(stages[name], targets, strict=False)
        )
        self.check(step, f'sd_{name}', weight * total)

    @pytest.mark.parametrize('name', ['student', 'second'])
    def test_the_chain_learns_from_the_own_map(self, step, name):
        networks, method, losses, stages, necks = step
        own = necks[name][2].detach()
        decoder = method.decoders[name]
        rebuilt = rebuilding(decoder, own, training=True)
        total = 0
        for g, f in zip(rebuilt, stages[name], strict=False):
            f = f.detach()
            total = total + 1000 * official_distance(g, f)
            total = total + 1000 * official_distance(
                official_attention(g), official_attention(f)
            )
        found = losses[f'module_{name}']
        assert found.item() == pytest.approx(total.item(), rel=1e-3)
        ours = torch.autograd.grad(
            found,
            list(networks.method.decoders[name].parameters()),
            retain_graph=True,
        )
        theirs = torch.autograd.grad(total, list(decoder.parameters()))
        for own, other in zip(ours, theirs, strict=True):
            assert (own - other).norm() < 1e-3 * other.norm()

    def test_the_scale_of_features_does_not_matter_to_the_chain(self):
        maps = [torch.rand(2, 4, 8, 8), torch.rand(2, 8, 4, 4)]
        samples = tiny.batch_for(
            tiny.build(tiny.gfl()), sizes=((128, 128), (128, 128))
        )[1]
        (rebuilt,) = StageDecoder(maps)(maps[1], maps[:1])
        values = [
            distance([rebuilt], [scale * maps[0]], samples).item()
            for scale in (1.0, 100.0)
        ]
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        assert values[0] == pytest.approx(
            official_distance(rebuilt, maps[0]).item(), rel=1e-5
        )


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
            (dict(decoder_input='deep'), "must be one of 'fused', 'own'"),
            (dict(ramp_epochs=-1), 'ramp_epochs must be at least 0'),
            (dict(stages=['backbone.layer4']), 'at least one before it'),
        ):
            with pytest.raises(ConfigError, match=message):
                ffsd(**options)


def test_a_run_resumes_exactly(tmp_path):
    """With the fusion, the transform and the decoders."""
    cfg = mutual_run(tmp_path, method=FFSD)
    cfg.distillation.peers.second = dict(config=peer_config(cfg, channels=8))
    record = trained_and_resumed(cfg, tmp_path)
    for losses in record.losses:
        assert losses['m.loss_kd_student'] > 0
        assert losses['m.loss_features_student'] > 0


@pytest.mark.parametrize('by_epoch', [True, False])
def test_the_weights_rise_in_a_run(tmp_path, by_epoch):
    """By epochs, also where the loop counts iterations."""
    cfg = mutual_run(tmp_path, method=dict(FFSD, ramp_epochs=3))
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
    first, second = math.exp(-5 * 4 / 9), math.exp(-5 / 9)
    assert seen == pytest.approx([first] * 2 + [second] * 2 + [1.0] * 2)
