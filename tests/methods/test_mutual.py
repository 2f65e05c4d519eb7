"""Deep mutual learning of real detectors, against plain loops."""

import copy
import math
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from mmkd.data.batch import Batch
from mmkd.detectors.record import intercepted
from mmkd.errors import ConfigError
from mmkd.utils import isolated_random_state
from tests.engine.test_resume import assert_same_outcome
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import rows, seen_targets
from tests.helpers.together import Networks, wide
from tests.peers.test_peer import peer_config

DML = dict(type='mmkd.MutualLearning')
HEADS = dict(retinanet=tiny.retinanet(), fcos=tiny.fcos(), gfl=tiny.gfl())


def dml(student, peers=None, *, twins=False, **options):
    peers = peers or {'big': wide(student)}
    return Networks({'m': dict(DML, **options)}, student, peers, twins=twins)


def log_sigmoid(z):
    return min(z, 0) - math.log1p(math.exp(-abs(z)))


def bernoulli_kl(target, learner, temperature):
    """T^2 KL(target || learner) of two logits."""
    t, z = target / temperature, learner / temperature
    p = 1 / (1 + math.exp(-t))
    return temperature**2 * (
        p * (log_sigmoid(t) - log_sigmoid(z))
        + (1 - p) * (log_sigmoid(-t) - log_sigmoid(-z))
    )


def softmax_kl(target, learner, temperature):
    p, q = (np.exp(np.array(z) / temperature) for z in (target, learner))
    p, q = p / p.sum(), q / q.sum()
    return temperature**2 * float((p * np.log(p / q)).sum())


class Alone:
    """One network of several, as the helpers of pairs take it."""

    def __init__(self, model, batch):
        self.student = model
        self.inputs, self.samples = batch

    def stock_losses(self):
        return tiny.seeded_loss(self.student, self.inputs, self.samples)


def dense_reference(networks, batch, temperature):
    """Every network's sum over the others, priors and classes, by loops."""
    logits = {
        name: torch.cat(rows(model, batch[0]), 1)
        for name, model in networks.all.items()
    }
    inside = where_the_images_are(networks.student, batch)
    expected = {}
    for name, model in networks.all.items():
        _, weights, avg_factor = seen_targets(Alone(model, batch))
        total = 0.0
        for other in networks.all:
            if other == name:
                continue
            for image, prior in (weights * inside).nonzero().tolist():
                total += weights[image, prior].item() * sum(
                    bernoulli_kl(t, z, temperature)
                    for t, z in zip(
                        logits[other][image, prior].tolist(),
                        logits[name][image, prior].tolist(),
                        strict=True,
                    )
                )
        expected[name] = total / float(avg_factor) / (len(networks.all) - 1)
    return expected


def where_the_images_are(model, batch):
    """(B, N) by row and column; centres of anchors stand in the corner."""
    inputs, samples = batch
    head, found = model.bbox_head, []
    offset = 0.5 if hasattr(head, 'regress_ranges') else 0.0
    maps = head(model.extract_feat(inputs))[0]
    for sample in samples:
        height, width = sample.img_shape
        found.append([])
        for level, (step, _) in zip(
            maps, head.prior_generator.strides, strict=True
        ):
            for row in range(level.shape[2]):
                for column in range(level.shape[3]):
                    within = (row + offset) * step < height
                    within &= (column + offset) * step < width
                    found[-1] += [within] * (level.shape[1] // 3)
    return torch.tensor(found)


@pytest.mark.parametrize('name', HEADS)
def test_dense_heads_by_loops(name):
    networks = dml(HEADS[name], temperature=2.0)
    batch = networks.batch()
    losses = networks.of_method(batch)
    expected = dense_reference(networks, batch, 2.0)
    assert set(losses) == {'student', 'big'}
    for network, loss in losses.items():
        assert loss.item() == pytest.approx(expected[network], rel=1e-3)
        assert loss.item() > 0.1
    assert losses['student'].item() != pytest.approx(losses['big'].item())


def test_three_networks_average_over_two_others():
    config = tiny.gfl()
    networks = dml(config, {'big': wide(config), 'second': config})
    batch = networks.batch()
    losses = networks.of_method(batch)
    expected = dense_reference(networks, batch, 1.0)
    assert set(expected) == {'student', 'big', 'second'}
    for network, value in expected.items():
        assert losses[network].item() == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    'config', [tiny.gfl(), tiny.faster_rcnn()], ids=['gfl', 'faster-rcnn']
)
def test_only_the_learner_gets_a_gradient(config):
    networks = dml(config, {'big': wide(config), 'second': config})
    losses = networks.of_method(networks.batch())
    for name, loss in losses.items():
        assert networks.gets_gradient(loss) == {name}


@pytest.mark.parametrize(
    'config',
    [tiny.retinanet(), tiny.gfl(), tiny.faster_rcnn()],
    ids=['retinanet', 'gfl', 'faster-rcnn'],
)
def test_twins_have_nothing_to_learn(config):
    networks = dml(config, {'twin': config}, twins=True, temperature=3.0)
    for loss in networks.of_method(networks.batch()).values():
        assert loss.item() == pytest.approx(0, abs=1e-5)


def box_call(model, compute):
    """What the RoI head's loss was given: RoIs and logits by stage."""
    calls, result = [], None
    heads = model.roi_head.bbox_head
    heads = heads if isinstance(heads, torch.nn.ModuleList) else [heads]

    def record(_, *args, **kwargs):
        names = ('cls_score', 'bbox_pred', 'rois')
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        calls.append((given['rois'], given['cls_score'].detach()))

    with ExitStack() as stack:
        for head in heads:
            stack.enter_context(intercepted(head, 'loss_and_target', record))
        result = compute()
    return calls, result


@pytest.mark.parametrize('sigmoid', [False, True])
def test_two_stage_heads_on_the_rois_of_both(sigmoid):
    config = tiny.faster_rcnn(
        roi_head__bbox_head__loss_cls__use_sigmoid=sigmoid
    )
    networks = dml(config, temperature=2.0)
    batch = networks.batch()
    student, big = networks.student, networks.peers['big']
    ours, (theirs, losses) = box_call(
        student, lambda: box_call(big, lambda: networks.of_method(batch))
    )
    ((rois_s, logits_s),) = ours
    ((rois_b, logits_b),) = theirs
    assert not torch.equal(rois_s, rois_b)
    with torch.no_grad():
        b_on_s = big.roi_head._bbox_forward(big.extract_feat(batch[0]), rois_s)
        s_on_b = student.roi_head._bbox_forward(
            student.extract_feat(batch[0]), rois_b
        )
    student_rows = logits_s.tolist() + s_on_b['cls_score'].tolist()
    big_rows = b_on_s['cls_score'].tolist() + logits_b.tolist()

    def divergence(targets, learners):
        total = 0.0
        for target, learner in zip(targets, learners, strict=True):
            if sigmoid:
                total += sum(
                    bernoulli_kl(t, z, 2.0)
                    for t, z in zip(target, learner, strict=True)
                )
            else:
                total += softmax_kl(target, learner, 2.0)
        return total / len(targets)

    assert losses['student'].item() == pytest.approx(
        divergence(big_rows, student_rows), rel=1e-3
    )
    assert losses['big'].item() == pytest.approx(
        divergence(student_rows, big_rows), rel=1e-3
    )
    assert losses['student'] > 0.01


def test_a_cascade_sums_its_stages():
    config = tiny.cascade_rcnn()
    config.roi_head.stage_loss_weights = [1.0, 0.5, 0.25]
    networks = dml(config)
    losses = networks.of_method(networks.batch())
    assert set(losses) == {'student', 'big'}
    only_first = copy.deepcopy(config)
    only_first.roi_head.stage_loss_weights = [1.0, 0.0, 0.0]
    first = dml(only_first)
    less = first.of_method(first.batch())
    assert losses['student'] > less['student'] > 0


def giou(a, b):
    """Of two boxes as xyxy, in plain floats."""
    area = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    low = [max(a[0], b[0]), max(a[1], b[1])]
    high = [min(a[2], b[2]), min(a[3], b[3])]
    shared = max(high[0] - low[0], 0) * max(high[1] - low[1], 0)
    union = sum(area) - shared
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (
        max(a[3], b[3]) - min(a[1], b[1])
    )
    return shared / union - (hull - union) / hull


def decoded(model, batch, image, prior):
    """A prior's box in pixels, from its own definition."""
    head = model.bbox_head
    width = 4 * (head.reg_max + 1) if hasattr(head, 'reg_max') else 4
    levels = rows(model, batch[0], part=1, channels=width)
    maps = head(model.extract_feat(batch[0]))[0]
    sizes = [tuple(level.shape[-2:]) for level in maps]
    priors = torch.cat(head.prior_generator.grid_priors(sizes, device='cpu'))
    values = torch.cat(levels, 1)[image, prior].tolist()
    if len(values) == 4:  # RetinaNet: deltas of an anchor
        x1, y1, x2, y2 = priors[prior].tolist()
        w, h = x2 - x1, y2 - y1
        x = (x1 + x2) / 2 + values[0] * w
        y = (y1 + y2) / 2 + values[1] * h
        limit = abs(math.log(16 / 1000))
        w, h = (
            size * math.exp(max(-limit, min(limit, v)))
            for size, v in zip((w, h), values[2:], strict=True)
        )
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    stride = 8 * 2 ** next(
        k
        for k in range(len(levels))
        if prior < sum(level.shape[1] for level in levels[: k + 1])
    )
    x1, y1, x2, y2 = priors[prior].tolist()
    sides = []
    for side in range(4):
        bins = values[17 * side : 17 * (side + 1)]
        odds = [math.exp(v - max(bins)) for v in bins]
        mean = sum(k * p for k, p in enumerate(odds)) / sum(odds)
        sides.append(stride * mean)
    x, y = (x1 + x2) / 2, (y1 + y2) / 2
    return x - sides[0], y - sides[1], x + sides[2], y + sides[3]


@pytest.mark.parametrize('name', ['retinanet', 'gfl'])
def test_boxes_by_loops(name):
    networks = dml(HEADS[name], box_weight=1.5)
    batch = networks.batch()
    losses = networks.of_method(batch)
    for network, model in networks.all.items():
        labels, _, _ = seen_targets(Alone(model, batch))
        (other,) = [m for m in networks.all.values() if m is not model]
        positives = (labels < 3).nonzero().tolist()
        assert len(positives) > 4
        total = sum(
            1
            - giou(
                decoded(model, batch, *index), decoded(other, batch, *index)
            )
            for index in positives
        )
        loss = losses[f'box_{network}']
        assert loss.item() == pytest.approx(
            1.5 * total / len(positives), rel=1e-3
        )
        assert networks.gets_gradient(loss) == {network}


def test_boxes_of_fcos_and_of_twins():
    networks = dml(tiny.fcos(), box_weight=1.0)
    losses = networks.of_method(networks.batch())
    assert losses['box_student'] > 0.1
    networks = dml(tiny.fcos(), {'b': tiny.fcos()}, twins=True, box_weight=1.0)
    losses = networks.of_method(networks.batch())
    assert losses['box_student'].item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize('agnostic', [False, True])
def test_boxes_of_rois_by_loops(agnostic):
    """Of the learner's positive RoIs, whose class chooses the deltas."""
    config = tiny.faster_rcnn(roi_head__bbox_head__reg_class_agnostic=agnostic)
    networks = dml(config, box_weight=1.5)
    batch = networks.batch()
    student, big = networks.student, networks.peers['big']
    kept = []
    with intercepted(
        student.roi_head.bbox_head,
        'loss_and_target',
        lambda result, **kwargs: kept.append(kwargs),
    ):
        losses = networks.of_method(batch)
    (call,) = kept
    targets = student.roi_head.bbox_head.get_targets(
        call['sampling_results'], call['rcnn_train_cfg']
    )
    rois = call['rois']
    with torch.no_grad():
        theirs = big.roi_head._bbox_forward(big.extract_feat(batch[0]), rois)
    total, number = 0.0, 0
    for roi, label, ours, other in zip(
        rois.tolist(),
        targets[0].tolist(),
        call['bbox_pred'].tolist(),
        theirs['bbox_pred'].tolist(),
        strict=True,
    ):
        if label == 3:
            continue
        start = 0 if agnostic else 4 * label
        boxes = [
            from_deltas(roi[1:], values[start : start + 4])
            for values in (ours, other)
        ]
        total, number = total + 1 - giou(*boxes), number + 1
    assert number > 2
    loss = losses['box_student']
    assert loss.item() == pytest.approx(1.5 * total / number, rel=1e-3)
    assert networks.gets_gradient(loss) == {'student'}
    twins = dml(config, {'b': config}, twins=True, box_weight=1.0)
    twin = twins.of_method(twins.batch())['box_student']
    assert twin.item() == pytest.approx(0, abs=1e-5)


def from_deltas(box, deltas):
    """With the standard deviations of RoI heads."""
    x1, y1, x2, y2 = box
    w, h = x2 - x1, y2 - y1
    dx, dy, dw, dh = (
        d * std for d, std in zip(deltas, (0.1, 0.1, 0.2, 0.2), strict=True)
    )
    limit = abs(math.log(16 / 1000))
    dw, dh = (max(-limit, min(limit, d)) for d in (dw, dh))
    x, y = (x1 + x2) / 2 + dx * w, (y1 + y2) / 2 + dy * h
    w, h = w * math.exp(dw), h * math.exp(dh)
    return x - w / 2, y - h / 2, x + w / 2, y + h / 2


@pytest.mark.parametrize('name', ['gfl', 'faster-rcnn'])
def test_features_of_each_other(name):
    """The method's own loss of each pair, at its weight."""
    config = tiny.gfl() if name == 'gfl' else tiny.faster_rcnn()
    networks = dml(
        config,
        {'b': config, 'c': config},
        features=dict(type='mmkd.PKD', loss_weight=3.0),
    )
    batch = networks.batch(sizes=[(64, 64), (64, 64)])
    losses = networks.of_method(batch)
    maps = {
        name: [m.detach() for m in model.extract_feat(batch[0])]
        for name, model in networks.all.items()
    }
    for learner in maps:
        total = 0.0
        for target in maps.keys() - {learner}:
            for ours, theirs in zip(maps[learner], maps[target], strict=True):
                rows = [
                    each.transpose(0, 1).flatten(1).double().numpy()
                    for each in (ours, theirs)
                ]
                correlations = [
                    np.corrcoef(a, b)[0, 1]
                    for a, b in zip(*rows, strict=True)
                    if a.std() > 0 and b.std() > 0
                ]
                total += 1 - np.mean(correlations)
        loss = losses[f'features_{learner}']
        assert loss.item() == pytest.approx(3.0 * total / 2, rel=1e-3)
        assert networks.gets_gradient(loss) == {learner}


def test_features_through_adapters_of_each_pair():
    networks = dml(tiny.gfl(), features=dict(type='mmkd.CWD'))
    pairs = networks.distiller.methods['m'].features
    assert set(pairs) == {'student_from_big', 'big_from_student'}
    losses = networks.of_method(networks.batch())
    for name in ('student', 'big'):
        assert networks.gets_gradient(losses[f'features_{name}']) == {name}
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in pairs.parameters())


@pytest.mark.parametrize('objects', [0, [0, 2]])
@pytest.mark.parametrize('config', [tiny.gfl(), tiny.faster_rcnn()])
def test_images_without_objects(objects, config):
    networks = dml(config, box_weight=1.0)
    losses = networks.losses(networks.batch(objects=objects))
    sum(v for k, v in losses.items() if k.startswith('m.')).backward()
    assert all(v.isfinite() for k, v in losses.items() if k.startswith('m.'))


@pytest.mark.parametrize('name', ['gfl', 'faster-rcnn'])
def test_zero_weight_is_each_network_alone(name):
    config = tiny.gfl() if name == 'gfl' else tiny.faster_rcnn()
    networks = dml(config, loss_weight=0)
    batch = networks.batch()
    losses = networks.losses(batch)
    alone = tiny.seeded_loss(networks.student, *batch)
    assert toy.same({k: losses[k] for k in alone}, alone)
    peer = networks.distiller.peers['big']
    with isolated_random_state():
        theirs = peer.loss(Batch(batch[0], copy.deepcopy(batch[1])))
    assert toy.same({k: losses[f'big.{k}'] for k in theirs}, theirs)
    assert len(losses) == len(alone) + len(theirs)


def test_under_half_precision():
    networks = dml(tiny.gfl())
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = networks.of_method(networks.batch())
    assert all(v.dtype == torch.float32 for v in losses.values())
    assert all(v.isfinite() and v > 0 for v in losses.values())


class TestNetworksThatDoNotFit:
    def test_other_strides(self):
        peer = copy.deepcopy(tiny.gfl())
        peer.bbox_head.anchor_generator.strides = [4, 8, 16, 32, 64]
        with pytest.raises(
            ConfigError, match=r'"student" and "big" .*priors .*strides'
        ):
            dml(tiny.gfl(), {'big': peer})

    def test_other_kinds(self):
        with pytest.raises(ConfigError, match='With "big" as the teacher'):
            dml(tiny.gfl(), {'big': tiny.faster_rcnn()})

    def test_other_classes(self):
        peer = tiny.gfl(bbox_head__num_classes=5)
        with pytest.raises(
            ConfigError, match=r'num_classes: expected 3.* got 5'
        ):
            dml(tiny.gfl(), {'big': peer})

    def test_classes_in_another_order(self, tmp_path):
        cfg = mutual_run(tmp_path)
        names = toy.stock_classes()
        cfg.distillation.peers.big.config.test_dataloader.dataset.metainfo = (
            dict(classes=names[::-1])
        )
        with pytest.raises(
            ConfigError, match=r'peers\.big: its config names the classes too'
        ):
            toy.train(cfg)

    def test_the_name_of_the_student(self):
        with pytest.raises(ConfigError, match='"student" is the name of'):
            dml(tiny.gfl(), {'student': tiny.gfl()})

    def test_boxes_of_other_heads(self):
        with pytest.raises(ConfigError, match='"big" ATSSHead'):
            dml(tiny.gfl(), {'big': tiny_dense.atss()}, box_weight=1.0)
        config = tiny.fcos()
        other = tiny.fcos(bbox_head__norm_on_bbox=True)
        with pytest.raises(ConfigError, match='norm_on_bbox is False in the'):
            dml(config, {'big': other}, box_weight=1.0)

    @pytest.mark.parametrize(
        'features', [dict(type='mmkd.KD'), dict(type='mmkd.FeatureHint')]
    )
    def test_features_by_other_methods(self, features):
        with pytest.raises(ConfigError, match='features takes a method on'):
            dml(tiny.gfl(), features=features)

    @pytest.mark.parametrize('name', ['ensemble', 'idle', 'distillation'])
    def test_names_of_other_losses_and_metrics(self, name):
        with pytest.raises(ConfigError, match=f'"{name}" cannot be a name'):
            dml(tiny.gfl(), {name: tiny.gfl()})

    def test_bad_options(self):
        with pytest.raises(ConfigError, match='temperature must be above 0'):
            dml(tiny.gfl(), temperature=0)
        with pytest.raises(ConfigError, match='box_weight must be at least'):
            dml(tiny.gfl(), box_weight=-1)


# ------------------------------------------------------------------ real runs


def mutual_run(work_dir, base=toy.RETINANET, method=DML, **options):
    cfg = toy.plain(work_dir, base, images=4, **options)
    cfg.runner_type = toy.RUNNER
    if base == toy.RETINANET:  # whose first scores are nearly all equal
        cfg.model.bbox_head.init_cfg = dict(
            type='Normal', layer='Conv2d', std=0.1
        )
    cfg.distillation = dict(
        peers=dict(big=dict(config=peer_config(cfg))), methods=dict(m=method)
    )
    return cfg


def trained_and_resumed(cfg, tmp_path):
    """A run of two epochs, and one that was interrupted after the first."""
    record = toy.Record()
    whole = copy.deepcopy(cfg)
    whole.work_dir = str(tmp_path / 'whole')
    whole.train_cfg.max_epochs = 2
    toy.train(whole, record)
    for epochs, resume in ((1, False), (2, True)):
        part = copy.deepcopy(cfg)
        part.work_dir, part.resume = str(tmp_path / 'parts'), resume
        part.train_cfg.max_epochs = epochs
        toy.train(part, toy.Record())
    assert_same_outcome(
        tmp_path / 'whole' / 'epoch_2.pth', tmp_path / 'parts' / 'epoch_2.pth'
    )
    return record


def test_a_run_resumes_exactly(tmp_path):
    record = trained_and_resumed(mutual_run(tmp_path), tmp_path)
    for losses in record.losses:
        assert losses['m.loss_student'] > 0
        assert losses['m.loss_big'] > 0
    assert 'big/coco/bbox_mAP' in record.metrics[-1]


def test_a_two_stage_run_resumes_exactly(tmp_path):
    cfg = mutual_run(tmp_path, toy.FASTER_RCNN)
    record = trained_and_resumed(cfg, tmp_path)
    assert all(losses['m.loss_student'] > 0 for losses in record.losses)
