"""Checkpoints that hold a detector under other names than its own."""

import re
from collections import OrderedDict

import pytest
import torch

from mmkd.detectors.source import build_trained, load_strictly
from mmkd.detectors.state_keys import stock_state
from mmkd.errors import CheckpointError
from tests.helpers import tiny_detectors as tiny


@pytest.fixture(scope='module')
def trained():
    return tiny.build(tiny.gfl(), seed=5)


def below(prefix, model):
    return {f'{prefix}.{k}': v for k, v in model.state_dict().items()}


def loaded(state, prefix=None):
    model = tiny.build(tiny.gfl(), seed=1)
    load_strictly(model, state, 'file.pth', prefix)
    return model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class TestPrefix:
    @pytest.mark.parametrize(
        'prefix', ['teacher', 'architecture', 'model', 'student.module']
    )
    def test_is_named_and_taken_off(self, trained, prefix):
        state = below(prefix, trained)
        count = len(state)
        message = (
            f'Its keys begin with "{prefix}." ({count} of {count} keys fit): '
            f"set prefix='{prefix}' beside its path."
        )
        with pytest.raises(CheckpointError, match=re.escape(message)):
            loaded(state)
        for form in (prefix, f'{prefix}.'):
            assert same(loaded(state, form), trained.state_dict())

    @pytest.mark.parametrize('prefix', ['student', 'module.student'])
    def test_around_and_within_a_wrapper(self, trained, prefix):
        state = below('module.student.module', trained)
        assert same(loaded(state, prefix), trained.state_dict())

    def test_of_one_of_several_networks(self, trained):
        other = tiny.build(tiny.gfl(), seed=6)
        state = below('student', trained) | below('teacher', other)
        count = len(trained.state_dict())
        fit = f'({count} of {count} keys fit)'
        message = (
            f'several networks, whose keys begin with "student." {fit}, '
            f'"teacher." {fit}: choose one with prefix='
        )
        with pytest.raises(CheckpointError, match=re.escape(message)):
            loaded(state)
        assert same(loaded(state, 'student'), trained.state_dict())
        assert same(loaded(state, 'teacher'), other.state_dict())

    def test_that_no_key_has(self, trained):
        with pytest.raises(
            CheckpointError, match=r"no key .* prefix='pupil'.*\"student\.\""
        ):
            loaded(below('student', trained), 'pupil')
        with pytest.raises(CheckpointError, match=r'begin with backbone \('):
            loaded(trained.state_dict(), 'pupil')

    def test_of_another_network_is_no_hint(self, trained):
        state = {f'student.{i}': torch.ones(1) for i in range(3)}
        with pytest.raises(CheckpointError, match='Give the checkpoint that'):
            loaded(state)

    def test_versions_of_modules_stay_with_them(self):
        state = OrderedDict({'student.a.weight': torch.ones(1)})
        state._metadata = {
            '': dict(version=1),
            'student': dict(version=2),
            'student.a': dict(version=3),
            'teacher.a': dict(version=4),
        }
        own = {'a.weight': torch.ones(1)}
        found = stock_state(state, own, 'file.pth', 'student')
        assert list(found) == ['a.weight']
        assert found._metadata == {'': {'version': 2}, 'a': {'version': 3}}

    def test_from_a_file(self, trained, tmp_path):
        path = tmp_path / 'wrapped.pth'
        torch.save(dict(state_dict=below('architecture', trained)), path)
        model, _ = build_trained(
            tiny.gfl(), str(path), trust=False, prefix='architecture'
        )
        assert same(model.state_dict(), trained.state_dict())


class TestBuffersOfAnAverage:
    """MMDetection 2.x registers them on the model, one for each weight."""

    def state(self, trained, start=''):
        weights = trained.state_dict()
        buffers = {
            f'ema_{name.replace(".", "_")}': torch.zeros_like(value)
            for name, value in weights.items()
        }
        both = {**weights, **buffers}
        return {f'{start}{name}': value for name, value in both.items()}

    @pytest.mark.parametrize('start', ['', 'module.'])
    def test_are_left_out_with_a_word(self, trained, start, logged):
        state = loaded(self.state(trained, start))
        assert same(state, trained.state_dict())
        (text,) = logged
        count = len(trained.state_dict())
        assert f'{count} keys such as ema_backbone_conv1_weight' in text

    def test_behind_a_prefix(self, trained):
        state = loaded(self.state(trained, 'student.'), 'student')
        assert same(state, trained.state_dict())

    def test_another_key_is_still_refused(self, trained):
        state = self.state(trained) | {'ema_other': torch.ones(1)}
        with pytest.raises(
            CheckpointError, match=r'unexpected \(first: ema_other\)'
        ):
            loaded(state)
