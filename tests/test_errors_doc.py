"""Each error that docs/errors.md lists is raised as it is printed there."""

import functools
import inspect
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.optim import build_optim_wrapper

from mmkd.core.distiller import build_distiller
from mmkd.data.batch import Batch
from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.detectors.shrink import small_model
from mmkd.engine.checkpoint import join_checkpoint
from mmkd.engine.data_guard import check_images, diagnose
from mmkd.engine.distilled import distiller_of
from mmkd.engine.hooks import LossCheckHook, WeightScheduleHook
from mmkd.peers.ensemble import EnsembleDetector
from mmkd.peers.peer import add_to_optimizer, check_trained
from mmkd.registry import HOOKS, METHODS
from mmkd.teachers.class_map import ClassMap
from mmkd.utils import build_checked
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny

PAGE = toy.ROOT / 'docs' / 'errors.md'
DOTS = '…'
HINT = dict(type='mmkd.FeatureHint')
LAD = dict(type='mmkd.LabelAssignmentDistillation')


def rows():
    """(what is wrong, message) of every row of every table."""
    found = []
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip('|').split(' | ')]
        if line.startswith('| ') and cells[0] != 'What is wrong':
            assert len(cells) == 3, line
            found.append((cells[0], cells[1]))
    return found


ROWS = dict(rows())

# ----------------------------------------------------------------- provoking


def distil(student, methods, teacher=None, classes=tiny.CLASSES, **cfg):
    """Build a distillation between tiny detectors and take a step."""
    model = tiny.build(student)
    names = cfg.pop('teacher_classes', classes)
    described = dict(
        config=dict(
            model=teacher or student,
            test_dataloader=dict(dataset=dict(metainfo=dict(classes=names))),
        ),
        checkpoint=cfg.pop('checkpoint', None),
    )
    distiller = build_distiller(
        dict(teacher=described, methods=methods, **cfg), model, classes
    )
    distiller.attach()
    model.loss(*tiny.batch_for(model, classes=len(classes)))


def one(method, student, teacher=None, **options):
    return functools.partial(
        distil,
        student,
        dict(m=dict(type=f'mmkd.{method}', **options)),
        teacher,
    )


def peers(method, *others, classes=tiny.CLASSES, **options):
    def provoke():
        described = {
            name: dict(
                config=dict(
                    model=model,
                    train_dataloader=dict(
                        dataset=dict(metainfo=dict(classes=classes))
                    ),
                )
            )
            for name, model in zip(('second', 'third'), others, strict=False)
        }
        methods = dict(m=dict(type=f'mmkd.{method}', **options))
        cfg = dict(peers=described, methods=methods)
        build_distiller(cfg, tiny.build(tiny.gfl()), tiny.CLASSES)

    return provoke


def built(**cfg):
    """Before any network is asked for."""
    return lambda: build_distiller(cfg, torch.nn.Linear(1, 1), ('cat',))


def student_optimizer():
    cfg = dict(type='OptimWrapper', optimizer=dict(type='SGD', lr=0.1))
    return build_optim_wrapper(torch.nn.Linear(1, 1), cfg)


def a_peer(optim_wrapper=None):
    peer = torch.nn.Module()
    peer.model, peer.optim_wrapper = torch.nn.Linear(1, 1), optim_wrapper
    return peer


def peer_optimizer(optimizer, **options):
    own = dict(type='OptimWrapper', optimizer=optimizer, **options)
    add_to_optimizer(student_optimizer(), dict(second=a_peer(own)), own)


def ensemble_in_training():
    pair = [tiny.build(tiny.gfl(), seed=seed) for seed in (1, 2)]
    EnsembleDetector(pair)(*tiny.batch_for(pair[0]), mode='loss')


def option(method, **options):
    cfg = dict(type=f'mmkd.{method}', **options)
    return lambda: build_checked(METHODS, cfg, 'distillation.methods.m')


def images_twice():
    """As TridentNet's branches do."""
    model = tiny.build(tiny.retinanet())
    stock = type(model.neck).forward
    model.neck.forward = lambda maps: stock(
        model.neck, [m.repeat(2, 1, 1, 1) for m in maps]
    )
    described = dict(config=dict(model=tiny.retinanet()), checkpoint=None)
    distiller = build_distiller(
        dict(teacher=described, methods=dict(m=HINT)), model, tiny.CLASSES
    )
    outputs = distiller._record()
    batch = tiny.batch_for(model)
    with outputs.recording():
        model.extract_feat(batch[0])
    batch = Batch(*batch)
    teacher = distiller.teacher.view(batch)
    distiller.methods['m'](outputs, teacher, batch)


def shrunk(name):
    """A stock detector at toy scale, for three classes."""
    model = small_model(tiny.stock(name))
    for head in (model.get('bbox_head'), model.get('roi_head', {})):
        head = (head or {}).get('bbox_head', head)
        if head:
            head.num_classes = 3
    return model


def truncated(folder):
    path = folder / 'teacher.pth'
    torch.save(dict(state_dict={'a': torch.rand(1000)}), path)
    path.write_bytes(path.read_bytes()[:2000])
    load_checkpoint_file(str(path))


def web_page(folder):
    path = folder / 'teacher.pth'
    path.write_text('<html>Not found</html>')
    load_checkpoint_file(str(path))


def pickled_code(folder):
    path = folder / 'teacher.pth'
    torch.save(dict(state_dict={}, args=SimpleNamespace()), path)
    load_checkpoint_file(str(path))


def of_another_network(folder):
    path = folder / 'teacher.pth'
    state = tiny.build(tiny.retinanet()).state_dict()
    torch.save(dict(state_dict=state), path)
    distil(tiny.gfl(), dict(m=HINT), checkpoint=str(path))


def resumed_with_other_methods():
    kept = {'distillation.a': torch.ones(1)}
    saved = dict(state_dict={}, distillation=dict(state_dict=kept))
    join_checkpoint(saved, {}, resume=True)


def misspelt_key(folder):
    cfg = toy.distilled(folder)
    cfg.distilation = cfg.pop('distillation')
    toy.build(cfg)


def no_data(folder):
    cfg = toy.distilled(folder)
    dataset = cfg.train_dataloader.dataset
    dataset.data_root = f'{folder}/data/coco/'
    toy.train(cfg)


def cut_annotations(folder):
    path = folder / 'train.json'
    path.write_text('{"images": [{"id": 1, ')
    diagnose(dict(data_root=str(folder), ann_file='train.json'))


class NoImages(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def get_data_info(self, index):
        return dict(img_path=f'data/bccd/JPEGImages/{index}.jpg')


def nan_loss():
    hook = LossCheckHook()
    hook.observe({}, {'hint': {'hint.loss_hint': torch.tensor(np.nan)}})
    hook.check()


def diverged_peer():
    hook = LossCheckHook()
    hook._peers = ('second',)
    nan = torch.tensor(np.nan)
    hook.observe({'second.loss_cls': nan}, {'m': {'m.loss_student': nan}})
    hook.check()


def softmax_atss():
    config = tiny_dense.atss()
    config.bbox_head.loss_cls = dict(type='CrossEntropyLoss')
    return config


def wide_backbone():
    return tiny.merged(
        tiny.retinanet(),
        backbone__base_channels=16,
        neck__in_channels=[16, 32, 64, 128],
    )


CASES = {
    # the config
    'Misspelt key `distillation`': misspelt_key,
    'Misspelt option of `distillation`': built(
        techer={}, methods=dict(m=HINT)
    ),
    'Neither teacher nor peers': built(methods=dict(m=HINT)),
    'No methods': built(teacher=dict(config='a.py')),
    'Unknown method': option('FeatureHnt'),
    'Misspelt option of a method': option('FeatureHint', sorce='neck'),
    'A method without `type`': built(
        teacher={'config': 'a.py'}, methods=dict(hint=dict(source='neck'))
    ),
    'A name of a method that losses cannot have': built(
        teacher={'config': 'a.py'}, methods={'a.b': HINT}
    ),
    'A method of peers without peers': built(
        teacher={'config': 'a.py'},
        methods=dict(dml=dict(type='mmkd.MutualLearning')),
    ),
    'Two methods that steer the assignment': lambda: distil(
        tiny_dense.paa(), dict(a=LAD, b=LAD)
    ),
    'Misspelt hook': lambda: build_checked(
        HOOKS, dict(type='mmkd.TelemetryHok'), 'custom_hooks'
    ),
    'A schedule of a method that is not there': lambda: WeightScheduleHook(
        methods='hnt'
    ).before_train(
        SimpleNamespace(distiller=SimpleNamespace(methods=dict(hint=None)))
    ),
    'A hook of mmkd in plain training': lambda: distiller_of(
        SimpleNamespace()
    ),
    # options
    'Temperature not above 0': option('KD', temperature=0),
    'A weight below 0': option('CWD', loss_weight=-1),
    'A share outside its range': option('FasterRCNNDistillation', mu=1.5),
    'A value that is none of the known': option('CrossKD', align='images'),
    'A number that must be whole': option('CrossKD', layer=0.5),
    'A number that is infinite': option('LD', temperature=float('inf')),
    'A number in quotes': option('LD', temperature='10'),
    'Levels that are no numbers': option('FeatureHint', levels='all'),
    # pairs
    'Sizes differ by a factor': one(
        'FeatureHint', tiny.retinanet(), levels=[0], teacher_levels=[1]
    ),
    'Different numbers of levels': one(
        'CWD', tiny.retinanet(), levels=[0, 1], teacher_levels=[0]
    ),
    'A level that does not exist': one('CWD', tiny.retinanet(), levels=[7]),
    'Different widths without an adapter': one(
        'FeatureHint',
        tiny.retinanet(),
        wide_backbone(),
        source='backbone',
        adapt=False,
    ),
    'Class scores of other classes': lambda: distil(
        tiny.gfl(),
        dict(m=dict(type='mmkd.CWD', source='bbox_head.gfl_cls')),
        teacher_classes=tiny.CLASSES[::-1],
    ),
    'A module that sees an image several times': images_twice,
    'A module that does not exist': one(
        'FeatureHint', tiny.retinanet(), source='nek'
    ),
    'LD on heads without bins': one('LD', tiny.retinanet()),
    'DKD on one class': lambda: distil(
        tiny.gfl(bbox_head__num_classes=1),
        dict(m=dict(type='mmkd.DKD')),
        classes=('cat',),
    ),
    'Class logits of a transformer': one('KD', tiny.detr()),
    'Class logits of a head that assigns in a way of its own': one(
        'KD', shrunk('free_anchor/freeanchor_r50_fpn_1x_coco.py')
    ),
    'RPN distillation of other proposals': one(
        'FasterRCNNDistillation',
        shrunk('guided_anchoring/ga-faster-rcnn_r50-caffe_fpn_1x_coco.py'),
    ),
    'RoI distillation of a one-stage detector': one(
        'FasterRCNNDistillation', tiny.retinanet()
    ),
    'Assignment of a head that assigns without predictions': one(
        'LabelAssignmentDistillation', tiny.retinanet()
    ),
    'Different priors': one('KD', tiny.retinanet(), tiny.gfl()),
    'A sigmoid and a softmax': one('KD', tiny_dense.atss(), softmax_atss()),
    # classes
    'No shared class': lambda: ClassMap(['RBC', 'WBC'], ['cat', 'dog']),
    'A class twice': lambda: ClassMap(['cat', 'cat'], ['cat']),
    'More or fewer names than classes': lambda: distil(
        tiny.gfl(), dict(m=HINT), teacher_classes=('cat', 'dog')
    ),
    # peers
    'Peers of other priors': peers('MutualLearning', tiny.retinanet()),
    'Peers of other classes': peers(
        'MutualLearning', tiny.gfl(), classes=tiny.CLASSES[::-1]
    ),
    'Too few peers': peers('FFSD', tiny.gfl()),
    'Too many peers': peers('DCM', tiny.gfl(), tiny.gfl()),
    'A peer without config': built(
        peers=dict(second=dict(checkpoint='second.pth')),
        methods=dict(m=dict(type='mmkd.MutualLearning')),
    ),
    'A name of a peer that losses cannot have': built(
        peers=dict(student=dict(config='a.py')),
        methods=dict(m=dict(type='mmkd.MutualLearning')),
    ),
    'A peer named like a method': built(
        peers=dict(dml=dict(config='a.py')),
        methods=dict(dml=dict(type='mmkd.MutualLearning')),
    ),
    'A peer named like other metrics': built(
        peers=dict(ensemble=dict(config='a.py')),
        methods=dict(m=dict(type='mmkd.MutualLearning')),
    ),
    'A weight for a teacher that is not there': peers(
        'OneTeacherSeveralStudents', tiny.gfl()
    ),
    'A weight for other students that are not there': lambda: build_distiller(
        dict(
            teacher=dict(config=dict(model=tiny.gfl()), trainable=True),
            methods=dict(m=dict(type='mmkd.OneTeacherSeveralStudents')),
        ),
        tiny.build(tiny.gfl()),
        tiny.CLASSES,
    ),
    'Features by a method that compares none': peers(
        'MutualLearning', tiny.gfl(), features=dict(type='mmkd.KD')
    ),
    'Another optimiser of a peer': lambda: peer_optimizer(
        dict(type='AdamW', lr=1e-3)
    ),
    'Another accumulation of a peer': lambda: peer_optimizer(
        dict(type='SGD', lr=0.1), accumulative_counts=4
    ),
    'Clipping of a peer alone': lambda: peer_optimizer(
        dict(type='SGD', lr=0.1), clip_grad=dict(max_norm=1)
    ),
    'A built optimiser without the peers': lambda: check_trained(
        student_optimizer(), dict(second=a_peer())
    ),
    # ensembles
    'Too few members': lambda: EnsembleDetector([tiny.build(tiny.gfl())]),
    'Members of other classes': lambda: EnsembleDetector(
        [
            tiny.build(tiny.gfl()),
            tiny.build(tiny.gfl(bbox_head__num_classes=5)),
        ]
    ),
    'Logits of unlike heads': lambda: EnsembleDetector(
        [tiny.build(tiny.gfl()), tiny.build(tiny.retinanet())],
        fusion='logits',
    ),
    'A member without checkpoint': lambda: EnsembleDetector(
        [dict(config='a.py'), dict(config='b.py')]
    ),
    'An ensemble in training': ensemble_in_training,
    # files
    'Missing config of the teacher': built(
        teacher=dict(config='no.py', checkpoint=None), methods=dict(m=HINT)
    ),
    'No checkpoint given': built(
        teacher=dict(config='no.py'), methods=dict(m=HINT)
    ),
    'Unknown name of a model': built(
        teacher='paa_r101_fpn_1x_cocoo', methods=dict(m=HINT)
    ),
    'Missing checkpoint': lambda: load_checkpoint_file('no.pth'),
    'Truncated checkpoint': truncated,
    'A file that is no checkpoint': web_page,
    'A checkpoint that holds more than weights': pickled_code,
    'The checkpoint of another network': of_another_network,
    'Resumed with other methods': resumed_with_other_methods,
    'Missing data': no_data,
    'Truncated annotations': cut_annotations,
    'Missing images': lambda: check_images(NoImages()),
    # training
    'A loss is NaN or infinite': nan_loss,
    'A network diverges': diverged_peer,
}
# --------------------------------------------------------------------- tests


def shown(cell):
    """The message of a cell, as a pattern."""
    assert re.fullmatch(r'`.*`', cell), cell
    literal = cell.strip('`').strip()
    parts = literal.split(DOTS)
    assert sum(map(len, parts)) >= 25, f'too little of it: {cell}'
    return '.*'.join(map(re.escape, parts))


def test_the_page_lists_the_cases_in_their_order():
    assert [wrong for wrong, _ in rows()] == list(CASES)


@pytest.mark.parametrize('wrong', CASES)
def test_the_message_is_the_one_that_is_printed(wrong, tmp_path):
    provoke = CASES[wrong]
    needed = inspect.signature(provoke).parameters
    with pytest.raises((ValueError, RuntimeError)) as caught:
        provoke(*[tmp_path] * ('folder' in needed))
    assert type(caught.value).__module__.startswith('mmkd.')
    message = ' '.join(str(caught.value).split())
    assert re.fullmatch(shown(ROWS[wrong]), message), message
