"""Label assignment: the batched mixtures, and LAD."""

import argparse
import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.detectors.assignment import assigned_by, own_costs, positive_samples
from mmkd.detectors.facts import read_facts
from mmkd.detectors.source import find_in_model_index, load_config

from .common import OBJECTS, Benchmark, Times, Trainer, altered, table
from .paa_reference import reference

NUMBER, CANDIDATES = 112, (10, 45)
"""Of the objects of a batch, and of the candidates of an object."""
DTYPES = {'float64': np.float64, 'float32': np.float32}


OPTIONS: dict[str, dict[str, Any]] = {
    **OBJECTS,
    '--config': dict(default='mmkd::lad_r50.py', help='a config of LAD'),
    '--costs': dict(
        type=Path, help='a PAA checkpoint of BCCD, for real costs'
    ),
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure label assignment: the fit of mixtures, and iterations of LAD.

    The batched fit is compared with scikit-learn's, in time and in which
    candidates become positive; LAD with MMDetection's own detector.
    """
    samples = {'random costs': random_costs(20)}
    if args.costs:
        samples['real costs'] = real_costs(args.costs)
    return {
        'fit': fit_times(samples['random costs'][0], args),
        'partitions': {name: compare(rows) for name, rows in samples.items()},
        'lad': against_mmdet(args),
    }


def tables(result: Mapping[str, Any]) -> str:
    fit: Times = result['fit']
    factor = 'scikit-learn / batched', fit.ratios('sklearn', 'batched')
    header = ['partitions', 'objects', 'as float64', 'as float32']
    header += ['refused by float64', 'refused by float32', 'without positive']
    partitions = [
        [
            name,
            found['objects'],
            *(f'{found[dtype]:.2%}' for dtype in DTYPES),
            *found['refused'].values(),
            found['none'],
        ]
        for name, found in result['partitions'].items()
    ]
    seconds = ['', 'median s']
    return '\n\n'.join(
        [
            f'{NUMBER} objects of {CANDIDATES[0]} to {CANDIDATES[1]} '
            'candidates',
            table(seconds, [*fit.items(), factor]),
            table(header, partitions),
            table(seconds, [*result['lad'].items()]),
        ]
    )


# ------------------------------------------------------------------- the fit


def random_costs(batches: int) -> list[tuple[Tensor, Tensor]]:
    """Make batches of sorted costs with one or two bumps, and their masks."""
    chance = np.random.default_rng(0)
    made = []
    for _ in range(batches):
        rows = []
        for number in range(NUMBER):
            n = chance.integers(CANDIDATES[0], CANDIDATES[1] + 1)
            row = chance.gamma(2, 1, n) + 0.5
            if number % 2:
                row[: n // 3] = chance.normal(1.5, 0.3, n // 3).clip(0.1)
            rows.append(torch.from_numpy(np.sort(row)).float())
        costs = nn.utils.rnn.pad_sequence(rows, True, torch.inf)
        made.append((costs, costs.isfinite()))
    return made


def real_costs(checkpoint: Path) -> list[tuple[Tensor, Tensor]]:
    """Return what a trained PAA makes of BCCD's training images."""
    register_all_modules()
    cfg = load_config('mmkd::bccd/paa_big.py')
    model = MODELS.build({'_scope_': 'mmdet', **cfg.model})
    weights = load_checkpoint_file(str(checkpoint))
    model.load_state_dict(weights['state_dict'])
    model.eval()
    loader = Runner.build_dataloader(copy.deepcopy(cfg.train_dataloader))
    head, made = head_of(model), []
    own = own_costs(head)

    def costs(candidates: Any, logits: Tensor, deltas: Tensor) -> Tensor:
        values = own(candidates, logits, deltas)
        cheapest, _ = candidates._cheapest(values, head.topk)
        cheapest = cheapest.sort(dim=1).values
        made.append((cheapest, cheapest.isfinite()))
        return values

    with torch.no_grad(), assigned_by(head, costs):
        for batch in loader:
            data = model.data_preprocessor(batch, True)
            model.loss(data['inputs'], data['data_samples'])
    return made


def compare(batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Count the objects that are parted as scikit-learn parts them.

    An object that it refuses in a precision does not count in the share of
    that precision.
    """
    total = empty = 0
    same, refused = dict.fromkeys(DTYPES, 0), dict.fromkeys(DTYPES, 0)
    for costs, mask in batches:
        positive = positive_samples(costs, mask)
        for row, inside, ours in zip(costs, mask, positive, strict=True):
            if inside.sum() < 2:
                continue
            total += 1
            empty += int(not ours.any())
            for name, dtype in DTYPES.items():
                try:
                    theirs, _ = reference(row[inside], dtype)
                except ValueError:
                    refused[name] += 1
                    continue
                same[name] += np.array_equal(theirs, ours[inside].numpy())
    shares = {n: same[n] / max(total - refused[n], 1) for n in DTYPES}
    return {'objects': total, **shares, 'refused': refused, 'none': empty}


def fit_times(batch: tuple[Tensor, Tensor], args: argparse.Namespace) -> Times:
    """Time the assignment of all objects of a batch."""
    costs, mask = batch
    rows = [row[inside] for row, inside in zip(costs, mask, strict=True)]
    return Times.interleaved(
        {
            'batched': lambda: positive_samples(costs, mask),
            'sklearn': lambda: [reference(row) for row in rows],
        },
        altered(args, device='cpu'),
    )


# ------------------------------------------------------------ whole iterations


def against_mmdet(args: argparse.Namespace) -> Times:
    """Time an iteration of LAD, MMDetection's, plain PAA and the teacher."""
    trainer = Trainer.of(args)
    trainer.see_teacher()
    distiller = trainer.distiller
    assert distiller
    rival = Trainer(mmdet_lad(args, distiller).to(args.device), trainer.images)
    head = head_of(distiller.student)

    def plain() -> None:
        with assigned_by(head, own_costs(head)):
            trainer.plain()

    times = Times.interleaved(
        {
            'plain PAA, batched assignment': plain,
            'teacher forward, no_grad': trainer.teacher,
            'LAD': trainer.distilled,
            "MMDetection's LAD": rival.step,
        },
        args,
    )
    parts = [*times][:2]
    times["LAD / MMDetection's"] = times.ratios('LAD', "MMDetection's LAD")
    times['LAD / (plain + teacher)'] = times.ratios('LAD', *parts)
    return times


def mmdet_lad(args: argparse.Namespace, distiller: Any) -> nn.Module:
    """Build MMDetection's LAD detector of the same two networks."""
    config = load_config(args.config)
    description = dict(config.distillation.teacher)
    if 'name' in description:
        description = find_in_model_index(description['name'])
    parts: dict[str, Any] = {}
    for prefix, cfg in (
        ('', config.model),
        ('teacher_', load_config(description['config']).model),
    ):
        for part in ('backbone', 'neck', 'bbox_head'):
            parts[prefix + part] = copy.deepcopy(cfg[part])
        parts[f'{prefix}backbone'].init_cfg = None
        parts[f'{prefix}bbox_head'].type = 'LADHead'
    for part in ('train_cfg', 'test_cfg', 'data_preprocessor'):
        parts[part] = copy.deepcopy(config.model[part])
    model = MODELS.build(dict(type='mmdet.LAD', **parts))
    model.load_state_dict(distiller.student.state_dict(), strict=False)
    teacher = distiller.teacher.model
    model.teacher_model.load_state_dict(teacher.state_dict(), strict=False)
    model.train()
    return model


def head_of(model: Any) -> Any:
    """Return the dense head, whose assignment is measured."""
    facts = read_facts(model).dense
    assert facts is not None
    return facts.head


ASSIGN = Benchmark('assign', OPTIONS, measure, tables)
