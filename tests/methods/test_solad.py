"""Soft labels of a dense head, alone, beside the task, and in SoLAD."""

import copy
import math

import pytest
import torch
from mmengine.logging import MMLogger

from mmkd.core.distiller import build_distiller
from mmkd.detectors.record import StepRecord
from mmkd.engine.hooks import TelemetryHook
from mmkd.errors import ConfigError, TapError
from tests.helpers import tiny_dense as dense
from tests.helpers import tiny_detectors as tiny
from tests.helpers.loss_references import focal_kl

from .test_lad import LADPair, iou, scalars

SOFT = 'mmkd.SoftLabelDistillation'


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


def soft_reference(
    pair, batch, cls_weight, iou_weight, box_weight, min_iou, padding=True
):
    """The formula, anchor by anchor in floats."""
    inputs, samples = batch
    outs = []
    for model in (pair.student, pair.teacher):
        outputs = StepRecord(model)
        with torch.no_grad(), outputs.recording():
            tiny.seeded_loss(model, inputs, copy.deepcopy(samples))
        outs.append(outputs.raw('bbox_head'))
    head = pair.student.bbox_head
    sizes = [m.shape[-2:] for m in outs[0][0]]
    anchors, flags = head.get_anchors(
        sizes, [s.metainfo for s in samples], device='cpu'
    )
    total = dict(soft_cls=0.0, soft_bbox=0.0, soft_iou=0.0)
    average = 0.0
    for image, sample in enumerate(samples):
        rows = []
        for out in outs:
            rows.append(
                [
                    torch.cat([m[image].flatten(1).T for m in maps])
                    for maps in out
                ]
            )
        boxes = [
            head.bbox_coder.decode(
                torch.cat(anchors[image]), row[1], max_shape=sample.img_shape
            )
            for row in rows
        ]
        valid = torch.cat(flags[image]).tolist()
        for a, inside in enumerate(valid):
            if not inside and not padding:
                continue
            for zs, zt in zip(
                rows[0][0][a].tolist(), rows[1][0][a].tolist(), strict=True
            ):
                total['soft_cls'] += focal_kl(zt, zs, 0.5)
            if not inside:
                continue
            best = max(
                (
                    iou(boxes[1][a].tolist(), gt)
                    for gt in sample.gt_instances.bboxes.tolist()
                ),
                default=0.0,
            )
            if best <= min_iou:
                continue
            average += best
            total['soft_iou'] += focal_kl(
                rows[1][2][a].item(), rows[0][2][a].item(), 0.5
            )
            total['soft_bbox'] += best * (
                1 - giou(boxes[0][a].tolist(), boxes[1][a].tolist())
            )
    assert average > 0
    return {
        'soft_cls': cls_weight * total['soft_cls'] / average,
        'soft_bbox': box_weight * total['soft_bbox'] / average,
        'soft_iou': iou_weight * total['soft_iou'] / average,
    }


def giou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    inner = max(width, 0) * max(height, 0)
    union = sum((c[2] - c[0]) * (c[3] - c[1]) for c in (a, b)) - inner
    hull = (max(a[2], b[2]) - min(a[0], b[0])) * (
        max(a[3], b[3]) - min(a[1], b[1])
    )
    return inner / union - (hull - union) / hull


@pytest.mark.parametrize(
    'images',
    [
        dict(objects=3),
        dict(objects=[0, 2]),
        dict(sizes=((160, 192), (96, 128)), objects=2),  # with padding
    ],
)
@pytest.mark.parametrize(
    ('method', 'weights'),
    [
        ('mmkd.SoftLabelDistillation', (10.0, 10.0, 1.3, 0.1)),
        ('mmkd.SoLAD', (2.0, 10.0, 1.3, 0.3)),
    ],
)
def test_soft_labels_by_the_formula(method, weights, images):
    options = dict(soft=dict(min_iou=0.3)) if 'SoLAD' in method else {}
    pair = LADPair(dense.paa(), method, **options)
    batch = pair.batch(**images)
    losses = scalars(pair.losses(batch))
    for name, expected in soft_reference(pair, batch, *weights).items():
        got = losses[f'lad.loss_{name}']
        assert got == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_padding_can_be_left_out_of_the_classes():
    found = {}
    for ignore in (True, False):
        pair = LADPair(dense.paa(), SOFT, ignore_padding=ignore)
        batch = pair.batch(sizes=((160, 192), (96, 128)), objects=2)
        found[ignore] = scalars(pair.losses(batch))
        expected = soft_reference(
            pair, batch, 10.0, 10.0, 1.3, 0.1, padding=not ignore
        )
        for name, value in expected.items():
            got = found[ignore][f'lad.loss_{name}']
            assert got == pytest.approx(value, rel=1e-3)
    assert found[True]['lad.loss_soft_cls'] < found[False]['lad.loss_soft_cls']


# -- the authors' own algorithm ----------------------------------------------


def decoded_by_the_authors(anchors, deltas, shape):
    """Boxes of deltas (N, 4), clipped to (height, width)."""
    deltas = deltas * torch.tensor([0.1, 0.1, 0.2, 0.2]).to(deltas)
    assert deltas[:, 2:].abs().max() < 4  # the coder would cut
    sides = anchors[:, 2:] - anchors[:, :2]
    centres = (anchors[:, 2:] + anchors[:, :2]) / 2 + deltas[:, :2] * sides
    halves = sides * deltas[:, 2:].exp() / 2
    x1, y1 = (centres - halves).unbind(1)
    x2, y2 = (centres + halves).unbind(1)
    height, width = shape
    boxes = torch.stack([x1, y1, x2, y2], 1)
    clipped = torch.stack(
        [
            x1.clamp(0, width),
            y1.clamp(0, height),
            x2.clamp(0, width),
            y2.clamp(0, height),
        ],
        1,
    )
    return boxes, clipped


def ious(a, b, generalised=False):
    """IoU or GIoU of boxes (..., 4), which are broadcast."""
    low = torch.maximum(a[..., :2], b[..., :2])
    high = torch.minimum(a[..., 2:], b[..., 2:])
    inner = (high - low).clamp(min=0).prod(-1)
    areas = [(x[..., 2:] - x[..., :2]).prod(-1) for x in (a, b)]
    union = (sum(areas) - inner).clamp(min=1e-6)
    if not generalised:
        return inner / union
    low = torch.minimum(a[..., :2], b[..., :2])
    high = torch.maximum(a[..., 2:], b[..., 2:])
    hull = (high - low).prod(-1).clamp(min=1e-6)
    return inner / union - (hull - union) / hull


def focal_kls(z_t, z):
    t, s = z_t.sigmoid(), z.sigmoid()
    kl = t * (t / s).log() + (1 - t) * ((1 - t) / (1 - s)).log()
    return ((t - s) ** 2 + 1e-6) ** 0.25 * kl


def soft_labels_of_the_authors(pair, batch, cls_weight, min_iou):
    """The student in float64, its soft losses, and how many boxes leave."""
    inputs, samples = batch
    models = [copy.deepcopy(m).double() for m in (pair.student, pair.teacher)]
    student, teacher = (
        m.bbox_head(m.extract_feat(inputs.double())) for m in models
    )
    sizes = [level.shape[-2:] for level in student[0]]
    head = models[0].bbox_head
    anchors, flags = head.get_anchors(
        sizes, [s.metainfo for s in samples], device='cpu'
    )
    total, average, leaving = dict(cls=0.0, bbox=0.0, iou=0.0), 0.0, 0
    for image, sample in enumerate(samples):
        (z, r, q), (z_t, r_t, q_t) = (
            [torch.cat([m[image].flatten(1).T for m in maps]) for maps in out]
            for out in (student, [[m.detach() for m in x] for x in teacher])
        )
        total['cls'] += focal_kls(z_t, z).sum()
        valid = torch.cat(flags[image])
        boxes = torch.cat(anchors[image]).double()[valid]
        _, ours = decoded_by_the_authors(boxes, r[valid], sample.img_shape)
        free, theirs = decoded_by_the_authors(
            boxes, r_t[valid], sample.img_shape
        )
        objects = sample.gt_instances.bboxes.double()
        if not len(objects):
            continue
        overlap = ious(theirs[:, None], objects[None])
        chosen = (overlap > min_iou).any(1)
        u = overlap.amax(1)[chosen]
        average += u.sum()
        total['iou'] += focal_kls(q_t[valid][chosen], q[valid][chosen]).sum()
        apart = 1 - ious(ours[chosen], theirs[chosen], generalised=True)
        total['bbox'] += (apart * u).sum()
        moved = (free != theirs).any(1)
        leaving += (moved & chosen).sum().item()
        # Without clipping, others are chosen, or have another weight.
        unclipped = ious(free[:, None], objects[None]).amax(1)
        assert (unclipped[chosen] - u).abs().max() > 0.01
    weights = dict(cls=cls_weight, bbox=1.3, iou=10.0)
    return (
        models[0],
        {f'soft_{k}': weights[k] * v / average for k, v in total.items()},
        leaving,
    )


class TestOfficialCode:
    """Values and gradients of cybercore-co-ltd/CoLAD on equal networks."""

    @pytest.mark.parametrize(
        ('method', 'options', 'cls_weight', 'min_iou'),
        [
            (SOFT, dict(task_loss=False), 10.0, 0.1),
            ('mmkd.SoLAD', dict(box_weighting='none'), 2.0, 0.5),
        ],
    )
    @pytest.mark.parametrize(
        'images', [dict(sizes=((160, 192), (90, 100))), dict(objects=[0, 4])]
    )
    def test_values_and_gradients(
        self, method, options, cls_weight, min_iou, images
    ):
        pair = LADPair(dense.paa(), method, **options)
        inputs, samples = pair.batch(**{'objects': 4, **images})
        for sample in samples:  # objects at the border, like anchors there
            boxes = sample.gt_instances.bboxes
            height, width = sample.img_shape
            for number, box in enumerate(boxes):
                corner = (number % 2) * width, (number // 2) * height
                box[:] = torch.tensor(
                    [
                        min(corner[0], width - 40),
                        min(corner[1], height - 36),
                        max(corner[0], 40),
                        max(corner[1], 36),
                    ]
                )
        batch = inputs, samples
        losses = pair.losses(batch)
        losses = {
            k.removeprefix('lad.loss_'): v
            for k, v in losses.items()
            if k.startswith('lad.loss')
        }
        model, expected, leaving = soft_labels_of_the_authors(
            pair, batch, cls_weight, min_iou
        )
        assert leaving > 0
        assert losses.keys() == expected.keys()
        for name, loss in losses.items():
            assert loss.item() == pytest.approx(
                expected[name].item(), rel=1e-4
            ), name
            assert loss.item() > 1e-4
        sum(losses.values()).backward()
        sum(expected.values()).backward()
        reference = dict(model.named_parameters())
        grads = {k: p.grad for k, p in reference.items() if p.requires_grad}
        largest = max(grad.abs().max().item() for grad in grads.values())
        for key, parameter in pair.student.named_parameters():
            scale = grads[key].abs().max().item()
            torch.testing.assert_close(
                parameter.grad.double(),
                grads[key],
                rtol=1e-3,
                atol=1e-3 * scale + 1e-5 * largest,
            )


# -- without the stock losses -------------------------------------------------


class TestSoftLabelsAlone:
    def pair(self, config=None, **options):
        return LADPair(config or dense.paa(), SOFT, task_loss=False, **options)

    def test_the_rest_is_gone(self):
        alone, both = self.pair(), LADPair(dense.paa(), SOFT)
        batch = alone.batch()
        losses, expected = scalars(alone.losses(batch)), both.losses(batch)
        own = scalars(both.stock(batch)).keys()
        assert own == {'loss_cls', 'loss_bbox', 'loss_iou'}
        assert losses == {
            k: v for k, v in scalars(expected).items() if k not in own
        }

    def test_nothing_of_it_is_computed(self, monkeypatch):
        pair = self.pair()
        head = pair.student.bbox_head
        for name in ('get_targets', 'paa_reassign', 'get_pos_loss'):
            monkeypatch.setattr(head, name, None)
        pair.losses(pair.batch())
        assert 'loss_by_feat' not in vars(head)

    def test_a_task_that_is_not_finite_does_no_harm(self):
        pair = self.pair()
        batch = pair.batch()
        branch = pair.student.bbox_head.loss_centerness
        stock = branch.forward
        branch.forward = lambda *x, **y: stock(*x, **y) * math.nan
        assert math.isnan(scalars(pair.stock(batch))['loss_iou'])
        losses = pair.losses(batch)
        sum(losses.values()).backward()
        for parameter in pair.student.parameters():
            assert parameter.grad.isfinite().all()

    @pytest.mark.parametrize('make', [dense.paa, dense.atss, dense.ddod])
    @pytest.mark.parametrize('objects', [3, 0])
    def test_every_parameter_has_a_gradient(self, make, objects):
        pair = self.pair(make())
        losses = pair.losses(pair.batch(objects=objects))
        assert all(v.isfinite() for v in losses.values())
        sum(losses.values()).backward()
        for name, parameter in pair.student.named_parameters():
            assert parameter.grad is not None, name

    def test_a_branch_that_the_teacher_has_not(self):
        """Its weights get a gradient of 0, whatever it predicts."""
        anchors = dict(ratios=[1.0], octave_base_scale=8, scales_per_octave=1)
        teacher = tiny.merged(
            tiny.retinanet(), bbox_head=dict(anchor_generator=anchors)
        )
        pair = self.pair(dense.atss(), teacher=teacher)
        head = pair.student.bbox_head
        with torch.no_grad():
            head.atss_centerness.bias.fill_(math.inf)
        losses = pair.losses(pair.batch())
        assert losses.keys() == {'lad.loss_soft_cls', 'lad.loss_soft_bbox'}
        sum(losses.values()).backward()
        assert not head.atss_centerness.weight.grad.any()
        for name, parameter in pair.student.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name

    def test_at_weight_0_the_student_trains_as_stock(self):
        pair = self.pair(loss_weight=0)
        batch = pair.batch()
        assert scalars(pair.losses(batch)) == scalars(pair.stock(batch))
        pair = self.pair()
        pair.distiller.scales['lad'] = 0.0
        assert scalars(pair.losses(batch)) == scalars(pair.stock(batch))

    def test_the_log_says_what_was_taken_away(self, caplog):
        said = (
            'SoftLabelDistillation: the student trains by soft labels alone. '
            'The own losses of its PAAHead (loss_cls, loss_bbox, '
            "loss_centerness) are not computed while the method's weight is "
            'not 0.'
        )
        assert said in self.told(caplog, task_loss=False)
        for options in (dict(task_loss=True), dict(loss_weight=0)):
            told = self.told(caplog, **dict(task_loss=False) | options)
            assert not any('alone' in message for message in told)

    def told(self, caplog, **options):
        """What is logged while a distillation is built."""
        student = dense.build(dense.paa())  # switches logging off and on
        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel('INFO')
        logger.addHandler(caplog.handler)
        caplog.clear()
        try:
            build_distiller(
                dict(
                    teacher=dict(
                        config=dict(model=dense.paa()), checkpoint=None
                    ),
                    methods=dict(soft=dict(type=SOFT, **options)),
                ),
                student,
                tiny.CLASSES,
            )
        finally:
            logger.removeHandler(caplog.handler)
            logger.setLevel(level)
        return caplog.messages

    def test_telemetry_has_no_task(self):
        pair = self.pair()
        hook = TelemetryHook(interval=1)
        hook._student = pair.student
        hook._due = True
        pair.distiller.observers.append(hook.observe)
        pair.losses(pair.batch())
        assert hook._report['task/grad_norm'] == 0
        assert hook._report['lad/grad_norm'] > 0
        assert hook._report['lad/cosine'] == 0

    def test_a_method_that_reads_the_assignment(self):
        pair = self.pair()
        kd = LADPair(dense.paa(), 'mmkd.KD')
        pair.distiller.methods['kd'] = kd.distiller.methods['lad']
        pair.distiller.scales['kd'] = pair.distiller.balances['kd'] = 1.0
        with pytest.raises(TapError, match=r'with task_loss=False leaves it'):
            pair.losses(pair.batch())

    def test_solad_needs_the_task(self):
        with pytest.raises(ConfigError, match='has task_loss=False, but LAD'):
            LADPair(dense.paa(), 'mmkd.SoLAD', soft=dict(task_loss=False))


def test_solad_has_the_assignment_of_lad():
    pair, lad = LADPair(dense.paa(), 'mmkd.SoLAD'), LADPair(dense.paa())
    batch = pair.batch()
    losses = scalars(pair.losses(batch))
    for name, expected in scalars(lad.losses(batch)).items():
        assert losses[name] == expected


def test_soft_labels_of_a_student_that_is_the_teacher_are_zero():
    pair = LADPair(dense.paa(), 'mmkd.SoftLabelDistillation', same=True)
    losses = scalars(pair.losses(pair.batch()))
    for part in ('cls', 'iou'):
        assert abs(losses[f'lad.loss_soft_{part}']) < 1e-5
    assert abs(losses['lad.loss_soft_bbox']) < 1e-4


@pytest.mark.parametrize('make', [tiny.fcos, dense.tood, dense.yolox])
def test_soft_labels_need_deltas(make):
    if make is dense.tood:
        return
    with pytest.raises(ConfigError, match='sigmoid heads with anchors'):
        LADPair(make(), 'mmkd.SoftLabelDistillation')


def test_soft_label_options():
    with pytest.raises(ConfigError, match='min_iou'):
        LADPair(dense.paa(), 'mmkd.SoftLabelDistillation', min_iou=1.0)
    with pytest.raises(ConfigError, match=r'SoLAD\.soft'):
        LADPair(dense.paa(), 'mmkd.SoLAD', soft=dict(minimum=0.1))
