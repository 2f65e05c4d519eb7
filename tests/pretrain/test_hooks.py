"""What is measured while backbones learn."""

from types import SimpleNamespace

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.pretrain.crops import RandomCrops
from mmkd.pretrain.hooks import RepresentationHook
from mmkd.pretrain.images import find_images
from mmkd.pretrain.measures import alignment, knn_accuracy, uniformity
from tests.helpers import made_data
from tests.pretrain.test_model import SIZE, big, pretraining, small

pytest.importorskip('kornia')


@pytest.fixture
def runner(tmp_path):
    """What the hook reads of a runner, with real images and networks."""
    files = find_images(str(made_data.root() / 'bccd'), SIZE).files
    path = tmp_path / 'images.txt'
    path.write_text('\n'.join(files))
    logged, scalars = [], {}
    dataset = RandomCrops(str(path), size=SIZE)

    def add_scalars(values, step, file_path):
        scalars[step] = values

    return SimpleNamespace(
        model=pretraining(small(), big()),
        train_loop=SimpleNamespace(
            dataloader=SimpleNamespace(dataset=dataset)
        ),
        logger=SimpleNamespace(info=logged.append),
        visualizer=SimpleNamespace(add_scalars=add_scalars),
        timestamp='now',
        epoch=0,
        max_epochs=5,
        logged=logged,
        scalars=scalars,
    )


def test_measures_each_network(runner):
    hook = RepresentationHook(annotations=str(made_data.root() / 'bccd'))
    torch.manual_seed(9)
    state = torch.get_rng_state()
    hook.before_train(runner)
    hook.after_train_epoch(runner)
    assert torch.equal(torch.get_rng_state(), state)
    assert 'Neighbours classify' in runner.logged[0]
    found = runner.scalars[1]
    crops, labels, images = hook._objects
    views = hook._views / 255
    for name, network in runner.model.networks.items():
        assert network.training  # as it was
        network.eval()
        with torch.no_grad():
            knn = knn_accuracy(network.features(crops / 255), labels, images)
            first, second = network(views).chunk(2)
        assert found[f'{name}/knn'] == pytest.approx(knn[0])
        assert found[f'{name}/knn_class_mean'] == pytest.approx(knn[1])
        assert found[f'{name}/alignment'] == pytest.approx(
            alignment(first, second), rel=1e-4
        )
        assert found[f'{name}/uniformity'] == pytest.approx(
            uniformity(first), rel=1e-4
        )
    assert set(found) == {
        f'{name}/{kind}'
        for name in ('n0', 'n1')
        for kind in ('knn', 'knn_class_mean', 'alignment', 'uniformity')
    }


def test_without_labels(runner):
    hook = RepresentationHook()
    hook.before_train(runner)
    hook.after_train_epoch(runner)
    kinds = {name.partition('/')[2] for name in runner.scalars[1]}
    assert kinds == {'alignment', 'uniformity'}


def test_every_few_epochs_and_the_last(runner):
    hook = RepresentationHook(interval=2)
    hook.before_train(runner)
    for epoch in range(5):
        runner.epoch = epoch
        hook.after_train_epoch(runner)
    assert [*runner.scalars] == [2, 4, 5]
    # the same views each time
    assert runner.scalars[2] == runner.scalars[5]


def test_wrong_interval():
    with pytest.raises(ConfigError, match='interval must be at least 1'):
        RepresentationHook(interval=0)
