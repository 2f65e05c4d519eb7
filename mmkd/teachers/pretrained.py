"""Pretrained image encoders of Hugging Face: weights, pixels, licence."""

import inspect
import json
import logging
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from mmengine.logging import print_log
from torch import Tensor, nn

from mmkd.data.files import path_hint
from mmkd.errors import CheckpointError, ConfigError, PackageError

WHERE = 'distillation.teacher (FoundationEncoder)'
FITTING = 'DINOv2, DINOv3 (ViT), SigLIP, CLIP and ViT'
IMAGENET = dict(
    image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225]
)
UNUSED = ('pooler', 'head', 'mask_token', 'text_model', 'logit_scale')
"""Weights that have nothing to do with the tokens of patches."""
LICENCES = {
    'dinov2': 'Apache-2.0',
    'dinov2_with_registers': 'Apache-2.0',
    'dinov3_vit': "the DINOv3 License, Meta's own, which has terms for what "
    'is derived from the model: '
    'https://ai.meta.com/resources/models-and-libraries/dinov3-license/',
    'siglip': 'Apache-2.0',
    'siglip_vision_model': 'Apache-2.0',
}
"""The licences of the published weights, by ``model_type``."""


@dataclass(frozen=True)
class Pixels:
    """The normalisation that an encoder was trained with, RGB, 0 to 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class Pretrained:
    """An image encoder that turns every patch of an image into a token."""

    network: nn.Module
    patch: int
    """The side of a patch in pixels."""
    width: int
    """The number of channels of a token."""
    channels: int
    """The number of channels of an image."""
    pixels: Pixels
    licence: str

    def __call__(self, images: Tensor) -> Tensor:
        """Return the tokens of the patches as a map.

        What comes before them is left out: the class token and registers.

        Args:
            images: (B, 3, H, W), normalised; H and W are multiples of the
                patch.

        Returns:
            (B, C, H / patch, W / patch).
        """
        height, width = (side // self.patch for side in images.shape[-2:])
        options = inspect.signature(self.network.forward).parameters
        # Others interpolate their position embeddings without being asked.
        asked = 'interpolate_pos_encoding'
        more = {asked: True} if asked in options else {}
        tokens = self.network(images, **more).last_hidden_state
        patches = tokens[:, tokens.shape[1] - height * width :]
        return patches.mT.unflatten(2, (height, width))


def load_pretrained(name: str) -> Pretrained:
    """Load an encoder by its name on the Hugging Face Hub or from a folder.

    Code that comes with the weights is never run.

    Raises:
        PackageError: If transformers is not installed.
        ConfigError: If there is no such model, or none that gives a token for
            each patch.
        CheckpointError: If the weights do not fill the network.
    """
    transformers = _transformers()
    _check_name(name)
    try:
        network, report = transformers.AutoModel.from_pretrained(
            os.path.expanduser(name),
            trust_remote_code=False,
            output_loading_info=True,
            dtype=torch.float32,
        )
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f'{WHERE}: {name!r} cannot be loaded: {_first_line(error)} Give '
            'the name of a model on https://huggingface.co, such as '
            "'facebook/dinov2-small', or the folder of a downloaded one."
        ) from error
    _check_complete(name, report)
    kind = network.config.model_type
    network = getattr(network, 'vision_model', network)
    config = network.config
    encoder = Pretrained(
        network.eval().requires_grad_(False),
        patch=_patch(name, config),
        width=getattr(config, 'hidden_size', 0),
        channels=getattr(config, 'num_channels', 3),
        pixels=read_pixels(name),
        licence=read_licence(name, kind),
    )
    _check_tokens(name, encoder)
    return encoder


def read_pixels(name: str) -> Pixels:
    """Read the normalisation from ``preprocessor_config.json``.

    Without that file it is ImageNet's, with a warning.
    """
    path = find_file(name, 'preprocessor_config.json')
    if path is None:
        print_log(
            f'{WHERE}: {name!r} has no preprocessor_config.json, so its '
            "images are normalised with ImageNet's mean and standard "
            'deviation.',
            'current',
            logging.WARNING,
        )
        settings: Mapping[str, Any] = {}
    else:
        settings = json.loads(path.read_text(encoding='utf-8'))
    settings = {**IMAGENET, **settings}
    scale = 1.0
    if settings.get('do_rescale', True):
        scale = settings.get('rescale_factor', 1 / 255)
    mean, std = [0.0] * 3, [1.0] * 3
    if settings.get('do_normalize', True):
        mean, std = settings['image_mean'], settings['image_std']
    return Pixels(
        tuple(value / scale for value in mean),
        tuple(value / scale for value in std),
    )


def read_licence(name: str, kind: str) -> str:
    """Return the licence of the weights, as the model card names it.

    Args:
        name: The name or the folder of the model.
        kind: The ``model_type`` of its config; that of the published weights
            is taken where there is no card.
    """
    path = find_file(name, 'README.md')
    text = '' if path is None else path.read_text('utf-8', errors='replace')
    front = re.match(r'---\s*\n(.*?)\n---', text, re.DOTALL)
    card: Any = None
    if front:
        with suppress(yaml.YAMLError):
            card = yaml.safe_load(front[1])
    found = card.get('license') if isinstance(card, dict) else None
    if found is None:
        return LICENCES.get(kind, 'not known here; see its model card')
    more = [card.get(key) for key in ('license_name', 'license_link')]
    return ', '.join(str(part) for part in (found, *more) if part)


def find_file(name: str, file: str) -> Path | None:
    """Return the path of a model's file, downloaded if need be, or None."""
    hub = _transformers().utils.hub
    with suppress(OSError):
        found = hub.cached_file(
            os.path.expanduser(name),
            file,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return None if found is None else Path(found)
    return None


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise PackageError(
            f'{WHERE} needs the package transformers, which this Python does '
            'not have. Install it with `pip install mmkd[foundation]`.'
        ) from error
    return transformers


def _check_name(name: Any) -> None:
    if not isinstance(name, str) or not name:
        raise ConfigError(
            f'{WHERE}.name must be the name of a model on '
            f"https://huggingface.co, such as 'facebook/dinov2-small', or a "
            f'folder, got {name!r}.'
        )
    looks_local = name.startswith(('/', '.', '~')) or name.count('/') > 1
    folder = Path(name).expanduser()
    if folder.is_file() or (looks_local and not folder.is_dir()):
        what = 'is a file' if folder.is_file() else 'does not exist'
        hint = '' if folder.is_file() else path_hint(folder)
        raise ConfigError(
            f'{WHERE}: the folder {name!r} {what}. {hint}Give the folder that '
            'holds config.json and the weights.'
        )


def _check_complete(name: str, report: Mapping[str, Any]) -> None:
    missing = [
        key
        for key in sorted(report['missing_keys'])
        if not set(UNUSED) & set(key.split('.'))
    ]
    wrong = [str(each[0]) for each in report['mismatched_keys']]
    if missing or wrong:
        shown = ', '.join((missing + wrong)[:3])
        raise CheckpointError(
            f'{WHERE}: the weights of {name!r} do not fill its network: '
            f'{len(missing)} are missing and {len(wrong)} have another shape '
            f'({shown}, …). Download the model again.'
        )


def _patch(name: str, config: Any) -> int:
    """Return the side of a patch in pixels."""
    patch = getattr(config, 'patch_size', None)
    sides = [patch] if isinstance(patch, int) else list(patch or ())
    if not sides or len(set(sides)) > 1:
        raise ConfigError(
            f'{WHERE}: {name!r} is a {config.model_type}, which has no square '
            f'patches (patch_size is {patch}). It fits {FITTING}.'
        )
    return sides[0]


@torch.no_grad()
def _check_tokens(name: str, encoder: Pretrained) -> None:
    """Check that an encoder gives a token for each patch of any image."""
    rows, columns = 2, 3  # no encoder was trained on such a shape
    size = rows * encoder.patch, columns * encoder.patch
    shape, why = None, ''
    try:
        map_ = encoder(torch.zeros(1, encoder.channels, *size))
        shape = tuple(map_.shape)
    except Exception as error:  # any network, any reason
        why = f' ({type(error).__name__}: {_first_line(error)})'
    expected = (1, encoder.width, rows, columns)
    if shape != expected:
        raise ConfigError(
            f'{WHERE}: {name!r} ({type(encoder.network).__name__}) does not '
            'give one token for each patch of an image: expected a map '
            f'{expected} of {rows} x {columns} patches, got '
            f'{shape or "an error"}{why}. It fits {FITTING}.'
        )


def _first_line(error: Exception) -> str:
    line = str(error).strip().partition('\n')[0]
    return line if line.endswith('.') else f'{line}.'
