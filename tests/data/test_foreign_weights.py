"""Weights of other libraries compute the same under our names."""

import re

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.backbones import (
    MobileNetV2,
    RegNet,
    ResNet,
    ResNetV1d,
    SwinTransformer,
)

from mmkd.data.foreign_weights import convert_state_dict, origin
from mmkd.errors import CheckpointError


def drawn(module):
    """A module with random weights, also where they begin as 0 or 1."""
    torch.manual_seed(0)
    for name, value in module.state_dict().items():
        if name.endswith('running_var'):
            value.uniform_(0.5, 2)
        elif value.is_floating_point() and value.dim() == 1:
            value.normal_(1 if name.endswith('weight') else 0, 0.2)
    module.eval()
    return module


# --------------------------------------------------------------- MobileNetV2

SETTINGS = (
    *((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2)),
    *((6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)),
)
"""Of its paper: expansion, channels, blocks, stride."""


def mobilenet_of_torchvision(x, conv):
    """The network, as ``conv(name of the conv, of its norm, x, …)``."""
    x = conv('features.0.0', 'features.0.1', x, 32, stride=2, size=3)
    number = 1
    for expansion, width, blocks, stride in SETTINGS:
        for block in range(blocks):
            path, before, inner = f'features.{number}.conv', x, 0
            hidden = x.shape[1] * expansion
            if expansion > 1:
                x = conv(f'{path}.0.0', f'{path}.0.1', x, hidden)
                inner = 1
            x = conv(
                *(f'{path}.{inner}.0', f'{path}.{inner}.1', x, hidden),
                stride=1 if block else stride,
                size=3,
                groups=hidden,
            )
            names = f'{path}.{inner + 1}', f'{path}.{inner + 2}'
            x = conv(*names, x, width, activated=False)
            if before.shape == x.shape:
                x = x + before
            number += 1
    return conv(f'features.{number}.0', f'features.{number}.1', x, 1280)


class Network:
    """Draws the weights that it is asked for first, then computes."""

    def __init__(self):
        self.state = {}

    def __call__(
        self, path, norm, x, width, *, stride=1, size=1, groups=1,
        activated=True,
    ):  # fmt: skip
        shape = (width, x.shape[1] // groups, size, size)
        if f'{path}.weight' not in self.state:
            scale = (shape[1] * size * size) ** -0.5
            self.state[f'{path}.weight'] = torch.randn(shape) * scale
            for name, value in (
                ('weight', torch.rand(width) + 0.5),
                ('bias', torch.randn(width) * 0.1),
                ('running_mean', torch.randn(width) * 0.1),
                ('running_var', torch.rand(width) + 0.5),
                ('num_batches_tracked', torch.tensor(7)),
            ):
                self.state[f'{norm}.{name}'] = value
        weight, bias, mean, var = (
            self.state[f'{norm}.{name}']
            for name in ('weight', 'bias', 'running_mean', 'running_var')
        )
        kernel, pad = self.state[f'{path}.weight'], size // 2
        x = F.conv2d(x, kernel, None, stride, pad, 1, groups)
        x = F.batch_norm(x, mean, var, weight, bias)
        return F.relu6(x) if activated else x


@pytest.fixture(scope='module')
def mobilenet():
    """Torchvision's weights, a picture, and the features of it."""
    torch.manual_seed(0)
    picture, network = torch.randn(1, 3, 64, 96), Network()
    features = mobilenet_of_torchvision(picture, network)
    head = {
        'classifier.1.weight': torch.randn(10, 1280),
        'classifier.1.bias': torch.randn(10),
    }
    return network.state | head, picture, features


@pytest.mark.parametrize('before', ['', 'module.', 'model.backbone.'])
def test_mobilenet_of_torchvision(mobilenet, before):
    state, picture, features = mobilenet
    state = {before + key: value for key, value in state.items()}
    module = MobileNetV2(out_indices=(7,))
    module.eval()
    converted, left_over = convert_state_dict(state, module)
    module.load_state_dict(converted, strict=False)
    (found,) = module(picture)
    torch.testing.assert_close(found, features)
    names = ('classifier.1.weight', 'classifier.1.bias')
    assert left_over == [before + name for name in names]


def test_a_network_of_another_width(mobilenet):
    with pytest.raises(
        CheckpointError, match='of another shape: conv1'
    ) as caught:
        convert_state_dict(mobilenet[0], MobileNetV2(widen_factor=0.5))
    assert "torchvision's MobileNetV2" in str(caught.value)


def test_another_shape_is_called_that():
    state = ResNet(depth=18).state_dict()
    with pytest.raises(CheckpointError) as caught:
        convert_state_dict(state, ResNet(depth=18, base_channels=16))
    assert (
        '100 of another shape: conv1.weight is (64, 3, 7, 7) in the file and '
        '(16, 3, 7, 7) here' in str(caught.value)
    )


# ---------------------------------------------------------------------- Swin


def swin_of_torchvision(state, x, heads, window):
    """Two stages of one block each, without shifted windows."""
    x = F.conv2d(x, *both(state, 'features.0.0'), stride=4)
    x = normed(state, 'features.0.2', x.permute(0, 2, 3, 1))
    outputs = []
    for stage, count in enumerate(heads):
        path = f'features.{2 * stage + 1}.0'
        y = normed(state, f'{path}.norm1', x)
        x = x + attention(state, f'{path}.attn', y, count, window)
        y = F.linear(
            normed(state, f'{path}.norm2', x), *both(state, f'{path}.mlp.0')
        )
        x = x + F.linear(F.gelu(y), *both(state, f'{path}.mlp.3'))
        outputs.append(x)
        if stage + 1 < len(heads):
            path = f'features.{2 * stage + 2}'
            x = torch.cat(
                [
                    *(x[:, 0::2, 0::2], x[:, 1::2, 0::2]),
                    *(x[:, 0::2, 1::2], x[:, 1::2, 1::2]),
                ],
                -1,
            )
            x = normed(state, f'{path}.norm', x)
            x = F.linear(x, state[f'{path}.reduction.weight'])
    return outputs


def both(state, path):
    return state[f'{path}.weight'], state[f'{path}.bias']


def normed(state, path, x):
    return F.layer_norm(x, x.shape[-1:], *both(state, path))


def attention(state, path, x, heads, window):
    _, height, width, channels = x.shape
    rows, columns = height // window, width // window
    x = x.reshape(rows, window, columns, window, channels).transpose(1, 2)
    x = x.reshape(rows * columns, window * window, channels)
    x = F.linear(x, *both(state, f'{path}.qkv'))
    q, k, v = x.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    place = torch.cartesian_prod(torch.arange(window), torch.arange(window))
    apart = place[:, None] - place[None] + window - 1
    index = apart[..., 0] * (2 * window - 1) + apart[..., 1]
    bias = state[f'{path}.relative_position_bias_table'][index]
    scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
    x = (scores + bias.permute(2, 0, 1)).softmax(-1) @ v
    x = F.linear(x.transpose(1, 2).flatten(2), *both(state, f'{path}.proj'))
    x = x.reshape(rows, columns, window, window, channels).transpose(1, 2)
    return x.reshape(1, height, width, channels)


def swin_names(key):
    """Torchvision's name of one of our weights."""
    for pattern, replacement in (
        (r'^patch_embed\.projection', 'features.0.0'),
        (r'^patch_embed\.norm', 'features.0.2'),
        (r'^stages\.0\.blocks', 'features.1'),
        (r'^stages\.0\.downsample', 'features.2'),
        (r'^stages\.1\.blocks', 'features.3'),
        (r'\.attn\.w_msa\.', '.attn.'),
        (r'\.ffn\.layers\.0\.0\.', '.mlp.0.'),
        (r'\.ffn\.layers\.1\.', '.mlp.3.'),
    ):
        key = re.sub(pattern, replacement, key)
    return key


AUTHORS = (
    (r'^features\.0\.0', 'patch_embed.proj'),
    (r'^features\.0\.2', 'patch_embed.norm'),
    (r'^features\.1', 'layers.0.blocks'),
    (r'^features\.2', 'layers.0.downsample'),
    (r'^features\.3', 'layers.1.blocks'),
    (r'\.mlp\.0\.', '.mlp.fc1.'),
    (r'\.mlp\.3\.', '.mlp.fc2.'),
)
"""From torchvision's names to those of the authors."""
TIMM = (*AUTHORS, (r'layers\.0\.downsample', 'layers.1.downsample'))


@pytest.mark.parametrize('renamed', [(), AUTHORS, TIMM])
def test_swin(renamed):
    module = drawn(
        SwinTransformer(
            **dict(embed_dims=16, depths=(1, 1), num_heads=(2, 4)),
            **dict(window_size=4, strides=(4, 2), out_indices=(0, 1)),
        )
    )
    module.norm0 = module.norm1 = torch.nn.Identity()
    torch.manual_seed(1)
    state = {
        swin_names(key): torch.randn_like(value) * 0.3
        for key, value in module.state_dict().items()
        if value.is_floating_point()
    }
    picture = torch.randn(1, 3, 64, 96)
    expected = swin_of_torchvision(state, picture, (2, 4), 4)
    for pattern, replacement in renamed:
        state = {re.sub(pattern, replacement, k): v for k, v in state.items()}
    converted, left_over = convert_state_dict(state, module)
    module.load_state_dict(converted, strict=False)
    assert not left_over
    for found, output in zip(module(picture), expected, strict=True):
        torch.testing.assert_close(
            found, output.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-5
        )


# ---------------------------------------------------------------- other names


def renamed(state, *rules):
    found = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        found[key] = value
    return found


REGNET_OF_TORCHVISION = (
    (r'^conv1\.', 'stem.0.'),
    (r'^bn1\.', 'stem.1.'),
    (r'^layer(\d)\.(\d+)\.', r'trunk_output.block\1.block\1-\2.'),
    (r'\.downsample\.', '.proj.'),
    *(
        (rf'\.{ours}{number}\.', f'.f.{letter}.{part}.')
        for number, letter in ((1, 'a'), (2, 'b'), (3, 'c'))
        for ours, part in (('conv', 0), ('bn', 1))
    ),
)
REGNET_OF_TIMM = (
    (r'^conv1\.', 'stem.conv.'),
    (r'^bn1\.', 'stem.bn.'),
    (r'\.(conv|bn)(\d)\.', lambda m: f'.conv{m[2]}.{m[1]}.'),
    (r'^layer(\d)\.(\d+)\.', lambda m: f's{m[1]}.b{int(m[2]) + 1}.'),
    (r'\.conv(\d)\.conv\.', r'.conv\1.conv.'),
    (r'\.downsample\.0\.', '.downsample.conv.'),
    (r'\.downsample\.1\.', '.downsample.bn.'),
)
RESNET_D = ((r'^stem\.7\.', 'bn1.'), (r'^stem\.', 'conv1.'))


@pytest.mark.parametrize(
    ('build', 'rules', 'whose'),
    [
        (
            lambda: RegNet('regnetx_400mf'),
            REGNET_OF_TORCHVISION,
            "torchvision's RegNet",
        ),
        (lambda: RegNet('regnetx_400mf'), REGNET_OF_TIMM, "timm's RegNet"),
        (lambda: ResNetV1d(depth=50), RESNET_D, "timm's ResNet-D"),
        (lambda: ResNet(depth=18), (), "torchvision's or timm's ResNet"),
    ],
)
def test_names(build, rules, whose):
    """Each tensor comes back to its place."""
    module = drawn(build())
    state = {
        **renamed(module.state_dict(), *rules),
        'fc.weight': torch.ones(1),
    }
    assert origin(state) == whose
    converted, left_over = convert_state_dict(state, build())
    assert left_over == ['fc.weight']
    own = {
        k: v
        for k, v in module.state_dict().items()
        if not k.endswith('num_batches_tracked')
    }
    assert converted.keys() == own.keys()
    assert all(torch.equal(converted[k], own[k]) for k in own)


@pytest.mark.parametrize(
    ('keys', 'whose'),
    [
        ('model.0.conv.weight model.22.dfl.conv.weight', 'Ultralytics'),
        ('features.0.weight classifier.0.weight', "torchvision's VGG"),
        ('backbone.body.conv1.weight backbone.fpn.x', 'detector of torch'),
        ('backbone.conv1.weight head.fc.weight', 'mmcls or mmpretrain'),
        ('backbone.conv1.weight bbox_head.fc_cls.weight', 'an MMDetection'),
        ('backbone.x bbox_head.transformer.encoder.x', 'MMDetection 2'),
        ('vit.encoder.layer.0.attention.attention.query.weight', 'Hugging'),
        ('module.conv_stem.weight module.blocks.0.0.bn1.bias', "timm's Mob"),
    ],
)
def test_origin(keys, whose):
    assert whose in origin(dict.fromkeys(keys.split(), torch.ones(1)))


def test_unknown_names_have_no_origin():
    assert origin({'x.weight': torch.ones(1)}) == ''
