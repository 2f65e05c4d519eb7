"""Detectors with random weights that find something, and not everywhere."""

import numpy as np
import torch
from torch import nn

from mmkd.data.drawn import draw
from mmkd.export.canvas import Canvas
from mmkd.export.check import detect


def photos(number=2, seed=0):
    random = np.random.default_rng(seed)
    return [draw(key, random)[0] for key in range(number)]


def lively(model, shape, bias=-4.0):
    """Scale each layer so that what it gives has a deviation of 1.

    Scores then differ from place to place and from image to image, and boxes
    are of all sizes. Returns the detector, in eval mode.

    Args:
        model: A detector with the weights that it begins with.
        shape: (H, W) of the images.
        bias: The bias of the layers that classify.
    """

    def rescale(layer, inputs, output):
        if layer in done:
            return None
        done.add(layer)
        bias = 0 if layer.bias is None else layer.bias
        if isinstance(layer, nn.Conv2d) and layer.bias is not None:
            bias = bias.view(-1, 1, 1)
        deviation = (output - bias).std()
        if deviation > 0:
            layer.weight.data /= deviation
        return layer.forward(*inputs)

    done = set()
    layers = [
        m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)
    ]
    for layer in layers:
        if layer.bias is not None and layer.bias.mean() < -2:
            nn.init.constant_(layer.bias, bias)
    handles = [layer.register_forward_hook(rescale) for layer in layers]
    canvas = Canvas(*shape)
    with torch.no_grad():
        detect(model.eval(), *canvas.fit(photos(1)[0]), canvas)
    for handle in handles:
        handle.remove()
    return model
