"""The paper's losses in plain Python, from what MMDetection's losses get.

What MMDetection's own loss functions are given in a step is scored by a copy
of the teacher behind its own preprocessing, in loops over boxes and classes.
"""

import copy
import math

import torch
from mmdet.models.dense_heads import AnchorHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead

from mmkd.core.distiller import Distiller
from mmkd.detectors.blank import blank_pass
from mmkd.detectors.facts import box_heads
from mmkd.methods import FasterRCNNDistillation
from mmkd.teachers.frozen import FrozenDetector
from tests.helpers import tiny_detectors as tiny


class RCNNPair:
    """A student and a teacher, and their distiller for one method."""

    def __init__(
        self,
        student,
        teacher,
        *,
        student_classes=tiny.CLASSES,
        teacher_classes=tiny.CLASSES,
        positives=True,
        masks=False,
        objects=6,
        **batch,
    ):
        self.student = tiny.build(student, seed=1)
        self.network = tiny.in_eval(tiny.build(teacher, seed=2), masks=masks)
        self.teacher = FrozenDetector(
            copy.deepcopy(self.network),
            teacher_classes,
            student=self.student,
            student_classes=student_classes,
        )
        self.student_classes = student_classes
        self.teacher_classes = teacher_classes
        self.positives = positives
        self.raw = dict(
            objects=objects,
            classes=len(student_classes),
            masks=masks,
            seed=3,
            **batch,
        )
        self.inputs, self.samples = tiny.batch_for(self.student, **self.raw)

    def distil(self, seed=0, **options):
        """The losses of a distilled step, and the method."""
        torch.manual_seed(7)  # the adapters' weights
        method = FasterRCNNDistillation(**options)
        distiller = Distiller(self.student, self.teacher, {'kd': method})
        paths = method.student_paths
        self.teacher.paths = tuple(method.teacher_paths)
        device = torch.device('cpu')
        method.prepare(
            blank_pass(self.student, paths, device),
            self.teacher.blank(device),
        )
        distiller.attach()
        try:
            losses = tiny.seeded_loss(
                self.student, self.inputs, self.samples, seed
            )
        finally:
            distiller.detach()
        return losses, method

    def teacher_maps(self):
        """The features of the teacher by its own preprocessing."""
        inputs, _ = tiny.batch_for(self.network, **self.raw)
        with torch.no_grad():
            return self.network.extract_feat(inputs)


class SeenLosses:
    """What MMDetection's own loss functions are given in a step."""

    def __init__(self, pair, monkeypatch, seed=0):
        self.levels, self.rois = [], []
        level_loss, roi_loss = AnchorHead.loss_by_feat_single, BBoxHead.loss

        def see_level(head, *args, **kwargs):
            self.levels.append((*args, kwargs['avg_factor']))
            return level_loss(head, *args, **kwargs)

        def see_rois(head, *args, **kwargs):
            self.rois.append(args)
            return roi_loss(head, *args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(AnchorHead, 'loss_by_feat_single', see_level)
            patch.setattr(BBoxHead, 'loss', see_rois)
            with torch.no_grad():
                self.losses = tiny.seeded_loss(
                    pair.student, pair.inputs, pair.samples, seed
                )


# ------------------------------------------------- the formulas, in floats


def softmax(logits):
    top = max(logits)
    exps = [math.exp(z - top) for z in logits]
    return [e / sum(exps) for e in exps]


def soft_ce(student, teacher, background_weight=1.5):
    """Eq. 3 for one box; logits with the background last."""
    p_s, p_t = softmax(student), softmax(teacher)
    weights = [1.0] * (len(p_s) - 1) + [background_weight]
    return -sum(
        w * t * math.log(s) for w, t, s in zip(weights, p_t, p_s, strict=True)
    )


def bounded(student, target, teacher, margin=0.0):
    """Eq. 4 for one box."""
    error_s = sum((s - y) ** 2 for s, y in zip(student, target, strict=True))
    error_t = sum((t - y) ** 2 for t, y in zip(teacher, target, strict=True))
    return error_s if error_s + margin > error_t else 0.0


def encode(box, other, coder):
    """The deltas from one xyxy box to another."""
    (x1, y1, x2, y2), (u1, v1, u2, v2) = box, other
    raw = (
        ((u1 + u2) - (x1 + x2)) / 2 / (x2 - x1),
        ((v1 + v2) - (y1 + y2)) / 2 / (y2 - y1),
        math.log((u2 - u1) / (x2 - x1)),
        math.log((v2 - v1) / (y2 - y1)),
    )
    return [
        (d - m) / s
        for d, m, s in zip(raw, coder.means, coder.stds, strict=True)
    ]


def decode(box, deltas, coder):
    """The xyxy box that deltas lead to."""
    x1, y1, x2, y2 = box
    dx, dy, dw, dh = (
        d * s + m
        for d, m, s in zip(deltas, coder.means, coder.stds, strict=True)
    )
    limit = abs(math.log(16 / 1000))  # how far a box may grow or shrink
    width = (x2 - x1) * math.exp(max(-limit, min(limit, dw)))
    height = (y2 - y1) * math.exp(max(-limit, min(limit, dh)))
    x = (x1 + x2) / 2 + dx * (x2 - x1)
    y = (y1 + y2) / 2 + dy * (y2 - y1)
    return [x - width / 2, y - height / 2, x + width / 2, y + height / 2]


def bounded_of(box, deltas, target, teacher_deltas, head, teacher_head):
    """Eq. 4 of a positive box in the student's coding."""
    coder = head.bbox_coder
    if head.reg_decoded_bbox:
        target = encode(box, target, coder)
    box_t = decode(box, teacher_deltas, teacher_head.bbox_coder)
    return bounded(deltas, target, encode(box, box_t, coder))


def rpn_reference(pair, seen):
    """Soft and bounded loss of the RPN, looping over positions."""
    head, teacher_head = pair.student.rpn_head, pair.network.rpn_head
    with torch.no_grad():
        scores, deltas = teacher_head(pair.teacher_maps())
    soft = regression = 0.0
    for level, (
        cls_score,
        bbox_pred,
        anchors,
        labels,
        label_weights,
        targets,
        target_weights,
        average,
    ) in enumerate(seen.levels):
        images, _, height, width = cls_score.shape
        count = labels.shape[1] // (height * width)
        c, c_t = (h.cls_out_channels for h in (head, teacher_head))
        for image, n in label_weights.nonzero().tolist():
            y, x, a = n // count // width, n // count % width, n % count
            here = (image, slice(a * c, (a + 1) * c), y, x)
            here_t = (image, slice(a * c_t, (a + 1) * c_t), y, x)
            z_s = cls_score[here].tolist() + [0.0] * (c == 1)
            z_t = scores[level][here_t].tolist() + [0.0] * (c_t == 1)
            weight = label_weights[image, n].item()
            soft += weight * soft_ce(z_s, z_t) / average
            if labels[image, n] == 0:  # an object
                assert target_weights[image, n].tolist() == [1.0] * 4
                here = (image, slice(a * 4, (a + 1) * 4), y, x)
                regression += (
                    bounded_of(
                        anchors[image, n].tolist(),
                        bbox_pred[here].tolist(),
                        targets[image, n].tolist(),
                        deltas[level][here].tolist(),
                        head,
                        teacher_head,
                    )
                    / average
                )
    assert images == len(pair.samples)
    return soft, regression


def of_class(deltas, label, head):
    return deltas if head.reg_class_agnostic else deltas[4 * label :][:4]


def rcn_reference(pair, seen, stage):
    """Soft and bounded loss of one RoI stage, looping over RoIs."""
    head = box_heads(pair.student)[stage]
    cls_score, bbox_pred, rois, labels, label_weights, targets, _ = seen.rois[
        stage
    ]
    heads = box_heads(pair.network)
    number = min(stage, len(heads) - 1)
    arguments = [pair.teacher_maps(), rois]
    if len(heads) > 1:
        arguments.insert(0, number)
    with torch.no_grad():
        scored = pair.network.roi_head._bbox_forward(*arguments)
    shared = [c for c in pair.student_classes if c in pair.teacher_classes]
    ours = [pair.student_classes.index(c) for c in shared] + [-1]
    theirs = [pair.teacher_classes.index(c) for c in shared] + [-1]
    soft = regression = 0.0
    for n, label in enumerate(labels.tolist()):
        z_s = [cls_score[n, c].item() for c in ours]
        z_t = [scored['cls_score'][n, c].item() for c in theirs]
        if head.loss_cls.use_sigmoid:
            # Each column against "not it"; not the last column is an object.
            value = sum(
                soft_ce([s, 0.0], [t, 0.0])
                for s, t in zip(z_s[:-1], z_t[:-1], strict=True)
            ) + soft_ce([0.0, z_s[-1]], [0.0, z_t[-1]])
        else:
            value = soft_ce(z_s, z_t)
        soft += label_weights[n].item() * value / len(labels)
        if label == len(pair.student_classes):
            continue  # background
        name = pair.student_classes[label]
        if name not in pair.teacher_classes:
            continue
        regression += bounded_of(
            rois[n, 1:].tolist(),
            of_class(bbox_pred[n].tolist(), label, head),
            targets[n].tolist(),
            of_class(
                scored['bbox_pred'][n].tolist(),
                pair.teacher_classes.index(name),
                heads[number],
            ),
            head,
            heads[number],
        ) / len(labels)
    return soft, regression


def hint_reference(pair, method):
    """Mean squared distance behind the adapters, level by level."""
    with torch.no_grad():
        features = pair.student.extract_feat(pair.inputs)
    values = []
    for level, (f_s, f_t) in enumerate(
        zip(features, pair.teacher_maps(), strict=True)
    ):
        adapter = method.hint.adapters[level]
        weight, bias = (p.detach() for p in (adapter.weight, adapter.bias))
        adapted = torch.einsum('oi,bihw->bohw', weight[:, :, 0, 0], f_s)
        adapted += bias[:, None, None]
        per_image = []
        for sample, image_s, image_t in zip(
            pair.samples, adapted, f_t, strict=True
        ):
            scale = f_t.shape[-1] / pair.inputs.shape[-1]
            h, w = (math.ceil(side * scale) for side in sample.img_shape)
            difference = image_s[:, :h, :w] - image_t[:, :h, :w]
            per_image.append(difference.square().mean().item())
        values.append(sum(per_image) / len(per_image))
    return sum(values) / len(values)


def expected_parts(pair, seen, method):
    """All parts with mu=0, lambda=nu=gamma=1, by their names."""
    parts = {}
    parts['rpn_soft'], parts['rpn_bounded'] = rpn_reference(pair, seen)
    stages = len(box_heads(pair.student))
    for stage in range(stages):
        prefix, weight = 'rcn', 1.0
        if stages > 1:
            prefix = f's{stage}_rcn'
            weight = (1, 0.5, 0.25)[stage]  # the stock config's
        soft, regression = rcn_reference(pair, seen, stage)
        parts[f'{prefix}_soft'] = weight * soft
        parts[f'{prefix}_bounded'] = weight * regression
    parts['hint'] = hint_reference(pair, method)
    return parts
