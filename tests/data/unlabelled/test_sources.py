"""Where images without labels come from."""

import json
import pickle

import cv2
import numpy as np
import pytest

from mmkd.data.unlabelled import sources
from mmkd.data.unlabelled.sources import VideoFrames, find_images
from mmkd.errors import ConfigError, DataError, PictureError
from tests.helpers import made_data


@pytest.fixture
def lines(monkeypatch):
    said = []
    monkeypatch.setattr(
        sources, 'print_log', lambda text, *_: said.append(text)
    )
    return said


@pytest.fixture
def folder(tmp_path):
    """Three images, one of them in a folder within, and a text."""
    for number, name in enumerate(('b.png', 'a.jpg', 'in/c.png')):
        path = tmp_path / 'images' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        image = np.full((10 + number, 20, 3), 50 * number, np.uint8)
        assert cv2.imwrite(str(path), image)
    (tmp_path / 'images' / 'notes.md').write_text('none')
    return tmp_path / 'images'


@pytest.fixture
def video(tmp_path):
    """Twelve frames, whose brightness is their number times 20."""
    path = tmp_path / 'film.avi'
    code = cv2.VideoWriter_fourcc(*'MJPG')
    writer = cv2.VideoWriter(str(path), code, 10, (32, 24))
    for number in range(12):
        writer.write(np.full((24, 32, 3), 20 * number, np.uint8))
    writer.release()
    return path


def names(images):
    return [images.name(i).rpartition('/')[2] for i in range(len(images))]


def frames(images):
    """The numbers of the frames, by their brightness."""
    values = [images.read(i).mean() / 20 for i in range(len(images))]
    return [round(value) for value in values]


class TestFiles:
    def test_a_folder(self, folder):
        images = find_images(folder)
        assert sorted(names(images)) == ['a.jpg', 'b.png', 'c.png']
        sizes = {images.read(i).shape[:2] for i in range(3)}
        assert sizes == {(10, 20), (11, 20), (12, 20)}
        assert len(images.paths()) == 3

    def test_a_list(self, folder, tmp_path):
        path = tmp_path / 'list.txt'
        path.write_text(f'images/b.png\n\n{folder}/in/c.png\n')
        assert names(find_images(str(path))) == ['b.png', 'c.png']

    def test_a_list_of_sources(self, folder, video):
        images = find_images([str(folder / 'b.png'), str(video)])
        assert len(images) == 13
        assert images.read(0).shape == (10, 20, 3)
        assert images.name(12).endswith('film.avi, frame 11')
        assert round(images.read(12).mean() / 20) == 11
        assert len(images.paths()) == 1

    @pytest.mark.parametrize('place', ['images', '.', 'images/in'])
    def test_labels_of_coco_are_ignored(self, folder, tmp_path, place):
        path = tmp_path / place / 'labels.json'
        content = dict(images=[dict(id=4, file_name='b.png')])
        path.write_text(json.dumps(content))
        assert names(find_images(path)) == ['b.png']

    def test_a_data_set_of_mmdetection(self):
        """With images that have no box, which training would leave out."""
        root = made_data.root() / 'coco_tiny'
        (annotations,) = root.glob('annotations/*train2017.json')
        images = find_images(
            dict(
                type='RepeatDataset',
                times=3,
                dataset=dict(
                    type='CocoDataset',
                    ann_file=str(annotations),
                    data_prefix=dict(img=f'{root}/train2017/'),
                    filter_cfg=dict(filter_empty_gt=True, min_size=10**6),
                ),
            )
        )
        count = len(json.loads(annotations.read_text())['images'])
        assert len(images) == count
        assert images.read(0).ndim == 3

    def test_what_is_missing_is_named_and_left_out(
        self, folder, tmp_path, lines
    ):
        (folder / 'empty.png').touch()
        path = tmp_path / 'list.txt'
        path.write_text('images/b.png\nimages/gone.png\nimages/empty.png')
        assert names(find_images(path)) == ['b.png']
        (text,) = lines
        assert '2 of 3 images of the list' in text
        assert 'gone.png' in text
        assert 'empty.png' in text

    def test_a_damaged_image(self, folder):
        (folder / 'a.jpg').write_bytes(b'no image')
        images = find_images(folder / 'a.jpg')
        with pytest.raises(PictureError, match=r'a.jpg is damaged'):
            images.read(0)

    def test_an_image_that_is_too_large(self, folder, monkeypatch):
        monkeypatch.setenv('OPENCV_IO_MAX_IMAGE_PIXELS', '100')
        with pytest.raises(PictureError, match='at most 100 pixels'):
            find_images(folder / 'b.png').read(0)


class TestVideo:
    def test_all_frames_in_any_order(self, video):
        images = find_images(str(video))
        assert frames(images) == list(range(12))
        for number in (7, 3, 4, 11, 0):
            assert round(images.read(number).mean() / 20) == number
        assert images.paths() == ()

    def test_some_frames(self, video):
        spec = dict(video=str(video), start=2, stop=9, every=3)
        images = find_images(spec)
        assert frames(images) == [2, 5, 8]
        assert images.name(1) == f'{video}, frame 5'

    def test_another_process_opens_it_anew(self, video):
        images = find_images(str(video))
        images.read(3)
        again = pickle.loads(pickle.dumps(images))
        assert again._capture is None
        assert round(again.read(3).mean() / 20) == 3

    def test_it_ends_early(self, video, lines):
        whole = video.read_bytes()
        at = whole.index(b'idx1')
        frame = (at - whole.index(b'movi')) // 12
        video.write_bytes(whole[: at - 5 * frame])
        images = VideoFrames(str(video))
        if len(images) == 12:
            pytest.skip('this OpenCV restores the frames')
        assert 5 <= len(images) <= 8
        assert frames(images) == list(range(len(images)))
        assert lines == [] or f'{len(images)} can be read' in lines[0]

    def test_a_length_that_is_not_true(self, video, lines, monkeypatch):
        """The last frame that can be read is found."""
        stock = VideoFrames._frame
        monkeypatch.setattr(
            VideoFrames,
            '_frame',
            lambda self, n: None if n >= 7 else stock(self, n),
        )
        images = VideoFrames(str(video))
        assert len(images) == 7
        assert 'ends early: it promises 12 frames, of which 7' in lines[0]
        assert frames(images) == list(range(7))

    def test_no_video(self, tmp_path):
        path = tmp_path / 'film.mp4'
        path.write_bytes(b'no video at all')
        with pytest.raises(DataError, match=r'no frame of .*film.mp4 can be'):
            find_images(str(path))

    def test_a_range_without_frames(self, video):
        with pytest.raises(DataError, match=r'frames 20 to 12 of .* are none'):
            find_images(dict(video=str(video), start=20))


@pytest.mark.parametrize(
    ('spec', 'text'),
    [
        ('nowhere', 'nowhere does not exist'),
        (7, 'dataset is 7. Give a folder'),
        ([], 'dataset is \\[\\]'),
        (dict(folder='x'), 'is a dict without "type"'),
        (dict(video='gone.mp4'), 'the video gone.mp4 does not exist'),
    ],
)
def test_nothing_of_the_kind(spec, text):
    with pytest.raises(DataError, match=text):
        find_images(spec)


def test_a_video_with_another_option():
    with pytest.raises(ConfigError, match='no option "fps"'):
        find_images(dict(video='x.mp4', fps=2))


def test_files_that_hold_no_images(tmp_path):
    (tmp_path / 'images').mkdir()
    with pytest.raises(DataError, match=r'folder .*images has no image there'):
        find_images(tmp_path / 'images')
    (tmp_path / 'list.txt').write_text('gone.png\n')
    with pytest.raises(DataError, match='none of its 1 images is there, such'):
        find_images(tmp_path / 'list.txt')
    (tmp_path / 'x.json').write_text('{"info": 1}')
    with pytest.raises(DataError, match='expected a list "images"'):
        find_images(tmp_path / 'x.json')
    (tmp_path / 'y.json').write_text('{"images": [{"file_name": "g.png"}]}')
    with pytest.raises(DataError, match=r'names g.png, which is neither'):
        find_images(tmp_path / 'y.json')
    (tmp_path / 'notes.md').write_text('none')
    with pytest.raises(DataError, match=r'notes.md is of an unknown kind'):
        find_images(tmp_path / 'notes.md')
