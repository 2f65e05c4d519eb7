"""The walk over images without labels."""

import copy
import logging

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.structures import InstanceData

from mmkd.errors import ConfigError
from tests.helpers import toy, unlabelled

PKD = dict(type='mmkd.PKD')
PSEUDO = dict(type='mmkd.PseudoLabels')


class Seen(Hook):
    """Keeps the unlabelled batches, and the networks before the step."""

    def __init__(self) -> None:
        self.batches = []
        self.students = []

    def before_train(self, runner):
        part = runner.distiller.unlabelled
        stock = part.next

        def kept(*args):
            batch = stock(*args)
            self.batches.append(batch)
            student = copy.deepcopy(runner.distiller.student)
            getattr(student, 'distillation', student).detach()
            self.students.append(student)
            return batch

        part.next = kept


def both(tmp_path, base, methods, **options):
    """Train plainly, and with unlabelled images."""
    plain = toy.Record()
    toy.train(toy.plain(tmp_path / 'plain', base, images=4), plain)
    cfg = unlabelled.pseudo(tmp_path / 'distilled', base, images=4)
    cfg.distillation.methods = methods
    record = toy.Record()
    runner = toy.train(unlabelled.unlabelled(cfg, **options), record)
    return plain, record, runner


class TestStockTraining:
    """What the unlabelled images leave as it is."""

    def test_weight_0_is_plain_training(self, tmp_path):
        plain, record, runner = both(
            tmp_path, toy.FASTER_RCNN, dict(pseudo=PSEUDO), weight=0.0
        )
        assert runner.distiller.unlabelled is None
        assert toy.same(plain.losses, record.losses)
        assert toy.same(plain.gradients, record.gradients)
        assert toy.same(plain.states, record.states)

    def test_weight_0_leaves_methods_on_labelled_images(self, tmp_path):
        records = []
        for name, options in (('without', None), ('with', dict(weight=0.0))):
            cfg = toy.distilled(
                tmp_path / name,
                toy.RETINANET,
                methods=dict(pkd=PKD),
                images=4,
            )
            if options is not None:
                unlabelled.unlabelled(cfg, **options)
            records.append(toy.Record())
            toy.train(cfg, records[-1])
        assert toy.same(records[0].losses, records[1].losses)
        assert toy.same(records[0].gradients, records[1].gradients)

    def test_stock_losses_and_random_numbers(self, tmp_path):
        """The two-stage samplers draw what they draw in plain training."""
        plain, record, _ = both(tmp_path, toy.FASTER_RCNN, dict(pseudo=PSEUDO))
        assert toy.same(plain.states, record.states)
        first = record.losses[0]
        stock = {k: first[k] for k in plain.losses[0] if k != 'loss'}
        assert toy.same(
            stock, {k: v for k, v in plain.losses[0].items() if k != 'loss'}
        )
        assert first['pseudo.unlabelled_loss_rpn_cls'] > 0
        parts = [v for k, v in first.items() if 'loss' in k and k != 'loss']
        assert first['loss'] == pytest.approx(sum(parts), rel=1e-5)
        assert not toy.same(plain.gradients, record.gradients)


class TestOneStep:
    """The losses of a step against plain networks."""

    def test_features_of_both_views(self, tmp_path):
        cfg = toy.distilled(
            tmp_path,
            toy.RETINANET,
            methods=dict(pkd=dict(type='mmkd.PKD', loss_weight=3.0)),
            images=4,
        )
        unlabelled.unlabelled(cfg, weight=0.5)
        seen, record = Seen(), toy.Record()
        runner = toy.train(cfg, record, seen)
        teacher = runner.distiller.teacher.model
        for step in range(2):
            batch, student = seen.batches[step], seen.students[step]
            assert not torch.equal(batch.inputs, batch.weak.inputs)
            with torch.no_grad():
                ours = student.extract_feat(batch.inputs)
                theirs = teacher.extract_feat(batch.weak.inputs)
            expected = 0.5 * 3.0 * _pearson(ours, theirs, batch)
            found = record.losses[step]['pkd.unlabelled_loss_pkd']
            assert found == pytest.approx(expected, rel=1e-4)
            assert found != pytest.approx(
                record.losses[step]['pkd.loss_pkd'] * 0.5, rel=1e-4
            )

    def test_objects_are_the_confident_detections(self, tmp_path):
        """KD and LD read the assignment of the teacher's boxes."""
        base = 'gfl/gfl_r50_fpn_1x_coco.py'
        cfg = toy.distilled(
            tmp_path, base, methods=dict(ld=dict(type='mmkd.LD')), images=2
        )
        unlabelled.unlabelled(cfg, score_thr=0.6)
        seen, record = Seen(), toy.Record()
        runner = toy.build(cfg)
        for hook in (seen, record):
            runner.register_hook(hook)
        runner.register_hook(_Told())
        runner.train()
        distiller, batch = runner.distiller, seen.batches[0]
        student = seen.students[0]
        boxes = [_told(sample)[:2] for sample in batch.data_samples]
        samples = batch.copies()
        for sample, each in zip(samples, boxes, strict=True):
            sample.gt_instances = InstanceData(
                bboxes=each, labels=torch.tensor([2, 0])
            )
        expected = _ld_main(student, distiller.teacher.model, batch, samples)
        # The distributions of an untrained head are nearly the same.
        assert record.losses[0]['ld.unlabelled_loss_main'] == pytest.approx(
            expected, rel=1e-3
        )


class _Told(Hook):
    """Lets the teacher find three boxes in every image."""

    priority = 'VERY_HIGH'

    def before_train(self, runner):
        teacher = runner.distiller.teacher
        stock = teacher.view

        def view(batch):
            found = stock(batch)
            found.detections = [
                InstanceData(
                    bboxes=_told(sample),
                    scores=torch.tensor([0.9, 0.7, 0.5]),
                    labels=torch.tensor([2, 0, 1]),
                )
                for sample in batch.data_samples
            ]
            return found

        teacher.view = view


def _told(sample):
    height, width = sample.img_shape
    size = torch.tensor([width, height] * 2)
    return torch.tensor(unlabelled.BOXES) * size


def _pearson(ours, theirs, batch):
    """The sum over levels of 1 - r, averaged over channels."""
    total = 0.0
    height, width = batch.inputs.shape[-2:]
    for s, t in zip(ours, theirs, strict=True):
        rows, columns = s.shape[-2:]
        inside = torch.zeros(len(s), rows, columns, dtype=torch.bool)
        for row, sample in enumerate(batch.data_samples):
            h, w = sample.img_shape
            inside[
                row, : -(-h * rows // height), : -(-w * columns // width)
            ] = True
        channels = zip(s.transpose(0, 1), t.transpose(0, 1), strict=True)
        each = [
            1 - torch.corrcoef(torch.stack([a[inside], b[inside]]))[0, 1]
            for a, b in channels
        ]
        total += torch.stack(each).mean()
    return float(total)


def _ld_main(student, teacher, batch, samples):
    """The divergence of the bins at the positives of the boxes."""
    head = student.bbox_head
    student.train()
    with torch.no_grad():
        classes, ours = head(student.extract_feat(batch.inputs))
        _, theirs = teacher.bbox_head(teacher.extract_feat(batch.weak.inputs))
    sizes = [level.shape[-2:] for level in classes]
    metas = [sample.metainfo for sample in samples]
    anchors, flags = head.get_anchors(sizes, metas, device='cpu')
    targets = head.get_targets(
        anchors,
        flags,
        [sample.gt_instances for sample in samples],
        metas,
    )
    labels = torch.cat(targets[1], 1).flatten()
    flat = [
        torch.cat(
            [
                level.permute(0, 2, 3, 1).reshape(len(level), -1, width)
                for level in levels
            ],
            1,
        ).flatten(0, 1)
        for levels, width in ((classes, 80), (ours, 68), (theirs, 68))
    ]
    positive = labels < 80
    assert positive.any()
    scores, s, t = (part[positive] for part in flat)
    s, t = ((z / 10).view(-1, 17) for z in (s, t))
    p = t.softmax(-1)
    divergence = (p * (p.log() - s.log_softmax(-1))).sum(-1) * 100
    weights = scores.sigmoid().amax(-1).repeat_interleave(4)
    images = len(batch.inputs)
    return 0.25 * float((weights * divergence).sum()) / (4 * 17) * 2 / images


class TestWhoLearns:
    def test_it_is_said(self, tmp_path, monkeypatch):
        lines = []
        monkeypatch.setattr(
            logging.Logger,
            'handle',
            lambda _, record: lines.append(record.getMessage()),
        )
        cfg = toy.distilled(
            tmp_path,
            toy.RETINANET,
            methods=dict(
                pkd=PKD, kd=dict(type='mmkd.KD'), fgd=dict(type='mmkd.FGD')
            ),
        )
        runner = toy.build(unlabelled.unlabelled(cfg))
        runner._attach()
        assert runner.distiller.unlabelled.learners == ['pkd', 'kd']
        said = 'From the unlabelled images learn: pkd, kd. Not: fgd needs lab'
        assert any(each.startswith(said) for each in lines)

    def test_nobody(self, tmp_path):
        cfg = toy.distilled(
            tmp_path, toy.RETINANET, methods=dict(fgd=dict(type='mmkd.FGD'))
        )
        runner = toy.build(unlabelled.unlabelled(cfg))
        with pytest.raises(
            ConfigError, match=r'no method learns from.*fgd ne'
        ):
            runner._attach()

    def test_objects_need_detections(self, tmp_path):
        cfg = toy.distilled(
            tmp_path, toy.RETINANET, methods=dict(kd=dict(type='mmkd.KD'))
        )
        teacher = cfg.distillation.teacher
        cfg.distillation.teacher = dict(mean=[teacher, teacher])
        runner = toy.build(unlabelled.unlabelled(cfg))
        with pytest.raises(ConfigError, match=r'kd reads objects.*gives none'):
            runner._attach()

    def test_no_images(self, tmp_path):
        runner = toy.build(unlabelled.pseudo(tmp_path))
        with pytest.raises(ConfigError, match=r'pseudo.*and there are none'):
            runner._attach()

    @pytest.mark.parametrize(
        ('options', 'text'),
        [
            (dict(weight=-1), 'weight must be a finite number, at least 0'),
            (dict(score_thr=2), 'score_thr must be.*from 0 to 1, got 2'),
            (dict(weights=1), 'no option "weights". Did you mean "weight"'),
            (dict(alone=True, weight=0), 'would learn nothing'),
            (dict(batch_size=0), 'batch_size must be.*at least 1, got 0'),
            (dict(num_workers=-1), 'num_workers must be.*at least 0'),
        ],
    )
    def test_options(self, tmp_path, options, text):
        cfg = unlabelled.unlabelled(unlabelled.pseudo(tmp_path))
        cfg.distillation.unlabelled.update(options)
        with pytest.raises(ConfigError, match=text):
            toy.build(cfg)._attach()

    def test_what_is_no_dict(self, tmp_path):
        cfg = unlabelled.pseudo(tmp_path)
        cfg.distillation.unlabelled = 'folder'
        with pytest.raises(ConfigError, match='must be a dict with the "data'):
            toy.build(cfg)._attach()


def test_geometry_of_the_student_alone(tmp_path):
    """Maps of views that are moved against each other are not compared."""
    cfg = toy.distilled(tmp_path, toy.RETINANET, methods=dict(pkd=PKD))
    strong = [dict(type='RandomFlip', prob=1.0)]
    runner = toy.build(unlabelled.unlabelled(cfg, strong=strong))
    with pytest.raises(ConfigError, match=r'strong moves the pixels.*pkd wou'):
        runner.train()


def test_an_idle_method_draws_no_images(tmp_path):
    """A schedule that leaves iterations out costs nothing in them."""
    cfg = unlabelled.unlabelled(unlabelled.pseudo(tmp_path))
    cfg.custom_hooks = [
        dict(type='mmkd.WeightScheduleHook', methods='pseudo', every=2)
    ]
    record = toy.Record()
    runner = toy.train(cfg, record)
    active = ['pseudo.unlabelled_loss_cls' in each for each in record.losses]
    assert active == [True, False, True, False]
    assert runner.unlabelled_stream.taken == 4


class TestAlone:
    def test_the_student_never_sees_a_label(self, tmp_path):
        cfg = unlabelled.unlabelled(unlabelled.pseudo(tmp_path), alone=True)
        # No labelled image may be read.
        cfg.train_dataloader.dataset.ann_file = 'nowhere.json'
        record = toy.Record()
        toy.train(cfg, record)
        assert len(record.losses) == 4  # 8 images, 2 in a batch
        assert not any(k.startswith('loss_') for k in record.losses[0])
        parts = [v for k, v in record.losses[0].items() if '.unl' in k]
        assert record.losses[0]['loss'] == pytest.approx(sum(parts))

    def test_images_without_boxes_move_nothing(self, tmp_path):
        cfg = unlabelled.pseudo(tmp_path)
        cfg.distillation.teacher.empty = list(range(100))
        unlabelled.unlabelled(cfg, alone=True)
        record = toy.Record()
        toy.train(cfg, record)
        assert all(each['loss'] == 0 for each in record.losses)


def test_copies_take_no_images_along(tmp_path):
    cfg = unlabelled.unlabelled(unlabelled.pseudo(tmp_path))
    runner = toy.build(cfg)
    runner._attach()
    copied = copy.deepcopy(runner.distiller)
    assert copied.unlabelled is None
    assert runner.distiller.unlabelled is not None
