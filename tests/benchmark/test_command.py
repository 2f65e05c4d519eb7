"""The benchmarks time what a training step does, and nothing else."""

import argparse
import json
import re
import statistics
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmkd.benchmark import (
    assign,
    command,
    common,
    epochs,
    machine,
    networks,
    references,
    scale,
    step,
    teacher,
)
from mmkd.cli import main
from mmkd.errors import ConfigError
from mmkd.report import summary
from tests.helpers import toy

GFL = 'gfl/gfl_r50_fpn_1x_coco.py'


def arguments(config, **options):
    given = dict(size=(96, 128), batch=2, objects=3, cfg_options=None)
    given |= dict(repeat=2, cpu_time=False, threads=1, device='cpu')
    given |= dict(networks=None, sizes=None, processes=None)
    given |= dict(references=False)
    return argparse.Namespace(**{**given, 'config': str(config), **options})


def cells(table, name):
    """The cells of a table's first row of this name."""
    rows = [
        [cell.strip() for cell in line.strip('|').split('|')]
        for line in table.splitlines()
    ]
    return next(row for row in rows if row[0] == name)


@pytest.fixture
def config(tmp_path):
    def write(base, methods):
        cfg = toy.distilled(tmp_path, base, methods=methods)
        return str(toy.write(cfg, tmp_path / 'config.py'))

    return write


def trainer_of(path):
    trainer = common.Trainer.of(arguments(path))
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
    alone = step.MethodsAlone(trainer).losses
    first, second = alone(), alone()
    gradients = [p.grad for p in trainer.distiller.parameters()]
    total, expected = losses_of_a_step(trainer)
    torch.testing.assert_close(first, total)
    assert torch.equal(first, second)
    assert len(gradients) == len(expected)
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize('name', references.REFERENCES)
def test_a_plain_form_has_the_loss_and_the_gradients(config, name):
    """On images of 96x112 in 96x128, so that what is padded is left out."""
    options = dict(type=f'mmkd.{name}')
    if name == 'FBKD':
        options.update(pooling=[4, 2], channel_mask=True, temperature=0.1)
    path = config(toy.RETINANET, {'a': options})
    args = arguments(path, size=(96, 112), configs=[path], references=True)
    result = step.measure_methods(args)
    (found,) = result['references'].values()
    assert max(found['differs'].values()) < 1e-4
    own, plain = found['all_seconds'].values()
    ratios = [a / b for a, b in zip(own, plain, strict=True)]
    assert found['all_ratios'] == pytest.approx(ratios)
    header, _, row = step.methods_table(result).splitlines()
    assert f' **{statistics.median(ratios):.3f}** ' in row
    assert header.count('|') == row.count('|')


def test_a_difference_of_gradients_by_hand():
    own, other = torch.tensor([3.0, 4.5]), torch.tensor([3.0, 4.0])
    assert step.relative_distance(own, other) == pytest.approx(0.1)


@pytest.mark.parametrize('name', ['FBKD', 'FGD', 'MGD'])
def test_no_method_writes_more_than_its_plain_form(config, name):
    """A clock that counts the numbers that operators write.

    CWD and PKD work in parts that stay in the cache, so that it is not what
    they write that takes their time.
    """
    path = config(toy.RETINANET, {'a': dict(type=f'mmkd.{name}')})
    args = arguments(path, size=(256, 320))
    alone = step.MethodsAlone(common.Trainer.of(args))
    alone.losses()  # the first one runs the teacher
    written = []
    for run in (alone.losses, alone.references):
        with Written() as counter:
            run()
        written.append(sum(counter.sizes))
    assert written[0] <= written[1]


@pytest.mark.parametrize('name', ['CWD', 'PKD'])
def test_parts_of_large_maps_stay_in_the_cache(config, name, monkeypatch):
    """Only the gradients are as large as the maps, and their copies."""
    monkeypatch.setattr('mmkd.losses.maps.AT_ONCE', 1)
    path = config(toy.RETINANET, {'a': dict(type=f'mmkd.{name}')})
    alone = step.MethodsAlone(common.Trainer.of(arguments(path)))
    alone.losses()
    ((method, _),) = alone.active.values()
    maps, _ = method.pairs(alone.student, alone.teacher)[0]
    large = []
    for run in (alone.losses, alone.references):
        with Written() as counter:
            run()
        large.append(counter.sizes.count(maps.numel()))
    assert large[0] <= 2 < large[1]


class Written(TorchDispatchMode):
    """Lists the sizes of what operators write, forward and backward."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.sizes += [
                leaf.numel()
                for leaf in torch.utils._pytree.tree_leaves(result)
                if isinstance(leaf, torch.Tensor)
            ]
        return result


def test_a_method_without_a_plain_form(config):
    path = config(GFL, dict(kd=dict(type='mmkd.KD')))
    args = arguments(path, configs=[path], references=True)
    with pytest.raises(
        ConfigError,
        match=r'--references: kd .KD. has no plain form to compare with; CWD',
    ):
        step.measure_methods(args)


def test_the_teacher_s_options_are_timed(config):
    path = config(toy.RETINANET, dict(pkd=dict(type='mmkd.PKD')))
    args = arguments(path, compile=False, forward=False)
    result = teacher.measure(args)
    forward, iteration = result.values()
    cached = 'cache, all images known'
    assert list(forward) == [*teacher.VARIANTS, cached]
    assert all(len(times) == 2 for times in forward.values())
    assert {'plain student', teacher.RARE} < {*iteration}
    table, _ = teacher.tables(result).split('\n\n')
    assert cells(table, 'as it is')[3] == '**1.000**'
    assert table.count('**1.000**') == 1


def test_epochs_of_a_cache_that_knows_all_images(config, monkeypatch):
    """Real photos, loaded anew: the first epoch writes, the second reads."""
    path = config(toy.RETINANET, dict(pkd=dict(type='mmkd.PKD')))
    clocks = []

    class Watched(epochs.EpochClock):
        def before_train(self, runner):
            clocks.append(self)
            self.entries, self.losses = [], set()
            self.folder = Path(runner.work_dir, 'cache')

        def after_train_iter(self, runner, batch_idx, *args, **kwargs):
            super().after_train_iter(runner, batch_idx, *args, **kwargs)
            self.losses.update(kwargs.get('outputs') or args[-1])

        def after_train_epoch(self, runner):
            super().after_train_epoch(runner)
            self.entries.append(len([*self.folder.glob('??/*')]))

    monkeypatch.setattr(epochs, 'EpochClock', Watched)
    args = arguments(path, images=4)
    result = epochs.measure(args)
    assert result['batches'] == 2
    plain, distilled, cached = clocks[:3]
    assert not any('pkd' in name for name in plain.losses)
    assert 'pkd.loss_pkd' in distilled.losses & cached.losses
    assert plain.entries == distilled.entries == [0, 0]
    assert cached.entries == [4, 4]
    assert not distilled.hits
    assert cached.hits == [1, 1]
    for name, first in zip(result['seconds'], clocks, strict=False):
        assert result['seconds'][name][0] == first.seconds[1]
    assert cells(epochs.epochs_table(result), epochs.CACHE)


def test_an_epoch_that_the_cache_does_not_know(config):
    path = config(toy.RETINANET, dict(pkd=dict(type='mmkd.PKD')))
    path = Config.fromfile(path)
    args = arguments(path.filename, images=4)
    variants = epochs.configs_of(args, str(path.work_dir))
    cached = variants[epochs.CACHE]
    cached.distillation.teacher.cache.max_gib = 1e-6
    with pytest.raises(ConfigError, match='did not know all images'):
        epochs.second_epoch(cached, args)


def test_epochs_without_the_data(config, capsys):
    """The plain run is stock's, and stock says no more than the path."""
    path = config(toy.RETINANET, dict(pkd=dict(type='mmkd.PKD')))
    cfg = Config.fromfile(path)
    cfg.train_dataloader.dataset.ann_file = '/nowhere/coco/train.json'
    cfg.dump(path)
    words = ['benchmark', 'epochs', path, '--images', '4', '--batch', '2']
    assert main(words) == 1
    assert re.search(r'error: .*mmkd prepare coco', capsys.readouterr().err)


@pytest.mark.parametrize(
    'name', ['lad_yolox_s', 'faster_rcnn_kd_r18_voc', 'pkd_faster_rcnn_r50']
)
def test_epochs_on_images_as_they_are(name):
    """Within wrappers of data sets, and without what changes images."""
    cfg = Config.fromfile(toy.ROOT / f'configs/{name}.py')
    args = arguments('', images=4)
    dataset = epochs.some_images(cfg.train_dataloader.dataset, args)
    assert dataset.indices == 4
    names = [step.type for step in dataset.pipeline]
    assert names == [
        *('LoadImageFromFile', 'LoadAnnotations', 'Resize', 'PackDetInputs')
    ]


@pytest.mark.parametrize('part', ['none', 'peers', 'mean'])
def test_epochs_need_one_teacher(config, part):
    path = config(toy.RETINANET, dict(hint=toy.HINT))
    cfg = Config.fromfile(path)
    teacher = cfg.distillation.pop('teacher')
    if part == 'mean':
        cfg.distillation.teacher = dict(mean=[teacher, teacher])
    if part == 'peers':
        cfg.distillation.update(teacher=teacher, peers=dict(b=teacher))
    cfg.dump(path)
    with pytest.raises(ConfigError, match='epochs takes a config with one'):
        epochs.measure(arguments(path, images=4))


def test_growth_with_the_images_size(config, monkeypatch):
    path = config(toy.RETINANET, dict(pkd=dict(type='mmkd.PKD')))
    args = arguments(path, objects=[3], sizes=[(64, 64), (320, 320)])
    with FlopCounterMode(display=False) as counter:  # a clock of work alone
        clock = SimpleNamespace(perf_counter=counter.get_total_flops)
        monkeypatch.setattr(common, 'time', clock)
        found = scale.measure(args)['sizes']
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
    args = arguments(path, objects=[3], processes=[1, 2], cpu_time=True)
    found = scale.measure(args)['processes']
    assert list(found) == [1, 2]
    for each in found.values():
        assert len(each['ratios']) == 2
        assert min(each['ratios']) > 0.5


def test_a_command_s_table_and_its_file(config, tmp_path):
    path = config(GFL, dict(kd=dict(type='mmkd.KD')))
    size = ('--size', '96', '128', '--objects', '3', '--batch', '2')
    words = [sys.executable, 'tools/benchmark.py', 'methods', path, *size]
    words += ['--repeat', '2', '--cpu-time', '--json', str(tmp_path / 'x')]
    done = subprocess.run(words, cwd=toy.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    content = json.loads((tmp_path / 'x').read_text())
    assert content['size'] == [96, 128]
    assert content['torch'] == torch.__version__
    result = content['methods']['config']
    own, plain = (result['all_seconds'][k] for k in ('methods', 'plain'))
    assert 0 < sum(own) < sum(plain)
    ratios = [a / b for a, b in zip(own, plain, strict=True)]
    assert result['share'] == pytest.approx(statistics.median(ratios))
    peak = result['memory_mib']
    assert 200 < peak['plain'] < 2000
    assert 0 < peak['teacher_weights'] < 20
    assert abs(peak['other']) < 100
    assert cells(done.stdout, 'config')[1].startswith('0.')
    last = done.stdout.splitlines()[-1]
    assert last == machine.measured_on(content)


# -------------------------------------------------------------------- clocks


class Gpu:
    """Counts: work of 250 ms for every call, done when it is waited for."""

    def __init__(self, monkeypatch):
        self.queued, self.done, self.waits = 0, 0, 0
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.queued

            def elapsed_time(self, end):
                assert gpu.done >= end.at
                return 250.0 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, 'Event', Event)
        monkeypatch.setattr(torch.cuda, 'synchronize', self.synchronize)

    def synchronize(self):
        self.waits += 1
        self.done = self.queued

    def work(self, calls):
        self.queued += calls


def test_a_gpu_s_own_events_are_the_times(monkeypatch):
    gpu = Gpu(monkeypatch)
    runs = {'a': lambda: gpu.work(1), 'b': lambda: gpu.work(3)}
    args = arguments('', repeat=4, device='cuda')
    times = common.Times.interleaved(runs, args)
    assert times == {'a': [0.25] * 4, 'b': [0.75] * 4}
    assert gpu.waits == 5


@pytest.mark.gpu
def test_a_gpu_s_work_is_timed():
    a = torch.randn(4096, 4096, device='cuda')
    runs = {'one': lambda: a @ a, 'ten': lambda: [a @ a for _ in range(10)]}
    args = arguments('', repeat=5, device='cuda')
    times = common.Times.interleaved(runs, args)
    one, ten = (statistics.median(each) for each in times.values())
    assert 5 < ten / one < 20


def test_the_processor_s_time_leaves_waiting_out(monkeypatch):
    now = dict(perf_counter=0, process_time=0)

    def work(seconds):
        for clock in now:
            now[clock] += seconds

    def wait():
        now['perf_counter'] += 3

    clocks = {clock: partial(now.get, clock) for clock in now}
    monkeypatch.setattr(common, 'time', SimpleNamespace(**clocks))
    runs = {'work': partial(work, 2), 'both': lambda: (work(1), wait())}
    times = common.Times.interleaved(runs, arguments(''))
    assert times == {'work': [2, 2], 'both': [4, 4]}
    times = common.Times.interleaved(runs, arguments('', cpu_time=True))
    assert times == {'work': [2, 2], 'both': [1, 1]}


@pytest.mark.parametrize('name', command.BENCHMARKS)
def test_every_command_counts_the_processor_s_time(name):
    configs = [] if name == 'assign' else ['x.py']
    args = command.parse_args([name, *configs, '--cpu-time'])
    assert args.cpu_time
    assert args.size == [800, 1333]


def test_a_gpu_s_teacher_is_timed_in_float16():
    on_gpu, on_cpu = (
        teacher.variants_of(arguments('', compile=False, device=device))
        for device in ('cuda', 'cpu')
    )
    only = on_gpu.keys() - on_cpu.keys()
    assert only == {"autocast='float16'"}


# --------------------------------------------------------------- environment


def test_the_environment_keeps_numbers(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # git is asked of the repository all the same
    options = dict(json=tmp_path, cfg_options={'a.b': [1, None]})
    found = machine.environment(arguments('', size=(800, 1333), **options))
    assert found['size'] == [800, 1333]
    assert found['cfg_options'] == {'a.b': [1, None]}
    assert found['json'] == str(tmp_path)
    assert found['dtype'] == 'float32'
    assert found['threads'] == torch.get_num_threads()
    assert found['processor'] == found['device'] == summary.processor()
    assert {'mmcv', 'mmdet', 'mmengine', 'mmkd', 'torch'} < found.keys()
    json.dumps(found)


@pytest.mark.parametrize('changed', [False, True])
def test_the_commit_is_the_repository_s(monkeypatch, tmp_path, changed):
    def git(*command):
        author = ('-c', 'user.name=a', '-c', 'user.email=a@b.c')
        subprocess.run(['git', *author, *command], cwd=tmp_path, check=True)

    git('init', '-q')
    git('commit', '-q', '--allow-empty', '-m', 'x')
    if changed:
        (tmp_path / 'new.py').touch()
    monkeypatch.setattr(machine, 'ROOT', tmp_path)
    found = machine.environment(arguments(''))
    assert len(found['commit']) >= 7
    assert found['uncommitted'] is changed


def test_no_repository(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, 'ROOT', tmp_path)
    found = machine.environment(arguments(''))
    assert (found['commit'], found['uncommitted']) == (None, False)
    monkeypatch.setenv('PATH', str(tmp_path))
    assert machine.git('status') is None


def test_the_line_below_a_table():
    found = dict(device='H200', processor='Xeon', cores=16, threads=1)
    found |= dict(dtype='float32', torch='2.13', mmcv='2.3', mmdet='3.5')
    found |= dict(mmengine='0.10', mmkd='0.1', cuda='12.8', commit='abc1234')
    line = machine.measured_on({**found, 'uncommitted': True})
    assert line == (
        'Measured on H200, Xeon, 16 cores, 1 thread, float32; PyTorch 2.13, '
        'MMCV 2.3, MMDetection 3.5, MMEngine 0.10, mmkd 0.1, CUDA 12.8; '
        'commit abc1234 with uncommitted changes.'
    )
    found |= dict(device='Xeon', cuda=None, commit=None, uncommitted=False)
    line = machine.measured_on(found)
    assert line.startswith('Measured on Xeon, 16 cores, 1 thread, float32;')
    assert line.endswith('mmkd 0.1; commit unknown.')


# ---------------------------------------------------------------- arithmetic


def test_ratios_by_hand():
    times = common.Times(plain=[1.0, 2.0, 4.0], teacher=[1.0, 2.0, 1.0])
    times['distilled'] = [3.0, 4.0, 10.0]
    found = times.ratios('distilled', 'plain', 'teacher')
    assert found == [1.5, 1.0, 2.0]
    table = common.table(['', 's', 'ratio'], [['a', times['plain'], found]])
    assert cells(table, 'a') == ['a', '2', '1-4', '**1.500**', '1.000-2.000']


def test_networks_together_by_hand():
    times = common.Times(
        {
            '1 student': [9.0, 9.0],
            '1 together': [9.0, 9.0],
            '11 student': [1.0, 2.0],
            '11 student2': [1.0, 2.0],
            '11 frozen teacher': [2.0, 4.0],
            '11 together': [6.0, 10.0],
        }
    )
    own = networks.of_number(times, 11)
    assert list(own) == ['student', 'student2', 'frozen teacher', 'together']
    assert networks.together_by_sum(own) == [1.5, 1.25]
    one = dict(parameters=5, weights=1.0, state=2.0, activations=1.0)
    sizes = dict(student=one, student2={**one, 'activations': 2.5})
    sizes['together'] = dict(activations=9.0)
    table = networks.networks_table({'seconds': times, 'mib': {11: sizes}})
    ratio = ['**1.375**', '1.250-1.500']
    assert cells(table, '11') == ['11', '6', '4-8', '8', '6-10', *ratio,
                                  '3.5', '9.0']  # fmt: skip
    assert cells(table, 'student2') == [
        *('student2', '5', '1.0', '2.0', '2.5', '1.5', '1-2'),
    ]


def test_refusals_are_counted_by_precision(monkeypatch):
    def reference(row, dtype):
        if dtype is np.float32 and row[0] < 1:
            raise ValueError
        return np.array([True, row[0] < 2, False]), 1

    monkeypatch.setattr(assign, 'reference', reference)
    monkeypatch.setattr(
        assign,
        'positive_samples',
        lambda costs, mask: torch.tensor([[True, True, False]] * 3) & mask,
    )
    costs = torch.tensor([[0.5, 3.0, 4.0], [1.5, 3.0, 4.0], [2.5, 3.0, 4.0]])
    found = assign.compare([(costs, costs.isfinite())])
    assert found['refused'] == dict(float64=0, float32=1)
    assert found['float64'] == pytest.approx(2 / 3)
    assert found['float32'] == pytest.approx(1 / 2)
    assert (found['objects'], found['none']) == (3, 0)


# ------------------------------------------------------------------ networks


def together(tmp_path, methods, peers=('second',), base=GFL, teacher=None):
    """A tiny config of networks that train together."""
    cfg = toy.plain(tmp_path, base)
    peer = dict(config=toy.teacher_config(cfg))
    cfg.distillation = dict(peers=dict.fromkeys(peers, peer), methods=methods)
    if teacher:
        cfg.distillation.teacher = {**peer, **teacher}
    return str(toy.write(cfg, tmp_path / 'config.py'))


ONE_TEACHER = dict(several=dict(type='mmkd.OneTeacherSeveralStudents'))
FIXED = {
    'dcm': (
        dict(type='mmkd.DCM', stages=['backbone.layer2', 'backbone.layer3']),
        ['second'],
    ),
    'ffsd': (dict(type='mmkd.FFSD', ramp_epochs=0), ['first', 'second']),
}


@pytest.mark.parametrize(('name', 'asked'), [('dcm', []), ('ffsd', [4])])
def test_networks_of_a_method_with_a_fixed_number(tmp_path, name, asked):
    method, peers = FIXED[name]
    path = together(tmp_path, {name: method}, peers)
    args = arguments(path, objects=[3], networks=asked)
    result = scale.measure(args)
    number = 1 + len(peers)
    names = ['student', *peers]
    expected = [f'{number} {n}' for n in (*names, 'together')]
    assert list(result['seconds']) == expected
    assert all(min(times) > 0 for times in result['seconds'].values())
    # The method's own layers keep more for the backward pass.
    kept = {n: s['activations'] for n, s in result['mib'][number].items()}
    assert kept['together'] > 1.01 * sum(kept[n] for n in names)
    table, each = scale.growth_table(result).split('\n\n')
    assert len(cells(table, str(number))) == 9
    rows = [line.split()[1] for line in each.splitlines()[2:]]
    assert rows == names


@pytest.mark.parametrize(
    ('teacher', 'number', 'parts'),
    [
        (dict(trainable=True), 1, ['teacher']),
        (dict(trainable=True), 3, ['student2', 'student3', 'teacher']),
        (dict(checkpoint=None), 1, ['frozen teacher']),
        (dict(checkpoint=None), 2, ['student2', 'frozen teacher']),
    ],
)
def test_so_many_students(tmp_path, teacher, number, parts):
    path = together(tmp_path, ONE_TEACHER, teacher=teacher)
    args = arguments(path, objects=[3], networks=[number], repeat=1)
    result = scale.measure(args)
    runs = {name.partition(' ')[2] for name in result['seconds']}
    assert runs == {'student', *parts, 'together'}
    assert len(cells(scale.growth_table(result), 'teacher')) == 7


def test_peers_are_measured_untrained(tmp_path):
    """Their own options stay; weights are looked for nowhere."""
    path = together(tmp_path, ONE_TEACHER, teacher=dict(
        trainable=True,
        checkpoint='/no/such/file.pth',
        cfg_options={'model.bbox_head.stacked_convs': 3},
    ))  # fmt: skip
    distiller, _ = common.build(arguments(path))
    assert len(distiller.peers['teacher'].model.bbox_head.cls_convs) == 3


def test_networks_need_peers(config):
    path = config(GFL, dict(kd=dict(type='mmkd.KD')))
    args = arguments(path, objects=[3], networks=[2])
    with pytest.raises(ConfigError, match=r'takes a config with .*peers'):
        scale.measure(args)


@pytest.mark.parametrize(
    'words',
    [
        *('step no.py', 'methods no.py', 'teacher no.py', 'epochs no.py'),
        *('assign --config no.py', 'scale no.py --objects 3'),
    ],
)
def test_a_config_that_is_not_there(words, capsys):
    assert main(['benchmark', *words.split()]) == 1
    assert "error: the config 'no.py' does" in capsys.readouterr().err


def test_two_growths_at_once(capsys):
    words = 'scale x.py --sizes 96x96 --networks 2'
    assert main(['benchmark', *words.split()]) == 1
    assert '--sizes and --networks are given' in capsys.readouterr().err


def test_nothing_to_measure():
    stock = 'mmdet::retinanet/retinanet_r18_fpn_1x_coco.py'
    with pytest.raises(ConfigError, match='has no distillation to measure'):
        common.build(arguments(stock))


def test_teachers_without_their_weights():
    """Named, described, in a list and as a mean: all that a config takes."""
    a, b = (
        dict(config='a.py', checkpoint='a.pth'),
        dict(name='b', fold_bn=True),
    )
    bare = dict(config='a.py', checkpoint=None)
    named = dict(name='b', fold_bn=True, checkpoint=None)
    assert common.untrained('b') == dict(name='b', checkpoint=None)
    assert common.untrained([a, b]) == [bare, named]
    mean = dict(mean=[a, b], label='both')
    assert common.untrained([mean, b]) == [
        *(dict(mean=[bare, named], label='both'), named),
    ]
    assert a['checkpoint'] == 'a.pth'


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('lad.py', 'lad .LAD. computes no loss'),
        ('peers/dml.py', 'the config has no distillation.teacher'),
    ],
)
def test_configs_that_cannot_be_measured(path, message):
    args = arguments(toy.ROOT / 'configs/bccd' / path)
    args.configs = [args.config]
    with pytest.raises(ConfigError, match=message):
        step.measure_methods(args)
