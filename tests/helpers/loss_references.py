"""Losses in plain Python floats, for the tests of losses and methods."""

import math
import statistics

from scipy.stats import pearsonr


def kl(p, q):
    """The divergence of two lists of probabilities."""
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a)


def softmax(logits, temperature=1.0):
    top = max(logits)
    powers = [math.exp((z - top) / temperature) for z in logits]
    return [power / sum(powers) for power in powers]


def binary(logit, temperature=1.0):
    """The probabilities of a binary problem."""
    p = 1 / (1 + math.exp(-logit / temperature))
    return [p, 1 - p]


def focal_kl(target, pred, gamma):
    """SoLAD's loss of two logits."""
    (p, _), (q, _) = binary(target), binary(pred)
    divergence = kl(binary(target), binary(pred))
    return ((p - q) ** 2 + 1e-6) ** (gamma / 2) * divergence


def channel_kl(ours, theirs, temperature):
    """CWD's loss of the channels of one image (C, h, w), their mean."""
    total = 0.0
    for s, t in zip(ours, theirs, strict=True):
        p, q = (
            softmax(channel.flatten().tolist(), temperature)
            for channel in (s, t)
        )
        total += kl(q, p)
    return temperature**2 * total / len(ours)


def pearson(ours, theirs):
    """The correlation of two lists of numbers, from its definition."""
    a, b = statistics.fmean(ours), statistics.fmean(theirs)
    together = sum(
        (x - a) * (y - b) for x, y in zip(ours, theirs, strict=True)
    )
    alone = sum((x - a) ** 2 for x in ours) * sum((y - b) ** 2 for y in theirs)
    return together / math.sqrt(alone)


def channels(images):
    """Each channel's values over a list of images (C, h, w)."""
    return [
        [v for image in images for v in image[c].flatten().tolist()]
        for c in range(len(images[0]))
    ]


def anticorrelation(ours, theirs, per_image):
    """PKD's loss: the mean of 1 - r, of the batch or of each image."""
    batches = [(ours, theirs)]
    if per_image:
        batches = [([s], [t]) for s, t in zip(ours, theirs, strict=True)]
    return statistics.fmean(
        1 - pearson(a, b)
        for s, t in batches
        for a, b in zip(channels(s), channels(t), strict=True)
    )


def distances(ours, theirs):
    """DIST: 1 - SciPy's correlation of the rows."""
    return [
        1 - pearsonr(a, b).statistic for a, b in zip(ours, theirs, strict=True)
    ]


def decoupled(student, teacher, y, temperature, *, sigmoid):
    """TCKD and NCKD of one box as the paper writes them."""
    if sigmoid:
        p, p_t = (binary(z[y], temperature)[0] for z in (student, teacher))
    else:
        p, p_t = (softmax(z, temperature)[y] for z in (student, teacher))
    others, others_t = (
        softmax([v for c, v in enumerate(z) if c != y], temperature)
        for z in (student, teacher)
    )
    return (
        temperature**2 * kl([p_t, 1 - p_t], [p, 1 - p]),
        temperature**2 * kl(others_t, others),
    )
