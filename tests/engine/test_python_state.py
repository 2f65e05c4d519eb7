"""What plain attributes hold, found, saved and restored."""

import gc
import pickle
import random
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path
from types import SimpleNamespace as Thing

import numpy as np
import pytest
import torch
from mmdet.structures.bbox import HorizontalBoxes
from mmdet.structures.mask import BitmapMasks
from mmengine.config import ConfigDict
from mmengine.config.lazy import LazyAttr, LazyObject
from mmengine.structures import InstanceData
from torch import nn

from mmkd.engine import python_state
from mmkd.engine.encoding import decode, encode
from mmkd.engine.python_state import PythonState


def refuse(value):
    raise AssertionError(value)


def through_a_file(value):
    """Encoded, written with nothing but plain types, and read again."""
    return pickle.loads(pickle.dumps(encode(value, refuse)))


class TestEncoding:
    @pytest.mark.parametrize(
        'value',
        [
            *(None, True, 3, 0.1, float('inf'), 2j, 'text', b'bytes'),
            *([1, [2]], (1, (2,)), {1, 2}, frozenset('ab'), Path('a/b')),
            *({(1, 2): [None]}, OrderedDict(b=1, a=2), Counter('aab')),
            *(ConfigDict(a=dict(b=[1])), torch.Size([2, 3])),
        ],
    )
    def test_equal_and_of_the_same_type(self, value):
        found = decode(through_a_file(value), refuse)
        assert found == value
        assert type(found) is type(value)

    def test_values_of_a_config_dict(self):
        found = decode(through_a_file(ConfigDict(a=dict(b=1))), refuse)
        assert type(found.a) is ConfigDict

    def test_a_deque_and_a_defaultdict(self):
        value = deque([1, 2], maxlen=2)
        found = decode(through_a_file(value), refuse)
        found.append(3)
        assert list(found) == [2, 3]
        counts = defaultdict(list, a=[1])
        found = decode(through_a_file(counts), refuse)
        found['b'].append(2)
        assert found == {'a': [1], 'b': [2]}

    @pytest.mark.parametrize(
        'dtype', [np.uint8, np.float16, np.int64, bool, 'U3', 'datetime64[s]']
    )
    @pytest.mark.parametrize('shape', [(2, 3), (), (0, 4)])
    def test_arrays(self, dtype, shape):
        value = np.ones(shape, 'int64').astype(dtype)
        found = decode(through_a_file(value), refuse)
        assert found.dtype == value.dtype
        assert np.array_equal(found, value)
        if shape:
            found[...] = found  # it can be written
        assert isinstance(value, np.ndarray) == isinstance(found, np.ndarray)

    def test_numpy_numbers_stay_numpy(self):
        """float32 * float rounds as float32, and float does not."""
        value = np.float32(0.1)
        found = decode(through_a_file([value]), refuse)[0]
        assert type(found) is np.float32
        assert found == value

    @pytest.mark.parametrize(
        'value',
        [
            torch.arange(6).reshape(2, 3).t(),
            torch.tensor([1.5], dtype=torch.bfloat16),
            torch.tensor(True),
            torch.empty(0, 4),
        ],
    )
    def test_tensors(self, value):
        found = decode(through_a_file(value), refuse)
        assert found.dtype == value.dtype
        assert torch.equal(found, value)

    def test_a_view_takes_no_more_than_it_shows(self):
        view = torch.zeros(1000)[:2]
        assert len(pickle.dumps(encode(view, refuse))) < 300

    def test_what_a_cache_of_images_holds(self):
        results = dict(
            img=np.full((2, 2, 3), 7, np.uint8),
            gt_bboxes=HorizontalBoxes(torch.tensor([[0.0, 0, 1, 1]])),
            gt_masks=BitmapMasks(np.ones((1, 2, 2), np.uint8), 2, 2),
            gt_instances=InstanceData(labels=torch.tensor([3])),
        )
        found = decode(through_a_file([results]), refuse)[0]
        assert found['img'].tolist() == results['img'].tolist()
        assert type(found['gt_bboxes']) is HorizontalBoxes
        assert found['gt_bboxes'].tensor.tolist() == [[0, 0, 1, 1]]
        assert found['gt_masks'].masks.tolist() == [[[1, 1], [1, 1]]]
        assert found['gt_instances'].labels.tolist() == [3]

    @pytest.mark.parametrize(
        ('generator', 'draw'),
        [
            (random.Random(3), lambda g: g.random()),
            (np.random.RandomState(3), lambda g: g.rand()),
            (np.random.default_rng(3), lambda g: g.random()),
            (
                torch.Generator().manual_seed(3),
                lambda g: torch.rand(1, generator=g).item(),
            ),
        ],
    )
    def test_generators_go_on(self, generator, draw):
        saved = through_a_file(generator)
        expected = [draw(generator) for _ in range(3)]
        assert decode(saved, refuse, generator) is generator
        assert [draw(generator) for _ in range(3)] == expected
        another = decode(saved, refuse)
        assert another is not generator
        assert [draw(another) for _ in range(3)] == expected

    def test_reading_builds_no_other_class(self):
        for kind in ('Popen', 'module', 'BaseBoxes'):
            with pytest.raises(AssertionError):
                decode({'kind': kind, 'state': []}, refuse)


def saved(state):
    changes = state.changes()
    return pickle.loads(pickle.dumps(changes.saved)), changes.lost


def resumed(make, change):
    """Change one thing of two that are alike; restore it in the other."""
    one, other = make(), make()
    state = PythonState({'one': one})
    change(one)
    found, lost = saved(state)
    missing = PythonState({'one': other}).restore(found)
    return other, found, lost, missing


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 1)
        self.register_buffer('mean', torch.zeros(2), persistent=False)
        self.register_buffer('kept', torch.zeros(2))
        self.history, self.threshold = [], 0.4
        self.assigner = Thing(iou=0.5, parts=(Thing(n=1),))


class TestModules:
    def test_nothing_has_changed(self):
        model = nn.Sequential(Head())
        state = PythonState({'model': model})
        model.eval()
        model[0].conv.weight.data += 1
        assert state.changes() == ([], [])

    def test_attributes_of_modules_and_of_what_they_hold(self):
        def make():
            model = nn.Sequential(Head())
            model[0].assigner.parts[0].gone = 1
            return model

        def change(model):
            head = model[0]
            head.threshold = np.float64(0.6)
            head.history.append(0.7)
            head.assigner.iou = 0.8
            head.assigner.parts[0].n = 2
            head.born = (64, 96)
            del head.assigner.parts[0].gone

        model, _, lost, missing = resumed(make, change)
        head = model[0]
        assert (head.threshold, head.history) == (0.6, [0.7])
        assert type(head.threshold) is np.float64
        assert head.born == (64, 96)
        assert (head.assigner.iou, head.assigner.parts[0].n) == (0.8, 2)
        assert not hasattr(head.assigner.parts[0], 'gone')
        assert not lost
        assert not missing

    def test_what_a_state_dict_leaves_out(self):
        """Buffers that are not saved, and what trains."""

        def change(model):
            model[0].mean += 1
            model[0].kept += 1
            model[0].conv.bias.requires_grad_(False)

        model, found, *_ = resumed(lambda: nn.Sequential(Head()), change)
        assert model[0].mean.tolist() == [1, 1]
        assert model[0].kept.tolist() == [0, 0]  # the state dict has it
        assert not model[0].conv.bias.requires_grad
        assert len(found) == 2

    def test_only_what_has_changed_is_saved(self):
        """What the config says anew (a patience) is not undone."""

        def change(one):
            one.waited = 3

        found = resumed(lambda: Thing(patience=5, waited=0), change)[1]
        assert found == [['one', 'attribute', 'waited', 3]]

    def test_outputs_of_the_last_step_are_no_memory(self):
        model = nn.Sequential(Head())
        state = PythonState({'model': model})
        model[0].seen = [model[0].conv(torch.zeros(1, 1, 1, 1))]
        assert state.changes() == ([], [])


class TestWhoHoldsWhat:
    @staticmethod
    def sharing():
        shared = [0]
        return Thing(a=Thing(x=shared), b=Thing(x=shared))

    def test_a_list_that_two_share(self):
        one, found, *_ = resumed(self.sharing, lambda one: one.b.x.append(1))
        assert one.a.x == [0, 1]
        assert one.a.x is one.b.x
        assert len(found) == 1

    def test_a_list_that_two_share_no_more(self):
        def change(one):
            one.b.x = [5]
            one.a.x.append(1)

        one, *_ = resumed(self.sharing, change)
        assert (one.a.x, one.b.x) == ([0, 1], [5])

    def test_a_list_that_two_have_come_to_share(self):
        def change(one):
            one.b.x = one.a.x

        one, *_ = resumed(
            lambda: Thing(a=Thing(x=[0]), b=Thing(x=[9])), change
        )
        assert one.b.x is one.a.x

    def test_objects_that_change_places(self):
        """A transform is taken out; another object is pointed at."""

        def make():
            steps = [Thing(n=number) for number in range(3)]
            return Thing(steps=steps, current=steps[0], other=Thing(n=9))

        def change(one):
            one.steps[2].n = 7
            one.steps.pop(0)
            one.current = one.other

        one, _, lost, missing = resumed(make, change)
        assert [each.n for each in one.steps] == [1, 7]
        assert one.current is one.other
        assert not lost
        assert not missing

    def test_a_new_object_of_the_same_class(self):
        def change(one):
            one.inner = Thing(n=1, m=2)

        one, _, lost, _ = resumed(lambda: Thing(inner=Thing(n=1, m=1)), change)
        assert one.inner == Thing(n=1, m=2)
        assert not lost

    def test_an_attribute_of_the_class(self):
        class Counting:
            calls, kinds = 0, ('a',)

        def change(one):
            Counting.calls += 1

        _, found, *_ = resumed(Counting, change)
        assert [each[1:] for each in found] == [['class', 'calls', 1]]
        Counting.calls = 0
        PythonState({'one': Counting()}).restore(found)
        assert Counting.calls == 1

    def test_slots(self):
        class Slim:
            __slots__ = ('n',)

            def __init__(self):
                self.n = 1

        def change(one):
            one.n = 2

        assert resumed(Slim, change)[0].n == 2

    def test_what_is_replaced_is_not_kept_alive(self):
        one = Thing(inner=Head())
        state = PythonState({'one': one})
        reference = weakref.ref(one.inner)
        one.inner = None
        gc.collect()
        assert reference() is None
        assert state.changes().saved


class TestWhatIsLost:
    def lost(self, change, **before):
        one = Thing(**before)
        state = PythonState({'one': one})
        change(one)
        found, lost = saved(state)
        assert not found
        return lost

    def test_an_object_of_a_class_that_is_not_known(self):
        def change(one):
            one.x = [Thing()]

        assert self.lost(change, x=[]) == ['one.x (list)']

    def test_an_object_of_another_class(self):
        def change(one):
            one.x = Head()

        assert self.lost(change, x=Thing()) == ['one.x (Head)']

    @pytest.mark.parametrize('value', [iter([1, 2]), (n for n in range(3))])
    def test_an_iterator_even_if_it_is_the_same(self, value):
        assert self.lost(lambda one: next(one.x), x=value) == [
            f'one.x ({type(value).__name__})'
        ]

    def test_what_is_too_large(self, monkeypatch):
        monkeypatch.setattr(python_state, 'LARGEST', 2**20)

        def change(one):
            one.x = np.zeros(2**20 + 1, np.uint8)

        assert self.lost(change, x=None) == ['one.x (1 MiB)']

    def test_what_this_run_does_not_have(self):
        strange = {'kind': 'object', 'name': 'one.m', 'class': 'a.B'}
        found = [
            ['one', 'attribute', 'n', 1],
            ['two', 'attribute', 'n', 1],
            ['one', 'attribute', 'm', strange],
        ]
        one = Thing(n=0, m=Thing())
        assert PythonState({'one': one}).restore(found) == ['two.n', 'one.m']
        assert one.n == 1


def test_modules_of_hooks_are_saved_elsewhere():
    model = nn.Sequential(Head())
    hook = Thing(model=model, average=Head(), n=0)
    state = PythonState({'model': model}, {'hook': hook})
    hook.average.threshold = 1
    hook.n = 1
    assert state.changes().saved == [['hook', 'attribute', 'n', 1]]


def test_a_pipeline_that_somebody_puts_in_place_again():
    def switch(data):
        data.pipeline = Head()
        return data

    one = Thing(pipeline=Thing(steps=[]))
    state = PythonState({'data': one}, replaced=['data.pipeline'])
    switch(one).pipeline.threshold = 0.9
    found, lost = saved(state)
    assert not lost
    other = Thing(pipeline=Thing(steps=[]))
    fresh = PythonState({'data': other})
    switch(other)
    assert not fresh.restore(found)
    assert other.pipeline.threshold == 0.9


class Obliging:
    """Answers any name, as the types of new-style configs do."""

    def __init__(self):
        self.seen = 0

    def __getattr__(self, name):
        return Obliging()


@pytest.mark.parametrize(
    'value', [Obliging(), LazyAttr('ResNet', LazyObject('mmdet.models'))]
)
def test_objects_that_answer_any_name(value):
    hook = Thing(value=value, n=0)
    state = PythonState({}, {'hook': hook})
    hook.n = 1
    assert state.changes() == ([['hook', 'attribute', 'n', 1]], [])
