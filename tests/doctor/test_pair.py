"""A teacher that is none: smaller, the same, untrained, or worse."""

import pytest
import torch

from mmkd.doctor import diagnose
from tests.doctor.test_traps import config, examine_only, rotated, teacher
from tests.helpers import toy


@pytest.fixture(autouse=True)
def short(monkeypatch):
    examine_only(monkeypatch, 'check_pair', 'check_classes', 'check_precision')


def test_a_good_pair(tmp_path):
    report = diagnose(config(tmp_path))
    assert not report.findings + report.notes


def test_swapped(tmp_path):
    cfg = config(tmp_path)
    cfg.model.neck.out_channels = 64
    cfg.model.bbox_head.update(in_channels=64, feat_channels=64)
    (found,) = diagnose(cfg).warns
    assert 'the teacher (RetinaNet, 0.29 M parameters) is smaller' in found
    assert 'are the two swapped?' in found


def test_the_same_weights(tmp_path):
    cfg = config(tmp_path)
    cfg.load_from = cfg.distillation.teacher.checkpoint
    (found,) = diagnose(cfg).warns
    assert 'the same network with the same weights' in found


def test_a_checkpoint_of_an_untrained_network(tmp_path):
    cfg = config(tmp_path)
    torch.manual_seed(1)
    network = toy.detector(cfg.model)
    path = cfg.distillation.teacher.checkpoint
    torch.save(dict(state_dict=network.state_dict()), path)
    (found,) = diagnose(cfg).warns
    assert "the teacher's checkpoint seems untrained" in found


def test_classes_that_stay_out(tmp_path):
    cfg = config(tmp_path)
    names = [f'class {number}' for number in range(7)] + ['car']
    cfg.distillation.teacher = teacher(tmp_path, cfg, names=names)
    (found,) = diagnose(cfg).warns
    assert 'teaches nothing about 7 of the' in found
    assert 'person, bicycle, motorcycle, airplane' in found
    assert all(name in found for name in names[:7])


def test_classes_that_the_teacher_alone_has(tmp_path):
    cfg = config(tmp_path)
    for split in ('train', 'test'):
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.metainfo = dict(classes=dataset.metainfo.classes[:6])
    cfg.model.bbox_head.num_classes = 6
    report = diagnose(cfg)
    assert not report.findings
    (note,) = report.notes
    assert '2 of the' in note
    assert 'none of the student: train, truck.' in note


def test_worse_than_the_student_at_its_start(tmp_path, monkeypatch):
    """Each is what its evaluation says."""
    found = iter([{'coco/bbox_mAP': 0.1}, {'coco/bbox_mAP': 0.2}])
    monkeypatch.setattr(
        'mmkd.doctor.networks.evaluate_teacher', lambda *_: next(found)
    )
    whole = toy.distilled(tmp_path, toy.RETINANET)
    cfg = config(tmp_path)
    for key in ('val_dataloader', 'val_evaluator', 'val_cfg'):
        cfg[key] = whole[key]
    cfg.val_dataloader.dataset.metainfo = dict(
        classes=cfg.train_dataloader.dataset.metainfo.classes
    )
    cfg.load_from = str(tmp_path / 'student.pth')
    network = toy.detector(cfg.model)
    torch.save(dict(state_dict=network.state_dict()), cfg.load_from)
    report = diagnose(cfg, evaluate=2)
    (warning,) = report.warns
    assert 'the teacher is worse than what the student starts from' in warning
    assert 'coco/bbox_mAP is 0.1, that of the student 0.2' in warning
    assert report.values['student'] == {'coco/bbox_mAP': 0.2}


def test_another_order_is_no_finding(tmp_path):
    cfg = config(tmp_path)
    cfg.distillation.teacher = rotated(tmp_path, cfg)
    assert not diagnose(cfg).findings
