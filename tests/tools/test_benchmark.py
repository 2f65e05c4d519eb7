"""The benchmarks time what a training step does, and nothing else."""

import argparse
import json
import statistics
import subprocess
import sys

import _benchmark
import _benchmark_scale
import _benchmark_step
import _benchmark_teacher
import pytest
import torch
import toy

GFL = 'gfl/gfl_r50_fpn_1x_coco.py'


def arguments(config, **options):
    given = dict(size=(96, 128), batch=2, objects=3, cfg_options=None)
    return argparse.Namespace(**{**given, 'config': str(config), **options})


@pytest.fixture
def config(tmp_path):
    def write(base, methods):
        cfg = toy.distilled(tmp_path, base, methods=methods)
        return str(toy.write(cfg, tmp_path / 'config.py'))

    return write


def trainer_of(path):
    distiller, batch = _benchmark.build(arguments(path), 'cpu')
    trainer = _benchmark.Trainer(distiller.student, batch, distiller)
    trainer.see_teacher()
    return trainer


def losses_of_a_step(trainer):
    """The sum of the methods' losses, and the adapters' gradients."""
    seen = {}
    trainer.distiller.observers.append(
        lambda task, distilled: seen.update(distilled)
    )
    trainer.distilled()
    trainer.distiller.observers.clear()
    total = sum(v for losses in seen.values() for v in losses.values())
    return total.detach(), [p.grad for p in trainer.distiller.parameters()]


@pytest.mark.parametrize(
    ('base', 'methods'),
    [
        (GFL, dict(kd=dict(type='mmkd.KD'), ld=dict(type='mmkd.LD'))),
        (GFL, dict(fgd=dict(type='mmkd.FGD', loss_weight=2.0))),
        (GFL, dict(crosskd=dict(type='mmkd.CrossKD'))),
        (toy.FASTER_RCNN, dict(pkd=dict(type='mmkd.PKD'), hint=toy.HINT)),
    ],
)
def test_methods_alone_are_those_of_a_step(config, base, methods):
    trainer = trainer_of(config(base, methods))
    alone = _benchmark_step.methods_alone(trainer)
    first, second = alone(), alone()
    gradients = [p.grad for p in trainer.distiller.parameters()]
    total, expected = losses_of_a_step(trainer)
    torch.testing.assert_close(first, total)
    assert torch.equal(first, second)
    assert len(gradients) == len(expected)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_the_teacher_s_options_are_timed(config):
    path = config(toy.RETINANET, dict(pkd=dict(type='mmkd.PKD')))
    args = arguments(
        path, repeat=2, cpu_time=False, compile=False, forward=False
    )
    result, table = _benchmark_teacher.teacher(args, 'cpu')
    forward, iteration = result.values()
    cached = 'cache, all images known'
    assert list(forward) == [*_benchmark_teacher.VARIANTS, cached]
    assert all(len(times) == 2 for times in forward.values())
    assert {'plain student', _benchmark_teacher.RARE} < {*iteration}
    firsts = [row for row in table.splitlines() if '| as it is |' in row]
    assert len(firsts) == 1 and '**1.000**' in firsts[0]


def test_growth_with_the_images_size(config):
    path = config(toy.RETINANET, dict(pkd=dict(type='mmkd.PKD')))
    args = arguments(
        path,
        objects=[3],
        sizes=[(64, 64), (320, 320)],
        networks=None,
        repeat=2,
    )
    found = _benchmark_scale.scale(args, 'cpu')[0]['sizes']
    small, large = found['64x64'], found['320x320']
    for kind in ('plain', 'teacher', 'distilled'):
        assert sum(large['seconds'][kind]) > sum(small['seconds'][kind])
    for each in (small, large):
        parts = each['seconds']
        for ratio, p, t, d in zip(
            each['ratios'], *parts.values(), strict=True
        ):
            assert ratio == pytest.approx(d / (p + t))


@pytest.mark.slow
def test_growth_with_processes(config):
    path = config(GFL, dict(pkd=dict(type='mmkd.PKD')))
    args = arguments(
        path,
        objects=[3],
        sizes=None,
        networks=None,
        processes=[1, 2],
        repeat=2,
    )
    args.threads = 1
    found = _benchmark_scale.scale(args, 'cpu')[0]['processes']
    assert list(found) == [1, 2]
    for each in found.values():
        assert len(each['ratios']) == 2
        assert min(each['ratios']) > 0.5


def test_a_command_s_table_and_its_file(config, tmp_path):
    path = config(GFL, dict(kd=dict(type='mmkd.KD')))
    size = ('--size', '96', '128', '--objects', '3', '--batch', '2')
    command = [sys.executable, 'tools/benchmark.py', 'methods', path, *size]
    command += ['--repeat', '2', '--json', str(tmp_path / 'x')]
    done = subprocess.run(
        command, cwd=toy.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / 'x').read_text())
    assert content['size'] == [96, 128]
    assert content['torch'] == torch.__version__
    result = content['methods']['config']
    own, plain = (result['all_seconds'][k] for k in ('methods', 'plain'))
    assert 0 < sum(own) < sum(plain)
    medians = [statistics.median(times) for times in (own, plain)]
    assert result['share'] == pytest.approx(medians[0] / medians[1])
    peak = result['memory_mib']
    assert 200 < peak['plain'] < 2000
    assert 0 < peak['teacher_weights'] < 20
    assert abs(peak['other']) < 100
    assert '| config | 0.' in done.stdout


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('lad.py', 'lad .LabelAssignmentDistillation. computes no loss'),
        ('peers/dml.py', 'the config has no distillation.teacher'),
    ],
)
def test_configs_that_cannot_be_measured(path, message):
    args = arguments(toy.ROOT / 'configs/bccd' / path, cpu_time=False)
    args.configs = [args.config]
    with pytest.raises(SystemExit, match=message):
        _benchmark_step.methods(args, 'cpu')
