"""What is read: random crops of a list, and objects cut out."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmkd.data.layouts import Picture
from mmkd.errors import DataError
from mmkd.pretrain.crops import RandomCrops, object_crops
from tests.helpers import own_data

pytest.importorskip('kornia')
RED, BLUE = (200, 10, 10), (10, 10, 200)


def painted(path, *boxes):
    """A grey picture with boxes (x, y, w, h) in colours, RGB."""
    picture = np.full((90, 120, 3), 128, np.uint8)
    for (x, y, w, h), colour in boxes:
        picture[y : y + h, x : x + w] = colour[::-1]
    cv2.imwrite(str(path), picture)
    return path


def listed(folder, *files):
    path = folder / 'images.txt'
    path.write_text(''.join(f'{file}\n' for file in files))
    return str(path)


class TestRandomCrops:
    def test_two_of_each_image(self, tmp_path):
        red = painted(tmp_path / 'r.png', ((0, 0, 120, 90), RED))
        blue = painted(tmp_path / 'b.png', ((0, 0, 120, 90), BLUE))
        data = RandomCrops(listed(tmp_path, red, blue), size=32)
        assert len(data) == 2
        for index, colour in enumerate((RED, BLUE)):
            crops = data[index]['inputs']
            assert crops.shape == (2, 3, 32, 32)
            assert crops.dtype == torch.uint8
            expected = torch.tensor(colour, dtype=torch.uint8)
            assert (crops == expected.view(3, 1, 1)).all()

    def test_a_damaged_image_is_named_once(self, tmp_path, logged):
        """Its header is whole, and the next one takes its place."""
        broken = painted(tmp_path / 'broken.png', ((0, 0, 120, 90), RED))
        content = broken.read_bytes()
        broken.write_bytes(content[:60] + b'\0' * (len(content) - 60))
        blue = painted(tmp_path / 'b.png', ((0, 0, 120, 90), BLUE))
        data = RandomCrops(listed(tmp_path, broken, blue), size=32)
        for _ in range(2):
            assert (data[0]['inputs'][:, 2] == 200).all()
        told = [text for text in logged if 'is damaged' in text]
        assert told == [f'{broken} is damaged, and left out']

    def test_all_are_damaged(self, tmp_path):
        (tmp_path / 'a.jpg').write_bytes(b'x')
        data = RandomCrops(listed(tmp_path, tmp_path / 'a.jpg'), size=32)
        with pytest.raises(DataError, match='none of the 1 images can be'):
            data[0]


class TestObjects:
    def test_are_cut_out(self, tmp_path):
        """One reaches beyond the picture; one is empty within it."""
        path = painted(
            tmp_path / 'a.png',
            ((10, 20, 30, 15), RED),
            ((100, 50, 20, 40), BLUE),
        )
        picture = Picture(path, '', 120, 90)
        picture.add('red', (10, 20, 30, 15))
        picture.add('blue', (100, 50, 50, 80))
        picture.add('blue', (119.6, 10, 30, 30))
        other = Picture(path, '', 120, 90)
        other.add('blue', (100, 50, 20, 40))
        crops, labels, images = object_crops(
            [picture, other], ['blue', 'red'], 24, 100
        )
        assert labels.tolist() == [1, 0, 0]
        assert images.tolist() == [0, 0, 1]
        for crop, colour in zip(crops, (RED, BLUE, BLUE), strict=True):
            assert (crop == torch.tensor(colour).view(3, 1, 1)).all()

    def test_are_spread_over_the_images(self, tmp_path):
        path = painted(tmp_path / 'a.png')
        pictures = [Picture(path, '', 120, 90) for _ in range(20)]
        for picture in pictures:
            for x in range(5):
                picture.add('cell', (10 * x, 10, 8, 8))
        _, labels, images = object_crops(pictures, ['cell'], 24, 10)
        assert len(labels) == 10
        assert images.tolist() == [*range(0, 20, 2)]

    def test_of_a_picture_that_cannot_be_read(self, tmp_path):
        whole = Picture(painted(tmp_path / 'a.png'), '', 120, 90)
        own_data.draw(tmp_path / 'b.jpg', (120, 90))
        Path(tmp_path / 'b.jpg').write_bytes(b'x')
        gone = Picture(tmp_path / 'b.jpg', '', 120, 90)
        for picture in (gone, whole):
            picture.add('cell', (10, 10, 8, 8))
        _, _, images = object_crops([gone, whole], ['cell'], 24, 10)
        assert images.tolist() == [1]
