import dataclasses
import os
import shutil
import signal
import threading
import time

import pytest

from mmkd.data.prepare import coco as module
from tests.helpers.layouts import make_coco


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / 'my coco')


@pytest.fixture
def served(site, coco, remote, zip_folder, monkeypatch):
    """COCO's three archives, with two photos per split."""
    (coco / 'annotations' / 'captions_val2017.json').write_text('{}')
    path = zip_folder(site.folder / 'annotations.zip', coco, 'annotations/')
    monkeypatch.setattr(module, 'COCO_ANNOTATIONS', remote(path))
    for split in ('train', 'val'):
        start = f'{split}2017'
        path = zip_folder(site.folder / f'{start}.zip', coco, f'{start}/')
        monkeypatch.setitem(module.COCO_IMAGES, split, remote(path))
    return site


@pytest.fixture
def annotations(served, monkeypatch):
    """Change what is known of the annotations' archive."""

    def annotations(**changes):
        changed = dataclasses.replace(module.COCO_ANNOTATIONS, **changes)
        monkeypatch.setattr(module, 'COCO_ANNOTATIONS', changed)

    return annotations


def test_it_links_a_folder(works, coco, data, snapshot):
    out = works('coco', '--from', coco)
    assert 'val has 2 images, 2 boxes, 1 classes' in out
    assert (data / 'coco' / 'train2017').is_symlink()
    image = data / 'coco' / 'val2017' / '1.jpg'
    assert image.read_text() == 'val 1.jpg'
    before = snapshot()
    assert works('coco', '--from', coco).count('already there') == 4
    assert snapshot() == before


def test_it_links_one_split(works, coco, data):
    shutil.rmtree(coco / 'train2017')
    works('coco', '--from', coco, '--split', 'val')
    assert sorted(os.listdir(data / 'coco')) == ['annotations', 'val2017']


def test_it_links_real_data(works, shared_data):
    out = works('coco', '--from', shared_data / 'coco_tiny')
    assert 'train has 80 images, 705 boxes, 80 classes' in out
    assert 'val has 80 images, 815 boxes, 80 classes' in out


def test_it_knows_a_link_of_the_whole_folder(works, coco, data):
    data.mkdir()
    (data / 'coco').symlink_to(coco)
    assert works('coco', '--from', coco).count('already there') == 4
    assert 'already there' in works('coco')


def test_it_copies(works, coco, data, snapshot):
    partial = data / 'coco' / 'train2017.partial'
    partial.mkdir(parents=True)
    (partial / '1.jpg').write_text('trai')  # of an interrupted run
    works('coco', '--from', coco, '--copy')
    copied = data / 'coco' / 'train2017'
    assert not copied.is_symlink()
    assert (copied / '1.jpg').read_text() == 'train 1.jpg'
    assert not partial.exists()
    before = snapshot()
    works('coco', '--from', coco, '--copy')
    assert snapshot() == before


@pytest.mark.parametrize('options', [[], ['--copy']])
def test_it_never_overwrites(fails, coco, data, options):
    mine = data / 'coco' / 'val2017' / 'mine.jpg'
    mine.parent.mkdir(parents=True)
    mine.write_text('mine')
    fails(
        *('coco', '--from', coco, '--split', 'val', *options),
        match=r'val2017: expected nothing, .* got other data\. Move it',
    )
    assert os.listdir(mine.parent) == ['mine.jpg']


def test_it_does_not_write_into_what_is_linked(fails, coco, data):
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
            r'every file that .*train2017\.json names, got 1 missing: 2\.jpg',
        ),
        (
            lambda root: os.truncate(
                root / 'annotations' / 'instances_val2017.json', 300
            ),
            r'instances_val2017\.json: .* got one that ends midway',
        ),
    ],
)
def test_a_bad_folder(fails, coco, data, harm, match):
    harm(coco)
    fails('coco', '--from', coco, match=match)
    assert not data.exists()


def test_it_downloads(works, served, asked, data, snapshot):
    out = works('coco')
    assert 'train has 2 images, 2 boxes' in out
    assert f'downloading {served.url}/train2017.zip' in out
    root = data / 'coco'
    assert (root / 'train2017' / '2.jpg').read_text() == 'train 2.jpg'
    labels = ['instances_train2017.json', 'instances_val2017.json']
    assert sorted(os.listdir(root / 'annotations')) == labels
    archives = ['annotations.zip', 'train2017.zip', 'val2017.zip']
    assert sorted(asked()) == archives
    before = snapshot()
    assert works('coco').count('already there') == 2
    assert snapshot() == before
    assert sorted(os.listdir(data / 'downloads')) == archives
    # what is missing is unpacked again
    (root / 'val2017' / '2.jpg').unlink()
    assert 'val2017.zip: 1 files unpacked' in works('coco')
    assert len(asked()) == 3


@pytest.mark.usefixtures('served')
def test_it_downloads_one_split(works, asked, data):
    works('coco', '--split', 'val', '--delete-archives')
    assert asked() == ['annotations.zip', 'val2017.zip']
    assert not (data / 'coco' / 'train2017').exists()
    # the annotations of the other split are in it, too
    assert os.listdir(data / 'downloads') == ['annotations.zip']
    works('coco', '--split', 'train')
    assert asked()[2:] == ['train2017.zip']


@pytest.fixture
def heeding_ctrl_c():
    """What runs in the background of a shell script may ignore it."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, former)


@pytest.mark.usefixtures('heeding_ctrl_c')
def test_it_continues_after_ctrl_c(cli, works, served, data):
    ended = threading.Event()

    def interrupt():
        while not list((data / 'downloads').glob('*.part')):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)  # the download waits for more
        ended.wait()

    served.cuts = [100]
    served.at_cut = interrupt
    status, _, err = cli('coco', '--split', 'val')
    ended.set()
    assert status == 130
    assert 'Run the same command again: it continues' in err
    assert 'annotations.zip' not in os.listdir(data / 'downloads')
    works('coco', '--split', 'val')


def test_a_download_of_a_wrong_file(fails, served, annotations, data):
    known = module.COCO_ANNOTATIONS.known_hash
    annotations(known_hash=f'md5:{"0" * 32}')
    fails(
        'coco',
        match='expected the md5 hash 0{32}, got .* discarded; run it again',
    )
    assert list((data / 'downloads').glob('[!.]*')) == []
    annotations(known_hash=known)
    (served.folder / 'val2017.zip').unlink()
    fails('coco', '--split', 'val', match='HTTP 404')


@pytest.mark.usefixtures('served')
def test_damaged_annotations_are_found_before_a_download(fails, asked, data):
    labels = data / 'coco' / 'annotations' / 'instances_val2017.json'
    labels.parent.mkdir(parents=True)
    labels.write_text('{"images": [')
    fails('coco', '--split', 'val', match=r'ends midway.*Remove it and run')
    assert asked() == []


def test_no_network(fails, served):
    served.close()
    fails('coco', match=r'"\[Errno \d+\] Connection refused".* Check the netw')


def test_a_root_that_is_a_file(fails, coco, data):
    data.write_text('')
    fails('coco', '--from', coco, match=r'data/?\S*: (Not a d|File exists)')


def test_a_full_disk(fails, coco, monkeypatch):
    def full(*_):
        raise OSError(28, 'No space left on device', 'x.jpg')

    monkeypatch.setattr(shutil, 'copyfile', full)
    fails(
        *('coco', '--from', coco, '--copy'),
        match=r'x\.jpg: No space left on device\. Free some space\. Run the s',
    )
