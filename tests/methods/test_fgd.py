"""FGD: focal and global distillation."""

import math

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from torch.utils._python_dispatch import TorchDispatchMode

from mmkd.errors import ConfigError
from mmkd.methods import FGD
from mmkd.methods.feature_base import channel_attention
from mmkd.methods.fgd import (
    AT_ONCE,
    ContextBlock,
    paint_boxes,
    relative_boxes,
)
from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import (
    FeaturePair,
    check_official,
    on_maps,
    pointwise,
    random_maps,
    randomized,
    twin,
    valid_sizes,
    weights_of,
)

SIZES = ((96, 128), (64, 96), (70, 90))
WEIGHTS = dict(
    foreground_weight=0.5,
    background_weight=0.25,
    attention_weight=0.125,
    relation_weight=0.0625,
)


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


# ------------------------------------------------------------- the reference


def masks(boxes, shape, valid, full):
    """Foreground and background of one image's part of a map."""
    foreground = torch.zeros(valid, dtype=torch.float64)
    for box in boxes.tolist():
        left, right = (
            f(v / full[1] * shape[1])
            for f, v in ((math.floor, box[0]), (math.ceil, box[2]))
        )
        top, below = (
            f(v / full[0] * shape[0])
            for f, v in ((math.floor, box[1]), (math.ceil, box[3]))
        )
        area = (right - left + 1) * (below - top + 1)
        for y in range(max(top, 0), min(below + 1, valid[0])):
            for x in range(max(left, 0), min(right + 1, valid[1])):
                foreground[y, x] = max(foreground[y, x].item(), 1 / area)
    background = (foreground == 0).double()
    return foreground, background / max(background.sum().item(), 1)


def attention(image, temperature):
    """Spatial and channel attention of one image (C, h, w)."""
    channels, height, width = image.shape
    size = image.abs()
    where = (size.sum(0) / channels / temperature).flatten().softmax(0)
    which = (size.sum((1, 2)) / (height * width) / temperature).softmax(0)
    return where.view(height, width) * height * width, which * channels


def contextual(image, block):
    """R(F) of one image from its definition."""
    p = {n: v.detach().double() for n, v in block.named_parameters()}
    vectors = image.flatten(1)
    logits = p['mask.weight'][0, :, 0, 0] @ vectors + p['mask.bias']
    context = (vectors * logits.softmax(0)).sum(1)
    hidden = p['reduce.weight'] @ context + p['reduce.bias']
    spread = ((hidden - hidden.mean()) ** 2).mean()
    hidden = (hidden - hidden.mean()) / (spread + 1e-5).sqrt()
    hidden = (hidden * p['norm.weight'] + p['norm.bias']).clamp(min=0)
    added = p['expand.weight'] @ hidden + p['expand.bias']
    return image + added[:, None, None]


def reference(pair, temperature):
    """The losses of a step, image by image in float64."""
    total = dict.fromkeys(
        ('foreground', 'background', 'attention', 'relation'), 0.0
    )
    for level, (ours, theirs) in enumerate(zip(*pair.features(), strict=True)):
        valid = valid_sizes(ours, pair.samples)
        for i, sample in enumerate(pair.samples):
            height, width = valid[i]
            s, t = (m[i, :, :height, :width].double() for m in (ours, theirs))
            fg, bg = masks(
                sample.gt_instances.bboxes,
                ours.shape[2:],
                valid[i],
                sample.batch_input_shape,
            )
            where_s, which_s = attention(s, temperature)
            where_t, which_t = attention(t, temperature)
            error = (s - t) ** 2 * where_t * which_t[:, None, None]
            total['foreground'] += (error * fg).sum().item()
            total['background'] += (error * bg).sum().item()
            total['attention'] += (
                (where_s - where_t).abs().sum()
                + (which_s - which_t).abs().sum()
            ).item()
            ours_r = contextual(s, pair.method.student_blocks[level])
            theirs_r = contextual(t, pair.method.teacher_blocks[level])
            total['relation'] += ((ours_r - theirs_r) ** 2).sum().item()
    return {
        name: value / len(pair.samples) * WEIGHTS[f'{name}_weight']
        for name, value in total.items()
    }


@pytest.mark.parametrize('objects', [2, [3, 0, 1], 0])
def test_the_formula(objects):
    pair = FeaturePair('FGD', temperature=0.3, loss_weight=2.0, **WEIGHTS)
    randomized(pair.method)
    losses = pair.step(sizes=SIZES, objects=objects)
    expected = reference(pair, 0.3)
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(2 * value, rel=1e-4)
    assert (losses['foreground'] > 0) == (objects != 0)
    assert losses['background'] > 0


def test_many_boxes_that_reach_out_of_the_image():
    pair = FeaturePair('FGD', **WEIGHTS)
    inputs, samples = tiny.batch_for(pair.student, sizes=SIZES, objects=40)
    generator = torch.Generator().manual_seed(5)
    for sample in samples:
        boxes = sample.gt_instances.bboxes
        boxes[:, :2] = 90 * torch.rand(40, 2, generator=generator) - 20
        boxes[:, 2:] = boxes[:, :2] + 50 * torch.rand(
            40, 2, generator=generator
        )
    pair.inputs, pair.samples = inputs, samples
    losses = pair.losses(inputs, samples)
    for name, value in reference(pair, 0.5).items():
        assert losses[f'kd.loss_{name}'].item() == pytest.approx(
            value, rel=1e-4
        )


class TestOfficialCode:
    """FeatureLoss of yzd-v/FGD, where nothing is padded."""

    @staticmethod
    def attention(maps):
        images, channels, height, width = maps.shape
        where = maps.abs().mean(1).view(images, -1) / 0.5
        which = maps.abs().mean(2).mean(2) / 0.5
        return (
            (height * width * where.softmax(1)).view(images, height, width),
            channels * which.softmax(1),
        )

    @staticmethod
    def masks(boxes, shape):
        foreground, background = torch.zeros(2, *shape).unbind()
        for x1, y1, x2, y2 in boxes.tolist():
            left, right = math.floor(x1 * shape[1]), math.ceil(x2 * shape[1])
            top, below = math.floor(y1 * shape[0]), math.ceil(y2 * shape[0])
            share = 1 / (below + 1 - top) / (right + 1 - left)
            part = foreground[top : below + 1, left : right + 1]
            part.clamp_(min=share)
        background[foreground == 0] = 1
        return foreground, background / max(background.sum(), 1)

    @staticmethod
    def related(maps, block):
        share = block.mask(maps).view(len(maps), 1, -1).softmax(2)
        context = (maps.view(*maps.shape[:2], -1) * share).sum(2)
        added = block.expand(block.norm(block.reduce(context)).relu())
        return maps + added[:, :, None, None]

    def test_the_four_losses(self):
        student, teacher = (
            [random_maps(2, 8, *size, seed=n) for size in ((12, 16), (6, 8))]
            for n in (1, 2)
        )
        for maps in student:
            maps.requires_grad_()
        boxes = [
            torch.tensor([[0.1, 0.2, 0.5, 0.6], [0.3, 0.3, 0.9, 0.8]]),
            torch.tensor([[0.0, 0.0, 0.3, 0.25]]),
        ]
        method = FGD()
        own = on_maps(method, student, teacher, boxes)
        official = 0.0
        for level, (s, t) in enumerate(zip(student, teacher, strict=True)):
            fg, bg = (
                torch.stack(masks)[:, None]
                for masks in zip(
                    *(self.masks(b, s.shape[2:]) for b in boxes), strict=True
                )
            )
            where_s, which_s = self.attention(s)
            where_t, which_t = self.attention(t)
            root = (where_t[:, None] * which_t[..., None, None]).sqrt()
            fg_loss, bg_loss = (
                ((s * root * m.sqrt() - t * root * m.sqrt()) ** 2).sum() / 2
                for m in (fg, bg)
            )
            at_loss = (which_s - which_t).abs().sum() / 2
            at_loss = at_loss + (where_s - where_t).abs().sum() / 2
            related = [
                self.related(s, method.student_blocks[level]),
                self.related(t, method.teacher_blocks[level]),
            ]
            re_loss = ((related[0] - related[1]) ** 2).sum() / 2
            official = official + (
                1e-3 * fg_loss + 5e-4 * bg_loss + 5e-4 * at_loss
                + 5e-6 * re_loss
            )  # fmt: skip
        check_official(own, official, student, method.parameters())


# --------------------------------------------------------------- the masks


def sample_of(boxes, full=(64, 64), shape=None):
    sample = DetDataSample(
        metainfo=dict(img_shape=shape or full, batch_input_shape=full)
    )
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor(boxes).view(-1, 4).float()
    )
    return sample


def test_boxes_by_hand():
    """On stride 8: a box of 2 x 3 positions within one of 4 x 4."""
    sample = sample_of([[8.0, 8, 31, 31], [17, 12, 24, 23]])
    painted = paint_boxes(relative_boxes([sample]), (8, 8))[0, 0]
    expected = torch.zeros(8, 8)
    expected[1:5, 1:5] = 1 / 16
    expected[1:4, 2:4] = 1 / 6
    assert torch.equal(painted, expected)


def test_the_smallest_box_counts_whatever_the_order():
    boxes = [[8.0, 8, 31, 31], [17, 12, 24, 23], [0, 0, 64, 64]]
    painted = [
        paint_boxes(relative_boxes([sample_of(order)]), (8, 8))
        for order in (boxes, boxes[::-1])
    ]
    assert torch.equal(*painted)
    assert (painted[0] > 0).all()


def test_boxes_are_placed_in_the_padded_batch():
    """A half-size image does not stretch to the whole map."""
    sample = sample_of([[0.0, 0, 15, 15]], shape=(32, 32))
    painted = paint_boxes(relative_boxes([sample]), (8, 8))[0, 0]
    assert painted.nonzero().max() == 2


def test_images_of_different_numbers_of_boxes():
    samples = [
        sample_of([[8.0, 8, 31, 31], [17, 12, 24, 23]]),
        sample_of([]),
        sample_of([[0.0, 0, 7, 7]]),
    ]
    together = paint_boxes(relative_boxes(samples), (8, 8))
    for sample, painted in zip(samples, together, strict=True):
        alone = paint_boxes(relative_boxes([sample]), (8, 8))[0]
        assert torch.equal(painted, alone)
    assert together[1].sum() == 0
    assert together.isfinite().all()


@pytest.mark.parametrize('count', [AT_ONCE, AT_ONCE + 1, 3 * AT_ONCE + 5])
def test_more_boxes_than_are_painted_at_once(count):
    """Each position is the smallest of them all, wherever that comes."""
    generator = torch.Generator().manual_seed(count)
    boxes = 64 * torch.rand(count, 4, generator=generator)
    boxes[:, 2:] = boxes[:, :2] + boxes[:, 2:] / 4
    samples = [sample_of(boxes.tolist()), sample_of(boxes[:3].tolist())]
    painted = paint_boxes(relative_boxes(samples), (16, 16))
    for image, sample in zip(painted, samples, strict=True):
        each = [
            paint_boxes(relative_boxes([sample_of([box])]), (16, 16))
            for box in sample.gt_instances.bboxes.tolist()
        ]
        assert torch.equal(image, torch.cat(each).amax(0))


def test_many_boxes_take_no_more_memory_than_few():
    """The masks of 1000 boxes together would be 40 times as large."""
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    with Watch():
        paint_boxes(torch.rand(2, 1000, 4), (20, 30))
    assert max(largest) == 2 * AT_ONCE * 20 * 30


def test_a_box_without_area_marks_where_it_is():
    painted = paint_boxes(relative_boxes([sample_of([[8, 8, 8, 8]])]), (8, 8))
    assert painted.nonzero().tolist() == [[0, 0, 1, 1]]
    assert painted.sum() == 1


# --------------------------------------------------------------- the pieces


def test_attention_by_hand():
    """Mean sizes log 3 apart give 3:1 of two channels."""
    maps = torch.tensor([-math.log(3), 0.0]).view(1, 2, 1, 1)
    result = channel_attention(maps, weights_of([(1, 1)], 1, 1), 1.0)
    assert result.flatten().tolist() == pytest.approx([1.5, 0.5])


def test_a_block_starts_as_the_identity():
    block = ContextBlock(6)
    maps = random_maps(2, 6, 4, 5)
    inside = weights_of([(4, 5), (2, 3)], 4, 5) > 0
    assert torch.equal(block(maps, inside), maps)
    randomized(block)
    assert not torch.allclose(block(maps, inside), maps)


def test_the_teacher_itself_is_the_minimum():
    """As long as the two blocks are the identity."""
    pair = FeaturePair('FGD')
    assert all(loss > 0 for loss in pair.step().values())
    twin(pair)
    assert all(loss == 0 for loss in pair.step().values())


def test_the_blocks_of_both_networks_learn():
    pair = FeaturePair('FGD')
    randomized(pair.method)
    sum(pair.step().values()).backward()
    for blocks in (pair.method.student_blocks, pair.method.teacher_blocks):
        assert all(p.grad.abs().sum() > 0 for p in blocks[0].parameters())


# ----------------------------------------------------------------- options


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(temperature=0), r'FGD\.temperature must be above 0, got 0'),
        (dict(foreground_weight=-1), r'foreground_weight must be at least 0'),
        (dict(background_weight=-1), r'background_weight must be at least 0'),
        (dict(attention_weight=-1), r'attention_weight must be at least 0'),
        (dict(relation_weight=-1), r'FGD\.relation_weight must be at least'),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        FeaturePair('FGD', pointwise(), **options)


def test_defaults_are_the_official_ones_of_retinanet():
    method = FeaturePair('FGD', tiny.retinanet()).method
    assert method.temperature == 0.5
    assert list(method.weights.values()) == [1e-3, 5e-4, 5e-4, 5e-6]
