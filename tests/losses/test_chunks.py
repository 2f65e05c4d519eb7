"""Sums in chunks equal sums at once, and need less memory."""

import pytest
import torch

from mmkd.detectors.record import flatten_levels
from mmkd.losses import sigmoid_kl, soft_focal_loss
from mmkd.losses.chunks import ELEMENTS, sum_in_chunks
from tests.helpers.allocations import peak

SIZES = ((5, 7), (3, 4), (1, 1))
IMAGES, PRIORS = 2, 3


def divergence(ours, theirs):
    return sigmoid_kl(ours, theirs[:, : ours.shape[1]]).sum(-1)


def focal(ours, theirs):
    scores = theirs[:, : ours.shape[1]].float().sigmoid()
    return soft_focal_loss(ours, scores).sum(-1)


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def levels(request):
    """Maps of a student of 4 classes and of a teacher of 6, and weights."""
    generator = torch.Generator().manual_seed(0)

    def maps(columns):
        return [
            torch.randn(
                (IMAGES, PRIORS * columns, *size), generator=generator
            ).to(request.param)
            for size in SIZES
        ]

    number = PRIORS * sum(h * w for h, w in SIZES)
    weight = torch.rand((IMAGES, number), generator=generator)
    return [z.requires_grad_() for z in maps(4)], maps(6), weight


@pytest.mark.parametrize('loss', [divergence, focal])
@pytest.mark.parametrize('elements', [1, 100, 10**6])
@pytest.mark.parametrize('joined', [True, False])
def test_values_and_gradients(levels, loss, elements, joined, monkeypatch):
    monkeypatch.setitem(ELEMENTS, 'cpu', elements)
    ours, theirs, weight = levels
    rows = flatten_levels(ours, 4), flatten_levels(theirs, 6)
    flat = [z.flatten(0, 1) for z in rows]
    expected = (loss(*flat) * weight.flatten()).sum()
    gradients = torch.autograd.grad(3 * expected, ours)
    if joined:
        ours_read, theirs_read = [flatten_levels(ours, 4)], [rows[1]]
    else:
        ours_read, theirs_read = ours, theirs
    found = sum_in_chunks(loss, ours_read, theirs_read, weight, (4, 6))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    # Again and again, as when gradients are measured.
    for _ in range(2):
        again = torch.autograd.grad(3 * found, ours, retain_graph=True)
        torch.testing.assert_close(again, gradients, rtol=1e-5, atol=1e-7)
        assert [g.dtype for g in again] == [z.dtype for z in ours]


def test_little_of_the_size_of_the_logits_is_kept():
    """The gradient, once scaled and once not, and a few chunks."""
    columns, size = 1203, (64, 64)
    ours = torch.randn(1, columns, *size).requires_grad_()
    theirs, weight = torch.randn_like(ours).detach(), torch.ones(1, 4096)
    own = ours.numel() * 4

    def in_chunks():
        loss = sum_in_chunks(
            divergence, [ours], [theirs], weight, (columns, columns)
        )
        torch.autograd.grad(loss, ours)

    def at_once():
        rows = (flatten_levels([z], columns).flatten(0, 1) for z in both)
        torch.autograd.grad((divergence(*rows) * weight[0]).sum(), ours)

    both = ours, theirs
    assert peak(in_chunks) < 2 * own + 12 * ELEMENTS['cpu'] * 4 < 2.7 * own
    assert peak(at_once) > 4.5 * own
