"""Tiny image encoders of transformers, with random weights, in a folder."""

import json
from pathlib import Path

import torch

from mmkd.utils import isolated_random_state

SMALL = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
)
FAMILIES = {
    'dinov2': 'Dinov2',
    'registers': 'Dinov2WithRegisters',
    'dinov3': 'DINOv3ViT',
    'siglip': 'SiglipVision',
    'vit': 'ViT',
}
PIXELS = dict(image_mean=[0.5, 0.4, 0.3], image_std=[0.2, 0.25, 0.3])


def network(kind='dinov2', **changes):
    """A tiny network of one of the families, in eval mode.

    Args:
        kind: A key of ``FAMILIES``; ``'clip'`` for both towers of CLIP; or
            the name of another model of transformers without ``Model``.
        changes: Options of its config.
    """
    import transformers as t

    options = changes
    if kind in FAMILIES or kind == 'clip':
        options = {**SMALL, 'patch_size': 8, 'image_size': 32, **changes}
    with isolated_random_state(3):
        if kind == 'clip':
            text = {**SMALL, 'vocab_size': 20, 'max_position_embeddings': 8}
            config = t.CLIPConfig(text_config=text, vision_config=options)
            model = t.CLIPModel(config)
        else:
            name = FAMILIES.get(kind, kind)
            config = getattr(t, f'{name}Config')(**options)
            model = getattr(t, f'{name}Model')(config)
        for parameter in model.parameters():
            # Stock weights are so small that tokens would be nearly equal.
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def folder(
    path: Path, kind='dinov2', *, pixels=PIXELS, card=None, **changes
) -> str:
    """Save such a network as if downloaded, and return where."""
    network(kind, **changes).save_pretrained(path)
    if pixels is not None:
        settings = {'do_rescale': True, 'rescale_factor': 1 / 255, **pixels}
        text = json.dumps({'do_normalize': True, **settings})
        (path / 'preprocessor_config.json').write_text(text)
    if card is not None:
        (path / 'README.md').write_text(card)
    return str(path)


def without(weight: str, path: Path) -> str:
    """Save a tiny DINOv2 that lacks one of its weights."""
    from safetensors.torch import load_file, save_file

    result, file = folder(path), path / 'model.safetensors'
    kept = {k: v for k, v in load_file(file).items() if k != weight}
    save_file(kept, file, metadata={'format': 'pt'})
    return result
