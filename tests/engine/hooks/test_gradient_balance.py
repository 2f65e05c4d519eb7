"""The share of a method in the gradient, held by its weight."""

import json
from pathlib import Path

import pytest

from mmkd.engine.hooks import GradientBalanceHook
from mmkd.engine.hooks.gradient_balance import change
from mmkd.errors import ConfigError, TapError
from tests.engine.test_distributed import config as in_two
from tests.engine.test_distributed import launch, records
from tests.engine.test_resume import by_iteration, memories, train_and_resume
from tests.helpers import (
    faults,  # noqa: F401 registers broken methods
    tiny_dense,
    toy,
)
from tests.helpers import tiny_detectors as tiny
from tests.helpers.balanced import Steps, distilled
from tests.helpers.together import Networks

HINT, KD = dict(type='mmkd.FeatureHint'), dict(type='mmkd.KD')
FRCNN, LAD = toy.FRCNN, toy.LAD
STILL = dict(share=0.5, tolerance=0.4999999)
"""No weight changes between nearly 0 and nearly 1."""


class TestChange:
    """Worked out by hand, from 0.2 to 0.3."""

    @pytest.mark.parametrize(
        ('share', 'expected'),
        [
            (0.2, 1),
            (0.25, 1),
            (0.3, 1),
            (0.5, 3 / 7),  # as large as the rest: to 3/7 of it
            (0.1, 9 / 4),  # a ninth of the rest: to a quarter
            (0.96, 0.1),  # 3/7 of a 24th is less than a tenth
            (1.0, 0.1),
            (0.02, 10),
            (0.0, 10),
        ],
    )
    def test_values(self, share, expected):
        assert change(share, 0.2, 0.3) == pytest.approx(expected)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(share=0), r'\.share must be above 0 and below 1, got 0'),
        (dict(share={'kd': 1.0}), r'share must be .*, got \{\'kd\': 1.0\}'),
        (dict(share={}), r'share must be .*, got \{\}'),
        (dict(tolerance=0.3), 'below the share, got 0.3'),
        (dict(tolerance=-0.1), 'at least 0 and below the share, got -0.1'),
        (dict(interval=0), 'a whole number of at least 1, got 0'),
        (dict(interval=2.5), 'a whole number of at least 1, got 2.5'),
        (dict(smoothing=1.0), 'at least 0 and below 1, got 1.0'),
        (dict(bounds=(2, 10)), r'a number above 0 up to 1.*got \(2, 10\)'),
        (dict(bounds=(0, 10)), r'a number above 0 up to 1.*got \(0, 10\)'),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ConfigError, match=message):
        GradientBalanceHook(**options)


# ------------------------------------------------- steps of a real detector


class TestShare:
    """Beside passes of their own with respect to the outputs of the neck."""

    @pytest.mark.parametrize(
        ('method', 'model'),
        [
            (dict(type='mmkd.PKD'), 'retinanet'),
            (KD, 'retinanet'),
            (dict(type='mmkd.CrossKD', layer=1), 'gfl'),
            (dict(type='mmkd.LD'), 'gfl'),
            (FRCNN, 'faster_rcnn'),
            (KD, 'cascade_rcnn'),
            (dict(type='mmkd.SoftLabelDistillation'), 'paa'),
            (dict(type='mmkd.SoLAD'), 'paa'),
            (HINT, 'detr'),
        ],
        ids=lambda value: value if isinstance(value, str) else value['type'],
    )
    def test_of_each_kind(self, method, model):
        build = getattr(tiny, model, None) or getattr(tiny_dense, model)
        steps = Steps(distilled({'m': method}, build()))
        found = steps()
        assert 0 < found['m'] < 1
        assert found == pytest.approx(steps.expected, rel=1e-4)
        changed = change(found['m'], 0.25, 0.35)
        assert steps.factors == {'m': pytest.approx(changed)}

    def test_of_peers(self):
        """In the student; the factor is that of all networks."""
        peer = {'peer': tiny.retinanet()}
        networks = Networks(
            {'m': dict(type='mmkd.DML')}, tiny.retinanet(), peer
        )
        steps = Steps(networks.distiller)
        found = steps()
        assert 0 < found['m'] < 1
        assert found == pytest.approx(steps.expected, rel=1e-4)
        assert steps.factors['m'] != 1

    def test_of_several(self):
        """Beside each other; what is not balanced belongs to the rest."""
        methods = {
            'pkd': dict(type='mmkd.PKD'),
            'kd': KD,
            'off': dict(HINT, loss_weight=0.0),
        }
        steps = Steps(distilled(methods), share=0.2)
        found = steps()
        assert found.keys() == {'pkd', 'kd'}
        assert found == pytest.approx(steps.expected, rel=1e-4)
        for _ in range(12):
            found = steps()
        assert all(0.149 < share < 0.251 for share in found.values())
        assert steps.factors['off'] == 1

        one = Steps(distilled(methods), share={'kd': 0.2})
        assert one().keys() == {'kd'}
        assert one.factors['pkd'] == 1

    def test_the_factor_multiplies_the_losses(self):
        distiller = distilled({'kd': KD})
        distiller.attach()
        batch = tiny.batch_for(distiller.student)
        once = tiny.seeded_loss(distiller.student, *batch)
        distiller.balances['kd'] = 0.25
        distiller.scales['kd'] = 2.0
        half = tiny.seeded_loss(distiller.student, *batch)
        assert half['kd.loss_cls'].item() == once['kd.loss_cls'].item() / 2
        assert half['loss_cls'] == once['loss_cls']

    def test_a_schedule_is_not_made_up_for(self):
        whole, half = (Steps(distilled({'kd': KD})) for _ in range(2))
        half.distiller.scales['kd'] = 0.5
        assert half() == pytest.approx(whole(), rel=1e-5)
        assert half.expected['kd'] < 0.9 * whole.expected['kd']
        assert half.factors == pytest.approx(whole.factors)
        half.distiller.scales['kd'] = 0.0
        assert half() == {}  # it waits until the method runs
        half.distiller.scales['kd'] = 1.0
        assert half().keys() == {'kd'}

    def test_the_average(self):
        """3/4 of the average of the norms remain, after the first ones."""
        steps = Steps(distilled({'kd': KD}), smoothing=0.75, **STILL)
        shares, found = [], []
        for seed in range(6):
            found.append(steps(seed=seed)['kd'])
            shares.append(steps.expected['kd'])
        assert steps.factors == {'kd': 1}
        assert found[0] == pytest.approx(shares[0], rel=1e-4)
        assert len(set(found)) == 6
        assert max(found) - min(found) < max(shares) - min(shares)


class TestInterval:
    def test_every_third(self):
        steps = Steps(distilled({'kd': KD}), interval=3, **STILL)
        measured = [bool(steps()) for _ in range(7)]
        assert measured == [True, False, False, True, False, False, True]

    def test_again_after_the_largest_change(self):
        """Until it is near, which the next interval need not wait for."""
        method = dict(KD, loss_weight=1e5)
        steps = Steps(distilled({'kd': method}), interval=50, bounds=(1e-9, 9))
        while steps():
            pass
        measured = steps.runner.iter - 1
        assert 3 < measured < 10
        before, factor = 10.0 ** -(measured - 1), steps.factors['kd']
        assert before / 10 < factor < before  # all but the last by a tenth

    def test_nothing_else_is_watched(self):
        """Between measurements a student carries nothing of the hook."""
        steps = Steps(distilled({'kd': KD}), interval=3, **STILL)
        for _ in range(3):
            steps()
            assert not any(
                'forward' in vars(m) for m in steps.student.modules()
            )


class TestWhatHasNoShare:
    def test_a_loss_of_0(self):
        steps = Steps(distilled({'m': dict(type='SilentlyZero')}), interval=9)
        found = [steps() for _ in range(5)]
        assert found == [{'m': 0.0}] * 4 + [{}]  # the fourth is at the bound
        assert steps.factors == {'m': 1000}
        assert len(steps.warnings) == 1
        assert '"m" has no gradient at "neck"' in steps.warnings[0]
        assert 'up to 1000 times' in steps.warnings[0]

    def test_a_bound(self):
        method = dict(KD, loss_weight=1e-9)
        steps = Steps(distilled({'kd': method}), bounds=(0.5, 20))
        for _ in range(4):
            steps()
        assert steps.factors == {'kd': 20}
        (text,) = steps.warnings
        assert 'has reached 20 times' in text
        assert 'instead of 0.3' in text

    def test_gradients_that_are_not_finite(self):
        steps = Steps(distilled({'kd': KD}), interval=7)
        method = steps.distiller.methods['kd']
        method.loss_weight = float('nan')
        assert [steps() for _ in range(5)] == [{}] * 5
        assert steps.factors == {'kd': 1}
        (text,) = steps.warnings
        assert '3 measurements in a row were NaN or infinite' in text
        method.loss_weight = 1.0
        assert [bool(steps()) for _ in range(3)] == [False, False, True]
        assert steps.factors['kd'] != 1

    def test_a_method_without_losses(self):
        methods = {'lad': LAD, 'hint': HINT}
        distiller = distilled(methods, tiny_dense.paa())
        steps = Steps(distiller)
        assert steps().keys() == {'hint'}
        assert steps.factors['lad'] == 1
        (text,) = steps.warnings
        assert 'leaves "lad" as it is: LAD steers the student\'s own' in text
        with pytest.raises(ConfigError, match='"lad" cannot have a share'):
            Steps(distiller, share={'lad': 0.3})

    def test_an_unknown_method(self):
        with pytest.raises(ConfigError, match=r'"kdd".*Did you mean "kd"'):
            Steps(distilled({'kd': KD}), share={'kdd': 0.3})

    def test_shares_that_leave_nothing(self):
        with pytest.raises(ConfigError, match=r'a, b, c would have 1\.05'):
            Steps(distilled({'a': KD, 'b': KD, 'c': KD}))

    def test_a_part_that_does_not_exist(self):
        steps = Steps(distilled({'kd': KD}), part='nek')
        with pytest.raises(TapError, match='Did you mean "neck"'):
            steps()

    def test_a_part_that_is_frozen(self):
        model = tiny.retinanet(backbone__frozen_stages=2)
        steps = Steps(distilled({'kd': KD}, model), part='backbone.layer2')
        with pytest.raises(ConfigError, match='all before it are frozen'):
            steps()

    @pytest.mark.parametrize(
        ('method', 'part', 'whose'),
        [
            (HINT, 'bbox_head.retina_cls', 'of "m"'),
            (
                dict(type='mmkd.SoftLabelDistillation', task_loss=False),
                'neck',
                'of other losses',
            ),
        ],
    )
    def test_a_part_that_is_not_reached(self, method, part, whose):
        model = tiny.retinanet() if method is HINT else tiny_dense.paa()
        steps = Steps(distilled({'m': method}, model), part=part)
        with pytest.raises(ConfigError, match=f'no gradient {whose} arrives'):
            steps()

    def test_an_activation_in_place(self):
        """The gradient in front of it, where method and task part."""
        part = 'neck.fpn_convs.0.conv'
        steps = Steps(
            distilled(
                {'m': dict(HINT, source=part)},
                tiny.retinanet(neck__act_cfg=dict(type='ReLU')),
            )
        )
        assert 0 < steps()['m'] < 1


# ----------------------------------------------------------------- real runs


def run(tmp_path, *hooks, methods=None, base=toy.RETINANET, **options):
    """Train an epoch of four iterations, unless ``options`` say otherwise."""
    cfg = toy.distilled(
        tmp_path,
        base,
        methods=methods or {'hint': toy.HINT},
        epochs=options.pop('epochs', 1),
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.default_hooks.checkpoint.interval = -1
    cfg.model.backbone.update(options.pop('backbone', {}))
    cfg.optim_wrapper.update(options.pop('optim', {}))
    if options.pop('balanced', True):
        options = {'interval': 1, 'smoothing': 0.0, **options}
        cfg.custom_hooks = [dict(type='mmkd.GradientBalanceHook', **options)]
    record = toy.Record()
    runner = toy.train(cfg, record, *hooks)
    return runner, record


def logged(runner, name='hint.share'):
    """What the local visualiser has written, by iteration."""
    (path,) = Path(runner.work_dir).rglob('scalars.json')
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    key = f'balance/{name}'
    return {line['step']: line[key] for line in lines if key in line}


CHECKPOINTED = dict(with_cp=True, norm_eval=False, frozen_stages=0)


@pytest.mark.parametrize(
    ('base', 'options'),
    [
        (toy.FASTER_RCNN, {}),
        (
            toy.RETINANET,
            dict(backbone=CHECKPOINTED, part='backbone.layer1'),
        ),
    ],
    ids=['two-stage', 'with_cp'],
)
def test_measuring_changes_nothing(tmp_path, base, options):
    with_it, record = run(tmp_path / 'a', base=base, **STILL, **options)
    assert logged(with_it).keys() == {1, 2, 3, 4}
    assert set(logged(with_it, 'hint.factor').values()) == {1.0}
    options.pop('part', None)
    plain, other = run(tmp_path / 'b', base=base, balanced=False, **options)
    assert record.losses == other.losses
    assert toy.same(record.gradients, other.gradients)
    assert toy.same(record.states, other.states)
    assert toy.same(with_it.model.state_dict(), plain.model.state_dict())


def test_behind_checkpointed_blocks(tmp_path):
    """The shares are those of the same network without checkpoints."""
    found = [
        logged(
            run(
                tmp_path / str(with_cp),
                # Norms that do not count how often a block has run.
                backbone=dict(with_cp=with_cp, frozen_stages=0),
                part='backbone.layer1',
                **STILL,
            )[0]
        )
        for with_cp in (True, False)
    ]
    assert found[0].keys() == {1, 2, 3, 4}
    assert found[0] == pytest.approx(found[1], rel=1e-3)


def test_weight_0_stays_stock(tmp_path):
    off = {'hint': dict(toy.HINT, loss_weight=0.0)}
    _, record = run(tmp_path / 'a', methods=off)
    cfg = toy.plain(tmp_path / 'b', toy.RETINANET)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    other = toy.Record()
    toy.train(cfg, other)
    assert record.losses == other.losses
    assert toy.same(record.gradients, other.gradients)


@pytest.mark.parametrize('wrong', [100, 0.01])
def test_a_wrong_weight_is_put_right(tmp_path, wrong):
    right = 1e-4  # about .3 of the gradient
    hint = dict(toy.HINT, loss_weight=wrong * right)
    runner, _ = run(tmp_path, methods={'hint': hint}, epochs=4, smoothing=0.7)
    shares = [*logged(runner).values()]
    factors = [*logged(runner, 'hint.factor').values()]
    assert len(shares) == 16
    assert (shares[0] > 0.9) if wrong > 1 else (shares[0] < 0.1)
    assert all(0.22 < share < 0.38 for share in shares[8:]), shares
    assert 0.2 < wrong * factors[-1] < 5, factors


@pytest.mark.parametrize('scale', [False, True])
def test_mixed_precision(tmp_path, scale):
    """bfloat16, without and with a scale of the loss."""
    single, _ = run(tmp_path / 'a')
    optim = dict(type='ToyCpuAmpOptimWrapper', scale=scale)
    half, _ = run(tmp_path / 'b', optim=optim)
    expected, found = logged(single), logged(half)
    assert found.keys() == {1, 2, 3, 4}
    assert found[1] == pytest.approx(expected[1], rel=0.03)
    assert all(0 < share < 1 for share in found.values())


def test_resumed_at_any_iteration(tmp_path):
    """In the middle of an optimiser's step and of an interval, too."""
    cfg = by_iteration(
        toy.distilled(
            tmp_path,
            toy.RETINANET,
            methods={'hint': dict(toy.HINT, loss_weight=50.0)},
            epochs=2,
            images=6,
        )
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.optim_wrapper.accumulative_counts = 2
    cfg.custom_hooks = [dict(type='mmkd.GradientBalanceHook', interval=2)]
    whole, _ = train_and_resume(cfg, tmp_path, 1, 2, 5, name='iter_{}.pth')
    kept = [
        {place: value for _, _, place, value in memory}
        for memory in (
            memories(whole / f'iter_{n}.pth')['attributes'] for n in (1, 6)
        )
    ]
    assert kept[0]['balances'] != kept[1]['balances']
    assert kept[0]['_norms'] != kept[1]['_norms']


def test_two_processes_are_one(tmp_path):
    """Both have the factors of one process with the whole batch."""
    balance = dict(type='mmkd.GradientBalanceHook', interval=1)
    factors = {}
    for processes in (2, 1):
        folder = tmp_path / str(processes)
        methods = {'hint': toy.HINT, 'kd': toy.FRCNN}
        cfg = in_two(folder, methods=methods, iterations=2)
        cfg.train_dataloader.batch_size = 2 // processes
        cfg.custom_hooks.append(balance)
        if processes == 2:
            launch(folder, cfg)
        else:
            toy.train(cfg)
        found = [record['balances'] for record in records(folder)]
        assert len(found) == processes
        assert found == [found[0]] * processes
        factors[processes] = found[0]
    assert 1 not in factors[2].values()
    assert factors[2] == pytest.approx(factors[1], rel=1e-3)
