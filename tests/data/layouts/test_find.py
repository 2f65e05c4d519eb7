"""What is said of paths that hold no data in a known layout."""

import json
import zipfile

import pytest

from mmkd.data.layouts import find_data
from mmkd.errors import DataError
from tests.helpers import own_data as own


def several(root, *names, text='x'):
    for name in names:
        own.write(root / name, text)


def images(root, count=3):
    for number in range(count):
        own.draw(root / f'{number}.jpg', (9, 9))


CASES = {
    'nothing': (lambda root: None, 'an empty folder'),
    'images': (images, '3 .jpg. 3 images have no labels. Draw the boxes'),
    'videos': (
        lambda root: several(root, 'a.mp4', 'b.MOV'),
        'They are videos: take pictures (ffmpeg',
    ),
    'a video': (lambda root: several(root, 'a.mp4'), 'It is a video'),
    'an archive': (
        lambda root: several(root, 'a.zip'),
        '1 .zip. Unpack the .zip, and give the folder.',
    ),
    'captions': (
        lambda root: (images(root), several(root, '0.txt', '1.txt')),
        '2 .txt beside 3 images, but 0.txt has no line of YOLO (class '
        "x_centre y_centre width height): 'x'.",
    ),
    'other folders': (
        lambda root: several(root, 'src/a.py', 'docs/b.py', '.git/c'),
        'got 2 .py in docs/, src/. Check the path.',
    ),
    'LabelMe': (
        lambda root: (
            images(root),
            several(root, '1.json', text='{"shapes": []}'),
        ),
        '1.json is of LabelMe: export COCO',
    ),
    'Label Studio': (
        lambda root: (
            images(root),
            several(root, 'a.json', text='[{"annotations": []}]'),
        ),
        'a.json is the JSON of Label Studio or CreateML: export COCO.',
    ),
    'another JSON': (
        lambda root: (images(root), several(root, 'a.json', text='{"a": 1}')),
        'a.json is not COCO: it needs images, annotations and categories, '
        "and has 'a'.",
    ),
    'another CSV': (
        lambda root: (images(root), several(root, 'a.csv', text='a,b\n1,2')),
        'a.csv names no image, class and box',
    ),
    'deeper': (
        lambda root: several(
            root, 'x/a/b/a.json', 'y/b', text=json.dumps(own.coco({}))
        ),
        'Give the folder of x/a/b/a.json instead.',
    ),
}


@pytest.mark.parametrize('case', CASES)
def test_a_folder(tmp_path, case):
    make, expected = CASES[case]
    root = tmp_path / 'x'
    root.mkdir()
    make(root)
    with pytest.raises(DataError) as info:
        find_data(str(root))
    text = str(info.value)
    assert text.startswith(f'{root}: expected data as COCO (*.json), Pascal')
    assert expected in text
    assert '\n' not in text
    assert len(text) < 600


@pytest.mark.parametrize(
    ('name', 'expected'),
    [
        ('a.mp4', 'got a video. Take pictures from it (ffmpeg -i a.mp4'),
        ('a.zip', 'got an archive. Unpack it (unzip a.zip -d a)'),
        ('a.png', 'got an image. Draw the boxes'),
        ('a.xml', 'got a single annotation. Give the folder'),
        ('a.pth', 'got a file .pth. Give a folder, or its data.yaml'),
        ('a.yaml', 'got none of them. Give the data.yaml of YOLO'),
        ('a.json', 'expected a JSON file, got Expecting value'),
    ],
)
def test_a_file(tmp_path, name, expected):
    path = own.write(tmp_path / name, 'x')
    with pytest.raises(DataError) as info:
        find_data(str(path))
    assert expected in str(info.value)


def test_labels_without_images(tmp_path):
    several(tmp_path / 'x', '1.xml', text=own.xml((9, 9), []))
    with pytest.raises(DataError, match='0 that can and 1 that cannot; of'):
        find_data(str(tmp_path / 'x'))


@pytest.mark.parametrize('name', ['x', 'x' * 300, 'x/\0', 'loop'])
def test_a_path_that_is_not_there(tmp_path, name):
    (tmp_path / 'loop').symlink_to('loop')
    with pytest.raises(DataError, match='got nothing'):
        find_data(str(tmp_path / 'no' / name))
    if name != 'x/\0':
        with pytest.raises(DataError, match='got nothing'):
            find_data(str(tmp_path / name))
    with pytest.raises(DataError, match='Run `mmkd prepare coco`'):
        find_data('coco')


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, 'Permission denied', str(path))

    monkeypatch.setattr('pathlib.Path.iterdir', refuse)
    with pytest.raises(DataError, match='got "Permission denied"'):
        find_data(str(tmp_path))


def test_links_that_lead_in_a_circle(tmp_path):
    images(tmp_path / 'x')
    (tmp_path / 'x/y').symlink_to(tmp_path / 'x')
    with pytest.raises(DataError, match='3 images have no labels'):
        find_data(str(tmp_path / 'x'))


def test_an_archive_of_a_mac(tmp_path):
    """``__MACOSX/._1.jpg`` lies beside what was packed."""
    path = tmp_path / 'x.zip'
    with zipfile.ZipFile(path, 'w') as packed:
        for number in range(3):
            own.draw(tmp_path / 'new.png', (20, 10))
            packed.write(tmp_path / 'new.png', f'x/{number}.png')
            packed.writestr(f'x/{number}.txt', '0 .5 .5 .5 .5')
            packed.writestr(f'__MACOSX/x/._{number}.png', 'x')
    with zipfile.ZipFile(path) as packed:
        packed.extractall(tmp_path / 'x')
    data = find_data(str(tmp_path / 'x'))
    box = ('class_0', (5.0, 2.5, 15.0, 7.5))
    assert own.delivered(data) == {name: [box] for name in '012'}
    assert not data.faults
