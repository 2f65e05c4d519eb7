"""The teacher's cache: the same losses, and never a wrong entry."""

import copy
import functools
from unittest import mock

import pytest
import torch
from torch import nn

from mmkd.errors import ConfigError
from mmkd.teachers import cache as teacher_cache
from tests.helpers import faster, toy
from tests.helpers import tiny_detectors as tiny

METHODS = dict(
    hint=dict(type='mmkd.FeatureHint'),
    stage=dict(type='mmkd.PKD', source='backbone.layer3'),
    kd=dict(type='mmkd.KD'),
    ld=dict(type='mmkd.LD'),
)
PARTS = ('features neck', 'features backbone.layer3', 'dense')
SIZES = ((160, 192), (192, 160), (160, 160))
"""Beyond 128: one value a channel is too few for norms, in single images."""


@pytest.fixture(scope='module')
def teacher(tmp_path_factory):
    return faster.saved(tiny.gfl(), tmp_path_factory.mktemp('weights'))


@pytest.fixture(scope='module')
def plain(teacher):
    """A distiller without a cache."""
    return faster.distiller_of(tiny.gfl(), teacher, METHODS)


@pytest.fixture(scope='module')
def batch(plain):
    return tiny.batch_for(plain.student, sizes=SIZES)


class Cached:
    """A distiller with a cache, and which images its teacher runs on."""

    def __init__(self, folder, teacher, methods=METHODS, config=None, **more):
        config = config or tiny.gfl()
        self.cfg = dict(teacher, cache=dict(dir=str(folder)), **more)
        self.distiller = faster.distiller_of(config, self.cfg, methods)
        self.ran = []
        self.distiller.teacher.model.backbone.register_forward_hook(
            lambda _, inputs, __: self.ran.append(len(inputs[0]))
        )

    def step(self, batch):
        """The step's distilled losses and the share of hits."""
        self.distiller.attach()
        try:
            losses = tiny.seeded_loss(self.distiller.student, *batch)
        finally:
            self.distiller.detach()
        hits = losses['teacher.cache_hits'].item()
        return {k: v for k, v in losses.items() if '.loss' in k}, hits


def images_of(batch, *index):
    inputs, samples = batch
    return inputs[list(index)], [samples[i] for i in index]


def test_the_first_step_computes_and_the_second_reads(
    teacher, plain, batch, tmp_path
):
    expected = faster.losses_of(plain, batch)
    cached = Cached(tmp_path, teacher)
    first, hits = cached.step(batch)
    assert toy.same(first, expected)
    assert (hits, cached.ran) == (0, [3])
    assert len(list(tmp_path.glob('??/*'))) == len(PARTS) * 3
    second, hits = cached.step(batch)
    assert toy.same(second, expected)
    assert (hits, cached.ran) == (1, [3])
    # So does another process, or a later run.
    other = Cached(tmp_path, teacher)
    losses, hits = other.step(batch)
    assert toy.same(losses, expected)
    assert (hits, other.ran) == (1, [])


def test_only_missing_images_are_computed(teacher, plain, batch, tmp_path):
    cached = Cached(tmp_path, teacher)
    cached.step(images_of(batch, 0, 2))
    losses, hits = cached.step(images_of(batch, 2, 1, 0))
    assert hits == pytest.approx(2 / 3)
    assert cached.ran == [2, 1]
    expected = faster.losses_of(plain, images_of(batch, 2, 1, 0))
    assert faster.apart(losses, expected) < 1e-4
    assert cached.step(batch)[1] == 1


def test_a_two_stage_teacher_scores_live_on_known_maps(tmp_path):
    config = tiny.faster_rcnn()
    teacher = faster.saved(config, tmp_path)
    methods = dict(frcnn=dict(type='mmkd.FasterRCNNDistillation'))
    plain = faster.distiller_of(config, teacher, methods)
    batch = tiny.batch_for(plain.student, sizes=SIZES)
    expected = faster.losses_of(plain, batch)
    cached = Cached(tmp_path / 'cache', teacher, methods, config)
    heads = []
    model = cached.distiller.teacher.model
    for head in (model.rpn_head, model.roi_head.bbox_head):
        head.register_forward_hook(lambda head, *_: heads.append(head))
    for hits in (0, 1):
        losses, share = cached.step(batch)
        assert toy.same(losses, expected)
        assert share == hits
    assert cached.ran == [3]
    box_head = model.roi_head.bbox_head
    assert heads == [model.rpn_head, box_head, box_head]


class TestKey:
    """What makes another entry."""

    @pytest.fixture
    def known(self, teacher, batch, tmp_path):
        cached = Cached(tmp_path, teacher)
        cached.step(batch)
        assert cached.step(batch)[1] == 1
        return cached

    def test_pixels(self, known, batch):
        inputs = batch[0].clone()
        value = inputs[0, 2, 95, 127]
        inputs[0, 2, 95, 127] = torch.nextafter(value, value + 1)
        assert known.step((inputs, batch[1]))[1] == pytest.approx(2 / 3)

    def test_flipped_images(self, known, batch):
        assert known.step((batch[0].flip(-1), batch[1]))[1] == 0

    def test_padding(self, known, batch):
        larger = nn.functional.pad(batch[0], (0, 32))
        assert known.step((larger, batch[1]))[1] == 0

    def test_outputs(self, teacher, known, batch, tmp_path):
        more = dict(METHODS, early=dict(type='mmkd.PKD', source='backbone'))
        other = Cached(tmp_path, teacher, more)
        assert other.step(batch)[1] == pytest.approx(3 / 4)
        assert other.ran == [3]

    def test_weights(self, known, batch, tmp_path):
        (tmp_path / 'other').mkdir()
        teacher = faster.saved(tiny.gfl(), tmp_path / 'other', seed=8)
        assert Cached(tmp_path, teacher).step(batch)[1] == 0

    def test_options(self, teacher, known, batch, tmp_path):
        other = Cached(tmp_path, teacher, fold_bn=True)
        assert other.step(batch)[1] == 0

    def test_config(self, teacher, known, batch, tmp_path):
        """The same weights at other strides are another teacher."""
        changes = {'model.backbone.strides': (1, 2, 2, 1)}
        methods = dict(stage=METHODS['stage'])
        other = Cached(tmp_path, teacher, methods, cfg_options=changes)
        assert other.step(batch)[1] == 0
        assert other.ran == [3]

    def test_code(self, teacher, known, batch, tmp_path, monkeypatch):
        sources = (*teacher_cache.SOURCES, 'utils')
        monkeypatch.setattr(teacher_cache, 'SOURCES', sources)
        assert Cached(tmp_path, teacher).step(batch)[1] == 0

    @pytest.mark.parametrize('part', ['cuda.matmul', 'cudnn'])
    def test_tensorfloat32(self, known, batch, part):
        backend = functools.reduce(getattr, part.split('.'), torch.backends)
        allowed = backend.allow_tf32
        try:
            backend.allow_tf32 = not allowed
            assert known.step(batch)[1] == 0
        finally:
            backend.allow_tf32 = allowed
        assert known.step(batch)[1] == 1

    def test_half_precision_of_the_step(self, known, batch):
        with torch.autocast('cpu', torch.bfloat16):
            assert known.step(batch)[1] == 0
            assert known.step(batch)[1] == 1
        assert known.step(batch)[1] == 1


def test_another_gpu_has_its_own_entries(teacher, batch, tmp_path):
    """Without a GPU: an image that says it is on one."""

    class Image(torch.Tensor):
        is_cuda = True

    cache = Cached(tmp_path, teacher).distiller.teacher.cache
    image, sample = batch[0][0].as_subclass(Image), batch[1][0]
    keys = set()
    for name in ('H100', 'A100', 'H100'):
        with mock.patch('torch.cuda.get_device_name', lambda _, n=name: n):
            keys.add(cache.key(image, sample))
    assert len(keys) == 2


def test_damaged_entries_are_computed_again(teacher, plain, batch, tmp_path):
    cached = Cached(tmp_path, teacher)
    cached.step(batch)
    first, second, third, *_ = sorted(tmp_path.glob('??/*'))
    first.write_bytes(first.read_bytes()[:-1])
    content = second.read_bytes()
    middle = len(content) // 2
    changed = bytes([content[middle] ^ 1])
    second.write_bytes(content[:middle] + changed + content[middle + 1 :])
    third.write_bytes(content)  # whole, but of another image or output
    losses, hits = cached.step(batch)
    assert hits == pytest.approx(1 - 3 / 9)
    assert faster.apart(losses, faster.losses_of(plain, batch)) < 1e-4
    assert cached.step(batch)[1] == 1


def test_only_what_is_read_is_kept(teacher, batch, tmp_path):
    methods = dict(kd=METHODS['kd'])
    cached = Cached(tmp_path, teacher, methods)
    cached.step(batch)
    assert len(list(tmp_path.glob('??/*'))) == 3
    cached.distiller.scales['kd'] = 0.0
    cached.distiller.attach()
    losses = tiny.seeded_loss(cached.distiller.student, *batch)
    cached.distiller.detach()
    assert not any('.' in name for name in losses)


def test_teachers_of_a_list_have_a_rate_each(teacher, batch, tmp_path):
    cfg = [
        dict(teacher, cache=dict(dir=str(tmp_path)), label='a'),
        dict(teacher, label='b'),
    ]
    student = tiny.build(tiny.gfl())
    methods = dict(kd=METHODS['kd'])
    distiller = faster.build_distiller(
        dict(teacher=cfg, methods=methods), student, tiny.CLASSES
    )
    distiller.attach()
    for rate in (0, 1):
        losses = tiny.seeded_loss(student, *batch)
        assert losses['teacher_a.cache_hits'] == rate
        assert 'teacher_b.cache_hits' not in losses


def test_the_teachers_of_a_mean_have_one_rate(teacher, batch, tmp_path):
    cfg = [dict(teacher, cache=dict(dir=str(tmp_path))), teacher]
    student = tiny.build(tiny.gfl())
    distiller = faster.build_distiller(
        dict(teacher=dict(mean=cfg), methods=dict(kd=METHODS['kd'])),
        student,
        tiny.CLASSES,
    )
    distiller.attach()
    rates = [
        tiny.seeded_loss(student, *batch)['teacher.cache_hits'].item()
        for _ in range(2)
    ]
    assert rates == [0, 1]


def test_a_teacher_that_mixes_images_is_refused(teacher, tmp_path):
    mixing = copy.deepcopy(teacher)
    mixing['config']['model']['neck']['norm_cfg'] = dict(
        type='BN', track_running_stats=False
    )
    mixing['checkpoint'] = None
    with pytest.raises(
        ConfigError, match=r'cache.*not the same in another batch'
    ):
        Cached(tmp_path, mixing)


@pytest.mark.parametrize(
    ('cache', 'message'),
    [
        ('folder', r"must be a dict with the folder \"dir\".*'folder'"),
        (dict(max_gib=3), 'must be a dict with the folder "dir"'),
        (dict(dir='x', max_gb=3), 'Did you mean "max_gib"'),
        (dict(dir='x', max_gib=0), 'above 0 and finite, got 0'),
        (dict(dir='x', max_gib=float('inf')), 'above 0 and finite, got inf'),
        (dict(dir=__file__), 'cannot hold a cache .*that this process can'),
        (dict(dir='x', max_gib='3'), "max_gib must be a number, got '3'"),
    ],
)
def test_wrong_options(teacher, cache, message):
    cfg = dict(teacher, cache=cache)
    with pytest.raises(ConfigError, match=message):
        faster.distiller_of(tiny.gfl(), cfg, METHODS)


def test_a_training_without_random_transforms(tmp_path):
    def config(name, **cache):
        cfg = toy.distilled(
            tmp_path / name, toy.RETINANET, epochs=2, images=4, batch=1
        )
        pipeline = cfg.train_dataloader.dataset.pipeline
        kept = [t for t in pipeline if t.type != 'RandomFlip']
        cfg.train_dataloader.dataset.pipeline = kept
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        cfg.distillation.teacher.update(cache)
        return cfg

    without, within = toy.Record(), toy.Record()
    toy.train(config('a'), without)
    toy.train(config('b', cache=dict(dir=str(tmp_path / 'cache'))), within)
    rates = [losses.pop('teacher.cache_hits') for losses in within.losses]
    assert rates == [0, 0, 0, 0, 1, 1, 1, 1]
    assert within.losses == without.losses
