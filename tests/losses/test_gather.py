"""Two processes compute the contrastive losses of one with both batches."""

import pytest
import torch
import torch.distributed as dist

from mmkd.losses import NTXentLoss, SimilarityKLLoss
from mmkd.losses.gather import gather_rows

IMAGES = 3  # of a process


def projections():
    """The first and second views of all images, of a network and its peer."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2 * IMAGES, width, generator=generator, requires_grad=True)
        for width in (4, 4, 6, 6)
    ]


def losses(views):
    """Losses, and the gradients of all views, which a weight also has."""
    contrast = NTXentLoss(temperature=0.5)(*views[:2])
    kl = SimilarityKLLoss()(views[:2], views[2:])
    return torch.stack([contrast, kl])


def process(rank, port, queue):
    address = f'tcp://127.0.0.1:{port}'
    dist.init_process_group('gloo', address, rank=rank, world_size=2)
    whole = projections()
    own = slice(rank * IMAGES, (rank + 1) * IMAGES)
    found = losses([view[own] for view in whole])
    (found * torch.tensor([1.0, 100.0])).sum().backward()
    gradients = [
        torch.zeros_like(v) if v.grad is None else v.grad for v in whole
    ]
    for each in (values := found.detach().clone(), *gradients):
        dist.all_reduce(each)  # as DDP does, which then divides
        each /= 2
    if rank == 0:
        queue.put([each.numpy() for each in (values, *gradients)])
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_are_one(free_port):
    queue = torch.multiprocessing.get_context('fork').SimpleQueue()
    started = torch.multiprocessing.start_processes(
        process, (free_port, queue), 2, join=False, start_method='fork'
    )
    values, *gradients = map(torch.from_numpy, queue.get())
    while not started.join():
        pass
    views = projections()
    expected = losses(views)
    (expected * torch.tensor([1.0, 100.0])).sum().backward()
    torch.testing.assert_close(values, expected.detach())
    for found, view in zip(gradients[:2], views[:2], strict=True):
        torch.testing.assert_close(found, view.grad, rtol=1e-4, atol=1e-6)
    for found in gradients[2:]:
        assert not found.any()  # those of the peer


def test_one_process_has_all_rows():
    rows = torch.ones(2, 3, requires_grad=True)
    assert gather_rows(rows) is rows


@pytest.fixture
def free_port():
    import socket

    with socket.socket() as found:
        found.bind(('127.0.0.1', 0))
        return found.getsockname()[1]
