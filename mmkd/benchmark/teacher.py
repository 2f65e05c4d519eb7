"""A teacher's options: its forward, and iterations that have it."""

import argparse
import tempfile
from collections.abc import Mapping
from functools import partial
from typing import Any

from .common import (
    CONFIG,
    OBJECTS,
    Benchmark,
    Runs,
    Times,
    Trainer,
    altered,
    build,
)

BASE = 'as it is'
BEST = 'fold_bn, channels_last'
CACHE = 'cache, all images known'
PLAIN = 'plain student'
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


OPTIONS: dict[str, dict[str, Any]] = {
    **CONFIG,
    **OBJECTS,
    '--compile': dict(
        action='store_true',
        help='measure compiled teachers as well; compiling takes minutes',
    ),
    '--forward': dict(
        action='store_true', help='measure no iterations, only the forward'
    ),
}


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measure the teacher's options: its forward, and iterations with it."""
    with tempfile.TemporaryDirectory() as folder:
        variants = {**variants_of(args), CACHE: dict(cache=dict(dir=folder))}
        teachers, trainer = build_each(args, variants)
        forwards: Runs = {
            name: partial(forward, trainer, teacher)
            for name, teacher in teachers.items()
        }
        result = {'forward_seconds': Times.interleaved(forwards, args)}
        if not args.forward:
            times = Times.interleaved(iterations(trainer, teachers), args)
            times[RARE] = [seconds / EVERY for seconds in times[RARE]]
            result['iteration_seconds'] = times
    return result


def tables(result: Mapping[str, Times]) -> str:
    found = [result['forward_seconds'].table("teacher's forward", BASE)]
    if 'iteration_seconds' in result:
        found.append(result['iteration_seconds'].table('iteration', PLAIN))
    return '\n\n'.join(found)


def variants_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the teacher's options to compare, by their names in the table."""
    return {
        **VARIANTS,
        **(ON_GPU if args.device == 'cuda' else {}),
        **(COMPILED if args.compile else {}),
    }


def build_each(
    args: argparse.Namespace, variants: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Any], Trainer]:
    """Build a teacher of each variant, and a trainer that knows its part."""
    trainer = Trainer.of(args)
    trainer.see_teacher()
    teachers = {}
    for name, variant in variants.items():
        own = {f'distillation.teacher.{k}': v for k, v in variant.items()}
        given = {**(args.cfg_options or {}), **own}
        distiller, _ = build(altered(args, cfg_options=given))
        teachers[name] = distiller.teacher
    return teachers, trainer


def iterations(trainer: Trainer, teachers: Mapping[str, Any]) -> Runs:
    def distilled(name: str) -> None:
        use(trainer, teachers[name])
        trainer.distilled()

    def every() -> None:
        distilled(BASE)
        for _ in range(EVERY - 1):
            trainer.plain()

    return {
        PLAIN: trainer.plain,
        f'distilled, teacher {BASE}': partial(distilled, BASE),
        f'distilled, {BEST}': partial(distilled, BEST),
        f'distilled, {CACHE}': partial(distilled, CACHE),
        RARE: every,
    }


def forward(trainer: Trainer, teacher: Any) -> None:
    use(trainer, teacher)
    trainer.teacher()


def use(trainer: Trainer, teacher: Any) -> None:
    assert trainer.distiller
    trainer.distiller.teacher = teacher


TEACHER = Benchmark('teacher', OPTIONS, measure, tables)
