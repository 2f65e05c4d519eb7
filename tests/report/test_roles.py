"""Who is who among trainings, and whether they differ in distillation alone.

The configs are those of real runs; nothing is trained.
"""

import copy
from pathlib import Path

import pytest

from mmkd.report.fairness import problems, remarks, unfinished
from mmkd.report.roles import cast
from mmkd.report.work_dir import WorkDir
from tests.helpers import toy

PKD = {'pkd': dict(type='mmkd.PKD', loss_weight=6.0)}
KD = {'kd': dict(type='mmkd.KD')}


def run(folder, methods=None, *, seed=0, teacher='/runs/big/epoch_2.pth'):
    """A training as it is read back from its work dir."""
    folder = Path('/runs') / folder
    if methods is None:
        config = toy.plain(folder, toy.RETINANET, epochs=2)
    else:
        config = toy.distilled(
            folder,
            toy.RETINANET,
            epochs=2,
            methods=copy.deepcopy(methods),
            teacher=dict(config='/runs/big.py', checkpoint=teacher),
        )
    config.randomness = dict(seed=seed)
    return WorkDir(
        name=folder.name,
        folder=folder,
        config=config,
        config_text='',
        checkpoint=str(folder / 'epoch_2.pth'),
        environment='',
        logged={},
        aps={},
        telemetry={},
    )


def big():
    teacher = run('big')
    teacher.config.model.backbone.depth = 101
    return teacher


def found(*runs):
    return [
        (group.role, group.name, [run.folder.name for run in group.runs])
        for group in cast(runs)
    ]


def test_the_configs_tell_who_is_who_in_any_order():
    expected = [
        ('plain', 'plain', ['a']),
        ('distilled', 'PKD', ['b']),
        ('teacher', 'teacher', ['big']),
    ]
    assert found(run('a'), run('b', PKD), big()) == expected
    assert found(big(), run('b', PKD), run('a')) == expected


def test_a_teacher_whose_folder_was_moved_is_known_by_its_name():
    """The config names the place where it was trained."""
    moved = run('b', PKD, teacher='/elsewhere/big/epoch_2.pth')
    assert found(big(), moved) == [
        ('distilled', 'PKD', ['b']), ('teacher', 'teacher', ['big']),
    ]  # fmt: skip


def test_several_methods_are_named_together_or_apart():
    names = [group.name for group in cast(
        [run('x', PKD), run('y', KD), run('z', {**PKD, **KD})]
    )]  # fmt: skip
    assert names == ['PKD', 'KD', 'PKD + KD']
    long = dict(a=dict(type='mmkd.FasterRCNNDistillation'))
    assert cast([run('x', long)])[0].name == 'FasterRCNN'


def test_what_has_the_same_methods_is_told_apart_by_its_folder():
    strong = {'pkd': dict(type='mmkd.PKD', loss_weight=60.0)}
    runs = [run('strong/run', strong), run('weak/run', PKD)]
    assert [group.name for group in cast(runs)] == [
        'PKD (strong)', 'PKD (weak)',
    ]  # fmt: skip
    assert [run.name for run in runs] == ['PKD (strong)', 'PKD (weak)']


def test_seeds_of_one_network_are_taken_together():
    runs = [run(f's{seed}', seed=seed) for seed in (0, 1)]
    # Each has the teacher of its own seed, as in a study.
    runs += [
        run(f'd{s}', PKD, seed=s, teacher=f'/runs/t-seed{s}/epoch_2.pth')
        for s in (0, 1)
    ]
    assert found(*runs) == [
        ('plain', 'plain', ['s0', 's1']),
        ('distilled', 'PKD', ['d0', 'd1']),
    ]
    assert [run.name for run in runs] == [
        'plain, seed 0', 'plain, seed 1', 'PKD, seed 0', 'PKD, seed 1',
    ]  # fmt: skip


def test_what_differs_in_more_than_the_seed_is_another_network():
    longer = run('longer', seed=1)
    longer.config.train_cfg.max_epochs = 3
    assert [g.name for g in cast([run('a'), longer, run('d', PKD)])] == [
        'plain (a)', 'plain (longer)', 'PKD',
    ]  # fmt: skip
    # And so is what was run twice.
    assert len(cast([run('a'), run('b'), run('d', PKD)])) == 3


def test_a_method_of_weight_0_does_not_distil():
    off = {'pkd': dict(type='mmkd.PKD', loss_weight=0)}
    assert [role for role, *_ in found(run('a', off), run('b', PKD))] == [
        'plain', 'distilled',
    ]  # fmt: skip


def test_without_distillation_the_folders_name_the_runs():
    assert found(run('a'), run('b')) == [
        ('other', 'a', ['a']), ('other', 'b', ['b']),
    ]  # fmt: skip


def test_the_seed_is_the_one_that_was_drawn():
    drawn = run('a', seed=None)
    assert drawn.seed is None
    drawn.environment = '    numpy_random_seed: 7\n    seed: 1559\n'
    assert drawn.seed == 1559


# ------------------------------------------------------------------ fairness


def change(key, value):
    return lambda run: run.config.merge_from_dict({key: value})


def dataset(**values):
    def apply(run):
        run.config.train_dataloader.dataset.update(values)

    return apply


def flip(run):
    for step in run.config.train_dataloader.dataset.pipeline:
        if step.type == 'RandomFlip':
            step.prob = 0.25


def by_iteration(run):
    run.config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=90)


def stopped(run):
    run.checkpoint = '/runs/b/epoch_1.pth'


@pytest.mark.parametrize(
    ('changed', 'words'),
    [
        (change('train_cfg.max_epochs', 24), '2 against 24 epochs'),
        (by_iteration, '2 epochs against 90 iterations'),
        (stopped, '2 against 1 epochs'),
        (dataset(ann_file='other.json'), 'other training data (ann_file: '),
        (dataset(indices=3), 'other training data (indices: 8 → 3)'),
        (flip, 'other augmentation ([3].prob: 0.5 → 0.25)'),
        (change('train_dataloader.batch_size', 4), 'batches of 2 against 4'),
        (
            change('optim_wrapper.optimizer.lr', 0.5),
            'other optimisers (optimizer.lr: 0.01 → 0.5)',
        ),
        (
            change('param_scheduler', [dict(type='LinearLR')]),
            'other schedules',
        ),
        (change('load_from', '/a/b/c.pth'), 'other first weights'),
        (
            change('model.backbone.depth', 34),
            'other networks (backbone.depth: 18 → 34)',
        ),
    ],
)
def test_what_else_differs_is_told(changed, words):
    other = run('b', PKD)
    changed(other)
    plain, distilled = cast([run('a'), other])
    assert (plain.role, distilled.role) == ('plain', 'distilled')
    (told,) = problems(plain, distilled)
    assert words in told


def elsewhere(run):
    """The same data and files on another machine."""
    run.config.train_dataloader.dataset.data_root = '/home/b/data/'
    run.config.train_dataloader.num_workers = 9


def watched(run):
    run.config.custom_hooks = [dict(type='mmkd.TelemetryHook')]
    run.config.default_hooks.logger.interval = 7


@pytest.mark.parametrize('changed', [elsewhere, watched, lambda run: None])
def test_what_does_not_matter_is_not_told(changed):
    other = run('b', PKD)
    changed(other)
    assert problems(*cast([run('a'), other])) == []


def test_early_stopping_is_no_other_schedule():
    runs = [run('a'), run('b', PKD)]
    for each in runs:
        each.config.custom_hooks = [dict(type='EarlyStoppingHook')]
    stopped(runs[1])
    plain, distilled = cast(runs)
    assert problems(plain, distilled) == []
    assert list(unfinished(distilled)) == ['Stopped early: PKD, epoch 1 of 2.']


def test_both_unfinished_alike_are_compared_and_it_is_said():
    runs = [run('a'), run('b', PKD)]
    for each in runs:
        stopped(each)
    plain, distilled = cast(runs)
    assert problems(plain, distilled) == []
    assert list(unfinished(plain)) == ['Unfinished: plain, epoch 1 of 2.']
    assert list(unfinished(distilled)) == ['Unfinished: PKD, epoch 1 of 2.']


def test_other_seeds_are_said():
    plain, distilled = cast([run('a', seed=3), run('b', PKD, seed=5)])
    assert problems(plain, distilled) == []
    (said,) = remarks(plain, distilled)
    assert said.startswith('Their seeds differ (3 and 5)')
    assert remarks(*cast([run('a', seed=3), run('b', PKD, seed=3)])) == []


def test_one_unlike_seed_makes_networks_incomparable():
    runs = [run(f's{seed}', seed=seed) for seed in (0, 1)]
    runs += [run(f'd{seed}', PKD, seed=seed) for seed in (0, 1)]
    stopped(runs[3])
    plain, distilled = cast(runs)
    assert problems(plain, distilled) == ['2 against 1 epochs']
