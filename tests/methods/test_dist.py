"""DIST on real detectors."""

import copy
import math

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.registry import METHODS
from mmkd.utils import build_checked
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import LogitPair, rows, seen_targets
from tests.helpers.loss_references import distances


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def mean(values):
    return sum(values) / len(values)


HEADS = {
    'retinanet': tiny.retinanet(),
    'fcos': tiny.fcos(),
    'atss': tiny_dense.atss(),
    'gfl': tiny.gfl(),
}


@pytest.mark.parametrize('name', HEADS)
def test_the_positives_of_a_dense_head(name):
    pair = LogitPair(
        'DIST',
        HEADS[name],
        dense='priors',
        beta=2.0,
        gamma=3.0,
        temperature=2.0,
    )
    losses = pair.losses()
    labels, _, _ = seen_targets(pair)
    positive = (labels >= 0) & (labels < 3)
    s, t = (
        torch.cat(rows(model, pair.inputs), 1)[positive].div(2).sigmoid()
        for model in (pair.student, pair.teacher)
    )
    inter = mean(distances(s.tolist(), t.tolist()))
    intra = mean(distances(s.T.tolist(), t.T.tolist()))
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        dict(inter=8 * inter, intra=12 * intra), rel=1e-3
    )
    sum(losses.values()).backward()
    assert pair.student.backbone.conv1.weight.grad.abs().sum() > 0
    assert all(p.grad is None for p in pair.teacher.parameters())


def test_image_by_image():
    """With objects in one image, both are the same; in two, they differ."""
    alone = LogitPair('DIST', tiny.gfl(), dense='priors', per_image=True)
    joint = LogitPair('DIST', tiny.gfl(), dense='priors')
    assert torch.equal(
        alone.losses(objects=(3, 0))['intra'],
        joint.losses(objects=(3, 0))['intra'],
    )
    losses = alone.losses(objects=(3, 2))
    labels, _, _ = seen_targets(alone)
    s, t = (
        torch.cat(rows(model, alone.inputs), 1).sigmoid()
        for model in (alone.student, alone.teacher)
    )
    expected = []
    for image, positive in enumerate((labels >= 0) & (labels < 3)):
        expected += distances(
            s[image, positive].T.tolist(), t[image, positive].T.tolist()
        )
    assert losses['intra'].item() == pytest.approx(mean(expected), rel=1e-3)
    assert losses['intra'] != joint.losses(objects=(3, 2))['intra']


def test_the_rois_of_a_two_stage_detector():
    """Softmax with the background, on two of the three classes."""
    pair = LogitPair(
        'DIST', tiny.faster_rcnn(), teacher_classes=('cow', 'sky', 'cat')
    )
    found, head = [], pair.student.roi_head.bbox_head
    original = head.loss_and_target

    def record(*args, **kwargs):
        found.append(kwargs)
        return original(*args, **kwargs)

    head.loss_and_target = record
    losses = pair.losses()
    del head.loss_and_target
    with torch.no_grad():
        theirs = pair.teacher.roi_head._bbox_forward(
            pair.teacher.extract_feat(pair.inputs), found[0]['rois']
        )['cls_score']
    s = found[0]['cls_score'].detach()[:, [0, 2, 3]].double().softmax(-1)
    t = theirs[:, [2, 0, 3]].double().softmax(-1)
    assert {k: v.item() for k, v in losses.items()} == pytest.approx(
        dict(
            inter=mean(distances(s.tolist(), t.tolist())),
            intra=mean(distances(s.T.tolist(), t.T.tolist())),
        ),
        rel=1e-3,
    )


@pytest.mark.parametrize('dense', ['maps', 'priors'])
@pytest.mark.parametrize('config', [tiny.gfl(), tiny.retinanet()])
def test_an_equal_student_has_nothing_to_learn(config, dense):
    pair = LogitPair('DIST', config, dense=dense)
    for module in pair.teacher.bbox_head.children():
        if isinstance(module, torch.nn.Conv2d):
            # Scores of .01 are so small that the epsilon is felt.
            torch.nn.init.zeros_(module.bias)
    pair.equal()
    # Group norm makes a map of one position constant.
    for loss in pair.losses(sizes=((256, 256), (256, 256))).values():
        assert loss.item() == pytest.approx(0, abs=5e-4)


def test_images_without_objects():
    pair = LogitPair('DIST', tiny.gfl(), dense='priors')
    losses = pair.losses(objects=(0, 0))
    assert [loss.item() for loss in losses.values()] == [0, 0]
    assert not any(math.isnan(loss) for loss in losses.values())


@pytest.mark.parametrize('config', [tiny.gfl(), tiny.faster_rcnn()])
def test_zero_weight_is_the_stock_loss(config):
    pair = LogitPair('DIST', config, loss_weight=0.0)
    assert toy.same(pair.step(), pair.stock_losses())


# -------------------------------------------------------------- official code


def pearson_by_rows(a, b):
    a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


def official_relations(student, teacher, beta=1, gamma=1):
    """The sum over the levels of hunto/MasKD's module on two lists of maps.

    Each map (B, A * K, H, W) is a table with a row for each position of each
    image, and A * K columns.
    """
    total = 0
    for s, t in zip(student, teacher, strict=True):
        rows = [
            torch.stack(
                [
                    each[b, :, y, x]
                    for b in range(each.shape[0])
                    for y in range(each.shape[2])
                    for x in range(each.shape[3])
                ]
            ).sigmoid()
            for each in (s.double(), t.double())
        ]
        columns = [table.T for table in rows]
        total = total + beta * (1 - pearson_by_rows(*rows).mean())
        total = total + gamma * (1 - pearson_by_rows(*columns).mean())
    return total


class TestOfficialCode:
    """hunto/MasKD's mmrazor compares the class maps, level by level."""

    WHOLE = ((128, 128), (128, 128))  # without padding

    def maps(self, pair):
        """Both networks' class maps, as their own layers give them."""
        with torch.no_grad():
            theirs = pair.teacher.bbox_head(
                pair.teacher.extract_feat(pair.inputs)
            )
        ours = pair.student.bbox_head(pair.student.extract_feat(pair.inputs))
        return ours[0], theirs[0]

    @pytest.mark.parametrize('name', HEADS)
    def test_values_and_gradients(self, name):
        pair = LogitPair('DIST', HEADS[name], beta=2.0, gamma=3.0)
        loss = sum(pair.losses(sizes=self.WHOLE).values())
        expected = official_relations(*self.maps(pair), 2, 3)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert loss.item() > 1
        weights = [p for p in pair.student.parameters() if p.requires_grad]
        ours, theirs = (
            torch.autograd.grad(value, weights, materialize_grads=True)
            for value in (loss, expected)
        )
        ours, theirs = (
            torch.cat([g.flatten() for g in each]) for each in (ours, theirs)
        )
        assert theirs.norm() > 1e-3
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()

    def test_the_defaults_are_those_of_its_config(self):
        """Beta = gamma = 1, and no temperature."""
        pair = LogitPair('DIST', tiny.retinanet())
        loss = sum(pair.losses(sizes=self.WHOLE).values())
        expected = official_relations(*self.maps(pair))
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)

    def test_a_temperature(self):
        pair = LogitPair('DIST', tiny.gfl(), temperature=2.0)
        loss = sum(pair.losses(sizes=self.WHOLE).values())
        scaled = ([z / 2 for z in maps] for maps in self.maps(pair))
        expected = 4 * official_relations(*scaled)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)

    def test_padding_is_left_out(self):
        """Else, an image's loss would depend on the size of the others."""
        pair = LogitPair('DIST', tiny.fcos(), beta=1.0, gamma=0.0)
        losses = pair.losses(sizes=((96, 128), (128, 96)))
        expected = 0
        for level in zip(*self.maps(pair), strict=True):
            size = level[0].shape[-1]
            part = math.ceil(size * 96 / 128)
            cut = [
                torch.cat(
                    [
                        m[:1, :, :part].flatten(2),
                        m[1:, :, :, :part].flatten(2),
                    ],
                    -1,
                )[..., None]
                for m in level
            ]
            expected = expected + official_relations(*[[m] for m in cut], 1, 0)
        assert losses['inter'].item() == pytest.approx(
            expected.item(), rel=1e-4
        )
        assert losses['intra'] == 0

    def test_each_image_alone(self):
        pair = LogitPair('DIST', tiny.gfl(), per_image=True, beta=0.0)
        loss = pair.losses(sizes=self.WHOLE)['intra']
        ours, theirs = self.maps(pair)
        expected = [
            official_relations(
                [m[i : i + 1] for m in ours], [m[i : i + 1] for m in theirs], 0
            ).item()
            for i in range(2)
        ]
        assert loss.item() == pytest.approx(mean(expected), rel=1e-4)
        assert expected[0] != pytest.approx(expected[1], rel=1e-2)

    def test_objects_do_not_matter(self):
        pair = LogitPair('DIST', tiny.retinanet())
        inputs, samples = pair.batch(objects=(3, 2))
        without = [copy.deepcopy(sample) for sample in samples]
        for sample in without:
            sample.gt_instances = sample.gt_instances[:0]
        values = []
        for each in (samples, without):
            pair.distiller.attach()
            losses = tiny.seeded_loss(pair.student, inputs, each)
            pair.distiller.detach()
            values.append([losses[f'm.loss_{n}'] for n in ('inter', 'intra')])
        assert values[0] == values[1]

    def test_classes_that_both_know(self):
        """Two of three, with their columns prior by prior."""
        pair = LogitPair(
            'DIST', tiny.retinanet(), teacher_classes=('cow', 'sky', 'cat')
        )
        loss = sum(pair.losses(sizes=self.WHOLE).values())
        ours, theirs = self.maps(pair)
        own = [3 * prior + c for prior in range(9) for c in (0, 2)]
        other = [3 * prior + c for prior in range(9) for c in (2, 0)]
        expected = official_relations(
            [m[:, own] for m in ours], [m[:, other] for m in theirs]
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)

    def test_a_softmax_head(self):
        """Each prior's probabilities, with its background."""
        config = tiny.retinanet(
            bbox_head__loss_cls=dict(
                _delete_=True, type='CrossEntropyLoss', use_sigmoid=False
            )
        )
        pair = LogitPair('DIST', config)
        loss = sum(pair.losses(sizes=self.WHOLE).values())
        logits = [
            [m.unflatten(1, (9, 4)).softmax(2).flatten(1, 2) for m in maps]
            for maps in self.maps(pair)
        ]
        expected = official_relations(
            *([p.double().logit() for p in maps] for maps in logits)
        )
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)


# ------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(temperature=0), r'DIST.temperature must be above 0, got 0'),
        (dict(beta=-1), r'DIST.beta must be at least 0, got -1'),
        (dict(gamma=-0.5), r'DIST.gamma must be at least 0, got -0.5'),
        (
            dict(dense='all'),
            r"DIST.dense must be one of 'maps', 'priors', got 'all'",
        ),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        build_checked(METHODS, dict(type='mmkd.DIST', **options), 'dist')


@pytest.mark.parametrize('dense', ['maps', 'priors'])
def test_one_class_has_no_relations(dense):
    pair = LogitPair(
        'DIST',
        tiny.gfl(),
        teacher_classes=('cat', 'sky', 'sea'),
        dense=dense,
    )
    with pytest.raises(
        ConfigError, match=r'networks share 1 and no background'
    ):
        pair.losses()


def test_pairs_that_do_not_fit():
    with pytest.raises(
        ConfigError, match=r'DIST: the priors of the two dense'
    ):
        LogitPair('DIST', tiny.retinanet(), tiny.gfl())
