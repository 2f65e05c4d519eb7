"""Several detectors as one, against loops and in real runs."""

import copy
import sys

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner import Runner
from mmengine.structures import InstanceData

from mmkd.detectors.averaging import mean_of
from mmkd.errors import CheckpointError, ConfigError
from mmkd.peers.ensemble import EnsembleDetector, fuse_boxes
from tests.helpers import tiny_dense, toy
from tests.helpers import tiny_detectors as tiny

SIZES = ((96, 128), (128, 96))


def detector(config, seed):
    """In eval mode, with scores that differ from place to place."""
    model = tiny.build(config, seed=seed, spread=5)
    if hasattr(model, 'bbox_head'):
        generator = torch.Generator().manual_seed(seed)
        for layer in model.bbox_head.children():
            if isinstance(layer, torch.nn.Conv2d):
                weight = layer.weight
                torch.nn.init.normal_(weight, std=0.3, generator=generator)
        model.test_cfg.score_thr = 0.01
        model.bbox_head.test_cfg.score_thr = 0.01
    return tiny.in_eval(model)


@pytest.fixture(scope='module')
def pair():
    return [detector(tiny.gfl(), seed) for seed in (1, 2)]


def data(**options):
    return tiny.raw_batch(sizes=SIZES, **options)


def instances(boxes, scores, labels):
    return InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        scores=torch.tensor(scores, dtype=torch.float32),
        labels=torch.tensor(labels, dtype=torch.long),
    )


def iou(a, b):
    area = [(x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in (a, b)]
    w = min(a[2], b[2]) - max(a[0], b[0])
    h = min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / (sum(area) - shared)


def fused_by_loops(predictions, threshold):
    """Weighted boxes fusion as the paper's algorithm tells it."""
    members = len(predictions)
    entries = sorted(
        (
            (s.item(), c.item(), b.tolist())
            for p in predictions
            for b, s, c in zip(p.bboxes, p.scores, p.labels, strict=True)
        ),
        key=lambda entry: -entry[0],
    )
    clusters, fused = [], []
    for score, label, box in entries:
        best, overlap = None, threshold
        for k, (_, other, mean) in enumerate(fused):
            if other == label and iou(mean, box) > overlap:
                best, overlap = k, iou(mean, box)
        if best is None:
            best = len(fused)
            clusters.append([])
            fused.append(None)
        clusters[best].append((score, box))
        total = sum(s for s, _ in clusters[best])
        mean = [
            sum(s * b[i] for s, b in clusters[best]) / total for i in range(4)
        ]
        fused[best] = (total / len(clusters[best]), label, mean)
    found = [
        (score * min(members, len(cluster)) / members, label, box)
        for (score, label, box), cluster in zip(fused, clusters, strict=True)
    ]
    return sorted(found, key=lambda entry: -entry[0])


def test_two_boxes_by_hand():
    """Scores .6 and .3: two thirds of the way to the first; (.6 + .3) / 2."""
    first = instances([[10, 10, 40, 40], [60, 60, 80, 80]], [0.6, 0.5], [0, 1])
    second = instances([[13, 10, 43, 40]], [0.3], [0])
    fused = fuse_boxes([first, second], (100, 200), 0.55, 100)
    torch.testing.assert_close(
        fused.bboxes,
        torch.tensor([[11.0, 10, 41, 40], [60, 60, 80, 80]]),
    )
    assert fused.scores.tolist() == pytest.approx([0.45, 0.25])
    assert fused.labels.tolist() == [0, 1]
    assert fused.labels.dtype == torch.long
    best = fuse_boxes([first, second], (100, 200), 0.55, 1)
    assert len(best) == 1


def test_random_boxes_by_loops():
    random = np.random.default_rng(0)
    predictions = []
    corners = random.uniform(0, 60, (12, 2))
    for _ in range(3):
        jitter = corners + random.uniform(-5, 5, (12, 2))
        boxes = np.hstack([jitter, jitter + random.uniform(20, 35, (12, 2))])
        predictions.append(
            instances(
                boxes.clip(0, 100),
                random.uniform(0.1, 1, 12),
                random.integers(0, 2, 12),
            )
        )
    fused = fuse_boxes(predictions, (100, 100), 0.5, 100)
    expected = fused_by_loops(predictions, 0.5)
    assert len(fused) == len(expected) < 36
    assert fused.labels.tolist() == [label for _, label, _ in expected]
    torch.testing.assert_close(
        fused.scores, torch.tensor([score for score, _, _ in expected])
    )
    torch.testing.assert_close(
        fused.bboxes,
        torch.tensor([box for _, _, box in expected]),
        rtol=1e-4,
        atol=1e-3,
    )


def test_nothing_and_flat_boxes(recwarn):
    nothing = instances([], [], [])
    flat = instances([[5, 5, 5, 9]], [0.9], [1])
    outside = instances([[90, 90, 130, 140]], [0.8], [2])
    assert len(fuse_boxes([nothing, flat], (100, 100), 0.5, 9)) == 0
    fused = fuse_boxes([nothing, outside], (100, 100), 0.5, 9)
    assert fused.bboxes.tolist() == [[90, 90, 100, 100]]
    assert not recwarn


@pytest.mark.parametrize('fusion', ['boxes', 'logits'])
def test_a_detector_and_its_twin_are_itself(pair, fusion):
    alone = pair[0].test_step(data())
    twins = EnsembleDetector([pair[0], copy.deepcopy(pair[0])], fusion=fusion)
    together = twins.test_step(data())
    for a, b in zip(alone, together, strict=True):
        mine, ours = a.pred_instances, b.pred_instances
        assert len(mine) == len(ours) > 5
        order = mine.scores.argsort(descending=True, stable=True)
        inside = mine.bboxes[order].clamp(min=0)
        torch.testing.assert_close(ours.scores, mine.scores[order])
        torch.testing.assert_close(ours.bboxes, inside, atol=1e-3, rtol=1e-4)


def nms(**options):
    model = copy.deepcopy(tiny.gfl())
    model.test_cfg.nms = dict(options)
    return model


@pytest.mark.parametrize(
    ('configs', 'threshold'),
    [
        ([tiny.retinanet(), tiny.faster_rcnn()], 0.55),  # NMS at 0.5
        ([tiny.gfl(), tiny.retinanet()], 0.65),  # at 0.6, and 0.5
        ([tiny_dense.yolox(), tiny_dense.yolox()], 0.7),
        ([nms(type='nms', iou_threshold=0.3)] * 2, 0.55),
        ([nms(type='nms', iou_threshold=0.98)] * 2, 0.99),
        ([nms(type='soft_nms', iou_threshold=0.7)] * 2, 0.55),
    ],
)
def test_above_the_iou_of_the_members_nms(configs, threshold):
    members = [detector(config, 1) for config in configs]
    ensemble = EnsembleDetector(members)
    assert ensemble.iou_threshold == pytest.approx(threshold)
    assert EnsembleDetector(members, iou_threshold=0.8).iou_threshold == 0.8


def test_a_threshold_below_that_of_nms(pair, logged):
    """Two boxes that GFL's NMS leaves: IoU 0.58."""
    boxes = [[0, 0, 100, 100], [0, 0, 58, 100]]
    found = instances(boxes, [0.9, 0.8], [0, 0])
    nothing = instances([], [], [])
    default = EnsembleDetector(pair)
    assert not logged
    low = EnsembleDetector(pair, iou_threshold=0.55)
    (warning,) = logged
    assert "is not above that of the members' NMS (0.6)" in warning
    for ensemble, number in ((low, 1), (default, 2)):
        fused = fuse_boxes(
            [found, nothing], (100, 100), ensemble.iou_threshold, 100
        )
        assert len(fused) == number


def test_boxes_of_members(pair):
    each = [model.test_step(data()) for model in pair]
    together = EnsembleDetector(pair).test_step(data())
    for index, sample in enumerate(together):
        found = [results[index].pred_instances for results in each]
        expected = fused_by_loops(found, 0.65)[:100]
        assert sample.pred_instances.scores.tolist() == pytest.approx(
            [score for score, _, _ in expected], rel=1e-4
        )


def test_members_of_other_kinds_and_normalisations():
    models = [
        detector(tiny.gfl(), 1),
        detector(tiny.fcos(), 2),  # another mean, another channel order
        detector(tiny.faster_rcnn(), 3),
    ]
    each = [model.test_step(data()) for model in models]
    together = EnsembleDetector(models).test_step(data())
    for index, sample in enumerate(together):
        expected = fused_by_loops(
            [results[index].pred_instances for results in each], 0.65
        )
        assert sample.pred_instances.scores.tolist() == pytest.approx(
            [score for score, _, _ in expected][:100], rel=1e-4
        )


@pytest.mark.parametrize('make', [tiny.gfl, tiny.fcos, tiny_dense.atss])
def test_the_mean_of_logits(make):
    """The first member's head, given the mean by hand."""
    models = [detector(make(), seed) for seed in (1, 2)]
    together = EnsembleDetector(models, fusion='logits').test_step(data())
    with torch.no_grad():
        batch = models[0].data_preprocessor(data())
        parts = [
            model.bbox_head(model.extract_feat(batch['inputs']))
            for model in models
        ]
        mean = [
            [(a + b) / 2 for a, b in zip(*levels, strict=True)]
            for levels in zip(*parts, strict=True)
        ]
        metas = [sample.metainfo for sample in batch['data_samples']]
        expected = models[0].bbox_head.predict_by_feat(
            *mean, batch_img_metas=metas, rescale=True
        )
    for sample, theirs in zip(together, expected, strict=True):
        assert len(theirs) > 5
        torch.testing.assert_close(sample.pred_instances.bboxes, theirs.bboxes)
        torch.testing.assert_close(sample.pred_instances.scores, theirs.scores)
    assert 'forward' not in vars(models[0].bbox_head)


def test_outputs_of_other_shapes():
    one, other = [torch.zeros(2)], [torch.zeros(3)]
    with pytest.raises(ConfigError, match='cannot be averaged'):
        mean_of([one, other])
    assert mean_of([([torch.ones(1)], None), ([torch.zeros(1)], None)]) == (
        [torch.tensor([0.5])],
        None,
    )


class TestMembersThatDoNotFit:
    @pytest.mark.parametrize(
        ('other', 'message'),
        [
            (tiny_dense.atss(), 'GFLHead and ATSSHead'),
            (tiny.gfl(bbox_head__reg_max=8), 'reg_max is 16 and 8'),
            (
                tiny.gfl(
                    bbox_head__anchor_generator__strides=[4, 8, 16, 32, 64]
                ),
                'anchors differ',
            ),
            (
                tiny.gfl(bbox_head__anchor_generator__octave_base_scale=4),
                'anchors differ',
            ),
            (
                tiny.gfl(bbox_head__num_classes=5),
                r'numbers of classes, \[3, 5\]',
            ),
            (
                tiny.gfl(data_preprocessor__pad_size_divisor=64),
                'padded to different sizes',
            ),
            (tiny.faster_rcnn(), 'GFLHead and NoneType'),
        ],
    )
    def test_heads(self, other, message):
        models = [tiny.build(tiny.gfl()), tiny.build(other)]
        with pytest.raises(ConfigError, match=message):
            EnsembleDetector(models, fusion='logits')

    def test_transformers(self):
        models = [tiny.build(tiny.detr()), tiny.build(tiny.detr())]
        with pytest.raises(ConfigError, match='DETRHead has no priors'):
            EnsembleDetector(models, fusion='logits')

    def test_options(self, pair):
        for options, message in (
            (dict(fusion='nms'), 'fusion must be one of'),
            (dict(iou_threshold=1), 'iou_threshold must be between'),
            (
                dict(iou_threshold=0.7, fusion='logits'),
                "iou_threshold is for fusion='boxes'",
            ),
            (dict(max_per_img=0), 'max_per_img of at least 1'),
        ):
            with pytest.raises(ConfigError, match=message):
                EnsembleDetector(pair, **options)
        with pytest.raises(ConfigError, match='least two members'):
            EnsembleDetector(pair[:1])
        with pytest.raises(ConfigError, match=r'members\[0\] has no option'):
            EnsembleDetector([dict(konfig='x'), dict(config='y')])
        with pytest.raises(ConfigError, match=r'needs a "config" and a "ch'):
            EnsembleDetector([dict(config='x'), dict(config='y')])

    def test_without_the_library(self, pair, monkeypatch):
        monkeypatch.setitem(sys.modules, 'ensemble_boxes', None)
        with pytest.raises(ConfigError, match=r'pip install mmkd\[ensemble\]'):
            EnsembleDetector(pair)
        EnsembleDetector(pair, fusion='logits')

    def test_it_is_not_trained(self, pair):
        ensemble = EnsembleDetector(pair)
        with pytest.raises(ConfigError, match='is for inference'):
            ensemble(torch.zeros(1, 3, 64, 64), [], mode='loss')


# --------------------------------------------------------------- real files


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A config and two checkpoints of untrained detectors."""
    folder = tmp_path_factory.mktemp('members')
    cfg = toy.plain(folder, toy.RETINANET)
    cfg.model.test_cfg.score_thr = 0.0
    cfg.model.bbox_head.init_cfg = dict(type='Normal', layer='Conv2d', std=0.3)
    for name in ('first', 'second'):
        toy.write(cfg, folder / f'{name}.py')
        torch.manual_seed(len(name))
        state = toy.detector(cfg.model).state_dict()
        meta = dict(dataset_meta=dict(classes=toy.stock_classes()))
        path = folder / f'{name}.pth'
        torch.save(dict(state_dict=state, meta=meta), path)
    members = [
        dict(config=str(folder / f'{n}.py'), checkpoint=f'{folder}/{n}.pth')
        for n in ('first', 'second')
    ]
    cfg.model = dict(type='mmkd.EnsembleDetector', members=members)
    toy.write(cfg, folder / 'ensemble.py')
    return folder


def test_the_command_line_tests_it(files, tmp_path):
    """Other predictions than a member's, and those of the class itself."""
    out = tmp_path / 'all.pkl'
    job = toy.tool(
        tmp_path / 'log',
        'tools/test.py',
        files / 'ensemble.py',
        *('--work-dir', tmp_path, '--out', out),
    )
    assert job.process.exitcode == 0, job.text()
    results = np.load(out, allow_pickle=True)
    cfg = Config.fromfile(files / 'ensemble.py')
    ensemble = EnsembleDetector(cfg.model.members)
    with DefaultScope.overwrite_default_scope('mmdet'):
        loader = Runner.build_dataloader(cfg.test_dataloader)
    batch = next(iter(loader))
    expected = ensemble.test_step(batch)[0].pred_instances
    got = results[0]['pred_instances']
    assert len(expected) > 50
    torch.testing.assert_close(got['scores'], expected.scores)
    torch.testing.assert_close(got['bboxes'], expected.bboxes)
    alone = ensemble.members[0].test_step(batch)[0].pred_instances
    assert not torch.equal(alone.scores, expected.scores)


def test_the_command_line_says_what_is_missing(files, tmp_path):
    for config, extra, message in (
        ('ensemble.py', [files / 'first.pth'], 'takes no checkpoint'),
        ('first.py', [], 'the checkpoint is missing'),
    ):
        job = toy.tool(
            tmp_path / 'log', 'tools/test.py', files / config, *extra
        )
        assert job.process.exitcode != 0
        assert message in job.text()


def test_a_checkpoint_of_another_detector(files, tmp_path):
    content = toy.load(files / 'second.pth')
    content['state_dict'].popitem()
    torch.save(content, tmp_path / 'second.pth')
    config = str(files / 'first.py')
    members = [
        dict(config=config, checkpoint=f'{folder}/{name}.pth')
        for folder, name in ((files, 'first'), (tmp_path, 'second'))
    ]
    with pytest.raises(CheckpointError, match=r'members\[1\]: .*1 keys are m'):
        EnsembleDetector(members)


def test_members_of_other_classes(files, tmp_path):
    content = toy.load(files / 'second.pth')
    content['meta']['dataset_meta']['classes'].reverse()
    torch.save(content, tmp_path / 'second.pth')
    members = [
        dict(config=str(files / 'first.py'), checkpoint=f'{folder}/{name}.pth')
        for folder, name in ((files, 'first'), (tmp_path, 'second'))
    ]
    with pytest.raises(ConfigError, match=r'members\[1\] was trained on'):
        EnsembleDetector(members)
