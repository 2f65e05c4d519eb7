"""Verdicts on figures worked out by hand."""

import pytest
from scipy import stats

from mmkd.report.verdict import Interval, Network, t_interval, verdict

PLAIN = Network('plain', {0: 0.120}, 500_000, 0.31, 12.0)
PKD = Network('PKD', {0: 0.151}, 500_000, 0.31, 12.5)
TEACHER = Network('teacher', {0: 0.189}, 8_000_000, 4.1, 60.0)
SURE = Interval(0.019, 0.043, 72)
OPEN = Interval(-0.011, 0.013, 72)


def seeds(name, *aps, first=0):
    return Network(name, dict(enumerate(aps, first)))


def test_a_gain():
    found = verdict(PLAIN, PKD, TEACHER, images=SURE)
    # 3.1 of 6.9 points; 12.5 ms are within a tenth of 12.
    assert found.headline == (
        'Distillation (PKD) gained 3.1 AP (12.0 → 15.1), 45 % of the '
        "teacher's lead, at the same size and speed."
    )
    assert found.outcome == 'gained'
    assert found.gain == pytest.approx(0.031)
    assert found.share == pytest.approx(31 / 69)
    text = found.text()
    assert 'One seed each: differences below about 1.2 AP may be' in text
    assert 'paired bootstrap over 72 images' in ' '.join(text.split())
    assert 'leads the plain student by 6.9 AP' in text
    assert max(map(len, text.splitlines())) < 80


def test_no_gain_is_shown():
    near = Network('PKD', {0: 0.122})
    found = verdict(PLAIN, near, TEACHER, images=OPEN)
    assert found.outcome == 'unshown'
    assert found.headline == (
        'No gain is shown (PKD): +0.2 AP (12.0 → 12.2), and the true gain may '
        'lie anywhere from -1.1 to +1.3.'
    )
    worse = Network('PKD', {0: 0.119})
    found = verdict(PLAIN, worse, TEACHER, images=OPEN)
    assert found.headline.startswith(
        'Neither gain nor harm is shown (PKD): -0.1 AP'
    )


def test_without_any_interval_chance_is_not_known():
    found = verdict(PLAIN, Network('distilled', {0: 0.151}), TEACHER)
    assert found.outcome == 'unshown'
    assert found.headline == (
        'No gain is shown: +3.1 AP (12.0 → 15.1), how much of it is chance '
        'is not known.'
    )
    assert 'One seed each: what another seed would change is not known.' in (
        found.text()
    )


def test_harm_says_what_to_look_at():
    worse = Network('PKD', {0: 0.080}, 500_000, 0.31, 12.0)
    harm = Interval(-0.06, -0.02, 72)
    found = verdict(PLAIN, worse, TEACHER, images=harm, hints=['the weight'])
    assert found.outcome == 'harmed'
    assert found.headline == (
        'Distillation (PKD) harmed: -4.0 AP (12.0 → 8.0), at the same size '
        'and speed.'
    )
    assert found.details[-1] == 'Look at next: the weight'
    assert (
        'Look at'
        not in verdict(
            PLAIN, PKD, TEACHER, images=SURE, hints=['the weight']
        ).text()
    )


@pytest.mark.parametrize(
    ('teacher', 'share', 'words'),
    [
        (None, None, 'gained 3.1 AP (12.0 → 15.1), at the same size'),
        (0.12, None, 'is not ahead of the plain student (12.0 against 12.0'),
        (0.10, None, 'is not ahead of the plain student (10.0 against 12.0'),
        (0.13, 3.1, "more than the teacher's lead"),
    ],
)
def test_the_share_takes_a_lead(teacher, share, words):
    network = None if teacher is None else Network('t', {0: teacher})
    found = verdict(PLAIN, PKD, network, images=SURE)
    assert found.outcome == 'gained'
    assert found.share == (share and pytest.approx(share))
    assert words in f'{found.headline} {found.details}'
    assert '%' not in found.headline


def test_other_size_and_speed_are_told():
    slow = Network('PKD', {0: 0.151}, 1_000_000, 0.5, 18.0)
    text = verdict(PLAIN, slow, images=SURE).headline
    assert text.endswith('at 2 times the parameters and 1.5 times the time '
                         'per image.')  # fmt: skip
    same = Network('PKD', {0: 0.151}, 500_000, 0.31, 18.0)
    text = verdict(PLAIN, same, images=SURE).headline
    assert text.endswith('at the same size and 1.5 times the time per image.')


# ------------------------------------------------------------------- seeds


def test_pairs_of_seeds_by_hand():
    """Gains of 1, 2 and 3 points: 2 ± 4.303 / √3 by the table of t."""
    plain = seeds('plain', 0.10, 0.12, 0.11)
    ours = seeds('PKD', 0.11, 0.14, 0.14)
    found = verdict(plain, ours, images=SURE)
    assert found.interval.count == 3
    half = 4.3027 / 3**0.5 / 100
    assert found.interval.low == pytest.approx(0.02 - half, abs=1e-6)
    assert found.interval.high == pytest.approx(0.02 + half, abs=1e-6)
    # It is the seeds that decide, though the images alone would show a gain.
    assert found.outcome == 'unshown'
    assert found.headline.startswith(
        'No gain is shown (PKD): +2.0 AP (11.0 → 13.0)'
    )
    text = found.text()
    assert 'Training: -0.5 to +4.5 AP over 3 pairs of seeds' in text
    assert 'Measurement: +1.9 to +4.3 AP' in text
    assert 'One seed each' not in text


def test_only_pairs_count():
    """The seed 9 has no partner, and would change the mean."""
    plain = Network('plain', {0: 0.10, 1: 0.12, 9: 0.50})
    ours = Network('PKD', {1: 0.14, 0: 0.11})
    base, distilled, interval = t_interval(plain, ours)
    assert (base.ap, distilled.ap) == pytest.approx((0.11, 0.125))
    assert interval.count == 2
    paired = stats.ttest_rel([0.11, 0.14], [0.10, 0.12])
    low, high = paired.confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx((low, high))


def test_other_seeds_are_compared_by_welch():
    plain = seeds('plain', 0.10, 0.12, 0.11)
    ours = seeds('PKD', 0.15, 0.18, first=7)
    _, _, interval = t_interval(plain, ours)
    found = stats.ttest_ind(
        [0.15, 0.18], [0.10, 0.12, 0.11], equal_var=False
    ).confidence_interval(0.95)
    assert (interval.low, interval.high) == pytest.approx(
        (found.low, found.high)
    )
    assert 'over 3 and 2 seeds' in verdict(plain, ours).text()


def test_one_seed_against_several_has_no_interval():
    plain, ours = seeds('plain', 0.10), seeds('PKD', 0.15, 0.18)
    assert t_interval(plain, ours)[2] is None
    assert 'Too few seeds for an interval' in verdict(plain, ours).text()


# --------------------------------------------------------- what is missing


def test_unequal_runs_are_not_compared():
    found = verdict(
        PLAIN, PKD, TEACHER, images=SURE, problems=['12 against 24 epochs']
    )
    assert found.outcome == 'incomparable'
    assert found.headline == (
        'plain and PKD are not comparable: 12 against 24 epochs.'
    )
    assert 'plain has 12.0 and PKD 15.1 AP (+3.1)' in found.text()
    assert 'gained' not in found.text()


@pytest.mark.parametrize(
    ('given', 'words'),
    [
        ((None, PKD, TEACHER), 'there is no plain run of this student'),
        ((None, PKD), 'What distillation (PKD) gained is not known'),
        ((PLAIN, None, TEACHER), 'There is no distilled run to judge'),
        ((None, None, TEACHER), 'There is no distilled run to judge'),
    ],
)
def test_what_is_missing_is_named(given, words):
    found = verdict(*given)
    assert found.outcome == 'unknown'
    assert words in found.headline
    for network in filter(None, given):
        assert f'{network.name} {100 * network.ap:.1f} AP' in found.text()


def test_the_metric_is_named():
    text = verdict(PLAIN, PKD, TEACHER, metric='AP50', images=SURE).text()
    assert 'gained 3.1 AP50' in text
    assert ' AP ' not in text
