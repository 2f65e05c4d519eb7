"""Whether distillation at weight 0 is stock training, on this machine.

Stock configs of the installed MMDetection are drawn by a seed, narrowed, and
trained on photos that are drawn: stock, and with a distillation at weight 0.
"""

import platform
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cv2
import mmengine
import numpy as np
import torch
from mmdet.utils import register_all_modules
from yapf.yapflib import yapf_api

import mmkd
from mmkd.data.drawn import draw, write_coco
from mmkd.detectors.record import replaced
from mmkd.detectors.source import class_names, load_config
from mmkd.errors import ConfigError

from .families import CONFIGS, SKIPPED
from .jobs import Job, Send, in_processes
from .report import table
from .zero_weight import (
    BATCH,
    CONDITIONS,
    EQUAL,
    FEATURES,
    ITERATIONS,
    PEERS,
    PREDICTIONS,
    STOCK_FAILS,
    TRAIN,
    Case,
    examine,
)

LIMIT = 600
"""Seconds of CPU time that a config may take."""
PATIENCE = 3600
"""Seconds until a process is one that hangs. It is killed, and its config
counts as a failure."""
ENDS = {'SIGXCPU': f'not done in {LIMIT} s of CPU time'}
SHARE = 0.3
"""How often each condition is drawn."""
PACKAGES = ('torch', 'mmengine', 'mmcv', 'mmdet')
RULE = (
    (
        'its folder has parts of configs, no detectors, or what needs a '
        'language model or a teacher of its own',
        (
            *('parts of configs', 'lanes, no boxes'),
            'tracking or re-identification, no detector',
            'guided by text, which needs a language model',
            "MMDetection's own training of a listed family with a teacher",
            'panoptic or semantic segmentation alone',
        ),
    ),
)
FOLDERS = {f for why in RULE[0][1] for f in SKIPPED[why].split()}
NEEDED = {
    'CrowdDet': 'torchvision',
    'Detectron2Wrapper': 'detectron2',
    'TIMMBackbone': 'timm',
    'Albu': 'albumentations',
    'InstaBoost': 'instaboostfast',
}
"""Packages that parts of MMDetection need beside it."""
ON_GPUS = (
    *('CARAFE', 'CARAFEPack', 'FPN_CARAFE'),
    *('DeformRoIPoolPack', 'ModulatedDeformRoIPoolPack'),
)
"""Parts whose operators MMCV does not have for the CPU."""


def self_test(
    seed: int, count: int, *, jobs: int = 1, only: str = ''
) -> dict[str, Any]:
    """Draw configs, train each stock and at weight 0, and print a table.

    Args:
        seed: Of what is drawn: configs, methods, conditions and photos.
        count: How many configs.
        jobs: How many are trained at a time.
        only: A pattern; all configs whose names match it, and are not left
            out by the rule, are taken instead.

    Returns:
        A dict with ``cases``, the facts of each config, among them its
        ``verdict``, with ``left_out``, and with what it takes to repeat.
    """
    torch.set_num_threads(1)
    register_all_modules(init_default_scope=False)
    start = time.monotonic()
    names, left_out = drawn(seed, count, only)
    cases = [case(name, seed) for name in names]
    print_rule(left_out, len(cases), seed)
    results = []
    with tempfile.TemporaryDirectory(prefix='mmkd-self-test-') as folder:
        attempt = partial(_work, folder=Path(folder))
        for job in in_processes(cases, attempt, jobs=jobs, patience=PATIENCE):
            results.append(_facts(job))
            print(f'  {len(results)}/{len(cases)} {_line(results[-1])}')
            sys.stdout.flush()
    return dict(
        seed=seed,
        versions=versions(),
        seconds=time.monotonic() - start,
        left_out=left_out,
        cases=sorted(results, key=lambda facts: facts['name']),
    )


def _work(case: Case, send: Send, folder: Path) -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT, LIMIT + 10))
    root = folder / case.name.replace('/', '-')
    cfg = load_config(f'mmdet::{case.name}')
    draw_photos(root, class_names({}, cfg) or (), case.seed)
    # Laying out the text of configs takes longer than most of the training.
    with replaced(yapf_api, 'FormatCode', lambda code, **_: (code, True)):
        send(examine(case, root))


def _facts(job: Job) -> dict[str, Any]:
    if job.messages:
        return job.messages[0]
    how = ENDS.get(job.ended_by, job.ended_by)
    if job.hung:
        how = 'it hung and was killed'
    return dict(
        **{'name': job.task.name, 'method': '', 'without': [], 'millions': 0},
        conditions=list(job.task.conditions),
        verdict=f'its process ended: {how or "it said nothing"}',
        seconds=job.seconds,
    )


# ---------------------------------------------------------------------- draw


def drawn(
    seed: int, count: int, only: str = ''
) -> tuple[list[str], dict[str, list[str]]]:
    """Draw configs, one of each family in turn.

    The families come in the order of the seed, and so do the configs of each.
    The rule is applied to a config before it may be drawn, by what it says
    and without training it.

    Returns:
        The names of the configs, and by reason those that were left out.
    """
    generator = random.Random(seed)
    families: dict[str, list[str]] = {}
    for path in sorted(CONFIGS.glob('*/*.py')):
        name = path.relative_to(CONFIGS).as_posix()
        if re.search(only, name):
            families.setdefault(path.parent.name, []).append(name)
    for names in families.values():
        generator.shuffle(names)
    waiting = list(families.values())
    generator.shuffle(waiting)
    chosen: list[str] = []
    left_out: dict[str, list[str]] = {}
    while waiting and (only or len(chosen) < count):
        family = waiting.pop(0)
        while family:
            name = family.pop(0)
            why = excluded(name)
            if not why:
                chosen.append(name)
                waiting.append(family)
                break
            left_out.setdefault(why, []).append(name)
    return chosen, left_out


def excluded(name: str) -> str:
    """Return why the rule leaves out a config; '' if it does not."""
    if name.partition('/')[0] in FOLDERS:
        return RULE[0][0]
    try:
        cfg = load_config(f'mmdet::{name}')
    except ImportError:
        return 'it imports a package that is not installed'
    except ConfigError:
        return 'it has no model'
    if not cfg.get('train_dataloader') or not cfg.get('optim_wrapper'):
        return 'it does not train'
    if {'type', 'by_epoch'} <= (cfg.get('train_cfg') or {}).keys():
        return 'MMEngine refuses its train_cfg'
    types = set(_types(cfg.to_dict()))
    if any('Panoptic' in kind for kind in types):
        return 'panoptic segmentation'
    for kind, package in NEEDED.items():
        if kind in types and find_spec(package) is None:
            return f'it needs {package}, which is not installed'
    rpn = cfg.model.get('rpn_head') or {}
    if cfg.model.type == 'RPN' and rpn.get('type') == 'CascadeRPNHead':
        return 'MMDetection cannot build it'  # it asks for classes
    if types & set(ON_GPUS):
        return 'an operator of it does not run on the CPU'
    return ''


def _types(cfg: Any) -> Iterator[str]:
    """The types in a config, at any depth."""
    if isinstance(cfg, dict):
        if isinstance(kind := cfg.get('type'), str):
            yield kind.rpartition('.')[2]
        for value in cfg.values():
            yield from _types(value)
    elif isinstance(cfg, list | tuple):
        for value in cfg:
            yield from _types(value)


def case(name: str, seed: int) -> Case:
    """Draw a config's methods and conditions, by seed and name alone."""
    generator = random.Random(f'{seed} {name}')
    kind = generator.choices([FEATURES, PREDICTIONS, tuple(PEERS)], [4, 3, 3])
    methods = generator.sample(kind[0], 3)
    methods += generator.sample(FEATURES, len(FEATURES))
    conditions = [c for c in CONDITIONS if generator.random() < SHARE]
    return Case(
        name,
        generator.randrange(2**31),
        tuple(dict.fromkeys(methods)),
        tuple(conditions),
    )


def draw_photos(root: Path, classes: tuple[str, ...], seed: int) -> None:
    """Draw a data set in COCO's layout, with semantic maps and proposals."""
    generator = np.random.default_rng(seed)
    kinds = max(1, min(len(classes), 8))
    photos = {
        number: draw(number, generator, kinds)
        for number in range(1, BATCH * ITERATIONS + 1)
    }
    write_coco(root, TRAIN, photos, classes or ('object',))
    (root / 'maps').mkdir()
    proposals = {}
    for number, (image, objects) in photos.items():
        semantic = np.full(image.shape[:2], 255, 'uint8')
        for kind, corners in objects:
            cv2.fillPoly(semantic, [corners], [kind])
        cv2.imwrite(str(root / 'maps' / f'{number:012}.png'), semantic)
        boxes = [[*c.min(axis=0), *c.max(axis=0)] for _, c in objects]
        proposals[f'{TRAIN}/{number:012}.jpg'] = dict(bboxes=np.array(boxes))
    mmengine.dump(proposals, root / 'proposals.pkl')


# --------------------------------------------------------------------- print


def versions() -> dict[str, str]:
    found = {name: __import__(name).__version__ for name in PACKAGES}
    return {
        'mmkd': mmkd.__version__,
        **found,
        'python': platform.python_version(),
        'machine': platform.machine(),
    }


def print_rule(left_out: dict[str, list[str]], count: int, seed: int) -> None:
    print(
        f'Zero weight: {count} stock configs, seed {seed}; stock training and '
        'distillation at weight 0 are compared in losses, weights, averages, '
        'optimiser and random states, bit for bit.'
    )
    print(' '.join(f'{k} {v}' for k, v in versions().items()))
    counts = Counter({why: len(names) for why, names in left_out.items()})
    print('Left out before the draw, because of a config:')
    for why, number in counts.most_common():
        print(f'  {why}: {number} ({left_out[why][0]}{", …" * (number > 1)})')
    print(flush=True)


def _line(facts: dict[str, Any]) -> str:
    return f'{facts["name"]}: {facts["verdict"]} ({facts["seconds"]:.0f} s)'


def summary(result: dict[str, Any]) -> str:
    """Return the table of all configs, and how many are equal."""
    rows = [['config', 'weights', 'method', 'conditions', 'verdict']]
    for facts in result['cases']:
        conditions = ', '.join(facts['conditions']) or '-'
        if facts['without']:
            conditions += f' (stock breaks: {", ".join(facts["without"])})'
        rows.append(
            [
                *(facts['name'], f'{facts["millions"]:.1f} M'),
                *(facts['method'] or '-', conditions, facts['verdict']),
            ]
        )
    compared = _compared(result)
    end = (
        f'{compared.count(EQUAL)} of {len(compared)} are equal, bit for bit '
        f'({result["seconds"]:.0f} s).'
    )
    if others := len(result['cases']) - len(compared):
        end += f' {others} more do not train here without mmkd either.'
    return '\n'.join([*table(rows), '', end])


def passed(result: dict[str, Any]) -> bool:
    """Return whether there were comparisons, and all were equal."""
    return set(_compared(result)) == {EQUAL}


def _compared(result: dict[str, Any]) -> list[str]:
    """The verdicts on the configs whose stock training runs here."""
    verdicts = [facts['verdict'] for facts in result['cases']]
    return [v for v in verdicts if not v.startswith(STOCK_FAILS)]
