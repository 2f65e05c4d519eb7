"""One teacher and several students, of real detectors."""

import copy
from pathlib import Path

import pytest

from mmkd.core.distiller import build_distiller
from mmkd.data.batch import Batch
from mmkd.errors import ConfigError
from mmkd.utils import isolated_random_state
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy
from tests.helpers.logit_pair import LogitPair
from tests.helpers.together import Networks, wide
from tests.methods.test_kd import reference as kd_reference
from tests.methods.test_mutual import (
    dense_reference,
    dml,
    mutual_run,
    trained_and_resumed,
)
from tests.peers.test_peer import peer_config

METHOD = dict(type='mmkd.OneTeacherSeveralStudents')
CONFIGS = dict(gfl=tiny.gfl(), rcnn=tiny.faster_rcnn())
SEVERAL = pytest.mark.parametrize('name', CONFIGS)


def several(config, *, teacher=True, **options):
    """Two students, and a frozen teacher where there is one."""
    methods = {'m': dict(METHOD, **options)}
    frozen = config if teacher else None
    return Networks(methods, config, {'second': wide(config)}, frozen)


def values(losses):
    return {name: loss.item() for name, loss in losses.items()}


@SEVERAL
def test_without_teacher_it_is_mutual_learning(name):
    """Exactly, whether or not there is one."""
    config = CONFIGS[name]
    expected = dml(config, {'second': wide(config)}, temperature=2.0)
    batch = expected.batch()
    expected = values(expected.of_method(batch))
    for teacher in (False, True):
        networks = several(config, teacher=teacher, alpha=0, temperature=2.0)
        losses = networks.of_method(batch)
        assert values(losses) == {
            f'mutual_{name}': value for name, value in expected.items()
        }
        assert networks.gets_gradient(losses['mutual_second']) == {'second'}


@SEVERAL
def test_without_others_it_is_distillation(name):
    """Of each student by itself, exactly."""
    config = CONFIGS[name]
    networks = several(config, beta=0, temperature=2.0)
    batch = networks.batch()
    losses = networks.of_method(batch)
    assert set(losses) == {'kd_student', 'kd_second'}
    for student, model in networks.all.items():
        pair = LogitPair(
            'KD',
            config if student == 'student' else wide(config),
            config,
            temperature=2.0,
        )
        state = {
            key: value
            for key, value in model.state_dict().items()
            if not key.startswith('distillation')
        }
        pair.student.load_state_dict(state)
        pair.teacher.load_state_dict(networks.teacher.state_dict())
        pair.batch = lambda **_: batch
        if student == 'student':
            assert pair.losses()['cls'].item() == losses['kd_student'].item()
        elif name == 'gfl':  # RoIs are drawn from a stream of the peer's own
            assert pair.losses()['cls'].item() == losses['kd_second'].item()
        loss = losses[f'kd_{student}']
        assert loss > 0.01
        assert networks.gets_gradient(loss) == {student}
    assert all(p.grad is None for p in networks.teacher.parameters())


def test_the_sum_by_loops():
    """Offline, against float64 loops over priors and classes."""
    networks = several(tiny.gfl(), alpha=0.5, beta=2.0, temperature=2.0)
    batch = networks.batch()
    losses = networks.of_method(batch)
    mutual = dense_reference(networks, batch, 2.0)
    for student, model in networks.all.items():
        assert losses[f'mutual_{student}'].item() == pytest.approx(
            2.0 * mutual[student], rel=1e-3
        )
        kd = kd_reference(_AsPair(model, networks.teacher, batch), 2.0)
        assert losses[f'kd_{student}'].item() == pytest.approx(
            0.5 * kd, rel=1e-3
        )


class _AsPair:
    def __init__(self, student, teacher, batch):
        self.student, self.teacher = student, teacher
        self.inputs, self.samples = batch

    def stock_losses(self):
        return tiny.seeded_loss(self.student, self.inputs, self.samples)


def test_the_teacher_scores_each_students_own_rois():
    """Not those of the first student again."""
    networks = several(tiny.faster_rcnn(), beta=0)
    batch = networks.batch()
    scored = []
    head = networks.teacher.roi_head
    original = head._bbox_forward
    head._bbox_forward = lambda x, rois: (
        scored.append(rois) or original(x, rois)
    )
    networks.of_method(batch)
    del head._bbox_forward
    first, second = scored
    assert first.shape != second.shape or not (first == second).all()


@SEVERAL
def test_online_the_teacher_learns_from_its_task_alone(name):
    config = CONFIGS[name]
    networks = Networks(
        {'m': METHOD},
        config,
        {'second': wide(config)},
        trained=wide(config),
    )
    losses = networks.of_method(networks.batch())
    assert set(losses) == {
        'kd_student',
        'kd_second',
        'mutual_student',
        'mutual_second',
    }
    assert networks.gets_gradient(sum(losses.values())) == {
        'student',
        'second',
    }


def test_an_online_teacher_is_not_moved_by_others_rois():
    """Neither by a gradient nor by its batch norms' running statistics."""
    config = tiny.double_head()
    networks = Networks(
        {'m': dict(METHOD, beta=0)}, config, {}, trained=config
    )
    teacher, batch = networks.peers['teacher'], networks.batch()
    alone = copy.deepcopy(teacher)
    peer = networks.distiller.peers['teacher']
    with isolated_random_state():
        peer.loss(Batch(batch[0], copy.deepcopy(batch[1])))
    own = {k: v.clone() for k, v in teacher.state_dict().items()}
    assert not toy.same(own, alone.state_dict())
    teacher.load_state_dict(alone.state_dict())
    networks.losses(batch)
    assert toy.same(teacher.state_dict(), own)


def test_online_distillation_of_one_student():
    """A twin in training teaches nothing; a stranger what KD teaches."""
    online = {'m': dict(METHOD, beta=0)}
    config = tiny.gfl()
    twin = Networks(online, config, {}, twins=True, trained=config)
    batch = twin.batch()
    assert values(twin.of_method(batch)) == {
        'kd_student': pytest.approx(0, abs=1e-5)
    }
    networks = Networks(online, config, {}, trained=wide(config))
    expected = kd_reference(
        _AsPair(networks.student, networks.peers['teacher'], batch), 1.0
    )
    loss = networks.of_method(batch)['kd_student']
    assert loss.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    'off', [dict(loss_weight=0), dict(alpha=0, beta=0)], ids=['weight', 'both']
)
def test_switched_off_each_trains_alone(off):
    networks = several(tiny.gfl(), **off)
    batch = networks.batch()
    losses = networks.losses(batch)
    assert not any(key.startswith('m.') for key in losses)
    for prefix, model in (
        ('', networks.student),
        ('second.', networks.peers['second']),
    ):
        alone = tiny.seeded_loss(model, *batch)
        assert toy.same({k: losses[prefix + k] for k in alone}, alone)


class TestBadConfigs:
    def test_a_frozen_teacher_and_a_peer_of_that_name(self):
        with pytest.raises(ConfigError, match='"teacher" cannot be a name'):
            Networks(
                {'m': METHOD},
                tiny.gfl(),
                {'teacher': tiny.gfl()},
                tiny.gfl(),
            )

    def test_options_of_frozen_teachers(self):
        with pytest.raises(
            ConfigError, match=r'distillation\.teacher has no option "fold_bn"'
        ):
            build_distiller(
                dict(
                    teacher=dict(
                        config=dict(model=tiny.gfl()),
                        trainable=True,
                        fold_bn=True,
                    ),
                    methods={'m': dict(METHOD, beta=0)},
                ),
                tiny.build(tiny.gfl()),
                tiny.CLASSES,
            )

    def test_methods_that_need_a_frozen_one(self):
        with pytest.raises(ConfigError, match=r'needs distillation\.teacher'):
            Networks(
                {'m': dict(type='mmkd.KD')},
                tiny.gfl(),
                {},
                trained=tiny.gfl(),
            )

    def test_no_teacher(self):
        with pytest.raises(ConfigError, match='alpha is the weight of a'):
            several(tiny.gfl(), teacher=False)

    def test_no_other_student(self):
        with pytest.raises(ConfigError, match='beta is the weight of other'):
            Networks({'m': METHOD}, tiny.gfl(), {}, trained=tiny.gfl())

    def test_a_teacher_of_another_kind(self):
        with pytest.raises(ConfigError, match='the teacher is FasterRCNN'):
            Networks(
                {'m': METHOD},
                tiny.gfl(),
                {'second': tiny.gfl()},
                tiny.faster_rcnn(),
            )

    @pytest.mark.parametrize('option', ['alpha', 'beta'])
    def test_bad_weights(self, option):
        with pytest.raises(ConfigError, match=f'{option} must be at least 0'):
            several(tiny.gfl(), **{option: -0.1})


def test_a_run_leaves_the_online_teacher_as_it_is_alone(tmp_path):
    """Its weights do not depend on what its students learn from it."""
    weights = {}
    for factor in (1.0, 0.0):
        folder = tmp_path / str(factor)
        cfg = mutual_run(folder, method=dict(METHOD, beta=0.0))
        cfg.distillation.methods.m.loss_weight = factor
        cfg.train_cfg.max_epochs = 2
        big = cfg.distillation.peers.pop('big')
        cfg.distillation.teacher = dict(**big, trainable=True)
        toy.train(cfg)
        weights[factor] = [
            toy.load(path)['state_dict']
            for path in (
                Path(cfg.work_dir, 'teacher', 'epoch_2.pth'),
                Path(cfg.work_dir, 'epoch_2.pth'),
            )
        ]
    (teacher, student), (alone, plain) = weights.values()
    assert toy.same(teacher, alone)
    assert not toy.same(student, plain)


def test_a_run_resumes_exactly(tmp_path):
    """Two students and a teacher in training."""
    cfg = mutual_run(tmp_path, method=METHOD)
    big = cfg.distillation.peers.pop('big')
    cfg.distillation.teacher = dict(**big, trainable=True)
    second = peer_config(cfg, channels=8)
    cfg.distillation.peers.second = dict(config=second)
    record = trained_and_resumed(cfg, tmp_path)
    for losses in record.losses:
        for part in ('kd', 'mutual'):
            assert losses[f'm.loss_{part}_student'] > 0
            assert losses[f'm.loss_{part}_second'] > 0
        assert 'm.loss_kd_teacher' not in losses
        assert losses['teacher.loss_cls'] > 0
    assert 'teacher/coco/bbox_mAP' in record.metrics[-1]
    stock = toy.load(tmp_path / 'whole' / 'teacher' / 'epoch_2.pth')
    model = tiny.build(big.config.model)
    model.load_state_dict(stock['state_dict'], strict=True)
