"""Label assignment: the batched mixtures, and LAD."""

import argparse
import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.registry import MODELS
from mmdet.utils import register_all_modules
from mmengine.runner import Runner
from torch import Tensor, nn

from mmkd.detectors.assignment import assigned_by, own_costs, positive_samples
from mmkd.detectors.facts import read_facts
from mmkd.detectors.source import find_in_model_index, load_config

from .common import Trainer, build, interleaved, spread
from .paa_reference import reference

OBJECTS, CANDIDATES = 112, (10, 45)
DTYPES = {'float64': np.float64, 'float32': np.float32}


def assign(
    args: argparse.Namespace, device: str
) -> tuple[dict[str, Any], str]:
    """The fit against scikit-learn; an iteration against MMDetection's LAD."""
    samples = {'random costs': random_costs(20)}
    if args.costs:
        samples['real costs'] = real_costs(args.costs)
    fits = {name: compare(rows) for name, rows in samples.items()}
    lines = [
        f'{OBJECTS} objects of {CANDIDATES[0]} to {CANDIDATES[1]} candidates',
        '',
        '| | median s | range |',
        '|---|---|---|',
    ]
    times = fit_times(samples['random costs'][0], args)
    factors = [
        s / b for b, s in zip(times['batched'], times['sklearn'], strict=True)
    ]
    lines += [
        f'| {name} | {spread(values)} |' for name, values in times.items()
    ]
    lines += [
        f'| scikit-learn / batched | {spread(factors)} |',
        '',
        '| partitions | objects | as float64 | as float32 | refused by '
        'float64 | refused by float32 | without positive |',
        '|---|---|---|---|---|---|---|',
    ]
    lines += [
        f'| {name} | {f["objects"]} | {f["float64"]:.2%} | {f["float32"]:.2%} '
        f'| {f["refused"]["float64"]} | {f["refused"]["float32"]} '
        f'| {f["none"]} |'
        for name, f in fits.items()
    ]
    lad = against_mmdet(args, device)
    lines += ['', '| | median s | range |', '|---|---|---|']
    lines += [f'| {name} | {spread(values)} |' for name, values in lad.items()]
    return {'fit': times, 'partitions': fits, 'lad': lad}, '\n'.join(lines)


# ------------------------------------------------------------------- the fit


def random_costs(batches: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of sorted costs with one or two bumps, and their masks."""
    chance = np.random.default_rng(0)
    made = []
    for _ in range(batches):
        rows = []
        for number in range(OBJECTS):
            n = chance.integers(CANDIDATES[0], CANDIDATES[1] + 1)
            row = chance.gamma(2, 1, n) + 0.5
            if number % 2:
                row[: n // 3] = chance.normal(1.5, 0.3, n // 3).clip(0.1)
            rows.append(np.sort(row))
        made.append(padded(rows))
    return made


def padded(rows: Sequence[Any]) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    costs = torch.full((len(rows), width), torch.inf)
    for row, values in zip(costs, rows, strict=True):
        row[: len(values)] = torch.as_tensor(values)
    return costs, costs.isfinite()


def real_costs(checkpoint: Path) -> list[tuple[Tensor, Tensor]]:
    """What a trained PAA makes of BCCD's training images."""
    register_all_modules()
    cfg = load_config('mmkd::bccd/paa_big.py')
    model = MODELS.build({'_scope_': 'mmdet', **cfg.model})
    weights = torch.load(checkpoint, map_location='cpu', weights_only=False)
    model.load_state_dict(weights['state_dict'])
    model.eval()
    loader = Runner.build_dataloader(copy.deepcopy(cfg.train_dataloader))
    head, made = _head_of(model), []
    own = own_costs(head)

    def costs(candidates: Any, logits: Tensor, deltas: Tensor) -> Tensor:
        values = own(candidates, logits, deltas)
        table, _ = candidates._cheapest(values, head.topk)
        table = table.sort(dim=1).values
        made.append((table, table.isfinite()))
        return values

    with torch.no_grad(), assigned_by(head, costs):
        for batch in loader:
            data = model.data_preprocessor(batch, True)
            model.loss(data['inputs'], data['data_samples'])
    return made


def compare(batches: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """How many objects are parted as scikit-learn parts them.

    Those that it refuses in a precision do not count in the share there.
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


def fit_times(
    batch: tuple[Tensor, Tensor], args: argparse.Namespace
) -> dict[str, list[float]]:
    """Seconds of all objects of a batch, one thread."""
    costs, mask = batch
    rows = [row[inside] for row, inside in zip(costs, mask, strict=True)]

    def loop() -> None:
        for row in rows:
            reference(row)

    return interleaved(
        {'batched': lambda: positive_samples(costs, mask), 'sklearn': loop},
        args,
        'cpu',
    )


# ------------------------------------------------------------ whole iterations


def against_mmdet(
    args: argparse.Namespace, device: str
) -> dict[str, list[float]]:
    """An iteration of LAD, of MMDetection's, of plain PAA; the teacher's."""
    distiller, batch = build(args, device)
    trainer = Trainer(distiller.student, batch, distiller)
    trainer.see_teacher()
    rival = Trainer(mmdet_lad(args, distiller).to(device), batch)
    head = _head_of(distiller.student)

    def plain() -> None:
        with assigned_by(head, own_costs(head)):
            trainer.plain()

    times = interleaved(
        {
            'plain PAA, batched assignment': plain,
            'teacher forward, no_grad': trainer.teacher,
            'LAD': trainer.distilled,
            "MMDetection's LAD": rival.step,
        },
        args,
        device,
    )
    p, t, ours, theirs = times.values()
    rounds = list(zip(p, t, ours, theirs, strict=True))
    times["LAD / MMDetection's"] = [o / m for _, _, o, m in rounds]
    times['LAD / (plain + teacher)'] = [o / (p + t) for p, t, o, _ in rounds]
    return times


def mmdet_lad(args: argparse.Namespace, distiller: Any) -> nn.Module:
    """MMDetection's LAD detector of the same two networks."""
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


def _head_of(model: Any) -> Any:
    """The dense head, whose assignment is measured."""
    facts = read_facts(model).dense
    assert facts is not None
    return facts.head
