"""TaT: the target-aware transformer."""

import math

import pytest
import torch

from mmkd.errors import ConfigError
from mmkd.methods import TaT
from mmkd.methods.tat import Embedding, group_patches, pool_cells
from tests.helpers import tiny_detectors as tiny
from tests.helpers.feature_maps import (
    FeaturePair,
    check_official,
    images_of,
    on_maps,
    pointwise,
    random_maps,
    randomized,
    weights_of,
)

PLAIN = dict(patch_size=None, anchor_grid=None)


@pytest.fixture(autouse=True)
def untrained(recwarn):
    """Teachers here have random weights, of which a warning tells."""


# ------------------------------------------------------------- the reference


def embedded(images, embedding, per_image):
    """1x1 convolution and normalisation of a list of images (C, h, w)."""
    weight = embedding.conv.weight[:, :, 0, 0].detach().double()
    scale = embedding.scale.flatten().detach().double()
    shift = embedding.shift.flatten().detach().double()
    mixed = [torch.einsum('oi,ihw->ohw', weight, m) for m in images]
    pools = [[m] for m in mixed] if per_image else [mixed] * len(mixed)
    results = []
    for m, pool in zip(mixed, pools, strict=True):
        result = torch.zeros_like(m)
        for c in range(len(m)):
            values = torch.cat([p[c].flatten() for p in pool])
            mean = values.sum() / len(values)
            variance = ((values - mean) ** 2).sum() / len(values)
            normal = (m[c] - mean) / (variance + 1e-5).sqrt()
            result[c] = normal * scale[c] + shift[c]
        results.append(result)
    return results


def rebuilt(keys, values, queries, softmax):
    """Eq. W and F' for lists of vectors, position by position."""
    rows, columns = queries, keys
    if softmax == 'teacher':
        rows, columns = keys, queries
    result = []
    for row in rows:
        logits = [float(row @ column) for column in columns]
        largest = max(logits)
        powers = [math.exp(z - largest) for z in logits]
        result.append(
            sum(
                (p / sum(powers)) * v
                for p, v in zip(powers, values, strict=True)
            )
        )
    return result


def positions(image):
    return list(image.flatten(1).T)


def whole_error(keys, values, queries, target, softmax):
    """The mean squared error of one image's positions, all at once."""
    maps = (positions(m) for m in (keys, values, queries))
    result = torch.stack(rebuilt(*maps, softmax))
    return ((result - target.flatten(1).T) ** 2).mean().item()


def patch_error(keys, values, queries, target, softmax, size, group):
    """The same, by groups of patches; what does not exist is 0."""
    channels, height, width = target.shape
    rows, columns = size
    total = 0.0
    for top in range(0, height, rows):
        for left in range(0, width, columns * group):
            # Each offset within a patch, in all patches of the group.
            places = [
                [(top + y, left + g * columns + x) for g in range(group)]
                for y in range(rows)
                for x in range(columns)
                if top + y < height and left + x < width
            ]
            vectors = (joined(m, places) for m in (keys, values, queries))
            for f, t, patches in zip(
                rebuilt(*vectors, softmax),
                joined(target, places),
                places,
                strict=True,
            ):
                errors = ((f - t) ** 2).view(group, channels).sum(1)
                for error, (y, x) in zip(errors, patches, strict=True):
                    if y < height and x < width:
                        total += error.item()
    return total / (channels * height * width)


def joined(m, places):
    return [torch.cat([at(m, y, x) for y, x in p]) for p in places]


def at(m, y, x):
    if y < m.shape[1] and x < m.shape[2]:
        return m[:, y, x]
    return torch.zeros(len(m), dtype=m.dtype)


def pooled(image, grid):
    """Average cells: position r is of the cell r * cells // rows."""
    _, height, width = image.shape
    cells = {}
    for y in range(height):
        for x in range(width):
            cell = (y * grid[0] // height, x * grid[1] // width)
            cells.setdefault(cell, []).append(image[:, y, x])
    return torch.stack(
        [torch.stack(cells[c]).mean(0) for c in sorted(cells)], dim=1
    )[:, None]


def reference(pair, options, level, ours, theirs):
    """The patch and anchor losses of one level, averaged over images."""
    embed = pair.method.embeddings[level]
    per_image = options.get('per_image', False)
    softmax = options.get('softmax', 'student')
    keys = embedded(ours, embed.gamma, per_image)
    values = embedded(ours, embed.phi, per_image)
    queries = theirs
    if options.get('theta') == 'conv':
        queries = embedded(theirs, embed.theta, per_image)
    images = list(zip(keys, values, queries, theirs, strict=True))
    if options.get('patch_size') is None:
        errors = [whole_error(*m, softmax) for m in images]
        return {'tat': sum(errors) / len(images)}
    size, group = options['patch_size'], options['patches_per_group']
    patch = [patch_error(*m, softmax, size, group) for m in images]
    anchor = [
        whole_error(
            *(pooled(m, options['anchor_grid']) for m in four), softmax
        )
        for four in images
    ]
    return {
        'patch': 0.3 * sum(patch) / len(images),
        'anchor': 0.2 * sum(anchor) / len(images),
    }


HIERARCHY = dict(
    patch_size=[2, 3],
    patches_per_group=2,
    anchor_grid=[3, 4],
    patch_weight=0.3,
    anchor_weight=0.2,
)


@pytest.mark.parametrize('softmax', ['student', 'teacher'])
@pytest.mark.parametrize('theta', ['identity', 'conv'])
@pytest.mark.parametrize('per_image', [False, True])
@pytest.mark.parametrize('form', [PLAIN, HIERARCHY], ids=['plain', 'levels'])
def test_the_formula(form, per_image, theta, softmax):
    options = dict(form, per_image=per_image, theta=theta, softmax=softmax)
    pair = FeaturePair(
        'TaT',
        pointwise(),
        pointwise(8),
        levels=[1],
        loss_weight=2.0,
        **options,
    )
    randomized(pair.method)
    losses = pair.step(sizes=((96, 128), (70, 90)))
    ours, theirs = pair.features()
    expected = reference(
        pair,
        options,
        0,
        images_of(ours[1], pair.samples),
        images_of(theirs[1], pair.samples),
    )
    assert losses.keys() == expected.keys()
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(2 * value, rel=1e-4)


class TestOfficialCode:
    """The distiller of sihaoevery/TaT-seg, an image at a time.

    Its maps are divided by its patches and cells, so that it drops nothing.
    """

    @staticmethod
    def embedded(image, layer):
        norm = torch.nn.BatchNorm2d(layer.conv.out_channels)
        return torch.nn.functional.batch_norm(
            layer.conv(image), None, None, layer.scale.view(-1),
            layer.shift.view(-1), training=True, eps=norm.eps,
        )  # fmt: skip

    @staticmethod
    def loss(q, k, v, target, heads):
        """q, k, v, target (C, h, w); C is split into the heads."""
        q, k, v = (m.reshape(heads, -1, m[0].numel()).mT for m in (q, k, v))
        out = (q @ k.mT).softmax(-1) @ v
        return torch.nn.functional.mse_loss(
            out.mT.reshape(target.shape), target
        )

    @staticmethod
    def patches(image, n, m):
        """Stacked along the channels, patch by patch, (n m C, h, w)."""
        rows = image.unflatten(1, (n, -1)).unflatten(3, (m, -1))
        stacked = rows.permute(1, 3, 0, 2, 4)  # n, m, C, h, w
        return stacked.flatten(0, 2)

    def test_both_losses(self):
        student, teacher = (random_maps(3, 6, 8, 12, seed=n) for n in (1, 2))
        student.requires_grad_()
        options = dict(TaT.official[0].options)
        method = TaT(**options, patch_size=[2, 3], anchor_grid=[4, 6])
        own = on_maps(method, [student], [teacher])
        embed = method.embeddings[0]
        total = 0.0
        for s, t in zip(student, teacher, strict=True):
            q = self.embedded(s[None], embed.gamma)[0]
            k = self.embedded(t[None], embed.theta)[0]
            v = self.embedded(s[None], embed.phi)[0]
            n, m = 4, 4  # patches of 2x3, two of them a head
            patches = [self.patches(x, n, m) for x in (q, k, v, t)]
            patch = self.loss(*patches, heads=n * m // 2)
            cells = [
                torch.nn.functional.avg_pool2d(x, 2) for x in (q, k, v, t)
            ]
            total = total + patch + self.loss(*cells, heads=1)
        check_official(own, 0.6 * total / 3, [student], method.parameters())

    def test_an_image_does_not_depend_on_its_company(self):
        student, teacher = (random_maps(3, 6, 8, 12, seed=n) for n in (1, 2))
        method = TaT()
        together = on_maps(method, [student], [teacher])
        alone = [
            on_maps(method, [s[None]], [t[None]])
            for s, t in zip(student, teacher, strict=True)
        ]
        torch.testing.assert_close(together, sum(alone) / 3)
        method.per_image = False
        for part in method.modules():
            part.per_image = False
        assert (on_maps(method, [student], [teacher]) - together).abs() > 1e-4


def test_levels_are_averaged():
    each = [
        FeaturePair('TaT', levels=chosen).step()['patch'].item()
        for chosen in ([0], [1], [0, 1])
    ]
    assert len(set(each)) == 3
    # Both levels' layers are drawn with one seed: the second pair's differ.
    pair = FeaturePair('TaT', levels=[0, 1])
    pair.method.embeddings[1] = FeaturePair(
        'TaT', levels=[1]
    ).method.embeddings[0]
    mean = (each[0] + each[1]) / 2
    assert pair.step()['patch'].item() == pytest.approx(mean, rel=1e-5)


# --------------------------------------------------------------- by hand


def error_by_hand(softmax):
    """Keys (1, -1), values (2, 0), queries (log 3 / 2, 0), targets 0."""
    method = TaT(**PLAIN, softmax=softmax)
    keys, values, queries = (
        torch.tensor(v).view(1, 2, 1)
        for v in ([1.0, -1.0], [2.0, 0.0], [math.log(3) / 2, 0.0])
    )
    return method._error(
        keys, values, queries, torch.zeros(1, 2, 1), torch.full((1, 2, 1), 0.5)
    )


def test_softmax_over_the_students_positions():
    """Logits log 3 apart give 3:1, so 1.5; equal ones give 1."""
    expected = (1.5**2 + 1.0**2) / 2
    assert error_by_hand('student').item() == pytest.approx(expected)


def test_softmax_over_the_teachers_positions():
    """Logits log 3 / 2 and 0: the first value has sqrt 3 : 1, then 1 : it."""
    share = math.sqrt(3) / (1 + math.sqrt(3))
    expected = ((2 * share) ** 2 + (2 * (1 - share)) ** 2) / 2
    assert error_by_hand('teacher').item() == pytest.approx(expected)


def test_a_permuted_student_is_as_good():
    """What makes it target-aware: where a feature stands does not matter."""
    pair = FeaturePair('TaT', **PLAIN, levels=[0])
    loss = pair.step()['tat'].item()
    (ours, _), (theirs, _) = pair.features()
    order = torch.randperm(
        ours[0, 0].numel(), generator=torch.Generator().manual_seed(0)
    )
    embed = pair.method.embeddings[0]
    weights = weights_of([ours.shape[-2:]] * 2, *ours.shape[-2:])
    losses = []
    for student in (ours, ours.flatten(2)[..., order].view_as(ours)):
        maps = embed(student, theirs, weights)
        losses.append(pair.method._level_losses(maps, weights)['tat'].item())
    assert losses == pytest.approx([loss, loss], rel=1e-4)


def test_the_teacher_can_be_rebuilt():
    """Sharp attention between orthogonal features finds each one."""
    method = TaT(**PLAIN)
    features = torch.eye(6)[None]
    weights = torch.full((1, 6, 1), 1 / 6)
    sharp = method._error(
        100 * features, features, features, features, weights
    )
    assert sharp < 1e-9


# ------------------------------------------------------------- its pieces


def test_normalisation_is_batch_norm_where_nothing_is_padded():
    embedding = Embedding(5, 7, per_image=False)
    randomized(embedding)
    maps = random_maps(3, 5, 4, 6)
    norm = torch.nn.BatchNorm2d(7).train()
    norm.weight.data = embedding.scale.detach().flatten()
    norm.bias.data = embedding.shift.detach().flatten()
    expected = norm(embedding.conv(maps))
    result = embedding(maps, weights_of([(4, 6)] * 3, 4, 6))
    assert torch.allclose(result, expected, atol=1e-5)


def test_groups_join_neighbours_of_a_row():
    """A 2 x 4 map in patches of 1 x 2, two joined: a group a row."""
    maps = torch.arange(8.0).view(1, 1, 2, 4)
    groups = group_patches(maps, (1, 2), 2)
    expected = [[[0, 2], [1, 3]], [[4, 6], [5, 7]]]
    assert groups.tolist() == expected


def test_channels_of_a_patch_stay_together():
    maps = torch.arange(8.0).view(1, 2, 1, 4)
    groups = group_patches(maps, (1, 2), 2)
    assert groups.tolist() == [[[0, 4, 2, 6], [1, 5, 3, 7]]]


@pytest.mark.parametrize('shape', [(5, 7), (1, 1), (8, 12)])
def test_no_position_is_dropped(shape):
    maps = 1 + torch.arange(2.0 * math.prod(shape)).view(2, 1, *shape)
    groups = group_patches(maps, (4, 3), 2)
    assert groups.shape[1:] == (12, 2)
    values = groups[groups > 0].sort().values
    assert torch.equal(values, maps.flatten())


def test_cells_of_whole_positions():
    maps = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0]).view(1, 1, 1, 5)
    cells, weights = pool_cells([maps], weights_of([(1, 5)], 1, 5), (1, 2))
    # Positions 0 to 2 are of the first cell, 3 and 4 of the second.
    assert cells.flatten().tolist() == pytest.approx([7 / 3, 12])
    assert weights.flatten().tolist() == [0.5, 0.5]


def test_cells_are_average_pooling_where_the_grid_divides():
    maps = random_maps(2, 3, 8, 12)
    cells, _ = pool_cells([maps], weights_of([(8, 12)] * 2, 8, 12), (4, 3))
    expected = torch.nn.functional.avg_pool2d(maps, (2, 4)).flatten(2).mT
    assert torch.allclose(cells, expected, atol=1e-6)


def test_cells_without_a_position_are_empty():
    maps = random_maps(1, 1, 2, 2)
    cells, weights = pool_cells([maps], weights_of([(2, 1)], 2, 2), (3, 2))
    assert weights.flatten().tolist() == [0.5, 0, 0.5, 0, 0, 0]
    assert cells[weights > 0].tolist() == maps[0, 0, :, 0].tolist()


def saved_numbers(method, side):
    """How many numbers a step keeps for the gradient."""
    method.build_layers(*[[torch.zeros(1, 4, side, side)]] * 2)
    maps = random_maps(1, 4, side, side)
    weights = weights_of([(side, side)], side, side)
    total = 0

    def pack(tensor):
        nonlocal total
        total += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        embedded = method.embeddings[0](maps, maps, weights)
        sum(method._level_losses(embedded, weights).values())
    return total


def test_memory_is_linear_in_the_number_of_positions():
    """Sixteen times the positions; the grid's part is even constant."""
    hierarchy = TaT(patch_size=[4, 4], anchor_grid=[4, 4])
    growth = saved_numbers(hierarchy, 64) / saved_numbers(hierarchy, 16)
    assert 14 < growth <= 16
    plain = TaT(**PLAIN)
    assert saved_numbers(plain, 64) / saved_numbers(plain, 16) > 100


# ----------------------------------------------------------------- options


def test_one_part_alone():
    assert FeaturePair('TaT', anchor_grid=None).step().keys() == {'patch'}
    assert FeaturePair('TaT', patch_size=None).step().keys() == {'anchor'}
    assert FeaturePair('TaT', **PLAIN).step().keys() == {'tat'}


def test_theta_is_trained_only_as_a_convolution():
    names = [
        {n.split('.')[2] for n, _ in pair.method.named_parameters()}
        for pair in (FeaturePair('TaT'), FeaturePair('TaT', theta='conv'))
    ]
    assert names == [{'gamma', 'phi'}, {'gamma', 'phi', 'theta'}]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(patch_size=8), r'patch_size must be \(rows, columns\).*got 8'),
        (dict(patch_size=[8]), r'TaT\.patch_size must be .*got \[8\]'),
        (dict(anchor_grid=[0, 4]), r'anchor_grid must be .*got \[0, 4\]'),
        (dict(anchor_grid=[2.0, 4]), r'anchor_grid must be .*got \[2.0, 4\]'),
        (dict(patches_per_group=0), r'patches_per_group must be a whole'),
        (dict(patch_weight=-1), r'TaT\.patch_weight must be at least 0'),
        (dict(anchor_weight=-0.1), r'TaT\.anchor_weight must be at least'),
        (dict(theta='linear'), r"theta must be one of .*got 'linear'"),
        (dict(softmax='both'), r"softmax must be one of .*got 'both'"),
        (dict(adapt=True), r'no option "adapt"'),
    ],
)
def test_options_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        FeaturePair('TaT', tiny.retinanet(), **options)
