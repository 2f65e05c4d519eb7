"""A teacher and a method from outside the package, in a few lines."""

import copy

import pytest
import torch
from mmengine.config import Config, ConfigDict
from mmengine.structures import InstanceData

import mmkd
from mmkd.core.distiller import build_distiller
from mmkd.doctor import diagnose
from mmkd.start.command import main
from mmkd.start.config_text import methods, teacher_options, write_config
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy

# ------------------------------------- what a third party writes: 36 lines


@mmkd.TEACHERS.register_module()
class Oracle(mmkd.Teacher):
    """Knows the ground truth, each box with the same score."""

    gives = frozenset({'detections'})

    def __init__(self, *, context, score=0.9):
        self.class_map = mmkd.ClassMap(context.classes, context.classes)
        self.score = score

    def view(self, batch):
        return OracleView(self, batch.data_samples)

    def blank(self, device):
        return OracleView(self, [])


class OracleView(mmkd.TeacherView):
    def __init__(self, teacher, samples):
        self.class_map, self.cache = teacher.class_map, {}
        self.teacher, self.samples = teacher, samples

    @property
    def detections(self):
        found = [sample.gt_instances for sample in self.samples]
        scores = [torch.full((len(f),), self.teacher.score) for f in found]
        return [
            InstanceData(bboxes=f.bboxes, scores=s, labels=f.labels)
            for f, s in zip(found, scores, strict=True)
        ]


@mmkd.METHODS.register_module()
class Corner(mmkd.Method):
    """The energy in an image's corner, by what the teacher has found."""

    needs = ('detections',)
    student_paths = ('neck',)

    def forward(self, student, teacher, batch):
        corner = student.features('neck')[0][:, :, 0, 0]
        energy = corner.square().mean(1)
        scores = [found.scores.sum() for found in teacher.detections]
        return {'energy': (energy * torch.stack(scores)).mean()}


# -----------------------------------------------------------------------------

CFG = dict(
    teacher=dict(type='mmkd.Oracle', score=0.5),
    methods=dict(own=dict(type='mmkd.Corner', loss_weight=3.0)),
)


def test_they_distil():
    student = tiny.build(tiny.retinanet())
    distiller = build_distiller(CFG, student, tiny.CLASSES)
    inputs, samples = tiny.batch_for(student, objects=4)
    with torch.no_grad():
        maps = student.extract_feat(inputs)[0]
        stock = tiny.seeded_loss(student, inputs, samples)
    distiller.attach()
    losses = tiny.seeded_loss(student, inputs, samples)
    energy = maps[:, :, 0, 0].square().mean(1)
    expected = 3.0 * (energy * 4 * 0.5).mean()
    torch.testing.assert_close(losses['own.loss_energy'], expected)
    for name, loss in stock.items():
        assert all(map(torch.equal, losses[name], loss))


def test_a_method_that_asks_for_more_lists_who_fits():
    cfg = dict(CFG, methods=dict(kd=dict(type='mmkd.KD')))
    with pytest.raises(mmkd.ConfigError) as caught:
        build_distiller(cfg, tiny.build(tiny.retinanet()), tiny.CLASSES)
    text = str(caught.value)
    assert 'methods.kd (KD) needs dense predictions or RoI scores' in text
    assert 'Oracle gives detections' in text
    assert 'Teachers that give it: EnsembleTeacher, FrozenDetector' in text
    # Other tests of the same process may have registered methods as well.
    assert 'Corner' in text.partition('Methods that fit Oracle: ')[2]


def test_options_are_checked():
    cfg = dict(CFG, teacher=dict(type='mmkd.Oracle', skore=1))
    with pytest.raises(mmkd.ConfigError, match='Did you mean "score"'):
        build_distiller(cfg, tiny.build(tiny.retinanet()), tiny.CLASSES)
    cfg = dict(CFG, teacher=dict(type='mmkd.Orakle'))
    with pytest.raises(mmkd.ConfigError, match=r'Did you mean "mmkd.Oracle"'):
        build_distiller(cfg, tiny.build(tiny.retinanet()), tiny.CLASSES)


def test_mmkd_distill_offers_the_method():
    assert methods()['corner'] is Corner


def test_mmkd_distill_writes_their_config(tmp_path):
    options = teacher_options('mmkd.Oracle', None)
    module = 'tests.test_third_party'
    written = write_config(
        *(f'mmdet::{toy.RETINANET}', options, ['corner']),
        imports=[module],
        tried=False,
    )
    path = tmp_path / 'own.py'
    path.write_text(written.text)
    cfg = Config.fromfile(path)
    assert cfg.custom_imports.imports == [module]
    assert cfg.distillation.teacher.to_dict() == dict(type='mmkd.Oracle')
    assert cfg.distillation.methods.corner.to_dict() == dict(
        type='mmkd.Corner', loss_weight=1.0
    )


def test_a_module_that_cannot_be_imported():
    options = ['--student', 'a', '--teacher', 'b', '--method', 'pkd']
    with pytest.raises(mmkd.ConfigError, match=r'--import nowhere\.here: No'):
        main([*options, '--import', 'nowhere.here'])


def test_the_doctor_examines_them(tmp_path):
    cfg = toy.distilled(tmp_path, toy.RETINANET)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.distillation = ConfigDict(copy.deepcopy(CFG))
    report = diagnose(cfg)
    assert not report.stops
    assert 'own.loss_energy' in report.text()
