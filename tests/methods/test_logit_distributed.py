"""Two processes with an image each are one process with both."""

import functools
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.distributed
import torch.multiprocessing

from tests.helpers import tiny_dense
from tests.helpers import tiny_detectors as tiny
from tests.helpers.logit_pair import LogitPair

METHODS = {
    'KD': {},
    'DKD': {},
    # The relation within classes spans the boxes of a process, by definition.
    'DIST': dict(gamma=0.0),
    'LD': dict(normalize=True),
    'CrossKD': dict(layer=1),
    'SoftLabelDistillation': dict(min_iou=0.0),
}


def losses(images):
    """Every method's losses on some of two images with 1 and 5 objects."""
    found = {}
    for method, options in METHODS.items():
        soft = method == 'SoftLabelDistillation'
        config = tiny_dense.paa() if soft else tiny.gfl()
        pair = LogitPair(method, config, **options)
        pair.student.eval()  # batch norm would see which images share a batch
        inputs, samples = pair.batch(sizes=((256, 256),) * 2, objects=(1, 5))
        pair.distiller.attach()
        result = tiny.seeded_loss(
            pair.student, inputs[images], [samples[i] for i in images]
        )
        for name, loss in result.items():
            if name.startswith('m.'):
                found[f'{method} {name}'] = loss.item()
    return found


def one_of_two(store, rank):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        'gloo', init_method=f'file://{store}', rank=rank, world_size=2
    )
    found = losses([rank])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:THE TEACHER IS UNTRAINED')
def test_the_normalisers_are_averaged(tmp_path):
    context = torch.multiprocessing.get_context('spawn')
    work = functools.partial(one_of_two, str(tmp_path / 'store'))
    with ProcessPoolExecutor(2, context) as pool:
        parts = list(pool.map(work, (0, 1)))
    expected = losses([0, 1])
    assert len(expected) == 12
    for name, loss in expected.items():
        mean = (parts[0][name] + parts[1][name]) / 2
        assert mean == pytest.approx(loss, rel=1e-3), name
        if 'intra' not in name:
            assert parts[0][name] != pytest.approx(parts[1][name], rel=1e-2)
