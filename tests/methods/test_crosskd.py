"""Cross-head distillation on real detectors."""

import copy
import functools
import math

import pytest
import torch

from mmkd.detectors.blank import blank_pass
from mmkd.detectors.towers import TOWERS, from_layer
from mmkd.errors import ConfigError
from mmkd.methods.crosskd import align_moments
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import LogitPair, seen_targets

DEEP = dict(bbox_head__stacked_convs=2)
BEFORE = dict(align='image', post_activation=False, ignore_padding=True)
"""Features before the activation, and no padding."""
HEADS = {
    'retinanet': (tiny.retinanet(**DEEP), 'retina_cls', 'retina_reg'),
    'fcos': (tiny.fcos(**DEEP), 'conv_cls', 'conv_reg'),
    'atss': (tiny_dense.atss(**DEEP), 'atss_cls', 'atss_reg'),
    'gfl': (tiny.gfl(), 'gfl_cls', 'gfl_reg'),
}


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


# ------------------------------------------------------- a naive CrossKD


def before_activation(tower, feature, layer):
    """A tower's feature behind the norm of its layer (counted from 1)."""
    for number, conv in enumerate(tower[:layer]):
        feature = conv.conv(feature)
        if conv.with_norm:
            feature = conv.norm(feature)
        if number < layer - 1:
            feature = feature.relu()
    return feature


def aligned(ours, theirs, samples, how, size):
    """Channel by channel and image by image, with plain statistics."""
    if how is None:
        return ours
    result = torch.zeros_like(theirs)
    if how == 'batch':
        for c in range(theirs.shape[1]):
            result[:, c] = restated(ours[:, c], theirs[:, c], ours[:, c])
        return result
    for image, sample in enumerate(samples):
        height, width = ours.shape[2:]
        rows = math.ceil(sample.img_shape[0] * height / size[0])
        columns = math.ceil(sample.img_shape[1] * width / size[1])
        for c in range(theirs.shape[1]):
            s, t = ours[image, c], theirs[image, c]
            result[image, c] = restated(
                s[:rows, :columns], t[:rows, :columns], s
            )
    return result


def restated(s, t, values):
    deviations = [x.std(unbiased=False) for x in (s, t)]
    if deviations[0] < 1e-5:  # one position: its mean is all there is
        return values * 0 + t.mean()
    return (values - s.mean()) / deviations[0] * deviations[1] + t.mean()


def cross_heads(pair, names, layer, how):
    """The cross-head predictions and the teacher's own, a map a level."""
    student, teacher = (
        copy.deepcopy(m).double() for m in (pair.student, pair.teacher)
    )
    inputs = pair.inputs.double()
    head = teacher.bbox_head
    strides = [step for step, _ in head.prior_generator.strides]
    with torch.no_grad():
        maps = zip(
            student.extract_feat(inputs),
            teacher.extract_feat(inputs),
            strict=True,
        )
        own, cross = [], []
        for level, (s, t) in enumerate(maps):
            found = [[], []]
            for tower, name in zip(
                ('cls_convs', 'reg_convs'), names, strict=True
            ):
                convs = getattr(head, tower)
                theirs = before_activation(convs, t, layer)
                ours = before_activation(
                    getattr(student.bbox_head, tower), s, layer
                )
                adapter = pair.method.adapters[tower]
                ours = copy.deepcopy(adapter).double()(ours)
                ours = aligned(
                    ours, theirs, pair.samples, how, inputs.shape[2:]
                )
                for feature, kept in zip((ours, theirs), found, strict=True):
                    if layer:
                        feature = feature.relu()
                    for conv in convs[layer:]:
                        feature = before_activation([conv], feature, 1).relu()
                    feature = getattr(head, name)(feature)
                    if 'reg' in name and hasattr(head, 'scales'):
                        feature = feature * head.scales[level].scale
                    if name == 'conv_reg':
                        feature = feature.exp()
                    kept.append(feature)
            cross.append(found[0])
            own.append(found[1])
    assert len(strides) == len(own)
    return cross, own


def flat(levels, part, channels):
    return torch.cat(
        [
            level[part]
            .permute(0, 2, 3, 1)
            .reshape(len(level[part]), -1, channels)
            for level in levels
        ],
        1,
    )


def focal(z, p):
    sigma = 1 / (1 + math.exp(-z))
    log = -p * math.log(sigma) - (1 - p) * math.log(1 - sigma)
    return abs(sigma - p) * log


def giou(a, b):
    inter = max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(
        0.0, min(a[3], b[3]) - max(a[1], b[1])
    )
    union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - inter
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (
        max(a[3], b[3]) - min(a[1], b[1])
    )
    return inter / max(union, 1e-6) - (hull - union) / max(hull, 1e-6)


def reference(pair, names, layer, how='image', columns=(0, 1, 2)):
    """The losses' definition, prior by prior."""
    cross, own = cross_heads(pair, names, layer, how)
    classes = pair.teacher.bbox_head.num_classes
    z, z_t = (flat(x, 0, classes)[..., list(columns)] for x in (cross, own))
    labels, weights, _ = seen_targets(pair)
    weights = weights * inside(pair, own)
    positives = ((labels >= 0) & (labels < 3)).sum().item()
    confidence = z_t.sigmoid().amax(-1) * (weights > 0)
    classes = boxes = 0.0
    width = 68 if names[1] == 'gfl_reg' else 4
    r, r_t = flat(cross, 1, width), flat(own, 1, width)
    if width == 4:
        r, r_t = decoded(pair, own, r), decoded(pair, own, r_t)
    for image, prior in weights.nonzero().tolist():
        for a, b in zip(
            z[image, prior].tolist(),
            z_t[image, prior].sigmoid().tolist(),
            strict=True,
        ):
            classes += weights[image, prior].item() * focal(a, b)
        s, t = r[image, prior], r_t[image, prior]
        if width == 4:
            distance = 1 - giou(s.tolist(), t.tolist())
        else:
            q, q_t = (x.view(4, 17).softmax(-1) for x in (s, t))
            distance = (q_t * (q_t / q).log()).sum().item()
        boxes += confidence[image, prior].item() * distance
    if width == 4:
        boxes = boxes / positives
    else:
        boxes = 4 * boxes / (4 * confidence.sum().item())
    return dict(cls=classes / positives, box=boxes)


def inside(pair, own):
    """Padding of FCOS is trained on; that of the others has no weight."""
    head = pair.student.bbox_head
    points = hasattr(head, 'regress_ranges')
    found = [[], []]
    for level, (step, _) in zip(
        own, head.prior_generator.strides, strict=True
    ):
        shape = level[0].shape[-2:]
        for row in range(shape[0]):
            for column in range(shape[1]):
                x, y = ((v + 0.5 * points) * step for v in (column, row))
                for image, sample in enumerate(pair.samples):
                    height, width = sample.img_shape
                    found[image] += [x < width and y < height] * (
                        level[0].shape[1] // pair.teacher.bbox_head.num_classes
                    )
    return torch.tensor(found)


def decoded(pair, own, values):
    """Boxes from the teacher's own priors, written out."""
    head = pair.teacher.bbox_head
    sizes = [level[0].shape[-2:] for level in own]
    priors = torch.cat(head.prior_generator.grid_priors(sizes, device='cpu'))
    priors = priors.double()
    if priors.shape[1] == 2:  # distances of a point
        return torch.cat(
            [priors - values[..., :2], priors + values[..., 2:]], -1
        )
    values = values * torch.tensor(head.bbox_coder.stds)
    assert values[..., 2:].abs().max() < 4  # the coder would cut
    centres = (priors[:, :2] + priors[:, 2:]) / 2
    sides = priors[:, 2:] - priors[:, :2]
    centres = centres + values[..., :2] * sides
    sides = sides * values[..., 2:].exp()
    return torch.cat([centres - sides / 2, centres + sides / 2], -1)


# ------------------------------------------------- the authors' own algorithm


class Authors:
    """What jbwang1997/CrossKD computes, level by level, in float64."""

    def __init__(self, pair, name, layer):
        _, *predictors = HEADS[name]
        self.pair, self.name, self.layer = pair, name, layer
        self.predictors = dict(zip(TOWERS, predictors, strict=True))
        self.student, self.teacher = (
            copy.deepcopy(m).double() for m in (pair.student, pair.teacher)
        )
        self.teacher.requires_grad_(False)
        features = [
            m.extract_feat(pair.inputs.double())
            for m in (self.student, self.teacher)
        ]
        pairs = zip(*features, strict=True)
        levels = [self.level(*pair) for pair in enumerate(pairs)]
        self.own, self.crossed = zip(*levels, strict=True)

    def level(self, number, features):
        """The teacher's and the cross-head predictions of one level."""
        own, crossed = {}, {}
        for tower in TOWERS:
            held_s, _ = self.through(self.student, tower, features[0])
            held_t, last = self.through(self.teacher, tower, features[1])
            own |= self.predicted(tower, last, number)
            feature = aligned_by_the_authors(held_s, held_t)
            if self.layer:
                feature = feature.relu()
            for conv in getattr(self.teacher.bbox_head, tower)[self.layer :]:
                feature = before_activation([conv], feature, 1).relu()
            crossed |= self.predicted(tower, feature, number)
        return own, crossed

    def through(self, model, tower, feature):
        """What is held after layer i, and the last layer's output."""
        held = feature
        for i, conv in enumerate(getattr(model.bbox_head, tower), 1):
            feature = before_activation([conv], feature, 1)
            if i == self.layer:
                held = feature
            # In place, as in a ConvModule: what is held changes as well.
            feature = feature.relu_()
        return held, feature

    def predicted(self, tower, feature, number):
        head = self.teacher.bbox_head
        name = self.predictors[tower]
        found = {tower: getattr(head, name)(feature)}
        if tower == 'reg_convs':
            if hasattr(head, 'scales'):
                found[tower] = found[tower] * head.scales[number].scale
            if self.name == 'atss':
                found['quality'] = head.atss_centerness(feature)
        return found

    def losses(self):
        """The sums over the levels of the official losses."""
        labels, weights, number = seen_targets(self.pair)
        sizes = [self.rows(level)['cls_convs'].shape[1] for level in self.own]
        # The boxes' weights have their own normaliser where there are bins.
        total = dict(cls=0.0, box=0.0, quality=0.0)
        sum_of_u = 0.0
        for own, crossed, anchors, label, weight in zip(
            map(self.rows, self.own),
            map(self.rows, self.crossed),
            self.anchors(),
            labels.split(sizes, 1),
            weights.split(sizes, 1),
            strict=True,
        ):
            z, p = crossed['cls_convs'], own['cls_convs'].sigmoid()
            s = z.sigmoid()
            entropy = -p * s.log() - (1 - p) * (1 - s).log()
            focal = (s - p).abs() * entropy * weight[..., None]
            total['cls'] += focal.sum() / number
            u = p.amax(-1) * (weight != 0)
            sum_of_u += u.sum()
            r, r_t = crossed['reg_convs'], own['reg_convs']
            if self.name == 'gfl':
                q, q_t = (
                    x.unflatten(-1, (4, 17)).softmax(-1) for x in (r, r_t)
                )
                divergence = (q_t * (q_t / q).log()).sum((-2, -1))
                total['box'] += (u * divergence).sum() / 4
            else:
                boxes = [self.decoded(anchors, x) for x in (r, r_t)]
                total['box'] += (u * (1 - gious(*boxes))).sum() / number
            if self.name == 'atss':
                p, s = (x['quality'][..., 0].sigmoid() for x in (own, crossed))
                entropy = -p * s.log() - (1 - p) * (1 - s).log()
                positive = (label >= 0) & (label < 3)
                total['quality'] += entropy[positive].sum() / number
        if self.name == 'gfl':
            total['box'] = 4 * total['box'] / sum_of_u
        return {k: v for k, v in total.items() if torch.is_tensor(v)}

    def rows(self, level):
        """Maps as (B, priors, numbers of a prior)."""
        classes = self.teacher.bbox_head.num_classes
        priors = level['cls_convs'].shape[1] // classes
        return {
            k: v.permute(0, 2, 3, 1)
            .flatten(1)
            .unflatten(
                1, (v.shape[2] * v.shape[3] * priors, v.shape[1] // priors)
            )
            for k, v in level.items()
        }

    def anchors(self):
        sizes = [level['cls_convs'].shape[-2:] for level in self.own]
        generator = self.student.bbox_head.prior_generator
        return generator.grid_priors(sizes, dtype=torch.float64, device='cpu')

    def decoded(self, anchors, values):
        head = self.student.bbox_head
        values = values * torch.tensor(head.bbox_coder.stds)
        assert values[..., 2:].abs().max() < 4  # the coder would cut
        centres = (anchors[:, :2] + anchors[:, 2:]) / 2
        sides = anchors[:, 2:] - anchors[:, :2]
        centres = centres + values[..., :2] * sides
        sides = sides * values[..., 2:].exp()
        return torch.cat([centres - sides / 2, centres + sides / 2], -1)


def aligned_by_the_authors(ours, theirs):
    """Over the batch, with the sample's deviation; epsilon on one side."""
    count, channels = len(ours), ours.shape[1]
    s, t = (x.transpose(0, 1).reshape(channels, -1) for x in (ours, theirs))
    s = (s - s.mean(1, keepdim=True)) / (s.std(1, keepdim=True) + 1e-6)
    s = s * t.std(1, keepdim=True) + t.mean(1, keepdim=True)
    return s.reshape(channels, count, *ours.shape[2:]).transpose(0, 1)


def gious(a, b):
    """GIoU of boxes (..., 4), pair by pair."""
    inter = (
        torch.minimum(a[..., 2:], b[..., 2:])
        - torch.maximum(a[..., :2], b[..., :2])
    ).clamp(min=0)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(
        a[..., :2], b[..., :2]
    )
    inter, hull = inter.prod(-1), hull.prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
    union = sum(areas) - inter
    return inter / union - (hull - union) / hull


class TestOfficialCode:
    """Values and gradients of jbwang1997/CrossKD on equal networks."""

    @pytest.mark.parametrize('name', ['gfl', 'retinanet', 'atss'])
    @pytest.mark.parametrize(
        ('layer', 'batch'),
        [
            (0, dict(objects=(1, 5))),
            (2, dict(objects=(1, 5))),
            (1, dict(objects=(0, 3))),  # N counts one for the empty image
            # Both are padded to 128x128, the stock loss ends at 96 and 128.
            (1, dict(sizes=((90, 101), (120, 70)))),
        ],
    )
    def test_values_and_gradients(self, name, layer, batch):
        options = dict(quality_weight=1.0) if name == 'atss' else {}
        pair = LogitPair('CrossKD', HEADS[name][0], layer=layer, **options)
        losses = pair.losses(**batch)
        authors = Authors(pair, name, layer)
        expected = authors.losses()
        assert losses.keys() == expected.keys()
        for part, loss in losses.items():
            assert loss.item() == pytest.approx(
                expected[part].item(), rel=1e-4
            ), part
            assert loss.item() > 1e-4
        sum(losses.values()).backward()
        sum(expected.values()).backward()
        theirs = dict(authors.student.named_parameters())
        grads = {k: p.grad for k, p in theirs.items() if p.grad is not None}
        largest = max(grad.abs().max().item() for grad in grads.values())
        assert len(grads) > 20
        for key, parameter in pair.student.named_parameters():
            if key not in grads:
                assert parameter.grad is None
                continue
            scale = grads[key].abs().max().item()
            torch.testing.assert_close(
                parameter.grad.double(),
                grads[key],
                rtol=1e-3,
                atol=1e-3 * scale + 1e-5 * largest,
            )

    def test_alignment_by_hand(self):
        """Over both images: mean 2, unbiased deviation 2; 20 and 10."""
        samples = tiny.raw_batch(sizes=((1, 2),) * 2, objects=0)[
            'data_samples'
        ]
        ours = torch.tensor([0.0, 2.0, 2.0, 4.0]).view(2, 1, 1, 2)
        theirs = torch.tensor([20.0, 30.0, 10.0, 20.0]).view(2, 1, 1, 2)
        result = align_moments(ours, theirs, 'batch', samples)
        expected = torch.tensor([10.0, 20.0, 20.0, 30.0]).view(2, 1, 1, 2)
        torch.testing.assert_close(result, expected)

    def test_a_channel_that_is_constant(self):
        """The epsilon is the student's alone."""
        samples = tiny.raw_batch(sizes=((1, 2),), objects=0)['data_samples']
        theirs = torch.tensor([[[[1.0, 3.0]]]])
        for ours in (torch.zeros(1, 1, 1, 2), torch.full((1, 1, 1, 2), 7.0)):
            ours.requires_grad_()
            result = align_moments(ours, theirs, 'batch', samples)
            torch.testing.assert_close(result, torch.full_like(ours, 2.0))
            result[0, 0, 0, 0].backward()
            assert ours.grad.isfinite().all()


@pytest.mark.parametrize('how', ['batch', 'image', None])
def test_features_after_another_activation_are_not_activated_twice(how):
    """Equal networks have nothing to learn, whatever the activation."""
    pair = LogitPair('CrossKD', tiny.gfl(), layer=1, align=how)
    for model in (pair.student, pair.teacher):
        for tower in TOWERS:
            for conv in getattr(model.bbox_head, tower):
                conv.activate = torch.nn.SiLU(inplace=True)
    pair.equal()
    for loss in pair.losses().values():
        assert loss.item() == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize('name', HEADS)
@pytest.mark.parametrize('layer', [1, 2])
def test_the_cross_head_losses(name, layer):
    config, *names = HEADS[name]
    pair = LogitPair('CrossKD', config, layer=layer, **BEFORE)
    losses = pair.losses()
    expected = reference(pair, names, layer)
    assert min(expected.values()) > 1e-4
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        expected, rel=1e-3
    )


@pytest.mark.parametrize(
    ('student', 'teacher'), [('fcos', 'atss'), ('atss', 'fcos')]
)
def test_points_and_anchors(student, teacher):
    """Priors whose centres are half a stride apart."""
    config, *names = HEADS[teacher]
    learner = copy.deepcopy(HEADS[student][0])
    learner.data_preprocessor = config.data_preprocessor
    pair = LogitPair('CrossKD', learner, config, layer=1, **BEFORE)
    losses = pair.losses()
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        reference(pair, names, 1), rel=1e-3
    )


@pytest.mark.parametrize('how', ['image', 'batch', None])
@pytest.mark.parametrize('layer', [0, 1])
def test_alignments(how, layer):
    """From the neck's maps on there is no activation."""
    config, *names = HEADS['gfl']
    pair = LogitPair(
        'CrossKD', config, layer=layer, **BEFORE | dict(align=how)
    )
    losses = pair.losses()
    expected = reference(pair, names, layer, how)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        expected, rel=1e-3
    )


def test_other_widths_and_classes():
    """A wider teacher that knows two of the classes, and two more."""
    wide = tiny.gfl(
        neck__out_channels=32,
        bbox_head__in_channels=32,
        bbox_head__feat_channels=64,
        bbox_head__num_classes=4,
    )
    config, *names = HEADS['gfl']
    pair = LogitPair(
        'CrossKD',
        config,
        wide,
        layer=1,
        teacher_classes=('sky', 'cow', 'cat', 'sea'),
        **BEFORE,
    )
    assert pair.method.adapters['cls_convs'].weight.shape == (64, 32, 1, 1)
    losses = pair.losses()
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        reference(pair, names, 1, columns=(1, 2)), rel=1e-3
    )
    sum(losses.values()).backward()
    assert all(p.grad.abs().sum() > 0 for p in pair.method.parameters())


WIDE = dict(
    neck__out_channels=32,
    bbox_head__in_channels=32,
    bbox_head__feat_channels=64,
)


@pytest.mark.parametrize('layer', [0, 1])
@pytest.mark.parametrize(
    ('options', 'kept'),
    [
        (dict(cls_weight=0), ['box']),
        (dict(box_weight=0), ['cls']),
        (dict(cls_weight=0, box_weight=0), []),
    ],
)
def test_a_tower_of_weight_0_is_left_out(options, kept, layer):
    """Its adapter would get no gradient, for which DDP waits."""
    pair = LogitPair(
        'CrossKD', tiny.gfl(), tiny.gfl(**WIDE), layer=layer, **options
    )
    towers = {'box': 'reg_convs', 'cls': 'cls_convs'}
    assert list(pair.method.adapters) == [towers[name] for name in kept]
    runs = dict.fromkeys(towers, 0)
    for name, tower in towers.items():
        last = getattr(pair.teacher.bbox_head, tower)[-1]
        handle = last.register_forward_hook(
            lambda *_, name=name: runs.update({name: runs[name] + 1})
        )
        losses = pair.losses()
        handle.remove()
        assert runs[name] == 5 * (1 + (name in kept))
    assert list(losses) == kept
    full = LogitPair('CrossKD', tiny.gfl(), tiny.gfl(**WIDE), layer=layer)
    for name in kept:
        adapter = pair.method.adapters[towers[name]]
        adapter.load_state_dict(
            full.method.adapters[towers[name]].state_dict()
        )
        assert pair.losses()[name].item() == pytest.approx(
            full.losses()[name].item(), rel=1e-5
        )
        pair.losses()[name].backward()
    assert all(p.grad.abs().sum() > 0 for p in pair.method.parameters())


@pytest.mark.parametrize(
    ('config', 'tower'),
    [
        (tiny.fcos, 'cls_convs'),
        (
            lambda **wide: tiny.fcos(
                bbox_head__centerness_on_reg=True, **wide
            ),
            'reg_convs',
        ),
        (tiny_dense.atss, 'reg_convs'),
        (tiny_dense.paa, 'reg_convs'),
    ],
)
def test_the_quality_alone(config, tower):
    """Reads one tower, which depends on the head."""
    options = dict(layer=1, cls_weight=0, box_weight=0, quality_weight=2.0)
    pair = LogitPair('CrossKD', config(), config(**WIDE), **options)
    assert list(pair.method.adapters) == [tower]
    losses = pair.losses()
    assert losses.keys() == {'quality'}
    assert losses['quality'] > 0
    losses['quality'].backward()
    assert all(p.grad.abs().sum() > 0 for p in pair.method.parameters())


def test_the_teacher_is_tapped_where_it_is_read():
    def paths(**options):
        cfg = dict(type='mmkd.CrossKD', **options)
        return set(build_checked(METHODS, cfg, 'x').teacher_paths)

    for options, ends in (
        ({}, ('',)),
        (dict(post_activation=False), ('.norm', '.conv')),
    ):
        taps = functools.partial(paths, **options)
        parts = {
            tower: {f'bbox_head.{tower}.2{end}' for end in ends}
            for tower in ('cls_convs', 'reg_convs')
        }
        assert taps() == parts['cls_convs'] | parts['reg_convs']
        assert taps(cls_weight=0) == parts['reg_convs']
        assert taps(box_weight=0) == parts['cls_convs']
        assert taps(box_weight=0, quality_weight=1) == taps()


def test_weights_and_quality():
    config, *names = HEADS['atss']
    pair = LogitPair(
        'CrossKD',
        config,
        layer=1,
        cls_weight=2.0,
        box_weight=3.0,
        quality_weight=5.0,
        **BEFORE,
    )
    losses = pair.losses()
    expected = reference(pair, names, 1)
    assert losses['cls'].item() == pytest.approx(2 * expected['cls'], rel=1e-3)
    assert losses['box'].item() == pytest.approx(3 * expected['box'], rel=1e-3)
    cross, own = cross_heads(pair, ('atss_cls', 'atss_centerness'), 1, 'image')
    z, z_t = flat(cross, 1, 1)[..., 0], flat(own, 1, 1)[..., 0]
    labels, _, _ = seen_targets(pair)
    total = 0.0
    positive = ((labels >= 0) & (labels < 3)).nonzero().tolist()
    for image, prior in positive:
        p, q = (x[image, prior].sigmoid().item() for x in (z, z_t))
        total -= q * math.log(p) + (1 - q) * math.log(1 - p)
    assert losses['quality'].item() == pytest.approx(
        5 * total / len(positive), rel=1e-3
    )


def test_gradients_reach_the_student_alone():
    """Its tower up to layer i, but neither its predictors nor the teacher."""
    pair = LogitPair('CrossKD', tiny.gfl(), layer=1)
    sum(pair.losses().values()).backward()
    head = pair.student.bbox_head
    for tower in (head.cls_convs, head.reg_convs):
        assert tower[0].conv.weight.grad.abs().sum() > 0
        assert tower[1].conv.weight.grad is None
    assert head.gfl_cls.weight.grad is None
    assert pair.student.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pair.teacher.parameters())


@pytest.mark.parametrize('name', HEADS)
def test_an_equal_student_has_nothing_to_learn(name):
    pair = LogitPair('CrossKD', HEADS[name][0], layer=2)
    pair.equal()
    for loss in pair.losses().values():
        assert loss.item() == pytest.approx(0, abs=1e-4)


def test_the_teachers_head_is_left_as_it_was():
    pair = LogitPair('CrossKD', tiny.gfl(), layer=1)
    head = pair.teacher.bbox_head
    before = dict(head._modules), copy.deepcopy(head.state_dict())
    pair.losses()
    assert head._modules == before[0]
    assert toy.same(dict(head.state_dict()), dict(before[1]))


def test_a_cut_head_shares_its_layers():
    head = tiny.in_eval(tiny.build(tiny.gfl())).bbox_head
    maps = [torch.randn(1, 16, n, n) for n in (8, 4, 2, 2, 2)]
    entering = {
        tower: [getattr(head, tower)[0](level) for level in maps]
        for tower in ('cls_convs', 'reg_convs')
    }
    cut = from_layer(head, 1, entering)
    assert len(head.cls_convs) == 2
    assert cut.gfl_cls is head.gfl_cls
    for found, expected in zip(cut(maps), head(maps), strict=True):
        assert toy.same(list(found), list(expected))


def test_what_a_layers_activation_does_in_place_is_not_seen():
    """The tap behind a norm gives what enters the activation."""
    model = tiny.build(tiny.gfl())
    outputs = blank_pass(
        model, ['bbox_head.cls_convs.0.norm'], torch.device('cpu')
    )
    assert outputs.features('bbox_head.cls_convs.0.norm')[0].min() < 0


def test_alignment_by_hand():
    """(1, 3) has mean 2 and deviation 1; (10, 30) has 20 and 10."""
    sample = tiny.raw_batch(sizes=((1, 2),), objects=0)['data_samples']
    ours = torch.tensor([[[[1.0, 3.0]]]])
    theirs = torch.tensor([[[[30.0, 10.0]]]])
    for how in ('image', 'batch'):
        result = align_moments(ours, theirs, how, sample)
        torch.testing.assert_close(result, torch.tensor([[[[10.0, 30.0]]]]))
    assert torch.equal(align_moments(ours, theirs, None, sample), ours)


def test_a_map_of_one_position_has_a_finite_gradient():
    sample = tiny.raw_batch(sizes=((8, 8),), objects=0)['data_samples']
    ours = torch.randn(1, 3, 1, 1, requires_grad=True)
    theirs = torch.randn(1, 3, 1, 1)
    result = align_moments(ours, theirs, 'image', sample)
    torch.testing.assert_close(result, theirs)
    result.sum().backward()
    assert ours.grad.isfinite().all()


@pytest.mark.parametrize('name', ['gfl', 'retinanet'])
def test_images_without_objects(name):
    losses = LogitPair('CrossKD', HEADS[name][0], layer=1).losses(
        objects=(0, 0)
    )
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


def test_zero_weight_is_the_stock_loss():
    pair = LogitPair('CrossKD', tiny.gfl(), layer=1, loss_weight=0.0)
    assert toy.same(pair.step(), pair.stock_losses())


def test_the_stock_losses_are_untouched():
    pair = LogitPair('CrossKD', tiny.gfl(), layer=1)
    losses = pair.step()
    stock = pair.stock_losses()
    assert toy.same({name: losses[name] for name in stock}, stock)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(layer=-1), r'CrossKD.layer must be at least 0, got -1'),
        (dict(layer=0.5), r'CrossKD.layer must be a whole number, got 0.5'),
        (dict(layer='1'), r"CrossKD.layer must be a number, got '1'"),
        (dict(beta=math.inf), r'CrossKD.beta must be finite, got inf'),
        (dict(beta=-1), r'CrossKD.beta must be at least 0, got -1'),
        (dict(cls_weight=-1), r'CrossKD.cls_weight must be at least 0'),
        (dict(box_weight=-1), r'CrossKD.box_weight must be at least 0'),
        (dict(quality_weight=-1), r'CrossKD.quality_weight must be at le'),
        (dict(align='level'), r"align must be one of .*, got 'level'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build_checked(METHODS, dict(type='mmkd.CrossKD', **options), 'x')


@pytest.mark.parametrize(
    ('student', 'teacher', 'options', 'message'),
    [
        (
            tiny.gfl(),
            tiny.gfl(),
            dict(layer=3),
            r"layer=3; the student's GFLHead has 2 layers in its .*_convs: s",
        ),
        (
            tiny_dense.tood(),
            tiny_dense.tood(),
            dict(layer=1),
            r"the student's TOODHead has no reg_convs of ConvModules that",
        ),
        (
            tiny.gfl(),
            tiny.gfl(),
            dict(layer=1, quality_weight=1),
            r"IoU branch; the teacher's GFLHead has none. Set it to 0",
        ),
        (
            tiny.retinanet(),
            tiny.gfl(),
            dict(layer=1),
            r'CrossKD: the priors of the two dense heads do not correspond',
        ),
        (tiny.faster_rcnn(), tiny.gfl(), {}, r'is FasterRCNN: it has no den'),
    ],
)
def test_pairs_that_do_not_fit(student, teacher, options, message):
    with pytest.raises(ConfigError, match=message):
        LogitPair('CrossKD', student, teacher, **options)
