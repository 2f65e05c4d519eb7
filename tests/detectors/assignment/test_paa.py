"""The batched PAA assignment against MMDetection's own loops."""

import copy
import math

import pytest
import torch
from mmdet.models.dense_heads import PAAHead

from mmkd.detectors.assignment.paa import (
    Candidates,
    assigned_by,
    check_stock_paa,
    own_costs,
    rank_in_group,
)
from mmkd.errors import ConfigError
from tests.helpers import tiny_dense as dense
from tests.helpers import tiny_detectors as tiny


def scalars(losses):
    return {
        name: (sum(v) if isinstance(v, list) else v).item()
        for name, v in losses.items()
    }


def batched(model, inputs, samples, **options):
    head = model.bbox_head
    with assigned_by(head, own_costs(head), **options):
        return tiny.seeded_loss(model, inputs, samples)


@pytest.fixture(scope='module')
def model():
    return dense.build(dense.paa(), seed=1)


BATCHES = {
    'several objects': dict(objects=3),
    'an image without objects': dict(objects=[0, 4]),
    'many': dict(sizes=((128, 160), (96, 128), (96, 96)), objects=[7, 1, 9]),
}


@pytest.mark.parametrize('name', BATCHES)
def test_losses_and_gradients_of_stock_paa(model, name):
    batch = tiny.batch_for(model, **BATCHES[name])
    results = []
    for compute in (tiny.seeded_loss, batched):
        model.zero_grad()
        losses = compute(model, *batch)
        sum(losses.values()).backward()
        gradients = [p.grad.clone() for p in model.parameters()]
        results.append((scalars(losses), gradients))
    (stock, g), (ours, h) = results
    assert ours == pytest.approx(stock, rel=1e-6)
    for a, b in zip(g, h, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_no_objects_at_all(model):
    batch = tiny.batch_for(model, objects=0)
    stock = scalars(tiny.seeded_loss(model, *batch))
    assert scalars(batched(model, *batch)) == stock
    assert stock['loss_bbox'] == 0


def test_nothing_is_left_on_the_head(model):
    before = set(vars(model.bbox_head))
    batched(model, *tiny.batch_for(model))
    assert set(vars(model.bbox_head)) == before


def test_rank_in_group():
    groups = torch.tensor([1, 1, 1, 4, 7, 7])
    assert rank_in_group(groups).tolist() == [0, 1, 2, 0, 0, 1]
    assert rank_in_group(groups[:0]).tolist() == []


def candidates(levels, objects, number_of_objects):
    n = len(levels)
    return Candidates(
        anchors=torch.zeros(n, 4),
        labels=torch.zeros(n, dtype=torch.long),
        label_weights=torch.ones(n),
        targets=torch.zeros(n, 4),
        target_weights=torch.ones(n, 4),
        index=torch.arange(n),
        objects=torch.tensor(objects, dtype=torch.long),
        levels=torch.tensor(levels, dtype=torch.long),
        number_of_objects=number_of_objects,
        number_of_levels=2,
        number_of_images=1,
    )


def test_the_cheapest_of_each_level_by_hand():
    made = candidates([0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 0, 1], 3)
    costs = torch.tensor([5.0, 1.0, 3.0, 2.0, math.nan, 4.0])
    table, place = made._cheapest(costs, topk=2)
    inf = math.inf
    assert table.tolist() == [
        [1, 3, 2, inf],
        [4, inf, inf, inf],
        [inf, inf, inf, inf],
    ]
    assert place[0, :3].tolist() == [1, 2, 3]
    assert place[1, 0] == 5
    positive = made.positives(costs, topk=2, keep_single=True)
    assert positive[5]  # the only one of object 1
    assert not made.positives(costs, topk=2)[5]
    assert not positive[0]  # third of its level
    assert not positive[4]  # no cost


def test_one_object_of_many_images_equals_the_image_alone(model):
    """The fits of a batch are independent."""
    sizes, objects = ((160, 192), (160, 192)), [5, 3]
    inputs, samples = tiny.batch_for(model, sizes=sizes, objects=objects)

    def run(inputs, samples):
        found = []
        head = model.bbox_head

        def costs(made, logits, deltas):
            values = made.costs(head, logits, deltas)
            found.append(made.positives(values, head.topk))
            return values

        with assigned_by(head, costs):
            tiny.seeded_loss(model.eval(), inputs, samples)
        return found[0]

    labels = run(inputs, samples).view(2, -1)
    for i in range(2):
        alone = run(inputs[i : i + 1], copy.deepcopy(samples[i : i + 1]))
        assert alone.tolist() == labels[i].tolist()
    assert labels.any(dim=1).all()
    model.train()


class TestHeadsOfOnesOwn:
    def test_another_separation(self):
        class Own(PAAHead):
            def gmm_separation_scheme(self, *args):
                return args

        head = dense.build(dense.paa()).bbox_head
        head.__class__ = Own
        with pytest.raises(ConfigError, match='gmm_separation_scheme'):
            check_stock_paa(head, 'here')

    def test_tied_variances(self):
        head = dense.build(
            dense.paa(bbox_head__covariance_type='tied')
        ).bbox_head
        head.covariance_type = 'tied'
        with pytest.raises(ConfigError, match='tied'):
            check_stock_paa(head, 'here')
