"""Hashes of what a training depends on."""

import hashlib
import http.server
import threading
from functools import partial

import pytest
import torch

from mmkd.data.checkpoint_file import load_checkpoint_file
from mmkd.study import hashes


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / 'some file-1234.pth'
    torch.save({'state_dict': {'w': torch.ones(1)}}, path)
    return path


def test_a_path_is_its_file(checkpoint, monkeypatch):
    assert hashes.local_file(str(checkpoint)) == checkpoint
    assert hashes.local_file(checkpoint.as_uri()) == checkpoint
    monkeypatch.setenv('HOME', str(checkpoint.parent))
    assert hashes.local_file(f'~/{checkpoint.name}') == checkpoint
    assert hashes.local_file(f'{checkpoint}.no') is None
    assert hashes.local_file('') is None


def test_a_url_is_the_file_that_was_downloaded(
    checkpoint, tmp_path, monkeypatch
):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    handler = partial(
        http.server.SimpleHTTPRequestHandler, directory=str(checkpoint.parent)
    )
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        loop = threading.Thread(
            target=server.serve_forever, kwargs={'poll_interval': 0.01}
        )
        loop.start()
        url = f'http://127.0.0.1:{server.server_port}/some%20file-1234.pth?a=b'
        assert hashes.local_file(url) is None
        load_checkpoint_file(url)
        server.shutdown()
        loop.join()
    found = hashes.local_file(url)
    assert found.read_bytes() == checkpoint.read_bytes()
    assert (tmp_path / 'home') in found.parents


def test_the_hash_of_a_file_sees_its_content(tmp_path):
    path = tmp_path / 'file'
    path.write_bytes(b'a')
    assert hashes.hash_file(path) == hashlib.sha256(b'a').hexdigest()
    path.write_bytes(b'bc')
    assert hashes.hash_file(path) == hashlib.sha256(b'bc').hexdigest()


def test_the_hash_of_the_tools_sees_each(tmp_path, monkeypatch):
    assert [path.name for path in hashes.TOOLS] == ['train.py', 'test.py']
    assert all(path.is_file() for path in hashes.TOOLS)
    tools = [tmp_path / 'train.py', tmp_path / 'test.py']
    monkeypatch.setattr(hashes, 'TOOLS', tools)
    seen = set()
    for texts in (('', ''), ('#', ''), ('', '#'), ('##', '#')):
        for path, text in zip(tools, texts, strict=True):
            path.write_text(text)
        seen.add(hashes.hash_tools())
    assert len(seen) == 4
