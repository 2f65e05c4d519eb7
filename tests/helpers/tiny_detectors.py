"""Real detectors of MMDetection's stock configs, shrunk, and real batches."""

import copy
import functools
import logging
from pathlib import Path

import mmdet
import numpy as np
import torch
from mmdet.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS
from torch.nn import BatchNorm2d

from mmkd.detectors.shrink import noise_batch as raw_batch
from mmkd.teachers.frozen import FrozenDetector

CLASSES = ('cat', 'dog', 'cow')
BACKBONE = dict(
    depth=18,
    base_channels=8,
    frozen_stages=-1,
    norm_eval=False,
    init_cfg=None,
)
RPN = dict(in_channels=16, feat_channels=16)
BOX_HEAD = dict(in_channels=16, fc_out_channels=24, num_classes=3)


@functools.cache
def _stock(name):
    register_all_modules(init_default_scope=False)
    configs = Path(mmdet.__file__).parent / '.mim' / 'configs'
    return Config.fromfile(configs / name).model


def stock(name):
    """The model of one of MMDetection's configs."""
    return copy.deepcopy(_stock(name))


def merged(model, **changes):
    """A config with changes; ``a__b=1`` stands for ``a.b``."""
    config = Config(dict(model=copy.deepcopy(model)))
    config.merge_from_dict(
        {f'model.{k.replace("__", ".")}': v for k, v in changes.items()}
    )
    return config.model


def _few_boxes(model):
    """Sample few anchors and RoIs: most of a tiny step's time is theirs."""
    train = model.train_cfg
    train.rpn.sampler.num = 48
    train.rpn_proposal.update(nms_pre=100, max_per_img=40)
    rcnn = train.rcnn if isinstance(train.rcnn, list) else [train.rcnn]
    for stage in rcnn:
        stage.sampler.num = 24
    model.test_cfg.rpn.update(nms_pre=50, max_per_img=20)
    return model


def faster_rcnn(name='faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', **changes):
    """Config of Faster R-CNN with FPN (or of one built like it)."""
    model = _few_boxes(stock(name))
    model = merged(
        model,
        backbone=BACKBONE,
        neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
        rpn_head=RPN,
        roi_head__bbox_roi_extractor__out_channels=16,
        roi_head__bbox_roi_extractor__roi_layer__sampling_ratio=1,
    )
    heads = model.roi_head.bbox_head
    for head in heads if isinstance(heads, list) else [heads]:
        head.update(BOX_HEAD)
    if model.roi_head.get('mask_head'):
        model.roi_head.mask_roi_extractor.out_channels = 16
        model.roi_head.mask_head.update(
            num_convs=1, in_channels=16, conv_out_channels=8, num_classes=3
        )
    return merged(model, **changes)


def mask_rcnn(**changes):
    return faster_rcnn('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', **changes)


def cascade_rcnn(**changes):
    return faster_rcnn(
        'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', **changes
    )


def double_head(**changes):
    model = faster_rcnn('double_heads/dh-faster-rcnn_r50_fpn_1x_coco.py')
    return merged(
        model,
        roi_head__bbox_head__num_convs=1,
        roi_head__bbox_head__conv_out_channels=16,
        **changes,
    )


def sabl_head():
    """A RoI box head whose targets are no deltas."""
    name = 'sabl/sabl-faster-rcnn_r50_fpn_1x_coco.py'
    return dict(
        stock(name).roi_head.bbox_head,
        cls_in_channels=16,
        reg_in_channels=16,
        cls_out_channels=16,
        num_classes=3,
    )


def c4(**changes):
    """Config of Faster R-CNN without FPN, with a shared RoI layer.

    The width of its shared layer is fixed in MMDetection.
    """
    model = _few_boxes(
        stock('faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py')
    )
    model = merged(
        model,
        backbone=dict(BACKBONE, base_channels=64),
        rpn_head=dict(in_channels=256, feat_channels=16),
        roi_head__shared_head=dict(depth=18, init_cfg=None),
        roi_head__bbox_roi_extractor__out_channels=256,
        roi_head__bbox_roi_extractor__roi_layer=dict(
            output_size=4, sampling_ratio=1
        ),
        roi_head__bbox_head=dict(
            in_channels=512, roi_feat_size=2, num_classes=3
        ),
    )
    return merged(model, **changes)


def retinanet(**changes):
    """Config of a one-stage detector with anchors."""
    return merged(
        stock('retinanet/retinanet_r50_fpn_1x_coco.py'),
        backbone=BACKBONE,
        neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
        bbox_head=dict(
            num_classes=3, in_channels=16, feat_channels=8, stacked_convs=1
        ),
        **changes,
    )


def fcos(**changes):
    """Config of a one-stage detector without anchors."""
    return merged(
        stock('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'),
        backbone=BACKBONE,
        neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
        bbox_head=dict(
            num_classes=3,
            in_channels=16,
            feat_channels=32,
            stacked_convs=1,
        ),
        **changes,
    )


def gfl(**changes):
    """Config of a one-stage detector that predicts distributions of boxes."""
    return merged(
        stock('gfl/gfl_r50_fpn_1x_coco.py'),
        backbone=BACKBONE,
        neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
        bbox_head=dict(
            num_classes=3,
            in_channels=16,
            feat_channels=32,
            stacked_convs=2,
        ),
        **changes,
    )


def detr(**changes):
    """Config of a transformer detector."""
    model = stock('detr/detr_r50_8xb2-150e_coco.py')
    for part in ('encoder', 'decoder'):
        layer = model[part].layer_cfg
        layer.self_attn_cfg.update(embed_dims=16, num_heads=2)
        layer.ffn_cfg.update(embed_dims=16, feedforward_channels=16)
        model[part].num_layers = 1
    model.decoder.layer_cfg.cross_attn_cfg.update(embed_dims=16, num_heads=2)
    return merged(
        model,
        num_queries=5,
        backbone=BACKBONE,
        neck=dict(in_channels=[64], out_channels=16),
        positional_encoding=dict(num_feats=8),
        bbox_head=dict(num_classes=3, embed_dims=16),
        **changes,
    )


def build(config, seed=0, spread=1.0):
    """A detector with random weights in training mode.

    Args:
        config: The model's config.
        seed: Seeds the weights.
        spread: Multiplies the weights of the predicting layers; with the
            stock initialisation all scores are nearly equal, which would
            hide which box, level or class they belong to.
    """
    register_all_modules(init_default_scope=False)
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    # MMDetection writes into the configs that it builds.
    model = MODELS.build({'_scope_': 'mmdet', **copy.deepcopy(config)})
    logging.disable(logging.INFO)  # a line per parameter
    model.init_weights()
    logging.disable(logging.NOTSET)
    for name, parameter in model.named_parameters():
        part = f'.{name}'.split('.')[-2]
        if part in ('rpn_cls', 'rpn_reg', 'fc_cls', 'fc_reg'):
            torch.nn.init.normal_(parameter, std=0.1 * spread)
    torch.set_rng_state(state)
    return model.train()


def spread(model, seed):
    """Let a dense head's predictions differ from place to place."""
    generator = torch.Generator().manual_seed(seed)
    head = getattr(model, 'bbox_head', None)
    for module in head.children() if head is not None else ():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.3, generator=generator)
    return model


def wrap(model, paths=()):
    """The detector as the teacher of itself."""
    return FrozenDetector(
        model,
        CLASSES,
        student=model,
        student_classes=CLASSES,
        paths=paths,
    )


def in_eval(model, **options):
    """The detector as if trained: with the running statistics of a batch."""
    norms = [m for m in model.modules() if isinstance(m, BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        seeded_loss(model.train(), *batch_for(model, **options))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return model.eval()


def batch_for(model, **options):
    """A batch behind the model's own data preprocessor."""
    data = model.data_preprocessor(raw_batch(**options), training=True)
    return data['inputs'], data['data_samples']


def seeded_loss(model, inputs, data_samples, seed=0):
    """The stock losses, drawn with a seed; samples are left as they were."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    return model.loss(inputs, copy.deepcopy(data_samples))
