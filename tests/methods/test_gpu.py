"""A distilled step of every kind on a GPU, against the same on the CPU.

mmcv's operators are inside: RoIAlign and NMS (Faster R-CNN), sigmoid focal
loss (RetinaNet, PAA), deformable convolution (a backbone with DCN v2).
Their CUDA kernels know no bfloat16: a student that needs one of them cannot
be trained so without distillation either, and its test is skipped.
"""

import functools
import math
import re

import pytest
import torch
from mmcv.ops import sigmoid_focal_loss

from tests.helpers import (
    tiny_dense,
    toy,  # noqa: F401  registers toy.FirstSampler
)
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import SIZES, LogitPair
from tests.helpers.together import Networks, wide

FIRST = dict(type='ToyFirstSampler')
SAME_BOXES = dict(
    # the generators of the two devices draw other boxes
    train_cfg__rpn__sampler=FIRST,
    train_cfg__rcnn__sampler=FIRST,
)


def rcnn():
    return tiny.faster_rcnn(**SAME_BOXES)


def deformable():
    dcn = dict(type='DCNv2', deform_groups=1, fallback_on_stride=False)
    stages = (False, True, True, True)
    return tiny.faster_rcnn(
        **SAME_BOXES,
        backbone__depth=50,
        backbone__dcn=dcn,
        backbone__stage_with_dcn=stages,
        neck__in_channels=[32, 64, 128, 256],
    )


# Name: the method, the student's config and the method's options.
WITH_TEACHER = {
    'frcnn': ('FasterRCNNDistillation', rcnn, {}),
    'frcnn-dcn': ('FasterRCNNDistillation', deformable, {}),
    'kd-rois': ('KD', rcnn, {}),
    'kd': ('KD', tiny.retinanet, {}),
    'dkd': ('DKD', tiny.retinanet, {}),
    'dist': ('DIST', tiny.retinanet, {}),
    'ld': ('LD', tiny.gfl, {}),
    'crosskd': ('CrossKD', tiny.gfl, dict(layer=1)),
    'hint': ('FeatureHint', tiny.retinanet, {}),
    'cwd': ('CWD', tiny.retinanet, {}),
    'pkd': ('PKD', tiny.retinanet, {}),
    'fgd': ('FGD', tiny.retinanet, {}),
    'mgd': ('MGD', tiny.retinanet, {}),
    'fbkd': ('FBKD', tiny.retinanet, {}),
    'tat': ('TaT', tiny.retinanet, {}),
    'lad': ('LabelAssignmentDistillation', tiny_dense.paa, {}),
    'solad': ('SoLAD', tiny_dense.paa, {}),
}
# Name: the method, the student's config, how many peers it has and whether a
# teacher trains with them.
WITH_PEERS = {
    'colad': ('CoLearningAssignment', tiny_dense.paa, 1, False),
    'dml': ('MutualLearning', tiny.retinanet, 1, False),
    'dml-rois': ('MutualLearning', rcnn, 1, False),
    'several': ('OneTeacherSeveralStudents', tiny.retinanet, 1, True),
    'dcm': ('DCM', tiny.retinanet, 1, False),
    'ffsd': ('FFSD', tiny.retinanet, 2, False),
}
CASES = (*WITH_TEACHER, *WITH_PEERS)
TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Of the sum of a method's losses, relative; those of half precision are
what its rounding makes of a batch norm over a tiny map. DIST divides by
deviations of columns that are nearly constant in an untrained network: the
gradient there is rounding. For KD on RoIs the tolerance is twice as large,
because half precision also moves the proposals."""


def student_of(case):
    """The config of a case's student."""
    return (WITH_TEACHER | WITH_PEERS)[case][1]()


class Step:
    """A distilled step on a device, with weights that depend on nothing."""

    def __init__(self, case, device):
        if case in WITH_TEACHER:
            method, config, options = WITH_TEACHER[case]
            made = LogitPair(method, config(), **options)
        else:
            method, config, peers, with_teacher = WITH_PEERS[case]
            model = config()
            made = Networks(
                dict(m=dict(type=f'mmkd.{method}')),
                model,
                {f'peer{n}': wide(model) for n in range(peers)},
                trained=wide(model) if with_teacher else None,
            )
        self.student, self.distiller = made.student, made.distiller
        self.student.to(device)
        self.distiller.to(device)
        if self.distiller.teacher is not None:
            self.distiller.teacher.to(device)
        self.device = device

    def run(self, dtype):
        """The method's losses and the norm of the student's gradient."""
        batch = tiny.batch_for(self.student, sizes=SIZES)
        self.distiller.attach()
        try:
            with autocast(self.device, dtype):
                losses = tiny.seeded_loss(self.student, *batch)
            # A method that steers has no losses of its own: the student's.
            own = any(name.startswith('m.loss') for name in losses)
            losses = {
                name: loss
                for name, loss in sums(losses).items()
                if name.startswith('m.') == own
            }
            sum(losses.values()).backward()
        finally:
            self.distiller.detach()
        norms = [
            p.grad.float().norm()
            for n, p in self.student.named_parameters()
            if p.grad is not None and not n.startswith('distillation')
        ]
        return (
            {name: loss.item() for name, loss in losses.items()},
            torch.stack(norms).norm().item(),
        )


def autocast(device, dtype):
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def sums(losses):
    """The losses among a step's results, each as one number."""
    return {
        name: sum(part.sum() for part in as_list(loss))
        for name, loss in losses.items()
        if 'loss' in name
    }


def as_list(loss):
    return loss if isinstance(loss, list) else [loss]


def skip_without_operators(case, device, dtype):
    """Skip where stock training of the student lacks an operator as well."""
    student = tiny.build(student_of(case)).to(device)
    batch = tiny.batch_for(student, sizes=SIZES)
    try:
        with autocast(device, dtype):
            losses = tiny.seeded_loss(student, *batch)
        sum(sums(losses).values()).backward()
    except RuntimeError as error:
        missing = re.search(r'"(\w+)" not implemented for', str(error))
        if not missing:
            raise
        pytest.skip(
            f'{missing[1]} is not implemented for {dtype}: stock training '
            'of this student fails alike'
        )


def skip_where_stock_is_infinite(losses, device, dtype):
    """Skip where mmcv's focal loss knows no logits of this size.

    Its kernel clamps probabilities at the least number of single precision,
    which is 0 in half precision. A label assignment by the teacher shows it
    positives of which the untrained student is certain that they are none.
    """
    classes = [loss for name, loss in losses.items() if 'loss_cls' in name]
    if all(map(math.isfinite, classes)) or dtype != torch.float16:
        return
    logits = torch.tensor([[-20.0]], device=device, dtype=dtype)
    label = torch.zeros(1, device=device, dtype=torch.long)
    alone = sigmoid_focal_loss(logits, label, 2.0, 0.25, None, 'none')
    if not alone.isfinite().all():
        pytest.skip(f"mmcv's focal loss of a logit of -20 is {alone.item()}")


@functools.cache
def on_the_cpu(case):
    return Step(case, 'cpu').run(torch.float32)


def compare(case, device, dtype):
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    if dtype != torch.float32:
        skip_without_operators(case, device, dtype)
    expected, norm = on_the_cpu(case)
    found, found_norm = Step(case, device).run(dtype)
    if case in ('lad', 'colad'):
        skip_where_stock_is_infinite(found, device, dtype)
    assert found.keys() == expected.keys()
    tolerance = TOLERANCES[dtype]
    if case == 'kd-rois' and dtype != torch.float32:
        tolerance *= 2
    assert sum(found.values()) == pytest.approx(
        sum(expected.values()), rel=tolerance
    )
    assert norm > 0
    if case != 'dist' or dtype == torch.float32:
        assert found_norm == pytest.approx(norm, rel=5 * tolerance)


@pytest.mark.parametrize('case', ['frcnn-dcn', 'lad', 'several', 'tat'])
def test_the_comparison_on_the_cpu(case):
    """What the GPU's tests do, with the CPU in its place."""
    compare(case, 'cpu', torch.float32)


def test_an_operator_that_knows_no_bfloat16():
    """The deformable convolution's CPU kernel lacks it as well."""
    reason = 'deformable_im2col_cpu is not implemented for torch.bfloat16'
    with pytest.raises(pytest.skip.Exception, match=reason):
        compare('frcnn-dcn', 'cpu', torch.bfloat16)


def test_other_errors_of_stock_training_are_shown():
    """NMS on the CPU gets boxes in bfloat16; on a GPU they are float32."""
    with pytest.raises(RuntimeError, match='Float but found BFloat16'):
        compare('frcnn', 'cpu', torch.bfloat16)


def test_bfloat16_where_stock_training_knows_it():
    compare('ld', 'cpu', torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize('dtype', list(TOLERANCES), ids=str)
@pytest.mark.parametrize('case', CASES)
def test_as_on_the_cpu(case, dtype):
    compare(case, 'cuda', dtype)
