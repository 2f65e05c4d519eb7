"""The two views of each image, and the stream of batches."""

import random

import numpy as np
import pytest
import torch
from mmdet.registry import TRANSFORMS

from mmkd.data.unlabelled import stream as streams
from mmkd.data.unlabelled.blank import BlankImages
from mmkd.data.unlabelled.leakage import leaked
from mmkd.data.unlabelled.sources import ImageFiles
from mmkd.data.unlabelled.stream import UnlabelledStream
from mmkd.data.unlabelled.views import UnlabelledImages, default_weak
from mmkd.errors import ConfigError, DataError, PictureError
from tests.helpers import toy

RESIZE = dict(type='Resize', scale=(40, 30), keep_ratio=True)
FLIP = dict(type='RandomFlip', prob=0.5)
SHEAR = dict(type='ShearX', prob=1.0)


class Drawn:
    """Images of noise, of which some cannot be read."""

    def __init__(self, count=7, broken=()):
        self.count, self.broken = count, broken

    def __len__(self):
        return self.count

    def name(self, index):
        return f'image {index}'

    def paths(self):
        return ()

    def read(self, index):
        if index in self.broken:
            raise PictureError(f'image {index} is broken.')
        rng = np.random.default_rng(index)
        return rng.integers(0, 255, (60, 80, 3), np.uint8)


@TRANSFORMS.register_module(name='ToyNoise')
class Noise:
    """Adds numbers from all three global generators."""

    def __call__(self, results):
        numbers = [random.random(), np.random.rand(), torch.rand(()).item()]
        results['img'] = results['img'] // 2 + np.uint8(40 * sum(numbers))
        return results


def images(count=7, broken=(), weak=(RESIZE, FLIP), **options):
    strong = options.pop('strong', [dict(type='ToyNoise')])
    return UnlabelledImages(Drawn(count, broken), weak, strong, **options)


def order(dataset, positions):
    return [dataset[i]['weak']['data_samples'].img_id for i in positions]


class TestViews:
    def test_they_share_their_geometry(self):
        dataset = images()
        flips = set()
        for position in range(6):
            item = dataset[position]
            weak, strong = item['weak'], item['strong']
            assert weak['inputs'].shape == strong['inputs'].shape
            assert weak['inputs'].shape == (3, 30, 40)
            assert not torch.equal(weak['inputs'], strong['inputs'])
            a, b = weak['data_samples'], strong['data_samples']
            assert a.img_shape == b.img_shape == (30, 40)
            assert np.array_equal(a.homography_matrix, b.homography_matrix)
            assert a.ori_shape == (60, 80)
            flips.add(a.flip)
        assert flips == {True, False}

    def test_the_weak_view_is_what_the_transforms_make(self):
        dataset = images(weak=[RESIZE, dict(FLIP, prob=1.0)])
        item = dataset[3]['weak']
        image = Drawn().read(item['data_samples'].img_id)
        results = dict(img=image, img_shape=(60, 80), ori_shape=(60, 80))
        resized = TRANSFORMS.build(dict(RESIZE, type='mmdet.Resize'))(results)
        expected = resized['img'][:, ::-1].transpose(2, 0, 1)
        assert np.array_equal(item['inputs'].numpy(), expected)

    def test_without_strong_transforms_there_is_one_view(self):
        assert set(images(strong=[])[0]) == {'weak', 'skipped'}

    def test_padding_comes_last_in_both(self):
        """Photometric changes must not colour it."""
        pad = dict(type='Pad', size=(64, 64))
        item = images(weak=[RESIZE, pad])[0]
        for view in ('weak', 'strong'):
            pixels = item[view]['inputs']
            assert pixels.shape == (3, 64, 64)
            assert not pixels[:, 30:].any()
            assert not pixels[:, :, 40:].any()
            assert item[view]['data_samples'].img_shape == (64, 64)

    def test_a_strong_view_that_moves_says_so(self):
        item = images(strong=[dict(FLIP, prob=1.0)])[0]
        a, b = (item[v]['data_samples'] for v in ('weak', 'strong'))
        moves = b.homography_matrix @ np.linalg.inv(a.homography_matrix)
        point = moves @ [10, 5, 1]
        assert np.allclose(point, [30, 5, 1])

    def test_photometric_changes_by_default(self):
        dataset = UnlabelledImages(Drawn(40), [RESIZE])
        changed = 0
        for position in range(40):
            item = dataset[position]
            weak, strong = (item[v] for v in ('weak', 'strong'))
            a, b = (x['data_samples'] for x in (weak, strong))
            assert np.array_equal(a.homography_matrix, b.homography_matrix)
            changed += not torch.equal(weak['inputs'], strong['inputs'])
        assert changed > 20

    def test_unknown_and_unfit_transforms(self):
        with pytest.raises(ConfigError, match=r'unlabelled.strong: .*Shinier'):
            images(strong=[dict(type='Shinier')])
        with pytest.raises(ConfigError, match='weak: Mosaic joins several'):
            images(weak=[dict(type='Mosaic')])


class TestPositions:
    def test_each_pass_has_every_image_in_another_order(self):
        dataset = images()
        passes = [order(dataset, range(7 * i, 7 * i + 7)) for i in range(4)]
        assert all(sorted(each) == list(range(7)) for each in passes)
        assert len({tuple(each) for each in passes}) == 4

    def test_an_item_depends_on_seed_and_position_alone(self):
        """Not on what was read before, nor on global random states."""
        one, two = images(seed=5), images(seed=5)
        [one[i] for i in range(4)]
        torch.manual_seed(1)
        np.random.seed(1)
        random.seed(1)
        assert toy.same(one[9]['strong']['inputs'], two[9]['strong']['inputs'])
        other = images(seed=6)[9]['strong']['inputs']
        assert not torch.equal(two[9]['strong']['inputs'], other)

    def test_global_random_states_stay(self):
        states = (
            random.getstate(),
            np.random.get_state()[1].copy(),
            torch.get_rng_state(),
        )
        images()[0]
        assert random.getstate() == states[0]
        assert np.array_equal(np.random.get_state()[1], states[1])
        assert torch.equal(torch.get_rng_state(), states[2])


class TestUnreadable:
    def test_the_next_one_takes_its_place(self):
        dataset = images(broken=[order(images(), [2])[0]])
        item = dataset[2]
        name = item['skipped'][0]
        assert item['weak']['data_samples'].img_id == order(images(), [3])[0]
        assert name == f'image {order(images(), [2])[0]}'

    def test_nothing_can_be_read(self):
        with pytest.raises(DataError, match='7 images in a row cannot be re'):
            images(broken=range(7))[0]

    def test_each_is_named_once_and_counted(self, monkeypatch):
        lines = []
        monkeypatch.setattr(
            streams, 'print_log', lambda text, *_: lines.append(text)
        )
        stream = UnlabelledStream(images(broken=[1, 4]), 7)
        for _ in range(3):
            next(stream)
        assert len(lines) == 2
        assert '(1 so far)' in lines[0]
        assert '(2 so far)' in lines[1]


class TestStream:
    def ids(self, batch):
        samples = batch['weak']['data_samples']
        return [sample.img_id for sample in samples]

    def test_processes_share_the_images(self):
        one = UnlabelledStream(images(), 4)
        two = [UnlabelledStream(images(), 2, 0, r, 2) for r in range(2)]
        for _ in range(5):
            whole = next(one)
            halves = [next(each) for each in two]
            assert self.ids(whole) == [
                *self.ids(halves[0]),
                *self.ids(halves[1]),
            ]
            assert toy.same(
                whole['strong']['inputs'],
                [x for half in halves for x in half['strong']['inputs']],
            )
        assert one.taken == two[0].taken == two[1].taken == 20

    @pytest.mark.parametrize('workers', [0, 2])
    def test_it_goes_on_where_another_one_ended(self, workers):
        """With any number of workers, by any number of processes."""
        whole = UnlabelledStream(images(), 2)
        expected = [next(whole) for _ in range(5)]
        rest = UnlabelledStream(images(), 2, workers)
        rest.taken = 6
        for each in expected[3:]:
            found = next(rest)
            assert toy.same(
                each['strong']['inputs'], found['strong']['inputs']
            )
        rest.close()
        assert rest.taken == 10

    def test_it_draws_no_global_numbers(self):
        state = torch.get_rng_state()
        next(UnlabelledStream(images(), 2))
        assert torch.equal(torch.get_rng_state(), state)


class TestDefaults:
    TEST = (dict(type='LoadImageFromFile'), dict(RESIZE, scale=(8, 6)))

    def test_resize_flip_and_padding(self):
        steps = [
            dict(type='LoadImageFromFile'),
            dict(type='LoadAnnotations', with_bbox=True),
            RESIZE,
            dict(type='PhotoMetricDistortion'),
            FLIP,
            dict(type='Pad', size_divisor=32),
            dict(type='PackDetInputs'),
        ]
        assert default_weak(steps, self.TEST) == [
            RESIZE,
            FLIP,
            dict(type='Pad', size_divisor=32),
        ]

    def test_the_first_of_a_choice(self):
        large = dict(type='RandomChoiceResize', scales=[(40, 30)])
        choice = dict(
            type='RandomChoice',
            transforms=[[large], [RESIZE, dict(type='RandomCrop')]],
        )
        assert default_weak([FLIP, choice], self.TEST) == [large, FLIP]

    def test_the_resize_of_a_mosaic_is_not_for_single_images(self):
        steps = [dict(type='Mosaic'), RESIZE, FLIP]
        found = default_weak(steps, self.TEST)
        assert found == [dict(RESIZE, scale=(8, 6)), FLIP]

    def test_nothing_resizes(self):
        assert default_weak([FLIP], []) == [FLIP]


def test_leakage(tmp_path):
    """By path (through a link as well) and by content; not by size alone."""
    contents = dict(a=b'aaaa', b=b'bbbb', copy=b'aaaa', alike=b'cccc')
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / 'link').symlink_to(tmp_path / 'b')

    class Validation:
        paths = [str(tmp_path / 'a'), str(tmp_path / 'b')]

        def __len__(self):
            return 2

        def __getitem__(self, index):
            raise AssertionError('no image is to be read')

        def get_data_info(self, index):
            return dict(img_path=self.paths[index])

    unlabelled = ['alike', 'copy', 'link', 'a']
    files = ImageFiles([str(tmp_path / name) for name in unlabelled])
    pairs = [
        tuple(path.rpartition('/')[2] for path in pair)
        for pair in leaked(files, Validation())
    ]
    assert pairs == [('copy', 'a'), ('link', 'b'), ('a', 'a')]


def test_blank_images():
    data = BlankImages(3, ('cat', 'dog'))
    assert len(data) == 3
    assert data.metainfo == dict(classes=('cat', 'dog'))
    assert not data[2]['inputs'].any()
    assert len(data[2]['data_samples'].gt_instances) == 0
