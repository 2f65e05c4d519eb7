"""One command: config, examination, training."""

import json
import subprocess
import sys

import pytest
import torch
import toy
from _distill import (
    config_text,
    find_data,
    find_method,
    methods,
    teacher_options,
)
from mmengine.config import Config

from mmkd.registry import METHODS
from mmkd.utils import ConfigError

BCCD = toy.DATA / 'bccd'
COCO = toy.DATA / 'coco_tiny'
STUDENT = f'mmdet::{toy.RETINANET}'
INDEXED = 'retinanet_r101_fpn_2x_coco'


def based_on(base, folder):
    """A config with nothing but a stock base."""
    path = folder / 'stock.py'
    path.write_text(f"_base_ = ['mmdet::{base}']")
    return Config.fromfile(path)


class TestMethods:
    def test_each_has_a_short_name(self):
        names = methods()
        own = {
            name
            for name, cls in METHODS.module_dict.items()
            if cls.__module__.startswith('mmkd.')
        }
        assert {cls.__name__ for cls in names.values()} == own
        assert all(name == name.lower() for name in names)
        assert find_method('pkd') == 'mmkd.PKD'
        assert find_method('frcnn') == 'mmkd.FasterRCNNDistillation'

    def test_the_nearest_name(self):
        with pytest.raises(ConfigError, match='Did you mean "crosskd"'):
            find_method('croskd')

    def test_networks_that_train_together(self):
        with pytest.raises(ConfigError, match='colad ties networks'):
            find_method('colad')


class TestTeacher:
    def test_a_name_of_the_index(self):
        assert teacher_options(INDEXED, None) == {'name': INDEXED}

    def test_an_unknown_name(self):
        with pytest.raises(ConfigError, match=f'Nearest: .*{INDEXED}'):
            teacher_options('retinanet_r101_fpn_2x_coc', None)

    def test_a_config_needs_weights(self):
        with pytest.raises(ConfigError, match='--teacher-checkpoint'):
            teacher_options(STUDENT, None)


class TestData:
    @pytest.mark.usefixtures('shared_data')
    def test_voc_layout(self):
        data = find_data(str(BCCD))
        assert data.classes == ('Platelets', 'RBC', 'WBC')
        assert data.train['ann_file'] == 'BCCD/ImageSets/Main/train.txt'
        assert data.val['ann_file'] == 'BCCD/ImageSets/Main/val.txt'
        assert find_data(str(BCCD / 'BCCD')) == data

    @pytest.mark.usefixtures('shared_data')
    def test_coco_layout(self):
        data = find_data(str(COCO))
        assert list(data.classes) == toy.stock_classes()
        assert data.train['data_prefix'] == dict(img='train2017/')
        assert data.metric['ann_file'].endswith('instances_val2017.json')

    def test_another_layout(self, tmp_path):
        with pytest.raises(ConfigError, match='no data in a known layout'):
            find_data(str(tmp_path))
        (tmp_path / 'annotations').mkdir()
        with pytest.raises(ConfigError, match='split "train"'):
            find_data(str(tmp_path))

    @pytest.mark.parametrize(
        'base', [toy.RETINANET, 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py']
    )
    @pytest.mark.usefixtures('shared_data')
    def test_the_student_gets_its_classes(self, tmp_path, base):
        text = config_text(
            f'mmdet::{base}',
            {'name': INDEXED},
            'pkd',
            find_data(str(BCCD)),
        )
        path = tmp_path / 'config.py'
        path.write_text(text)
        cfg, stock = Config.fromfile(path), based_on(base, tmp_path)
        model = cfg.model.to_dict()
        heads = model.get('roi_head', model)['bbox_head']
        for head in heads if isinstance(heads, list) else [heads]:
            assert head['num_classes'] == 3
            head['num_classes'] = 80
        assert model == stock.model.to_dict()
        dataset = cfg.train_dataloader.dataset
        types = [step.type for step in dataset.pipeline]
        theirs = stock.train_dataloader.dataset.pipeline
        assert types == [step.type for step in theirs]
        assert tuple(dataset.metainfo.classes) == ('Platelets', 'RBC', 'WBC')
        assert cfg.test_dataloader.dataset == cfg.val_dataloader.dataset
        assert 'ann_file' not in cfg.val_evaluator

    def test_a_student_that_mixes_images(self):
        name = 'mmdet::yolox/yolox_s_8xb8-300e_coco.py'
        with pytest.raises(ConfigError, match='mixes images'):
            config_text(name, {}, 'pkd', object())


def test_without_data_it_is_the_students_own(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text(config_text(STUDENT, {'name': INDEXED}, 'pkd'))
    cfg = Config.fromfile(path)
    stock = based_on(toy.RETINANET, tmp_path)
    assert cfg.distillation == dict(
        teacher=dict(name=INDEXED), methods=dict(pkd=dict(type='mmkd.PKD'))
    )
    own = {'runner_type', 'distillation'}
    assert {k: v for k, v in cfg.items() if k not in own} == dict(stock)


def run(*arguments):
    return subprocess.run(
        [sys.executable, 'tools/distill.py', *map(str, arguments)],
        cwd=toy.ROOT,
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


@pytest.mark.usefixtures('shared_data')
class TestCommand:
    def prepare(self, folder):
        """A student on a few photos, and a saved teacher of its kind."""
        cfg = toy.plain(folder, toy.RETINANET, images=4)
        cfg.model.bbox_head.stacked_convs = 1
        student = toy.write(cfg, folder / 'student.py')
        torch.manual_seed(1)
        network = toy.detector(cfg.model.to_dict())
        checkpoint = folder / 'teacher.pth'
        torch.save(dict(state_dict=network.state_dict()), checkpoint)
        return [
            *('--student', student, '--teacher', student),
            *('--teacher-checkpoint', checkpoint, '--method', 'cwd'),
            *('--work-dir', folder / 'out'),
        ]

    def test_examines_and_trains(self, tmp_path):
        done = run(*self.prepare(tmp_path))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        assert 'nothing found' in done.stdout
        assert 'cwd.loss_cwd' in done.stdout
        saved = toy.load(tmp_path / 'out/run/epoch_1.pth')
        cfg = Config.fromfile(tmp_path / 'student.py')
        stock = toy.detector(cfg.model)
        stock.load_state_dict(saved['state_dict'], strict=True)

    def test_findings_stop_it(self, tmp_path):
        arguments = self.prepare(tmp_path)
        option = 'distillation.methods.cwd.temprature=2'
        done = run(*arguments, '--cfg-options', option)
        assert done.returncode == 1
        assert 'no option "temprature"' in done.stdout
        assert not (tmp_path / 'out/run').exists()

    def test_an_edited_config_is_kept(self, tmp_path):
        arguments = [*self.prepare(tmp_path), '--no-train']
        edited = tmp_path / 'out/distill_cwd.py'
        edited.parent.mkdir()
        edited.write_text('# mine')
        done = run(*arguments)
        assert done.returncode == 1
        assert 'exists and differs' in done.stderr
        assert edited.read_text() == '# mine'


@pytest.mark.usefixtures('shared_data')
def test_the_doctors_command(tmp_path):
    cfg = toy.distilled(tmp_path, toy.RETINANET)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    path = toy.write(cfg, tmp_path / 'config.py')
    result = tmp_path / 'result.json'
    job = toy.Job(tmp_path / 'log', 'tools/doctor.py', path, '--json', result)
    assert job.wait() == 1
    content = json.loads(result.read_text())
    assert content['findings'][0].startswith('the teacher is untrained')
    assert content['losses']['hint.loss_hint']['value'] > 0
    assert content['findings'][0] in job.text()
