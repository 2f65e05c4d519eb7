"""Methods that never reach the student."""

import copy
import logging

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapperDict, build_optim_wrapper
from torch import nn

from mmkd.core.distiller import build_distiller
from mmkd.core.method import Method
from mmkd.engine.hooks import ReachCheckHook
from mmkd.errors import ConfigError
from mmkd.registry import METHODS
from tests.helpers import (
    faults,  # noqa: F401 registers broken methods
    tiny_dense,
    toy,
)
from tests.helpers import tiny_detectors as tiny

INNER, BLOCK = 'backbone.layer4.1.conv2', 'backbone.layer4.1'
LOGGER = logging.getLogger('reach')


class Neck(Method):
    """Compares necks through a layer of its own; subclasses say how."""

    student_paths = teacher_paths = ('neck',)

    def prepare(self, student, teacher):
        width = student.features('neck')[0].shape[1]
        self.layer = nn.Conv2d(width, width, 1)

    def forward(self, student, teacher, batch):
        ours = student.features('neck')[0]
        theirs = teacher.features('neck', student, 'neck')[0]
        return {'x': (self.layer(self.read(ours)) - theirs).square().mean()}


@METHODS.register_module()
class ReachDetached(Neck):
    def read(self, ours):
        return ours.detach()


@METHODS.register_module()
class ReachTimesZero(Neck):
    def read(self, ours):
        return 0 * ours


@METHODS.register_module()
class ReachFromZero(Neck):
    """Its layer begins with weights of 0, which hide the student at first."""

    def prepare(self, student, teacher):
        super().prepare(student, teacher)
        nn.init.zeros_(self.layer.weight)

    def read(self, ours):
        return ours


@METHODS.register_module()
class ReachTimesZeroBare(ReachTimesZero):
    """Without a layer that could change anything."""

    def prepare(self, student, teacher):
        self.layer = nn.Identity()


@METHODS.register_module()
class ReachOnObjects(ReachDetached):
    """0 without objects."""

    def forward(self, student, teacher, batch):
        objects = sum(len(s.gt_instances) for s in batch.data_samples)
        loss = super().forward(student, teacher, batch)['x']
        return {'x': loss * bool(objects)}


@METHODS.register_module()
class ReachHalf(Neck):
    """One of two losses teaches the layer alone."""

    def forward(self, student, teacher, batch):
        self.read = torch.detach
        still = super().forward(student, teacher, batch)['x']
        return {
            'good': student.features('neck')[1].square().mean(),
            'x': still,
        }


def hint(source='neck', **options):
    return dict(type='mmkd.FeatureHint', source=source, **options)


class Run:
    """A real distilled step with a real optimiser, again and again."""

    def __init__(
        self,
        student,
        methods,
        *,
        optim=None,
        peers=None,
        teachers=1,
        **options,
    ):
        self.model = tiny.build(student)
        described = dict(config=dict(model=student), checkpoint=None)
        cfg = dict(methods=methods)
        if peers is None:
            cfg['teacher'] = described if teachers == 1 else [described] * 2
        else:
            cfg['peers'] = {
                n: dict(config=dict(model=m)) for n, m in peers.items()
            }
        self.distiller = build_distiller(cfg, self.model, tiny.CLASSES)
        self.distiller.attach()
        optim = dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=1e-3),
            **(optim or {}),
        )
        self.optim_wrapper = build_optim_wrapper(self.model, optim)
        self.logger = LOGGER
        self.hook = ReachCheckHook(**options)

    def start(self):
        self.hook.before_train(self)
        return self

    def step(self, **batch):
        inputs, samples = tiny.batch_for(self.model, **batch)
        losses = self.model.loss(inputs, samples)
        self.optim_wrapper.update_params(self.model.parse_losses(losses)[0])

    def error(self, **batch):
        with pytest.raises(ConfigError) as caught:
            self.step(**batch)
        return str(caught.value)


def one(student, method, **options):
    return Run(student, {'m': method}, **options).start()


def checkpointed(**changes):
    return tiny.retinanet(backbone__with_cp=True, **changes)


# ------------------------------------------------------------ where it stops


def test_within_a_checkpointed_block():
    run = one(checkpointed(), hint(INNER))
    before = copy.deepcopy(run.model.state_dict())
    text = run.error()
    assert text.startswith(
        'distillation.methods.m: no gradient of m.loss_hint '
    )
    assert f'Its tap "{INNER}" lies within "{BLOCK}"' in text
    assert 'with_cp=True' in text
    assert text.endswith(f'The nearest module that works is "{BLOCK}".')
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_module_that_is_named_works():
    run = one(checkpointed(), hint(BLOCK))
    plain = Run(checkpointed(), {'m': hint(BLOCK, loss_weight=0.0)}).start()
    for each in (run, plain):
        each.step()
    ours, theirs = (r.model.backbone.state_dict() for r in (run, plain))
    assert not toy.same(ours, theirs)


@pytest.mark.parametrize('block', ['layer2.0', 'layer3.1'])
def test_other_blocks(block):
    run = one(checkpointed(), hint(f'backbone.{block}.bn1'))
    assert f'works is "backbone.{block}' in run.error()


def test_a_tap_that_gives_all_stages():
    """Frozen by the config: an equal number of maps is not to be had."""
    run = one(tiny.retinanet(backbone__frozen_stages=4), hint('backbone'))
    text = run.error()
    assert 'Its tap "backbone" and all before it are frozen' in text
    assert 'requires_grad=False' in text
    assert text.endswith('The nearest module that works is "neck".')


def test_the_frozen_stages_of_a_config():
    student = tiny.retinanet(backbone__frozen_stages=3)
    text = one(student, hint('backbone.layer3')).error()
    assert 'Its tap "backbone.layer3" and all before it are frozen' in text
    nearest = text.split('"')[-2]
    run = one(student, hint(nearest))  # of the same size
    run.step()
    assert not run.hook._waiting
    assert nearest.startswith('neck.lateral_convs.1')


def test_frozen_by_hand():
    run = one(tiny.retinanet(), hint('backbone.layer1'))
    run.model.backbone.requires_grad_(False)
    assert 'are frozen: requires_grad=False' in run.error()


def test_before_any_weight_that_is_trained():
    student = tiny.retinanet(backbone__frozen_stages=1)
    text = one(student, hint('backbone.conv1')).error()
    assert 'Its tap "backbone.conv1" and all before it are frozen' in text


def lr_mult(**keys):
    keys = {k: dict(lr_mult=v) for k, v in keys.items()}
    return dict(paramwise_cfg=dict(custom_keys=keys))


def test_a_learning_rate_of_0():
    run = one(
        tiny.retinanet(), hint('backbone.layer2'), optim=lr_mult(backbone=0)
    )
    text = run.error()
    assert 'weights whose learning rate is 0 (lr_mult=0)' in text
    assert 'works is "neck.lateral_convs.0' in text


def test_weights_that_the_optimiser_does_not_hold():
    run = Run(tiny.retinanet(), {'m': hint('backbone.layer2')})
    names = {'backbone': 0, 'else': 1}
    optimizer = run.optim_wrapper.optimizer
    held = [
        p
        for n, p in run.model.named_parameters()
        if n.partition('.')[0] not in names
    ]
    optimizer.param_groups[0]['params'] = held
    run.start()
    assert 'the optimiser does not hold' in run.error()


@pytest.mark.parametrize('method', ['ReachDetached', 'ReachTimesZeroBare'])
def test_a_method_that_detaches(method):
    text = one(tiny.retinanet(), dict(type=f'mmkd.{method}')).error()
    assert 'the method itself loses them' in text


def test_a_head_without_anything_to_train():
    """A method on logits, behind a student that is frozen altogether."""
    run = one(tiny.gfl(), dict(type='mmkd.KD'))
    for name, parameter in run.model.named_parameters():
        parameter.requires_grad = name.endswith('gfl_reg.weight')
    text = run.error()
    assert 'Its tap "bbox_head"' in text or 'itself loses them' in text


def test_several_optimisers():
    run = Run(tiny.retinanet(), {'m': hint('backbone.layer2')})
    wrappers = {
        part: build_optim_wrapper(
            getattr(run.model, part),
            dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=lr)),
        )
        for part, lr in dict(backbone=0.0, neck=0.1, bbox_head=0.1).items()
    }
    run.optim_wrapper = OptimWrapperDict(**wrappers)
    run.start()
    with pytest.raises(ConfigError, match='learning rate is 0'):
        run.model.loss(*tiny.batch_for(run.model))


# -------------------------------------------------------- each one by itself


def test_each_method_is_judged_by_itself():
    methods = {'good': hint(), 'bad': hint(INNER), 'also': hint(BLOCK)}
    run = Run(checkpointed(), methods).start()
    assert run.error().startswith('distillation.methods.bad: no gradient')


def test_in_the_first_iteration_in_which_it_is_active():
    run = Run(checkpointed(), {'good': hint(), 'bad': hint(INNER)}).start()
    run.distiller.scales['bad'] = 0.0
    run.step()
    run.step()
    assert list(run.hook._waiting) == ['bad']
    run.distiller.scales['bad'] = 0.5
    assert 'distillation.methods.bad' in run.error()


def test_not_on_losses_of_0():
    run = one(tiny.retinanet(), dict(type='mmkd.ReachOnObjects'))
    run.step(objects=0)
    assert 'no gradient of m.loss_x reaches' in run.error()


def warnings_of(caplog):
    """The hook's own: after another training, caplog may hear MMEngine's."""
    return [m for m in caplog.messages if m.startswith('distillation.methods')]


def test_a_loss_without_effect_beside_one_that_has_one(caplog):
    run = one(tiny.retinanet(), dict(type='mmkd.ReachHalf'))
    run.step()
    (warning,) = warnings_of(caplog)
    assert warning.startswith(
        'distillation.methods.m: no gradient of m.loss_x '
    )
    run.step()
    assert len(warnings_of(caplog)) == 1


def test_peers():
    peers = dict(p=tiny.retinanet())
    run = Run(tiny.retinanet(), {'m': dict(type='mmkd.DML')}, peers=peers)
    run.start().step()
    assert not run.hook._waiting


def test_a_method_that_moves_a_peer_alone():
    peers = dict(p=tiny.retinanet())
    method = dict(type='mmkd.TeachesPeersAlone')
    run = Run(tiny.retinanet(), {'m': method}, peers=peers).start()
    assert 'the method itself loses them' in run.error()


def test_several_teachers():
    """Each has a copy of the method."""
    run = Run(checkpointed(), {'m': hint(INNER)}, teachers=2).start()
    text = run.error()
    assert 'no gradient of m.loss_hint_1, m.loss_hint_2 reaches' in text
    assert f'works is "{BLOCK}"' in text


def test_the_hook_may_only_warn(caplog):
    run = one(checkpointed(), hint(INNER), stop=False)
    run.step()
    run.step()
    assert len(warnings_of(caplog)) == 1
    assert f'works is "{BLOCK}"' in caplog.text


# ---------------------------------------------------------- where it does not


def test_a_method_that_steers():
    run = one(tiny_dense.paa(), dict(type='mmkd.LAD'))
    run.step()
    assert not run.hook._waiting


def test_checkpoints_that_are_not_reentrant(monkeypatch):
    """A tap within them has its graph."""
    import mmdet.models.backbones.resnet as resnet
    from torch.utils.checkpoint import checkpoint

    def other(function, *inputs):
        return checkpoint(function, *inputs, use_reentrant=False)

    monkeypatch.setattr(resnet.cp, 'checkpoint', other)
    run = one(checkpointed(), hint(INNER))
    run.step()
    assert not run.hook._waiting


@pytest.mark.parametrize('initial', [True, False])
def test_a_warm_up_from_0(initial):
    """By a scheduler of MMEngine, which notes the rate, or by other means."""
    run = one(tiny.retinanet(), hint('backbone.layer2'))
    for group in run.optim_wrapper.optimizer.param_groups:
        if initial:
            group['initial_lr'] = group['lr']
        group['lr'] = 0.0
    run.step()
    assert not run.hook._waiting


def test_layers_that_begin_with_0():
    run = one(tiny.retinanet(), dict(type='mmkd.ReachFromZero'))
    run.step()
    assert run.hook._waiting
    run.step()
    assert not run.hook._waiting


def test_layers_that_begin_with_0_and_accumulated_gradients():
    run = one(
        tiny.retinanet(),
        dict(type='mmkd.ReachFromZero'),
        optim=dict(accumulative_counts=3),
    )
    for _ in range(3):
        run.step()
        assert run.hook._waiting
    run.step()
    assert not run.hook._waiting


def test_a_gradient_that_stays_0():
    run = one(tiny.retinanet(), dict(type='mmkd.ReachTimesZero'))
    run.step()
    assert 'a factor 0' in run.error()


def test_nothing_is_asked_once_all_are_seen(monkeypatch):
    run = one(checkpointed(), hint())
    run.step()
    monkeypatch.setattr(run.hook, '_reached', None)
    run.step()


def test_a_small_gradient_in_half_precision():
    """Gradients in float16 that would vanish without a factor."""
    run = one(tiny.retinanet(), hint(loss_weight=1e-7))
    with torch.autocast('cpu', torch.float16):
        run.model.loss(*tiny.batch_for(run.model))
    assert not run.hook._waiting


def test_patience():
    with pytest.raises(ConfigError, match='at least 1, got 0'):
        ReachCheckHook(patience=0)
    run = one(tiny.retinanet(), dict(type='mmkd.ReachOnObjects'), patience=2)
    run.step(objects=0)
    run.step(objects=0)
    assert not run.hook._waiting  # LossCheckHook says that it is 0


# ------------------------------------------------------ training is the same


@pytest.mark.parametrize('with_cp', [False, True])
def test_training_is_not_changed(tmp_path, with_cp):
    """Bit for bit, with batch norms in training within checkpoints."""
    runs = []
    for number, hook in enumerate((None, toy.ReachUnchecked())):
        cfg = toy.distilled(
            tmp_path / str(number),
            methods={'hint': toy.HINT, 'kd': toy.FRCNN},
            images=4,
        )
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.model.backbone.update(
            with_cp=with_cp, norm_eval=False, frozen_stages=0
        )
        record = toy.Record()
        runner = toy.train(cfg, record, *([hook] if hook else []))
        hooks = [h for h in runner.hooks if isinstance(h, ReachCheckHook)]
        assert len(hooks) == 1
        assert bool(hooks[0]._waiting) == (hook is not None)
        runs.append((runner.model.state_dict(), record))
    (ours, record), (theirs, other) = runs
    assert toy.same(ours, theirs)
    assert record.losses == other.losses
    assert toy.same(record.gradients, other.gradients)
    assert toy.same(record.states, other.states)


class Freeze(Hook):
    """A hook of the user's that freezes the backbone."""

    def before_train_epoch(self, runner):
        runner.model.backbone.requires_grad_(False)


def test_in_a_real_run(tmp_path):
    cfg = toy.distilled(
        tmp_path, toy.RETINANET, methods={'m': hint('backbone')}, images=2
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    runner = toy.build(cfg)
    runner.register_hook(Freeze())
    with pytest.raises(ConfigError, match='all before it are frozen'):
        runner.train()
    assert runner.iter == 0
