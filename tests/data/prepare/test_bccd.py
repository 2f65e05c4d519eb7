import json
import os
import subprocess
import sys

import pytest

from mmkd.data.download import RemoteFile
from mmkd.data.prepare import bccd as module
from tests.helpers.layouts import make_voc, voc_xml

CELL = voc_xml(('WBC', (1, 1, 5, 5)))


@pytest.fixture
def archive(site, tmp_path, zip_folder):
    root = tmp_path / 'zipped' / 'BCCD_Dataset-master'
    for number, split in enumerate(('train', 'val', 'test')):
        make_voc(root / 'BCCD', split, {f'BloodImage_{number}': CELL})
    (root / 'LICENSE').write_text('MIT')
    (root / 'README.md').write_text('no data')
    return zip_folder(site.folder / 'master.zip', root.parent)


@pytest.fixture
def check(data):
    def check():
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

    return check


def test_it_links_real_data(works, shared_data, data, snapshot):
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
    before = snapshot()
    works('bccd', '--from', source / 'BCCD')
    works('bccd')
    assert snapshot() == before


def test_it_downloads(works, check, site, archive, asked, monkeypatch):
    remote = RemoteFile(f'{site.url}/{archive.name}')
    monkeypatch.setattr(module, 'BCCD_ARCHIVE', remote)
    works('bccd')
    check()
    works('bccd')
    assert asked() == ['master.zip']


def test_it_unpacks_a_zip(works, check, fails, archive):
    content = archive.read_bytes()
    archive.write_bytes(content[: len(content) // 2])
    fails('bccd', '--from', archive, match='master.zip: expected an archive')
    archive.write_bytes(content)
    works('bccd', '--from', archive)
    check()


def test_a_bad_folder(fails, tmp_path, data):
    fails('bccd', '--from', tmp_path / 'no', match='expected a folder with')
    fails('bccd', '--from', tmp_path, match=r'train\.txt: .*takes a folder')
    for split in ('train', 'val', 'test'):
        make_voc(tmp_path / 'BCCD', split, {split: CELL})
    path = tmp_path / 'BCCD' / 'Annotations' / 'val.xml'
    path.write_text('<annotation><size>')
    fails('bccd', '--from', tmp_path, match=r'val\.xml: .* malformed XML')
    path.write_text(voc_xml(('wbc', (1, 1, 5, 5))))
    fails('bccd', '--from', tmp_path, match='RBC, WBC, Platelets, got wbc')
    assert not data.exists()


HEAVY = ('torch', 'mmengine', 'mmcv', 'mmdet', 'cv2', 'supervision')


def test_it_needs_neither_torch_nor_mmdet(shared_data, data):
    block = f'import sys; sys.modules.update(dict.fromkeys({HEAVY}))'
    call = f'["prepare", "bccd", "--from", "{shared_data / "bccd"}"]'
    code = f'{block}; from mmkd.cli import main; sys.exit(main({call}))'
    data.mkdir()
    done = subprocess.run(
        [sys.executable, '-c', code], capture_output=True, text=True, cwd=data
    )
    assert (done.returncode, done.stderr) == (0, '')
    assert 'test.json: written, 72 images' in done.stdout
