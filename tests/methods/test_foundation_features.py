"""Features of an image encoder, imitated by direction."""

import math

import pytest
import torch
import torch.nn.functional as F

import mmkd
from mmkd.core.distiller import build_distiller
from mmkd.doctor import diagnose
from tests.helpers import encoders, toy
from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import FeaturePair, pointwise, valid_sizes

SIZES = ((96, 128), (64, 96))


class Pair:
    """A student and an encoder."""

    def __init__(self, path, model=None, *, teacher=None, **options):
        self.student = tiny.build(model or tiny.retinanet(), seed=1)
        name = encoders.folder(path)
        cfg = dict(
            teacher=dict(
                type='mmkd.FoundationEncoder', name=name, **(teacher or {})
            ),
            methods=dict(own=dict(type='mmkd.FoundationFeatures', **options)),
        )
        self.distiller = build_distiller(cfg, self.student, tiny.CLASSES)
        self.method = self.distiller.methods['own']

    def losses(self, inputs, samples):
        self.distiller.attach()
        try:
            return tiny.seeded_loss(self.student, inputs, samples)
        finally:
            self.distiller.detach()

    def batch(self, sizes=SIZES):
        return tiny.batch_for(self.student, sizes=sizes)


def cosine(ours, theirs):
    product = sum(a * b for a, b in zip(ours, theirs, strict=True))
    return product / (math.hypot(*ours) * math.hypot(*theirs))


def bilinear(maps, row, column, size):
    """A map's vector (C,) at a position of a grid of another size."""
    found = 0
    shares = []
    for place, old, new in zip(
        (row, column), maps.shape[1:], size, strict=True
    ):
        where = min(max((place + 0.5) * old / new - 0.5, 0), old - 1)
        low = min(int(where), old - 1)
        high = min(low + 1, old - 1)
        shares.append(((low, 1 - where + low), (high, where - low)))
    for r, share in shares[0]:
        for c, other in shares[1]:
            found = found + share * other * maps[:, r, c]
    return found


def reference(ours, theirs, weight, bias, samples):
    """The formula, position by position, without padding."""
    losses = []
    for s, t, (rows, columns) in zip(
        ours.double(), theirs.double(), valid_sizes(ours, samples), strict=True
    ):
        cosines = [
            cosine(
                (weight @ s[:, row, column] + bias).tolist(),
                bilinear(t, row, column, s.shape[1:]).tolist(),
            )
            for row in range(rows)
            for column in range(columns)
        ]
        losses.append(1 - sum(cosines) / len(cosines))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ('model', 'options', 'read'),
    [
        (tiny.retinanet, {}, lambda m, x: m.backbone(x)[-1]),
        (
            tiny.faster_rcnn,
            dict(source='neck', level=1),
            lambda m, x: m.extract_feat(x)[1],
        ),
        (tiny.detr, dict(source='neck'), lambda m, x: m.extract_feat(x)[-1]),
        (
            tiny.gfl,
            dict(source='backbone.layer2'),
            lambda m, x: m.backbone(x)[1 if len(m.backbone(x)) == 4 else 0],
        ),
    ],
    ids=['one_stage', 'two_stage', 'detr', 'module'],
)
def test_the_formula_on_detectors(tmp_path, model, options, read):
    pair = Pair(tmp_path, model(), loss_weight=2.0, **options)
    inputs, samples = pair.batch()
    losses = pair.losses(inputs, samples)
    view = pair.distiller.teacher.view(mmkd.Batch(inputs, samples))
    with torch.no_grad():
        ours = read(pair.student, inputs)
    adapter = pair.method.adapter
    weight = adapter.weight[:, :, 0, 0].detach().double()
    bias = adapter.bias.detach().double()
    expected = reference(ours, view.maps[0], weight, bias, samples)
    assert adapter.weight.shape[2:] == (1, 1)
    found = losses['own.loss_cosine'].item()
    assert found == pytest.approx(2 * expected, rel=1e-4)


class TestOfficialCode:
    """RT-DETRv4's loss, on images without padding."""

    def test_value_and_gradients(self, tmp_path):
        pair = Pair(tmp_path, loss_weight=5.0)
        inputs, samples = pair.batch(sizes=((128, 160), (128, 160)))
        loss = pair.losses(inputs, samples)['own.loss_cosine']
        view = pair.distiller.teacher.view(mmkd.Batch(inputs, samples))
        ours, adapter = pair.student.backbone(inputs)[-1], pair.method.adapter
        # The projection is a linear layer on the last axis; both maps are
        # normalised, and then compared by their cosine.
        projected = F.linear(
            ours.permute(0, 2, 3, 1), adapter.weight[:, :, 0, 0], adapter.bias
        ).flatten(1, 2)
        resized = F.interpolate(
            view.maps[0], ours.shape[2:], mode='bilinear', align_corners=False
        )
        target = F.normalize(resized.flatten(2).permute(0, 2, 1), dim=-1)
        cosines = F.cosine_similarity(
            F.normalize(projected, dim=-1), target, dim=-1
        )
        expected = 5 * (1 - cosines).mean()
        torch.testing.assert_close(loss, expected)
        learns = [*adapter.parameters(), *pair.student.backbone.parameters()]
        for found, other in zip(
            *(torch.autograd.grad(x, learns) for x in (loss, expected)),
            strict=True,
        ):
            torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-5)


def test_an_image_in_other_company_has_the_same_loss(tmp_path):
    """Neither its padding nor its neighbours count in the student's part."""
    pair = Pair(tmp_path, pointwise(), source='neck')
    inputs, samples = pair.batch(sizes=((96, 128), (96, 128)))
    both = pair.losses(inputs, samples)['own.loss_cosine']
    alone = [
        pair.losses(inputs[i : i + 1], samples[i : i + 1])['own.loss_cosine']
        for i in range(2)
    ]
    torch.testing.assert_close(both, sum(alone) / 2)


def test_padding_does_not_count(tmp_path):
    pair = Pair(tmp_path, pointwise(), source='neck')
    inputs, samples = pair.batch()
    before = pair.losses(inputs, samples)['own.loss_cosine']
    view = pair.distiller.teacher.view(mmkd.Batch(inputs, samples))
    (tokens,) = view.maps
    changed = tokens.clone()
    changed[1, :, 9:] += 100  # more than a patch below the second image
    view.__dict__['maps'] = (changed,)
    pair.distiller.teacher.view = lambda batch: view
    after = pair.losses(inputs, samples)['own.loss_cosine']
    assert torch.equal(before, after)


def test_the_student_learns_it_and_the_encoder_does_not_change(tmp_path):
    pair = Pair(tmp_path)
    inputs, samples = pair.batch()
    weights = {
        name: value.clone()
        for name, value in pair.distiller.teacher.network.state_dict().items()
    }
    learns = [*pair.student.parameters(), *pair.method.parameters()]
    optimizer = torch.optim.Adam(learns, lr=1e-2)
    values = []
    for _ in range(8):
        loss = pair.losses(inputs, samples)['own.loss_cosine']
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    assert pair.student.backbone.conv1.weight.grad.abs().sum() > 0
    assert values[-1] < 0.7 * values[0]
    for name, value in pair.distiller.teacher.network.state_dict().items():
        assert torch.equal(value, weights[name])


def test_stock_losses_are_those_of_stock_training(tmp_path):
    pair = Pair(tmp_path)
    inputs, samples = pair.batch()
    stock = tiny.seeded_loss(pair.student, inputs, samples)
    losses = pair.losses(inputs, samples)
    assert losses.keys() - stock.keys() == {'own.loss_cosine'}
    for name, loss in stock.items():
        assert all(map(torch.equal, losses[name], loss))


def test_weight_0_is_stock_training_and_the_encoder_does_not_run(tmp_path):
    pair = Pair(tmp_path, loss_weight=0.0)
    inputs, samples = pair.batch()
    calls = []
    pair.distiller.teacher.network.register_forward_hook(
        lambda *_: calls.append(1)
    )
    losses = pair.losses(inputs, samples)
    gradients = gradients_of(pair.student, losses)
    assert not calls
    stock = gradients_of(
        pair.student, tiny.seeded_loss(pair.student, inputs, samples)
    )
    assert gradients.keys() == stock.keys()
    assert all(torch.equal(gradients[name], stock[name]) for name in stock)


def gradients_of(student, losses):
    student.zero_grad()
    student.parse_losses(losses)[0].backward()
    return {
        name: parameter.grad
        for name, parameter in student.named_parameters()
        if parameter.grad is not None and 'distillation' not in name
    }


def test_it_fits_a_frozen_detector_too():
    """Whatever gives features, such as a detector's last level."""
    pair = FeaturePair('FoundationFeatures', source='neck')
    assert 0 < pair.step()['cosine'] < 2


def test_several_maps_are_several_methods(tmp_path):
    name = encoders.folder(tmp_path)
    methods = {
        f'level_{level}': dict(
            type='mmkd.FoundationFeatures', source='neck', level=level
        )
        for level in (0, 2)
    }
    cfg = dict(
        teacher=dict(type='mmkd.FoundationEncoder', name=name),
        methods=methods,
    )
    student = tiny.build(tiny.retinanet())
    distiller = build_distiller(cfg, student, tiny.CLASSES)
    calls = []
    network = distiller.teacher.network
    network.register_forward_hook(lambda *_: calls.append(1))
    distiller.attach()
    losses = tiny.seeded_loss(student, *tiny.batch_for(student))
    assert losses['level_0.loss_cosine'] != losses['level_2.loss_cosine']
    assert len(calls) == 1  # they share one pass


@pytest.mark.parametrize(
    ('options', 'text'),
    [
        (dict(level=9), r'level 9 is asked for, but there are \d \(0 to'),
        (dict(level=-2), 'level must be at least -1, got -2'),
        (dict(level=0.5), 'level must be a whole number'),
        (dict(source='neck.lateral'), 'there is no such module'),
    ],
)
def test_wrong_options(tmp_path, options, text):
    with pytest.raises((mmkd.ConfigError, mmkd.TapError), match=text):
        Pair(tmp_path, **options)


def test_vectors_of_rois_are_no_maps(tmp_path):
    with pytest.raises(mmkd.ConfigError, match='of whole images'):
        Pair(
            tmp_path,
            tiny.faster_rcnn(),
            source='roi_head.bbox_head.shared_fcs.1',
        )


def config(folder):
    """A stock RetinaNet at toy scale that learns from a tiny encoder."""
    name = encoders.folder(folder / 'encoder', patch_size=14)
    return toy.distilled(
        folder / 'run',
        toy.RETINANET,
        images=4,
        teacher=dict(type='mmkd.FoundationEncoder', name=name),
        methods=dict(foundation=dict(type='mmkd.FoundationFeatures')),
    )


@pytest.mark.slow
def test_through_the_training_tool(tmp_path):
    """A stock checkpoint comes out; licence and resizing are said once."""
    path = toy.write(config(tmp_path), tmp_path / 'config.py')
    job = toy.Job(tmp_path / 'log', 'tools/train.py', str(path), cwd=toy.ROOT)
    assert job.wait() == 0, job.text()[-3000:]
    text = job.text()
    assert 'foundation.loss_cosine: ' in text
    assert text.count('The licence of the teacher') == 1
    assert text.count('sees batches resized to multiples') == 1
    state = toy.load(tmp_path / 'run' / 'epoch_1.pth')['state_dict']
    model = toy.detector(toy.plain(tmp_path, toy.RETINANET).model)
    model.load_state_dict(state, strict=True)


@pytest.mark.slow
def test_the_doctor_examines_it(tmp_path):
    cfg = config(tmp_path)
    cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
    report = diagnose(cfg)
    assert not report.stops
    assert 'foundation.loss_cosine' in report.text()
    assert 'teacher: identical (80 classes)' in report.text()
