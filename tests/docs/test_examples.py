"""The code that tutorials show is imported, built and run."""

import pytest
import torch

import mmkd
from mmkd.core.distiller import build_distiller
from mmkd.doctor import diagnose
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy

AT = 'mmkd.AttentionTransfer'
WIDER = dict(neck__out_channels=24, bbox_head__in_channels=24)
EXAMPLES = toy.ROOT / 'docs' / 'examples'


def step(student, distillation):
    """Build, attach, take a step; the losses and the student."""
    model = tiny.build(student)
    distiller = build_distiller(distillation, model, tiny.CLASSES)
    inputs, samples = tiny.batch_for(model)
    distiller.attach()
    return model, model.loss(inputs, samples)


# ----------------------------------------------------------------- own method


def test_the_method_has_at_most_60_lines():
    assert len((EXAMPLES / 'own_method.py').read_text().splitlines()) <= 60


def test_attention_by_hand(example):
    distance = example('own_method').attention_distance
    # Two positions, two channels: mean squares (2, 0) and (0, 8).
    student = torch.tensor([[[[2.0, 0.0]], [[0.0, 0.0]]]])
    teacher = torch.tensor([[[[0.0, 4.0]], [[0.0, 0.0]]]])
    assert distance(student, teacher) == pytest.approx(2.0)
    assert distance(student, 3 * student) == pytest.approx(0.0)


def test_the_method_distils(example):
    example('own_method')
    teacher = dict(config=dict(model=tiny.retinanet(**WIDER)), checkpoint=None)
    method = dict(type=AT, loss_weight=2.0)
    model, losses = step(
        tiny.retinanet(), dict(teacher=teacher, methods=dict(at=method))
    )
    loss = losses['at.loss_attention']
    assert 0 < loss < 4
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_doctor_finds_what_the_tutorial_says(example, tmp_path):
    """Its maps' padding is part of the attention."""
    example('own_method')
    cfg = toy.distilled(
        tmp_path, toy.RETINANET, methods=dict(at=dict(type=AT))
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    findings = [f for f in diagnose(cfg).findings if 'untrained' not in f]
    assert len(findings) == 1
    assert 'what lies on the padding changes the loss' in findings[0]


# ---------------------------------------------------------------- own teacher

BACKBONE = dict(
    type='mmdet.ResNet', depth=18, base_channels=8, out_indices=(1, 2, 3)
)
ENCODER = dict(type='mmkd.Encoder', backbone=BACKBONE)
PKD = dict(type='mmkd.PKD', levels=[0, 1, 2])


def test_the_teacher_teaches_features(example):
    example('own_teacher')
    model, losses = step(
        tiny.retinanet(),
        dict(teacher=ENCODER, methods=dict(pkd=PKD)),
    )
    losses['pkd.loss_pkd'].backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_the_teacher_sees_its_own_normalisation(example):
    example('own_teacher')
    student = tiny.build(tiny.retinanet())
    context = mmkd.TeacherContext(student, tiny.CLASSES)
    teacher = mmkd.build_teacher(ENCODER, context)
    inputs, samples = tiny.batch_for(student)
    own = tiny.retinanet()['data_preprocessor']
    mean, std = (
        torch.tensor(own[key]).view(1, 3, 1, 1) for key in ('mean', 'std')
    )
    theirs = torch.tensor([123.675, 116.28, 103.53]).view(1, 3, 1, 1)
    pixels = inputs * std + mean
    if not own.get('bgr_to_rgb'):
        pixels = pixels.flip(1)
    expected = (pixels - theirs) / torch.tensor([58.395, 57.12, 57.375]).view(
        1, 3, 1, 1
    )
    torch.testing.assert_close(
        teacher.renormalize(inputs, samples), expected, atol=1e-4, rtol=1e-4
    )


def test_what_the_teacher_lacks_is_said(example):
    example('own_teacher')
    with pytest.raises(mmkd.ConfigError, match='Encoder gives features'):
        step(
            tiny.retinanet(),
            dict(teacher=ENCODER, methods=dict(kd=dict(type='mmkd.KD'))),
        )
