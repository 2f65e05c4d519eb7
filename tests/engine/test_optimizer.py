"""One optimiser, whose settings by name are those of the student."""

import copy

import pytest
from mmengine.config import ConfigDict
from mmengine.optim import (
    DefaultOptimWrapperConstructor,
    OptimWrapper,
    OptimWrapperDict,
    build_optim_wrapper,
)
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch.optim import SGD

from mmkd.core.distiller import build_distiller
from mmkd.engine.optimizer import build_for
from mmkd.errors import ConfigError
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy

LR, DECAY = 0.5, 0.25
METHODS = dict(
    backbone_hint=dict(type='mmkd.FeatureHint', adapt=True),
    other=dict(type='mmkd.FeatureHint', adapt=True),
)


def attached(methods=METHODS, **cfg):
    student = tiny.build(tiny.retinanet())
    teacher = dict(config=dict(model=tiny.retinanet()), checkpoint=None)
    if 'peers' not in cfg:
        cfg['teacher'] = teacher
    distiller = build_distiller(
        dict(methods=methods, **cfg), student, tiny.CLASSES
    )
    distiller.attach()
    return distiller


def settings(**cfg):
    optimizer = dict(type='SGD', lr=LR, weight_decay=DECAY, momentum=0.9)
    return ConfigDict(type='OptimWrapper', optimizer=optimizer, **cfg)


def built(distiller, cfg):
    return build_for(
        distiller, cfg, lambda c: build_optim_wrapper(distiller.student, c)
    )


def by_name(wrapper, student):
    """The settings of each trained parameter; each is there once."""
    found = {}
    names = {id(p): name for name, p in student.named_parameters()}
    for group in wrapper.optimizer.param_groups:
        for parameter in group['params']:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group['lr'], group['weight_decay'])
    trained = [n for n, p in student.named_parameters() if p.requires_grad]
    assert found.keys() == {*trained}
    return found


def of(found, *parts):
    chosen = {s for name, s in found.items() if all(p in name for p in parts)}
    assert chosen, parts
    return chosen


BACKBONE = dict(backbone=dict(lr_mult=0.1, decay_mult=0.0))


class TestCustomKeys:
    def test_those_of_the_student_are_not_for_the_methods_layers(self):
        distiller = attached()
        paramwise = dict(custom_keys=BACKBONE)
        wrapper = built(distiller, settings(paramwise_cfg=paramwise))
        found = by_name(wrapper, distiller.student)
        for name, values in found.items():
            mine = name.startswith('backbone.')
            assert values == ((LR * 0.1, 0.0) if mine else (LR, DECAY)), name
        assert of(found, 'distillation.methods.backbone_hint')
        assert of(found, 'distillation.methods.other')

    @pytest.mark.parametrize(
        'key',
        ['distillation.methods.backbone_hint', 'backbone_hint', 'methods.ba'],
    )
    def test_those_that_are_for_a_method(self, key):
        """By the whole name, or by words that no network has."""
        distiller = attached()
        paramwise = dict(custom_keys={**BACKBONE, key: dict(lr_mult=3.0)})
        wrapper = built(distiller, settings(paramwise_cfg=paramwise))
        found = by_name(wrapper, distiller.student)
        assert of(found, 'methods.backbone_hint') == {(LR * 3, DECAY)}
        assert of(found, 'methods.other') == {(LR, DECAY)}
        assert found['backbone.conv1.weight'] == (LR * 0.1, 0.0)

    def test_the_student_s_groups_are_those_of_plain_training(self):
        """In the same order, with the layers behind them, as ever."""
        distiller = attached()
        cfg = settings(paramwise_cfg=dict(custom_keys=BACKBONE))
        plain = build_optim_wrapper(tiny.build(tiny.retinanet()), cfg)
        wrapper = built(distiller, cfg)
        ours = wrapper.optimizer.param_groups
        theirs = plain.optimizer.param_groups

        def alike(group):
            shapes = [tuple(p.shape) for p in group['params']]
            return {**group, 'params': shapes}

        assert [*map(alike, ours[: len(theirs)])] == [*map(alike, theirs)]
        layers = [p for g in ours[len(theirs) :] for p in g['params']]
        expected = list(distiller.methods.parameters())
        assert [id(p) for p in layers] == [id(p) for p in expected]

    def test_a_key_that_is_in_no_name_is_said(self, logged):
        distiller = attached()
        keys = dict(
            bakbone=dict(lr_mult=0.1),
            backbone=dict(lr_mult=0.1),
            other=dict(lr_mult=2.0),
        )
        built(distiller, settings(paramwise_cfg=dict(custom_keys=keys)))
        said = [text for text in logged if 'custom_keys' in text]
        assert said == [
            'optim_wrapper.paramwise_cfg.custom_keys: "bakbone" is in the '
            'name of no parameter and changes nothing'
        ]

    def test_peers_are_told_by_their_own_names(self):
        features = dict(type='mmkd.MGD')  # which has layers
        distiller = attached(
            dict(backbone_dml=dict(type='mmkd.DML', features=features)),
            peers=dict(second=dict(config=dict(model=tiny.retinanet()))),
        )
        paramwise = dict(custom_keys=BACKBONE)
        wrapper = built(distiller, settings(paramwise_cfg=paramwise))
        found = by_name(wrapper, distiller.student)
        assert of(found, 'peers.second.model.backbone') == {(LR * 0.1, 0.0)}
        assert of(found, 'peers.second.model.bbox_head') == {(LR, DECAY)}
        assert of(found, 'distillation.methods.') == {(LR, DECAY)}


class TestKindsOfParameters:
    def test_biases_of_the_layers_are_biases(self):
        distiller = attached()
        paramwise = dict(bias_lr_mult=2.0, bias_decay_mult=0.0)
        wrapper = built(distiller, settings(paramwise_cfg=paramwise))
        found = by_name(wrapper, distiller.student)
        assert of(found, 'methods.other', 'weight') == {(LR, DECAY)}
        assert of(found, 'methods.other', 'bias') == {(LR * 2, 0.0)}


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name='ToyLayerDecay')
class LayerDecay(DefaultOptimWrapperConstructor):
    """Scales by the depth of a part; it knows those of detectors alone."""

    depths = dict(backbone=2, neck=1, bbox_head=0)

    def add_params(self, params, module, **kwargs):
        for name, parameter in module.named_parameters():
            depth = self.depths[name.partition('.')[0]]
            rate = self.paramwise_cfg['decay_rate'] ** depth
            params.append(dict(params=[parameter], lr=self.base_lr * rate))


@OPTIM_WRAPPER_CONSTRUCTORS.register_module(name='ToySeveral')
class Several:
    """Gives the backbone an optimiser of its own."""

    def __init__(self, optim_wrapper_cfg, paramwise_cfg=None):
        pass

    def __call__(self, model):
        named = list(model.named_parameters())
        own = [p for n, p in named if n.startswith('backbone')]
        others = [p for n, p in named if not n.startswith('backbone')]
        return OptimWrapperDict(
            backbone=OptimWrapper(SGD(own, lr=0.1)),
            others=OptimWrapper(SGD(others, lr=0.1)),
        )


class TestConstructors:
    def test_one_that_knows_only_the_student(self):
        distiller = attached()
        cfg = settings(
            constructor='ToyLayerDecay', paramwise_cfg=dict(decay_rate=0.5)
        )
        found = by_name(built(distiller, cfg), distiller.student)
        assert of(found, 'backbone.layer1') == {(LR * 0.25, DECAY)}
        assert of(found, 'neck.') == {(LR * 0.5, DECAY)}
        assert of(found, 'distillation.methods.') == {(LR, DECAY)}

    def test_several_optimisers_get_every_parameter(self):
        distiller = attached()
        wrapper = built(distiller, settings(constructor='ToySeveral'))
        trained = {
            id(p)
            for group in wrapper.param_groups.values()
            for part in group
            for p in part['params']
        }
        assert {id(p) for p in distiller.methods.parameters()} <= trained


class TestBuilt:
    """An optimiser that the runner is given, not its config."""

    def test_it_must_have_the_methods_layers(self):
        distiller = attached()
        own = [
            p
            for n, p in distiller.student.named_parameters()
            if not n.startswith('distillation')
        ]
        given = OptimWrapper(SGD(own, lr=0.1))
        described = ConfigDict(optimizer=given.optimizer)
        for cfg in (given, described):
            with pytest.raises(ConfigError, match=r'methods\.backbone_hint'):
                build_for(distiller, cfg, lambda _: given)

    def test_one_that_has_them(self):
        distiller = attached()
        wrapper = OptimWrapper(SGD(distiller.student.parameters(), lr=0.1))
        assert build_for(distiller, wrapper, lambda c: c) is wrapper


def test_a_training_moves_what_the_backbone_s_key_would_have_frozen(tmp_path):
    cfg = toy.distilled(tmp_path, toy.RETINANET, methods=METHODS, images=2)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.optim_wrapper.paramwise_cfg = dict(
        custom_keys={'backbone': dict(lr_mult=0.0, decay_mult=0.0)}
    )
    runner, first = toy.build(cfg), {}
    original = runner._init_model_weights

    def remember():
        original()
        first.update(copy.deepcopy(runner.model.state_dict()))

    runner._init_model_weights = remember
    runner.train()
    saved = toy.load(tmp_path / 'epoch_1.pth')
    layers = saved['distillation']['state_dict']
    moved = {name for name in layers if (layers[name] != first[name]).any()}
    assert {name.split('.')[2] for name in moved} == {*METHODS}
    name = 'backbone.layer3.0.conv1.weight'
    assert toy.same(saved['state_dict'][name], first[name])
