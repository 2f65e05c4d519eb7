"""Whatever a loss does to its data samples, nobody else sees it."""

import hashlib

import numpy as np
import pytest
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmkd.core.distiller import build_distiller
from mmkd.data.batch import Batch
from mmkd.detectors.shrink import noise_batch, small_model
from mmkd.doctor.families import CONFIGS, families
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.together import Networks


def content(value):
    """Everything in a data sample, tensors and masks by their hashes."""
    if isinstance(value, BaseDataElement):
        return {
            'type': type(value),
            'meta': {k: content(v) for k, v in value.metainfo_items()},
            'data': {k: content(v) for k, v in value.items()},
        }
    if isinstance(value, list | tuple):
        return [content(item) for item in value]
    for name in ('tensor', 'masks'):  # boxes and masks
        if hasattr(value, name):
            return type(value), content(getattr(value, name))
    if isinstance(value, Tensor):
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        digest = hashlib.sha256(np.ascontiguousarray(value)).hexdigest()
        return value.dtype, value.shape, digest
    return value


def everything(batch):
    return content([batch.inputs, *batch.data_samples])


@pytest.fixture
def batch():
    data = noise_batch(masks=True, extras=True)
    return Batch(torch.stack(data['inputs']), data['data_samples'])


def test_a_copy_is_the_same(batch):
    assert content(batch.copies()) == content(batch.data_samples)
    assert 'gt_instances' in batch.copies()[0]
    assert len(batch.copies()[0].gt_instances) == 2


def bind(sample):
    sample.gt_instances.masks = sample.gt_instances.masks.to_tensor(
        torch.bool, 'cpu'
    )


def write(sample):
    sample.gt_instances.bboxes /= 2
    sample.gt_instances.labels += 1
    sample.gt_sem_seg.sem_seg.zero_()


def take(sample):
    sample.proposals.pop('bboxes')
    del sample.ignored_instances


def describe(sample):
    sample.set_metainfo(dict(img_shape=(1, 1), text='cat'))
    sample.gt_instances.set_metainfo(dict(text='cat'))


@pytest.mark.parametrize('change', [bind, write, take, describe])
def test_what_is_done_to_a_copy_stays_there(batch, change):
    before = everything(batch)
    change(batch.copies()[0])
    assert everything(batch) == before
    change(batch.data_samples[0])
    assert everything(batch) != before


def one_size(model):
    sizes = ((128, 128),) * 2  # RTMDet-Ins stacks the masks of all images
    return tiny.batch_for(model, sizes=sizes, masks=True, extras=True)


def losses_of(model, batch):
    torch.manual_seed(0)
    return model.loss(*batch)


@pytest.mark.parametrize('config', [tiny_dense.rtmdet_ins, tiny.gfl])
def test_every_network_trains_as_if_alone(config, monkeypatch):
    config = config()
    networks = Networks({}, config, {'one': config, 'two': config})
    student, peers = networks.student, networks.peers
    batch, alone = one_size(student), {}
    before = content(list(batch))
    for name, model in peers.items():
        alone[name] = losses_of(model, one_size(student))
    if config.type == 'GFL':  # of a third party, and careless
        head, loss = student.bbox_head, student.bbox_head.loss

        def writing(maps, samples):
            losses = loss(maps, samples)
            for sample in samples:
                write(sample)
            return losses

        monkeypatch.setattr(head, 'loss', writing)
    networks.distiller.attach()
    found = losses_of(student, batch)
    assert content(list(batch)) == before
    for name, losses in alone.items():
        for key, value in losses.items():
            assert toy.same(found[f'{name}.{key}'], value)


@pytest.mark.filterwarnings('ignore:THE TEACHER IS UNTRAINED')
@pytest.mark.parametrize('method', ['KD', 'DML', 'DCM'])
def test_methods_follow_a_loss_that_changes_its_samples(method):
    config = tiny_dense.rtmdet_ins()
    options = dict(type=f'mmkd.{method}')
    if method == 'DCM':
        options['stages'] = ['backbone.stage2', 'backbone.stage3']
    cfg = dict(methods=dict(m=options))
    if method == 'KD':
        metainfo = dict(metainfo=dict(classes=tiny.CLASSES))
        teacher = dict(model=config, test_dataloader=dict(dataset=metainfo))
        cfg['teacher'] = dict(config=teacher, checkpoint=None)
    else:
        cfg['peers'] = dict(one=dict(config=dict(model=config)))
    student = tiny_dense.build(config)
    batch = one_size(student)
    before = content(list(batch))
    build_distiller(cfg, student, tiny.CLASSES).attach()
    assert [key for key in student.loss(*batch) if key.startswith('m.')]
    assert content(list(batch)) == before


STOCK = [
    *('/'.join((folder, n)) for folder, ns in families().items() for n in ns),
    'rtmdet/rtmdet-ins_tiny_8xb32-300e_coco.py',
]


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore')
def test_the_losses_of_stock_configs_leave_everything_as_it_was():
    """What cannot train on noise at toy scale is left out."""
    ran, writing = [], []
    for name in STOCK:
        try:
            batch, loss = tried(name)
            before, samples = everything(batch), batch.copies()
            given = content(samples)
            loss(batch.inputs, samples)
        except Exception:  # any detector, any reason
            continue
        ran.append(name)
        assert everything(batch) == before, name
        if content(samples) != given:
            writing.append(name.partition('/')[0])
    assert len(ran) >= 50, sorted(set(STOCK) - set(ran))
    assert set(writing) >= {'fast_rcnn', 'rtmdet'}


def tried(name):
    """A batch of noise for a stock config at toy scale, and its loss."""
    cfg = small_model(Config.fromfile(CONFIGS / name).model)
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg).train()
    noise = noise_batch(((96, 128),) * 2, (3, 2), masks=True, extras=True)
    data = model.data_preprocessor(noise, training=True)
    return Batch(data['inputs'], data['data_samples']), model.loss
