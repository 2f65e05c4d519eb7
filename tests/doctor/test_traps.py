"""Every known trap is found, and named."""

import copy

import faults
import pytest
import torch
import toy

from mmkd.doctor import diagnose

pytestmark = pytest.mark.usefixtures('shared_data')
CLASSES = toy.stock_classes()[:8]


def config(folder, method='CWD', runner=None, **options):
    """A small distillation from a teacher with a checkpoint."""
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
        cfg.runner_type = f'faults.{runner.__name__}'
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
    path = folder / 'teacher.pth'
    meta = dict(dataset_meta=dict(classes=list(classes))) if classes else {}
    torch.save(dict(state_dict=network.state_dict(), meta=meta), path)
    return dict(config=described, checkpoint=str(path))


def findings(cfg, **options):
    return '\n'.join(diagnose(cfg, **options).findings)


def test_nothing_is_wrong_without_a_fault(tmp_path):
    report = diagnose(config(tmp_path))
    assert not report.findings
    assert report.text().endswith('nothing found')
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
        assert not findings(cfg)
        cfg.runner_type = 'faults.InitialisesStudent'
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
        cfg.runner_type = 'faults.InitialisesStudent'
        assert 'the student was initialised again' in findings(cfg)

    def test_a_checkpoint_of_another_network(self, tmp_path):
        cfg = config(tmp_path)
        cfg.load_from = str(tmp_path / 'other.pth')
        torch.save(dict(state_dict={'x': torch.ones(2)}), cfg.load_from)
        assert 'has taken nothing from load_from' in findings(cfg)


class TestPixels:
    OTHER = dict(mean=[100.0, 110.0, 120.0], std=[1.0, 1.0, 1.0])

    def test_another_normalisation_is_converted(self, tmp_path):
        cfg = config(tmp_path)
        described = teacher(
            tmp_path,
            cfg,
            data_preprocessor=dict(**self.OTHER, bgr_to_rgb=False),
        )
        cfg.distillation.teacher = described
        report = diagnose(cfg)
        assert not report.findings
        assert 'in its own way' in report.sections['Pixels'][0]

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
        assert 'num_classes=8, but there are 7 class names' in findings(cfg)

    def test_of_the_student(self, tmp_path):
        cfg = config(tmp_path)
        described = cfg.distillation.teacher
        cfg.model.bbox_head.num_classes = 7
        cfg.distillation.teacher = described
        assert 'the student: the box head has num_classes=7' in findings(cfg)

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
    torch.save(dict(state_dict=network.state_dict()), path)
    cfg.distillation.teacher = dict(config=described, checkpoint=str(path))
    assert not findings(cfg)
    cfg.runner_type = 'faults.OnlyNormsInEval'
    found = findings(cfg)
    assert 'modules in training mode' in found
    assert 'the teacher answers differently to the same batch' in found


def test_an_untrained_teacher(tmp_path):
    cfg = config(tmp_path)
    cfg.distillation.teacher.checkpoint = None
    assert 'the teacher is untrained (checkpoint=None)' in findings(cfg)


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
