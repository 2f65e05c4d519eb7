"""A teacher's options: its forward, and iterations that have it."""

import argparse
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .common import Trainer, build, interleaved, ratio_table

BASE = 'as it is'
BEST = 'fold_bn, channels_last'
CACHE = 'cache, all images known'
EVERY = 4
RARE = f'distilled, every={EVERY}, mean of {EVERY} iterations'
VARIANTS: dict[str, dict[str, Any]] = {
    BASE: {},
    'fold_bn': dict(fold_bn=True),
    'channels_last': dict(channels_last=True),
    BEST: dict(fold_bn=True, channels_last=True),
    "autocast='bfloat16'": dict(autocast='bfloat16'),
}
ON_GPU = {"autocast='float16'": dict(autocast='float16')}
COMPILED = {
    'compile': dict(compile=True),
    'fold_bn, compile': dict(fold_bn=True, compile=True),
}


def teacher(
    args: argparse.Namespace, device: str
) -> tuple[dict[str, Any], str]:
    """Times of the teacher's forward and of iterations, by option."""
    with tempfile.TemporaryDirectory() as folder:
        known = {CACHE: dict(cache=dict(dir=folder))}
        variants = {**_variants(args, device), **known}
        teachers, trainer = _build(args, device, variants)
        runs = {n: partial(_forward, trainer, t) for n, t in teachers.items()}
        times = interleaved(runs, args, device)
        result = {'forward_seconds': times}
        tables = [ratio_table("teacher's forward", times, BASE)]
        if not args.forward:
            runs = _iterations(trainer, teachers)
            times = interleaved(runs, args, device)
            times[RARE] = [seconds / EVERY for seconds in times[RARE]]
            result['iteration_seconds'] = times
            tables.append(ratio_table('iteration', times, 'plain student'))
    return result, '\n\n'.join(tables)


def _variants(
    args: argparse.Namespace, device: str
) -> dict[str, dict[str, Any]]:
    return {
        **VARIANTS,
        **(ON_GPU if device == 'cuda' else {}),
        **(COMPILED if args.compile else {}),
    }


def _build(
    args: argparse.Namespace,
    device: str,
    variants: Mapping[str, Mapping[str, Any]],
) -> tuple[dict[str, Any], Any]:
    """A teacher of each variant, and a trainer that knows what is read."""
    teachers, trainer = {}, None
    for name, options in variants.items():
        distiller, batch = build(_with(args, options), device)
        teachers[name] = distiller.teacher
        if trainer is None:
            trainer = Trainer(distiller.student, batch, distiller)
            trainer.see_teacher()
    return teachers, trainer


def _with(
    args: argparse.Namespace, options: Mapping[str, Any]
) -> argparse.Namespace:
    """The arguments for a config whose teacher has options."""
    changes = {f'distillation.teacher.{k}': v for k, v in options.items()}
    given = {**(args.cfg_options or {}), **changes}
    return argparse.Namespace(**{**vars(args), 'cfg_options': given})


def _iterations(
    trainer: Any, teachers: Mapping[str, Any]
) -> dict[str, Callable[[], None]]:
    def distilled(name: str) -> None:
        trainer.distiller.teacher = teachers[name]
        trainer.distilled()

    def every() -> None:
        distilled(BASE)
        for _ in range(EVERY - 1):
            trainer.plain()

    return {
        'plain student': trainer.plain,
        f'distilled, teacher {BASE}': partial(distilled, BASE),
        f'distilled, {BEST}': partial(distilled, BEST),
        f'distilled, {CACHE}': partial(distilled, CACHE),
        RARE: every,
    }


def _forward(trainer: Any, network: Any) -> None:
    trainer.distiller.teacher = network
    trainer.teacher()
