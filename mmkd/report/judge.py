"""Judge the distilled networks among trainings."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

from .bootstrap import paired_bootstrap
from .evaluation import Evaluation
from .fairness import problems, remarks, unfinished
from .roles import Group, teaches
from .verdict import Interval, Network, Verdict, verdict
from .work_dir import WorkDir

Speeds = Mapping[str, Mapping[str, float | None]]
"""``gflops`` and ``ms`` of networks, see :func:`mmkd.report.measure`."""
HEAVY = 3.0
"""A method's losses of so many times the task's are mentioned."""


def judge(
    groups: Sequence[Group], evaluation: Evaluation, speeds: Speeds
) -> list[Verdict]:
    """Return a verdict on each distilled network, the best gain first.

    Without any, a second network is compared with the first.
    """
    distilled = [group for group in groups if group.role == 'distilled']
    if not distilled:
        return [compare(groups, evaluation, speeds)]
    found = [
        judge_one(group, groups, evaluation, speeds) for group in distilled
    ]
    return sorted(found, key=lambda each: -(each.gain or 0.0))


def judge_one(
    group: Group,
    groups: Sequence[Group],
    evaluation: Evaluation,
    speeds: Speeds,
) -> Verdict:
    """Judge a distilled network against the plain one that is fairest."""
    ours = network(group, evaluation, speeds)
    teacher = teacher_of(group, groups, evaluation, speeds)
    plain = min(
        (each for each in groups if each.role == 'plain'),
        key=lambda each: len(problems(each, group)),
        default=None,
    )
    told = [each for g in groups for each in unfinished(g)]
    if group.first.distils and teacher is None:
        told.append(
            "Its teacher's AP, and so the share of its lead, is not known."
        )
    if plain is None:
        return verdict(
            None, ours, teacher, metric=evaluation.metric, remarks=told
        )
    base = network(plain, evaluation, speeds)
    return verdict(
        base,
        ours,
        teacher,
        metric=evaluation.metric,
        images=by_images(plain, group, evaluation),
        problems=problems(plain, group),
        remarks=[*remarks(plain, group), *told],
        hints=list(hints(group.first, base, teacher)),
    )


def compare(
    groups: Sequence[Group], evaluation: Evaluation, speeds: Speeds
) -> Verdict:
    """Compare two networks, of which none is distilled."""
    networks = [network(group, evaluation, speeds) for group in groups]
    told = [each for g in groups for each in unfinished(g)]
    if len(groups) == 1:
        return verdict(
            networks[0], None, metric=evaluation.metric, remarks=told
        )
    return verdict(
        *networks[:2],
        metric=evaluation.metric,
        images=by_images(groups[0], groups[1], evaluation),
        remarks=told,
        distils=False,
    )


def by_images(
    plain: Group, group: Group, evaluation: Evaluation
) -> Interval | None:
    """Return the interval of the gain over the images."""
    plain_hits, hits = (
        [evaluation.hits[run.name] for run in each.runs]
        for each in (plain, group)
    )
    return paired_bootstrap(plain_hits, hits, evaluation.metric)


def network(group: Group, evaluation: Evaluation, speeds: Speeds) -> Network:
    """Return the figures of a network by seed."""
    aps = {
        number if run.seed is None else run.seed: ap_of(run.name, evaluation)
        for number, run in enumerate(group.runs)
    }
    return figures(group.name, group.first.name, aps, evaluation, speeds)


def figures(
    name: str,
    key: str,
    aps: Mapping[int, float],
    evaluation: Evaluation,
    speeds: Speeds,
) -> Network:
    speed = speeds.get(key, {})
    parameters = evaluation.parameters[key]
    return Network(name, aps, parameters, speed.get('gflops'), speed.get('ms'))


def ap_of(name: str, evaluation: Evaluation) -> float:
    return evaluation.scores[name].figures[evaluation.metric] or 0.0


def teacher_of(
    group: Group,
    groups: Sequence[Group],
    evaluation: Evaluation,
    speeds: Speeds,
) -> Network | None:
    """Return the best of a network's teachers, if any is known."""
    found = [
        network(each, evaluation, speeds)
        for each in groups
        if any(teaches(one, run) for one in each.runs for run in group.runs)
    ]
    found += [
        figures(name, name, {0: ap_of(name, evaluation)}, evaluation, speeds)
        for name in evaluation.taught.get(group.first.name, ())
    ]
    return max(found, key=lambda each: each.ap, default=None)


def hints(
    run: WorkDir, plain: Network, teacher: Network | None
) -> Iterator[str]:
    """Yield what may be the cause if distillation has harmed."""
    if teacher is not None and teacher.ap <= plain.ap:
        yield (
            'the teacher, which is no better than the plain student on these '
            'images: its checkpoint, its classes, and the pixels that it sees.'
        )
    for name, line in run.telemetry.items():
        cosine = statistics.median(line.values())
        if cosine < 0:
            yield (
                f"the gradient of {name}, which pulls against the task's (a "
                f'cosine of {cosine:.2f} in the median): lower its weight, or '
                'end it early with mmkd.WeightScheduleHook.'
            )
    if (ratio := weight_of(run)) is not None and ratio > HEAVY:
        yield (
            f'the losses of distillation, which are {ratio:.0f} times the '
            "task's: lower their weight."
        )
    yield (
        'what `mmkd doctor` says of the config: what was loaded, classes, '
        'pixels, and the gradient of each loss beside that of the task.'
    )


def weight_of(run: WorkDir) -> float | None:
    """The losses of distillation by those of the task, in the median."""
    parts = run.loss_parts
    own = tuple(f'{name}.' for name in run.methods)
    steps = run.logged.get('loss', {})
    ratios = []
    for step in steps:
        ours = sum(v.get(step, 0.0) for k, v in parts.items()
                   if k.startswith(own))  # fmt: skip
        task = sum(v.get(step, 0.0) for k, v in parts.items()
                   if not k.startswith(own))  # fmt: skip
        if task > 0:
            ratios.append(ours / task)
    return statistics.median(ratios) if own and ratios else None
