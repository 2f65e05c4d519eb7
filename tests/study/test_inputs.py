"""Hashes of what a training depends on."""

import hashlib

import pytest
import torch

from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.study import inputs
from tests.helpers.studies import served


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'some file-1234.pth'
    torch.save({'state_dict': {'w': torch.ones(1)}}, path)
    return path


def test_a_path_is_its_file(checkpoint, monkeypatch):
    assert inputs.local_file(str(checkpoint)) == checkpoint
    assert inputs.local_file(checkpoint.as_uri()) == checkpoint
    monkeypatch.setenv('HOME', str(checkpoint.parent))
    assert inputs.local_file(f'~/{checkpoint.name}') == checkpoint
    assert inputs.local_file(f'{checkpoint}.no') is None
    assert inputs.local_file('') is None


def test_a_url_is_the_file_that_was_downloaded(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    with served(checkpoint.parent) as address:
        url = f'{address}/some%20file-1234.pth?a=b'
        assert inputs.local_file(url) is None
        load_checkpoint_file(url)
    found = inputs.local_file(url)
    assert found.read_bytes() == checkpoint.read_bytes()
    assert (tmp_path / 'home') in found.parents


def test_the_hash_of_a_file_sees_its_content(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'a')
    assert inputs.hash_file(path) == hashlib.sha256(b'a').hexdigest()
    path.write_bytes(b'bc')
    assert inputs.hash_file(path) == hashlib.sha256(b'bc').hexdigest()


def test_the_hash_of_code_sees_every_file_that_trains(tmp_path):
    def code():
        inputs.hash_code.cache_clear()
        return inputs.hash_code(tmp_path)

    def write(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)

    seen = set()
    for name, text in (('a.py', ''), ('b/c.py', ''), ('b/c.py', '#')):
        write(name, text)
        seen.add(code())
    assert len(seen) == 3
    # Text, and what only looks at trainings.
    for name in ('b/notes.txt', 'study/table.py', 'report/page.py'):
        write(name, 'x')
        assert code() in seen
    write('cli/train.py', '')
    assert code() not in seen


def test_the_packages_have_versions():
    names = {'torch', 'numpy', 'ensemble-boxes', 'scikit-learn'}
    assert names < inputs.versions().keys()
