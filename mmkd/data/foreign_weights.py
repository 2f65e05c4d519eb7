"""Weights that other libraries wrote, under the names of our modules."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from mmkd.errors import CheckpointError

State = Mapping[str, Tensor]

COMPUTED = re.compile(
    r'(^|\.)(num_batches_tracked|relative_position_index|attn_mask)$'
)
"""What a module counts or computes itself."""


def convert_state_dict(
    state: State, module: nn.Module
) -> tuple['OrderedDict[str, Tensor]', list[str]]:
    """Give weights the names, and where it differs the order, of a module.

    Known are the names of torchvision and timm for MobileNetV2, ResNet, RegNet
    and Swin (Swin's authors, too), and whatever stands before a module's own
    names: ``backbone.`` of mmcls, ``module.`` of distributed training, and so
    on.

    Args:
        state: The weights, as the other library wrote them.
        module: A stock module, such as the backbone of a detector.

    Returns:
        The weights of the module, all of them, and the keys of ``state`` that
        it has no place for.

    Raises:
        CheckpointError: If the weights do not fit the module exactly.
    """
    own = {
        key: value
        for key, value in module.state_dict().items()
        if not COMPUTED.search(key) and not _is_fresh(module, key)
    }
    nearest = Fit('', [], [*own], [])
    for prefix, inner in _below_each_prefix(state, len(own)):
        for rename in (_equal_names, *RENAMES.get(type(module).__name__, ())):
            renamed = rename(inner, own)
            fit = Fit.of(own, {k: v for k, (_, v) in renamed.items()})
            if fit.whole:
                converted = OrderedDict((k, renamed[k][1]) for k in own)
                used = {prefix + renamed[k][0] for k in own}
                rest = [
                    key
                    for key in state
                    if key not in used and not COMPUTED.search(key)
                ]
                return converted, rest
            if len(fit.missing) < len(nearest.missing):
                nearest = fit
    raise CheckpointError(
        f'the weights{" of " * bool(whose := origin(state))}{whose} do not '
        f'fit {type(module).__name__}: {nearest}. Give the config of the '
        'network that they were trained in, of the same kind, depth and '
        'width; names of other libraries are known for '
        f'{", ".join(RENAMES)}.'
    )


@dataclass
class Fit:
    """How names and shapes of weights relate to those of a module."""

    source: str
    equal: list[str]
    missing: list[str]
    """In the module alone."""
    shapes: list[str]
    """In both, of another shape: the name with both shapes."""

    @classmethod
    def of(cls, own: State, given: State, source: str = '') -> 'Fit':
        both = [key for key in own if key in given]
        equal = [k for k in both if own[k].shape == given[k].shape]
        return cls(
            source,
            equal,
            [key for key in own if key not in given],
            [
                f'{k} is {tuple(given[k].shape)} in the file and '
                f'{tuple(own[k].shape)} here'
                for k in both
                if own[k].shape != given[k].shape
            ],
        )

    @property
    def whole(self) -> bool:
        return not self.missing and not self.shapes

    def __len__(self) -> int:
        return len(self.equal) + len(self.missing) + len(self.shapes)

    def __str__(self) -> str:
        text = []
        if self.missing:
            text.append(
                f'{len(self.missing)} of {len(self)} tensors are not in it '
                f'({self.missing[0]})'
            )
        if self.shapes:
            text.append(
                f'{len(self.shapes)} of another shape: {self.shapes[0]}'
            )
        return ', '.join(text)


def _is_fresh(module: nn.Module, key: str) -> bool:
    """Return whether a classifier has no such weights, in whatever library.

    The output norms of a Swin backbone are for detection.
    """
    swin = type(module).__name__ == 'SwinTransformer'
    return swin and re.match(r'norm\d', key) is not None


def _below_each_prefix(state: State, at_least: int) -> Iterator[tuple]:
    """Yield what may be a network's weights, without what stands before."""
    yield '', state
    counts: dict[str, int] = {}
    for key in state:
        for found in list(re.finditer(r'\.', key))[:3]:
            prefix = key[: found.end()]
            counts[prefix] = counts.get(prefix, 0) + 1
    for prefix, count in counts.items():
        if count >= at_least:
            yield (
                prefix,
                {
                    key.removeprefix(prefix): value
                    for key, value in state.items()
                    if key.startswith(prefix)
                },
            )


# ------------------------------------------------------------------- renaming

Renamed = dict[str, tuple[str, Tensor]]
"""By the module's names: the name in the file, and the value."""


def _equal_names(state: State, own: State) -> Renamed:
    return {key: (key, value) for key, value in state.items()}


def _by_order(state: State, own: State) -> Renamed:
    """Match layers in the order in which they run.

    It is for networks that are a chain of convolutions, each followed by its
    norm, which every library registers in that order. Kinds and shapes have
    to agree layer by layer; what follows is left over.
    """
    theirs, ours = _layers(state), _layers(own)
    if len(theirs) < len(ours):
        return {}
    renamed: Renamed = {}
    for (path, leaves), (target, wanted) in zip(theirs, ours, strict=False):
        if leaves.keys() != wanted.keys():
            return {}
        for leaf, value in leaves.items():
            renamed[f'{target}.{leaf}'] = (f'{path}.{leaf}', value)
    return renamed


def _layers(state: State) -> list[tuple[str, dict[str, Tensor]]]:
    """Return the parameters of each layer, by its path, in their order."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, value in state.items():
        path, _, leaf = key.rpartition('.')
        if leaf != 'num_batches_tracked':
            found.setdefault(path, {})[leaf] = value
    return list(found.items())


Rule = tuple[str, str | Callable[[re.Match[str]], str]]


def _by_rules(
    *rules: Rule,
    value: Callable[[str, Tensor], Tensor] = lambda _, tensor: tensor,
) -> Callable[[State, State], Renamed]:
    """Return a function that applies regular expressions to every name."""

    def rename(state: State, own: State) -> Renamed:
        renamed: Renamed = {}
        for key, tensor in state.items():
            name = key
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            renamed[name] = (key, value(name, tensor))
        return renamed

    return rename


def _shifted(pattern: str, text: str, shift: Callable[[int], int]) -> Rule:
    """Return a rule that changes the first number in what it matches."""
    return pattern, lambda m: text.format(shift(int(m[1])))


def _merged(name: str, tensor: Tensor) -> Tensor:
    """Order the four pixels that Swin merges as MMDetection's unfold does.

    Elsewhere the pixels are (0, 0), (1, 0), (0, 1), (1, 1), each with all of
    its channels; unfold has all pixels of a channel, row by row.
    """
    if '.downsample.' not in name:
        return tensor
    pixels = tensor.unflatten(-1, (4, -1))[..., [0, 2, 1, 3], :]
    return pixels.transpose(-1, -2).flatten(-2).contiguous()


_SWIN_BLOCK = (
    (r'\.attn\.', '.attn.w_msa.'),
    (r'\.mlp\.(fc1|0)\.', '.ffn.layers.0.0.'),
    (r'\.mlp\.(fc2|3)\.', '.ffn.layers.1.'),
)
_swin_of_authors = _by_rules(
    (r'^layers\.', 'stages.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    *_SWIN_BLOCK,
    value=_merged,
)
_swin_of_timm = _by_rules(
    _shifted(
        r'^layers\.(\d+)\.downsample', 'stages.{}.downsample', lambda i: i - 1
    ),
    (r'^layers\.', 'stages.'),
    (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
    *_SWIN_BLOCK,
    value=_merged,
)
_swin_of_torchvision = _by_rules(
    (r'^features\.0\.0\.', 'patch_embed.projection.'),
    (r'^features\.0\.2\.', 'patch_embed.norm.'),
    _shifted(
        r'^features\.(\d+)\.(?=norm|reduction)',
        'stages.{}.downsample.',
        lambda i: i // 2 - 1,
    ),
    _shifted(
        r'^features\.(\d+)\.', 'stages.{}.blocks.', lambda i: (i - 1) // 2
    ),
    *_SWIN_BLOCK,
    value=_merged,
)
_regnet_of_torchvision = _by_rules(
    (r'^stem\.0\.', 'conv1.'),
    (r'^stem\.1\.', 'bn1.'),
    (r'^trunk_output\.block(\d+)\.block\d+-(\d+)\.', r'layer\1.\2.'),
    (r'\.proj\.', '.downsample.'),
    (r'\.f\.a\.0\.', '.conv1.'),
    (r'\.f\.a\.1\.', '.bn1.'),
    (r'\.f\.b\.0\.', '.conv2.'),
    (r'\.f\.b\.1\.', '.bn2.'),
    (r'\.f\.c\.0\.', '.conv3.'),
    (r'\.f\.c\.1\.', '.bn3.'),
)
_regnet_of_timm = _by_rules(
    (r'^stem\.conv\.', 'conv1.'),
    (r'^stem\.bn\.', 'bn1.'),
    (r'^s(\d+)\.b(\d+)\.', lambda m: f'layer{m[1]}.{int(m[2]) - 1}.'),
    (r'\.downsample\.conv\.', '.downsample.0.'),
    (r'\.downsample\.bn\.', '.downsample.1.'),
    (r'\.conv(\d)\.conv\.', r'.conv\1.'),
    (r'\.conv(\d)\.bn\.', r'.bn\1.'),
)
_resnet_d_of_timm = _by_rules(
    (r'^conv1\.', 'stem.'),
    (r'^bn1\.', 'stem.7.'),
)

RENAMES: dict[str, tuple[Callable[[State, State], Renamed], ...]] = {
    'MobileNetV2': (_by_order,),
    'RegNet': (_regnet_of_torchvision, _regnet_of_timm),
    'ResNeSt': (_resnet_d_of_timm,),
    'ResNetV1d': (_resnet_d_of_timm,),
    'SwinTransformer': (
        _swin_of_torchvision,
        _swin_of_authors,
        _swin_of_timm,
    ),
}
"""How weights are renamed, by the type of the module. Each was compared with
the other library by its outputs."""


# --------------------------------------------------------------------- origin

HEADS = 'bbox_head|rpn_head|roi_head|mask_head|panoptic_head|decoder'
ORIGINS: dict[str, tuple[str, ...]] = {
    'an Ultralytics YOLO': (r'^model\.\d+\.(cv\d|m\.\d|conv)\b',),
    'a detector of torchvision': (r'^backbone\.(body|fpn)\.',),
    'Detectron2': (r'(^|\.)(stem\.conv1|res2\.0)\.|bottom_up\.',),
    'Hugging Face': (
        r'attention\.(self\.)?(query|q_proj)\.|attention\.attention\.|'
        r'embedder\.embedder\.|\.convolution\.weight$',
    ),
    'a classifier of mmcls or mmpretrain': (
        r'^backbone\.',
        r'^head\.(fc|layers)\b',
    ),
    'a DETR of MMDetection 2, which version 3 has renamed,': (
        r'^bbox_head\.(transformer|query_embedding|input_proj)\.',
    ),
    'an MMDetection detector': (r'^backbone\.', rf'^({HEADS})\.'),
    "torchvision's MobileNetV2": (r'^features\.1\.conv\.0\.0\.',),
    "torchvision's ConvNeXt": (r'^features\.\d\.\d\.layer_scale$',),
    "torchvision's EfficientNet or MobileNetV3": (
        r'^features\.1\.(0\.)?block\.',
    ),
    "torchvision's Swin": (r'^features\.1\.0\.attn\.qkv\.',),
    "torchvision's DenseNet": (r'^features\.denseblock1\.',),
    "torchvision's VGG": (r'^features\.0\.', r'^classifier\.'),
    "torchvision's RegNet": (r'^trunk_output\.',),
    "torchvision's ViT": (r'^encoder\.layers\.encoder_layer_0\.',),
    "timm's MobileNet or EfficientNet": (r'^conv_stem\.', r'^blocks\.0\.0\.'),
    "timm's RegNet": (r'^s1\.b1\.',),
    "timm's Swin": (r'^layers\.3\.downsample\.',),
    "Swin's authors": (r'^layers\.0\.blocks\.0\.attn\.qkv\.',),
    "timm's ConvNeXt": (r'^stages\.0\.blocks\.0\.conv_dw\.',),
    "timm's ViT": (r'^blocks\.0\.attn\.qkv\.',),
    "timm's ResNet-D": (r'^conv1\.0\.', r'^layer1\.0\.'),
    "torchvision's or timm's ResNet": (r'^layer1\.0\.conv1\.', r'^fc\.'),
}
"""Patterns that occur in the names of weights, by whose names they are; the
first of which all occur."""
WRAPPERS = re.compile(r'(_orig_mod|module|model)\.(?!\d)')


def origin(state: State) -> str:
    """Return in words whose names weights have; '' if they are unknown."""
    keys = list(state)
    while keys and (found := WRAPPERS.match(keys[0])):
        if not all(key.startswith(found[0]) for key in keys):
            break
        keys = [key.removeprefix(found[0]) for key in keys]
    for name, patterns in ORIGINS.items():
        if all(any(re.search(p, key) for key in keys) for p in patterns):
            return name
    return ''


# ----------------------------------------------------------------- in a file

PLACES = (
    *('state_dict', 'model', 'model_state_dict', 'model_state', 'module'),
    *('state_dict_ema', 'ema_state_dict', 'model_ema', 'ema', 'net'),
)
"""Where libraries put the weights in a checkpoint; averages come last."""


def weights_in(content: object) -> tuple[str, State]:
    """Return where in a checkpoint its weights lie, and these weights.

    Raises:
        CheckpointError: If there are none.
    """
    if isinstance(content, Mapping):
        for key in ('', *PLACES):
            state = content.get(key) if key else content
            if isinstance(state, Mapping) and state:
                tensors = {
                    name: value
                    for name, value in state.items()
                    if isinstance(name, str) and isinstance(value, Tensor)
                }
                if len(tensors) == len(state):
                    return key, tensors
    held = (
        ', '.join(map(str, list(content)[:6]))
        if isinstance(content, Mapping)
        else type(content).__name__
    )
    raise CheckpointError(
        'no state dict was found (a dict of names and tensors, or one under '
        f'{", ".join(PLACES[:3])} and the like), got {held}. Save '
        'model.state_dict() from the library that wrote it.'
    )
