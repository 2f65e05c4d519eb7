import os

import pytest

from mmkd.data import read_json, replacing, write_json
from mmkd.data.files import replacement


def test_write_json_leaves_what_says_the_same(tmp_path):
    path = tmp_path / 'new' / 'x.json'
    assert write_json(path, {'a': [1, 'ä']})
    os.utime(path, (1, 1))
    assert not write_json(path, {'a': [1, 'ä']})
    assert path.stat().st_mtime == 1
    assert write_json(path, {'a': [2]})
    assert read_json(path) == {'a': [2]}


@pytest.mark.parametrize('error', [KeyboardInterrupt, OSError])
def test_replacing_is_all_or_nothing(tmp_path, error):
    path = tmp_path / 'x'
    path.write_bytes(b'old')

    def write_half():
        with replacing(path) as file:
            file.write(b'ne')
            raise error

    with pytest.raises(error):
        write_half()
    assert path.read_bytes() == b'old'
    assert os.listdir(tmp_path) == ['x']


def test_a_link_in_the_way_is_not_followed(tmp_path, monkeypatch):
    """Even if somebody guesses the name, which is drawn."""
    monkeypatch.setattr('secrets.token_hex', lambda count: 'guessed')
    names = []
    with replacement(tmp_path / 'x') as temporary:
        temporary.write_text('x')
        names.append(temporary)
    mine = tmp_path / 'mine'
    mine.write_text('mine')
    names[0].symlink_to(mine)
    with pytest.raises(FileExistsError), replacing(tmp_path / 'x'):
        pass
    assert mine.read_text() == 'mine'
