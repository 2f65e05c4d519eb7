"""Split images into parts in which every class is found."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from .data import SPLITS

FRACTIONS = (0.8, 0.2)
"""Of the images to train and to validate on."""
TRIES = 200
"""Moves after which rare classes are given up."""


def split_images(
    images: Mapping[str, frozenset[str]],
    fractions: Sequence[float],
    seed: int,
    fixed: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Assign images to splits, so that each class is spread like the images.

    Each class that at least as many images have as there are splits is in all
    of them, as far as the classes of other images allow. The result depends on
    the names, the seed and what is fixed, and not on the order.

    Args:
        images: By name, the classes that an image has.
        fractions: Of train, val and, if there are three, test.
        seed: Of the order in which images are assigned.
        fixed: The split of images that have one, and keep it.

    Example:
        >>> from mmkd.data.layouts.splits import split_images
        >>> images = {str(n): frozenset({'a'}) for n in range(10)}
        >>> sorted(split_images(images, (0.8, 0.2), seed=0).values())[-3:]
        ['train', 'val', 'val']
    """
    splits = SPLITS[: len(fractions)]
    share = dict(zip(splits, fractions, strict=True))
    found = {
        name: split
        for name, split in (fixed or {}).items()
        if name in images and split in share
    }
    free = sorted(images.keys() - found.keys())
    random.Random(seed).shuffle(free)
    # '' stands for the image itself, so that negative images are spread, too.
    kinds = {name: classes | {''} for name, classes in images.items()}
    total = Counter(kind for each in kinds.values() for kind in each)
    have = {split: Counter[str]() for split in splits}
    for name, split in found.items():
        have[split].update(kinds[name])
    wanted = {kind: _wanted(total[kind], share) for kind in total}

    def worth(name: str, split: str) -> tuple[float, ...]:
        """How much a split lacks what an image has, the rarest class first."""
        lacks = [
            (wanted[kind][split] - have[split][kind]) / wanted[kind][split]
            for kind in sorted(kinds[name], key=lambda k: (total[k], k))
            if wanted[kind][split]
        ]
        missing = sum(
            not have[split][kind]
            for kind in kinds[name]
            if wanted[kind][split]
        )
        return (missing, *lacks)

    free.sort(key=lambda name: min(total[kind] for kind in kinds[name]))
    for name in free:
        split = max(splits, key=lambda s: worth(name, s))
        found[name] = split
        have[split].update(kinds[name])
    _mend(found, free, kinds, have, wanted)
    return found


def _wanted(count: int, share: Mapping[str, float]) -> dict[str, int]:
    """How many of the images of a class each split is to have."""
    found = dict.fromkeys(share, 0)
    least = [s for s in ('train', 'val', 'test') if share.get(s)]
    for split in least[:count]:
        found[split] = 1
    for _ in range(count - sum(found.values())):
        split = max(share, key=lambda s: share[s] * count - found[s])
        found[split] += 1
    return found


def _mend(
    found: dict[str, str],
    free: Sequence[str],
    kinds: Mapping[str, frozenset[str]],
    have: Mapping[str, Counter[str]],
    wanted: Mapping[str, Mapping[str, int]],
) -> None:
    """Move images where a split lacks a class, without making others lack."""

    def lacking() -> list[tuple[str, str]]:
        return sorted(
            (kind, split)
            for kind, each in wanted.items()
            for split, count in each.items()
            if count and not have[split][kind]
        )

    def move(name: str, split: str) -> None:
        have[found[name]].subtract(kinds[name])
        have[split].update(kinds[name])
        found[name] = split

    def cost(name: str, split: str) -> tuple[int, int]:
        """The splits that a move leaves without a class, and its size."""
        old = found[name]
        left = sum(
            have[old][k] == 1 and wanted[k][old] > 0 for k in kinds[name]
        )
        gained = sum(
            not have[split][k] and wanted[k][split] > 0 for k in kinds[name]
        )
        return left - gained, len(kinds[name])

    moved: Counter[str] = Counter()
    missing = lacking()
    for _ in range(TRIES):
        if not missing:
            return
        kind, split = missing[0]
        names = [n for n in free if kind in kinds[n] and found[n] != split]
        if not names:
            missing = missing[1:]
            continue
        name = min(names, key=lambda n: (moved[n], cost(n, split)))
        moved[name] += 1
        move(name, split)
        missing = lacking()
