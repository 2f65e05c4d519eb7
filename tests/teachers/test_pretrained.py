"""Encoders of transformers: their tokens, pixels and licences."""

import json
import sys

import pytest
import torch

from mmkd.errors import CheckpointError, ConfigError, PackageError
from mmkd.teachers.pretrained import load_pretrained
from tests.helpers import encoders

KINDS = {'dinov2': 1, 'registers': 5, 'dinov3': 1, 'siglip': 0, 'clip': 1}
"""How many tokens each family has before those of the patches."""


@pytest.fixture
def logged(monkeypatch):
    """What is printed to the log."""
    texts = []
    monkeypatch.setattr(
        'mmkd.teachers.pretrained.print_log',
        lambda text, *_, **__: texts.append(text),
    )
    return texts


def load(path, kind='dinov2', **options):
    return load_pretrained(encoders.folder(path, kind, **options))


@pytest.mark.parametrize('kind', KINDS)
def test_tokens_are_those_of_transformers(tmp_path, kind):
    encoder = load(tmp_path, kind)
    images = torch.randn(2, 3, 40, 24)  # 5 x 3 patches, trained on 4 x 4
    own = encoders.network(kind)
    own = getattr(own, 'vision_model', own)
    more = {'interpolate_pos_encoding': True} if KINDS[kind] < 2 else {}
    if kind in ('dinov2', 'dinov3'):
        more = {}
    with torch.no_grad():
        tokens = own(images, **more).last_hidden_state
        found = encoder(images)
    assert tokens.shape[1] == KINDS[kind] + 15
    assert found.shape == (2, 16, 5, 3)
    for row in range(5):
        for column in range(3):
            expected = tokens[:, KINDS[kind] + 3 * row + column]
            torch.testing.assert_close(found[:, :, row, column], expected)


@pytest.mark.parametrize('kind', ['dinov2', 'siglip'])
def test_a_bright_patch_is_found_in_its_place(tmp_path, kind):
    # Without layers, a token is made of its patch and position alone.
    encoder = load(tmp_path, kind, num_hidden_layers=0)
    dark = torch.zeros(1, 3, 40, 24)
    bright = dark.clone()
    bright[:, :, 24:32, 8:16] = 1.0  # row 3, column 1
    changed = (encoder(bright) - encoder(dark)).abs().sum((0, 1))
    assert changed.nonzero().tolist() == [[3, 1]]


def test_it_is_frozen(tmp_path):
    encoder = load(tmp_path)
    assert not encoder.network.training
    assert not any(p.requires_grad for p in encoder.network.parameters())
    assert (encoder.patch, encoder.width, encoder.channels) == (8, 16, 3)


class TestPixels:
    def test_of_the_preprocessor(self, tmp_path):
        pixels = load(tmp_path).pixels
        assert pixels.mean == pytest.approx((127.5, 102.0, 76.5))
        assert pixels.std == pytest.approx((51.0, 63.75, 76.5))

    def test_that_are_not_rescaled(self, tmp_path):
        options = dict(
            do_rescale=False,
            image_mean=[100.0, 90.0, 80.0],
            image_std=[50.0, 60.0, 70.0],
        )
        pixels = load(tmp_path, pixels=options).pixels
        assert pixels.mean == (100.0, 90.0, 80.0)
        assert pixels.std == (50.0, 60.0, 70.0)

    def test_that_are_only_rescaled(self, tmp_path):
        options = dict(do_normalize=False, rescale_factor=0.5)
        pixels = load(tmp_path, pixels=options).pixels
        assert (pixels.mean, pixels.std) == ((0.0,) * 3, (2.0,) * 3)

    def test_without_a_file_they_are_those_of_imagenet(self, tmp_path, logged):
        pixels = load(tmp_path, pixels=None).pixels
        assert pixels.mean == pytest.approx((123.675, 116.28, 103.53))
        assert pixels.std == pytest.approx((58.395, 57.12, 57.375))
        assert 'has no preprocessor_config.json' in logged[0]
        assert "ImageNet's mean" in logged[0]


@pytest.mark.parametrize(
    ('kind', 'card', 'licence'),
    [
        ('dinov2', None, 'Apache-2.0'),
        ('dinov3', None, 'the DINOv3 License'),
        ('siglip', None, 'Apache-2.0'),
        ('vit', None, 'not known here; see its model card'),
        ('dinov2', '---\nlicense: mit\n---\n# A model', 'mit'),
        ('dinov2', '# A card without front matter', 'Apache-2.0'),
        ('dinov2', '---\nlicense: [\n---\n', 'Apache-2.0'),
        (
            'dinov3',
            '---\nlicense: other\nlicense_name: dinov3-license\n'
            'license_link: https://example.com/terms\n---\n',
            'other, dinov3-license, https://example.com/terms',
        ),
    ],
)
def test_licences(tmp_path, kind, card, licence):
    assert load(tmp_path, kind, card=card).licence.startswith(licence)


class TestErrors:
    def test_transformers_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, 'transformers', None)
        with pytest.raises(PackageError, match=r'mmkd\[foundation\]'):
            load_pretrained('facebook/dinov2-small')

    @pytest.mark.parametrize('name', [None, '', 3])
    def test_no_name(self, name):
        with pytest.raises(ConfigError, match=r'name must be the name of a m'):
            load_pretrained(name)

    def test_no_folder(self, tmp_path):
        encoders.folder(tmp_path / 'encoder')
        with pytest.raises(ConfigError) as caught:
            load_pretrained(str(tmp_path / 'encodr'))
        assert 'does not exist. Did you mean' in str(caught.value)
        file = tmp_path / 'encoder' / 'config.json'
        with pytest.raises(ConfigError, match='is a file'):
            load_pretrained(str(file))

    def test_an_empty_folder(self, tmp_path):
        with pytest.raises(ConfigError, match=r'cannot be loaded: .*config'):
            load_pretrained(str(tmp_path))

    def test_a_config_of_an_unknown_model(self, tmp_path):
        encoders.folder(tmp_path)
        path = tmp_path / 'config.json'
        config = json.loads(path.read_text())
        path.write_text(json.dumps({**config, 'model_type': 'dinov9'}))
        with pytest.raises(ConfigError, match=r'cannot be loaded: .*dinov9'):
            load_pretrained(str(tmp_path))

    def test_code_beside_the_weights_is_not_run(self, tmp_path):
        encoders.folder(tmp_path)
        path = tmp_path / 'config.json'
        config = json.loads(path.read_text())
        config['model_type'] = 'own'
        config['auto_map'] = {
            'AutoConfig': 'own.OwnConfig',
            'AutoModel': 'own.OwnModel',
        }
        path.write_text(json.dumps(config))
        (tmp_path / 'own.py').write_text(
            f"open({str(tmp_path / 'run')!r}, 'w')"
        )
        with pytest.raises(ConfigError, match='cannot be loaded'):
            load_pretrained(str(tmp_path))
        assert not (tmp_path / 'run').exists()

    @pytest.mark.parametrize(
        ('kind', 'options', 'why'),
        [
            ('ResNet', dict(depths=[1] * 4, hidden_sizes=[8] * 4), 'square'),
            # whose patches are joined
            ('Swin', dict(embed_dim=8, depths=[1], num_heads=[2]), 'one tok'),
            # which leaves out most patches at random
            ('ViTMAE', encoders.SMALL, 'one token'),
        ],
    )
    def test_other_encoders(self, tmp_path, kind, options, why):
        with pytest.raises(ConfigError, match=why) as caught:
            load(tmp_path, kind, **options)
        assert 'It fits DINOv2, DINOv3 (ViT), SigLIP' in str(caught.value)

    def test_weights_that_are_not_whole(self, tmp_path):
        name = encoders.without(
            'embeddings.patch_embeddings.projection.bias', tmp_path
        )
        with pytest.raises(CheckpointError, match=r'1 are missing and 0 have'):
            load_pretrained(name)

    def test_a_name_that_is_nowhere(self, monkeypatch):
        monkeypatch.setenv('HF_HUB_OFFLINE', '1')
        monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
        with pytest.raises(ConfigError, match='Give the name of a model on h'):
            load_pretrained('nobody/nothing-at-all')
