"""How a teacher is described, built, loaded and refused."""

import functools
import http.server
import os
import re
import threading
import warnings
from pathlib import Path

import mmdet
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.logging import MessageHub

from mmkd.detectors.shrink import small_model
from mmkd.detectors.source import (
    build_untrained,
    check_class_count,
    class_names,
    find_in_model_index,
    load_config,
)
from mmkd.errors import CheckpointError, ConfigError
from mmkd.teachers.build import build_teacher
from mmkd.teachers.view import TeacherContext
from tests.helpers import tiny_detectors as tiny
from tests.helpers import toy

CONFIGS = Path(mmdet.__file__).parent / '.mim' / 'configs'


def teacher_config(model=None, classes=tiny.CLASSES):
    dataset = dict(type='CocoDataset', metainfo=dict(classes=classes))
    return dict(
        model=model or tiny.faster_rcnn(),
        test_dataloader=dict(dataset=dataset),
    )


@pytest.fixture(scope='module')
def student():
    return tiny.build(tiny.faster_rcnn())


@pytest.fixture(scope='module')
def trained():
    """The network whose weights the checkpoints hold."""
    return tiny.build(tiny.faster_rcnn(), seed=5)


@pytest.fixture
def saved(trained, tmp_path):
    """Write a checkpoint, by default with the trained network's weights."""

    def save(state_dict=None, **entries):
        path = tmp_path / 'teacher.pth'
        weights = state_dict or trained.state_dict()
        torch.save(dict(state_dict=weights, **entries), path)
        return str(path)

    return save


@pytest.fixture
def built(student):
    """Build a teacher for the student from its options."""

    def build(**options):
        options.setdefault('config', teacher_config())
        return build_teacher(options, TeacherContext(student, tiny.CLASSES))

    return build


def same_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --------------------------------------------------------------- loading


def test_weights_and_classes_are_the_checkpoints(built, saved, trained):
    meta = dict(dataset_meta=dict(classes=('cow', 'cat', 'dog')))
    teacher = built(checkpoint=saved(meta=meta))
    assert same_weights(teacher.model, trained)
    assert teacher.classes == ('cow', 'cat', 'dog')  # not the config's
    assert teacher.class_map.to_teacher.tolist() == [1, 2, 0, 3]


def test_building_draws_no_random_number(built, saved):
    path = saved()
    torch.manual_seed(0)
    np.random.seed(0)
    states = torch.get_rng_state(), np.random.get_state()[1].copy()
    built(checkpoint=path)
    with pytest.warns(UserWarning, match='UNTRAINED'):
        built(checkpoint=None)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])


def test_keys_of_a_wrapped_model_are_understood(built, saved, trained):
    state = {f'module.{k}': v for k, v in trained.state_dict().items()}
    assert same_weights(
        built(checkpoint=saved(state_dict=state)).model, trained
    )


def test_a_bare_state_dict_is_a_checkpoint(built, trained, tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save(trained.state_dict(), path)
    assert same_weights(built(checkpoint=str(path)).model, trained)


def test_keys_of_older_versions_are_renamed_as_in_mmdet(student, saved):
    """FCOS' ``conv_cls`` was called ``fcos_cls`` before version 1."""
    fcos = tiny.build(tiny.fcos())
    old = {
        re.sub(r'conv_(cls|reg|centerness)', r'fcos_\1', k): v
        for k, v in fcos.state_dict().items()
    }
    assert 'bbox_head.fcos_cls.weight' in old
    for state in (old, fcos.state_dict()):
        teacher = build_teacher(
            dict(
                config=teacher_config(tiny.fcos()),
                checkpoint=saved(state_dict=state),
            ),
            TeacherContext(student, tiny.CLASSES),
        )
        assert same_weights(teacher.model, fcos)


def test_the_versions_of_modules_are_kept(built, saved, trained):
    """Before its version 2, BatchNorm counted no batches."""
    state = trained.state_dict()
    key = 'backbone.bn1.num_batches_tracked'
    del state[key]
    with pytest.raises(CheckpointError, match=rf'1 keys are missing .*{key}'):
        built(checkpoint=saved(state_dict=state))
    built(checkpoint=saved(state_dict=dict(state)))  # of no version


def test_missing_unexpected_and_misshapen_keys_are_told(built, saved, trained):
    state = dict(trained.state_dict())
    del state['neck.fpn_convs.0.conv.bias']
    with pytest.raises(
        CheckpointError,
        match=r'1 keys are missing \(first: neck.fpn_convs.0.conv.bias\)\.',
    ):
        built(checkpoint=saved(state_dict=state))
    state = dict(trained.state_dict(), ghost=torch.ones(1))
    with pytest.raises(
        CheckpointError, match=r'1 keys are unexpected \(first: ghost\)'
    ):
        built(checkpoint=saved(state_dict=state))
    state['rpn_head.rpn_cls.bias'] = torch.zeros(9)
    del state['neck.fpn_convs.0.conv.bias']
    with pytest.raises(CheckpointError) as error:
        built(checkpoint=saved(state_dict=state))
    for part in (
        '1 keys are missing',
        '1 keys are unexpected',
        '1 shapes differ (first: rpn_head.rpn_cls.bias: config (3,), '
        'checkpoint (9,))',
        'Give the checkpoint that was trained with this config',
    ):
        assert part in str(error.value)


def test_a_checkpoint_of_another_architecture(built, saved):
    state = tiny.build(tiny.retinanet()).state_dict()
    with pytest.raises(
        CheckpointError,
        match=r'does not fit the teacher FasterRCNN of its config: \d+ keys '
        r'are missing \(.*rpn_head.*\d+ keys are unexpected \(.*bbox_head.*'
        r'\d+ shapes differ .*the config of this checkpoint',
    ):
        built(checkpoint=saved(state_dict=state))


def test_a_checkpoint_that_mmengine_wrote_needs_no_trust(
    built, saved, trained
):
    hub = MessageHub.get_instance('test_teacher')
    for step in range(3):
        hub.update_scalar('train/loss', np.float64(1.5 / (step + 1)))
        hub.update_info('iter', step)
    path = saved(
        message_hub=hub.state_dict(),
        optimizer=torch.optim.SGD(trained.parameters(), 0.1).state_dict(),
        meta=dict(epoch=3, dataset_meta=dict(classes=list(tiny.CLASSES))),
    )
    with pytest.raises(Exception, match='HistoryBuffer'):
        torch.load(path, weights_only=True)  # it holds a log history
    teacher = built(checkpoint=path)
    assert same_weights(teacher.model, trained)
    assert teacher.classes == tiny.CLASSES


class Malicious:
    """Runs a command where it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_a_malicious_pickle_runs_only_with_trust(
    built, saved, trained, tmp_path
):
    marker = tmp_path / 'executed'
    path = saved(extra=Malicious(f'touch {marker}'))
    with pytest.raises(
        CheckpointError,
        match=r'holds more than weights \(\S*system\).*pickle can run code.*'
        'trust_checkpoint=True',
    ):
        built(checkpoint=path)
    assert not marker.exists()
    teacher = built(checkpoint=path, trust_checkpoint=True)
    assert marker.exists()
    assert same_weights(teacher.model, trained)


@pytest.mark.parametrize('content', ['truncated', 'empty', 'text', 'page'])
def test_files_that_are_no_checkpoint(built, saved, content):
    path = Path(saved())
    data = path.read_bytes()
    path.write_bytes(
        {
            'truncated': data[: len(data) // 2],
            'empty': b'',
            'text': b'version https://git-lfs.github.com/spec/v1\n',
            'page': b'<!DOCTYPE html><html>not found</html>',
        }[content]
    )
    size = f'{path.stat().st_size:,} bytes'
    with pytest.raises(
        CheckpointError,
        match=rf'teacher.pth \({size}\) is no PyTorch checkpoint or is trunc',
    ):
        built(checkpoint=str(path))


def test_a_file_without_weights(built, tmp_path):
    path = tmp_path / 'results.pth'
    torch.save(dict(epoch=1, ap=0.5), path)
    with pytest.raises(
        CheckpointError, match=r"no detector checkpoint.*keys \['ap', 'epoch'"
    ):
        built(checkpoint=str(path))


def test_a_missing_file_names_the_folder(built, tmp_path):
    with pytest.raises(CheckpointError, match=r'none.pth.* does not exist'):
        built(checkpoint=str(tmp_path / 'none.pth'))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on a folder; a list of what was asked for."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    folder, asked = tmp_path / 'web', []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ('127.0.0.1', 0), functools.partial(Handler, directory=str(folder))
    ) as httpd:
        thread = threading.Thread(target=httpd.serve_forever)
        thread.start()
        yield f'http://127.0.0.1:{httpd.server_port}', folder, asked
        httpd.shutdown()
        thread.join()


def test_a_web_address_is_downloaded_once(built, saved, server, trained):
    url, folder, asked = server
    Path(saved()).rename(folder / 'teacher.pth')
    for _ in range(2):
        teacher = built(checkpoint=f'{url}/teacher.pth')
        assert same_weights(teacher.model, trained)
    assert asked == ['/teacher.pth']


def test_a_download_that_fails_says_why(built, saved, server):
    url, folder, _ = server
    Path(saved()).rename(folder / 'teacher-0123abcd.pth')
    with pytest.raises(CheckpointError, match=r'none.pth could not be.*404'):
        built(checkpoint=f'{url}/none.pth')
    with pytest.raises(CheckpointError, match=r'could not be downl.*hash'):
        built(checkpoint=f'{url}/teacher-0123abcd.pth')


def test_a_file_url(built, saved, trained, tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'cache'))
    teacher = built(checkpoint=Path(saved()).as_uri())
    assert same_weights(teacher.model, trained)


# --------------------------------------------------- describing the teacher


def test_an_untrained_teacher_is_warned_of(built, logged):
    with pytest.warns(UserWarning, match='THE TEACHER IS UNTRAINED'):
        built(checkpoint=None)
    assert ['THE TEACHER IS UNTRAINED' in text for text in logged] == [True]


def test_the_checkpoint_has_to_be_named(built):
    with pytest.raises(
        ConfigError, match=r'has no "checkpoint".*checkpoint=N'
    ):
        built()


def test_the_config_has_to_be_named(student, saved):
    with pytest.raises(ConfigError, match=r'needs a "config".*"checkpoint"'):
        build_teacher(
            dict(checkpoint=saved()),
            TeacherContext(student, tiny.CLASSES),
        )


def test_misspelt_options_say_the_nearest(built, saved):
    with pytest.raises(
        ConfigError, match=r'no option "checkpoints". Did you me'
    ):
        built(checkpoints=saved())
    with pytest.raises(ConfigError, match=r'no option "models". Did you mean'):
        built(checkpoint=saved(), cfg_options={'models.backbone.depth': 50})


def test_options_override_the_config(built, saved):
    with pytest.raises(CheckpointError, match='shapes differ'):
        built(
            checkpoint=saved(),
            cfg_options={'model.rpn_head.feat_channels': 8},
        )


def test_a_config_by_path_by_package_and_as_dict(saved, tmp_path):
    path = 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py'
    for source in (f'mmdet::{path}', str(CONFIGS / path), CONFIGS / path):
        assert load_config(source).model.backbone.depth == 50
    assert load_config(dict(model=dict(type='X'))).model.type == 'X'


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('mmdet::paa/none.py', r"'mmdet::paa/none.py' does not exist"),
        ('none.py', r"'none.py' does not exist.*Give a path from "),
        ('mmkd::lad_r51.py', r'Did you mean "mmkd::lad_r50.py"\?'),
        ('nomm::a/b.py', 'of nomm, which is not installed'),
        ('nomm.configs::a.py', 'of nomm.configs, which is not installed'),
        ('::a.py', 'of , which is not installed'),
        (dict(type='FasterRCNN'), r'needs the key "model".*dict\(model=...'),
    ],
)
def test_configs_that_cannot_be_found(source, message):
    with pytest.raises(ConfigError, match=message):
        load_config(source)


def test_a_config_without_a_model_is_named(tmp_path):
    path = tmp_path / 'data.py'
    path.write_text('train_dataloader = dict()')
    with pytest.raises(ConfigError, match=r'data.py. needs the key "model"'):
        load_config(path)


def test_a_name_of_the_model_index():
    found = find_in_model_index('paa_r101_fpn_1x_coco')
    assert found['checkpoint'].endswith(
        'paa_r101_fpn_1x_coco_20200821-0a1825a4.pth'
    )
    assert Config.fromfile(found['config']).model.type == 'PAA'


def test_a_misspelt_name_says_the_nearest(student):
    with pytest.raises(
        ConfigError, match=r"no 'paa_r110_fpn_1x_coco'. Nearest: paa_r101_fpn"
    ):
        build_teacher(
            'paa_r110_fpn_1x_coco',
            TeacherContext(student, tiny.CLASSES),
        )


def test_the_index_gives_the_config_and_options_override_it(student, saved):
    model = tiny.faster_rcnn()
    teacher = build_teacher(
        dict(
            name='faster-rcnn_r50_fpn_1x_coco',
            checkpoint=saved(state_dict=tiny.build(model).state_dict()),
            cfg_options={
                'model.backbone': dict(tiny.BACKBONE),
                'model.neck': dict(
                    in_channels=[8, 16, 32, 64], out_channels=16
                ),
                'model.rpn_head': dict(tiny.RPN),
                'model.roi_head.bbox_roi_extractor.out_channels': 16,
                'model.roi_head.bbox_head': dict(tiny.BOX_HEAD),
                'test_dataloader.dataset.metainfo': dict(classes=tiny.CLASSES),
            },
        ),
        TeacherContext(student, tiny.CLASSES),
    )
    assert same_weights(teacher.model, tiny.build(model))


@pytest.mark.parametrize('checkpoint', ['given', None])
def test_imagenet_weights_are_never_fetched(built, saved, checkpoint):
    model = tiny.faster_rcnn()
    model.backbone.init_cfg = dict(
        type='Pretrained', checkpoint='/nowhere/imagenet.pth'
    )
    model.neck.init_cfg = [
        dict(type='Xavier', layer='Conv2d'),
        dict(type='Pretrained', checkpoint='torchvision://resnet50'),
    ]
    model.init_cfg = dict(type='Pretrained', checkpoint='http://x.invalid/y')
    path = saved() if checkpoint else None
    with warnings.catch_warnings():
        warnings.filterwarnings('ignore', 'THE TEACHER IS UNTRAINED')
        built(config=teacher_config(model), checkpoint=path)


# -------------------------------------------------------------- its classes


def test_no_shared_class_lists_both(saved, student):
    with pytest.raises(ConfigError) as error:
        build_teacher(
            dict(config=teacher_config(), checkpoint=saved()),
            TeacherContext(student, ('bus', 'car')),
        )
    assert 'Student: bus, car. Teacher: cat, dog, cow.' in str(error.value)


def config_of(dataset, **entries):
    return Config(dict(test_dataloader=dict(dataset=dataset), **entries))


@pytest.mark.parametrize(
    ('meta', 'dataset', 'expected'),
    [
        (dict(dataset_meta=dict(classes=['a', 'b'])), {}, ('a', 'b')),
        (dict(dataset_meta=dict(CLASSES=('a',))), {}, ('a',)),
        (dict(CLASSES=('a', 'b')), {}, ('a', 'b')),
        (dict(dataset_meta=dict(classes='a')), {}, ('a',)),
        ({}, dict(type='CocoDataset', metainfo=dict(classes=('a',))), ('a',)),
        (
            {},
            dict(
                type='RepeatDataset',
                times=2,
                dataset=dict(type='X', metainfo=dict(classes=('a', 'b'))),
            ),
            ('a', 'b'),
        ),
        (
            {},
            dict(
                type='ConcatDataset',
                datasets=[dict(type='X', metainfo=dict(classes=('a',)))] * 2,
            ),
            ('a',),
        ),
        ({}, {}, None),
    ],
)
def test_class_names_are_the_checkpoints_else_the_configs(
    meta, dataset, expected
):
    assert class_names(meta, config_of(dataset)) == expected


def test_class_names_of_a_known_data_set():
    assert class_names({}, config_of(dict(type='CocoDataset')))[79] == (
        'toothbrush'
    )
    train = dict(train_dataloader=dict(dataset=dict(type='VOCDataset')))
    assert class_names({}, Config(train))[0] == 'aeroplane'


def test_class_names_in_a_file(tmp_path):
    path = tmp_path / 'names.txt'
    path.write_text('cat\ndog\n')
    dataset = dict(type='X', metainfo=dict(classes=str(path)))
    assert class_names({}, config_of(dataset)) == ('cat', 'dog')


def test_where_nobody_names_classes_the_students_are_assumed(
    built, saved, logged
):
    teacher = built(config=dict(model=tiny.faster_rcnn()), checkpoint=saved())
    assert teacher.classes == tiny.CLASSES
    assert teacher.class_map.identical
    (text,) = logged
    assert "The student's are assumed: cat, dog, cow" in text


def test_the_head_and_the_names_have_to_agree(built, saved, student):
    with pytest.raises(
        ConfigError,
        match=r'model\.roi_head\.bbox_head\.num_classes: expected 2, because '
        r'its checkpoint or config names as many classes \(cat, dog\), got 3',
    ):
        built(
            config=teacher_config(classes=('cat', 'dog')), checkpoint=saved()
        )
    with pytest.raises(ConfigError, match=r'expected 4, because .*, got 3\.'):
        build_teacher(
            dict(config=dict(model=tiny.faster_rcnn()), checkpoint=saved()),
            TeacherContext(student, ('cat', 'dog', 'cow', 'yak')),
        )


# -------------------------------------------------------------------- classes


def test_another_number_of_classes_names_the_first_few():
    names = [f'class{number}' for number in range(80)]
    message = (
        r'here: model\.bbox_head\.num_classes: expected 80, because the '
        r'training data names as many classes \(class0, class1, class2 and 77 '
        r'more\), got 3\. Name its own classes'
    )
    with pytest.raises(ConfigError, match=message):
        check_class_count(tiny.build(tiny.gfl()), names, 'here')
    check_class_count(tiny.build(tiny.gfl()), names[:3], 'here')


def test_a_class_agnostic_detector_may_name_any():
    rpn = small_model(toy.stock('rpn/rpn_r50_fpn_1x_coco.py').model)
    check_class_count(tiny.build(rpn), [str(n) for n in range(80)], 'here')


def test_a_preprocessor_beside_the_model_is_the_model_s():
    """As in the config of MMEngine's runner; the model's own comes first."""
    model = tiny.gfl()
    beside = {**model.pop('data_preprocessor'), 'std': [2.0, 2.0, 2.0]}
    cfg = load_config(dict(model=model, data_preprocessor=beside))
    built = build_untrained(cfg.model).data_preprocessor
    assert built.std.flatten().tolist() == [2.0, 2.0, 2.0]
    model.data_preprocessor = {**beside, 'std': [3.0, 3.0, 3.0]}
    cfg = load_config(dict(model=model, data_preprocessor=beside))
    built = build_untrained(cfg.model).data_preprocessor
    assert built.std.flatten().tolist() == [3.0, 3.0, 3.0]
