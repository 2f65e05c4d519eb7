"""What the tests of the feature-map methods share."""

import copy

import torch
from mmdet.registry import MODELS
from mmdet.structures import DetDataSample
from mmengine.model import BaseModule
from mmengine.structures import InstanceData
from torch import nn

from mmkd.core.distiller import build_distiller
from mmkd.data.batch import Batch
from mmkd.utils import isolated_random_state
from tests.helpers import tiny_detectors as tiny

SIZES = [(96, 128), (64, 96), (70, 90), (128, 64)]


@MODELS.register_module()
class PointwiseMaps(BaseModule):
    """A backbone without neighbours: each position sees its own pixels."""

    def __init__(self, width=8, stride=8):
        super().__init__()
        self.pool = nn.AvgPool2d(stride)
        self.conv1 = nn.Conv2d(3, width, 1)

    def forward(self, x):
        x = self.pool(x)
        return self.conv1(x), self.conv1(nn.functional.avg_pool2d(x, 2))


@MODELS.register_module()
class RoundingUpMaps(PointwiseMaps):
    """The same with maps that are rounded up instead of down."""

    def forward(self, x):
        x = nn.functional.avg_pool2d(x, 8, ceil_mode=True)
        x = nn.functional.pad(x, (0, 1, 0, 1), mode='replicate')
        return self.conv1(x), self.conv1(nn.functional.avg_pool2d(x, 2))


def pointwise(width=16):
    """A detector whose features don't depend on padding or on a batch."""
    model = tiny.retinanet()
    model.backbone = dict(type='PointwiseMaps')
    model.neck = dict(
        type='ChannelMapper',
        in_channels=[8, 8],
        kernel_size=1,
        out_channels=width,
        act_cfg=None,
        num_outs=2,
    )
    model.bbox_head.in_channels = width
    model.bbox_head.anchor_generator.strides = [8, 16]
    return model


class FeaturePair:
    """A student, a teacher and one method between them."""

    def __init__(self, method, student=None, teacher=None, **options):
        student = student or pointwise()
        self.student = tiny.build(student, seed=1)
        cfg = dict(
            teacher=dict(
                config=dict(model=teacher or student), checkpoint=None
            ),
            methods=dict(kd=dict(type=f'mmkd.{method}', **options)),
        )
        self.distiller = build_distiller(
            cfg, self.student, tiny.CLASSES, seed=0
        )
        self.method = self.distiller.methods['kd']
        self.teacher = self.distiller.teacher.model

    def losses(self, inputs, samples):
        """All losses of a distilled step."""
        self.distiller.attach()
        try:
            return tiny.seeded_loss(self.student, inputs, samples)
        finally:
            self.distiller.detach()

    def step(self, **batch):
        """The method's losses on a batch, by the names of their parts."""
        self.inputs, self.samples = tiny.batch_for(self.student, **batch)
        losses = self.losses(self.inputs, self.samples)
        return own(losses)

    def images(self, *numbers):
        """The method's losses on the same images in any company."""
        raw = tiny.raw_batch(sizes=SIZES)
        data = self.student.data_preprocessor(
            {key: [value[n] for n in numbers] for key, value in raw.items()},
            training=True,
        )
        losses = self.losses(data['inputs'], data['data_samples'])
        return {name: loss.item() for name, loss in own(losses).items()}

    def features(self):
        """What student and teacher give for the batch of the last step."""
        with torch.no_grad():
            ours = self.student.extract_feat(self.inputs)
            theirs = self.teacher.extract_feat(self.inputs)
        return ours, theirs


def own(losses):
    """The losses of distillation alone."""
    return {
        name.removeprefix('kd.loss_'): loss
        for name, loss in losses.items()
        if name.startswith('kd.')
    }


def valid_sizes(maps, samples):
    """The rows and columns of each image of a batch on a map."""
    height, width = samples[0].batch_input_shape
    return [
        (
            -(-sample.img_shape[0] * maps.shape[2] // height),
            -(-sample.img_shape[1] * maps.shape[3] // width),
        )
        for sample in samples
    ]


def images_of(maps, samples):
    """Each image's own part of its map, (C, h, w), in float64."""
    return [
        maps[i, :, :h, :w].double()
        for i, (h, w) in enumerate(valid_sizes(maps, samples))
    ]


def random_maps(*shape, seed=0, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(*shape, generator=generator)


def weights_of(sizes, height, width):
    """Weights (B, 1, H, W) of images of ``sizes`` within padded maps."""
    weights = torch.zeros(len(sizes), 1, height, width)
    for weight, (h, w) in zip(weights, sizes, strict=True):
        weight[:, :h, :w] = 1 / (h * w)
    return weights


def randomized(module, seed=0):
    """Give every parameter of a module a random value."""
    with isolated_random_state(seed), torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)


def twin(pair):
    """Make the student's weights the teacher's."""
    pair.student.load_state_dict(copy.deepcopy(pair.teacher.state_dict()))
    pair.student.eval()


def on_maps(method, student, teacher, boxes=()):
    """The sum of a method's losses on given maps of images without padding.

    Args:
        method: The method; its layers are built unless it has some.
        student: The student's maps, (B, C, H, W), by level.
        teacher: The teacher's.
        boxes: The boxes (N, 4) of each image, as shares of its size.
    """
    if not [*method.parameters()]:
        method.build_layers(student, teacher)
        randomized(method)
    size = tuple(8 * side for side in student[0].shape[2:])
    samples = []
    for image in range(len(student[0])):
        sample = DetDataSample(
            metainfo=dict(img_shape=size, batch_input_shape=size)
        )
        share = boxes[image] if len(boxes) else torch.zeros(0, 4)
        sample.gt_instances = InstanceData(
            bboxes=share * torch.tensor([size[1], size[0]]).repeat(2)
        )
        samples.append(sample)
    method.pairs = lambda *_: list(zip(student, teacher, strict=True))
    losses = method(None, None, Batch(torch.zeros(0), samples))
    return sum(losses.values())


def check_official(own, official, student, parameters=()):
    """The same value, and the same gradients for maps and layers."""
    learns = [*student, *parameters]
    torch.testing.assert_close(own, official.float(), rtol=1e-4, atol=0)
    gradients = [
        torch.autograd.grad(loss, learns, allow_unused=True)
        for loss in (own, official)
    ]
    largest = max(g.abs().max() for g in gradients[1] if g is not None)
    for ours, theirs in zip(*gradients, strict=True):
        if theirs is None:
            assert ours is None
            continue
        rounding = 1e-4 * largest  # all there is of what BN takes away
        error = (ours - theirs).abs().max()
        assert error < 1e-3 * theirs.abs().max() + rounding
    assert gradients[1][0].abs().sum() > 0
