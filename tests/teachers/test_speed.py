"""Faster teachers: the distilled losses stay within tolerance."""

import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.core.distiller import build_distiller
from mmkd.data.batch import Batch
from mmkd.doctor.report import Report
from mmkd.doctor.weights import _check_file
from mmkd.errors import ConfigError
from mmkd.teachers import speed
from mmkd.teachers import speed_up as teacher_speed
from mmkd.teachers.speed import Speed
from mmkd.teachers.speed_up import compiled_parts
from tests.helpers import faster
from tests.helpers import tiny_detectors as tiny

PAIRS = dict(
    dense=(
        tiny.gfl,
        dict(
            hint=dict(type='mmkd.FeatureHint'),
            stage=dict(type='mmkd.PKD', source='backbone.layer3'),
            kd=dict(type='mmkd.KD'),
            ld=dict(type='mmkd.LD'),
        ),
    ),
    two_stage=(
        tiny.faster_rcnn,
        dict(frcnn=dict(type='mmkd.FasterRCNNDistillation')),
    ),
)
EXACT, HALF = 1e-4, 0.03
"""Tolerances: of rounding, and of half precision (8 bits of bfloat16)."""


class Setting:
    """A pair, its batch, and its losses with the teacher as it is."""

    def __init__(self, name, folder):
        self.config, self.methods = PAIRS[name]
        self.teacher = faster.saved(self.config(), folder)
        distiller = self.distiller()
        self.batch = tiny.batch_for(
            distiller.student, sizes=((96, 128), (128, 96))
        )
        self.losses = faster.losses_of(distiller, self.batch)

    def distiller(self, **options):
        return faster.distiller_of(
            self.config(), self.teacher, self.methods, **options
        )

    def error(self, distiller):
        losses = faster.losses_of(distiller, self.batch)
        return faster.apart(losses, self.losses)


@pytest.fixture(scope='module', params=PAIRS)
def setting(request, tmp_path_factory):
    return Setting(request.param, tmp_path_factory.mktemp('weights'))


@pytest.fixture(scope='module')
def dense(tmp_path_factory):
    return Setting('dense', tmp_path_factory.mktemp('weights'))


def test_the_losses_tell_teachers_apart(setting, tmp_path):
    """What the tolerances are worth: another teacher is far beyond them."""
    other = faster.saved(setting.config(), tmp_path, seed=8)
    distiller = setting.distiller(checkpoint=other['checkpoint'])
    assert setting.error(distiller) > 0.1


def test_folded_norms(setting):
    distiller = setting.distiller(fold_bn=True)
    assert not any(
        isinstance(m, _BatchNorm) for m in distiller.teacher.model.modules()
    )
    assert setting.error(distiller) < EXACT


def test_channels_last(setting):
    distiller = setting.distiller(channels_last=True)
    seen = []
    neck = distiller.teacher.model.neck
    neck.register_forward_hook(lambda *call: seen.extend(call[2]))
    assert setting.error(distiller) < EXACT
    last = torch.channels_last
    assert any(m.is_contiguous(memory_format=last) for m in seen)
    view = distiller.teacher.view(Batch(*setting.batch))
    assert all(level.is_contiguous() for level in view.maps)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision(setting, dtype):
    distiller = setting.distiller(autocast=dtype)
    seen = []
    neck = distiller.teacher.model.neck
    neck.register_forward_hook(lambda *call: seen.extend(call[2]))
    assert 0 < setting.error(distiller) < HALF
    assert {str(level.dtype) for level in seen} == {f'torch.{dtype}'}
    view = distiller.teacher.view(Batch(*setting.batch))
    read = [*view.maps, *view.features('neck', None)]
    assert {level.dtype for level in read} == {torch.float32}


def test_all_but_compiling_together(setting):
    distiller = setting.distiller(
        fold_bn=True, channels_last=True, autocast='bfloat16'
    )
    assert 0 < setting.error(distiller) < HALF


class TestCompile:
    @pytest.mark.slow
    def test_the_losses_and_no_compiling_in_later_steps(self, dense):
        torch._dynamo.reset()
        counters = torch._dynamo.utils.counters
        counters.clear()
        distiller = dense.distiller(compile=True, fold_bn=True)
        stats = counters['stats']
        before = stats['unique_graphs']  # that of the test of the compiler
        assert dense.error(distiller) < EXACT
        after = stats['unique_graphs']
        assert after > before
        assert dense.error(distiller) < EXACT
        assert stats['unique_graphs'] == after

    def test_parts_around_taps(self):
        model = tiny.build(tiny.retinanet())
        names = {id(m): name for name, m in model.named_modules()}

        def parts(*paths):
            return [names[id(m)] for m in compiled_parts(model, paths)]

        assert parts() == ['backbone', 'neck']
        assert parts('neck', 'backbone') == ['backbone', 'neck']
        assert parts('backbone.layer3') == [
            *(f'backbone.layer{n}' for n in (1, 2, 3, 4)),
            'neck',
        ]
        assert parts('backbone.layer3.0', 'bbox_head.cls_convs.0') == [
            *(f'backbone.layer{n}' for n in (1, 2)),
            *('backbone.layer3.0', 'backbone.layer3.1'),
            *('backbone.layer4', 'neck'),
        ]

    def test_without_a_compiler(self, dense, monkeypatch):
        def broken(_):
            raise RuntimeError('No working C++ compiler found\nand more')

        monkeypatch.setattr(torch, 'compile', broken)
        with pytest.raises(
            ConfigError, match=r'compile.*No working C\+\+.*compile=False'
        ):
            dense.distiller(compile=True)


# --------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(fold_bn='yes'), r"fold_bn must be True or False, got 'yes'"),
        (dict(compile=1), 'compile must be True or False, got 1'),
        (dict(autocast=True), 'autocast must be one of bfloat16, float16'),
        (dict(autocast='half'), "or None, got 'half'"),
        (dict(channel_last=True), 'Did you mean "channels_last"'),
    ],
)
def test_wrong_options(dense, options, message):
    with pytest.raises(ConfigError, match=message):
        dense.distiller(**options)


def test_a_network_that_does_not_run_so(dense, monkeypatch):
    """As operators without half precision, such as MMCV's on the CPU."""
    model = dense.distiller().teacher.model

    def forward(self, inputs):
        if torch.is_autocast_enabled('cpu'):
            raise RuntimeError('"deform_conv" not implemented for BFloat16')
        return extract(self, inputs)

    extract = type(model).extract_feat
    monkeypatch.setattr(type(model), 'extract_feat', forward)
    with pytest.raises(
        ConfigError, match=r'autocast=.bfloat16.*deform_conv.*autocast=None'
    ):
        dense.distiller(autocast='bfloat16')


def test_by_default_nothing_is_changed(dense, monkeypatch):
    def called(*_):
        raise AssertionError('the plain path went through the options')

    monkeypatch.setattr(teacher_speed, 'probe', called)
    monkeypatch.setattr(speed, 'changed', called)
    distiller = dense.distiller()
    assert distiller.teacher.speed == Speed()
    assert faster.losses_of(distiller, dense.batch) == dense.losses


class TestAround:
    """What else reads the description of a teacher."""

    def test_one_of_several_teachers(self, dense):
        plain = dense.teacher
        cfg = [dict(plain, fold_bn=True, label='fast'), plain]
        methods = dict(kd=dict(type='mmkd.KD'))
        student = tiny.build(dense.config())
        both = build_distiller(
            dict(teacher=cfg, methods=methods), student, tiny.CLASSES
        )
        fast, slow = (t.model for t in both.networks.values())
        kinds = [{type(m) for m in model.modules()} for model in (fast, slow)]
        assert torch.nn.BatchNorm2d not in kinds[0]
        assert torch.nn.BatchNorm2d in kinds[1]

    def test_the_doctor_knows_folded_norms(self, dense):
        report = Report()
        teacher = dense.distiller(fold_bn=True).teacher
        options = dict(dense.teacher, fold_bn=True)
        _check_file('teacher', teacher.model, options, report)
        assert report.findings == []
        _check_file('teacher', teacher.model, dense.teacher, report)
        assert report.findings
