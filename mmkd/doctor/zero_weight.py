"""One stock config, trained stock and distilled with weight 0, compared."""

import copy
import gc
import itertools
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from mmdet.registry import MODELS
from mmengine.config import Config, ConfigDict
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPERS
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd.data.datasets import leaves
from mmkd.detectors.shrink import (
    RESNETS,
    SCALE,
    small_dataset,
    small_model,
)
from mmkd.detectors.source import class_names, load_config
from mmkd.engine import random_state
from mmkd.engine.runner import DistillationRunner
from mmkd.errors import ConfigError, TapError
from mmkd.utils import find_class, option_names

from .report import some
from .trial import reason

SIZES: tuple[dict[str, Any], ...] = (
    dict(narrow=True, scale=SCALE),
    dict(narrow=True, scale=(320, 320)),
    dict(narrow=False, scale=SCALE),
    dict(narrow=False, scale=(320, 320)),
)
"""These are tried in turn until stock training runs."""
LARGE = 60
"""Millions of weights from which on a student gets no peers, for memory."""
ITERATIONS = 3
BATCH = 2
TRAIN = 'train2017'
"""The folder of the photos in the data set that is drawn."""
FEATURES = ('FeatureHint', 'CWD', 'PKD', 'FGD', 'MGD', 'FBKD', 'TaT')
PREDICTIONS = (
    *('KD', 'DKD', 'DIST', 'LD', 'CrossKD', 'FasterRCNNDistillation'),
    *('LAD', 'SoLAD', 'SoftLabelDistillation'),
)
PEERS = {
    **{'DML': 1, 'OneTeacherSeveralStudents': 1, 'DCM': 1, 'CoLAD': 1},
    'FFSD': 2,
}
"""Methods among peers, and how many peers of the student they get."""
EQUAL = 'equal'
STOCK_FAILS = 'stock training fails'
_numbers = itertools.count()


@dataclass(frozen=True)
class Case:
    """What is trained, and under which conditions."""

    name: str
    """The config within MMDetection's configs."""
    seed: int
    """The seed of the training."""
    methods: tuple[str, ...]
    """The first one that fits is taken."""
    conditions: tuple[str, ...]


# ---------------------------------------------------------------- conditions


def _average(cfg: Config) -> None:
    own = [h for h in cfg.get('custom_hooks') or () if 'EMA' in str(h['type'])]
    if not own:
        hook = dict(type='EMAHook', momentum=0.1, update_buffers=True)
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or ()), hook]


def _accumulate(cfg: Config) -> None:
    cfg.optim_wrapper.accumulative_counts = 2


def _clip(cfg: Config) -> None:
    cfg.optim_wrapper.clip_grad = dict(max_norm=1.0)


def _adam(cfg: Config) -> None:
    cfg.optim_wrapper.optimizer = dict(
        type='AdamW', lr=1e-4, weight_decay=0.05
    )


def _checkpointing(cfg: Config) -> None:
    backbone = cfg.model.get('backbone')
    kind = backbone and find_class(MODELS, backbone.type, 'model.backbone')
    if kind and 'with_cp' in (option_names(kind) or ()):
        backbone.with_cp = True


@OPTIM_WRAPPERS.register_module(name='MMKDHalfOptimWrapper')
class HalfOptimWrapper(OptimWrapper):
    """Mixed precision on the CPU; MMEngine's is for GPUs alone."""

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Compute in bfloat16 where PyTorch does."""
        with super().optim_context(model), torch.autocast('cpu'):
            yield


def _half(cfg: Config) -> None:
    cfg.optim_wrapper.type = 'MMKDHalfOptimWrapper'


def _nothing(cfg: Config) -> None:
    """Is a condition of the distilled run alone."""


CONDITIONS: dict[str, Callable[[Config], None]] = {
    'EMA': _average,
    'accumulation': _accumulate,
    'clipping': _clip,
    'AdamW': _adam,
    'checkpointing': _checkpointing,
    'bf16': _half,
    'by schedule': _nothing,
}
"""Each with what it does to a config. ``by schedule``: the weight is 1, and
``WeightScheduleHook`` makes it 0."""
DISPENSABLE = ('bf16', 'checkpointing')
"""Left out in turn where stock training breaks with them."""


# -------------------------------------------------------------------- config


def stock_config(
    case: Case, root: Path, *, narrow: bool, scale: tuple[int, int]
) -> Config:
    """Return a stock config, narrow, that trains on drawn photos.

    Args:
        case: What is trained.
        root: The data set that :func:`draw_photos` has written.
        narrow: Whether to make layers narrow, where we know how.
        scale: (width, height) of the photos in pixels.
    """
    cfg = load_config(f'mmdet::{case.name}')
    classes = class_names({}, cfg) or ()
    cfg.model = _alone(small_model(cfg.model, narrow=narrow))
    _make_shallow(cfg.model)
    loader = cfg.train_dataloader
    loader.update(batch_size=BATCH, num_workers=0, persistent_workers=False)
    loader.dataset = drawn_dataset(loader.dataset, classes)
    small_dataset(loader.dataset, root, BATCH * ITERATIONS, scale)
    if 'IterBased' in str(cfg.train_cfg.get('type')):
        cfg.train_cfg.max_iters = ITERATIONS
    else:
        cfg.train_cfg.max_epochs = 1
    cfg.optim_wrapper.type = 'OptimWrapper'  # not for GPUs alone
    for option in ('loss_scale', 'dtype'):
        cfg.optim_wrapper.pop(option, None)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.test_dataloader = cfg.test_evaluator = cfg.test_cfg = None
    cfg.default_hooks.checkpoint = None
    cfg.default_hooks.logger.interval = 1
    cfg.load_from, cfg.resume, cfg.log_level = None, False, 'ERROR'
    cfg.randomness = dict(seed=case.seed)
    cfg.visualizer.vis_backends = []
    for name in case.conditions:
        CONDITIONS[name](cfg)
    return cfg


def drawn_dataset(dataset: ConfigDict, classes: tuple[str, ...]) -> ConfigDict:
    """Return a data set's config that reads the drawn photos.

    Its pipeline, its filter and the data sets around it are those of the
    config; of several that are joined, the first stands for all.
    """
    if 'datasets' in dataset:
        return drawn_dataset(dataset.datasets[0], classes)
    if 'dataset' in dataset:
        dataset.dataset = drawn_dataset(dataset.dataset, classes)
        if 'times' in dataset:
            dataset.times = 1
        return dataset
    prefix = dict(img=f'{TRAIN}/')
    if (dataset.get('data_prefix') or {}).get('seg'):
        prefix['seg'] = 'maps/'
    kept = {k: dataset[k] for k in ('pipeline', 'filter_cfg') if k in dataset}
    if dataset.get('proposal_file'):
        kept['proposal_file'] = 'proposals.pkl'
    return ConfigDict(
        type='CocoDataset',
        ann_file=f'annotations/instances_{TRAIN}.json',
        data_prefix=prefix,
        metainfo=dict(classes=classes),
        **kept,
    )


def _alone(cfg: Any) -> Any:
    """Let batch norm see one process: on the CPU it cannot see others."""
    if isinstance(cfg, Mapping):
        made = {k: _alone(v) for k, v in cfg.items()}
        if str(made.get('type')).endswith('SyncBN'):
            made['type'] = 'BN'
        return ConfigDict(made)
    if isinstance(cfg, list | tuple):
        return type(cfg)(_alone(each) for each in cfg)
    return cfg


def _make_shallow(model: ConfigDict) -> None:
    """Repeat blocks less often where a backbone is no narrow ResNet.

    A Swin transformer has heads of 8 channels then, not of 32.
    """
    backbone = model.get('backbone') or ConfigDict()
    if backbone.get('type') == 'SwinTransformer' and 'num_heads' in backbone:
        share = backbone.embed_dims // (8 * backbone.num_heads[0])
        backbone.embed_dims //= share
        for part in ('neck', 'panoptic_head'):
            widths = (model.get(part) or {}).get('in_channels')
            if isinstance(widths, list):
                model[part].in_channels = [w // share for w in widths]
    for option in ('depths', 'num_layers', 'stage_blocks'):
        if isinstance(backbone.get(option), list | tuple):
            backbone[option] = [1] * len(backbone[option])
    if 'stage_channels' in backbone:  # of an hourglass
        backbone.setdefault('feat_channel', backbone.stage_channels[0])
    if backbone.get('depth') in (101, 152):
        backbone.depth = 50
    if 'deepen_factor' in backbone:
        backbone.deepen_factor = 0.1


def distilled(cfg: Config, method: str, case: Case) -> Config:
    """Return the config with a method beside it, at weight 0."""
    cfg = copy.deepcopy(cfg)
    drawn = next(leaves(cfg.train_dataloader.dataset))
    other = dict(
        config=dict(
            model=cfg.model.to_dict(),
            test_dataloader=dict(
                dataset=dict(metainfo=drawn.metainfo.to_dict())
            ),
        )
    )
    options: dict[str, Any] = dict(type=f'mmkd.{method}')
    if 'by schedule' in case.conditions:
        hook = dict(type='mmkd.WeightScheduleHook', stop_at=0)
        cfg.custom_hooks = [*(cfg.get('custom_hooks') or ()), hook]
    else:
        options['loss_weight'] = 0.0
    if method == 'OneTeacherSeveralStudents':
        options['alpha'] = 0.0  # the weight of a teacher
    cfg.runner_type = 'mmkd.DistillationRunner'
    cfg.distillation = dict(methods=dict(zero=options))
    if method in PEERS:
        peers = (f'peer{number}' for number in range(PEERS[method]))
        cfg.distillation.peers = {p: copy.deepcopy(other) for p in peers}
    else:
        cfg.distillation.teacher = dict(other, checkpoint=None)
    return cfg


# ------------------------------------------------------------------ training


class _Losses(Hook):
    """The losses of each iteration."""

    def __init__(self) -> None:
        self.found: list[dict[str, float]] = []

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Any = None,
    ) -> None:
        self.found.append({k: v.item() for k, v in outputs.items()})


@dataclass
class Outcome:
    """What a training has computed and left."""

    losses: list[dict[str, float]]
    tensors: dict[str, Tensor]
    """Weights, buffers, averages (EMA) and the optimiser's, by name."""
    numbers: dict[str, Any]
    """The optimiser's settings and numbers, and the random states."""


def trained(cfg: Config) -> Outcome:
    """Train from a config, and return what came of it."""
    gc.collect()  # networks of the training before, which refer to themselves
    cfg = copy.deepcopy(cfg)
    cfg.experiment_name = f'self-test-{os.getpid()}-{next(_numbers)}'
    cfg.visualizer.name = cfg.experiment_name
    kind = DistillationRunner if 'distillation' in cfg else Runner
    losses = _Losses()
    with tempfile.TemporaryDirectory() as folder:
        cfg.work_dir = folder
        runner = kind.from_cfg(cfg)
        runner.register_hook(losses, 'VERY_HIGH')
        runner.train()
    if kind is DistillationRunner and runner.distiller is None:
        raise RuntimeError('nothing was attached to the student')
    return Outcome(losses.found, *_left(runner))


def _left(runner: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors = {f'weight {k}': v for k, v in runner.model.state_dict().items()}
    for hook in runner.hooks:
        average = getattr(hook, 'ema_model', None)
        if average is not None:
            found = average.state_dict().items()
            tensors |= {f'average {k}': v for k, v in found}
    numbers: dict[str, Any] = {}
    optimizer = runner.optim_wrapper.optimizer
    names = {id(p): n for n, p in runner.model.named_parameters()}
    for group in optimizer.param_groups:
        for parameter in group['params']:
            name = names.get(id(parameter))
            if name is None:  # of an adapter or a peer
                continue
            settings = {k: v for k, v in group.items() if k != 'params'}
            numbers[f'settings of {name}'] = settings
            for key, value in optimizer.state.get(parameter, {}).items():
                key = f'optimiser {key} of {name}'
                if isinstance(value, Tensor):
                    tensors[key] = value
                else:
                    numbers[key] = value
    for name, state in random_state.capture().items():
        numbers[f'random state of {name}'] = state
    return tensors, numbers


def difference(stock: Outcome, found: Outcome) -> str:
    """Return where a distilled training differs first; '' if nowhere.

    Losses that only it has, those of peers, are left out, and so is then the
    sum of all.
    """
    if len(stock.losses) != len(found.losses):
        return f'{len(stock.losses)} and {len(found.losses)} iterations'
    for number, (ours, theirs) in enumerate(
        zip(stock.losses, found.losses, strict=True), 1
    ):
        more = any('loss' in k for k in theirs.keys() - ours.keys())
        for name in ours:
            if name == 'loss' and more:
                continue
            if repr(ours[name]) != repr(theirs.get(name)):
                return (
                    f'{name} of iteration {number}: {ours[name]!r} and '
                    f'{theirs.get(name)!r}'
                )
    for name in sorted(stock.tensors.keys() ^ found.tensors.keys()):
        return f'{name}: in one alone'
    apart = [n for n in stock.tensors if not _same(stock, found, n)]
    if apart:
        return f'{len(apart)} of {len(stock.tensors)} tensors: {apart[0]}'
    for name in sorted(stock.numbers.keys() | found.numbers.keys()):
        if stock.numbers.get(name) != found.numbers.get(name):
            return name
    return ''


def _same(stock: Outcome, found: Outcome, name: str) -> bool:
    """Compare bits, of which NaN has some, too."""
    a, b = stock.tensors[name], found.tensors[name]
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a, b = (t.detach().cpu().contiguous().reshape(-1) for t in (a, b))
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---------------------------------------------------------------------- case


def examine(case: Case, root: Path) -> dict[str, Any]:
    """Train a case stock and at weight 0, and say whether they are equal.

    Returns:
        A dict with ``verdict`` (:data:`EQUAL`, or what is wrong, with
        :data:`STOCK_FAILS` in front where that is nothing of mmkd's), and
        facts for the table.
    """
    logging.disable(logging.WARNING)
    start = time.monotonic()
    facts: dict[str, Any] = dict(
        **{'name': case.name, 'method': '', 'without': [], 'millions': 0.0},
        conditions=list(case.conditions),
    )
    try:
        borne, cfg, stock, left_out = _stock_that_runs(case, root)
    except Exception as error:
        facts['verdict'] = f'{STOCK_FAILS}: {reason(error)}'
    else:
        weights = (v for k, v in stock.tensors.items() if k[:6] == 'weight')
        facts['millions'] = sum(map(torch.numel, weights)) / 1e6
        facts['without'] = left_out
        facts['conditions'] = list(borne.conditions)
        try:
            facts['verdict'] = _compared(case, cfg, stock, facts)
        except Exception as error:
            facts['verdict'] = f'weight 0 fails: {reason(error)}'
    facts['seconds'] = time.monotonic() - start
    facts['cpu_seconds'] = time.process_time()  # of this process alone
    return facts


def _stock_that_runs(
    case: Case, root: Path
) -> tuple[Case, Config, Outcome, list[str]]:
    """Train stock, in the first size and with the conditions that it bears.

    Returns:
        The case with these conditions, its config, what stock training made
        of it, and the conditions that it does not bear.
    """
    model = load_config(f'mmdet::{case.name}').model
    conditions = case.conditions
    if (model.get('backbone') or {}).get('type') not in RESNETS:
        # CPUs mostly emulate it: only narrow networks are quick enough.
        conditions = tuple(c for c in conditions if c != 'bf16')
    drawn = [c for c in DISPENSABLE if c in conditions]
    fewer = [drawn[:n] for n in range(len(drawn) + 1)]
    last: Exception | None = None  # the nearest to stock
    for size, without in itertools.product(SIZES, fewer):
        kept = tuple(c for c in conditions if c not in without)
        bearable = Case(case.name, case.seed, case.methods, kept)
        try:
            cfg = stock_config(bearable, root, **size)
            stock = trained(cfg)
            _check_finite(stock.losses)
            return bearable, cfg, stock, without
        except Exception as error:
            last = error
    assert last is not None
    raise last


def _check_finite(losses: Sequence[dict[str, float]]) -> None:
    """Deep networks without their trained weights may overflow."""
    bad = {k for each in losses for k, v in each.items() if not isfinite(v)}
    if bad:
        raise RuntimeError(f'{some(sorted(bad))}: NaN or infinite')


def suited_methods(model: ConfigDict, *, peers: bool) -> set[str]:
    """Return the methods that may fit, by the parts of a detector.

    A refusal takes as long as building the networks.
    """
    suited = {*FEATURES}
    head = str((model.get('bbox_head') or {}).get('type', ''))
    if 'roi_head' in model:
        suited |= {'KD', 'DKD', 'DIST', 'FasterRCNNDistillation'}
        suited |= {'DML', 'OneTeacherSeveralStudents'}
    elif head and 'decoder' not in model and not re.match('C(orn|ent)', head):
        suited |= {*PREDICTIONS, *PEERS}
    return suited if peers else suited - {*PEERS}


def _compared(
    case: Case, cfg: Config, stock: Outcome, facts: dict[str, Any]
) -> str:
    if len(stock.losses) < 2:
        return f'only {len(stock.losses)} iterations of stock training'
    suited = suited_methods(cfg.model, peers=facts['millions'] <= LARGE)
    methods = [m for m in case.methods if m in suited]
    for number, method in enumerate(methods, 1):
        try:
            found = trained(distilled(cfg, method, case))
        except (ConfigError, TapError):  # it does not fit
            if number == len(methods):
                raise
            continue
        facts['method'] = method
        where = difference(stock, found)
        if not where:
            return EQUAL
        again = difference(stock, trained(cfg))
        noise = f' (stock training itself differs: {again})' if again else ''
        return f'differs in {where}{noise}'
    return 'nothing was compared: no method fits'
