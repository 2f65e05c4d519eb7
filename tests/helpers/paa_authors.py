"""PAA as in cybercore-co-ltd/CoLAD: loops over objects, losses in float64."""

import copy
import itertools
import statistics

import torch

from mmkd.benchmark.paa_reference import reference
from mmkd.detectors.record import intercepted
from tests.helpers import tiny_detectors as tiny

TOP = 9
"""How many candidates of a level an object keeps."""


def stock_calls(model, batch):
    """What the head's own loss passes to its second assignment, by image.

    It is the costs, labels, weights of classes and boxes, and then the
    anchors' numbers, their objects and the anchors themselves.
    """
    calls = []
    with intercepted(
        model.bbox_head, 'paa_reassign', lambda _, *args: calls.append(args)
    ):
        tiny.seeded_loss(model, *batch)
    return calls


def score(costs):
    if len(costs) == 1:
        return -costs[0]
    return statistics.stdev(costs) / statistics.mean(costs)


def assigned(calls_of_networks):
    """Each image's positive anchors, and how often each network decided.

    With several networks, an object's costs on a level are those of the one
    with the larger score. An object with one candidate has no positive.
    """
    positives, decided = [], [0] * len(calls_of_networks)
    for calls in zip(*calls_of_networks, strict=True):
        costs = [call[0].tolist() for call in calls]
        _, _, _, _, index, owner, anchors = calls[0]
        starts = [0]
        for level in anchors:
            starts.append(starts[-1] + len(level))
        index, owner = index.tolist(), owner.tolist()
        chosen = set()
        for gt in sorted(set(owner)):
            joined = []
            for low, high in itertools.pairwise(starts):
                members = [
                    i
                    for i, (a, o) in enumerate(zip(index, owner, strict=True))
                    if o == gt and low <= a < high
                ]
                if not members:
                    continue
                scores = [score([c[i] for i in members]) for c in costs]
                best = scores.index(max(scores))
                decided[best] += 1
                pairs = sorted((costs[best][i], index[i]) for i in members)
                joined += pairs[:TOP]
            joined.sort()
            if len(joined) < 2:
                continue
            mask, _ = reference([cost for cost, _ in joined])
            chosen |= {
                anchor
                for (_, anchor), positive in zip(joined, mask, strict=True)
                if positive
            }
        positives.append(chosen)
    return positives, decided


def losses(model, batch, calls, positives):
    """A copy in float64, and its losses on given positives.

    Args:
        model: A detector with a ``PAAHead``.
        batch: Its images and their objects.
        calls: Its :func:`stock_calls`, for the first assignment.
        positives: Each image's positive anchors.
    """
    inputs, samples = batch
    model = copy.deepcopy(model).double()
    maps = model.bbox_head(model.extract_feat(inputs.double()))
    number = sum(map(len, positives))
    focal = giou = quality = 0.0
    for image, (sample, call, chosen) in enumerate(
        zip(samples, calls, positives, strict=True)
    ):
        z, deltas, q = (
            torch.cat([level[image].flatten(1).T for level in part])
            for part in maps
        )
        _, labels, weights, _, index, owner, anchors = call
        chosen = torch.tensor(sorted(chosen), dtype=torch.long)
        target = torch.zeros_like(z)
        target[chosen, labels[chosen]] = 1
        p = z.sigmoid()
        loss = -0.25 * (1 - p) ** 2 * p.log() * target
        loss = loss - 0.75 * p**2 * (1 - p).log() * (1 - target)
        focal = focal + (loss * weights[:, None]).sum()
        objects = dict(zip(index.tolist(), owner.tolist(), strict=True))
        truth = sample.gt_instances.bboxes.double()[
            [int(objects[anchor]) for anchor in chosen.tolist()]
        ]
        boxes = decoded(torch.cat(anchors)[chosen].double(), deltas[chosen])
        inner, outer = overlaps(boxes, truth)
        giou = giou + (1 - outer).sum()
        entropy = torch.nn.functional.binary_cross_entropy_with_logits(
            q[chosen, 0], inner.detach(), reduction='sum'
        )
        quality = quality + entropy
    return model, {
        'loss_cls': focal / max(number, len(samples)),
        'loss_bbox': 1.3 * giou / max(number, 1),
        'loss_iou': 0.5 * quality / max(number, 1),
    }


def decoded(anchors, deltas):
    """Boxes (N, 4) as xyxy."""
    deltas = deltas * torch.tensor([0.1, 0.1, 0.2, 0.2]).to(deltas)
    sides = anchors[:, 2:] - anchors[:, :2]
    centres = (anchors[:, 2:] + anchors[:, :2]) / 2 + deltas[:, :2] * sides
    halves = sides * deltas[:, 2:].exp() / 2
    return torch.cat([centres - halves, centres + halves], 1)


def overlaps(a, b):
    """IoU and GIoU of boxes (N, 4), pair by pair."""
    low = torch.maximum(a[:, :2], b[:, :2])
    high = torch.minimum(a[:, 2:], b[:, 2:])
    inner = (high - low).clamp(min=0).prod(1)
    areas = [(x[:, 2:] - x[:, :2]).prod(1) for x in (a, b)]
    union = sum(areas) - inner
    low = torch.minimum(a[:, :2], b[:, :2])
    high = torch.maximum(a[:, 2:], b[:, 2:])
    hull = (high - low).prod(1)
    return inner / union, inner / union - (hull - union) / hull


def assert_same_training(model, found, copied, expected):
    """Compare losses and their gradients in every parameter.

    Args:
        model: The detector, in float32.
        found: Its losses.
        copied: The copy of :func:`losses`.
        expected: The losses of the copy.
    """
    for name, loss in expected.items():
        torch.testing.assert_close(
            found[name].double(), loss, rtol=1e-4, atol=1e-8
        )
    model.zero_grad()
    sum(found[name] for name in expected).backward(retain_graph=True)
    sum(expected.values()).backward()
    grads = {
        k: p.grad for k, p in copied.named_parameters() if p.requires_grad
    }
    largest = max(grad.abs().max().item() for grad in grads.values())
    for name, grad in grads.items():
        torch.testing.assert_close(
            model.get_parameter(name).grad.double(),
            grad,
            rtol=1e-3,
            atol=1e-3 * grad.abs().max().item() + 1e-5 * largest,
        )


def with_a_single_candidate(networks, batch):
    """Let the first object of the last image have one candidate alone.

    Its box is an anchor, and the first assignment asks for so large an IoU
    that no other anchor has it; further objects are two anchors' middles.
    """
    inputs, samples = batch
    for model in networks:
        assigner = model.bbox_head.assigner
        assigner.pos_iou_thr = assigner.neg_iou_thr = 0.85
    sizes = [(20, 24), (10, 12), (5, 6), (3, 3), (2, 2)]
    head = networks[0].bbox_head
    anchors = head.prior_generator.grid_priors(sizes, device='cpu')
    boxes = samples[-1].gt_instances.bboxes
    boxes[0] = anchors[0][25]
    for number, box in enumerate(boxes[1:], 1):
        first = 3 * number + 12 * number
        box[:] = anchors[1][first : first + 2].mean(0)
    return inputs, samples
