"""Two processes with half a batch each are one process with all of it."""

import re

import pytest
from mmdet.datasets.samplers import AspectRatioBatchSampler
from mmengine.dataset import sampler
from mmengine.dataset.sampler import DefaultSampler, InfiniteSampler

from mmkd import methods
from tests.helpers import processes
from tests.helpers.processes import CASES, KINDS, TOLERANCE
from tests.helpers.toy import ROOT
from tools import process_table

SOME = '^KD on atss|^LD, kd_weight=10.0 on|^FasterRCNN.* on faster_rcnn'


def test_some(tmp_path):
    """Lower limits, LD's sums, the numbers of RoIs and of anchors."""
    found = processes.measured(tmp_path, SOME)
    assert len(found) == 3
    assert processes.wrong(found) == []


@pytest.mark.slow
def test_all(tmp_path):
    found = processes.measured(tmp_path)
    assert len(found) == sum(len(case.detectors) for case in CASES)
    assert processes.wrong(found) == []
    # Each kind of batch has a gradient to compare, in all but methods on
    # objects, and tells some method from its equal form.
    for kind in KINDS:
        assert any(each[kind] > TOLERANCE for each in found.values())


def test_every_method_has_a_case():
    expected = {getattr(methods, name).__name__ for name in methods.__all__}
    # PseudoLabels reads other images: see tests/engine/test_unlabelled.py.
    expected = expected - {'Method', 'PseudoLabels'} | {''}
    assert {case.method for case in CASES} == expected


def test_a_method_that_is_not_equal_says_what_is():
    """Each has a second case without what the processes do on their own."""
    for method in {case.method for case in CASES if case.apart}:
        adds_nothing = method in ('LAD', 'CoLAD')  # but steers stock losses
        equal = [c for c in CASES if c.method == method and not c.apart]
        assert equal or adds_nothing, method


def test_the_page_has_the_states():
    page = (ROOT / process_table.PAGE).read_text()
    page = page.partition(process_table.BEGIN)[2]
    rows = re.findall(r'^\| (.*) \|$', page, re.MULTILINE)[2:]
    kept = [tuple(row.split(' | ')[:4]) for row in rows]
    assert kept == [process_table.described(case) for case in CASES], (
        'run `python tools/process_table.py` and commit the page'
    )
    for case, row in zip(CASES, rows, strict=True):
        differs = float(row.split(' | ')[4].split()[0]) > TOLERANCE
        assert differs == bool(case.apart)


@pytest.mark.parametrize('world', [2, 3])
def test_samplers_give_all_processes_equally_many_images(monkeypatch, world):
    """So that means over images are means over those of all processes."""

    class Photos:
        def __init__(self, number):
            self.number = number

        def __len__(self):
            return self.number

        def get_data_info(self, index):
            wide = index % 3 == 0
            return dict(width=2 if wide else 1, height=1 if wide else 2)

    for number in range(world, 30):
        counts = []
        for rank in range(world):
            monkeypatch.setattr(
                sampler, 'get_dist_info', lambda rank=rank: (rank, world)
            )
            photos = Photos(number)
            default = DefaultSampler(photos, shuffle=True, seed=number)
            by_shape = AspectRatioBatchSampler(default, batch_size=4)
            by_shape.sampler.dataset = photos
            counts.append([len(batch) for batch in by_shape])
            endless = InfiniteSampler(photos, shuffle=False, seed=0)
            assert endless.world_size == world
        assert len({tuple(each) for each in counts}) == 1, (number, counts)
