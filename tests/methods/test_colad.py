"""CoLAD on real PAA detectors, against plain loops and scikit-learn."""

import copy

import pytest
import torch
from mmengine.config import Config

from mmkd.core.distiller import build_distiller
from mmkd.detectors.assignment.colearning import std_mean
from mmkd.detectors.record import intercepted
from mmkd.errors import ConfigError
from mmkd.methods import CoLAD
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import paa_authors as authors
from tests.helpers import tiny_dense as dense
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy

WIDE = dict(
    backbone=dict(tiny.BACKBONE, base_channels=16),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
)


def wide():
    return tiny.merged(dense.paa(), **WIDE)


class Networks:
    """A student, a wider peer, and CoLAD between them."""

    def __init__(self, student=None, peer=None, peers=None, **options):
        self.student = dense.build(student or dense.paa(), seed=1)
        peers = peers or {'big': dict(config=dict(model=peer or wide()))}
        self.distiller = build_distiller(
            dict(
                peers=peers,
                methods=dict(
                    co=dict(type='mmkd.CoLearningAssignment', **options)
                ),
            ),
            self.student,
            tiny.CLASSES,
        )
        self.peers = {
            name: p.model for name, p in self.distiller.peers.items()
        }
        for seed, (name, model) in enumerate(self.peers.items(), 2):
            config = peers[name]['config']['model']
            model.load_state_dict(dense.build(config, seed=seed).state_dict())

    @property
    def all(self):
        return {'student': self.student, **self.peers}

    def batch(self, **options):
        options = {'sizes': ((160, 192), (160, 192)), 'objects': 3, **options}
        return tiny.batch_for(self.student, **options)

    def losses(self, batch):
        self.distiller.attach()
        try:
            return tiny.seeded_loss(self.student, *batch)
        finally:
            self.distiller.detach()


def values(losses, prefix=''):
    return {
        name.removeprefix(prefix): value.item()
        for name, value in losses.items()
        if name.startswith(prefix)
    }


def shared_positives(networks, batch):
    """CoLAD by loops: each image's positive anchors, and who decided."""
    calls = [authors.stock_calls(m, batch) for m in networks.all.values()]
    positives, decided = authors.assigned(calls)
    return positives, [count / sum(decided) for count in decided]


def trained_on(model, compute):
    """The positive anchors that the classification loss has seen."""
    seen = []
    with intercepted(
        model.bbox_head.loss_cls,
        'forward',
        lambda _, scores, labels, *args, **kwargs: seen.append(labels),
    ):
        result = compute()
    return result, (seen[-1] < 3).view(2, -1)


@pytest.mark.parametrize('objects', [3, [0, 4], [1, 6]])
def test_assignment_of_plain_loops(objects):
    networks = Networks()
    batch = networks.batch(objects=objects)
    expected, shares = shared_positives(networks, batch)
    for model in networks.all.values():
        losses, positive = trained_on(model, lambda: networks.losses(batch))
        found = [set(row.nonzero().flatten().tolist()) for row in positive]
        assert found == expected
        assert len(found[1]) > 3
    got = [losses['co.share_student'].item(), losses['co.share_big'].item()]
    assert got == pytest.approx(shares)
    assert 0 < got[0] < 1


def test_each_network_trains_by_its_own_predictions():
    """The losses are the stock ones on the shared positives."""
    networks = Networks(box_weighting='none')
    batch = networks.batch()
    losses = networks.losses(batch)
    assert set(values(losses, 'big.')) == {'loss_cls', 'loss_bbox', 'loss_iou'}
    sum(v for k, v in losses.items() if 'loss' in k).backward()
    for model in networks.all.values():
        assert all(
            p.grad is not None and p.grad.isfinite().all()
            for p in model.parameters()
        )
    # No gradient from one network's losses to another.
    losses = networks.losses(batch)
    theirs = [v for k, v in losses.items() if k.startswith('big.')]
    grads = torch.autograd.grad(
        sum(theirs),
        list(networks.student.backbone.parameters()),
        allow_unused=True,
    )
    assert all(g is None for g in grads)


def test_twins_train_as_stock():
    networks = Networks(peer=dense.paa())
    twin = networks.peers['big']
    twin.load_state_dict(
        {
            k: v
            for k, v in networks.student.state_dict().items()
            if not k.startswith('distillation')
        }
    )
    batch = networks.batch()
    stock = values(tiny.seeded_loss(networks.student, *batch))
    losses = networks.losses(batch)
    assert values(losses, 'big.') == pytest.approx(stock, rel=1e-6)
    assert {k: losses[k].item() for k in stock} == pytest.approx(
        stock, rel=1e-6
    )


def test_three_networks():
    small = dense.paa()
    networks = Networks(
        peers={
            'big': dict(config=dict(model=wide())),
            'second': dict(config=dict(model=small)),
        }
    )
    batch = networks.batch()
    expected, shares = shared_positives(networks, batch)
    losses, positive = trained_on(
        networks.peers['second'], lambda: networks.losses(batch)
    )
    found = [set(row.nonzero().flatten().tolist()) for row in positive]
    assert found == expected
    names = ['student', 'big', 'second']
    assert [losses[f'co.share_{n}'].item() for n in names] == pytest.approx(
        shares
    )


def test_switched_off_each_trains_alone():
    networks = Networks(loss_weight=0)
    batch = networks.batch()
    alone = {
        name: values(tiny.seeded_loss(model, *batch))
        for name, model in networks.all.items()
    }
    losses = networks.losses(batch)
    assert values(losses, 'big.') == alone['big']
    assert {k: losses[k].item() for k in alone['student']} == alone['student']
    assert not any(k.startswith('co.') for k in losses)


@pytest.mark.parametrize('indicator', ['std_mean', 'fisher'])
@pytest.mark.parametrize('objects', [0, [0, 1], 1])
def test_missing_objects(indicator, objects):
    networks = Networks(indicator=indicator)
    losses = networks.losses(networks.batch(objects=objects))
    assert all(v.isfinite().all() for v in losses.values())


def test_an_object_with_one_candidate():
    for keep in (False, True):
        networks = Networks(keep_single=keep)
        inputs, samples = networks.batch(sizes=((160, 192),), objects=1)
        for model in networks.all.values():
            assigner = model.bbox_head.assigner
            assigner.pos_iou_thr = assigner.neg_iou_thr = 0.95
        head = networks.student.bbox_head
        (anchor, *_), *_ = head.prior_generator.grid_priors(
            [(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)], device='cpu'
        )
        samples[0].gt_instances.bboxes[0] = anchor
        losses = networks.losses((inputs, samples))
        assert (losses['loss_bbox'].item() > 0) == keep
        assert (losses['big.loss_bbox'].item() > 0) == keep


class TestOfficialCode:
    """Values and gradients of both networks on the shared positives."""

    @pytest.mark.parametrize('single', [False, True])
    def test_values_and_gradients(self, single):
        networks = Networks(box_weighting='none')
        batch = networks.batch(objects=[2, 4])
        if single:
            batch = authors.with_a_single_candidate(
                list(networks.all.values()), batch
            )
        calls = [authors.stock_calls(m, batch) for m in networks.all.values()]
        positives, decided = authors.assigned(calls)
        assert min(decided) > 0 or single
        owners = [int(owner) for owner in calls[0][-1][5]]
        assert (owners.count(0) == 1) == single
        losses = networks.losses(batch)
        for (name, model), each in zip(
            networks.all.items(), calls, strict=True
        ):
            prefix = '' if name == 'student' else f'{name}.'
            own = {
                k.removeprefix(prefix): v
                for k, v in losses.items()
                if k.startswith(f'{prefix}loss')
            }
            authors.assert_same_training(
                model, own, *authors.losses(model, batch, each, positives)
            )

    @pytest.mark.parametrize('name', ['colad_r50_r101.py', 'bccd/colad.py'])
    def test_the_configs_have_its_options(self, name):
        cfg = Config.fromfile(toy.ROOT / 'configs' / name)
        options = dict(cfg.distillation.methods.colad)
        method = build_checked(METHODS, options, 'colad')
        (official,) = CoLAD.official
        assert official.options == dict(
            indicator='std_mean', box_weighting='none', keep_single=False
        )
        assert method.indicator is std_mean
        assert method.box_weighting == 'none'
        assert method.keep_single is False


def test_nothing_is_left_behind():
    networks = Networks()
    heads = [m.bbox_head for m in networks.all.values()]
    before = [set(vars(head)) for head in heads]
    networks.losses(networks.batch())
    assert [set(vars(head)) for head in heads] == before


class TestPairsThatDoNotFit:
    def test_other_heads(self):
        with pytest.raises(ConfigError, match=r'fits PAA heads; the big has'):
            Networks(peer=dense.atss())

    def test_other_priors(self):
        peer = copy.deepcopy(wide())
        peer.bbox_head.anchor_generator.octave_base_scale = 4
        with pytest.raises(ConfigError, match='priors'):
            Networks(peer=peer)

    def test_without_peers(self):
        with pytest.raises(ConfigError, match=r'needs distillation\.peers'):
            build_distiller(
                dict(
                    teacher=dict(
                        config=dict(model=dense.paa()), checkpoint=None
                    ),
                    methods=dict(co=dict(type='mmkd.CoLearningAssignment')),
                ),
                dense.build(dense.paa()),
                tiny.CLASSES,
            )

    def test_bad_options(self):
        with pytest.raises(ConfigError, match='box_weighting'):
            Networks(box_weighting='giou')
        with pytest.raises(ConfigError, match='std_mean'):
            Networks(indicator='std')
