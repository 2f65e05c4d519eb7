"""One command: config, examination, training."""

import copy
import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from mmkd.data.layouts import find_data
from mmkd.doctor import diagnose
from mmkd.errors import ConfigError, DataError, MMKDError, WorkDirError
from mmkd.methods import FeatureHint
from mmkd.registry import HOOKS, METHODS, MODELS
from mmkd.start.command import main
from mmkd.start.config_text import (
    Wishes,
    config_of,
    find_method,
    methods,
    options_of,
    published,
    teacher_options,
    write_config,
)
from mmkd.utils import build_checked, option_names
from tests.helpers import made_data, own_data, toy

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


def config_text(student, teacher, method, data=None):
    """The file for one method, without building the networks."""
    return write_config(student, teacher, [method], data, tried=False).text


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

    def write_categories(self, folder, categories, used):
        folder.mkdir(parents=True)
        content = dict(
            images=[dict(id=0, file_name='a.jpg', width=9, height=9)],
            annotations=[
                dict(id=i, image_id=0, category_id=c, bbox=[0, 0, 4, 4])
                | dict(area=16, iscrowd=0)
                for i, c in enumerate(used, 1)
            ],
            categories=[
                dict(id=i, name=name, supercategory=parent)
                for i, name, parent in categories
            ],
        )
        path = folder / '_annotations.coco.json'
        path.write_text(json.dumps(content))
        own_data.draw(folder / 'a.jpg', (9, 9))

    CELLS = ((0, 'cells', 'none'), (1, 'RBC', 'cells'), (2, 'WBC', 'cells'))

    @pytest.mark.parametrize(
        ('categories', 'used', 'classes', 'groups'),
        [
            (CELLS, [1], ('RBC', 'WBC'), ('cells',)),
            # the file's order is that of the labels
            (CELLS[::-1], [1], ('WBC', 'RBC'), ('cells',)),
            # it has objects, so it is a class
            (CELLS, [0, 1], ('cells', 'RBC', 'WBC'), ()),
            # named otherwise than the classes' supercategory
            (
                (
                    (0, 'data', 'none'),
                    (1, 'RBC', 'cells'),
                    (2, 'WBC', 'cells'),
                ),
                [1],
                ('RBC', 'WBC'),
                ('data',),
            ),
            # no groups: rare classes, as in a part of COCO
            (
                ((0, 'RBC', 'none'), (1, 'WBC', 'none')),
                [1],
                ('RBC', 'WBC'),
                (),
            ),
            (
                ((1, 'person', 'person'), (2, 'bicycle', 'vehicle')),
                [2],
                ('person', 'bicycle'),
                (),
            ),
        ],
    )
    def test_groups_of_roboflow_are_no_classes(
        self, tmp_path, categories, used, classes, groups
    ):
        for split in ('train', 'valid'):
            self.write_categories(tmp_path / split, categories, used)
        data = find_data(str(tmp_path))
        assert (data.classes, data.groups) == (classes, groups)
        assert data.train['data_prefix'] == dict(img='train/')
        assert data.val['ann_file'] == 'valid/_annotations.coco.json'

    def test_a_group_with_objects_in_the_validation_is_a_class(self, tmp_path):
        self.write_categories(tmp_path / 'train', self.CELLS, [1])
        self.write_categories(tmp_path / 'valid', self.CELLS, [0])
        assert find_data(str(tmp_path)).groups == ()

    def test_a_name_of_two_categories(self, tmp_path):
        categories = ((0, 'cat', 'none'), (1, 'cat', 'cat'))
        for split in ('train', 'valid'):
            self.write_categories(tmp_path / split, categories, [1])
        with pytest.raises(DataError, match='more than one category of cat'):
            find_data(str(tmp_path))

    def test_a_group_is_said(self, tmp_path, monkeypatch, capsys):
        for split in ('train', 'valid'):
            self.write_categories(tmp_path / split, self.CELLS, [1])
        monkeypatch.setattr('mmkd.doctor.command.main', lambda _: 0)
        monkeypatch.setattr('mmkd.start.command._train', lambda *_: 0)
        options = {
            'student': STUDENT,
            'teacher': INDEXED,
            'teacher-prefix': 'student',
            'method': 'pkd',
            'data': tmp_path,
            'work-dir': tmp_path / 'run',
        }
        given = [f'--{name}={value}' for name, value in options.items()]
        main([*given, '--verbose'])
        text = capsys.readouterr().out
        assert text.startswith('cells: a category without objects that groups')
        assert "classes = ('RBC', 'WBC')" in text
        assert "prefix='student'" in text

    def test_another_layout(self, tmp_path):
        with pytest.raises(DataError, match='got an empty folder'):
            find_data(str(tmp_path))

    @pytest.mark.parametrize(
        'base', [toy.RETINANET, 'cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco.py']
    )
    def test_the_student_gets_its_classes(self, tmp_path, base):
        data = find_data(str(made_data.root() / 'bccd'))
        path = tmp_path / 'config.py'
        path.write_text(
            config_text(f'mmdet::{base}', {'name': INDEXED}, 'pkd', data)
        )
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
        parts = (cfg.val_dataloader.dataset, cfg.test_dataloader.dataset)
        lists = [f'BCCD/ImageSets/Main/{n}.txt' for n in ('val', 'test')]
        assert [part.ann_file for part in parts] == lists
        assert 'ann_file' not in cfg.val_evaluator


class TestBalance:
    def hooks(self, folder, base, share=0.3, method='pkd'):
        path = folder / 'config.py'
        student, teacher = f'mmdet::{base}', teacher_options(INDEXED, None)
        wishes = Wishes(balance=share)
        written = write_config(
            student, teacher, [method], wishes=wishes, tried=False
        )
        path.write_text(written.text)
        return Config.fromfile(path).custom_hooks

    def test_the_hook_is_written(self, tmp_path):
        (hook,) = self.hooks(tmp_path, toy.RETINANET)
        assert hook == dict(type='mmkd.GradientBalanceHook', share=0.3)
        build_checked(HOOKS, hook, 'custom_hooks')

    def test_hooks_of_the_student_stay(self, tmp_path):
        base = 'rtmdet/rtmdet_tiny_8xb32-300e_coco.py'
        own = based_on(base, tmp_path).custom_hooks
        *others, last = self.hooks(tmp_path, base)
        assert len(own) == 2
        assert [hook.type for hook in others] == [hook.type for hook in own]
        assert others[0].momentum == own[0].momentum
        assert last.type == 'mmkd.GradientBalanceHook'

    def test_a_share_that_is_none(self, tmp_path):
        with pytest.raises(ConfigError, match='below 1, got 30'):
            self.hooks(tmp_path, toy.RETINANET, share=30.0)

    def test_a_method_without_losses(self, tmp_path):
        with pytest.raises(ConfigError, match='--balance: lad steers'):
            self.hooks(tmp_path, toy.PAA, method='lad')

    def test_the_option(self, tmp_path, monkeypatch):
        monkeypatch.setattr('mmkd.doctor.command.main', lambda _: 0)
        arguments = [
            *('--student', STUDENT, '--teacher', INDEXED, '--method', 'pkd'),
            *('--balance', '.25', '--no-train', '--work-dir', str(tmp_path)),
        ]
        monkeypatch.setattr(
            'mmkd.start.config_text.Pair.misfits', lambda *_: {}
        )
        main(arguments)
        (path,) = tmp_path.glob('*_pkd.py')
        (hook,) = Config.fromfile(path).custom_hooks
        assert hook == dict(type='mmkd.GradientBalanceHook', share=0.25)


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
    return config_of(network).model


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
            (
                'dkd',
                toy.RETINANET,
                dict(alpha=1.0, beta=0.25, temperature=1.0),
            ),
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
            (
                'pkd',
                toy.FASTER_RCNN,
                dict(levels=[0, 1, 2, 3], loss_weight=6.0),
            ),
            (
                'pkd',
                toy.RETINANET,
                dict(levels=[0, 1, 2, 3], loss_weight=10.0),
            ),
            ('pkd', FCOS, dict(levels=None, loss_weight=10.0)),
        ],
    )
    def test_as_published(self, method, student, expected):
        options = options_for(method, f'mmdet::{student}', PAIRS[student])
        assert {key: options[key] for key in expected} == expected

    @pytest.mark.parametrize(
        ('config', 'method'),
        [
            *((f'{n}_retinanet_r50', n) for n in ('cwd', 'dist', 'fgd', 'kd')),
            *((f'{n}_retinanet_r50', n) for n in ('mgd', 'pkd', 'tat')),
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
        # LD's default is the same for the batch of its authors.
        theirs.pop('normalize', None)
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
        assert not diagnose(Config.fromfile(path)).stops


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


@METHODS.register_module()
class Interrupted(FeatureHint):
    """Ends the process that runs it by a signal, in its first step."""

    number = signal.SIGTERM
    in_training = False
    steps = 0

    def forward(self, *args):
        Interrupted.steps += 1
        training = sys.argv[1:2] == ['train']
        if training == self.in_training and self.steps > 2 * training:
            os.kill(os.getpid(), self.number)
        return super().forward(*args)


@METHODS.register_module()
class InterruptedInTraining(Interrupted):
    in_training = True


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, '-m', 'mmkd', 'distill', *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, 'PYTHONPATH': str(toy.ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def prepare(folder, *, classes=80):
    """A student on a few photos, and a saved teacher of another kind."""
    cfg = toy.plain(folder, toy.RETINANET, images=4, epochs=2)
    cfg.model.bbox_head.stacked_convs = 1
    cfg.pop('work_dir')
    cfg.train_dataloader.batch_size = 2
    cfg.model.test_cfg.score_thr = 0.0  # it detects something
    cfg.default_hooks.checkpoint.save_best = 'coco/bbox_mAP'
    cfg.custom_hooks = [
        dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP', patience=9)
    ]
    student = toy.write(cfg, folder / 'student.py')
    teacher = toy.plain(folder, toy.FASTER_RCNN)
    teacher.model.roi_head.bbox_head.num_classes = classes
    if classes == 3:
        names = dict(classes=('Platelets', 'RBC', 'WBC'))
        teacher.test_dataloader.dataset.metainfo = names
    (folder / 'teacher').mkdir()
    teacher, checkpoint = saved(folder / 'teacher', teacher)
    return [
        *('--student', str(student), '--teacher', str(teacher)),
        *('--teacher-checkpoint', str(checkpoint)),
    ]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """The commands that would train, which do not run."""
    commands = []

    def note(command, _):
        commands.append(command)
        return 0

    monkeypatch.setattr('mmkd.start.command._train', note)
    return commands


class TestCommand:
    def test_from_a_folder_of_photos_to_a_detector(
        self, here, trained, capsys, monkeypatch
    ):
        """VOC data, for a student whose hooks watch COCO's metric."""
        voc = made_data.root() / 'bccd'
        arguments = [
            *prepare(here, classes=3),
            *('--method', 'pkd', 'cwd', '--data', str(voc)),
            *('--epochs', '1', '--cfg-options', 'randomness.seed=3'),
        ]
        done = run(*arguments, cwd=here)
        said = done.stdout
        assert done.returncode == 0, said[-2000:] + done.stderr[-2000:]
        levels = 'levels [0, 1, 2, 3], of the teacher [1, 2, 3, 4]'
        assert f'pkd: {levels}' in said
        assert f'cwd: {levels}' in said
        assert 'EarlyStoppingHook.monitor: pascal_voc/mAP' in said
        assert 'distillation = dict(' not in said.partition('Weights')[0]
        folder = Path('work_dirs/student_pkd_cwd')
        config = folder / 'student_pkd_cwd.py'
        best = folder / 'best_pascal_voc_mAP_epoch_1.pth'
        assert f'mmkd test {config} {best}' in said
        assert f'mmkd report {folder}' in said
        content = toy.load(best)
        cfg = Config.fromfile(config)
        assert cfg.randomness.seed == 3
        toy.detector(cfg.model).load_state_dict(content['state_dict'])
        # the same again
        assert main(arguments) == 0
        assert f'The run in {folder} is complete' in capsys.readouterr().out
        # other options, and the same name
        with pytest.raises(ConfigError, match='and its run has begun'):
            main([*arguments[:-1], 'randomness.seed=4'])
        assert not trained
        monkeypatch.setattr('mmkd.doctor.command.main', lambda _: 0)
        (folder / 'notes.txt').write_text('mine')
        assert main([*arguments, '--overwrite']) == 0
        assert trained == [['train', str(config), '--work-dir', str(folder)]]
        names = {p.name for p in folder.iterdir()}
        assert names == {config.name, 'notes.txt', 'overwritten'}
        assert (folder / 'overwritten' / best.name).is_file()

    def test_a_signal_in_training_and_on(self, here, trained, capsys):
        """COCO data; it is interrupted after an epoch and a validation."""
        arguments = [
            *('--import', 'tests.start.test_command', *prepare(here)),
            *('--method', 'interruptedintraining'),
        ]
        done = run(*arguments, cwd=here)
        assert done.returncode == 143, done.stdout[-2000:] + done.stderr
        name = 'student_interruptedintraining'
        folder = f'work_dirs/{name}'
        command = ['train', f'{folder}/{name}.py', '--work-dir', folder]
        assert f'{" ".join(command)} --resume' in done.stdout + done.stderr
        assert 'Traceback' not in done.stderr
        assert list(Path(folder).glob('best_coco_bbox_mAP_epoch_1.pth'))
        with pytest.raises(WorkDirError, match=r'begun \(iteration 3, '):
            main(arguments)
        assert not trained
        assert main([*arguments, '--resume']) == 0
        assert trained == [[*command, '--resume']]
        assert 'nothing to resume' not in capsys.readouterr().out

    def test_without_a_teacher(self, here, trained, capsys):
        """The same student and schedule, and a config that trains stock."""
        student = prepare(here)[:2]
        voc = str(made_data.root() / 'bccd')
        arguments = [*student, '--method', 'none', '--data', voc]
        assert main([*arguments, '--epochs', '3']) == 0
        config = Path('work_dirs/student/student.py')
        assert trained == [
            ['train', str(config), '--work-dir', str(config.parent)]
        ]
        cfg = Config.fromfile(config)
        assert 'distillation' not in cfg
        assert cfg.train_cfg.max_epochs == 3
        assert cfg.model.bbox_head.num_classes == 3
        assert cfg.train_dataloader.dataset.type == 'VOCDataset'
        assert 'Losses' not in capsys.readouterr().out

    @pytest.mark.parametrize(
        ('options', 'said'),
        [
            (['--method', 'none', '--teacher', INDEXED], 'has no --teacher'),
            (['--method', 'pkd'], '--teacher is missing'),
        ],
    )
    def test_a_teacher_too_many_or_too_few(self, options, said, capsys):
        with pytest.raises(SystemExit):
            main(['--student', STUDENT, *options])
        assert said in capsys.readouterr().err

    @pytest.mark.parametrize('name', ['SIGTERM', 'SIGINT'])
    def test_a_signal_while_the_doctor_looks(
        self, here, trained, capsys, monkeypatch, name
    ):
        number = signal.Signals[name]
        monkeypatch.setattr(Interrupted, 'number', number)
        default = signal.default_int_handler
        former = signal.signal(
            number, default if name == 'SIGINT' else signal.SIG_DFL
        )
        arguments = [*prepare(here), '--method', 'interrupted', '--resume']
        try:
            assert main(arguments) == 128 + number
        finally:
            kept = signal.signal(number, former)
        told = capsys.readouterr().err.strip().splitlines()[-1]
        assert told.startswith(f'{name}: the training has not begun. To go on')
        assert told.endswith(f'mmkd distill {" ".join(arguments)}')
        assert kept in (default, signal.SIG_DFL)
        assert not trained

    def test_a_folder_in_yolos_layout(self, here, trained, capsys):
        """From photos and labels to a config that the doctor has examined."""
        for number in range(6):
            name, size = f'photo {number}', (64 + number, 48)
            own_data.draw(here / f'mine/images/{name}.JPG', size)
            label = here / f'mine/labels/{name}.txt'
            own_data.write(label, '0 .5 .5 .4 .4\n')
        own_data.write(here / 'mine/classes.txt', 'raccoon\n')
        arguments = [*prepare(here), '--method', 'cwd', '--data', 'mine']
        main([*arguments, '--no-train'])
        cfg = Config.fromfile(here / 'work_dirs/student_cwd/student_cwd.py')
        images = 0
        for loader in (cfg.train_dataloader, cfg.val_dataloader):
            dataset = loader.dataset
            assert dataset.metainfo.classes == ('raccoon',)
            assert dataset.data_prefix.img == f'{here}/mine/'
            path = here / 'data/mine' / dataset.ann_file
            images += len(json.loads(path.read_text())['images'])
        assert images == 6
        # It has looked at the networks with these data.
        said = capsys.readouterr().out
        assert 'share no class name. Student: raccoon.' in said
        assert not trained

    def test_findings_stop_it(self, here, trained, capsys):
        arguments = [*prepare(here), '--method', 'cwd', '--cfg-options']
        option = 'distillation.teacher.class_map.person=nobody'
        assert main([*arguments, option]) == 1
        assert 'Findings' in capsys.readouterr().out
        assert not trained
        # what nobody has edited is written anew
        with pytest.raises(ConfigError, match='Did you mean "temperature"'):
            main([*arguments, 'distillation.methods.cwd.temprature=2'])

    def test_an_edited_config_is_kept(self, here, trained):
        edited = here / 'work_dirs/student_cwd/student_cwd.py'
        edited.parent.mkdir(parents=True)
        edited.write_text('# mine')
        with pytest.raises(ConfigError, match=r'differs .* been edited'):
            main([*prepare(here), '--method', 'cwd', '--no-train'])
        assert edited.read_text() == '# mine'

    def test_the_methods_that_fit(self, here, capsys):
        networks = prepare(here)
        assert main([*networks, '--method', 'help']) == 0
        lines = dict(
            line.split(maxsplit=1)
            for line in capsys.readouterr().out.splitlines()
        )
        # Other tests register methods of their own.
        assert {'cwd', 'fbkd', 'fgd', 'pkd'} <= lines.keys()
        assert list(lines).index('fgd') < list(lines).index('crosskd')
        assert 'the teacher is FasterRCNN' in lines['crosskd']
        with pytest.raises(ConfigError, match=r'fit: .*\bcwd, .*\bfbkd, '):
            main([*networks, '--method', 'pkd', 'crosskd'])

    @pytest.mark.parametrize(
        ('option', 'value', 'told'),
        [
            (
                'student',
                'studnet.py',
                r'--student .*Did you mean "student.py"',
            ),
            ('student', 'teacher', r'--student teacher is a folder. It holds'),
            ('student', 'retinanet_r50', r'Nearest: retinanet_r50'),
            ('teacher', 'teacher', r'--teacher teacher is a folder. It holds'),
            ('teacher', 'teachr/student.py', r'mean "teacher/student.py"'),
            ('teacher-checkpoint', 'teacher', r'teacher is a folder. It hol'),
            (
                'teacher-checkpoint',
                'teacher/a.pth',
                r'mean "teacher/teacher.pth"',
            ),
            ('load-from', 'student.pyth', r'--load-from .*mean "student.py"'),
            ('data', 'teach', r'--data teach does not exist. Did you mean "t'),
            ('work-dir', 'student.py', r'--work-dir student.py is a file'),
        ],
    )
    def test_paths_in_a_line(self, here, networks, option, value, told):
        for name in ('student.py', 'teacher'):
            (here / name).symlink_to(networks / name)
        given = {
            'student': 'student.py',
            'teacher': 'teacher/student.py',
            'teacher-checkpoint': 'teacher/teacher.pth',
            'method': 'cwd',
            option: value,
        }
        with pytest.raises(MMKDError, match=told) as caught:
            main([f'--{name}={value}' for name, value in given.items()])
        assert '\n' not in str(caught.value)
        assert not (here / 'work_dirs').exists()


@pytest.fixture(scope='module')
def networks(tmp_path_factory):
    folder = tmp_path_factory.mktemp('networks')
    prepare(folder)
    return folder


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
