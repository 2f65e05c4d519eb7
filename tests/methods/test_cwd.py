"""Channel-wise distillation."""

import pytest

from mmkd.errors import ConfigError
from mmkd.methods import CWD
from tests.helpers import tiny_dense
from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import (
    FeaturePair,
    check_official,
    images_of,
    on_maps,
    pointwise,
    random_maps,
    twin,
)
from tests.helpers.logit_pair import LogitPair as ClassPair
from tests.helpers.loss_references import channel_kl


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def test_on_detectors():
    pair = FeaturePair(
        'CWD', tiny.faster_rcnn(), temperature=2.0, loss_weight=3.0, levels=[1]
    )
    losses = pair.step(sizes=((96, 128), (64, 96)))
    ours, theirs = pair.features()
    each = [
        channel_kl(s, t, 2.0)
        for s, t in zip(
            images_of(ours[1], pair.samples),
            images_of(theirs[1], pair.samples),
            strict=True,
        )
    ]
    assert losses.keys() == {'cwd'}
    assert losses['cwd'].item() == pytest.approx(3 * sum(each) / 2, rel=1e-4)


class TestOfficialCode:
    """The sums of MMRazor and of mmdetection-distiller, written plainly."""

    @staticmethod
    def maps(seed):
        shapes = ((2, 8, 12, 16), (2, 8, 6, 8), (2, 8, 3, 4))
        return [random_maps(*shape, seed=seed) for shape in shapes]

    @staticmethod
    def shares(maps, tau):
        """Of positions in the channels of all images, (B C, H W)."""
        powers = (maps.double().flatten(0, 1).flatten(1) / tau).exp()
        return powers / powers.sum(1, keepdim=True)

    @pytest.mark.parametrize('tau', [1.0, 4.0])
    def test_of_mmrazor(self, tau):
        student = [m.requires_grad_() for m in self.maps(1)]
        teacher = self.maps(2)
        own = on_maps(CWD(temperature=tau), student, teacher)
        official = 0.0
        for s, t in zip(student, teacher, strict=True):
            p, q = self.shares(s, tau), self.shares(t, tau)
            sums = (q * q.log() - q * p.log()).sum() * tau**2
            official = official + 10.0 * sums / (8 * 2)
        check_official(own, official, student)

    def test_of_the_cited_figure(self):
        """A cross-entropy, weight 5: the same gradient."""
        student = [m.requires_grad_() for m in self.maps(1)]
        teacher = self.maps(2)
        own = on_maps(CWD(loss_weight=5.0), student, teacher)
        official, entropy = 0.0, 0.0
        for s, t in zip(student, teacher, strict=True):
            p, q = self.shares(s, 1.0), self.shares(t, 1.0)
            official = official + 5.0 * -(q * p.log()).sum() / (8 * 2)
            entropy = entropy + 5.0 * -(q * q.log()).sum() / (8 * 2)
        check_official(own, official - entropy, student)
        assert entropy > own


def test_levels_are_summed():
    levels = [
        FeaturePair('CWD', levels=chosen).step()['cwd'].item()
        for chosen in ([0], [1], [0, 1])
    ]
    assert levels[0] + levels[1] == pytest.approx(levels[2], rel=1e-5)


def test_the_teacher_itself_is_the_minimum():
    pair = FeaturePair('CWD')
    assert pair.step()['cwd'] > 0
    twin(pair)
    assert pair.step()['cwd'].abs() < 1e-5


def test_class_scores():
    pair = FeaturePair('CWD', tiny.retinanet(), source='bbox_head.retina_cls')
    assert len(pair.method.adapters) == 5
    assert pair.step()['cwd'] > 0


@pytest.mark.parametrize(
    ('teacher', 'classes'),
    [
        (tiny.gfl(), tiny.CLASSES[::-1]),
        (tiny.gfl(bbox_head__num_classes=2), tiny.CLASSES[:2]),
        (tiny_dense.atss(), tiny.CLASSES[::-1]),
    ],
)
@pytest.mark.parametrize('method', ['CWD', 'PKD', 'FGD'])
def test_scores_of_other_classes_are_refused(method, teacher, classes):
    """Channel by channel, the cat's would meet the cow's."""
    scores = {'GFLHead': 'gfl_cls', 'ATSSHead': 'atss_cls'}
    options = dict(
        source='bbox_head.gfl_cls',
        teacher_source=f'bbox_head.{scores[teacher.bbox_head.type]}',
    )
    pair = ClassPair(
        method, tiny.gfl(), teacher, teacher_classes=classes, **options
    )
    with pytest.raises(
        ConfigError,
        match=rf'{method} on "bbox_head.gfl_cls": class scores are compared '
        rf'.* got cat, dog, cow in the student and {", ".join(classes)} in',
    ):
        pair.step()
    pair = ClassPair(
        method,
        tiny.gfl(),
        teacher,
        teacher_classes=classes,
        adapt=True,
        **options,
    )
    assert all(loss > 0 for loss in pair.losses().values())


@pytest.mark.parametrize(
    'source', ['neck', 'bbox_head.cls_convs.1', 'bbox_head.gfl_reg']
)
def test_other_features_know_no_classes(source):
    pair = ClassPair(
        'CWD',
        tiny.gfl(),
        teacher_classes=tiny.CLASSES[::-1],
        source=source,
    )
    assert pair.losses()['cwd'] > 0


@pytest.mark.parametrize('temperature', [0, -1.0, float('nan')])
def test_temperatures_that_cannot_be(temperature):
    with pytest.raises(ConfigError, match=r'CWD\.temperature must be above 0'):
        FeaturePair('CWD', pointwise(), temperature=temperature)


def test_defaults():
    method = FeaturePair('CWD').method
    assert (method.temperature, method.loss_weight) == (1.0, 10.0)
    assert (method.source, method.adapt) == ('neck', None)
