"""Every known trap is found, and named."""

import copy
import re

import pytest
import torch

from mmkd.doctor import conditions, diagnose, examination, weights
from mmkd.doctor.report import Report
from tests.helpers import faults, toy

CLASSES = toy.stock_classes()[:8]


def config(folder, method='CWD', runner=None, **options):
    """A small distillation from a teacher with a checkpoint."""
    if method == 'CWD':
        options.setdefault('loss_weight', 0.5)
    cfg = toy.distilled(
        folder,
        toy.RETINANET,
        methods={'kd': dict(type=f'mmkd.{method}', **options)},
    )
    cfg.model.bbox_head.update(num_classes=len(CLASSES), stacked_convs=1)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=CLASSES)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.distillation.teacher = teacher(folder, cfg)
    if runner is not None:
        cfg.runner_type = f'Fault{runner.__name__}'
    return cfg


def teacher(folder, cfg, classes=None, names=None, **model):
    """A saved teacher like the student, and its description.

    ``classes`` are those of its checkpoint, ``names`` those of its config.
    """
    described = copy.deepcopy(toy.teacher_config(cfg))
    for key, value in model.items():
        described['model'][key].update(value)
    if names is not None:
        dataset = described['test_dataloader']['dataset']
        dataset['metainfo'] = dict(classes=list(names))
    torch.manual_seed(1)
    network = toy.detector(copy.deepcopy(described['model']))
    head = network.bbox_head.retina_cls
    torch.nn.init.normal_(head.weight, std=0.1)
    torch.nn.init.normal_(network.bbox_head.retina_reg.bias, std=0.01)
    path = folder / 'teacher.pth'
    meta = dict(dataset_meta=dict(classes=list(classes))) if classes else {}
    torch.save(dict(state_dict=network.state_dict(), meta=meta), path)
    return dict(config=described, checkpoint=str(path))


def findings(cfg, **options):
    return '\n'.join(diagnose(cfg, **options).findings)


def test_nothing_is_wrong_without_a_fault(tmp_path):
    report = diagnose(config(tmp_path))
    assert not report.findings
    assert report.text().startswith('nothing found')
    loss = report.values['losses']['kd.loss_cwd']
    assert loss['value'] > 0
    assert -1 <= loss['cosine'] <= 1


@pytest.mark.parametrize(
    ('method', 'expected'),
    [
        ('SilentlyZero', 'kd.loss_neck teaches nothing: its value is exactly'),
        ('Detached', 'kd.loss_neck teaches nothing: its gradient is exactly'),
        ('ZeroUnderDDP', r'and 0\).*wrapped for distributed training'),
        ('SpansPadding', 'kd.loss_neck .*what lies on the padding changes'),
        ('Overflows', 'kd.loss_neck: NaN or infinite in float16'),
        ('Explodes', 'kd.loss_neck explodes'),
        ('IsNaN', 'kd.loss_neck: its value or gradient is NaN'),
        ('HoldsTeacher', 'every checkpoint holds weights of the teacher'),
        ('GrowsStudent', 'cannot be taken out.* foreign .neck.extra.weight'),
        ('ChangesStudent', 'at weight 0 the step is not the plain one'),
        ('IdleAdapter', '2 trainable parameters get no gradient'),
    ],
)
def test_a_broken_method(tmp_path, method, expected):
    found = findings(config(tmp_path, method))
    assert_matches(expected, found)


def test_checkpointed_blocks(tmp_path):
    """The gradients are measured within them as well."""
    cfg = config(tmp_path)
    cfg.model.backbone.update(with_cp=True, norm_eval=False, frozen_stages=0)
    assert not findings(cfg)


INNER = 'backbone.layer4.1.conv2'


@pytest.mark.parametrize(
    ('source', 'changes', 'expected'),
    [
        (
            INNER,
            {'model.backbone.with_cp': True},
            f'Its tap "{INNER}" lies within "backbone.layer4.1"',
        ),
        (
            'backbone',
            {'model.backbone.frozen_stages': 4},
            'Its tap "backbone" and all before it are frozen',
        ),
        (
            'backbone',
            {
                'optim_wrapper.paramwise_cfg': dict(
                    custom_keys=dict(backbone=dict(lr_mult=0))
                )
            },
            'weights whose learning rate is 0',
        ),
    ],
)
def test_a_tap_that_never_reaches_the_student(
    tmp_path, monkeypatch, source, changes, expected
):
    examine_only(monkeypatch, 'check_losses')
    cfg = config(tmp_path, 'FeatureHint', source=source)
    cfg.merge_from_dict(changes)
    found = findings(cfg)
    assert 'kd.loss_hint teaches nothing: its gradient is exactly 0' in found
    assert expected in found
    assert 'The nearest module that works is "' in found


@pytest.mark.parametrize('plain_runs', [True, False])
def test_a_gradient_that_is_nan_in_half_precision(
    tmp_path, monkeypatch, plain_runs
):
    """In a real step, and where only outputs can be halved."""
    examine_only(monkeypatch, 'check_half_precision')
    monkeypatch.setattr(conditions, '_plain_runs', lambda *_: plain_runs)
    found = findings(config(tmp_path, 'NaNGradient'))
    assert 'the gradient of kd.loss_neck: NaN or infinite in float16' in found


def test_half_precision_that_cannot_be_tried(tmp_path, monkeypatch):
    """It is not said to be fine."""
    examine_only(monkeypatch, 'check_half_precision')
    monkeypatch.setattr(conditions, '_plain_runs', lambda *_: False)
    cfg = config(tmp_path, 'MutualLearning')
    cfg.distillation.pop('teacher')
    cfg.distillation.peers = dict(other=dict(config=toy.teacher_config(cfg)))
    lines = diagnose(cfg).sections['Conditions']
    assert lines[0].startswith('float16: not judged, the plain step cannot')


def test_padding_is_judged_whatever_else_is_wrong(tmp_path, monkeypatch):
    examine_only(monkeypatch, 'check_loaded', 'check_padding')
    cfg = config(tmp_path)
    cfg.distillation.teacher.checkpoint = None
    report = diagnose(cfg)
    assert len(report.findings) == 1
    assert 'padding changes no loss' in report.sections['Conditions']


def assert_matches(pattern, text):
    with pytest.raises(AssertionError, match=pattern):
        raise AssertionError(text)


@pytest.mark.parametrize(
    ('runner', 'expected'),
    [
        (faults.InitialisesTeacher, 'the teacher was initialised again'),
        (faults.DrawsNumbers, 'draws from the global random numbers even'),
        (faults.TrainsTeacher, 'the teacher requires a gradient'),
        (faults.SavesTeacher, 'holds weights of the teacher'),
    ],
)
def test_a_broken_runner(tmp_path, runner, expected):
    found = findings(config(tmp_path, runner=runner))
    assert_matches(expected, found)


class TestStudentInitialisedAgain:
    def test_after_load_from(self, tmp_path):
        cfg = config(tmp_path)
        cfg.load_from = cfg.distillation.teacher.checkpoint
        assert not diagnose(cfg).stops
        cfg.runner_type = 'FaultInitialisesStudent'
        found = findings(cfg)
        assert 'the student was initialised again after load_from' in found
        assert '1 tensors have other values (backbone.conv1.weight)' in found

    def test_after_a_pretrained_backbone(self, tmp_path):
        cfg = config(tmp_path)
        backbone = toy.detector(copy.deepcopy(cfg.model)).backbone
        path = tmp_path / 'backbone.pth'
        torch.save(backbone.state_dict(), path)
        cfg.model.backbone.init_cfg = dict(
            type='Pretrained', checkpoint=str(path)
        )
        report = diagnose(cfg)
        assert not report.findings
        assert any(str(path) in x for x in report.sections['Weights'])
        cfg.runner_type = 'FaultInitialisesStudent'
        assert 'the student was initialised again' in findings(cfg)

    def test_a_pretrained_backbone_without_a_type(self, tmp_path):
        """As PVT's configs have it."""
        path = tmp_path / 'backbone.pth'
        model = torch.nn.ModuleDict(dict(backbone=torch.nn.Linear(2, 2)))
        torch.save(model.backbone.state_dict(), path)
        model.backbone.init_cfg = dict(checkpoint=str(path))
        report = Report()
        weights._check_pretrained('student', model, model, report)
        (line,) = report.sections['Weights']
        assert f'backbone from {path}: 2 of 2 tensors' in line

    def test_a_checkpoint_of_another_network(self, tmp_path):
        cfg = config(tmp_path)
        cfg.load_from = str(tmp_path / 'other.pth')
        torch.save(dict(state_dict={'x': torch.ones(2)}), cfg.load_from)
        assert 'has taken nothing from load_from' in findings(cfg)


@pytest.fixture
def short(monkeypatch):
    """Nothing but what describes the networks."""
    examine_only(monkeypatch)


def examine_only(monkeypatch, *checks):
    """Leave out the other checks of an examination."""
    for name in vars(examination).copy():
        if name.startswith('check_') and name not in checks:
            monkeypatch.setattr(examination, name, lambda *_: None)


def cells(line):
    """Of a row of a table."""
    return re.split('  +', line)


@pytest.mark.usefixtures('short')
class TestTaps:
    HEAD = dict(in_channels=16, feat_channels=16)

    def rows(self, cfg):
        head, *rows = (cells(x) for x in diagnose(cfg).sections['Taps'])
        assert head[:4] == ['method', 'network', 'tap', 'level']
        assert head[-1] == 'adapter'
        return [row for row in rows if len(row) == len(head)]

    def adapters(self, cfg):
        return self.adapters_in(self.rows(cfg))

    def adapters_in(self, rows):
        rows = [row for row in rows if row[1] == 'student']
        assert [row[3] for row in rows] == ['0', '1', '2', '3', '4']
        return [row[-1] for row in rows]

    def test_none(self, tmp_path):
        cfg = config(tmp_path)
        width = str(cfg.model.neck.out_channels)
        rows = self.rows(cfg)
        assert self.adapters_in(rows) == ['identity'] * 5
        assert rows[1] == [
            *('kd', 'student', 'neck', '1'),
            *(width, '6x8', '16', 'identity'),
        ]
        assert rows[6] == [*('kd', 'teacher', 'neck', '1'), *rows[1][4:7], '-']

    @pytest.mark.parametrize(
        ('method', 'layer'), [('CWD', 'Conv2d'), ('TaT', 'Embeddings')]
    )
    def test_to_another_width(self, tmp_path, method, layer):
        cfg = config(tmp_path, method)
        cfg.distillation.teacher = teacher(
            tmp_path, cfg, neck=dict(out_channels=16), bbox_head=self.HEAD
        )
        width = cfg.model.neck.out_channels
        assert self.adapters(cfg) == [f'{layer} {width} -> 16'] * 5

    def test_to_other_levels(self, tmp_path):
        levels = dict(levels=[1, 2], teacher_levels=[0, 2])
        cfg = config(tmp_path, **levels, resize=True)
        assert self.adapters(cfg) == [
            'not used',
            "identity, resized to 12x16, to the teacher's level 0",
            'identity',
            'not used',
            'not used',
        ]

    def test_of_a_hint_within_a_method(self, tmp_path):
        cfg = toy.distilled(tmp_path, methods={'frcnn': toy.FRCNN})
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        width = cfg.model.neck.out_channels
        assert self.adapters(cfg) == [f'Conv2d {width} -> {width}'] * 5

    def test_of_the_towers_of_a_head(self, tmp_path):
        cfg = config(tmp_path, 'CrossKD', layer=1)
        towers = {
            row[2].split('.')[1]: row[-1]
            for row in self.rows(cfg)
            if row[1] == 'student'
        }
        assert towers == {'cls_convs': 'identity', 'reg_convs': 'identity'}

    def test_of_several_teachers(self, tmp_path):
        cfg = config(tmp_path)
        cfg.distillation.teacher = [cfg.distillation.teacher] * 2
        rows = self.rows(cfg)
        assert len(rows) == 20
        assert {tuple(row[:2]) for row in rows} == {
            (f'kd, teacher_{label}', network)
            for label in '12'
            for network in ('student', 'teacher')
        }


class TestPixels:
    OTHER = dict(mean=[100.0, 110.0, 120.0], std=[1.0, 1.0, 1.0])

    def test_another_normalisation_is_converted(self, tmp_path, short):
        cfg = config(tmp_path)
        other = dict(bgr_to_rgb=False, pad_value=7, pad_size_divisor=64)
        cfg.distillation.teacher = teacher(
            tmp_path, cfg, data_preprocessor=dict(**self.OTHER, **other)
        )
        report = diagnose(cfg)
        assert not report.findings
        head, *rows = map(cells, report.sections['Pixels'])
        assert head == [
            *('network', 'mean', 'std', 'channels'),
            *('pad value', 'pad divisor', 'its batch'),
        ]
        mean, std = '123.675 116.28 103.53', '58.395 57.12 57.375'
        given = 'converted, padded to multiples of 32'
        assert rows == [
            ['student', mean, std, 'RGB', '0', '32', '-'],
            ['teacher', '100 110 120', '1 1 1', 'BGR', '7', '64', given],
        ]

    def test_the_same_is_left_as_it_is(self, tmp_path, short):
        cfg = config(tmp_path)
        cfg.distillation.peers = dict(
            other=dict(config=toy.teacher_config(cfg))
        )
        rows = [cells(x) for x in diagnose(cfg).sections['Pixels']]
        assert [(row[0], row[-1]) for row in rows[1:]] == [
            ('student', '-'),
            ('teacher', "the student's, as it is"),
            ('other', "the student's, as it is"),
        ]

    def test_the_students_normalisation(self, tmp_path):
        cfg = config(tmp_path, runner=faults.SharesPixels)
        cfg.distillation.teacher = teacher(
            tmp_path, cfg, data_preprocessor=self.OTHER
        )
        found = findings(cfg)
        assert "other pixels than it was trained on: the student's" in found

    def test_the_students_channel_order(self, tmp_path):
        cfg = config(tmp_path, runner=faults.KeepsChannelOrder)
        equal = dict(mean=[110.0] * 3, std=[60.0] * 3)
        cfg.model.data_preprocessor.update(equal)
        cfg.distillation.teacher = teacher(
            tmp_path, cfg, data_preprocessor=dict(bgr_to_rgb=False)
        )
        assert 'its channels are in the reverse order' in findings(cfg)


class TestClasses:
    def test_another_number(self, tmp_path):
        cfg = config(tmp_path)
        cfg.distillation.teacher = teacher(tmp_path, cfg, names=CLASSES[:7])
        assert 'num_classes: expected 7, because its' in findings(cfg)

    def test_of_the_student(self, tmp_path):
        cfg = config(tmp_path)
        described = cfg.distillation.teacher
        cfg.model.bbox_head.num_classes = 7
        cfg.distillation.teacher = described
        assert 'bbox_head.num_classes: expected 8, because' in findings(cfg)

    def test_the_config_names_another_order(self, tmp_path):
        cfg = config(tmp_path)
        cfg.distillation.teacher = teacher(
            tmp_path, cfg, classes=CLASSES[::-1]
        )
        found = findings(cfg)
        assert 'trained on 8 classes, its config has 8 or another' in found
        assert 'truck / person' in found

    def test_nothing_names_them(self, tmp_path):
        cfg = config(tmp_path)
        del cfg.distillation.teacher.config['test_dataloader']
        found = findings(cfg)
        assert 'neither the teacher' in found
        assert "the student's are assumed" in found

    def test_mapped_by_number(self, tmp_path):
        cfg = config(tmp_path, 'KD', runner=faults.MapsByNumber)
        cfg.distillation.teacher = rotated(tmp_path, cfg)
        assert 'the class map does not join equal names' in findings(cfg)

    def test_a_method_that_ignores_the_map(self, tmp_path):
        cfg = config(tmp_path, 'IgnoresClassMap')
        cfg.distillation.teacher = rotated(tmp_path, cfg)
        found = findings(cfg)
        assert 'kd.loss_cls' in found
        assert 'the order in which the teacher lists its classes' in found

    def test_a_method_that_uses_it(self, tmp_path):
        cfg = config(tmp_path, 'KD')
        cfg.distillation.teacher = rotated(tmp_path, cfg)
        report = diagnose(cfg)
        assert not report.findings
        assert "the teacher's order of classes is free" in report.text()


def rotated(folder, cfg):
    """A teacher of the same classes in another order, and one more."""
    names = [*CLASSES[3:], *CLASSES[:3]]
    return teacher(folder, cfg, classes=names, names=names)


def test_only_norms_in_eval(tmp_path):
    cfg = config(tmp_path)
    backbone = dict(
        _delete_=True,
        type='SwinTransformer',
        embed_dims=16,
        depths=(1, 1, 1, 1),
        num_heads=(1, 1, 1, 1),
        drop_path_rate=0.9,
        out_indices=(1, 2, 3),
    )
    described = toy.teacher_config(cfg)
    described['model']['backbone'] = backbone
    backbone.pop('_delete_')
    described['model']['neck'].update(in_channels=[32, 64, 128], start_level=0)
    path = tmp_path / 'swin.pth'
    network = toy.detector(copy.deepcopy(described['model']))
    torch.nn.init.normal_(network.bbox_head.retina_reg.bias, std=0.01)
    torch.save(dict(state_dict=network.state_dict()), path)
    cfg.distillation.teacher = dict(config=described, checkpoint=str(path))
    assert not findings(cfg)
    cfg.runner_type = 'FaultOnlyNormsInEval'
    found = findings(cfg)
    assert 'modules in training mode' in found
    assert 'the teacher answers differently to the same batch' in found


def test_an_untrained_teacher(tmp_path):
    cfg = config(tmp_path)
    cfg.distillation.teacher.checkpoint = None
    assert 'the teacher is untrained (checkpoint=None)' in findings(cfg)


def test_a_teacher_of_another_library(tmp_path):
    cfg = config(tmp_path)
    state = {'model.0.conv.weight': torch.ones(1)}
    torch.save(state, cfg.distillation.teacher.checkpoint)
    (found,) = diagnose(cfg).stops
    assert 'does not fit the teacher RetinaNet' in found
    assert 'It holds the weights of an Ultralytics YOLO' in found


def test_a_teacher_that_detects_nothing(tmp_path):
    whole = toy.distilled(tmp_path, toy.RETINANET)
    cfg = config(tmp_path)
    for key in ('val_dataloader', 'val_evaluator', 'val_cfg'):
        cfg[key] = whole[key]
    cfg.val_dataloader.dataset.metainfo = dict(classes=CLASSES)
    assert 'detects nothing on 2 validation images' in findings(
        cfg, evaluate=2
    )


def test_what_cannot_be_built_is_a_finding(tmp_path):
    cfg = config(tmp_path)
    cfg.distillation.methods.kd.temprature = 2
    assert 'no option "temprature"' in findings(cfg)
    cfg = config(tmp_path)
    cfg.distillation.teacher.checkpoint = str(tmp_path / 'no.pth')
    assert 'no.pth' in findings(cfg)
    assert 'does not distil' in findings(toy.plain(tmp_path))


def test_a_runner_that_leaves_the_distillation_out(tmp_path):
    for kind in ('FlexibleRunner', 'Runner'):
        cfg = config(tmp_path)
        cfg.runner_type = kind
        assert f'{kind} would train without it' in findings(cfg)
