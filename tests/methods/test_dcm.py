"""Dense cross-layer mutual distillation of real detectors, by loops."""

import copy

import pytest
import torch

from mmkd.data.batch import Batch
from mmkd.detectors.auxiliary import StagePyramid, fresh_copy
from mmkd.detectors.facts import read_facts
from mmkd.errors import ConfigError, TapError
from mmkd.utils import isolated_random_state
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy
from tests.helpers.logit_pair import seen_targets, spread
from tests.helpers.together import Networks, wide
from tests.methods.test_mutual import Alone as Seen
from tests.methods.test_mutual import (
    bernoulli_kl,
    mutual_run,
    trained_and_resumed,
    where_the_images_are,
)

DCM = dict(type='mmkd.DCM')


def dcm(config, peer=None, *, twins=False, **options):
    peers = {'big': peer or wide(config)}
    networks = Networks(
        {'m': dict(DCM, **options)}, config, peers, twins=twins
    )
    # Random heads: freshly initialised ones say nearly the same everywhere.
    for seed, heads in enumerate(auxiliary(networks).values(), 5):
        for number, head in enumerate(heads):
            spread(head, 10 * seed + number)
    return networks


def auxiliary(networks):
    return dict(networks.distiller.methods['m'].auxiliary.items())


def flat(maps, channels=3):
    """Levels (B, A * C, H, W) as float64 rows (B, N, C)."""
    rows = [
        torch.stack(
            [image.permute(1, 2, 0).reshape(-1, channels) for image in level]
        )
        for level in maps
    ]
    return torch.cat(rows, 1).double()


def logits_of_all_heads(networks, batch, stages=(1, 2)):
    """Three heads of each network, computed anew: (B, N, 3) each."""
    found = {}
    with torch.no_grad():
        for name, model in networks.all.items():
            outputs = model.backbone(batch[0])
            maps = model.neck(outputs)
            sizes = [level.shape[-2:] for level in maps]
            heads = auxiliary(networks)[name]
            logits = []
            for head, stage in zip(heads, stages, strict=True):
                levels = head.pyramid(outputs[stage], sizes)
                logits.append(flat(head.bbox_head(levels)[0]))
            found[name] = [*logits, flat(model.bbox_head(maps)[0])]
    return found


def divergence(targets, learners, weights, avg_factor, temperature=1.0):
    total = 0.0
    for image, prior in weights.nonzero().tolist():
        total += weights[image, prior].item() * sum(
            bernoulli_kl(t, z, temperature)
            for t, z in zip(
                targets[image, prior].tolist(),
                learners[image, prior].tolist(),
                strict=True,
            )
        )
    return total / float(avg_factor)


@pytest.mark.parametrize(
    ('config', 'temperature'), [(tiny.gfl(), 1.0), (tiny.fcos(), 2.0)]
)
def test_eighteen_terms_by_loops(config, temperature):
    """The assignment of these heads is the same at every depth."""
    networks = dcm(config, temperature=temperature)
    batch = networks.batch()
    losses = networks.of_method(batch)
    logits = logits_of_all_heads(networks, batch)
    inside = where_the_images_are(networks.student, batch)
    terms = []
    for name, other in (('student', 'big'), ('big', 'student')):
        model = networks.all[name]
        _, weights, avg_factor = seen_targets(Seen(model, batch))
        each = [
            divergence(b, a, weights * inside, avg_factor, temperature)
            for a in logits[name]
            for b in logits[other]
        ]
        terms += each
        assert losses[f'kl_{name}'].item() == pytest.approx(
            sum(each), rel=1e-3
        )
    assert len(terms) == 18
    assert min(terms) > 0


def test_the_auxiliary_heads_have_the_stock_task():
    networks = dcm(tiny.gfl())
    batch = networks.batch()
    losses = networks.of_method(batch)
    for name, model in networks.all.items():
        outputs = model.backbone(batch[0])
        sizes = [level.shape[-2:] for level in model.neck(outputs)]
        for number, head in enumerate(auxiliary(networks)[name]):
            levels = head.pyramid(outputs[number + 1], sizes)
            own = head.bbox_head.loss(levels, copy.deepcopy(batch[1]))
            expected = sum(sum(v) for v in own.values())
            assert losses[f'aux{number + 1}_{name}'].item() == pytest.approx(
                expected.item(), rel=1e-5
            )


def test_whose_gradient_it_is():
    """A network's terms train its backbone and heads, never its targets."""
    networks = dcm(tiny.gfl())
    losses = networks.of_method(networks.batch())
    assert set(losses) == {
        *('aux1_student', 'aux2_student', 'aux1_big', 'aux2_big'),
        *('kl_student', 'kl_big'),
    }
    for key, loss in losses.items():
        name = key.rpartition('_')[2]
        for other, heads in auxiliary(networks).items():
            model = networks.all[other]
            for module in (model.backbone.layer1, *heads):
                grads = torch.autograd.grad(
                    loss,
                    list(module.parameters()),
                    retain_graph=True,
                    allow_unused=True,
                )
                reached = any(g is not None and g.any() for g in grads)
                own_head = key[:4] == 'aux1' and module is heads[1]
                own_head |= key[:4] == 'aux2' and module is heads[0]
                assert reached == (other == name and not own_head)
    neck = list(networks.student.neck.parameters())
    grads = torch.autograd.grad(
        losses['aux1_student'], neck, retain_graph=True, allow_unused=True
    )
    assert all(g is None for g in grads)


def test_equal_heads_have_nothing_to_learn():
    """All six given the same output."""
    networks = dcm(tiny.gfl())
    with torch.no_grad():
        for name, model in networks.all.items():
            for head in (
                model.bbox_head,
                *(h.bbox_head for h in auxiliary(networks)[name]),
            ):
                head.gfl_cls.weight.zero_()
                head.gfl_cls.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    losses = networks.of_method(networks.batch())
    assert losses['kl_student'].item() == pytest.approx(0, abs=1e-5)
    assert losses['kl_big'].item() == pytest.approx(0, abs=1e-5)


def test_without_mutual_terms_the_heads_still_train():
    networks = dcm(tiny.gfl(), kl_weight=0)
    losses = networks.of_method(networks.batch())
    assert set(losses) == {
        *('aux1_student', 'aux2_student', 'aux1_big', 'aux2_big')
    }


def test_one_stage_of_another_depth():
    networks = dcm(
        tiny.gfl(), stages=['backbone.layer4'], peer_stages=['backbone.layer1']
    )
    batch = networks.batch()
    losses = networks.of_method(batch)
    assert set(losses) == {'aux1_student', 'aux1_big', 'kl_student', 'kl_big'}
    assert all(loss.isfinite() and loss > 0 for loss in losses.values())


@pytest.mark.parametrize('objects', [0, [0, 2]])
def test_images_without_objects(objects):
    networks = dcm(tiny.gfl())
    losses = networks.of_method(networks.batch(objects=objects))
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())


def test_zero_weight_is_each_network_alone():
    networks = dcm(tiny.gfl(), loss_weight=0)
    batch = networks.batch()
    losses = networks.losses(batch)
    alone = tiny.seeded_loss(networks.student, *batch)
    with isolated_random_state():
        theirs = networks.distiller.peers['big'].loss(
            Batch(batch[0], copy.deepcopy(batch[1]))
        )
    assert toy.same({k: losses[k] for k in alone}, alone)
    assert toy.same({k: losses[f'big.{k}'] for k in theirs}, theirs)
    assert len(losses) == len(alone) + len(theirs)


class TestParts:
    def test_levels_have_the_necks_sizes_and_widths(self):
        """Of an odd image, from a stage between the levels' strides."""
        stage = torch.rand(2, 8, 15, 13)
        levels = [
            torch.rand(2, width, *size)
            for width, size in (
                (4, (29, 25)),
                (4, (15, 13)),
                (6, (8, 7)),
                (6, (4, 4)),
            )
        ]
        pyramid = StagePyramid(stage, levels)
        assert pyramid.halvings == [0, 0, 1, 2]
        maps = pyramid(stage, [level.shape[-2:] for level in levels])
        assert [m.shape for m in maps] == [level.shape for level in levels]

    def test_a_copy_starts_anew(self):
        facts = read_facts(tiny.build(tiny.gfl(), seed=1)).dense
        head = facts.head
        for parameter in head.parameters():
            parameter.data.fill_(7.0)
        copied = fresh_copy(facts)
        assert copied.gfl_cls.bias.unique().item() == pytest.approx(
            -4.595, abs=1e-3
        )
        assert copied.gfl_cls.weight.std() < 0.02
        assert head.gfl_cls.weight.unique().item() == 7.0


class TestNetworksThatDoNotFit:
    def test_three(self):
        peers = {'big': tiny.gfl(), 'second': tiny.gfl()}
        with pytest.raises(ConfigError, match='there are 2 in'):
            Networks({'m': DCM}, tiny.gfl(), peers)

    def test_two_stage(self):
        with pytest.raises(ConfigError, match='DCM fits detectors with a'):
            dcm(tiny.faster_rcnn())

    def test_a_stage_that_is_not_there(self):
        with pytest.raises(TapError, match='Did you mean "backbone'):
            dcm(tiny.gfl(), stages=['backbone.layr3'])

    def test_options(self):
        for options, message in (
            (dict(kl_weight=-1), 'kl_weight must be at least 0'),
            (dict(temperature=0), 'temperature must be above 0'),
            (dict(stages=[]), 'at least one'),
            (dict(peer_stages=['backbone.layer3']), 'as many stages'),
        ):
            with pytest.raises(ConfigError, match=message):
                dcm(tiny.gfl(), **options)


def test_a_run_resumes_exactly(tmp_path):
    """With the auxiliary heads' weights; stock checkpoints have none."""
    record = trained_and_resumed(mutual_run(tmp_path, method=DCM), tmp_path)
    for losses in record.losses:
        assert losses['m.loss_kl_student'] > 0
        assert losses['m.loss_aux2_big'] > 0
    for folder in ('', 'big'):
        saved = toy.load(tmp_path / 'whole' / folder / 'epoch_2.pth')
        assert not any('auxiliary' in key for key in saved['state_dict'])
    attached = toy.load(tmp_path / 'whole' / 'epoch_2.pth')['distillation']
    assert any('auxiliary' in key for key in attached['state_dict'])
