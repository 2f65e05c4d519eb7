import random
from collections import Counter

import pytest

from mmkd.data.layouts.splits import split_images


def parts(images, found):
    counts = {}
    for name, split in found.items():
        counts.setdefault(split, Counter()).update(images[name])
    return counts


def draw(seed, images=60):
    """Images with one to four of ten classes, some of which are rare."""
    rng = random.Random(seed)
    kinds = [chr(97 + k) for k in range(10)]
    weights = [2.0**-k for k in range(10)]
    return {
        f'{n:03}': frozenset(rng.choices(kinds, weights, k=rng.randint(0, 4)))
        for n in range(images)
    }


@pytest.mark.parametrize('seed', range(40))
def test_rare_classes_are_in_both(seed):
    images = draw(seed)
    found = split_images(images, (0.8, 0.2), seed)
    assert found.keys() == images.keys()
    assert abs(Counter(found.values())['val'] - 12) <= 3
    total = Counter(kind for kinds in images.values() for kind in kinds)
    counts = parts(images, found)
    for kind, count in total.items():
        if count >= 2:
            assert min(counts['train'][kind], counts['val'][kind]), kind


def test_classes_that_hang_together():
    """Whatever is done for one class decides on the others."""
    images = dict(a='xy', b='xz', c='yw', d='zw', e='uv', f='uv', g='', h='')
    images = {name: frozenset(kinds) for name, kinds in images.items()}
    for seed in range(20):
        counts = parts(images, split_images(images, (0.5, 0.5), seed))
        assert counts['train'].keys() == counts['val'].keys() == set('xyzwuv')


def test_a_class_is_spread_like_the_images():
    images = {f'{n}': frozenset('ab' if n < 20 else 'a') for n in range(100)}
    images |= {f'-{n}': frozenset() for n in range(50)}
    found = split_images(images, (0.7, 0.2, 0.1), seed=3)
    counts = parts(images, found)
    assert [counts[s]['b'] for s in ('train', 'val', 'test')] == [14, 4, 2]
    assert [counts[s]['a'] for s in ('train', 'val', 'test')] == [70, 20, 10]
    negative = Counter(found[f'-{n}'] for n in range(50))
    assert negative == dict(train=35, val=10, test=5)


def test_the_seed_decides_and_not_the_order():
    images = draw(0)
    first = split_images(images, (0.8, 0.2), 1)
    assert first == split_images(dict(reversed(images.items())), (0.8, 0.2), 1)
    assert first != split_images(images, (0.8, 0.2), 2)


def test_what_is_fixed_stays():
    images = draw(0)
    old = dict(list(images.items())[:40])
    before = split_images(old, (0.8, 0.2), 0)
    after = split_images(images, (0.8, 0.2), 0, before)
    assert {name: after[name] for name in old} == before
    assert abs(Counter(after.values())['val'] - 12) <= 3
