"""Pseudo labels: the stock losses on what the teacher finds."""

import copy
import logging

import pytest
import torch
from mmengine.structures import InstanceData

from mmkd.core.distiller import build_distiller
from mmkd.errors import ConfigError
from tests.helpers import tiny_dense, unlabelled
from tests.helpers import tiny_detectors as tiny
from tests.helpers.several import described

SIZES = [(96, 128), (96, 128), (80, 100)]
DETECTORS = dict(
    retinanet=tiny.retinanet,
    fcos=tiny.fcos,
    yolox=tiny_dense.yolox,
    faster_rcnn=tiny.faster_rcnn,
    cascade_rcnn=tiny.cascade_rcnn,
    detr=tiny.detr,
)


class Step:
    """A student that learns from three unlabelled images alone.

    The strong view has other pixels than the weak one.
    """

    def __init__(self, model, teacher=None, **options):
        self.student = tiny.build(model, seed=1)
        cfg = dict(
            teacher=teacher or dict(type='ToldBoxes'),
            methods=dict(p=dict(type='mmkd.PseudoLabels', **options)),
            unlabelled=dict(dataset='', alone=True),
        )
        self.distiller = build_distiller(cfg, self.student, tiny.CLASSES)
        weak, strong = (
            tiny.raw_batch(sizes=SIZES, objects=[0] * 3, seed=seed)
            for seed in (1, 2)
        )
        for view in (weak, strong):
            for number, sample in enumerate(view['data_samples']):
                sample.set_metainfo(dict(img_id=number))
        self.distiller.unlabelled.stream = iter(
            [copy.deepcopy(dict(weak=weak, strong=strong)) for _ in range(3)]
        )
        self.plain = copy.deepcopy(self.student)
        self.strong = self.student.data_preprocessor(strong, False)

    def run(self):
        self.distiller.attach()
        inputs, samples = tiny.batch_for(self.plain, sizes=SIZES[:1])
        try:
            return self.student.loss(inputs, samples)
        finally:
            self.distiller.detach()

    def expected(self, boxes, images=(0, 1, 2)):
        """The plain student's losses on boxes (shares) of some images."""
        samples = [
            copy.deepcopy(self.strong['data_samples'][i]) for i in images
        ]
        for sample in samples:
            height, width = sample.img_shape
            size = torch.tensor([width, height] * 2)
            told = torch.tensor([unlabelled.BOXES[i] for i in boxes])
            labels = torch.tensor([unlabelled.LABELS[i] for i in boxes])
            sample.gt_instances = InstanceData(
                bboxes=told.view(-1, 4) * size, labels=labels.long()
            )
        inputs = self.strong['inputs']
        # Batch norms have seen all images.
        maps = self.plain.extract_feat(inputs)
        self.plain.extract_feat = lambda _: [m[list(images)] for m in maps]
        inputs = inputs[list(images)]
        # The seed of a step of its own.
        return tiny.seeded_loss(self.plain, inputs, samples, seed=0)


def parts(losses):
    """The mean of each stock loss, summed over its levels."""
    return {
        name: float(
            sum(
                each.mean()
                for each in (loss if isinstance(loss, list) else [loss])
            )
        )
        for name, loss in losses.items()
        if 'loss' in name
    }


def short(name):
    return name.replace('loss_', '').replace('.', '_')


@pytest.mark.parametrize('name', DETECTORS)
def test_the_stock_loss_on_the_boxes(name):
    """The two boxes above 0.9, of three, in all images."""
    step = Step(DETECTORS[name]())
    if name == 'yolox':
        step.plain.train()
    found = step.run()
    expected = parts(step.expected([0, 1]))
    assert len(expected) >= 2
    for stock, value in expected.items():
        loss = found[f'p.unlabelled_loss_{short(stock)}']
        assert float(loss.detach()) == pytest.approx(value, rel=1e-5), stock
    assert found.pop('idle.loss') == 0  # of a student without labels
    losses = [k for k in found if 'loss' in k]
    assert len(losses) == len(expected)
    sum(found[k] for k in losses).backward()
    head = [p for n, p in step.student.named_parameters() if 'head' in n]
    assert any(p.grad is not None and p.grad.any() for p in head)
    assert found['p.boxes_per_image'] == 2


def test_masks_are_left_out():
    step = Step(tiny.mask_rcnn())
    found = step.run()
    head = step.student.roi_head
    assert head.with_mask
    assert not any('mask' in name for name in found)
    step.plain.roi_head._modules['mask_head'] = None
    expected = parts(step.expected([0, 1]))
    got = float(found['p.unlabelled_loss_bbox'].detach())
    assert got == pytest.approx(expected['loss_bbox'], rel=1e-5)


class TestWhichBoxes:
    def losses(self, boxes, **options):
        step = Step(tiny.retinanet(), **options)
        found = float(step.run()['p.unlabelled_loss_bbox'].detach())
        assert found == pytest.approx(
            parts(step.expected(boxes))['loss_bbox'], rel=1e-5
        )
        return step

    def test_threshold(self):
        self.losses([0], score_thr=0.94)

    def test_a_threshold_is_reached(self):
        self.losses([0, 1, 2], score_thr=0.3)

    def test_thresholds_by_class(self):
        """Label 2 (cow) needs more than it has, dog less."""
        self.losses([1, 2], score_thr=dict(cow=0.99, dog=0.2))

    def test_a_default(self):
        self.losses([0], score_thr=dict(cow=0.1, default=1.0))

    def test_top_k(self):
        self.losses([0], top_k=1)
        self.losses([0, 1], score_thr=0.1, top_k=2)


class TestImagesWithoutBoxes:
    @pytest.fixture
    def empty(self):
        return dict(type='ToldBoxes', empty=[1])

    def test_they_are_left_out(self, empty):
        step = Step(tiny.retinanet(), teacher=empty)
        found = step.run()
        expected = parts(step.expected([0, 1], images=(0, 2)))
        for part in ('cls', 'bbox'):
            got = float(found[f'p.unlabelled_loss_{part}'].detach())
            value = 2 / 3 * expected[f'loss_{part}']
            assert got == pytest.approx(value, rel=1e-5)
        assert float(found['p.used_images']) == pytest.approx(2 / 3)
        assert float(found['p.boxes_per_image']) == pytest.approx(4 / 3)

    def test_they_are_background(self, empty):
        step = Step(tiny.retinanet(), teacher=empty, background=True)
        found = step.run()
        samples = [copy.deepcopy(s) for s in step.strong['data_samples']]
        for number, sample in enumerate(samples):
            height, width = sample.img_shape
            told = torch.tensor(unlabelled.BOXES[:2])
            boxes = told * torch.tensor([width, height] * 2)
            labels = torch.tensor(unlabelled.LABELS[:2])
            sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
            if number == 1:
                sample.gt_instances = sample.gt_instances[:0]
        inputs = step.strong['inputs']
        expected = parts(tiny.seeded_loss(step.plain, inputs, samples))
        for part in ('cls', 'bbox'):
            got = float(found[f'p.unlabelled_loss_{part}'].detach())
            assert got == pytest.approx(expected[f'loss_{part}'], rel=1e-5)

    def test_none_is_left(self):
        teacher = dict(type='ToldBoxes', empty=[0, 1, 2])
        step = Step(tiny.retinanet(), teacher=teacher)
        found = step.run()
        total = sum(v for k, v in found.items() if 'loss' in k)
        assert float(total.detach()) == 0
        total.backward()  # it has a graph


class TestWhatIsLogged:
    @pytest.fixture
    def log(self, monkeypatch):
        lines = []
        monkeypatch.setattr(
            'mmkd.methods.pseudo_labels.print_log',
            lambda text, _, level=logging.INFO: lines.append((level, text)),
        )
        return lines

    def test_boxes_by_class(self, log):
        step = Step(tiny.retinanet(), report_every=6)
        step.run()
        assert not log
        step.run()
        ((level, text),) = log
        assert level == logging.INFO
        assert text == (
            'PseudoLabels: 12 boxes in 6 images, 6 of which have some: '
            'cat 6, cow 6; none of 1 classes'
        )

    def test_a_threshold_that_leaves_nothing(self, log):
        step = Step(tiny.retinanet(), score_thr=0.99, report_every=3)
        step.run()
        ((level, text),) = log
        assert level == logging.WARNING
        assert 'has left no box in 3 images' in text
        assert 'The highest score of the teacher was 0.95.' in text

    def test_a_teacher_that_finds_nothing(self, log):
        teacher = dict(type='ToldBoxes', empty=[0, 1, 2])
        Step(tiny.retinanet(), teacher=teacher, report_every=3).run()
        assert "has found nothing of the student's classes" in log[0][1]


class TestVariation:
    """Boxes of whose place the teacher is not sure."""

    def step(self, monkeypatch, unsure, limit=0.02):
        model = tiny.faster_rcnn()
        step = Step(
            model,
            teacher=described(model, tiny.CLASSES),
            score_thr=0.0,
            top_k=2,
            max_variation=limit,
        )

        def variation(view, chosen):
            return [
                torch.full((len(each),), 0.1 if number in unsure else 0.01)
                for number, each in enumerate(chosen)
            ]

        if unsure is not None:
            monkeypatch.setattr(
                'mmkd.methods.pseudo_labels.box_variation', variation
            )
        return step

    def test_only_boxes_lose_them(self, monkeypatch):
        """RPN and RoI head learn boxes as if these were not there."""
        sure, unsure, some = (
            {
                name: float(loss.detach())
                for name, loss in self.step(monkeypatch, images).run().items()
                if 'loss' in name
            }
            for images in ((), (0, 1, 2), (1,))
        )
        for part in ('rpn_cls', 'cls'):
            name = f'p.unlabelled_loss_{part}'
            assert sure[name] == unsure[name] == some[name] > 0
        for part in ('rpn_bbox', 'bbox'):
            name = f'p.unlabelled_loss_{part}'
            assert unsure[name] == 0
            assert 0 < some[name] < sure[name]

    def test_a_real_variation(self, monkeypatch):
        """An infinite limit changes nothing; one of almost 0 takes all."""
        large = self.step(monkeypatch, None, limit=1e6).run()
        small = self.step(monkeypatch, None, limit=1e-9).run()
        name = 'p.unlabelled_loss_rpn_bbox'
        assert float(large[name].detach()) > 0
        assert float(small[name].detach()) == 0

    def test_it_takes_a_roi_head(self):
        with pytest.raises(ConfigError, match='max_variation=None'):
            Step(tiny.retinanet(), max_variation=0.02)


class TestErrors:
    @pytest.mark.parametrize(
        ('options', 'text'),
        [
            (dict(score_thr=1.5), 'score_thr must be at most 1'),
            (dict(score_thr=-0.1), 'score_thr must be at least 0'),
            (dict(score_thr=dict(kat=0.5)), 'no class "kat". Did you mean'),
            (dict(top_k=0), 'top_k must be at least 1'),
            (dict(background=2), 'background must be one of True, False'),
            (dict(report_every=0), 'report_every must be at least 1'),
            (dict(max_variation=0), 'max_variation must be above 0'),
        ],
    )
    def test_options(self, options, text):
        with pytest.raises(ConfigError, match=text):
            Step(tiny.retinanet(), **options)

    def test_a_student_that_needs_masks(self):
        with pytest.raises(ConfigError, match='RTMDet cannot learn from boxe'):
            Step(tiny_dense.rtmdet_ins())


def test_the_trial_leaves_no_trace():
    """Building runs the student once; nothing of it stays."""
    model = tiny.faster_rcnn()
    before = copy.deepcopy(tiny.build(model, seed=1).state_dict())
    step = Step(model)
    after = step.student.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert step.student.training
