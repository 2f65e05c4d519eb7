"""Networks, their losses, and what DoGo adds to them."""

import math

import pytest
import torch
from mmengine.config import Config
from torch.nn.modules.batchnorm import _BatchNorm

from mmkd.errors import ConfigError
from mmkd.losses import nt_xent_loss, similarity_kl
from mmkd.pretrain.config import network_options
from mmkd.pretrain.model import ContrastivePretraining, Network, Projector
from mmkd.registry import MODELS
from tests.helpers import tiny_detectors as tiny

pytest.importorskip('kornia')
SIZE = 32


def options(model):
    return network_options(Config(dict(model=model)), 'c.py', scratch=False)


def small(**changes):
    return tiny.retinanet(**changes)


def big():
    return tiny.retinanet(backbone__base_channels=16)


def pretraining(*models, seed=0, **more):
    torch.manual_seed(seed)
    networks = {f'n{i}': options(model) for i, model in enumerate(models)}
    return ContrastivePretraining(networks=networks, size=SIZE, **more)


@pytest.fixture
def crops():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(
        256, (6, 2, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator
    )


@pytest.mark.parametrize('kind', [tiny.retinanet, tiny.fcos])
def test_a_network_sees_what_its_detector_sees(kind):
    """RGB with standard deviations, and caffe's BGR without."""
    model = kind()
    network = Network(**options(model), size=SIZE).eval()
    detector = tiny.build(model).eval()
    detector.backbone.load_state_dict(network.backbone.state_dict())
    data = tiny.raw_batch(sizes=((SIZE, SIZE),))
    (loaded,) = data['inputs']  # BGR, as MMDetection loads it
    pixels = detector.data_preprocessor(data, training=False)['inputs']
    with torch.no_grad():
        expected = detector.backbone(pixels)[-1].mean((2, 3))
        found = network.features(loaded.flip(0)[None] / 255)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_the_projector():
    torch.manual_seed(0)
    projector = Projector(5, out=3)
    for parameter in projector.parameters():
        torch.nn.init.normal_(parameter)
    weights = [*projector.parameters()]
    assert [tuple(w.shape) for w in weights] == [
        *((5, 5), (5,), (5,), (5, 5), (5,), (5,), (3, 5), (3,))
    ]
    x = torch.randn(7, 5)
    expected = x
    for number in range(3):
        matrix, scale, *shift = weights[3 * number : 3 * number + 3]
        expected = expected @ matrix.T
        centred = expected - expected.mean(0)
        deviation = (centred.square().mean(0) + 1e-5).sqrt()
        expected = centred / deviation * scale
        if number < 2:
            expected = (expected + shift[0]).clamp(min=0)
    torch.testing.assert_close(projector(x), expected)


def test_learns_to_tell_images_apart():
    """Of twelve that differ in colour; chance is a loss of log 23."""
    generator = torch.Generator().manual_seed(0)
    colours = torch.rand(12, 1, 3, 1, 1, generator=generator)
    noise = torch.rand(12, 2, 3, SIZE, SIZE, generator=generator)
    crops = (255 * (0.9 * colours + 0.1 * noise)).to(torch.uint8)
    model = pretraining(small(), strength=0.0, blur=0.0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    torch.manual_seed(0)
    for _ in range(40):
        optimizer.zero_grad()
        loss = model(crops)['n0.loss_nt_xent']
        loss.backward()
        optimizer.step()
    # a fifth of the views are grey, which not even a perfect network finds
    assert loss.item() < 0.6 * math.log(23)


class TestThawing:
    def test_frozen_stages_and_norms(self, crops):
        frozen = small(backbone__frozen_stages=2, backbone__norm_eval=True)
        model = pretraining(frozen).train()
        backbone = model.networks.n0.backbone
        assert all(p.requires_grad for p in backbone.parameters())
        norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
        before = [m.running_mean.clone() for m in norms]
        sum(model(crops).values()).backward()
        assert all(p.grad.abs().sum() > 0 for p in backbone.parameters())
        for norm, mean in zip(norms, before, strict=True):
            assert not torch.equal(norm.running_mean, mean)

    def test_is_told(self):
        network = Network(
            **options(
                small(backbone__frozen_stages=1, backbone__norm_eval=True)
            ),
            size=SIZE,
        )
        first, second = network.thawed
        assert 'frozen parameters (frozen_stages=1) are trained' in first
        assert second == 'batch norms learn (norm_eval=False)'
        assert not Network(**options(small()), size=SIZE).thawed


class TestLosses:
    def test_of_one_network(self, crops):
        model = pretraining(small(), temperature=0.5)
        torch.manual_seed(3)
        found = model(crops)
        assert [*found] == ['n0.loss_nt_xent']
        torch.manual_seed(3)
        projected = model(crops, mode='tensor')['n0']
        first, second = projected[:6], projected[6:]
        expected = nt_xent_loss(first, second, temperature=0.5).mean()
        torch.testing.assert_close(found['n0.loss_nt_xent'], expected)

    def test_views_are_those_of_the_crops(self, crops):
        """Without changes of colour: mirrored, or grey, but in order."""
        model = pretraining(small(), strength=0.0, blur=0.0)
        views = model.views(crops)
        both = crops.transpose(0, 1).reshape(12, 3, SIZE, SIZE) / 255
        grey = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
        for view, crop in zip(views, both, strict=True):
            plain = [crop, (crop * grey).sum(0).expand(3, -1, -1)]
            near = [
                (view - each).abs().max()
                for c in plain
                for each in (c, c.flip(2))
            ]
            assert min(near) < 1e-4

    def test_dogo_adds_the_mean_over_the_peers(self, crops):
        model = pretraining(
            small(), big(), small(), kl_weights=(100, 1, 2), kl_temperature=0.3
        )
        torch.manual_seed(3)
        found = model(crops)
        torch.manual_seed(3)
        pairs = {
            name: z.chunk(2) for name, z in model(crops, mode='tensor').items()
        }
        for name, weight in (('n0', 100), ('n1', 1), ('n2', 2)):
            parts = [
                similarity_kl(pairs[name], pair, temperature=0.3).sum() / 36
                for peer, pair in pairs.items()
                if peer != name
            ]
            torch.testing.assert_close(
                found[f'{name}.loss_kl'], weight * sum(parts) / 2
            )

    def test_no_network_changes_another(self, crops):
        model = pretraining(small(), big(), kl_weights=(100, 1))
        model(crops)['n0.loss_kl'].backward()
        first, second = model.networks.values()
        assert all(p.grad is not None for p in first.parameters())
        assert all(p.grad is None for p in second.parameters())

    def test_weight_0_is_training_alone(self, crops):
        gradients = []
        for weights in ((), (0.0, 0.0)):
            model = pretraining(small(), big(), kl_weights=weights)
            torch.manual_seed(3)
            sum(model(crops).values()).backward()
            gradients.append([p.grad for p in model.parameters()])
        for a, b in zip(*gradients, strict=True):
            assert torch.equal(a, b)

    def test_as_many_weights_as_networks(self):
        with pytest.raises(ConfigError, match=r'for each network \(n0, n1\)'):
            pretraining(small(), big(), kl_weights=(1.0,))


def test_weights_that_a_backbone_begins_with(tmp_path):
    source = Network(**options(small()), size=SIZE)
    state = source.backbone.state_dict(prefix='backbone.')
    torch.save(dict(state_dict=state), tmp_path / 'start.pth')
    begins = dict(
        type='Pretrained',
        checkpoint=str(tmp_path / 'start.pth'),
        prefix='backbone.',
    )
    model = pretraining(small(backbone__init_cfg=begins), seed=5)
    model.init_weights()
    found = model.networks.n0.backbone.state_dict(prefix='backbone.')
    assert found.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(found[key], value), key


def test_a_backbone_that_gives_no_map():
    with pytest.raises(ConfigError, match=r'has to give maps \(B, C, H, W\)'):
        Network(**options(small(backbone__in_channels=1)), size=SIZE)


def test_configs_name_it():
    assert MODELS.get('mmkd.ContrastivePretraining') is ContrastivePretraining
