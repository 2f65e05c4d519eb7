"""What every loss module promises, and the reduction that they share."""

import inspect
import subprocess
import sys

import pytest
import torch
from mmdet.registry import MODELS

from mmkd import losses
from mmkd.errors import ConfigError
from mmkd.losses.reduction import Loss

OF_VIEWS = ('NTXentLoss', 'SimilarityKLLoss', 'nt_xent_loss', 'similarity_kl')
"""They compare the images of a batch with one another, and have no teacher's
tensor of the same shape: see their own tests."""
PAIRS = [name for name in losses.__all__ if name not in OF_VIEWS]
MODULES = [
    name
    for name in PAIRS
    if inspect.isclass(getattr(losses, name)) and name.endswith('Loss')
]
FUNCTIONS = [
    name for name in PAIRS if inspect.isfunction(getattr(losses, name))
]
MAPS = ('CWDLoss', 'PKDLoss')
OF_SAMPLES = (
    'CosineLoss',
    'DISTLoss',
    'DKDLoss',
    'SoftmaxKLLoss',
    'TeacherBoundedRegressionLoss',
    'WeightedSoftCrossEntropyLoss',
)
"""Their weights are (N,), those of the others broadcast to (N, C)."""


def inputs(name, rows=6):
    """A student's tensor, a teacher's, and what else a module needs."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, 4, 3, 5) if name in MAPS else (rows, 4)
    pred, target = (torch.rand(shape, generator=generator) for _ in range(2))
    extras = {}
    if name == 'DKDLoss':
        extras = dict(label=torch.arange(rows) % 4)
    if name == 'TeacherBoundedRegressionLoss':
        extras = dict(teacher=target.clone())
    return pred, target, extras


def test_all_are_covered():
    others = set(losses.__all__) - {*MODULES, *FUNCTIONS}
    assert others == {'BinaryProblems', *OF_VIEWS}
    # DIST has two functions.
    assert (len(MODULES), len(FUNCTIONS)) == (12, 13)


@pytest.mark.parametrize('name', MODULES)
def test_mmdets_registry_builds_it(name):
    loss = MODELS.build(dict(type=f'mmkd.{name}', loss_weight=0.25))
    assert type(loss) is getattr(losses, name)
    assert loss.loss_weight == 0.25
    assert isinstance(loss, Loss)


def test_mmdets_registry_finds_mmkd_without_an_import():
    code = (
        'from mmdet.registry import MODELS\n'
        "loss = MODELS.build(dict(type='mmkd.HintLoss', norm='l1'))\n"
        'print(type(loss).__module__, loss.norm)'
    )
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', code],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split()[-2:] == ['mmkd.losses.hint', 'l1']


@pytest.mark.parametrize('name', MODULES)
def test_the_signature_is_mmdetections(name):
    found = list(inspect.signature(getattr(losses, name).forward).parameters)
    expected = ['self', 'pred', 'target', 'weight', 'avg_factor']
    if name != 'DISTLoss':  # relates all boxes: there is nothing to reduce
        expected.append('reduction_override')
    own = [p for p in found if p in ('label', 'teacher')]
    assert [p for p in found if p not in own] == expected
    assert found[:3] == ['self', 'pred', 'target']


@pytest.mark.parametrize('name', FUNCTIONS)
def test_functions_take_the_student_first_and_are_typed(name):
    signature = inspect.signature(getattr(losses, name))
    assert list(signature.parameters)[:2] == ['pred', 'target']
    annotations = [p.annotation for p in signature.parameters.values()]
    assert inspect.Signature.empty not in annotations
    assert signature.return_annotation is not inspect.Signature.empty


@pytest.mark.parametrize('name', [*MODULES, *FUNCTIONS, *OF_VIEWS])
def test_the_docstring_says_all(name):
    text = inspect.getdoc(getattr(losses, name))
    sections = ['Args:', 'Raises:', 'Example:']
    if name.islower():
        sections.append('Returns:')
    for section in sections:
        assert f'\n{section}\n' in text
    if name.islower():
        assert '.. math::' in text
        assert '\nSource: ' in text


@pytest.mark.parametrize('name', MODULES)
def test_gradient_reaches_the_student_and_never_the_teacher(name):
    pred, target, extras = inputs(name)
    pred.requires_grad_()
    teacher = extras.get('teacher', target).requires_grad_()
    getattr(losses, name)()(pred, target, **extras).backward()
    assert pred.grad.abs().sum() > 0
    assert teacher.grad is None


@pytest.mark.parametrize('name', MODULES)
@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(name, dtype):
    pred, target, extras = inputs(name)
    pred, target = pred.to(dtype), target.to(dtype)
    loss = getattr(losses, name)()(pred, target, **extras)
    assert loss.dtype == torch.float32
    exact = getattr(losses, name)()(pred.float(), target.float(), **extras)
    torch.testing.assert_close(loss, exact)


@pytest.mark.parametrize('name', MODULES)
def test_nothing_to_compare_gives_0_with_a_gradient(name):
    pred, target, extras = inputs(name)
    pred = pred[:0].requires_grad_()
    extras = {key: value[:0] for key, value in extras.items()}
    options = dict(per_image=True) if name == 'PKDLoss' else {}
    module = getattr(losses, name)(**options)
    for avg_factor in (None, 1):
        loss = module(pred, target[:0], **extras, avg_factor=avg_factor)
        loss.backward()
        assert loss.item() == 0


@pytest.mark.parametrize('name', [n for n in MODULES if n != 'DISTLoss'])
def test_reductions(name):
    pred, target, extras = inputs(name)
    module = getattr(losses, name)

    def loss(*args, override=None, **options):
        return module(loss_weight=2.0, **options)(
            pred,
            target,
            **extras,
            avg_factor=(*args, None)[0],
            reduction_override=override,
        )

    each = loss(override='none')
    assert each.numel() > 1
    close = torch.testing.assert_close
    close(loss(), each.mean())
    close(loss(7), each.sum() / 7)
    close(loss(override='sum'), each.sum())
    close(loss(reduction='sum'), each.sum())
    close(loss(reduction='sum', override='mean'), each.mean())
    with pytest.raises(ConfigError, match=rf'{name}: avg_factor can not be'):
        loss(7, reduction='sum')


@pytest.mark.parametrize('name', [n for n in MODULES if n != 'DISTLoss'])
def test_unknown_reductions(name):
    message = rf"{name}\.reduction must be one of 'none', .*, got 'avg'"
    module = getattr(losses, name)
    with pytest.raises(ConfigError, match=message):
        module(reduction='avg')
    pred, target, extras = inputs(name)
    with pytest.raises(ConfigError, match=message):
        module()(pred, target, **extras, reduction_override='avg')


@pytest.mark.parametrize('name', [n for n in MODULES if n not in MAPS])
def test_weights_of_samples(name):
    """A row of weight 0 counts in the mean, and its values do not."""
    pred, target, extras = inputs(name)
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1])
    if name not in OF_SAMPLES:
        weight = weight[:, None]
    module, parts = getattr(losses, name)(), dict(avg_factor=4)
    loss = module(pred, target, **extras, weight=weight, **parts)
    other = pred.clone()
    other[[1, 4]] += 5
    torch.testing.assert_close(
        module(other, target, **extras, weight=weight, **parts), loss
    )
    kept = weight.flatten() > 0
    chosen = {key: value[kept] for key, value in extras.items()}
    torch.testing.assert_close(
        module(pred[kept], target[kept], **chosen, **parts), loss
    )
