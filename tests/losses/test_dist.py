"""Relations between and within classes."""

import pytest
import torch

from mmkd.errors import ConfigError, ShapeError
from mmkd.losses import DISTLoss, inter_class_loss, intra_class_loss
from tests.helpers.loss_references import distances


def mean(values):
    return sum(values) / len(values)


@pytest.fixture
def probabilities():
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(8, 5, generator=generator) for _ in range(2)]


def test_between_classes(probabilities):
    s, t = probabilities
    expected = distances(s.tolist(), t.tolist())
    assert inter_class_loss(s, t).tolist() == pytest.approx(expected)


def test_within_classes(probabilities):
    s, t = probabilities
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    chosen = weights > 0
    expected = mean(distances(s[chosen].T.tolist(), t[chosen].T.tolist()))
    zeros = torch.zeros(8).long()
    assert intra_class_loss(s, t, weights, zeros, 1).item() == pytest.approx(
        expected, rel=1e-5
    )


def test_within_classes_image_by_image(probabilities):
    """The third image has no boxes."""
    s, t = probabilities
    images = torch.tensor([0, 0, 1, 0, 3, 3, 3, 1])
    weights = torch.ones(8)
    weights[7] = 0
    weights[2] = 0
    expected = []
    for image in (0, 3):
        chosen = (images == image) & (weights > 0)
        expected += distances(s[chosen].T.tolist(), t[chosen].T.tolist())
    assert intra_class_loss(s, t, weights, images, 4).item() == pytest.approx(
        mean(expected), rel=1e-5
    )


def test_by_hand():
    """Rows (1, 2, 3) and (1, 3, 2) correlate by 1/2, and by -1 reversed."""
    row = torch.tensor([[0.1, 0.2, 0.3]])
    half = torch.tensor([[0.1, 0.3, 0.2]])
    assert inter_class_loss(row, half).item() == pytest.approx(0.5, rel=1e-4)
    assert inter_class_loss(row, -row).item() == pytest.approx(2, rel=1e-4)
    assert inter_class_loss(row, 0.5 * row + 0.1).item() == pytest.approx(
        0, abs=1e-5
    )


def test_constant_probabilities_have_a_finite_gradient():
    s = torch.full((3, 4), 0.25, requires_grad=True)
    t = torch.rand(3, 4)
    loss = inter_class_loss(s, t).sum() + intra_class_loss(s, t)
    loss.backward()
    assert loss.isfinite()
    assert s.grad.isfinite().all()


def official_correlation(ours, theirs):
    """hunto/DIST_KD's pearson_correlation of the rows."""
    a, b = (p - p.mean(1, keepdim=True) for p in (ours, theirs))
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)


@pytest.mark.parametrize('scale', [1.0, 1e-6, 1e-8, 1e-9, 1e-12])
def test_tiny_probabilities_learn_as_in_the_official_code(
    probabilities, scale
):
    """Such as those of a sigmoid head that is sure of the background."""
    s, t = probabilities
    s = (scale * s).requires_grad_()
    for ours, theirs in (
        (inter_class_loss(s, t).mean(), 1 - official_correlation(s, t).mean()),
        (intra_class_loss(s, t), 1 - official_correlation(s.T, t.T).mean()),
    ):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        found, expected = (
            scale * torch.autograd.grad(loss, s)[0] for loss in (ours, theirs)
        )
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize('scale', [1.0, 1e-3, 1e-4])
def test_scores_that_hardly_differ(scale):
    """Those of background, beside the same in double precision."""
    generator = torch.Generator().manual_seed(0)
    s, t = (
        0.01 + scale * torch.rand(300, 200, generator=generator)
        for _ in range(2)
    )
    s.requires_grad_()
    exact = s.detach().double().requires_grad_()
    values, gradients = [], []
    for ours, theirs in ((s, t), (exact, t.double())):
        loss = inter_class_loss(ours, theirs).mean()
        loss = loss + intra_class_loss(ours, theirs)
        values.append(loss.item())
        gradients.append(*torch.autograd.grad(loss, ours))
    assert values[0] == pytest.approx(values[1], rel=1e-5)
    difference = (gradients[0] - gradients[1]).norm()
    assert difference < 1e-3 * gradients[1].norm()


def test_all_boxes_are_one_group_of_weight_1(probabilities):
    s, t = probabilities
    explicit = intra_class_loss(s, t, torch.ones(8), torch.zeros(8).long(), 1)
    assert intra_class_loss(s, t).item() == pytest.approx(explicit.item())


def test_no_boxes_have_no_relations():
    empty = torch.zeros(0, 4, requires_grad=True)
    loss = DISTLoss()(empty, torch.zeros(0, 4))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize('use_sigmoid', [False, True])
def test_the_module_adds_both(probabilities, use_sigmoid):
    """T squared times the weighted sum, of scaled logits."""
    logits = [p.logit() for p in probabilities]
    loss = DISTLoss(
        beta=2.0,
        gamma=3.0,
        temperature=2.0,
        use_sigmoid=use_sigmoid,
        loss_weight=0.5,
    )
    s, t = (
        (z / 2).sigmoid() if use_sigmoid else (z / 2).softmax(1)
        for z in logits
    )
    inter = distances(s.tolist(), t.tolist())
    intra = mean(distances(s.T.tolist(), t.T.tolist()))
    expected = 0.5 * 4 * (2 * mean(inter) + 3 * intra)
    assert loss(*logits).item() == pytest.approx(expected, rel=1e-4)
    weight = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    chosen = weight > 0
    inter = [d for d, w in zip(inter, weight, strict=True) if w]
    intra = mean(distances(s[chosen].T.tolist(), t[chosen].T.tolist()))
    expected = 0.5 * 4 * (2 * sum(inter) / 3 + 3 * intra)
    assert loss(*logits, weight, avg_factor=3).item() == pytest.approx(
        expected, rel=1e-4
    )


def test_maps_are_rows_of_positions(probabilities):
    """As in the official code for detection."""
    s, t = ((4 * p - 2).view(2, 2, 2, 5).movedim(-1, 1) for p in probabilities)
    rows = [(4 * p - 2) for p in probabilities]
    loss = DISTLoss(use_sigmoid=True)
    assert torch.equal(loss(s, t), loss(*rows))
    with pytest.raises(ShapeError, match=r'DISTLoss compares tensors of the '):
        loss(s, t[:, :4])
    with pytest.raises(ShapeError, match=r'\(N, C\), got \(2, 5, 4\)'):
        loss(s.flatten(2), t.flatten(2))


def test_the_teacher_gets_no_gradient(probabilities):
    s, t = (p.requires_grad_() for p in probabilities)
    (inter_class_loss(s, t).sum() + intra_class_loss(s, t)).backward()
    assert s.grad.abs().sum() > 0
    assert t.grad is None


def test_what_is_refused(probabilities):
    s, t = probabilities
    with pytest.raises(ShapeError, match=r'\(N, C\), got \(5,\)'):
        inter_class_loss(s[0], t[0])
    with pytest.raises(ShapeError, match=r'pred \(8, 5\), target \(8, 4\)'):
        intra_class_loss(s, t[:, :4])
    with pytest.raises(ConfigError, match=r'DISTLoss\.gamma must be at least'):
        DISTLoss(gamma=-1.0)
