"""Stock one-stage detectors with dynamic assignment, shrunk."""

import torch

from tests.helpers import tiny_detectors as tiny

NECK = dict(in_channels=[8, 16, 32, 64], out_channels=16)
HEAD = dict(num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1)
LAST = (
    *('atss_cls', 'atss_reg', 'atss_iou', 'tood_cls', 'tood_reg'),
    *('rtm_cls', 'rtm_reg', 'multi_level_conv_cls', 'multi_level_conv_reg'),
    *('multi_level_conv_obj', 'atss_centerness'),
)
"""The predicting layers of these heads."""


def paa(**changes):
    return tiny.merged(
        tiny.stock('paa/paa_r50_fpn_1x_coco.py'),
        backbone=tiny.BACKBONE,
        neck=NECK,
        bbox_head={**HEAD, 'feat_channels': 32},
        **changes,
    )


def atss(**changes):
    return tiny.merged(
        tiny.stock('atss/atss_r50_fpn_1x_coco.py'),
        backbone=tiny.BACKBONE,
        neck=NECK,
        bbox_head={**HEAD, 'feat_channels': 32},
        **changes,
    )


def ddod(**changes):
    return tiny.merged(
        tiny.stock('ddod/ddod_r50_fpn_1x_coco.py'),
        backbone=tiny.BACKBONE,
        neck=NECK,
        # Deformable kernels are larger than the smallest maps.
        bbox_head={**HEAD, 'feat_channels': 32, 'use_dcn': False},
        **changes,
    )


def tood(**changes):
    return tiny.merged(
        tiny.stock('tood/tood_r50_fpn_1x_coco.py'),
        backbone=tiny.BACKBONE,
        neck=NECK,
        bbox_head={**HEAD, 'stacked_convs': 2, 'feat_channels': 32},
        **changes,
    )


def rtmdet(name='rtmdet/rtmdet_tiny_8xb32-300e_coco.py', **changes):
    return tiny.merged(
        tiny.stock(name),
        backbone=dict(deepen_factor=0.1, widen_factor=0.125, init_cfg=None),
        neck=dict(
            in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1
        ),
        bbox_head=HEAD,
        data_preprocessor__batch_augments=None,
        **changes,
    )


def rtmdet_ins(**changes):
    """Its loss turns the masks of the data samples into tensors."""
    return rtmdet('rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py', **changes)


def yolox(**changes):
    return tiny.merged(
        tiny.stock('yolox/yolox_tiny_8xb8-300e_coco.py'),
        backbone=dict(deepen_factor=0.1, widen_factor=0.125),
        neck=dict(
            in_channels=[32, 64, 128], out_channels=16, num_csp_blocks=1
        ),
        bbox_head=dict(num_classes=3, in_channels=16, feat_channels=16),
        data_preprocessor__batch_augments=None,
        **changes,
    )


DYNAMIC = dict(tood=tood, rtmdet=rtmdet, yolox=yolox, ddod=ddod)
"""All but PAA, which has no assigner that reads predictions."""


def build(config, seed=0, std=0.05):
    """A detector whose predictions differ from place to place."""
    model = tiny.build(config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith('weight') and any(part in name for part in LAST):
            with torch.no_grad():
                parameter.normal_(0, std, generator=generator)
    return model
