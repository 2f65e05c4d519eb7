import json
import os
import tarfile

import pytest

from mmkd.data.prepare import voc as module
from tests.helpers.layouts import make_voc, voc_xml

CAT = voc_xml(('cat', (1, 1, 5, 5)))


@pytest.fixture
def tars(site, remote, tmp_path, monkeypatch):
    """The three tars of VOC, with one or two photos each."""
    tars = {}
    for part, names in (
        ('07-trainval', ['000005', '000007']),
        ('07-test', ['000001']),
        ('12-trainval', ['2008_000002']),
    ):
        devkit = tmp_path / part / 'VOCdevkit'
        folder, split = module.voc_part(devkit, part)
        make_voc(folder, split, dict.fromkeys(names, CAT))
        path = site.folder / module.VOC_PARTS[part].name
        with tarfile.open(path, 'w') as tar:
            tar.add(devkit, 'VOCdevkit')
        monkeypatch.setitem(module.VOC_PARTS, part, remote(path))
        tars[part] = path
    return tars


@pytest.fixture
def check(data):
    """Check the layout of mmdet's voc0712 and voc0712-cocofmt configs."""

    def check():
        root = data / 'VOCdevkit'
        found = {}
        for name in ('voc0712_trainval', 'voc07_test'):
            labels = root / 'annotations' / f'{name}.json'
            content = json.loads(labels.read_text())
            found[name] = [row['file_name'] for row in content['images']]
            assert all((root / file).is_file() for file in found[name])
            names = [row['name'] for row in content['categories']]
            assert names == list(module.VOC_CLASSES)
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
        for year, split in (('07', 'trainval'), ('07', 'test'),
                            ('12', 'trainval')):  # fmt: skip
            folder = root / f'VOC20{year}' / 'ImageSets' / 'Main'
            assert (folder / f'{split}.txt').is_file()

    return check


@pytest.mark.usefixtures('tars')
def test_it_downloads(works, check, asked, data, snapshot):
    works('voc', '--delete-archives')
    check()
    assert len(asked()) == 3
    assert os.listdir(data / 'downloads') == []
    before = snapshot()
    works('voc')
    assert snapshot() == before
    assert len(asked()) == 3


def test_it_unpacks_local_tars(works, check, tars, asked):
    works('voc', '--from', *tars.values(), '--delete-archives')
    check()
    assert asked() == []
    assert all(path.is_file() for path in tars.values())


@pytest.mark.parametrize('inner', ['VOCdevkit', ''])
def test_it_links_a_folder(
    works, check, tars, tmp_path, data, snapshot, inner
):
    root = tmp_path / 'my voc'
    for path in tars.values():
        with tarfile.open(path) as tar:
            tar.extractall(root, filter='data')
    works('voc', '--from', root / inner)
    check()
    assert (data / 'VOCdevkit' / 'VOC2012').is_symlink()
    before = snapshot()
    works('voc', '--from', root / inner)
    works('voc')
    assert snapshot() == before


def test_it_takes_some_parts(works, fails, tars, data):
    works('voc', '--from', tars['07-test'], '--parts', '07-test')
    labels = os.listdir(data / 'VOCdevkit' / 'annotations')
    assert labels == ['voc07_test.json']
    fails(
        *('voc', '--from', tars['07-test']),
        match=r'expected VOCtrainval_06-Nov-2007\.tar, or a folder with '
        r'VOC2007 and trainval, got neither\. Give it too, or ask for other',
    )


def test_a_folder_that_lacks_a_part(fails, tmp_path, data):
    make_voc(tmp_path / 'VOC2007', 'trainval', {'1': CAT})
    fails(
        *('voc', '--from', tmp_path),
        match=r'test\.txt: .* got nothing\. Ask for other --parts',
    )
    fails('voc', '--from', tmp_path / 'VOC2007', match='got neither')
    assert not data.exists()


def test_a_bad_tar(fails, tars):
    tar = tars['07-test']
    content = tar.read_bytes()
    tar.write_bytes(content[:-1])
    part = ('--parts', '07-test')
    size = len(content)
    fails('voc', '--from', tar, *part, match=f'{size} bytes, got {size - 1}')
    tar.write_bytes(content[:-1] + b'x')
    fails('voc', '--from', tar, *part, match='expected the md5 hash')
    fails('voc', '--from', 'no.tar', *part, match=r'no\.tar: expected')


def test_unknown_classes(fails, tmp_path):
    xml = voc_xml(('unicorn', (1, 1, 5, 5)))
    make_voc(tmp_path / 'VOC2012', 'trainval', {'1': xml})
    fails(
        *('voc', '--from', tmp_path, '--parts', '12-trainval'),
        match=r'1\.xml: expected objects of the classes aero.*, got unicorn',
    )
