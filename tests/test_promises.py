"""The eight promises of the design, each kept by real training runs."""

import copy
import logging
import os
import subprocess
import sys

import cv2
import numpy as np
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.models import ResNet
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner.checkpoint import load_state_dict

from mmkd.cli.main import main
from mmkd.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteLossError,
    TapError,
)
from tests import test_third_party  # noqa: F401 registers what it brings
from tests.engine import test_resume as resuming
from tests.helpers import toy

pytestmark = pytest.mark.usefixtures('photos_of_class')


def fresh_python(code, *arguments, cwd, allow_mmkd=True):
    """Run code in a new interpreter, where mmkd cannot be imported if so."""
    blocked = (
        'import sys\n'
        'class Block:\n'
        '    def find_spec(self, name, *_):\n'
        '        if name.partition(".")[0] == "mmkd":\n'
        '            raise ImportError("mmkd is not installed")\n'
        'sys.meta_path.insert(0, Block())\n'
    )
    done = subprocess.run(
        [
            sys.executable,
            '-c',
            code if allow_mmkd else blocked + code,
            *map(str, arguments),
        ],
        cwd=cwd,
        env={**os.environ, 'OMP_NUM_THREADS': '1'},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# MMDetection's own tool, in a process that imports nothing of mmkd's.
STOCK_TRAIN = """
import runpy, sys
from pathlib import Path
import mmdet
assert not any(name.startswith('mmkd') for name in sys.modules)
tool = Path(mmdet.__file__).parent / '.mim' / 'tools' / 'train.py'
sys.argv = [str(tool), *sys.argv[1:]]
runpy.run_path(str(tool), run_name='__main__')
assert 'mmkd.engine.runner' in sys.modules
"""
STOCK_USE = """
import sys
import torch
from mmdet.apis import inference_detector, init_detector
config, checkpoint, image = sys.argv[1:]
model = init_detector(config, checkpoint, device='cpu')
state = torch.load(checkpoint, map_location='cpu', weights_only=False)
model.load_state_dict(state['state_dict'], strict=True)
result = inference_detector(model, image)
assert torch.isfinite(result.pred_instances.scores).all()
assert not any(name.startswith('mmkd') for name in sys.modules)
print('classes', len(model.dataset_meta['classes']))
"""


class TestStockConfig:
    """1: a distilled config is a stock config."""

    def test_only_distillation_is_added(self, repo_root, tmp_path):
        config = Config.fromfile(repo_root / 'configs/faster_rcnn_kd_r50.py')
        base = tmp_path / 'stock.py'
        base.write_text(f"_base_ = ['mmdet::{toy.FASTER_RCNN}']")
        stock = Config.fromfile(base)
        assert set(config) - set(stock) == {'runner_type', 'distillation'}
        for key in stock:
            assert config[key] == stock[key], key

    def test_stock_tools_distil_and_use_it_without_importing_mmkd(
        self, tmp_path, photos_of_class
    ):
        cfg = toy.distilled(tmp_path, methods={'frcnn': toy.FRCNN})
        config = toy.write(cfg, tmp_path / 'config.py')
        fresh_python(STOCK_TRAIN, config, cwd=tmp_path)
        checkpoint = tmp_path / 'epoch_1.pth'
        saved = toy.load(checkpoint)['distillation']['state_dict']
        assert saved, 'nothing was distilled'

        image = next(photos_of_class.glob('coco_tiny/val2017/*.jpg'))
        out = fresh_python(
            STOCK_USE,
            config,
            checkpoint,
            image,
            cwd=tmp_path,
            allow_mmkd=False,
        )
        assert 'classes 80' in out

    def test_val_and_test_know_nothing_of_distillation(self, tmp_path):
        cfg = toy.distilled(
            tmp_path, teacher=dict(config='no.py', checkpoint='no.pth')
        )
        runner = toy.build(cfg)
        assert runner.val() == runner.test()
        names = {type(hook).__name__ for hook in runner.hooks}
        assert runner.distiller is None
        assert 'LossCheckHook' not in names

    def test_after_training_the_student_is_stock_again(self, tmp_path):
        cfg = toy.distilled(tmp_path, methods={'frcnn': toy.FRCNN})
        cfg.custom_hooks = [dict(type='EMAHook', update_buffers=True)]
        runner = toy.train(cfg)
        assert 'loss' not in vars(runner.model)
        assert not hasattr(runner.model, 'distillation')
        # The same process goes on to test, with EMA's weights in exchange.
        before = copy.deepcopy(runner.model.state_dict())
        runner.test()
        assert toy.same(before, runner.model.state_dict())


@pytest.fixture(scope='class')
def trained(photos_of_class, tmp_path_factory):
    folder = tmp_path_factory.mktemp('ema')
    cfg = toy.distilled(folder)
    wide = toy.plain(folder)
    wide.model.backbone.base_channels = 12
    wide.model.neck.update(in_channels=[12, 24, 48, 96], out_channels=24)
    wide.model.rpn_head.in_channels = 24
    wide.model.roi_head.bbox_roi_extractor.out_channels = 24
    wide.model.roi_head.bbox_head.in_channels = 24
    cfg.distillation.teacher = toy.untrained(wide)
    cfg.custom_hooks = [dict(type='EMAHook')]
    teacher = toy.detector(wide.model)
    toy.train(cfg)
    return cfg, toy.load(folder / 'epoch_1.pth'), teacher


class TestStockCheckpoint:
    """2: a distilled checkpoint is a stock checkpoint."""

    def test_state_dicts_have_the_stock_keys_and_load_strictly(self, trained):
        cfg, checkpoint, _ = trained
        stock = toy.detector(cfg.model)
        assert list(checkpoint['state_dict']) == list(stock.state_dict())
        stock.load_state_dict(checkpoint['state_dict'], strict=True)
        average = dict(checkpoint['ema_state_dict'])
        assert average.pop('steps') == 4
        average = {k.removeprefix('module.'): v for k, v in average.items()}
        stock.load_state_dict(average, strict=True)
        # MMEngine saves the average as the weights, and the weights beside.
        assert not toy.same(average, dict(checkpoint['state_dict']))

    def test_adapters_lie_under_their_own_key(self, trained):
        kept = trained[1]['distillation']
        adapters = [f'methods.hint.adapters.{i}' for i in range(5)]
        for key, prefix in (
            ('state_dict', 'distillation.'),
            ('ema_state_dict', 'module.distillation.'),
        ):
            assert set(kept[key]) == {
                f'{prefix}{a}.{p}'
                for a in adapters
                for p in ('weight', 'bias')
            }
        weight = 'distillation.methods.hint.adapters.0.weight'
        assert kept['state_dict'][weight].shape == (24, 32, 1, 1)
        optimizer = trained[1]['optimizer']['state']
        assert len(optimizer) == 10 + sum(
            1 for _ in toy.detector(trained[0].model).parameters()
        )

    def test_the_teacher_is_not_in_the_file(self, trained):
        cfg, checkpoint, teacher = trained
        student = toy.detector(cfg.model).state_dict()
        own = {tuple(v.shape) for v in student.values()}
        own |= {
            tuple(v.shape)
            for v in checkpoint['distillation']['state_dict'].values()
        }
        foreign = {tuple(v.shape) for v in teacher.state_dict().values()} - own
        assert len(foreign) > 15
        shapes = [tuple(t.shape) for t in tensors(checkpoint)]
        assert len(shapes) > 2 * len(student)
        assert not foreign & set(shapes)

    def test_it_exports_to_onnx(self, trained, tmp_path, photos_of_class):
        """And the graph finds what MMDetection finds with the checkpoint."""
        pytest.importorskip('onnx')
        runtime = pytest.importorskip('onnxruntime')
        cfg = copy.deepcopy(trained[0])
        cfg.model.test_cfg.rcnn.score_thr = 0.01  # after one epoch
        config = str(toy.write(cfg, tmp_path / 'config.py'))
        checkpoint = f'{cfg.work_dir}/epoch_1.pth'
        out = str(tmp_path / 'student.onnx')
        words = ['export', config, checkpoint, '--onnx', '--out', out]
        assert main(words) == 0

        path = next(photos_of_class.glob('coco_tiny/val2017/*.jpg'))
        photo = cv2.resize(cv2.imread(str(path)), toy.SCALE)
        model = init_detector(config, checkpoint, device='cpu')
        ours = inference_detector(model, photo).pred_instances
        boxes, scores, labels = runtime.InferenceSession(out).run(
            None, dict(image=photo, size=np.array(photo.shape[:2]))
        )
        assert len(boxes) == len(ours) > 5
        np.testing.assert_allclose(scores, ours.scores, atol=1e-4)
        np.testing.assert_allclose(boxes, ours.bboxes, atol=0.1)
        np.testing.assert_array_equal(labels, ours.labels)

    def test_its_random_states_are_read_without_running_code(self, trained):
        folder = trained[0].work_dir
        content = torch.load(
            f'{folder}/epoch_1.pth', weights_only=False, map_location='cpu'
        )['distillation']
        torch.save(content, f'{folder}/kept.pth')
        assert toy.same(
            torch.load(f'{folder}/kept.pth', weights_only=True), content
        )


def tensors(content):
    if isinstance(content, torch.Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from tensors(value)
    elif isinstance(content, list | tuple):
        for value in content:
            yield from tensors(value)


ADAMW = dict(type='AdamW', lr=1e-3, weight_decay=0.05)


@pytest.fixture(scope='class')
def stock_run(photos_of_class, tmp_path_factory):
    runs = {}

    def run(base, optimizer):
        key = (base, str(optimizer))
        if key not in runs:
            cfg = toy.plain(tmp_path_factory.mktemp('stock'), base, epochs=2)
            set_optimizer(cfg, optimizer)
            record = toy.Record()
            runner = toy.train(cfg, record)
            assert type(runner).__module__ == 'mmengine.runner.runner'
            runs[key] = record, runner.model.state_dict()
        return runs[key]

    return run


class TestZeroWeightIsStock:
    """3: with every weight at 0, the run is the stock one, bit for bit."""

    @pytest.mark.parametrize(
        ('base', 'method', 'optimizer'),
        [
            (toy.FASTER_RCNN, toy.FRCNN, None),
            (toy.FASTER_RCNN, toy.HINT, ADAMW),
            (toy.RETINANET, toy.HINT, None),
            (toy.RETINANET, toy.HINT, ADAMW),
            (toy.PAA, toy.LAD, None),
        ],
        ids=[
            *('frcnn-sgd', 'hint-adamw', 'one-stage-sgd'),
            *('one-stage-adamw', 'lad-sgd'),
        ],
    )
    def test_two_epochs(self, tmp_path, stock_run, base, method, optimizer):
        expected, weights = stock_run(base, optimizer)
        cfg = toy.distilled(
            tmp_path,
            base,
            methods={'kd': dict(method, loss_weight=0.0)},
            epochs=2,
        )
        set_optimizer(cfg, optimizer)
        record = toy.Record()
        runner = toy.train(cfg, record)
        assert runner.distiller is not None
        assert len(record.losses) == 8
        assert len(record.metrics) == 2
        assert record.losses == expected.losses
        assert toy.same(record.metrics, expected.metrics)
        assert toy.same(record.gradients, expected.gradients)
        assert any(g is not None and g.any() for g in record.gradients[-1])
        assert toy.same(weights, runner.model.state_dict())

    def test_the_teacher_draws_no_random_numbers(self, tmp_path, stock_run):
        """With weight, and a teacher that draws in its forward pass.

        The student stands still, so that it samples as many proposals.
        """
        still = dict(type='SGD', lr=0.0)
        expected, _ = stock_run(toy.FASTER_RCNN, still)
        cfg = toy.distilled(tmp_path, epochs=2)
        config = cfg.distillation.teacher.config
        config.model.backbone.type = 'RestlessResNet'
        cfg.distillation.methods = dict(
            # factors of 1: the student's own losses are compared, too
            kd=dict(toy.FRCNN, mu=1.0, lambda_reg=1.0)
        )
        set_optimizer(cfg, still)
        record = toy.Record()
        toy.train(cfg, record)
        assert len(record.losses) == len(expected.losses) == 8
        for found, stock in zip(record.losses, expected.losses, strict=True):
            assert found['loss'] > stock['loss']
            assert {'kd.loss_rpn_bounded', 'kd.loss_hint'} <= found.keys()
            for name in stock.keys() - {'loss', 'grad_norm'}:
                assert found[name] == stock[name], name
        assert toy.same(record.states, expected.states)


@MODELS.register_module()
class RestlessResNet(ResNet):
    """Draws from every global generator whenever it runs."""

    def forward(self, x):
        import random

        import numpy as np

        random.random(), np.random.rand()
        x = x + 1e-6 * torch.rand_like(x)
        return super().forward(x)


def set_optimizer(cfg, optimizer):
    if optimizer is not None:
        cfg.optim_wrapper.optimizer = optimizer


class KeepBatch(Hook):
    """The first batch, and the student as it saw it."""

    priority = 'VERY_HIGH'

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 0:
            self.batch = copy.deepcopy(data_batch)
            self.student = copy.deepcopy(runner.distiller.student)


class TestTeacherSeesItsOwn:
    """4: the teacher sees what it was trained on, and its own classes."""

    def test_normalisation(self, tmp_path):
        cfg = toy.distilled(
            tmp_path, methods={'hint': dict(toy.HINT, adapt=False)}, images=2
        )
        for step in cfg.train_dataloader.dataset.pipeline:
            if step.type == 'Resize':
                step.keep_ratio = False  # no padding: (96, 128) each
        cfg.distillation.teacher.config.model.data_preprocessor.update(
            mean=[10.0, 20.0, 30.0], std=[50.0, 60.0, 70.0], bgr_to_rgb=False
        )
        record, kept = toy.Record(), KeepBatch()
        runner = toy.train(cfg, record, kept)

        teacher, student = runner.distiller.teacher.model, kept.student
        with torch.no_grad():
            theirs = teacher.extract_feat(
                teacher.data_preprocessor(copy.deepcopy(kept.batch))['inputs']
            )
            kept.student.train()
            ours = student.extract_feat(
                student.data_preprocessor(kept.batch)['inputs']
            )
        distances = [
            (a - b).square().mean() for a, b in zip(ours, theirs, strict=True)
        ]
        expected = torch.stack(distances).mean().item()
        assert record.losses[0]['hint.loss_hint'] == pytest.approx(
            expected, rel=1e-4
        )

    def test_classes_are_mapped_by_name(self, tmp_path):
        """A teacher whose classes are reversed teaches the same."""
        cfg = toy.distilled(tmp_path / 'a', methods={'kd': toy.FRCNN})
        # The teacher's boxes, which bound the loss, are the better ones for
        # about half of the proposals.
        cfg.model.roi_head.bbox_head.init_cfg = dict(
            type='Normal', std=0.05, override=dict(name='fc_reg')
        )
        cfg.model.train_cfg.rcnn.sampler.num = 64
        model = toy.detector(cfg.model)
        head = model.roi_head.bbox_head
        torch.nn.init.normal_(head.fc_cls.weight, std=0.5)
        torch.nn.init.normal_(head.fc_reg.weight, std=0.05)
        names = toy.stock_classes()
        save_teacher(tmp_path / 'a.pth', model, names)
        order = list(range(79, -1, -1))
        with torch.no_grad():
            for layer, rows in ((head.fc_cls, 1), (head.fc_reg, 4)):
                for tensor in (layer.weight, layer.bias):
                    per_class = tensor[: 80 * rows].unflatten(0, (80, rows))
                    tensor[: 80 * rows] = per_class[order].flatten(0, 1)
        save_teacher(tmp_path / 'b.pth', model, names[::-1])

        losses = []
        for name in ('a', 'b'):
            cfg.work_dir = str(tmp_path / name)
            cfg.distillation.teacher.checkpoint = str(tmp_path / f'{name}.pth')
            record = toy.Record()
            runner = toy.train(cfg, record)
            losses.append(record.losses[0])
            mapped = not runner.distiller.teacher.class_map.identical
            assert mapped == (name == 'b')
        assert losses[0]['kd.loss_rcn_bounded'] > 0
        assert losses[0].keys() == losses[1].keys()
        for key, value in losses[0].items():
            assert losses[1][key] == pytest.approx(value, rel=1e-4), key

    def test_no_shared_class_is_an_error_that_lists_both(self, tmp_path):
        cfg = toy.distilled(tmp_path)
        save_teacher(
            tmp_path / 't.pth',
            toy.detector(cfg.model),
            [f'part {i}' for i in range(80)],
        )
        cfg.distillation.teacher.checkpoint = str(tmp_path / 't.pth')
        with pytest.raises(
            ConfigError, match=r'no class name.*Student: person.*part 0'
        ):
            toy.train(cfg)


def save_teacher(path, model, classes):
    meta = dict(dataset_meta=dict(classes=classes))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)


class PoisonTeacher(Hook):
    """A teacher that breaks in the middle of the second epoch."""

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == 5:
            self.before = copy.deepcopy(runner.model.state_dict())
            for parameter in runner.distiller.teacher.model.parameters():
                parameter.data.fill_(float('nan'))


class TestNothingIsSilentlyWrong:
    """5: a clear error before or at the first iteration, or a warning."""

    @pytest.mark.parametrize(
        ('methods', 'message'),
        [
            (
                {'hint': dict(type='mmkd.FeatureHnt')},
                r'distillation\.methods\.hint.*Did you mean '
                r'"mmkd\.FeatureHint"',
            ),
            (
                {'hint': dict(toy.HINT, sorce='neck')},
                r'hint \(FeatureHint\) has no option "sorce".*"source"',
            ),
            (
                {'hint': dict(toy.HINT, loss=dict(type='mmkd.HintLos'))},
                r'FeatureHint\.loss.*"mmkd\.HintLoss"',
            ),
            ({'hint': dict(source='neck')}, r'methods\.hint must be a dict'),
            ({'hint': dict(toy.HINT, loss_weight=-1)}, 'at least 0, got -1'),
            ({}, r'needs "methods"'),
            ([toy.HINT], r'distillation\.methods must be'),
            ({'a.b': toy.HINT}, r'"a\.b".*name'),
            ({'values': toy.HINT}, r'"values".*name'),
        ],
        ids=lambda value: str(value)[:40] if isinstance(value, str) else '',
    )
    def test_misspelt_methods(self, tmp_path, methods, message):
        cfg = toy.distilled(tmp_path, methods=methods)
        with pytest.raises(ConfigError, match=message):
            toy.train(cfg)

    @pytest.mark.parametrize(
        ('change', 'message'),
        [
            (
                dict(techer=dict(config='a.py')),
                r'has no option "techer".*Did you mean "teacher"',
            ),
            (dict(teacher=dict(config='a.py')), 'no "checkpoint"'),
            (
                dict(teacher=dict(config='a.py', checkpont='b.pth')),
                r'"checkpont".*"checkpoint"',
            ),
            (
                dict(teacher='faster-rcnn_r50_fpn_1x_cocoo'),
                'faster-rcnn_r50_fpn_1x_coco',
            ),
            (
                dict(teacher=dict(config='no.py', checkpoint=None)),
                "'no.py' does not exist",
            ),
        ],
        ids=['key', 'missing', 'option', 'name', 'file'],
    )
    def test_misspelt_distillation(self, tmp_path, change, message):
        cfg = toy.distilled(tmp_path)
        cfg.distillation = {'methods': {'hint': toy.HINT}, **change}
        with pytest.raises(ConfigError, match=message):
            toy.train(cfg)

    @pytest.mark.parametrize('key', ['distilation', 'distillatoin', 'Distill'])
    def test_misspelt_key(self, tmp_path, key):
        cfg = toy.distilled(tmp_path)
        cfg[key] = cfg.pop('distillation')
        with pytest.raises(ConfigError, match=f'"{key}".*"distillation"'):
            toy.build(cfg)

    @pytest.mark.parametrize(
        ('hook', 'message'),
        [
            (dict(type='mmkd.TelemetryHok'), r'"mmkd\.TelemetryHook"'),
            (
                dict(type='mmkd.WeightScheduleHook', warmpu=3),
                r'custom_hooks \(WeightScheduleHook\).*"warmpu".*"warmup"',
            ),
        ],
    )
    def test_misspelt_hook(self, tmp_path, hook, message):
        cfg = toy.distilled(tmp_path)
        cfg.custom_hooks = [hook]
        with pytest.raises(ConfigError, match=message):
            toy.build(cfg)

    def test_a_tap_that_never_fires(self, tmp_path):
        cfg = toy.distilled(
            tmp_path, methods={'hint': dict(toy.HINT, source='neck.missing')}
        )
        with pytest.raises(TapError, match=r'"neck\.missing".*never fired'):
            toy.train(cfg)

    def test_a_checkpoint_that_does_not_fit(self, tmp_path):
        cfg = toy.distilled(tmp_path)
        state = toy.detector(cfg.model).state_dict()
        state['neck.extra'] = state.pop('rpn_head.rpn_cls.bias')
        torch.save(state, tmp_path / 'teacher.pth')
        cfg.distillation.teacher.checkpoint = str(tmp_path / 'teacher.pth')
        with pytest.raises(
            CheckpointError, match=r'rpn_head\.rpn_cls\.bias.*neck\.extra'
        ):
            toy.train(cfg)

    def test_nan_stops_before_the_optimizer(self, tmp_path):
        cfg = toy.distilled(tmp_path, epochs=2)
        poison, runner = PoisonTeacher(), toy.build(cfg)
        runner.register_hook(poison)
        with pytest.raises(NonFiniteLossError, match=r'hint\.loss_hint'):
            runner.train()
        for name, value in runner.model.named_parameters():
            assert toy.same(value.data, poison.before[name]), name
        saved = toy.load(tmp_path / 'epoch_1.pth')
        assert saved['meta']['iter'] == 4
        assert (tmp_path / 'last_checkpoint').read_text().endswith('_1.pth')

    @pytest.mark.parametrize('weight', [0.0, 1.0])
    def test_a_loss_that_is_always_0_is_reported(
        self, tmp_path, caplog, weight
    ):
        loss = dict(type='mmkd.HintLoss', loss_weight=weight)
        cfg = toy.distilled(
            tmp_path, methods={'hint': dict(toy.HINT, loss=loss)}
        )
        cfg.custom_hooks = [dict(type='mmkd.LossCheckHook', patience=3)]
        runner = toy.build(cfg)
        runner.logger.addHandler(caplog.handler)
        runner.train()
        warned = [
            r.getMessage()
            for r in caplog.records
            if r.levelno == logging.WARNING and 'exactly 0' in r.getMessage()
        ]
        assert len(warned) == (weight == 0)
        if warned:
            assert warned[0].startswith('hint.loss_hint was exactly 0')


ANY = [
    'atss/atss_r50_fpn_1x_coco.py',
    'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py',
    'dab_detr/dab-detr_r50_8xb2-50e_coco.py',
    'dino/dino-4scale_r50_8xb2-12e_coco.py',
    'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py',
    'gfl/gfl_r50_fpn_1x_coco.py',
    'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
    'paa/paa_r50_fpn_1x_coco.py',
    'retinanet/retinanet_r50_fpn_1x_coco.py',
    'rtmdet/rtmdet_tiny_8xb32-300e_coco.py',
    'solo/solo_r50_fpn_1x_coco.py',
    'sparse_rcnn/sparse-rcnn_r50_fpn_1x_coco.py',
    'yolof/yolof_r50-c5_8xb8-1x_coco.py',
    'yolox/yolox_tiny_8xb8-300e_coco.py',
]


class TestAnyDetector:
    """6: feature distillation runs on every stock detector."""

    @pytest.mark.parametrize('base', ANY, ids=lambda b: b.split('/')[0])
    def test_two_iterations(self, tmp_path, base):
        cfg = toy.distilled(tmp_path, base, images=4)
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        record = toy.Record()
        runner = toy.train(cfg, record)
        assert len(record.losses) == 2
        for losses in record.losses:
            assert losses['hint.loss_hint'] > 0
        gradients = dict(
            zip(
                (name for name, _ in record.named),
                record.gradients[0],
                strict=True,
            )
        )
        reached = [
            n for n, g in gradients.items() if g is not None and g.any()
        ]
        assert any(name.startswith('backbone') for name in reached)
        saved = toy.load(tmp_path / 'epoch_1.pth')['state_dict']
        load_state_dict(runner.model, saved, strict=True)


CORNER = dict(type='mmkd.Corner')


class TestAnyTeacher:
    """7: a teacher says what it gives and a method what it needs."""

    @pytest.mark.parametrize(
        ('teacher', 'method', 'losses'),
        [
            (lambda frozen: frozen, toy.HINT, ['hint']),
            (lambda frozen: [frozen] * 2, toy.HINT, ['hint_1', 'hint_2']),
            (
                lambda frozen: dict(mean=[frozen] * 2),
                dict(type='mmkd.KD'),
                ['cls'],
            ),
            (lambda _: dict(type='mmkd.Oracle'), CORNER, ['energy']),
        ],
        ids=['frozen', 'several', 'mean', 'from outside'],
    )
    def test_each_kind_teaches(self, tmp_path, teacher, method, losses):
        cfg = toy.distilled(
            tmp_path, toy.RETINANET, methods=dict(m=method), images=4
        )
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.distillation.teacher = teacher(cfg.distillation.teacher)
        record = toy.Record()
        runner = toy.train(cfg, record)
        assert len(record.losses) == 2
        for found in record.losses:
            ours = {k: v for k, v in found.items() if k.startswith('m.')}
            assert list(ours) == [f'm.loss_{name}' for name in losses]
            assert all(value > 0 for value in ours.values())
        saved = toy.load(tmp_path / 'epoch_1.pth')['state_dict']
        load_state_dict(runner.model, saved, strict=True)

    @pytest.mark.parametrize(
        ('teacher', 'method', 'message'),
        [
            (
                lambda _: dict(type='mmkd.Oracle'),
                dict(type='mmkd.KD'),
                r'methods\.m \(KD\) needs dense predictions or RoI scores .*'
                r'Oracle gives detections.*Teachers that give it: '
                r'EnsembleTeacher, FrozenDetector.*Methods that fit Oracle: '
                r'.*Corner',
            ),
            (
                lambda frozen: dict(mean=[frozen] * 2),
                toy.HINT,
                r'methods\.m \(FeatureHint\) needs features .*Teachers that '
                r'give it: .*FrozenDetector\..*fit EnsembleTeacher: .*KD',
            ),
        ],
        ids=['from outside', 'mean'],
    )
    def test_else_the_error_lists_who_fits(
        self, tmp_path, teacher, method, message
    ):
        cfg = toy.distilled(tmp_path, toy.RETINANET, methods=dict(m=method))
        cfg.distillation.teacher = teacher(cfg.distillation.teacher)
        with pytest.raises(ConfigError, match=message):
            toy.train(cfg)


class TestResume:
    """8: it is exact, or says why it is not; more in engine/test_resume."""

    @pytest.mark.parametrize('workers', [0, 2])
    @pytest.mark.parametrize(
        ('iters', 'name'), [(None, 'epoch_{}.pth'), (4, 'iter_{}.pth')]
    )
    def test_it_is_exact(self, tmp_path, workers, iters, name):
        cfg = resuming.config(tmp_path, workers=workers, epochs=2, iters=iters)
        resuming.train_and_resume(cfg, tmp_path, 1, name=name)

    @pytest.mark.parametrize('workers', [0, 1])
    def test_a_pipeline_with_a_memory(self, tmp_path, workers):
        """It comes back; what a worker keeps to itself is named."""
        cfg = resuming.config(tmp_path, workers=workers, epochs=2)
        cfg.train_dataloader.dataset.pipeline[2:2] = [
            dict(type='CachedMosaic', img_scale=(96, 96), max_cached_images=4)
        ]
        if workers:
            said = resuming.what_is_said(cfg, tmp_path, 1)
            assert 'results_cache (in a worker of the data loader)' in said
        else:
            resuming.train_and_resume(cfg, tmp_path, 1)
