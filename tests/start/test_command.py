"""One command: config, examination, training."""

import copy
import functools
import json
import subprocess
import sys

import pytest
import torch
from mmengine.config import Config

from mmkd.doctor import diagnose
from mmkd.errors import ConfigError
from mmkd.registry import METHODS, MODELS
from mmkd.start.config_text import (
    _model_of,
    config_text,
    find_method,
    methods,
    options_of,
    published,
    teacher_options,
)
from mmkd.start.folders import find_data
from mmkd.utils import build_checked, option_names
from tests.helpers import made_data, toy

STUDENT = f'mmdet::{toy.RETINANET}'
INDEXED = 'retinanet_r101_fpn_2x_coco'
FASTER = 'faster-rcnn_r101_fpn_2x_coco'
FCOS = 'fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py'
PAIRS = {
    toy.FASTER_RCNN: FASTER,
    toy.RETINANET: INDEXED,
    FCOS: 'fcos_r101-caffe_fpn_gn-head-1x_coco',
}
"""Students with RoIs, with anchors and without to teachers."""
TAUGHT = [
    name
    for name, cls in methods().items()
    if cls.__module__.startswith('mmkd.') and cls.learns_from == 'teacher'
]


def based_on(base, folder):
    """A config with nothing but a stock base."""
    path = folder / 'stock.py'
    path.write_text(f"_base_ = ['mmdet::{base}']")
    return Config.fromfile(path)


class TestMethods:
    def test_each_has_a_short_name(self):
        names = methods()
        own = {
            cls.__name__  # an older name of it is an alias
            for cls in METHODS.module_dict.values()
            if cls.__module__.startswith('mmkd.')
        }
        found = {cls.__name__ for cls in names.values()}
        assert found >= own  # other tests register methods of their own
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
    def test_voc_layout(self, photos):
        data = find_data(str(photos / 'bccd'))
        assert data.classes == ('Platelets', 'RBC', 'WBC')
        assert data.train['ann_file'] == 'BCCD/ImageSets/Main/train.txt'
        assert data.val['ann_file'] == 'BCCD/ImageSets/Main/val.txt'
        assert find_data(str(photos / 'bccd' / 'BCCD')) == data

    def test_coco_layout(self, photos):
        data = find_data(str(photos / 'coco_tiny'))
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
    def test_the_student_gets_its_classes(self, tmp_path, base):
        text = config_text(
            f'mmdet::{base}',
            {'name': INDEXED},
            'pkd',
            find_data(str(made_data.root() / 'bccd')),
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
    assert cfg.distillation.teacher == dict(name=INDEXED)
    assert list(cfg.distillation.methods) == ['pkd']
    own = {'runner_type', 'distillation'}
    assert {k: v for k, v in cfg.items() if k not in own} == dict(stock)


@functools.cache
def model_of(**network):
    return _model_of(network)


def options_for(method, student, teacher):
    """All options of a method, for a student's config and a teacher's name."""
    name = find_method(method)
    networks = (model_of(config=student), model_of(name=teacher))
    return options_of(name, published(name, *networks))


class TestOptions:
    @pytest.mark.parametrize(
        ('method', 'student', 'expected'),
        [
            ('mgd', toy.FASTER_RCNN, dict(mask_ratio=0.45, loss_weight=5e-7)),
            ('mgd', toy.RETINANET, dict(mask_ratio=0.65, loss_weight=2e-5)),
            ('mgd', FCOS, dict(mask_ratio=0.65, loss_weight=2e-5)),
            (
                'dkd',
                toy.FASTER_RCNN,
                dict(alpha=1.0, beta=0.25, temperature=1.0),
            ),
            ('dkd', toy.RETINANET, dict(alpha=1.0, beta=8.0, temperature=4.0)),
            (
                'fgd',
                toy.FASTER_RCNN,
                dict(
                    temperature=0.5,
                    foreground_weight=5e-5,
                    background_weight=2.5e-5,
                    attention_weight=5e-5,
                    relation_weight=5e-7,
                    levels=[0, 1, 2, 3],
                ),
            ),
            (
                'fgd',
                FCOS,
                dict(
                    temperature=0.8,
                    foreground_weight=1.6e-3,
                    background_weight=8e-4,
                    attention_weight=8e-4,
                    relation_weight=8e-6,
                    levels=None,
                ),
            ),
            ('pkd', toy.FASTER_RCNN, dict(levels=[0, 1, 2, 3])),
            ('pkd', toy.RETINANET, dict(levels=None, loss_weight=6.0)),
        ],
    )
    def test_as_published(self, method, student, expected):
        options = options_for(method, f'mmdet::{student}', PAIRS[student])
        assert {key: options[key] for key in expected} == expected

    @pytest.mark.parametrize(
        ('config', 'method'),
        [
            *((f'{n}_retinanet_r50', n) for n in ('cwd', 'dist', 'fgd', 'kd')),
            *((f'{n}_retinanet_r50', n) for n in ('mgd', 'tat')),
            *((f'{n}_faster_rcnn_r50', n) for n in ('dkd', 'fbkd', 'pkd')),
            *((f'{n}_gfl_r50', n) for n in ('crosskd', 'ld')),
            *((f'{n}_r50', n) for n in ('lad', 'solad')),
            ('soft_label_r50', 'soft_label'),
            ('faster_rcnn_kd_r50', 'frcnn'),
        ],
    )
    def test_as_in_the_shipped_config(self, config, method):
        path = toy.ROOT / f'configs/{config}.py'
        cfg = Config.fromfile(path).distillation
        (theirs,) = cfg.methods.values()
        ours = options_for(method, str(path), cfg.teacher.name)
        assert same_where_given(theirs.to_dict(), ours)

    @pytest.mark.parametrize('student', PAIRS)
    def test_every_one_is_there(self, student):
        for method in TAUGHT:
            options = options_for(method, f'mmdet::{student}', PAIRS[student])
            build_checked(METHODS, options, method)
            check_complete(options)

    @pytest.mark.parametrize('method', ['frcnn', 'fbkd'])
    def test_they_are_written(self, tmp_path, method):
        student, teacher = f'mmdet::{toy.FASTER_RCNN}', PAIRS[toy.FASTER_RCNN]
        path = tmp_path / 'config.py'
        path.write_text(config_text(student, {'name': teacher}, method))
        options = options_for(method, student, teacher)
        assert Config.fromfile(path).distillation.methods == {method: options}
        assert max(map(len, path.read_text().splitlines())) < 80

    def test_levels_of_a_detector_without_a_neck(self):
        student = 'mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py'
        options = options_for('mgd', student, FASTER)
        assert options['levels'] is None
        assert options['loss_weight'] == 5e-7

    def test_of_a_head_that_only_one_has(self):
        """The teacher may have no centerness, which CrossKD would refuse."""
        atss = 'mmdet::atss/atss_r50_fpn_1x_coco.py'
        both = options_for('crosskd', atss, 'atss_r101_fpn_1x_coco')
        one = options_for('crosskd', atss, 'gfl_r101_fpn_ms-2x_coco')
        assert (both['quality_weight'], one['quality_weight']) == (1.0, 0.0)

    @pytest.mark.parametrize(
        ('method', 'base'),
        [
            ('mgd', toy.FASTER_RCNN),
            ('frcnn', toy.FASTER_RCNN),
            ('cwd', FCOS),
        ],
    )
    def test_the_doctor_finds_nothing(self, tmp_path, method, base):
        student, checkpoint = saved(tmp_path, toy.plain(tmp_path, base))
        teacher = dict(config=str(student), checkpoint=str(checkpoint))
        path = tmp_path / 'config.py'
        path.write_text(config_text(str(student), teacher, method))
        assert not diagnose(Config.fromfile(path)).findings


def same_where_given(given, found):
    """Whether nested dicts have the same values, except what is not given."""
    if isinstance(given, dict):
        return all(same_where_given(v, found[k]) for k, v in given.items())
    if isinstance(given, list):
        found = list(found)
    return given == found


def check_complete(options):
    """Check that nothing that a class can be built with is left out."""
    name = options['type'].removeprefix('mmkd.')
    MODELS.import_from_location()
    cls = {**MODELS.module_dict, **METHODS.module_dict}[name]
    known = option_names(cls) - {'self', 'features'}
    if not getattr(cls, 'adaptable', True):
        known -= {'adapt'}  # which is refused
    assert set(options) == known | {'type'}
    for value in options.values():
        if isinstance(value, dict) and 'type' in value:
            check_complete(value)


def saved(folder, cfg):
    """A config as a file, and a checkpoint of such a network."""
    torch.manual_seed(1)
    network = toy.detector(copy.deepcopy(cfg.model))
    checkpoint = folder / 'teacher.pth'
    torch.save(dict(state_dict=network.state_dict()), checkpoint)
    return toy.write(cfg, folder / 'student.py'), checkpoint


def run(*arguments):
    return subprocess.run(
        [sys.executable, 'tools/distill.py', *map(str, arguments)],
        cwd=toy.ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


class TestCommand:
    def prepare(self, folder):
        """A student on a few photos, and a saved teacher of its kind."""
        cfg = toy.plain(folder, toy.RETINANET, images=4)
        cfg.model.bbox_head.stacked_convs = 1
        student, checkpoint = saved(folder, cfg)
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
