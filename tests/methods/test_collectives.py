"""Every process joins the same collectives, whatever its images show.

Processes that train together wait for each other in collectives, so that one
whose images have no objects must join as many, in the same order, as one with
many objects.
"""

import functools
from concurrent.futures import ProcessPoolExecutor

import pytest
import torch
import torch.multiprocessing
from mmdet.models.dense_heads import RTMDetSepBNHead
from mmdet.utils import reduce_mean
from mmengine.model import revert_sync_batchnorm
from torch import distributed

from mmkd.core.distiller import build_distiller
from mmkd.detectors.assignment.replay import record_assignments
from tests.helpers import tiny_dense
from tests.helpers import tiny_detectors as tiny
from tests.methods.test_zero_weight import STUDENTS, TABLE

COUNTS = ((0, 0), (0, 1), (1, 0), (1, 1), (5, 20))
"""Numbers of objects in the two images of a batch."""
DYNAMIC = dict(paa=tiny_dense.paa, **tiny_dense.DYNAMIC)
OPERATIONS = (
    *(
        'all_reduce',
        'all_gather',
        'all_gather_object',
        'all_gather_into_tensor',
    ),
    *('broadcast', 'broadcast_object_list', 'reduce', 'gather', 'scatter'),
    *('reduce_scatter', 'all_to_all', 'barrier', 'send', 'recv'),
)
CASES = [
    (method, name)
    for method, (students, _, _) in TABLE.items()
    for name in (DYNAMIC if method == 'LAD' else students)
    if name != 'detr' and not (name == 'paa' and 'gfl' in students)
]


@pytest.fixture
def joined(monkeypatch):
    """The collectives that this process has joined, with their shapes."""
    store = distributed.HashStore()
    distributed.init_process_group('gloo', store=store, rank=0, world_size=1)
    calls = []

    def counted(operation):
        original = getattr(distributed, operation)

        def call(*args, **kwargs):
            shapes = [tuple(x.shape) for x in args if hasattr(x, 'shape')]
            calls.append((operation, *shapes))
            return original(*args, **kwargs)

        return call

    for operation in OPERATIONS:
        monkeypatch.setattr(distributed, operation, counted(operation))
    yield calls
    distributed.destroy_process_group()


def built(config):
    """A detector whose batch norms run on a CPU."""
    return revert_sync_batchnorm(tiny_dense.build(config, seed=1))


def distilled(method, name, **options):
    """A student that learns by a method, attached."""
    config = DYNAMIC[name]() if name in DYNAMIC else STUDENTS[name]()
    _, peers, needed = TABLE[method]
    classes = dict(dataset=dict(metainfo=dict(classes=tiny.CLASSES)))
    described = dict(model=config, test_dataloader=classes)
    cfg = dict(
        teacher=dict(config=described, checkpoint=None),
        peers={p: dict(config=dict(model=config)) for p in peers},
        methods=dict(m=dict(type=f'mmkd.{method}', **needed, **options)),
    )
    student = built(config)
    build_distiller(cfg, student, tiny.CLASSES, seed=5).attach()
    return student


def step(student, objects):
    """Compute the losses and gradients of a batch; return who has any."""
    size = (160, 192) if hasattr(student, 'bbox_head') else (96, 128)
    batch = tiny.batch_for(student, sizes=(size, size), objects=objects)
    student.zero_grad()
    losses = tiny.seeded_loss(student, *batch)
    student.parse_losses(losses)[0].backward()
    return {n for n, p in student.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings('ignore:THE TEACHER IS UNTRAINED')
@pytest.mark.parametrize(('method', 'name'), CASES)
def test_the_content_of_a_batch_changes_nothing(joined, method, name):
    student = distilled(method, name)
    joined.clear()
    found, trained = {}, {}
    for objects in COUNTS[::2]:
        trained[objects] = step(student, objects)
        found[objects], joined[:] = list(joined), []
    for objects, calls in found.items():
        assert calls == found[0, 0], objects
    # Distributed training also waits for the gradient of each adapter.
    adapters = {n for n in trained[5, 20] if 'distillation.methods' in n}
    assert all(adapters <= each for each in trained.values())
    if name in ('gfl', *tiny_dense.DYNAMIC):
        assert found[0, 0]  # their stock losses join some already


def recorded(model, objects):
    """The assignment of a batch by a detector's own head."""
    inputs, samples = tiny.batch_for(model, objects=objects)
    return record_assignments(
        model.bbox_head,
        model.bbox_head(model.extract_feat(inputs)),
        [sample.gt_instances for sample in samples],
        [sample.metainfo for sample in samples],
    )


def attributes(head):
    """A head's own attributes, but for TOOD's copy of the epoch."""
    own = {k: v for k, v in vars(head).items() if k[0] != '_'}
    return repr({k: v for k, v in own.items() if k != 'epoch'})


@pytest.mark.parametrize('objects', COUNTS)
@pytest.mark.parametrize('name', tiny_dense.DYNAMIC)
def test_recording_joins_none_and_leaves_no_trace(joined, name, objects):
    model = built(tiny_dense.DYNAMIC[name]())
    head, computed = model.bbox_head, []
    for module in head.modules():
        if 'Loss' in type(module).__name__:
            module.register_forward_hook(lambda *args: computed.append(args))
    before = attributes(head)
    found = recorded(model, objects)
    assert not joined
    assert not computed  # some losses keep statistics
    assert attributes(head) == before
    # YOLOX asks its assigner only about images with objects.
    images = sum(map(bool, objects)) if name == 'yolox' else 2
    branches = 2 if name == 'ddod' else 1
    assert [len(each) for each in found.values()] == [images] * branches


class EagerHead(RTMDetSepBNHead):
    """A third party's, which averages something before it assigns."""

    def get_targets(self, *args, **kwargs):
        reduce_mean(torch.ones(1))
        return super().get_targets(*args, **kwargs)


def test_any_other_head_records_alone(joined):
    model = built(tiny_dense.rtmdet())
    model.bbox_head.__class__ = EagerHead
    assert recorded(model, (1, 2))
    assert not joined
    assert distributed.is_initialized()
    tiny.seeded_loss(model, *tiny.batch_for(model))
    assert joined[0] == ('all_reduce', (1,))


def one_of_two(store, rank):
    torch.set_num_threads(1)
    distributed.init_process_group(
        'gloo', init_method=f'file://{store}', rank=rank, world_size=2
    )
    found = losses_of([rank])
    distributed.barrier()
    distributed.destroy_process_group()
    return found


def losses_of(images):
    """LAD's losses on some of two images, of which the first is empty."""
    student = distilled('LAD', 'yolox').eval()  # of batch norms
    inputs, samples = tiny.batch_for(student, objects=(0, 5))
    chosen = inputs[images], [samples[i] for i in images]
    return {k: v.item() for k, v in tiny.seeded_loss(student, *chosen).items()}


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:THE TEACHER IS UNTRAINED')
def test_a_process_without_objects_joins_those_of_yolox(tmp_path):
    context = torch.multiprocessing.get_context('spawn')
    work = functools.partial(one_of_two, str(tmp_path / 'store'))
    with ProcessPoolExecutor(2, context) as pool:
        parts = list(pool.map(work, (0, 1)))
    for name, loss in losses_of([0, 1]).items():
        mean = (parts[0][name] + parts[1][name]) / 2
        assert mean == pytest.approx(loss, rel=1e-3), name
