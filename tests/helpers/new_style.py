"""A config in MMEngine's newer style: pure Python, whose types are classes."""

from pathlib import Path

from tests.helpers import made_data

BASE = """
from mmcv.transforms import LoadImageFromFile
from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import (
    LoadAnnotations, PackDetInputs, RandomFlip, Resize)
from mmdet.engine.hooks import DetVisualizationHook
from mmdet.evaluation import CocoMetric
from mmdet.models import (
    FPN, DetDataPreprocessor, FocalLoss, L1Loss, ResNet, RetinaHead,
    RetinaNet)
from mmdet.models.task_modules import (
    AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler)
from mmdet.visualization import DetLocalVisualizer
from mmengine.dataset import DefaultSampler
from mmengine.hooks import (
    CheckpointHook, DistSamplerSeedHook, IterTimerHook, LoggerHook,
    ParamSchedulerHook)
from mmengine.optim import OptimWrapper
from mmengine.runner import (
    EpochBasedTrainLoop, LogProcessor, TestLoop, ValLoop)
from mmengine.visualization import LocalVisBackend
from torch.optim import SGD

root = {root!r}
model = dict(
    type=RetinaNet,
    data_preprocessor=dict(
        type=DetDataPreprocessor, mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375], bgr_to_rgb=True, pad_size_divisor=32),
    backbone=dict(
        type=ResNet, depth=18, base_channels=8,
        norm_cfg=dict(type='BN', requires_grad=True)),
    neck=dict(
        type=FPN, in_channels=[8, 16, 32, 64], out_channels=16,
        start_level=1, add_extra_convs='on_input', num_outs=5),
    bbox_head=dict(
        type=RetinaHead, num_classes=80, in_channels=16, stacked_convs=1,
        feat_channels=16,
        anchor_generator=dict(
            type=AnchorGenerator, octave_base_scale=4, scales_per_octave=3,
            ratios=[0.5, 1.0, 2.0], strides=[8, 16, 32, 64, 128]),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss, use_sigmoid=True),
        loss_bbox=dict(type=L1Loss)),
    train_cfg=dict(
        assigner=dict(
            type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4,
            min_pos_iou=0, ignore_iof_thr=-1),
        sampler=dict(type=PseudoSampler), allowed_border=-1, pos_weight=-1,
        debug=False),
    test_cfg=dict(
        nms_pre=100, min_bbox_size=0, score_thr=0.0,
        nms=dict(type='nms', iou_threshold=0.5), max_per_img=20))
train_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(type=Resize, scale=(128, 96), keep_ratio=True),
    dict(type=RandomFlip, prob=0.5),
    dict(type=PackDetInputs)]
test_pipeline = [
    dict(type=LoadImageFromFile),
    dict(type=Resize, scale=(128, 96), keep_ratio=True),
    dict(type=LoadAnnotations, with_bbox=True),
    dict(
        type=PackDetInputs,
        meta_keys=(
            'img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor'))]
train_dataloader = dict(
    batch_size=2, num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=True),
    dataset=dict(
        type=CocoDataset, data_root=root,
        ann_file='annotations/instances_train2017.json',
        data_prefix=dict(img='train2017/'), indices=4,
        pipeline=train_pipeline))
val_dataloader = dict(
    batch_size=1, num_workers=0,
    sampler=dict(type=DefaultSampler, shuffle=False),
    dataset=dict(
        type=CocoDataset, data_root=root,
        ann_file='annotations/instances_val2017.json',
        data_prefix=dict(img='val2017/'), indices=2, test_mode=True,
        pipeline=test_pipeline))
test_dataloader = val_dataloader
val_evaluator = dict(
    type=CocoMetric, ann_file=root + 'annotations/instances_val2017.json',
    metric='bbox')
test_evaluator = val_evaluator
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=2, val_interval=2)
val_cfg = dict(type=ValLoop)
test_cfg = dict(type=TestLoop)
optim_wrapper = dict(
    type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01, momentum=0.9))
default_scope = None
default_hooks = dict(
    timer=dict(type=IterTimerHook),
    logger=dict(type=LoggerHook, interval=1),
    param_scheduler=dict(type=ParamSchedulerHook),
    checkpoint=dict(type=CheckpointHook, interval=1),
    sampler_seed=dict(type=DistSamplerSeedHook),
    visualization=dict(type=DetVisualizationHook))
env_cfg = dict(dist_cfg=dict(backend='nccl'))
vis_backends = [dict(type=LocalVisBackend)]
visualizer = dict(
    type=DetLocalVisualizer, vis_backends=vis_backends, name='visualizer')
log_processor = dict(type=LogProcessor, window_size=50, by_epoch=True)
log_level = 'INFO'
"""
DISTILLED = """
from mmengine.config import read_base

with read_base():
    from .new_style_base import *

from mmkd.engine.hooks import TelemetryHook, WeightScheduleHook
from mmkd.engine.runner import DistillationRunner
from mmkd.methods import KD, FeatureHint

runner_type = DistillationRunner
distillation = dict(
    teacher=dict(
        config=dict(model=model, test_dataloader=test_dataloader),
        checkpoint=None),
    methods=dict(hint=dict(type=FeatureHint), kd=dict(type=KD)))
custom_hooks = [
    dict(type=WeightScheduleHook, warmup=2, stop_at=3),
    dict(type=TelemetryHook, interval=1)]
default_hooks.checkpoint.update(max_keep_ckpts=1)
"""


def write(folder: Path) -> Path:
    """Write the config and its base; return the path of the config."""
    root = f'{made_data.root()}/coco_tiny/'
    base, distilled = (folder / f'{n}.py' for n in ('new_style_base', 'new'))
    base.write_text(BASE.replace('{root!r}', repr(root)))
    distilled.write_text(DISTILLED)
    return distilled
