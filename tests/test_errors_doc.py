"""Each error that docs/errors.md lists is raised as it is printed there."""

import functools
import inspect
import json
import os
import re
import tarfile
import zipfile
from types import SimpleNamespace
from unittest.mock import patch

import numpy as np
import pytest
import torch
from mmdet.datasets.transforms import Expand
from mmdet.models import DetTTAModel
from mmdet.models.backbones import ResNet, SwinTransformer
from mmengine.config import Config
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.runner import CheckpointLoader
from torch import nn

from mmkd.cli.convert import main as convert
from mmkd.cli.test import augment, check_no_masks
from mmkd.core.distiller import Distiller, build_distiller
from mmkd.data import object_classes, voc_check
from mmkd.data.batch import Batch
from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.data.checkpoint_loader import safe_checkpoints, trusts
from mmkd.data.detections import read_detections
from mmkd.data.download import extract
from mmkd.data.foreign_weights import convert_state_dict, weights_in
from mmkd.data.layouts import Data, find_data, prepare
from mmkd.data.layouts.convert import Options
from mmkd.data.lock import locked
from mmkd.data.pictures import VARIABLE, pixel_limit
from mmkd.data.unlabelled.sources import find_images
from mmkd.detectors.graph import detector_graph
from mmkd.detectors.shrink import small_model
from mmkd.detectors.source import load_config, load_strictly
from mmkd.doctor.weights import check_starts
from mmkd.engine.checkpoint import (
    check_resumable,
    join_checkpoint,
    latest_checkpoint,
)
from mmkd.engine.classes import training_classes
from mmkd.engine.config_checks import check_keys
from mmkd.engine.data_guard import (
    check_images,
    diagnose,
    name_unreadable_images,
)
from mmkd.engine.distilled import distiller_of
from mmkd.engine.finite import FiniteState
from mmkd.engine.hooks import (
    GradientBalanceHook,
    LossCheckHook,
    ReachCheckHook,
    SafeCheckpointHook,
    WeightScheduleHook,
)
from mmkd.engine.optimizer import build_for
from mmkd.engine.runner import DistillationRunner, check_runner
from mmkd.engine.work_dir import LOCK, one_training
from mmkd.export.canvas import canvas_for
from mmkd.export.check import pictures_for
from mmkd.peers.ensemble import EnsembleDetector
from mmkd.peers.peer import add_to_optimizer, check_trained
from mmkd.registry import HOOKS, METHODS
from mmkd.report.eval_coco import load_results
from mmkd.report.page import check_writable
from mmkd.start.command import _keep
from mmkd.start.command import main as distill_main
from mmkd.start.config_text import (
    Wishes,
    Written,
    balance_hook,
    fitted,
    published_methods,
    write_config,
)
from mmkd.start.pair import Pair
from mmkd.study.study import read_study, study_of
from mmkd.teachers.build import build_teacher
from mmkd.teachers.class_map import ClassMap
from mmkd.teachers.geometry import follow
from mmkd.teachers.onnx_decoders import Setting, find_decoder
from mmkd.teachers.view import TeacherContext
from mmkd.utils import build_checked, check_seed
from tests.helpers import (
    encoders,
    faults,  # noqa: F401 registers broken methods
    own_data,
    tiny_dense,
    toy,
)
from tests.helpers import tiny_detectors as tiny
from tests.helpers.balanced import Steps, distilled
from tests.helpers.tiny_wrappers import soft_teacher

ERRORS = (ValueError, RuntimeError, OSError, ImportError)
PAGE = toy.ROOT / 'docs' / 'errors.md'
DOTS = '…'
HINT = dict(type='mmkd.FeatureHint')
LAD = dict(type='mmkd.LabelAssignmentDistillation')


def rows():
    """(what is wrong, message) of every row of every table."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split(' | ')]
        if line.startswith('| ') and cells[0] != 'What is wrong':
            assert len(cells) == 3, line
            found.append((cells[0], cells[1]))
    return found


ROWS = dict(rows())

# ----------------------------------------------------------------- provoking


def distil(student, methods, teacher=None, classes=tiny.CLASSES, **cfg):
    """Build a distillation between tiny detectors and take a step."""
    model = tiny.build(student)
    names = cfg.pop('teacher_classes', classes)
    described = dict(
        config=dict(
            model=teacher or student,
            test_dataloader=dict(dataset=dict(metainfo=dict(classes=names))),
        ),
        checkpoint=cfg.pop('checkpoint', None),
    )
    distiller = build_distiller(
        dict(teacher=described, methods=methods, **cfg), model, classes
    )
    distiller.attach()
    model.loss(*tiny.batch_for(model, classes=len(classes)))


def one(method, student, teacher=None, **options):
    return functools.partial(
        distil,
        student,
        dict(m=dict(type=f'mmkd.{method}', **options)),
        teacher,
    )


def peers(method, *others, classes=tiny.CLASSES, **options):
    def provoke():
        described = {
            name: dict(
                config=dict(
                    model=model,
                    train_dataloader=dict(
                        dataset=dict(metainfo=dict(classes=classes))
                    ),
                )
            )
            for name, model in zip(('second', 'third'), others, strict=False)
        }
        methods = dict(m=dict(type=f'mmkd.{method}', **options))
        cfg = dict(peers=described, methods=methods)
        build_distiller(cfg, tiny.build(tiny.gfl()), tiny.CLASSES)

    return provoke


def built(**cfg):
    """Before any network is asked for."""
    return lambda: build_distiller(cfg, torch.nn.Linear(1, 1), ('cat',))


def boxes_json(path, content):
    path.write_text(json.dumps(content))
    return str(path)


def file_of_other_images(folder):
    teacher = build_teacher(
        dict(
            type='mmkd.DetectionsFile',
            file=boxes_json(
                folder / 'boxes.json',
                dict(
                    images=[dict(id=1, file_name='b.jpg', width=9, height=9)],
                    categories=[dict(id=1, name='cat')],
                ),
            ),
        ),
        TeacherContext(None, (), named=False),
    )
    info = dict(img_path='data/a.jpg', img_id=1)
    dataset = SimpleNamespace(pipeline=[], get_data_info=lambda _: info)
    teacher.prepare_data(Listed(dataset))


class Listed(SimpleNamespace):
    """A data set of one image."""

    def __init__(self, dataset):
        super().__init__(**vars(dataset))

    def __len__(self):
        return 1


def results_alone(folder):
    read_detections(boxes_json(folder / 'results.json', []))


def no_detector(image):
    raise RuntimeError('too dark')


def function_that_fails():
    teacher = build_teacher(
        dict(
            type='mmkd.PythonDetector',
            function=f'{__name__}:no_detector',
            classes=['cat'],
        ),
        TeacherContext(None, (), named=False),
    )
    teacher.detect([np.zeros((8, 8, 3), np.uint8)], ['a.jpg'])


def student_optimizer():
    cfg = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    return build_optim_wrapper(torch.nn.Linear(1, 1), cfg)


def a_peer(optim_wrapper=None):
    peer = torch.nn.Module()
    peer.model, peer.optim_wrapper = torch.nn.Linear(1, 1), optim_wrapper
    return peer


def peer_optimizer(optimizer, **options):
    own = dict(type='OptimWrapper', optimizer=optimizer, **options)
    add_to_optimizer(student_optimizer(), dict(second=a_peer(own)), own)


def ensemble_in_training():
    pair = [tiny.build(tiny.gfl(), seed=seed) for seed in (1, 2)]
    EnsembleDetector(pair)(*tiny.batch_for(pair[0]), mode='loss')


def balanced(methods, **options):
    """A step of a student whose first stage is frozen."""
    model = tiny_dense.paa() if 'lad' in methods else tiny.retinanet()
    model.backbone.frozen_stages = 1
    return lambda: Steps(distilled(methods, model), **options)()


def encoder(**options):
    """A student that learns from an image encoder."""

    def provoke():
        cfg = dict(
            teacher=dict(type='mmkd.FoundationEncoder', **options),
            methods=dict(m=dict(type='mmkd.FoundationFeatures')),
        )
        build_distiller(cfg, tiny.build(tiny.retinanet()), tiny.CLASSES)

    return provoke


def without_transformers():
    with patch.dict('sys.modules', {'transformers': None}):
        encoder(name='facebook/dinov2-small')()


def option(method, **options):
    cfg = dict(type=f'mmkd.{method}', **options)
    return lambda: build_checked(METHODS, cfg, 'distillation.methods.m')


def images_twice():
    """As TridentNet's branches do."""
    model = tiny.build(tiny.retinanet())
    stock = type(model.neck).forward
    model.neck.forward = lambda maps: stock(
        model.neck, [m.repeat(2, 1, 1, 1) for m in maps]
    )
    described = dict(config=dict(model=tiny.retinanet()), checkpoint=None)
    distiller = build_distiller(
        dict(teacher=described, methods=dict(m=HINT)), model, tiny.CLASSES
    )
    outputs = distiller._record()
    batch = tiny.batch_for(model)
    with outputs.recording():
        model.extract_feat(batch[0])
    batch = Batch(*batch)
    teacher = distiller.teacher.view(batch)
    distiller.methods['m'](outputs, teacher, batch)


def shrunk(name):
    """A stock detector at toy scale, for three classes."""
    model = small_model(tiny.stock(name))
    for head in (model.get('bbox_head'), model.get('roi_head', {})):
        head = (head or {}).get('bbox_head', head)
        if head:
            head.num_classes = 3
    return model


def truncated(folder):
    path = folder / 'teacher.pth'
    torch.save(dict(state_dict={'a': torch.rand(1000)}), path)
    path.write_bytes(path.read_bytes()[:2000])
    load_checkpoint_file(str(path))


def web_page(folder):
    path = folder / 'teacher.pth'
    path.write_text('<html>Not found</html>')
    load_checkpoint_file(str(path))


def pickled_code(folder):
    path = folder / 'teacher.pth'
    torch.save(dict(state_dict={}, args=SimpleNamespace()), path)
    load_checkpoint_file(str(path))


def loaded(content):
    def load(folder):
        torch.save(content, folder / 'teacher.pth')
        with safe_checkpoints():
            CheckpointLoader.load_checkpoint(str(folder / 'teacher.pth'))

    return load


def known_to(name):
    def load():
        with safe_checkpoints():
            CheckpointLoader.load_checkpoint(name)

    return load


def packed_zeros(folder):
    path = folder / 'teacher.pth'
    with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('teacher/data/0', bytes(100 << 20))
    load_checkpoint_file(str(path))


def torchscript(folder):
    torch.jit.save(torch.jit.script(nn.ReLU()), folder / 'teacher.pth')
    load_checkpoint_file(str(folder / 'teacher.pth'))


def pointer(content):
    def find(folder):
        (folder / 'last_checkpoint').write_text(content)
        latest_checkpoint(str(folder))

    return find


def of_another_network(folder):
    path = folder / 'teacher.pth'
    state = tiny.build(tiny.retinanet()).state_dict()
    torch.save(dict(state_dict=state), path)
    distil(tiny.gfl(), dict(m=HINT), checkpoint=str(path))


def resnet(width):
    return ResNet(depth=18, base_channels=width)


def starting(build, before='', **options):
    """A backbone that is to start from a file."""

    def provoke(folder):
        module, path = build(), folder / 'weights.pth'
        state = {before + k: v for k, v in module.state_dict().items()}
        torch.save(state, path)
        module.init_cfg = dict(
            type='Pretrained', checkpoint=str(path), **options
        )
        check_starts(nn.ModuleDict(dict(backbone=module)))

    return provoke


def amp_on_the_cpu():
    wrapper = dict(type='AmpOptimWrapper', loss_scale='dynamic')
    with patch('mmkd.engine.config_checks.get_device', lambda: 'cpu'):
        check_runner(Config(dict(optim_wrapper=wrapper)), 'my.py')


def behind_prefixes(*names, prefix=None):
    def provoke():
        state = tiny.build(tiny.retinanet()).state_dict()
        weights = {f'{n}.{k}': v for n in names for k, v in state.items()}
        model = tiny.build(tiny.retinanet())
        load_strictly(model, weights, 'teacher.pth', prefix)

    return provoke


def joined_classes():
    sets = [
        SimpleNamespace(metainfo=dict(classes=names))
        for names in (('cat', 'dog'), ('dog',))
    ]
    training_classes(SimpleNamespace(datasets=sets))


class NoImages(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def get_data_info(self, index):
        return dict(img_path=f'data/bccd/JPEGImages/{index}.jpg')


def empty_images(folder):
    (folder / 'JPEGImages').mkdir()
    dataset = NoImages()
    dataset.get_data_info = lambda index: dict(
        img_path=f'{folder}/JPEGImages/{index}.jpg'
    )
    for index in range(2):
        (folder / 'JPEGImages' / f'{index}.jpg').touch()
    check_images(dataset)


class Broken(NoImages):
    def prepare_data(self, index):
        raise AssertionError


def damaged_image(folder):
    dataset = Broken()
    path = folder / '0.jpg'
    path.write_bytes(b'<html>')
    dataset.get_data_info = lambda index: dict(img_path=str(path))
    name_unreadable_images(dataset)
    dataset.prepare_data(0)


def large_image(folder):
    """Only its header is read."""
    path = folder / '0.png'
    path.write_bytes(b'P5 30000 30000 255\n')
    dataset = Broken()
    dataset.get_data_info = lambda index: dict(img_path=str(path))
    name_unreadable_images(dataset)
    dataset.prepare_data(0)


def many_pixels():
    with patch.dict(os.environ, {VARIABLE: 'many'}):
        pixel_limit()


def unpacked(**members):
    def provoke(folder):
        with zipfile.ZipFile(folder / 'x.zip', 'w', zipfile.ZIP_DEFLATED) as z:
            for name, content in members.items():
                z.writestr(name, content)
        extract(folder / 'x.zip', folder / 'out')

    return provoke


def packed_twice(folder):
    with tarfile.open(folder / 'x.tar', 'w') as tar:
        for name in ('a.jpg', 'A.jpg'):
            tar.addfile(tarfile.TarInfo(name))
    extract(folder / 'x.tar', folder / 'out')


def evaluated(kind, **found):
    def provoke(folder):
        (folder / 'x.json').write_text(
            json.dumps([dict(image_id=1, category_id=1, score=1) | found])
        )
        image = dict(id=1, height=2, width=3)
        truth = dict(images=[image], categories=[dict(id=1)])
        load_results(folder / 'x.json', truth, kind)

    return provoke


def elsewhere(folder):
    (folder / 'ImageSets' / 'Main').mkdir(parents=True)
    (folder / 'ImageSets' / 'Main' / 'train.txt').write_text('../x\n')
    voc_check(folder, 'train')


def found_in(*files, name=''):
    def provoke(folder):
        for file in files:
            own_data.write(folder / file, 'x')
        find_data(str(folder / name))

    return provoke


def yolo_data(folder, *labels, name='mine'):
    """Two photos with labels of YOLO."""
    labels = labels or ['0 .5 .5 .1 .1']
    for number in range(2):
        own_data.draw(folder / f'{name}/{number}.png', (20, 20))
        label = labels[number % len(labels)]
        own_data.write(folder / f'{name}/{number}.txt', label)
    names = 'train: .\nnames: [cat, dog]'
    own_data.write(folder / f'{name}/data.yaml', names)
    return str(folder / name)


def two_files(folder):
    for name in 'ab':
        content = json.dumps(own_data.coco({}))
        own_data.write(folder / f'mine/{name}.json', content)
    find_data(str(folder / 'mine'))


def converted_before(folder):
    for name in ('theirs', 'mine'):
        path = yolo_data(folder, name=name)
        prepare(path, folder / 'out', Options())


def many_values(folder):
    (folder / 'x.yaml').write_text('a: &a [*a]\n')
    read_study(folder / 'x.yaml')


def written_elsewhere(folder):
    config = str(toy.write(toy.plain(folder / 'run'), folder / 'c.py'))
    options = {'default_hooks.checkpoint.out_dir': '/elsewhere'}
    run = dict(config=config, options=options)
    study_of(dict(work_dir=str(folder), runs=dict(a=run)), 'x.yaml', 'x')


def misspelt_metric():
    hook = SafeCheckpointHook(save_best='coco/bbox_map', rule='greater')
    hook._judged(SimpleNamespace(), {'coco/bbox_mAP': 0.1})


def resumed_with_other_methods():
    kept = {'distillation.a': torch.ones(1)}
    saved = dict(state_dict={}, distillation=dict(state_dict=kept))
    join_checkpoint(saved, {}, resume=True)


def adapters_not_trained():
    student = tiny.build(tiny.retinanet())
    given = OptimWrapper(torch.optim.SGD(student.parameters(), lr=0.1))
    described = dict(config=dict(model=tiny.retinanet()), checkpoint=None)
    cfg = dict(teacher=described, methods=dict(hint=HINT))
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    build_for(distiller, given, lambda wrapper: wrapper)


def number_in_the_loss():
    method = SimpleNamespace(statistics=dict(hits=torch.ones(())))
    distiller = Distiller(toy.detector(tiny.retinanet()), None, {})
    batch = Batch(torch.zeros(1, 3, 32, 32), [])
    active = dict(hint_loss=(method, 1.0))
    distiller._statistics(active, distiller.teacher.view(batch), batch)


def not_packed(folder):
    cfg = toy.plain(folder)
    cfg.test_dataloader.dataset.pipeline.pop()
    augment(cfg)


def misspelt_key(folder):
    cfg = toy.distilled(folder)
    cfg.distilation = cfg.pop('distillation')
    toy.build(cfg)


def no_data(folder):
    cfg = toy.distilled(folder)
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = f'{folder}/data/coco/'
    toy.train(cfg)


def cut_annotations(folder):
    path = folder / 'train.json'
    path.write_text('{"images": [{"id": 1, ')
    diagnose(dict(data_root=str(folder), ann_file='train.json'))


def nan_loss():
    hook = LossCheckHook()
    hook.observe({}, {'hint': {'hint.loss_hint': torch.tensor(np.nan)}})
    hook.after_train_iter(None)


def diverged_peer():
    hook = LossCheckHook()
    hook._peers = ('second',)
    nan = torch.tensor(np.nan)
    hook.observe({'second.loss_cls': nan}, {'m': {'m.loss_student': nan}})
    hook.after_train_iter(None)


def broken_gradient():
    model = torch.nn.Linear(1, 1)
    wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    hook = LossCheckHook()
    hook.before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    model.bias.grad = torch.tensor([np.nan])
    wrapper.step()


def skipped_steps():
    parameter = torch.nn.Parameter(torch.ones(1))
    wrapper = toy.CpuAmpOptimWrapper(
        optimizer=torch.optim.SGD([parameter], lr=0.1), scale=True
    )
    runner = SimpleNamespace(
        model=torch.nn.Linear(1, 1), optim_wrapper=wrapper
    )
    hook = LossCheckHook()
    hook.before_train(runner)
    for _ in range(50):
        wrapper.update_params((parameter * np.inf).sum())
        hook.after_train_iter(runner)


def broken_buffer():
    runner = SimpleNamespace(
        finite=FiniteState({'bn.running_var': torch.ones(1)}, {}),
        finite_checkpoint='work_dirs/x/epoch_1.pth',
    )
    state = {'bn.running_var': torch.tensor([np.nan])}
    DistillationRunner._check_finite(
        runner, {'meta': {'iter': 1}, 'state_dict': state}
    )


def used_work_dir(folder):
    with locked(folder / LOCK), one_training(str(folder)):
        pass


def locked_out(folder):
    (folder / LOCK).mkdir()
    with one_training(str(folder)):
        pass


def without_effect(method, optim=None, **backbone):
    """The first step of a run whose student the method does not move."""

    def provoke():
        changes = {f'backbone__{k}': v for k, v in backbone.items()}
        student = tiny.retinanet(**changes)
        model = tiny.build(student)
        described = dict(config=dict(model=student), checkpoint=None)
        cfg = dict(teacher=described, methods=dict(m=method))
        distiller = build_distiller(cfg, model, tiny.CLASSES)
        distiller.attach()
        sgd = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
        wrapper = build_optim_wrapper(model, {**sgd, **(optim or {})})
        ReachCheckHook().before_train(
            SimpleNamespace(distiller=distiller, optim_wrapper=wrapper)
        )
        model.loss(*tiny.batch_for(model))

    return provoke


def softmax_atss():
    config = tiny_dense.atss()
    config.bbox_head.loss_cls = dict(type='CrossEntropyLoss')
    return config


def wide_backbone():
    return tiny.merged(
        tiny.retinanet(),
        backbone__base_channels=16,
        neck__in_channels=[16, 32, 64, 128],
    )


RETINANETS = (
    Config(dict(model=tiny.retinanet())),
    Config(dict(model=tiny.retinanet())),
)


def distilled_on_boxes(base, epochs=None, options=None, **changes):
    """The config of a stock student for VOC data."""

    def provoke(folder):
        path = folder / 'own.py'
        lines = [f'{key} = {value!r}' for key, value in changes.items()]
        path.write_text('\n'.join([f"_base_ = ['mmdet::{base}']", *lines]))
        voc = dict(type='VOCDataset', ann_file='train.txt')
        metric = dict(type='VOCMetric', metric='mAP')
        (folder / 'train.txt').write_text('1\n2\n')
        data = Data(('cat',), dict(voc, data_root=str(folder)), voc, metric)
        wishes = Wishes(epochs=epochs, options=options or {})
        write_config(
            str(path),
            dict(name='retinanet_r101_fpn_2x_coco'),
            ['pkd'],
            data,
            wishes=wishes,
            tried=False,
        )

    return provoke


def cfg_option(key):
    def provoke(folder):
        distilled_on_boxes(toy.RETINANET, options={key: 1})(folder)

    return provoke


def distill(**options):
    given = dict(
        student=f'mmdet::{toy.RETINANET}',
        teacher='retinanet_r101_fpn_2x_coco',
        method='pkd',
    )
    distill_main(
        [f'--{k.replace("_", "-")}={v}' for k, v in (given | options).items()]
    )


def begun_run(folder):
    logs = folder / '20260101_000000' / 'vis_data'
    logs.mkdir(parents=True)
    (logs / 'scalars.json').write_text('{"loss": 1.0, "step": 2}\n')
    distill(work_dir=folder)


def edited_config(folder):
    path = folder / 'distilled.py'
    path.write_text('# mine')
    _keep(path, Written('# ours', []), begun=False)


def padded_with(value):
    pipeline = [dict(type='Pad', pad_val=dict(img=value))]
    return dict(test_dataloader=dict(dataset=dict(pipeline=pipeline)))


def not_traceable():
    model = tiny.build(tiny.retinanet())
    model.bbox_head = nn.Identity()

    def fail(*_, **__):
        raise ValueError('no head for that')

    model.bbox_head.predict = fail
    detector_graph(model, (96, 128))


CASES = {
    # the config
    'Misspelt key `distillation`': misspelt_key,
    'Misspelt option of `distillation`': built(
        techer={}, methods=dict(m=HINT)
    ),
    'A runner that does not distil': lambda: check_runner(
        Config(dict(runner_type='FlexibleRunner', distillation=dict(a=1))),
        'my.py',
    ),
    'A strategy of another runner': lambda: check_keys(
        dict(strategy=dict(type='FSDPStrategy'))
    ),
    'Mixed precision without a GPU': amp_on_the_cpu,
    'Neither teacher nor peers': built(methods=dict(m=HINT)),
    'No methods': built(teacher=dict(config='a.py')),
    'Unknown method': option('FeatureHnt'),
    'Misspelt option of a method': option('FeatureHint', sorce='neck'),
    'A method without `type`': built(
        teacher={'config': 'a.py'}, methods=dict(hint=dict(source='neck'))
    ),
    'A name of a method that losses cannot have': built(
        teacher={'config': 'a.py'}, methods={'a.b': HINT}
    ),
    'A name that would be added to the loss': number_in_the_loss,
    'A method of peers without peers': built(
        teacher={'config': 'a.py'},
        methods=dict(dml=dict(type='mmkd.MutualLearning')),
    ),
    'Unlabelled images that are not there': lambda: distil(
        tiny.gfl(), dict(p=dict(type='mmkd.PseudoLabels'))
    ),
    'Unlabelled images that no method learns from': lambda: distil(
        tiny.gfl(),
        dict(m=dict(type='mmkd.DKD')),
        unlabelled=dict(dataset='images'),
    ),
    'Two methods that steer the assignment': lambda: distil(
        tiny_dense.paa(), dict(a=LAD, b=LAD)
    ),
    'Soft labels without the task within SoLAD': option(
        'SoLAD', soft=dict(task_loss=False)
    ),
    'A method that reads the assignment beside soft labels alone': (
        lambda: distil(
            tiny_dense.paa(),
            dict(
                kd=dict(type='mmkd.KD'),
                soft=dict(type='mmkd.SoftLabelDistillation', task_loss=False),
            ),
        )
    ),
    'Misspelt hook': lambda: build_checked(
        HOOKS, dict(type='mmkd.TelemetryHok'), 'custom_hooks'
    ),
    'A schedule of a method that is not there': lambda: WeightScheduleHook(
        methods='hnt'
    ).before_train(
        SimpleNamespace(distiller=SimpleNamespace(methods=dict(hint=None)))
    ),
    'A share of a method that is not there': balanced(
        dict(hint=HINT), share=dict(hnt=0.3)
    ),
    'A share of a method without losses': balanced(
        dict(lad=LAD), share=dict(lad=0.3)
    ),
    'Shares that leave nothing to the task': balanced(
        dict(a=HINT, b=HINT, c=HINT)
    ),
    'A share of the gradient outside its range': lambda: GradientBalanceHook(
        share=30
    ),
    '`--balance` for a method without losses': lambda: balance_hook(
        ['lad'], 0.3
    ),
    'A part of the student that does not train': balanced(
        dict(hint=HINT), part='backbone.layer1'
    ),
    'A part that a method does not reach': balanced(
        dict(hint=HINT), part='bbox_head'
    ),
    'A hook of mmkd in plain training': lambda: distiller_of(
        SimpleNamespace()
    ),
    'A seed that is none': lambda: check_seed(dict(seed=-1)),
    'A model that is no dict': lambda: load_config(dict(model=3)),
    # options
    'Temperature not above 0': option('KD', temperature=0),
    'A weight below 0': option('CWD', loss_weight=-1),
    'A share outside its range': option('FasterRCNNDistillation', mu=1.5),
    'A value that is none of the known': option('CrossKD', align='images'),
    'A number that must be whole': option('CrossKD', layer=0.5),
    'A number that is infinite': option('LD', temperature=float('inf')),
    'A number in quotes': option('LD', temperature='10'),
    'Levels that are no numbers': option('FeatureHint', levels='all'),
    'A list of numbers by level that is none': option('FBKD', reduction=4),
    # pairs
    'Sizes differ by a factor': one(
        'FeatureHint', tiny.retinanet(), levels=[0], teacher_levels=[1]
    ),
    'Different numbers of levels': one(
        'CWD', tiny.retinanet(), levels=[0, 1], teacher_levels=[0]
    ),
    'A level that does not exist': one('CWD', tiny.retinanet(), levels=[7]),
    'Different widths without an adapter': one(
        'FeatureHint',
        tiny.retinanet(),
        wide_backbone(),
        source='backbone',
        adapt=False,
    ),
    'Class scores of other classes': lambda: distil(
        tiny.gfl(),
        dict(m=dict(type='mmkd.CWD', source='bbox_head.gfl_cls')),
        teacher_classes=tiny.CLASSES[::-1],
    ),
    'A module that sees an image several times': images_twice,
    'A module that does not exist': one(
        'FeatureHint', tiny.retinanet(), source='nek'
    ),
    'LD on heads without bins': one('LD', tiny.retinanet()),
    'DKD on one class': lambda: distil(
        tiny.gfl(bbox_head__num_classes=1),
        dict(m=dict(type='mmkd.DKD')),
        classes=('cat',),
    ),
    'Class logits of a transformer': one('KD', tiny.detr()),
    'Class logits of a head that assigns in a way of its own': one(
        'KD', shrunk('free_anchor/freeanchor_r50_fpn_1x_coco.py')
    ),
    'RPN distillation of other proposals': one(
        'FasterRCNNDistillation',
        shrunk('guided_anchoring/ga-faster-rcnn_r50-caffe_fpn_1x_coco.py'),
    ),
    'RoI distillation of a one-stage detector': one(
        'FasterRCNNDistillation', tiny.retinanet()
    ),
    'Assignment of a head that assigns without predictions': one(
        'LabelAssignmentDistillation', tiny.retinanet()
    ),
    "Teacher's boxes for a head whose losses know no weights": one(
        'TeacherBoxes', tiny.fcos()
    ),
    'Different priors': one('KD', tiny.retinanet(), tiny.gfl()),
    'A sigmoid and a softmax': one('KD', tiny_dense.atss(), softmax_atss()),
    # wrappers
    'A wrapper as student': lambda: distil(
        soft_teacher(tiny.gfl()), dict(m=HINT), tiny.gfl()
    ),
    'A wrapper as teacher': lambda: distil(
        tiny.gfl(), dict(m=HINT), soft_teacher(tiny.gfl())
    ),
    # classes
    'No shared class': lambda: ClassMap(['RBC', 'WBC'], ['cat', 'dog']),
    'A class twice': lambda: ClassMap(['cat', 'cat'], ['cat']),
    'More or fewer names than classes': lambda: distil(
        tiny.gfl(), dict(m=HINT), teacher_classes=('cat', 'dog')
    ),
    "More or fewer classes than the student's": lambda: build_distiller(
        dict(teacher=dict(config='a.py'), methods=dict(m=HINT)),
        tiny.build(tiny.mask_rcnn()),
        ('cat', 'dog'),
    ),
    'Joined data of different classes': joined_classes,
    'Unnamed classes': lambda: build_distiller(
        dict(
            teacher=dict(
                config=dict(
                    model=tiny.gfl(bbox_head__num_classes=2),
                    test_dataloader=dict(
                        dataset=dict(metainfo=dict(classes=('cat', 'dog')))
                    ),
                ),
                checkpoint=None,
            ),
            methods=dict(m=HINT),
        ),
        tiny.build(tiny.gfl()),
        None,
    ),
    'A class that is mapped by hand and does not exist': lambda: ClassMap(
        ['cat'], ['cat', 'dog'], {'yak': 'dog'}
    ),
    'A class of the teacher for two': lambda: ClassMap(
        ['cat', 'dog'], ['cat'], {'cat': 'cat', 'dog': 'cat'}
    ),
    'Aliases that are no names': built(
        teacher=dict(config='no.py'),
        methods=dict(m=HINT),
        class_aliases=['bike'],
    ),
    'A name of two categories': lambda: object_classes(
        'train.json', dict(categories=[dict(id=i, name='cat') for i in (0, 1)])
    ),
    # channels
    'Images of other channels': lambda: distil(
        tiny.retinanet(),
        dict(m=HINT),
        tiny.retinanet(
            backbone__in_channels=1,
            data_preprocessor=dict(mean=[110.0], std=[55.0]),
        ),
    ),
    # teachers that are files or functions
    'A transform whose pixels cannot be followed': lambda: follow(
        SimpleNamespace(pipeline=[Expand()]),
        None,
        'distillation.teacher (DetectionsFile)',
    ),
    'A file of other images': file_of_other_images,
    'A result file without its annotations': results_alone,
    'Outputs that no decoder reads': lambda: find_decoder(
        'auto', dict(probs=(1000,)), Setting(2, (64, 64)), 'a.onnx'
    ),
    'A function that fails on an image': function_that_fails,
    # image encoders
    'transformers is missing': without_transformers,
    'A folder that does not exist': encoder(name='./dinov2'),
    'A folder without a model': lambda folder: encoder(name=str(folder))(),
    'An encoder without a token for each patch': lambda folder: encoder(
        name=encoders.folder(
            folder, 'Swin', embed_dim=8, depths=[1], num_heads=[2]
        )
    )(),
    'Weights that do not fill the encoder': lambda folder: encoder(
        name=encoders.without(
            'embeddings.patch_embeddings.projection.weight', folder
        )
    )(),
    'A size below a patch': lambda folder: encoder(
        name=encoders.folder(folder), size=4
    )(),
    # peers
    'Peers of other priors': peers('MutualLearning', tiny.retinanet()),
    'Peers of other classes': peers(
        'MutualLearning', tiny.gfl(), classes=tiny.CLASSES[::-1]
    ),
    'Too few peers': peers('FFSD', tiny.gfl()),
    'Too many peers': peers('DCM', tiny.gfl(), tiny.gfl()),
    'A peer without config': built(
        peers=dict(second=dict(checkpoint='second.pth')),
        methods=dict(m=dict(type='mmkd.MutualLearning')),
    ),
    'A name of a peer that losses cannot have': built(
        peers=dict(student=dict(config='a.py')),
        methods=dict(m=dict(type='mmkd.MutualLearning')),
    ),
    'A peer named like a method': built(
        peers=dict(dml=dict(config='a.py')),
        methods=dict(dml=dict(type='mmkd.MutualLearning')),
    ),
    'A peer named like other metrics': built(
        peers=dict(ensemble=dict(config='a.py')),
        methods=dict(m=dict(type='mmkd.MutualLearning')),
    ),
    'A weight for a teacher that is not there': peers(
        'OneTeacherSeveralStudents', tiny.gfl()
    ),
    'A weight for other students that are not there': lambda: build_distiller(
        dict(
            teacher=dict(config=dict(model=tiny.gfl()), trainable=True),
            methods=dict(m=dict(type='mmkd.OneTeacherSeveralStudents')),
        ),
        tiny.build(tiny.gfl()),
        tiny.CLASSES,
    ),
    'Features by a method that compares none': peers(
        'MutualLearning', tiny.gfl(), features=dict(type='mmkd.KD')
    ),
    'Another optimiser of a peer': lambda: peer_optimizer(
        dict(type='AdamW', lr=1e-3)
    ),
    'Another accumulation of a peer': lambda: peer_optimizer(
        dict(type='SGD', lr=0.1), accumulative_counts=4
    ),
    'Clipping of a peer alone': lambda: peer_optimizer(
        dict(type='SGD', lr=0.1), clip_grad=dict(max_norm=1)
    ),
    "A built optimiser without a method's layers": adapters_not_trained,
    'A built optimiser without the peers': lambda: check_trained(
        student_optimizer(), dict(second=a_peer())
    ),
    # ensembles
    'Too few members': lambda: EnsembleDetector([tiny.build(tiny.gfl())]),
    'Members of other classes': lambda: EnsembleDetector(
        [
            tiny.build(tiny.gfl()),
            tiny.build(tiny.gfl(bbox_head__num_classes=5)),
        ]
    ),
    'Logits of unlike heads': lambda: EnsembleDetector(
        [tiny.build(tiny.gfl()), tiny.build(tiny.retinanet())],
        fusion='logits',
    ),
    'A member without checkpoint': lambda: EnsembleDetector(
        [dict(config='a.py'), dict(config='b.py')]
    ),
    'An ensemble in training': ensemble_in_training,
    # files
    'Missing config of the teacher': built(
        teacher=dict(config='no.py', checkpoint=None), methods=dict(m=HINT)
    ),
    'No checkpoint given': built(
        teacher=dict(config='no.py'), methods=dict(m=HINT)
    ),
    'Unknown name of a model': built(
        teacher='paa_r101_fpn_1x_cocoo', methods=dict(m=HINT)
    ),
    'Missing checkpoint': lambda: load_checkpoint_file('no.pth'),
    'Missing ImageNet weights': lambda folder: load_checkpoint_file(
        str(folder / 'mobilenet_v2' / 'imagenet.pth')
    ),
    'Truncated checkpoint': truncated,
    'A file that is no checkpoint': web_page,
    'A checkpoint that holds more than weights': pickled_code,
    'A checkpoint that holds more than weights, of `load_from`, `--resume`, '
    'a test or `init_cfg`': loaded(
        dict(state_dict={}, args=SimpleNamespace())
    ),
    'A checkpoint that unpacks to far more than its size': packed_zeros,
    'A TorchScript archive': torchscript,
    'A folder as checkpoint': lambda folder: load_checkpoint_file(str(folder)),
    'A checkpoint of another layout': loaded(dict(state_dict=[])),
    'Something that is no dict': loaded([]),
    'An unknown name of a checkpoint': known_to('open-mmlab://resnet5000'),
    'A checkpoint of PAVI': known_to('pavi://model'),
    '`trust_checkpoint` that is no boolean': lambda: trusts(
        dict(trust_checkpoint='yes')
    ),
    'Resumed from weights': lambda: check_resumable({}, 'teacher.pth'),
    '`last_checkpoint` leads elsewhere': pointer('https://example.org/x.pth'),
    '`last_checkpoint` is no text': pointer('\0'),
    'The checkpoint of another network': of_another_network,
    '`mmkd convert` for a network of another size': (
        lambda: convert_state_dict(
            {**resnet(16).state_dict(), 'fc.weight': torch.ones(1)}, resnet(8)
        )
    ),
    '`mmkd convert` for a file without weights': lambda: weights_in(
        dict(epoch=1)
    ),
    '`mmkd convert` onto its own file': lambda: convert(
        ['weights.pth', 'weights.pth']
    ),
    'A `prefix` of `init_cfg` that is not there': starting(
        lambda: resnet(8), before='backbone.', prefix='student'
    ),
    "Weights that MMDetection's Swin cannot find": starting(
        lambda: SwinTransformer(embed_dims=16, depths=(1, 1, 1, 1))
    ),
    'A checkpoint behind a prefix': behind_prefixes('student'),
    'A checkpoint of several networks': behind_prefixes('student', 'teacher'),
    'A prefix that no key has': behind_prefixes('student', prefix='pupil'),
    'Resumed with other methods': resumed_with_other_methods,
    'Missing data': no_data,
    'Truncated annotations': cut_annotations,
    'Missing images': lambda: check_images(NoImages()),
    'Empty images': empty_images,
    'A damaged image': damaged_image,
    'No data under a path': lambda: find_data('/no/mine'),
    'No unlabelled images under a path': lambda: find_images('nowhere'),
    'A folder in no known layout': found_in('src/a.md'),
    'Images without labels': found_in('a.jpg'),
    'A video as data': found_in('street.mp4', name='street.mp4'),
    'An archive as data': found_in('mine.zip', name='mine.zip'),
    'Data that are mostly faulty': lambda folder: find_data(
        yolo_data(folder, '0 .5 .5 .1 .1\n' + '0 320 240\n' * 2)
    ),
    'Data with one labelled image': lambda folder: find_data(
        yolo_data(folder, '0 .5 .5 .1 .1', '')
    ),
    'Several annotation files for one split': two_files,
    'Converted data in a folder of others': converted_before,
    'Unknown names in `--classes`': lambda folder: prepare(
        yolo_data(folder), folder / 'out', Options(classes=('dog', 'cow'))
    ),
    'An image of too many pixels': large_image,
    'An impossible limit of pixels': many_pixels,
    'An archive that unpacks to too much': unpacked(zeros=b'0' * (80 << 20)),
    'An archive that names a path twice': packed_twice,
    'An archive that leads out of its folder': unpacked(**{'../x': b''}),
    'A mask that is not of its image': evaluated(
        'segm', segmentation=dict(size=[2, 3], counts='16')
    ),
    'A number that is none': evaluated('bbox', bbox=[0, 0, 1, 1], score=True),
    'A list of VOC that leads elsewhere': elsewhere,
    'A study whose values stand for too many': many_values,
    'A study that leads out of its folder': lambda: study_of(
        dict(name='../x', runs=dict(a=dict(config='a.py'))), 'x.yaml', 'x'
    ),
    'A run that writes elsewhere': written_elsewhere,
    'A page whose name is a folder': lambda folder: check_writable(folder),
    'A page in a folder that is not there': lambda folder: check_writable(
        folder / 'no' / 'report.html'
    ),
    # mmkd distill
    'A method that does not fit the pair': lambda: fitted(
        published_methods(['ld'], *RETINANETS)[0], Pair(*RETINANETS)
    ),
    'A network that cannot be built': lambda: Pair(
        Config(dict(model=dict(tiny.retinanet(), type='RetinaNett'))),
        RETINANETS[1],
    ),
    'Data without masks for a student with masks': distilled_on_boxes(
        'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'
    ),
    'A student without a loader for the data': distilled_on_boxes(
        toy.RETINANET, val_dataloader=None, test_dataloader=None
    ),
    'A value that the metric of the data does not give': distilled_on_boxes(
        toy.RETINANET,
        options={'default_hooks.checkpoint.save_best': 'coco/bbox_mAP'},
    ),
    '`--epochs` for a training by iterations': distilled_on_boxes(
        toy.RETINANET, epochs=2, train_cfg=dict(max_iters=9, _delete_=True)
    ),
    'An option that hits nothing': cfg_option('optim_wrapper.optimzer.lr'),
    'An option that nothing reads': cfg_option('nothing'),
    'An option outside a list': cfg_option('param_scheduler.2.gamma'),
    'An option within a number': cfg_option('train_cfg.max_epochs.x'),
    'A path that does not exist': lambda: distill(data='no_such_folder'),
    'A folder in place of a config': lambda folder: distill(
        teacher=str(folder)
    ),
    'A file in place of a folder': lambda: distill(work_dir=__file__),
    'A run that has been begun': begun_run,
    'A config that somebody has edited': edited_config,
    # testing
    'A pipeline that `--tta` cannot change': not_packed,
    '`--tta` with masks': lambda: check_no_masks(
        DetTTAModel(module=tiny.build(tiny.mask_rcnn()))
    ),
    # exporting
    'A size that the detector would pad': lambda: canvas_for(
        {}, 32, (100, 130)
    ),
    'A pipeline that does not say the size': lambda: canvas_for({}, 32),
    'Padding with a colour': lambda: canvas_for(
        padded_with([0, 114, 255]), 32, (96, 128)
    ),
    'A suppression that ONNX lacks': lambda: detector_graph(
        tiny.build(tiny.retinanet(test_cfg__nms__type='soft_nms')), (96, 128)
    ),
    'A detector that cannot be traced': not_traceable,
    'A folder without pictures': lambda folder: pictures_for({}, folder, 1),
    # training
    'A loss is NaN or infinite': nan_loss,
    'A network diverges': diverged_peer,
    'A gradient is NaN or infinite': broken_gradient,
    'Mixed precision that does not recover': skipped_steps,
    'Weights, buffers or averages are NaN or infinite': broken_buffer,
    'Two trainings in one work dir': used_work_dir,
    'A work dir in which nothing can be written': locked_out,
    'A metric of `save_best` that is misspelt': misspelt_metric,
    'A tap in a gradient-checkpointed block': without_effect(
        dict(HINT, source='backbone.layer4.1.conv2'), with_cp=True
    ),
    'A tap in a frozen part': without_effect(
        dict(HINT, source='backbone'), frozen_stages=4
    ),
    'A tap in a part with a learning rate of 0': without_effect(
        dict(HINT, source='backbone'),
        dict(paramwise_cfg=dict(custom_keys=dict(backbone=dict(lr_mult=0)))),
    ),
    'A method that detaches the student': without_effect(
        dict(type='mmkd.Detached')
    ),
}
# --------------------------------------------------------------------- tests


def shown(cell):
    """The message of a cell, as a pattern."""
    assert re.fullmatch(r'`.*`', cell), cell
    literal = cell.strip('`').strip()
    parts = literal.split(DOTS)
    assert sum(map(len, parts)) >= 25, f'too little of it: {cell}'
    return '.*'.join(map(re.escape, parts))


def test_the_page_lists_the_cases_in_their_order():
    assert [wrong for wrong, _ in rows()] == list(CASES)


@pytest.mark.parametrize('wrong', CASES)
def test_the_message_is_the_one_that_is_printed(wrong, tmp_path):
    provoke = CASES[wrong]
    needed = inspect.signature(provoke).parameters
    with pytest.raises(ERRORS) as caught:
        provoke(*[tmp_path] * ('folder' in needed))
    assert type(caught.value).__module__.startswith('mmkd.')
    message = ' '.join(str(caught.value).split())
    assert re.fullmatch(shown(ROWS[wrong]), message), message
