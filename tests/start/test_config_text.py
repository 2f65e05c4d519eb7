"""Other data, other schedules and options in the file that is kept."""

import pytest
from mmengine.config import Config

from mmkd.data.layouts import find_data
from mmkd.errors import ConfigError
from mmkd.start.command import parse_args
from mmkd.start.config_text import (
    Wishes,
    check_images,
    is_as_written,
    stock_name,
    teacher_options,
    write_config,
)
from mmkd.start.text import plain
from tests.helpers import made_data, toy

TEACHER = {'name': 'retinanet_r101_fpn_2x_coco'}
YOLOX = 'yolox/yolox_s_8xb8-300e_coco.py'
RTMDET = 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'


@pytest.fixture(scope='module')
def voc():
    return find_data(str(made_data.root() / 'bccd'))


@pytest.fixture(scope='module')
def coco():
    return find_data(str(made_data.root() / 'coco_tiny'))


def written(base, data=None, folder=None, **wishes):
    """The config that is written, read again, and what was said."""
    name = base if str(base).startswith('/') else f'mmdet::{base}'
    result = write_config(
        str(name), TEACHER, ['pkd'], data, wishes=Wishes(**wishes), tried=False
    )
    assert max(map(len, result.text.splitlines())) < 100
    assert is_as_written(result.text)
    assert not is_as_written(result.text.replace('loss_weight', 'weight', 1))
    return Config.fromstring(result.text, '.py'), '\n'.join(result.chosen)


def student(folder, **changes):
    """A student of one's own."""
    cfg = toy.plain(folder, toy.RETINANET)
    cfg.merge_from_dict(changes)
    return str(toy.write(cfg, folder / 'own.py'))


class TestData:
    def test_a_mosaic_is_made_of_the_new_images(self, voc):
        cfg, _ = written(YOLOX, voc)
        dataset = cfg.train_dataloader.dataset
        assert dataset.type == 'MultiImageMixDataset'
        assert next(s.type for s in dataset.pipeline) == 'Mosaic'
        assert dataset.dataset.type == 'VOCDataset'
        loads = [s.type for s in dataset.dataset.pipeline]
        assert loads == ['LoadImageFromFile', 'LoadAnnotations']
        assert cfg.model.bbox_head.num_classes == 3

    def test_data_sets_that_are_joined_become_one(self, voc):
        cfg, said = written('pascal_voc/retinanet_r50_fpn_1x_voc0712.py', voc)
        dataset = cfg.train_dataloader.dataset
        assert (dataset.type, dataset.times) == ('RepeatDataset', 3)
        assert dataset.dataset.type == 'VOCDataset'
        assert 'datasets' not in dataset.dataset
        steps = [s.type for s in dataset.dataset.pipeline]
        assert steps[-1] == 'PackDetInputs'
        assert 'RepeatDataset (times=3)' in said

    def test_classes_of_a_detr_and_of_stages(self, voc):
        cfg, _ = written('dino/dino-4scale_r50_8xb2-12e_coco.py', voc)
        assert cfg.model.bbox_head.num_classes == 3
        cfg, _ = written('cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py', voc)
        heads = cfg.model.roi_head.bbox_head
        assert [head.num_classes for head in heads] == [3] * 3

    def test_pipelines_without_names(self, tmp_path, voc):
        own = toy.plain(tmp_path, toy.RETINANET)
        for name in ('train_pipeline', 'test_pipeline', 'test_dataloader'):
            own.pop(name)
        path = toy.write(own, tmp_path / 'own.py')
        cfg, _ = written(path, voc)
        theirs = own.train_dataloader.dataset.pipeline
        assert cfg.train_dataloader.dataset.pipeline == theirs
        assert cfg.test_dataloader.dataset.type == 'VOCDataset'

    @pytest.mark.parametrize(
        ('base', 'told'),
        [
            ('mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'masks of the objects'),
            ('solov2/solov2_r50_fpn_1x_coco.py', 'masks of the objects'),
            ('htc/htc_r50_fpn_1x_coco.py', 'a semantic map'),
            ('panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py', 'a semantic map'),
            ('fast_rcnn/fast-rcnn_r50_fpn_1x_coco.py', 'proposals'),
        ],
    )
    def test_what_boxes_cannot_train(self, voc, base, told):
        with pytest.raises(ConfigError, match=f'trains on {told}.*boxes'):
            written(base, voc)

    def test_the_data_for_tests(self, voc):
        voc.test = dict(voc.val, ann_file='BCCD/ImageSets/Main/test.txt')
        cfg, _ = written(toy.RETINANET, voc)
        voc.test = None
        assert cfg.val_dataloader.dataset.ann_file.endswith('val.txt')
        dataset = cfg.test_dataloader.dataset
        assert dataset.ann_file.endswith('test.txt')
        assert dataset.test_mode


class TestMetric:
    @pytest.mark.parametrize(
        ('before', 'in_voc', 'in_coco'),
        [
            ('coco/bbox_mAP', 'pascal_voc/mAP', 'coco/bbox_mAP'),
            ('coco/bbox_mAP_50', 'pascal_voc/AP50', 'coco/bbox_mAP_50'),
            ('pascal_voc/mAP', 'pascal_voc/mAP', 'coco/bbox_mAP'),
            ('mine/bbox_mAP', 'pascal_voc/mAP', 'coco/bbox_mAP'),
            ('auto', 'auto', 'auto'),
        ],
    )
    def test_hooks_watch_what_it_gives(
        self, tmp_path, voc, coco, before, in_voc, in_coco
    ):
        base = student(
            tmp_path,
            **{
                'default_hooks.checkpoint.save_best': before,
                'custom_hooks': [
                    dict(type='EarlyStoppingHook', monitor=before)
                ],
                'param_scheduler': [
                    dict(type='ReduceOnPlateauLR', monitor=before)
                ],
                'val_evaluator.prefix': 'mine',
            },
        )
        for data, name in ((voc, in_voc), (coco, in_coco)):
            cfg, _ = written(base, data)
            assert cfg.default_hooks.checkpoint.save_best == name
            assert cfg.custom_hooks[0].monitor == name
            assert cfg.param_scheduler[0].monitor == name

    def test_the_best_checkpoint_is_kept(self, voc):
        saver = written(toy.RETINANET, voc)[0].default_hooks.checkpoint
        assert saver.save_best == 'pascal_voc/mAP'
        assert (saver.interval, saver.max_keep_ckpts) == (1, 3)

    def test_a_wish_that_it_does_not_give(self, voc):
        option = {'default_hooks.checkpoint.save_best': 'coco/bbox_mAP'}
        with pytest.raises(ConfigError, match='It gives pascal_voc/mAP'):
            written(toy.RETINANET, voc, options=option)


class TestSchedule:
    def test_it_is_stretched(self):
        cfg, _ = written(toy.RETINANET, epochs=50)
        assert cfg.train_cfg.max_epochs == 50
        assert cfg.train_cfg.val_interval == 1
        warm_up, steps = cfg.param_scheduler
        assert warm_up.end == 500
        assert (steps.end, steps.milestones) == (50, [33, 46])

    def test_what_hooks_count(self):
        cfg, _ = written(YOLOX, epochs=30)
        assert cfg.custom_hooks[0].num_last_epochs == 2
        assert [s.end for s in cfg.param_scheduler] == [1, 28, 30]
        assert cfg.default_hooks.checkpoint.interval == 1
        cfg, _ = written(RTMDET, epochs=30)
        switches = [h for h in cfg.custom_hooks if 'switch_epoch' in h]
        assert [h.switch_epoch for h in switches] == [28]
        assert cfg.param_scheduler[1].T_max == 15
        assert cfg.train_cfg.dynamic_intervals == [(28, 1)]

    def test_a_short_warm_up(self, voc):
        cfg, said = written(toy.RETINANET, voc)
        images = len(
            (made_data.root() / 'bccd/BCCD/ImageSets/Main/train.txt')
            .read_text()
            .split()
        )
        total = 12 * -(-images // 2)
        assert cfg.param_scheduler[0].end == total // 3
        assert f'{total:,} iterations of 2 images, which is short' in said

    def test_the_learning_rate_of_a_batch(self):
        cfg, said = written(toy.RETINANET, batch_size=4)
        assert cfg.train_dataloader.batch_size == 4
        assert cfg.auto_scale_lr == dict(enable=True, base_batch_size=16)
        assert 'times 0.25 on one GPU' in said
        # whose config has that of its base, for 2 images on 8 GPUs
        cfg, said = written(RTMDET, batch_size=8)
        assert cfg.auto_scale_lr.base_batch_size == 256
        assert 'times 0.0312' in said

    def test_by_iterations(self, tmp_path):
        loop = dict(type='IterBasedTrainLoop', max_iters=9, _delete_=True)
        base = tmp_path / 'own.py'
        base.write_text(
            f"_base_ = ['mmdet::{toy.RETINANET}']\ntrain_cfg = {loop!r}\n"
        )
        with pytest.raises(ConfigError, match='trains for 9 iterations'):
            written(base, epochs=3)


class TestOptions:
    def test_they_are_in_the_file(self, voc):
        options = {
            'optim_wrapper.optimizer.lr': 0.02,
            'optim_wrapper.clip_grad.max_norm': 35,
            'param_scheduler.1.gamma': 0.2,
            'test_dataloader.batch_size': 3,
            'train_dataloader.dataset.pipeline.3.prob': 0.1,
            'distillation.methods.pkd.loss_weight': 2.5,
            'randomness.seed': 7,
        }
        cfg, said = written(toy.RETINANET, voc, options=options)
        other, _ = written(toy.RETINANET, voc)
        other.merge_from_dict(options)
        assert plain(cfg) == plain(other)  # without scopes
        assert cfg.val_dataloader.batch_size == 1
        assert 'optim_wrapper.clip_grad.max_norm: new' in said

    @pytest.mark.parametrize(
        ('key', 'told'),
        [
            ('optim_wraper.optimizer.lr', 'Did you mean "optim_wrapper"'),
            ('optim_wrapper.optimzer.lr', 'Did you mean "optimizer"'),
            ('train_cfg.max_epoch', 'Did you mean "max_epochs"'),
            ('distillation.methods.pkd.weight', 'has no option "weight"'),
            ('distillation.methods.kd.loss_weight', 'has no option "kd"'),
            ('param_scheduler.2.gamma', 'is a list of 2.* got "2"'),
            ('train_cfg.max_epochs.x', 'max_epochs is 12, which has no "x"'),
            ('nothing', 'nothing reads the key "nothing"'),
        ],
    )
    def test_a_key_that_hits_nothing(self, key, told):
        with pytest.raises(ConfigError, match=told):
            written(toy.RETINANET, options={key: 1})

    def test_weights_to_begin_with(self):
        cfg, _ = written(toy.RETINANET, load_from='/w.pth')
        assert cfg.load_from == '/w.pth'


def test_a_student_from_the_model_index():
    name = stock_name('retinanet_r50_fpn_1x_coco')
    assert name == f'mmdet::{toy.RETINANET}'


# --------------------------------------- teachers that are files or functions


@pytest.mark.parametrize(
    ('name', 'kind'),
    [
        ('a.onnx', 'mmkd.OnnxDetector'),
        ('a.json', 'mmkd.DetectionsFile'),
        ('a.CSV', 'mmkd.DetectionsFile'),
    ],
)
def test_a_teacher_that_is_a_file(tmp_path, monkeypatch, name, kind):
    """It is known by its name; paths are made absolute."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).touch()
    options = parse_args(
        [
            *('--student', 'a', '--method', 'pkd', '--teacher', name),
            *('--teacher-options', 'annotations=b.json', 'mean=[1,2,3]'),
        ]
    ).teacher_options
    assert teacher_options(name, None, options=options) == dict(
        type=kind,
        file=str(tmp_path / name),
        annotations=str(tmp_path / 'b.json'),
        mean=[1, 2, 3],
    )


def test_a_teacher_that_is_a_function():
    found = teacher_options('pkg.mod:detect', None, options=dict(batched=True))
    assert found == dict(
        type='mmkd.PythonDetector', function='pkg.mod:detect', batched=True
    )


def test_options_of_a_detector():
    found = teacher_options(TEACHER['name'], None, options=dict(fold_bn=True))
    assert found == TEACHER | dict(fold_bn=True)


def test_files_that_are_missing_or_need_no_checkpoint(tmp_path):
    (tmp_path / 'boxes.json').touch()
    with pytest.raises(ConfigError, match=r'Did you mean ".*boxes\.json"'):
        teacher_options(str(tmp_path / 'boxs.json'), None)
    with pytest.raises(ConfigError, match='leave out --teacher-checkpoint'):
        teacher_options('a:b', 'weights.pth')


def test_the_config_has_the_teacher_and_its_options(tmp_path):
    (tmp_path / 'a.onnx').touch()
    options = teacher_options(
        str(tmp_path / 'a.onnx'), None, options=dict(classes='coco', size=640)
    )
    found = write_config(f'mmdet::{toy.RETINANET}', options, ['pkd'])
    cfg = Config.fromstring(found.text, '.py')
    assert cfg.distillation.teacher.to_dict() == options


class TestUnlabelled:
    WISH = dict(dataset='/images', weight=2.0, alone=False)

    def test_every_option_is_written(self, tmp_path):
        text = write_config(
            student(tmp_path),
            dict(name='retinanet_r101_fpn_2x_coco'),
            ['pkd', 'pseudolabels'],
            wishes=Wishes(batch_size=3, unlabelled=self.WISH),
            tried=False,
        ).text
        cfg = Config.fromstring(text, '.py')
        assert cfg.distillation.unlabelled == dict(
            dataset='/images',
            batch_size=3,
            num_workers=cfg.train_dataloader.num_workers,
            weight=2.0,
            score_thr=0.5,
            alone=False,
        )
        assert cfg.distillation.methods.pseudolabels.score_thr == 0.9

    def test_methods_that_need_labels(self, tmp_path):
        with pytest.raises(ConfigError, match=r'dkd needs labels.*pseudolab'):
            write_config(
                student(tmp_path),
                dict(name='retinanet_r101_fpn_2x_coco'),
                ['dkd'],
                wishes=Wishes(unlabelled=self.WISH),
                tried=False,
            )

    def test_methods_of_unlabelled_images_without_any(self):
        with pytest.raises(ConfigError, match='pseudolabels learns from ima'):
            check_images(['pkd', 'pseudolabels'], None)
        check_images(['pkd'], None)
        check_images(['pseudolabels'], self.WISH)
