"""One distillation step, on real detectors without a runner."""

import copy

import pytest
import torch
from mmengine.config import ConfigDict
from torch import nn

from mmkd.core.distiller import build_distiller, scaled
from mmkd.core.method import Method
from mmkd.detectors.blank import blank_pass
from mmkd.engine.random_state import capture
from mmkd.errors import ConfigError
from mmkd.registry import METHODS
from mmkd.utils import isolated_random_state
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy

HINT = dict(type='mmkd.FeatureHint')
FRCNN = dict(type='mmkd.FasterRCNNDistillation')


def describe(config):
    metainfo = dict(classes=tiny.CLASSES)
    loader = dict(dataset=dict(type='CocoDataset', metainfo=metainfo))
    return dict(
        config=ConfigDict(model=config, test_dataloader=loader),
        checkpoint=None,
    )


def built(methods, config=None, seed=0):
    config = tiny.faster_rcnn() if config is None else config
    student = tiny.build(config)
    return build_distiller(
        dict(teacher=describe(config), methods=methods),
        student,
        tiny.CLASSES,
        seed,
    )


@pytest.fixture(autouse=True)
def seeded():
    with isolated_random_state(0):
        yield


class TestAttached:
    def test_it_leaves_no_trace(self):
        distiller = built({'hint': HINT})
        student = distiller.student
        keys, names = list(student.state_dict()), set(vars(student))
        distiller.attach()
        assert student.loss == distiller.loss
        added = set(student.state_dict()) - set(keys)
        assert added
        assert all(name.startswith('distillation.') for name in added)
        assert list(student.state_dict())[: len(keys)] == keys
        distiller.detach()
        assert list(student.state_dict()) == keys
        assert set(vars(student)) == names
        assert student.loss == type(student).loss.__get__(student)

    def test_the_student_is_no_part_of_it(self):
        distiller = built({'hint': HINT})
        names = [name for name, _ in distiller.named_parameters()]
        assert len(names) == 10
        assert all(name.startswith('methods.hint.adapters') for name in names)

    def test_the_teacher_stays_frozen_whatever_befalls_the_student(self):
        distiller = built({'hint': HINT})
        distiller.attach()
        student, teacher = distiller.student, distiller.teacher.model
        student.train()
        student.requires_grad_(True)
        student.double()
        assert not any(module.training for module in teacher.modules())
        assert not any(p.requires_grad for p in teacher.parameters())
        assert all(p.dtype == torch.float for p in teacher.parameters())

    def test_copies_share_the_teacher_and_tell_nobody(self):
        distiller = built({'hint': HINT})
        distiller.attach()
        distiller.observers.append(print)
        other = copy.deepcopy(distiller.student)
        assert other.distillation.student is other
        assert other.distillation.teacher is distiller.teacher
        assert other.distillation.observers == []
        assert distiller.observers == [print]
        assert other.loss == other.distillation.loss
        other.distillation.detach()
        assert hasattr(distiller.student, 'distillation')


class TestLoss:
    def test_stock_losses_and_those_of_each_method(self):
        distiller = built({'a': HINT, 'b': dict(FRCNN, hint=None)})
        stock = tiny.seeded_loss(
            copy.deepcopy(distiller.student),
            *tiny.batch_for(distiller.student),
        )
        distiller.attach()
        losses = tiny.seeded_loss(
            distiller.student, *tiny.batch_for(distiller.student)
        )
        assert list(losses)[: len(stock)] == list(stock)
        assert set(losses) - set(stock) == {
            'a.loss_hint',
            'b.loss_rpn_soft',
            'b.loss_rpn_bounded',
            'b.loss_rcn_soft',
            'b.loss_rcn_bounded',
        }
        # b shares classification with the hard labels, and nothing else
        assert losses['loss_cls'].item() == pytest.approx(
            0.5 * stock['loss_cls'].item()
        )
        assert losses['loss_bbox'].equal(stock['loss_bbox'])

    def test_weight_and_schedule_scale_it(self):
        distiller = built({'hint': dict(HINT, loss_weight=0.5)})
        distiller.attach()
        student = distiller.student
        batch = tiny.batch_for(student)
        full = tiny.seeded_loss(student, *batch)['hint.loss_hint']
        distiller.scales['hint'] = 0.25
        part = tiny.seeded_loss(student, *batch)['hint.loss_hint']
        assert part.item() == pytest.approx(0.25 * full.item())
        distiller.scales['hint'] = 0.0
        assert 'hint.loss_hint' not in tiny.seeded_loss(student, *batch)

    @pytest.mark.parametrize('off', ['loss_weight', 'scale'])
    def test_a_method_that_is_off_costs_nothing(self, off):
        weight = 0.0 if off == 'loss_weight' else 1.0
        distiller = built({'hint': dict(HINT, loss_weight=weight)})
        if off == 'scale':
            distiller.scales['hint'] = 0.0
        distiller.attach()
        ran = []
        for module in (distiller.teacher.model.backbone, distiller.methods):
            module.register_forward_hook(lambda *_: ran.append(1))
        for adapter in distiller.methods.hint.adapters:
            adapter.register_forward_hook(lambda *_: ran.append(1))
        tiny.seeded_loss(distiller.student, *tiny.batch_for(distiller.student))
        assert not ran

    def test_gradients(self):
        distiller = built({'hint': HINT})
        distiller.attach()
        student = distiller.student
        losses = tiny.seeded_loss(student, *tiny.batch_for(student))
        losses['hint.loss_hint'].backward()
        reached = {
            name.split('.')[0]
            for name, p in student.named_parameters()
            if p.grad is not None and p.grad.any()
        }
        assert reached == {'backbone', 'neck', 'distillation'}
        teacher = distiller.teacher.model.parameters()
        assert all(p.grad is None for p in teacher)

    def test_observers_see_both_kinds(self):
        distiller = built({'hint': HINT})
        distiller.attach()
        seen = []
        distiller.observers.append(lambda *losses: seen.append(losses))
        losses = tiny.seeded_loss(
            distiller.student, *tiny.batch_for(distiller.student)
        )
        ((task, distilled),) = seen
        assert distilled == {
            'hint': {'hint.loss_hint': losses['hint.loss_hint']}
        }
        assert set(task) == set(losses) - {'hint.loss_hint'}

    def test_a_subclass_s_own_loss_is_the_stock_one(self):
        """What is on the student's class is run, not what is on top."""
        distiller = built({'hint': HINT}, tiny.retinanet())
        distiller.attach()
        losses = tiny.seeded_loss(
            distiller.student, *tiny.batch_for(distiller.student)
        )
        assert set(losses) == {'loss_cls', 'loss_bbox', 'hint.loss_hint'}


class TestScaled:
    def test_by_hand(self):
        losses = {
            'loss_cls': torch.tensor(4.0),
            'loss_rpn_cls': [torch.tensor(2.0), torch.tensor(6.0)],
            's0.loss_cls': torch.tensor(1.0),
            'acc': torch.tensor(50.0),
        }
        factors = {r'loss_cls': 0.5, r'loss_rpn_cls': 0.0}
        for weight, cls, rpn in (
            (1.0, 2.0, [0.0, 0.0]),
            (0.5, 3.0, [1.0, 3.0]),  # half way from stock
            (0.0, 4.0, [2.0, 6.0]),
            (3.0, 2.0, [0.0, 0.0]),  # never beyond
        ):
            result = scaled(losses, factors, weight)
            assert result['loss_cls'] == cls
            assert result['loss_rpn_cls'] == rpn
            assert result['s0.loss_cls'] == 1  # whole names alone
            assert result['acc'] == 50

    def test_a_factor_of_0_takes_away_what_is_not_finite(self):
        """NaN times 0 is NaN, and so is the gradient of log(0) times 0."""
        weight = torch.zeros(2, requires_grad=True)
        losses = {
            'loss_cls': weight.log().sum(),
            'loss_rpn_cls': [weight.sum() * float('nan'), weight.sum()],
        }
        result = scaled(losses, {'loss_(rpn_)?cls': 0.0}, 1.0)
        assert result['loss_cls'] == 0
        assert result['loss_rpn_cls'] == [0, 0]
        (
            result['loss_cls'] + sum(result['loss_rpn_cls']) + weight.sum()
        ).backward()
        assert weight.grad.tolist() == [1, 1]
        half = scaled(losses, {'loss_cls': 0.0}, 0.5)
        assert half['loss_cls'] == -torch.inf

    @pytest.mark.parametrize('weight', [0.5, 1.0])
    def test_all_parameters_of_distributed_steps_have_a_gradient(
        self, monkeypatch, weight
    ):
        """Without a loss of its own, the box branch has a gradient of 0."""
        monkeypatch.setattr('mmkd.core.distiller.is_distributed', lambda: True)
        alone = dict(FRCNN, bounded=None, lambda_reg=0.0, mu=0.0)
        distiller = built({'kd': dict(alone, loss_weight=weight)})
        distiller.attach()
        student = distiller.student
        losses = tiny.seeded_loss(student, *tiny.batch_for(student))
        assert ('idle.loss' in losses) == (weight == 1)
        sum(
            sum(v) if isinstance(v, list) else v
            for k, v in losses.items()
            if 'loss' in k
        ).backward()
        assert all(p.grad is not None for p in student.parameters())
        box = student.roi_head.bbox_head.fc_reg.weight.grad
        assert box.any() == (weight == 0.5)

    def test_without_factors_they_are_the_same_objects(self):
        losses = {'loss_cls': torch.tensor(4.0)}
        assert scaled(losses, {}, 1.0) is losses


class TestBuilding:
    def test_adapters_depend_on_the_seed_alone(self):
        states = []
        for seed, draws in ((1, 0), (1, 7), (2, 0)):
            torch.rand(draws)
            before = capture()
            student_config = tiny.faster_rcnn()
            student = tiny.build(student_config)
            distiller = build_distiller(
                dict(teacher=describe(student_config), methods={'hint': HINT}),
                student,
                tiny.CLASSES,
                seed,
            )
            assert toy.same(capture(), before)
            states.append(distiller.state_dict())
        assert toy.same(states[0], states[1])
        assert not toy.same(states[0], states[2])

    def test_the_student_is_left_as_it_was(self):
        config = tiny.faster_rcnn(backbone__norm_eval=True)
        student = tiny.build(config)
        student.neck.eval()
        state = copy.deepcopy(student.state_dict())
        modes = [m.training for m in student.modules()]
        build_distiller(
            dict(teacher=describe(config), methods={'hint': HINT}),
            student,
            tiny.CLASSES,
        )
        assert toy.same(student.state_dict(), state)
        assert [m.training for m in student.modules()] == modes

    def test_a_detector_that_cannot_run_alone(self):
        """What it has produced is kept, and why it ended is noted."""

        class Stubborn(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone = nn.Conv2d(3, 4, 1)

            def forward(self, inputs, samples, mode):
                self.backbone(inputs)
                raise RuntimeError('more is needed')

        model = Stubborn()
        outputs = blank_pass(model, ['backbone'], torch.device('cpu'))
        assert outputs.features('backbone')[0].shape == (1, 4, 320, 320)
        with pytest.raises(Exception, match='more is needed'):
            outputs.features('neck.missing')

    @pytest.mark.parametrize(
        ('name', 'fits'),
        [
            ('hint', True),
            ('lad_2', True),
            ('a.b', False),
            ('a b', False),
            ('items', False),
            ('training', False),
            ('', False),
            (3, False),
        ],
    )
    def test_names_of_methods(self, name, fits):
        if fits:
            assert name in built({name: HINT}, tiny.retinanet()).methods
        else:
            with pytest.raises(ConfigError, match=f'"{name}" cannot be'):
                built({name: HINT}, tiny.retinanet())


@METHODS.register_module()
class Refusing(Method):
    """Refuses an option of its own with a plain error."""

    def __init__(self, *, size, loss_weight=1.0):
        super().__init__(loss_weight=loss_weight)
        if size < 3:
            raise ValueError(f'size must be at least 3, got {size}')


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(size=1), r'methods\.own \(Refusing\): size must be .*got 1'),
        (dict(), r"methods\.own \(Refusing\): .*argument: 'size'"),
    ],
)
def test_what_a_method_refuses_says_where(options, message):
    with pytest.raises(ConfigError, match=message):
        built({'own': dict(type='mmkd.Refusing', **options)})


@METHODS.register_module(name='Counting', force=True)
class Counting(Method):
    """Logs a number beside its loss."""

    def forward(self, student, teacher, batch):
        self.statistics = dict(hits=torch.tensor(1000.0))
        return dict(kept=batch.inputs.mean() * 0)


def test_no_number_is_added_to_the_loss_by_its_name():
    """MMDetection adds up whatever has "loss" in its name."""
    student = tiny.build(tiny.gfl())
    batch = tiny.batch_for(student)

    def step(name):
        cfg = dict(
            teacher=describe(tiny.gfl()),
            methods={name: dict(type='mmkd.Counting')},
        )
        distiller = build_distiller(cfg, student, tiny.CLASSES)
        distiller.attach()
        try:
            return student.parse_losses(student.loss(*batch))
        finally:
            distiller.detach()

    total, logged = step('hint')
    assert logged['hint.hits'] == 1000
    assert total.item() < 1000
    with pytest.raises(ConfigError, match=r'"hint_loss\.hits" is a number'):
        step('hint_loss')
    peers = dict(loss_net=dict(config=dict(model=tiny.gfl())))
    with pytest.raises(ConfigError, match=r'"loss_net\.acc" is a number'):
        build_distiller(dict(peers=peers), student, tiny.CLASSES)
