"""Every config of the repository loads, resolves and trains."""

import copy
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest
from mmengine.config import Config
from mmengine.runner import Runner

from mmkd.detectors.source import find_in_model_index, load_config
from mmkd.peers.peer import with_trained_teacher
from mmkd.registry import METHODS
from mmkd.teachers.build import descriptions as by_name
from mmkd.teachers.build import kind_of
from mmkd.utils import build_checked
from tests.helpers import encoders, made_data, toy

FOLDER = toy.ROOT / 'configs'
ALL = sorted(
    str(path.relative_to(FOLDER))
    for path in FOLDER.rglob('*.py')
    if '_base_' not in path.parts
)
OURS = {'runner_type', 'distillation', 'custom_hooks'}
# What MMDetection's own configs name beside the runner's options.
USUAL = {
    'backend_args',
    'classes',
    'data_root',
    'dataset_type',
    'max_epochs',
    'meta_keys',
    'metainfo',
    'runner_type',
    'scale',
    'test_pipeline',
    'train_pipeline',
    'vis_backends',
}
RUNNER = set(inspect.signature(Runner.__init__).parameters) - {'self', 'cfg'}


@pytest.fixture(autouse=True)
def at_home(monkeypatch):
    monkeypatch.chdir(toy.ROOT)


@pytest.fixture(params=ALL)
def cfg(request):
    return Config.fromfile(FOLDER / request.param)


def stock_base(path):
    """The first config of MMDetection that a file, or a base, starts from."""
    bases = re.findall(r'_base_ = \[(.*?)\]', path.read_text(), re.DOTALL)
    for base in re.findall(r"'([^']*)'", ''.join(bases)):
        if base.startswith('mmdet::'):
            return base.removeprefix('mmdet::')
        if found := stock_base(path.parent / base):
            return found
    return None


def strings(cfg):
    if isinstance(cfg, str):
        yield cfg
    elif isinstance(cfg, dict):
        for value in cfg.values():
            yield from strings(value)
    elif isinstance(cfg, list | tuple):
        for value in cfg:
            yield from strings(value)


def test_there_are_some():
    assert {'faster_rcnn_kd_r50.py', 'bccd/distilled.py'} <= set(ALL)


def test_all_keys_are_known(cfg):
    base = stock_base(Path(cfg.filename))
    if '_base_' in base:
        assert set(cfg) <= RUNNER | OURS | USUAL
    else:
        assert set(cfg) - set(toy.stock(base)) <= OURS


def test_all_but_distillation_is_stock(cfg):
    assert cfg.runner_type == toy.RUNNER
    stock = {k: v for k, v in cfg.items() if k not in OURS}
    assert not [s for s in strings(stock) if s.startswith('mmkd.')]
    toy.detector(toy.small_model(cfg.model))


def test_the_methods_options_are_known(cfg):
    for name, method in cfg.get('distillation', {}).get('methods', {}).items():
        build_checked(METHODS, method, name)


def test_the_networks_resolve(cfg):
    for peer in peers_of(cfg).values():
        assert load_config(peer['config']).model.type
    if 'teacher' not in cfg.get('distillation', {}):
        return
    for teacher in all_described(cfg):
        config = load_config(teacher['config'])
        assert config.model.type
        if teacher.get('trainable'):
            continue
        checkpoint = teacher['checkpoint']
        if checkpoint.startswith('work_dirs/'):
            # what training its config leaves
            last = config.train_cfg.max_epochs
            assert Path(checkpoint).name == f'epoch_{last}.pth'
        else:
            assert re.fullmatch(
                r'https://download\.openmmlab\.com/.*-[0-9a-f]{8}\.pth',
                checkpoint,
            )


def described(cfg):
    (teacher,) = all_described(cfg)
    return teacher


def all_described(cfg):
    return [
        find_in_model_index(teacher['name'])
        if 'name' in teacher
        else dict(teacher)
        for teacher in by_name(cfg.distillation.teacher).values()
    ]


def peers_of(cfg):
    """The networks that train beside the student."""
    return with_trained_teacher(cfg.get('distillation', {})).get('peers', {})


def trainable(teacher):
    """Whether a teacher trains in the same step, if its description says."""
    return {k: v for k, v in teacher.items() if k == 'trainable'}


def small(cfg):
    """Narrow, on a few of the tests' photos."""
    cfg = copy.deepcopy(cfg)
    cfg.model = toy.small_model(cfg.model)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(batch_size=2, num_workers=0, persistent_workers=False)
        small_dataset(loader.dataset)
    if 'unlabelled' in cfg.get('distillation', {}):
        folder = made_data.root() / 'coco_tiny' / 'val2017'
        cfg.distillation.unlabelled.dataset = str(folder)
    return cfg


def small_dataset(dataset):
    for step in dataset.get('pipeline', ()):
        toy.small_step(step)
    for inner in (dataset.get('dataset'), *dataset.get('datasets', ())):
        if inner is not None:
            small_dataset(inner)
    if 'ann_file' not in dataset:
        return
    names = list((dataset.get('metainfo') or {}).get('classes', ()))
    dataset.indices = 4
    if dataset.type == 'VOCDataset':
        dataset.data_root = f'{made_data.root()}/bccd/'
        dataset.ann_file = 'BCCD/ImageSets/Main/train.txt'
        dataset.data_prefix = dict(sub_data_root='BCCD/')
        if not names:
            names = [f'class {i}' for i in range(20)]
        names[:3] = ['RBC', 'WBC', 'Platelets']
    else:
        dataset.data_root = f'{made_data.root()}/coco_tiny/'
        dataset.ann_file = 'annotations/instances_train2017.json'
        dataset.data_prefix = dict(img='train2017/')
        names[:1] = ['person'] * bool(names)
    if names:
        dataset.metainfo = dict(classes=names)


def test_it_trains_two_iterations(cfg, tmp_path):
    cfg, distilled = small(cfg), cfg.get('distillation')
    if kind_of((distilled or {}).get('teacher') or {}) == 'FoundationEncoder':
        cfg.distillation.teacher.name = encoders.folder(tmp_path / 'encoder')
    elif 'teacher' in (distilled or {}):
        teachers = [
            toy.untrained(small(load_config(teacher['config'])))
            | trainable(teacher)
            for teacher in all_described(cfg)
        ]
        several = isinstance(cfg.distillation.teacher, list)
        cfg.distillation.teacher = teachers if several else teachers[0]
    for peer in cfg.get('distillation', {}).get('peers', {}).values():
        config = small(load_config(peer['config']))
        peer['config'] = toy.teacher_config(config)
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    cfg.train_dataloader.dataset = innermost(cfg.train_dataloader.dataset)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.work_dir = str(tmp_path)
    model = copy.deepcopy(cfg.model)
    record = toy.Record()
    toy.train(cfg, record)
    assert len(record.losses) == 2
    for losses in record.losses:
        if not steers(distilled):
            assert (distilled is None) == (not any('.' in k for k in losses))
        assert losses['loss'] > 0
    load_strictly(model, tmp_path / 'epoch_1.pth')
    for name in peers_of(cfg):
        config = Config.fromfile(tmp_path / name / 'config.py')
        load_strictly(config.model, tmp_path / name / 'epoch_1.pth')


def load_strictly(model, checkpoint):
    """Load a checkpoint into a stock model, neither more nor less."""
    state = toy.load(checkpoint)['state_dict']
    toy.detector(model).load_state_dict(state, strict=True)


def steers(distilled):
    """Whether all methods work within the student's own losses."""
    lad = 'mmkd.LAD'
    methods = (distilled or {}).get('methods', {}).values()
    return bool(methods) and all(m['type'] == lad for m in methods)


def innermost(dataset):
    """Without repetitions and concatenations; mixing images stays."""
    while 'ann_file' not in dataset and 'Mix' not in dataset.type:
        dataset = dataset.get('dataset') or dataset.datasets[0]
    return dataset


TWO_STEPS = [
    'train_cfg.max_epochs=1',
    'train_dataloader.batch_size=2',
    'train_dataloader.dataset.indices=4',
    'val_dataloader.dataset.indices=2',
]
UNTRAINED = ['distillation.teacher.checkpoint=None']
LOAD = """
import sys
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.config import Config

register_all_modules()
for config, path in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
    model = MODELS.build(Config.fromfile(config).model)
    checkpoint = torch.load(path, weights_only=False)
    model.load_state_dict(checkpoint['state_dict'], strict=True)
assert 'mmkd' not in sys.modules
"""


@pytest.mark.parametrize(
    ('name', 'options', 'peers', 'losses'),
    [
        ('bccd/methods/pkd.py', UNTRAINED, [], ['pkd.loss_pkd']),
        (
            'bccd/peers/dml.py',
            [],
            ['second'],
            ['dml.loss_student', 'dml.loss_second'],
        ),
    ],
)
def test_as_it_is_through_the_training_tool(
    tmp_path, name, options, peers, losses
):
    """All checkpoints are of stock models, for a process without mmkd."""
    (tmp_path / 'configs').symlink_to(FOLDER)
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'bccd').symlink_to(made_data.root() / 'bccd')
    job = toy.Job(
        tmp_path / 'log',
        'tools/train.py',
        *(f'configs/{name}', '--work-dir', 'run'),
        *('--cfg-options', *TWO_STEPS, *options),
        cwd=tmp_path,
    )
    assert job.wait() == 0, job.text()[-3000:]
    assert all(loss in (tmp_path / 'log').read_text() for loss in losses)
    networks = ['configs/bccd/gfl_student.py', 'run/epoch_1.pth']
    for peer in peers:
        networks += [f'run/{peer}/config.py', f'run/{peer}/epoch_1.pth']
    loaded = subprocess.run(
        [sys.executable, '-c', LOAD, *networks],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert loaded.returncode == 0, loaded.stderr[-3000:]
