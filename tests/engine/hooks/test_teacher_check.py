"""The teacher's metrics on the student's validation data."""

import copy
import json
from pathlib import Path

import pytest
import torch
from mmdet.models import RetinaNet
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.structures import InstanceData

from mmkd.engine.hooks import TeacherCheckHook
from mmkd.errors import ConfigError
from tests.helpers import made_data, toy


@MODELS.register_module(force=True)  # imported by two names
class Oracle(RetinaNet):
    """Finds most of the objects, in the order of its own classes."""

    flipped = True

    def predict(self, batch_inputs, batch_data_samples, rescale=True):
        for sample in batch_data_samples:
            truth = sample.gt_instances
            noise = torch.Generator().manual_seed(int(sample.img_id))
            boxes = getattr(truth.bboxes, 'tensor', truth.bboxes)
            sizes = boxes[:, 2:] - boxes[:, :2]
            shift = torch.rand(len(boxes), 2, generator=noise) * 0.2 * sizes
            labels = truth.labels
            sample.pred_instances = InstanceData(
                bboxes=boxes + shift.repeat(1, 2),
                scores=torch.rand(len(boxes), generator=noise),
                labels=79 - labels if self.flipped else labels,
            )[::2]
        torch.rand(1)  # as some detectors do
        return batch_data_samples


@MODELS.register_module(force=True)  # imported by two names
class OracleInOrder(Oracle):
    flipped = False


class Scalars(Hook):
    """What is given to the visualisers."""

    priority = 'HIGHEST'

    def before_train(self, runner):
        self.seen = {}
        backend = next(iter(runner.visualizer._vis_backends.values()))
        original = backend.add_scalars

        def add(scalars, *args, **kwargs):
            self.seen.update(scalars)
            return original(scalars, *args, **kwargs)

        backend.add_scalars = add


def teacher_of(tmp_path, base, kind):
    """A saved teacher; its classes are those of COCO, or reversed."""
    cfg = toy.plain(tmp_path, base)
    cfg.model.type = kind
    classes = toy.stock_classes()
    model = toy.detector(cfg.model)
    path = tmp_path / f'{kind}.pth'
    names = classes[::-1] if model.flipped else classes
    meta = dict(dataset_meta=dict(classes=names))
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)
    return cfg, path


def expected_metrics(tmp_path, images):
    """MMDetection's own test of the teacher on the first images alone."""
    cfg, path = teacher_of(tmp_path, toy.RETINANET, 'OracleInOrder')
    annotations = json.loads(Path(cfg.test_evaluator.ann_file).read_text())
    kept = annotations['images'][:images]
    ids = {image['id'] for image in kept}
    annotations['images'] = kept
    annotations['annotations'] = [
        a for a in annotations['annotations'] if a['image_id'] in ids
    ]
    file = tmp_path / 'some.json'
    file.write_text(json.dumps(annotations))
    cfg.test_dataloader.dataset.ann_file = str(file)
    cfg.test_dataloader.dataset.indices = None
    cfg.test_evaluator.ann_file = str(file)
    cfg.load_from = str(path)
    return toy.build(cfg).test()


class TestMetrics:
    @pytest.mark.parametrize(('evaluate', 'images'), [(3, 3), (100, 6)])
    def test_are_those_of_mmdetection_s_test(self, tmp_path, evaluate, images):
        cfg = toy.distilled(tmp_path, toy.RETINANET, images=2)
        teacher, path = teacher_of(tmp_path, toy.RETINANET, 'Oracle')
        cfg.distillation.teacher = dict(
            config=toy.teacher_config(teacher), checkpoint=str(path)
        )
        loader = cfg.val_dataloader
        loader.batch_size = 2
        # mmdet's own filter keeps the order of the file
        loader.dataset.indices = list(range(6))
        records, scalars = [], Scalars()
        for hooks in ([], [dict(type='mmkd.TeacherCheckHook')]):
            each = copy.deepcopy(cfg)
            if hooks:
                hooks[0]['evaluate'] = evaluate
            each.custom_hooks = hooks
            records.append(toy.Record())
            toy.train(each, records[-1], scalars)

        expected = expected_metrics(tmp_path, images)
        found = {
            k.removeprefix('teacher/'): v
            for k, v in scalars.seen.items()
            if k.startswith('teacher/')
        }
        assert found == pytest.approx(expected)
        assert 0.05 < found['coco/bbox_mAP'] < 0.95
        # The training is the one without the hook, to the last number drawn.
        assert records[0].losses == records[1].losses
        assert toy.same(records[0].states, records[1].states)
        assert toy.same(records[0].metrics, records[1].metrics)

    def test_each_of_several_is_named(self, tmp_path):
        cfg = toy.distilled(tmp_path, toy.RETINANET, images=2)
        teacher, path = teacher_of(tmp_path, toy.RETINANET, 'Oracle')
        described = dict(
            config=toy.teacher_config(teacher), checkpoint=str(path)
        )
        cfg.distillation.teacher = [
            toy.untrained(cfg),
            dict(described, label='oracle'),
        ]
        cfg.val_dataloader.dataset.indices = list(range(3))
        cfg.custom_hooks = [dict(type='mmkd.TeacherCheckHook', evaluate=3)]
        scalars = Scalars()
        toy.train(cfg, scalars)
        expected = expected_metrics(tmp_path, 3)
        found = {
            k.removeprefix('teacher_oracle/'): v
            for k, v in scalars.seen.items()
            if k.startswith('teacher_oracle/')
        }
        assert found == pytest.approx(expected)
        assert found['coco/bbox_mAP'] > 0.05
        # one of this run, one of the run of MMDetection's own metrics
        log = ''.join(p.read_text() for p in tmp_path.glob('*/*.log'))
        for name, kind in (
            ('teacher_1', 'RetinaNet'),
            ('teacher_oracle', 'Oracle'),
        ):
            assert f'The {name} on 3 validation images' in log
            assert f'the {name} is {kind}' in log

    def test_voc_with_two_metrics(self, tmp_path, repo_root):
        cfg = Config.fromfile(repo_root / 'configs/bccd/distilled.py')
        for split in ('train', 'val', 'test'):
            dataset = cfg[f'{split}_dataloader'].dataset
            dataset.data_root = f'{made_data.root()}/bccd/'
            dataset.indices = 2
            for step in dataset.pipeline:
                if step.type == 'Resize':
                    step.scale = toy.SCALE
        cfg.val_dataloader.dataset.indices = 3
        cfg.model.test_cfg.rcnn.score_thr = 0.0
        cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
        cfg.work_dir = str(tmp_path)
        teacher = toy.detector(cfg.model)
        path = tmp_path / 'teacher.pth'
        meta = dict(dataset_meta=dict(classes=['RBC', 'WBC', 'Platelets']))
        torch.save(dict(meta=meta, state_dict=teacher.state_dict()), path)
        cfg.distillation.teacher = dict(
            config=toy.teacher_config(cfg), checkpoint=str(path)
        )
        cfg.custom_hooks = [dict(type='mmkd.TeacherCheckHook', evaluate=2)]
        scalars = Scalars()
        toy.train(copy.deepcopy(cfg), scalars)
        cfg.test_dataloader = cfg.val_dataloader
        cfg.test_dataloader.dataset.indices = 2
        cfg.test_evaluator = cfg.val_evaluator
        cfg.load_from = str(path)
        expected = toy.build(cfg).test()
        assert {'coco/bbox_mAP', 'pascal_voc/mAP'} <= expected.keys()
        for key, value in expected.items():
            assert scalars.seen[f'teacher/{key}'] == pytest.approx(value), key


class TestJoinedData:
    """Two sets in one: as MMDetection tests the teacher on both."""

    def config(self, tmp_path, counts, palette):
        cfg = toy.distilled(tmp_path, toy.RETINANET, images=2)
        teacher, path = teacher_of(tmp_path, toy.RETINANET, 'Oracle')
        cfg.distillation.teacher = dict(
            config=toy.teacher_config(teacher), checkpoint=str(path)
        )
        sets, metrics = [], []
        for number, count in enumerate(counts):
            split = ('val2017', 'train2017')[number]
            dataset = copy.deepcopy(cfg.val_dataloader.dataset)
            root = dataset.data_root
            dataset.ann_file = self.cut(tmp_path, root, split, count)
            dataset.data_root = None
            dataset.data_prefix = dict(img=f'{root}{split}/')
            dataset.indices = None
            if palette and number:
                dataset.metainfo = dict(palette=[(0, 0, 0)] * 80)
            sets.append(dataset)
            metrics.append(
                dict(cfg.val_evaluator.to_dict(), ann_file=dataset.ann_file)
            )
        cfg.val_dataloader.dataset = dict(type='ConcatDataset', datasets=sets)
        cfg.val_evaluator = dict(
            type='MultiDatasetsEvaluator',
            metrics=metrics,
            dataset_prefixes=['first', 'second'],
        )
        cfg.test_dataloader = copy.deepcopy(cfg.val_dataloader)
        cfg.test_evaluator = copy.deepcopy(cfg.val_evaluator)
        return cfg, path

    def cut(self, tmp_path, root, split, count):
        """The annotations of the first images alone."""
        path = Path(f'{root}annotations/instances_{split}.json')
        content = json.loads(path.read_text())
        content['images'] = content['images'][:count]
        ids = {image['id'] for image in content['images']}
        content['annotations'] = [
            a for a in content['annotations'] if a['image_id'] in ids
        ]
        own = tmp_path / f'{split}_{count}.json'
        own.write_text(json.dumps(content))
        return str(own)

    @pytest.mark.parametrize('palette', [False, True])
    def test_metrics_of_each(self, tmp_path, palette):
        cfg, path = self.config(tmp_path, (6, 3), palette)
        cfg.custom_hooks = [dict(type='mmkd.TeacherCheckHook', evaluate=6)]
        scalars = Scalars()
        toy.train(cfg, scalars)
        # In proportion: 4 of 6 and 2 of 3.
        alone, _ = self.config(tmp_path, (4, 2), palette)
        alone.model.type = 'OracleInOrder'
        alone.load_from = str(path)
        for name in ('runner_type', 'distillation'):
            alone.pop(name)
        expected = toy.build(alone).test()
        found = {
            k.removeprefix('teacher/'): v
            for k, v in scalars.seen.items()
            if k.startswith('teacher/')
        }
        assert found == pytest.approx(expected)
        for prefix in ('first', 'second'):
            assert found[f'{prefix}/coco/bbox_mAP'] > 0.05
        assert found['first/coco/bbox_mAP'] != found['second/coco/bbox_mAP']


def test_without_validation_data(tmp_path):
    cfg = toy.distilled(tmp_path, images=2)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    cfg.custom_hooks = [dict(type='mmkd.TeacherCheckHook')]
    with pytest.raises(ConfigError, match='needs a val_dataloader'):
        toy.train(cfg)


def test_evaluate():
    with pytest.raises(ConfigError, match='at least 1, got 0'):
        TeacherCheckHook(evaluate=0)
