"""The classes of the data, in whatever wraps them, and the heads."""

import copy

import pytest
import torch
from mmengine.registry import DATASETS

from mmkd.core.distiller import build_distiller
from mmkd.detectors.source import check_class_count
from mmkd.doctor import diagnose
from mmkd.engine.classes import training_classes
from mmkd.errors import ConfigError
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny

NAMES = ('cat', 'dog')
SOLO = 'solo/solo_r50_fpn_1x_coco.py'
MASK2FORMER = 'mask2former/mask2former_r50_8xb2-lsj-50e_coco.py'


class TestHeads:
    """Each has 3 classes, the data 2."""

    @pytest.mark.parametrize(
        ('model', 'options'),
        [
            (tiny.gfl, ['bbox_head']),
            (tiny_dense.paa, ['bbox_head']),
            (tiny.detr, ['bbox_head']),
            (tiny.faster_rcnn, ['roi_head.bbox_head']),
            (
                tiny.cascade_rcnn,
                [f'roi_head.bbox_head.{stage}' for stage in range(3)],
            ),
            (tiny.mask_rcnn, ['roi_head.bbox_head', 'roi_head.mask_head']),
        ],
    )
    def test_every_head_is_named(self, model, options):
        with pytest.raises(ConfigError) as caught:
            check_class_count(tiny.build(model()), NAMES)
        listed = ', '.join(f'model.{each}.num_classes' for each in options)
        assert str(caught.value).startswith(
            f'{listed}: expected 2, because the training data names as many '
            'classes (cat, dog), got 3. Set '
        )
        check_class_count(tiny.build(model()), tiny.CLASSES)

    def test_one_stage_alone(self):
        model = tiny.build(tiny.cascade_rcnn())
        model.roi_head.bbox_head[2].num_classes = 7
        with pytest.raises(
            ConfigError, match=r'model\.roi_head\.bbox_head\.2'
        ):
            check_class_count(model, tiny.CLASSES)

    @pytest.mark.parametrize('name', [SOLO, MASK2FORMER])
    def test_heads_of_masks(self, name):
        model = toy.detector(toy.small_model(toy.stock(name).model))
        with pytest.raises(ConfigError, match=r'expected 2, .* got 80'):
            check_class_count(model, NAMES)
        check_class_count(model, toy.stock_classes())

    def test_a_detector_without_classes_may_name_any(self):
        rpn = toy.small_model(toy.stock('rpn/rpn_r50_fpn_1x_coco.py').model)
        check_class_count(toy.detector(rpn), NAMES)


# ------------------------------------------------------------------ the run


def own_classes(cfg, *classes, splits=('train', 'val', 'test')):
    for split in splits:
        dataset = cfg[f'{split}_dataloader'].dataset
        dataset.metainfo = dict(classes=classes)


def wrapped(dataset, kind):
    def inner():
        return copy.deepcopy(dataset)

    if kind == 'RepeatDataset':
        return dict(type=kind, times=2, dataset=inner())
    if kind == 'ClassBalancedDataset':
        return dict(type=kind, oversample_thr=1e-3, dataset=inner())
    if kind == 'ConcatDataset':
        return dict(type=kind, datasets=[inner(), inner()])
    if kind == 'nested':
        each = wrapped(dataset, 'RepeatDataset')
        return dict(type='ConcatDataset', datasets=[each, inner()])
    outer = inner()
    pipeline, outer.pipeline = outer.pipeline[2:], outer.pipeline[:2]
    return dict(type='MultiImageMixDataset', dataset=outer, pipeline=pipeline)


WRAPPERS = (
    'RepeatDataset',
    'ClassBalancedDataset',
    'ConcatDataset',
    'MultiImageMixDataset',
    'nested',
)


@pytest.mark.parametrize('kind', [None, *WRAPPERS])
def test_a_run_is_refused_before_it_trains(tmp_path, kind):
    cfg = toy.distilled(tmp_path, toy.RETINANET, images=4)
    own_classes(cfg, 'person', 'bicycle', 'car')
    dataset = cfg.train_dataloader.dataset
    if kind is not None:
        cfg.train_dataloader.dataset = wrapped(dataset, kind)
    with pytest.raises(
        ConfigError,
        match=r'^model\.bbox_head\.num_classes: expected 3, .* names as many '
        r'classes \(person, bicycle, car\), got 80\. Set it to 3',
    ):
        toy.train(cfg)


def test_the_doctor_finds_it(tmp_path):
    cfg = toy.distilled(
        tmp_path, images=4, methods=dict(kd=dict(type='mmkd.KD'))
    )
    own_classes(cfg, 'person', 'bicycle', 'car')
    (finding,) = diagnose(cfg).findings
    assert finding.startswith('model.roi_head.bbox_head.num_classes: expected')


def test_the_validation_is_checked_too(tmp_path):
    cfg = toy.distilled(tmp_path, toy.RETINANET, images=4)
    own_classes(cfg, 'person', 'bicycle', splits=['val'])
    with pytest.raises(
        ConfigError,
        match=r'expected 2, because val_dataloader\.dataset names as many',
    ):
        toy.train(cfg)


def test_a_peer_is_checked_too():
    described = dict(config=dict(model=tiny.mask_rcnn()))
    methods = dict(dml=dict(type='mmkd.DML'))
    student = tiny.build(tiny.faster_rcnn(roi_head__bbox_head__num_classes=2))
    with pytest.raises(
        ConfigError,
        match=r'^distillation\.peers\.second: model\.roi_head\.bbox_head\.'
        r'num_classes, model\.roi_head\.mask_head\.num_classes: expected 2',
    ):
        build_distiller(
            dict(peers=dict(second=described), methods=methods),
            student,
            NAMES,
        )


# ----------------------------------------------------------------- joined data


def coco_set(**changes):
    dataset = toy.plain('unused', images=2).train_dataloader.dataset
    dataset.update(changes)
    return dataset


class TestJoined:
    def test_other_classes_are_refused(self):
        parts = [
            coco_set(metainfo=dict(classes=names))
            for names in (('person', 'bicycle'), ('bicycle', 'car'))
        ]
        dataset = DATASETS.build(
            dict(type='mmdet.ConcatDataset', datasets=parts)
        )
        with pytest.raises(
            ConfigError, match=r'different classes: person, bicycle \(2\) and '
        ):
            training_classes(dataset)

    def test_the_order_of_the_file_is_warned_of(self, logged):
        dataset = DATASETS.build(
            coco_set(metainfo=dict(classes=('car', 'person')))
        )
        assert training_classes(dataset) == ('person', 'car')
        (text,) = logged
        assert 'label 0 is person, not car' in text


@pytest.mark.parametrize('kind', ['palettes', *WRAPPERS])
def test_wrapped_data_trains(tmp_path, kind):
    cfg = toy.distilled(tmp_path, toy.RETINANET, images=4)
    dataset = cfg.train_dataloader.dataset
    if kind == 'palettes':
        joined = wrapped(dataset, 'ConcatDataset')
        joined['datasets'][1].metainfo = dict(palette=[(0, 0, 0)] * 80)
    else:
        joined = wrapped(dataset, kind)
    cfg.train_dataloader.dataset = joined
    cfg.train_dataloader.pop('batch_sampler')
    cfg.train_cfg = dict(
        type='IterBasedTrainLoop', max_iters=1, val_interval=5
    )
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    record = toy.Record()
    toy.train(cfg, record)
    assert record.losses[0]['hint.loss_hint'] > 0


# ------------------------------------------------------------- without names


class TestWithoutNames:
    def build(self, classes, **options):
        student = tiny.build(tiny.gfl())
        described = dict(
            config=dict(
                model=tiny.gfl(bbox_head__num_classes=len(classes)),
                test_dataloader=dict(
                    dataset=dict(metainfo=dict(classes=classes))
                ),
            ),
            checkpoint=None,
        )
        cfg = dict(teacher=described, methods=dict(kd=dict(type='mmkd.KD')))
        return student, build_distiller(cfg, student, None, **options)

    def test_those_of_the_teacher_are_assumed(self, logged):
        student, distiller = self.build(tiny.CLASSES)
        assert distiller.teacher.class_map.student == tiny.CLASSES
        assert any("The teacher's are assumed: cat, dog" in t for t in logged)
        distiller.attach()
        losses = student.loss(*tiny.batch_for(student))
        assert torch.isfinite(losses['kd.loss_cls'])

    def test_of_another_number_they_are_not(self):
        with pytest.raises(ConfigError, match='it has 2, the student 3'):
            self.build(('cat', 'dog'))


# ------------------------------------------------------------------ in the log


def test_what_the_teacher_does_not_know_is_said(logged):
    student = tiny.build(tiny.gfl())
    described = dict(
        config=dict(
            model=tiny.gfl(),
            test_dataloader=dict(
                dataset=dict(metainfo=dict(classes=('couch', 'Cat', 'cow')))
            ),
        ),
        checkpoint=None,
    )

    def build(**options):
        logged.clear()
        return build_distiller(
            dict(
                teacher=described | options,
                methods=dict(kd=dict(type='mmkd.KD')),
            ),
            student,
            ('sofa', 'cat', 'dog'),
        ).teacher.class_map

    assert build().shared == ['sofa', 'cat']
    assert 'teaches nothing about 1 of 3 classes' in logged[-1]
    assert ': dog. ' in logged[-1]
    mapped = build(class_map=dict(dog='cow', sofa=None))
    assert mapped.shared == ['cat', 'dog']
    assert not any('teaches nothing about' in text for text in logged)


class TestAliases:
    """``distillation.class_aliases``."""

    def build(self, aliases, *classes):
        teachers = [
            dict(
                config=dict(
                    model=tiny.gfl(),
                    test_dataloader=dict(
                        dataset=dict(metainfo=dict(classes=names))
                    ),
                ),
                checkpoint=None,
            )
            for names in classes
        ]
        return build_distiller(
            dict(
                teacher=teachers,
                methods=dict(kd=dict(type='mmkd.KD')),
                class_aliases=aliases,
            ),
            tiny.build(tiny.gfl()),
            ('sofa', 'bike', 'dog'),
        )

    def test_every_teacher_is_read_by_them(self, logged):
        distiller = self.build(
            dict(bike='bicycle', pooch='dog'),
            ('couch', 'bicycle', 'cow'),
            ('yak', 'Pooch', 'Bike'),
        )
        shared = [
            t.class_map.shared for t in distiller.teacher.each().values()
        ]
        assert shared == [['sofa', 'bike'], ['bike', 'dog']]
        told = [text for text in logged if 'teaches nothing about' in text]
        assert len(told) == 2
        assert ': dog. ' in told[0]
        assert ': sofa. ' in told[1]
        assert 'class_aliases in distillation' in told[0]
        assert not any('class_aliases: ' in text for text in logged)

    def test_those_that_change_nothing_are_named(self, logged):
        self.build(
            dict(bike='bicycle', bkie='bicycle'), ('couch', 'bicycle', 'dog')
        )
        (text,) = [text for text in logged if 'class_aliases: ' in text]
        assert 'bkie changes nothing' in text

    @pytest.mark.parametrize('aliases', [['bike'], dict(bike=None), 'bike'])
    def test_no_dict_of_names(self, aliases):
        with pytest.raises(ConfigError, match="such as dict\\(bike='bicycle'"):
            self.build(aliases, ('couch', 'bicycle', 'dog'))
