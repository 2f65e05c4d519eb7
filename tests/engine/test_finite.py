"""Checkpoints hold finite numbers, or are not written."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from mmkd.engine.finite import FiniteState, finite, in_words, shows_finite
from mmkd.errors import NonFiniteError
from tests.helpers import toy

NAN, INF = float('nan'), float('inf')


class TestFinite:
    @pytest.mark.parametrize(
        ('numbers', 'expected'),
        [
            ([1.0, -2.0], True),
            ([1.0, NAN], False),
            ([-INF, 1.0], False),
            ([INF, -INF], False),
            ([3e38, 3e38], True),  # only their sum is infinite
            ([], True),
        ],
    )
    @pytest.mark.parametrize(
        'dtype', [torch.float32, torch.bfloat16, torch.float64]
    )
    def test_a_tensor(self, numbers, expected, dtype):
        tensors = [torch.ones(3), torch.tensor(numbers, dtype=dtype)]
        assert finite(tensors).tolist() == [True, expected]

    def test_half_precision_whose_sum_overflows(self):
        assert finite([torch.full((8,), 6e4, dtype=torch.half)]).tolist() == [
            True
        ]

    def test_sparse_gradients_and_none(self):
        layer = torch.nn.Embedding(4, 2, sparse=True)
        (layer(torch.tensor([1])) * NAN).sum().backward()
        assert finite([layer.weight.grad]).tolist() == [False]
        assert finite([]).tolist() == []


class TestShowsFinite:
    """Parts of gradients show what is not finite in a layer."""

    LAYERS = {
        'linear': (torch.nn.Linear(96, 64), (5, 96)),
        'convolution': (torch.nn.Conv2d(32, 48, 3, padding=1), (2, 32, 1, 1)),
        'strided': (torch.nn.Conv2d(8, 64, 7, 2, 3), (1, 8, 9, 9)),
        'dilated': (
            torch.nn.Conv2d(32, 32, 3, padding=12, dilation=12),
            (1, 32, 4, 4),
        ),
        'transposed': (
            torch.nn.ConvTranspose2d(32, 32, 4, 2, 1),
            (1, 32, 3, 3),
        ),
        'depthwise': (
            torch.nn.Conv2d(512, 512, 3, padding=1, groups=512),
            (1, 512, 4, 4),
        ),
    }

    @pytest.mark.parametrize('value', [NAN, INF])
    @pytest.mark.parametrize(
        ('where', 'vectors'),
        [('outputs', True), ('outputs', False), ('inputs', False)],
    )
    @pytest.mark.parametrize('name', LAYERS)
    def test_what_reaches_a_weight(self, name, where, vectors, value):
        layer, shape = self.LAYERS[name]
        assert layer.weight.numel() > 4096
        generator = torch.Generator().manual_seed(0)
        inputs = torch.rand(shape, generator=generator).round()  # zeros, too
        if where == 'inputs':
            inputs.view(-1)[inputs.numel() // 3] = value
        outputs = layer(inputs)
        gradient = torch.ones_like(outputs)
        if where == 'outputs':
            gradient.view(-1)[gradient.numel() // 3] = value
        layer.zero_grad()
        outputs.backward(gradient)
        found = [layer.weight.grad] + [layer.bias.grad] * vectors
        assert not found[0].isfinite().all()
        assert not shows_finite(found)

    def test_what_is_finite(self):
        weight = torch.full((64, 128), 3e38)
        assert shows_finite([torch.ones(64, 128, 3, 3), torch.ones(64)])
        assert not shows_finite([weight])  # its sums are infinite
        assert finite([weight]).all()  # which is then told
        assert shows_finite([])


class TestFiniteState:
    def test_what_was_not_finite_at_the_beginning(self):
        mask = torch.tensor([0.0, -INF, -INF])
        state = FiniteState({'mask': mask, 'w': torch.ones(3)}, {})
        assert state.at_the_beginning == ['mask']

        def problems(**tensors):
            return state.problems(tensors, {})

        assert problems(mask=mask) == []
        assert problems(mask=torch.tensor([0.0, 0.0, -INF])) == []
        assert problems(mask=torch.tensor([-INF, -INF, -INF])) == ['mask']
        assert problems(mask=torch.tensor([0.0, NAN, -INF])) == ['mask']
        # Of another size, it cannot be compared number by number.
        assert problems(mask=torch.tensor([-INF] * 5)) == []
        assert problems(mask=torch.tensor([NAN] * 5)) == ['mask']
        assert problems(w=torch.tensor([INF, 1.0, 1.0])) == ['w']

    def test_what_did_not_exist_then(self):
        state = FiniteState({}, {})
        assert state.problems({'late_mask': torch.tensor(-INF)}, {}) == []
        assert state.problems({'late': torch.tensor(NAN)}, {}) == ['late']
        moments = {'state': {0: {'exp_avg_sq': torch.tensor(INF)}}}
        assert state.problems({}, moments) == ['optimizer.state.0.exp_avg_sq']

    def test_a_resumed_optimizer(self):
        moments = {'state': {0: {'exp_avg_sq': torch.tensor(INF)}}}
        state = FiniteState({}, moments)
        assert state.problems({}, moments) == []

    def test_all_places_of_a_checkpoint(self):
        bad, good = torch.tensor(NAN), torch.ones(1)
        state = FiniteState({'w': good, 'distillation.a': good}, {})
        checkpoint = {
            'meta': {'nan': bad},
            'state_dict': {'w': bad, 'count': torch.tensor(3)},
            'ema_state_dict': {'module.w': torch.tensor(INF)},
            'distillation': {
                'state_dict': {'distillation.a': bad},
                'ema_state_dict': {'module.distillation.a': bad},
            },
            'optimizer': {'state': {0: {'m': bad, 'step': 3}}},
        }
        found = state.problems_of(checkpoint)
        assert found == [
            'state_dict: w',
            'ema_state_dict: module.w',
            'distillation.state_dict: distillation.a',
            'distillation.ema_state_dict: module.distillation.a',
            'optimizer.state.0.m',
        ]
        assert in_words(found) == f'{", ".join(found[:3])} and 2 more'


PLACES = {
    'buffer': (
        lambda runner: runner.model.backbone.bn1.running_var,
        'state_dict: backbone.bn1.running_var',
    ),
    'average': (
        lambda runner: next(
            h.ema_model.module.backbone.conv1.weight.data
            for h in runner.hooks
            if hasattr(h, 'ema_model')
        ),
        'state_dict: backbone.conv1.weight',
    ),
    'optimizer': (
        lambda runner: next(
            iter(runner.optim_wrapper.optimizer.state.values())
        )['momentum_buffer'],
        'optimizer.state.0.momentum_buffer',
    ),
}


@HOOKS.register_module(name='ToySpoil', force=True)
class Spoil(Hook):
    """Spoils a tensor after the last step of the second epoch."""

    priority = 'LOW'

    def __init__(self, place, in_validation=False):
        self.place, self.in_validation = place, in_validation

    def spoil(self, runner):
        PLACES[self.place][0](runner).view(-1)[0] = NAN

    def after_train_epoch(self, runner):
        if runner.epoch == 1 and not self.in_validation:
            self.spoil(runner)

    def before_val_epoch(self, runner):
        if runner.epoch == 2 and self.in_validation:
            self.spoil(runner)


def config(tmp_path, place, **checkpoint):
    cfg = toy.plain(tmp_path, toy.RETINANET, images=2, epochs=3)
    cfg.runner_type = toy.RUNNER
    cfg.default_hooks.checkpoint.update(max_keep_ckpts=1, **checkpoint)
    if not checkpoint:
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    if place == 'average':
        cfg.custom_hooks = [dict(type='EMAHook')]
    return cfg


@pytest.mark.parametrize('place', ['buffer', 'average', 'optimizer'])
def test_a_checkpoint_that_is_refused(tmp_path, place):
    """The last finite one stays, though only one is kept."""
    text = (
        r'^the checkpoint of iteration 2 is not saved, because '
        rf'{PLACES[place][1]} holds NaN or infinite numbers.*The last '
        r'checkpoint, \S+/epoch_1\.pth, held only finite numbers'
    )
    with pytest.raises(NonFiniteError, match=text):
        toy.train(config(tmp_path, place), Spoil(place))
    assert [p.name for p in tmp_path.glob('*.pth')] == ['epoch_1.pth']
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_1.pth')
    saved = toy.load(tmp_path / 'epoch_1.pth')
    assert all(
        finite([*map(torch.Tensor.float, saved['state_dict'].values())])
    )


def test_a_peer_s_weights(tmp_path):
    """No file is written, neither the student's nor the peer's."""
    cfg = config(tmp_path, 'none')
    second = dict(config=toy.teacher_config(cfg), checkpoint=None)
    cfg.distillation = dict(
        peers=dict(second=second), methods=dict(dml=dict(type='mmkd.DML'))
    )

    class SpoilPeer(Hook):
        def after_train_epoch(self, runner):
            if runner.epoch == 1:
                model = runner.distiller.peers.second.model
                model.bbox_head.retina_cls.bias.data[0] = INF

    place = r'distillation\.peers\.second\.model\.bbox_head\.retina_cls\.bias'
    with pytest.raises(NonFiniteError, match=place):
        toy.train(cfg, SpoilPeer())
    for folder in (tmp_path, tmp_path / 'second'):
        assert [p.name for p in folder.glob('*.pth')] == ['epoch_1.pth']


def test_the_best_checkpoint_stays(tmp_path):
    """What a validation breaks is neither the best nor the last."""
    cfg = config(tmp_path, 'buffer', save_best='falling', rule='less')
    cfg.val_evaluator = dict(type='ToyFalling')
    with pytest.raises(NonFiniteError, match='is not saved'):
        toy.train(cfg, Spoil('buffer', in_validation=True))
    names = sorted(p.name for p in tmp_path.glob('*.pth'))
    assert names == ['best_falling_epoch_1.pth', 'epoch_2.pth']
    for name in names:
        state = toy.load(tmp_path / name)['state_dict']
        assert state['backbone.bn1.running_var'].isfinite().all()


def test_a_mask_of_infinite_numbers_is_saved(tmp_path):
    cfg = config(tmp_path, 'none')
    cfg.train_cfg.max_epochs = 1
    runner = toy.build(cfg)
    mask = torch.full((2, 2), -INF).triu(1)
    runner.model.register_buffer('mask', mask)
    runner.train()
    assert torch.equal(
        toy.load(tmp_path / 'epoch_1.pth')['state_dict']['mask'], mask
    )


def test_the_command_and_what_resumes(tmp_path):
    """It ends with status 1 and one line, which names where to go on."""
    cfg = config(tmp_path / 'run', 'none')
    cfg.custom_imports = dict(imports=[__name__])
    cfg.custom_hooks = [dict(type='ToySpoil', place='buffer')]
    path = toy.write(cfg, tmp_path / 'config.py')
    job = toy.tool(tmp_path / 'log', 'tools/train.py', path)
    assert job.process.exitcode == 1
    last = job.text().strip().splitlines()[-1]
    assert last.startswith('error: the checkpoint of iteration 2 is not saved')
    checkpoint = tmp_path / 'run' / 'epoch_1.pth'
    assert f'--resume {checkpoint} ' in last
    job = toy.tool(
        *(tmp_path / 'log', 'tools/train.py', path, '--resume', checkpoint),
        *('--cfg-options', 'custom_hooks=[]'),
    )
    assert job.process.exitcode == 0, job.text()[-3000:]
    assert Path(tmp_path / 'run' / 'epoch_3.pth').exists()
