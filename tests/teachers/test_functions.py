"""Functions that a config names."""

import pytest

from mmkd.errors import ConfigError
from mmkd.teachers.functions import find_function, source_hash


def test_found_wherever_it_is():
    found = find_function('os:path.basename', 'it')
    assert found('a/b') == 'b'


@pytest.mark.parametrize(
    ('name', 'message'),
    [
        ('nowhere_at_all:f', "'nowhere_at_all:f' is no function.*No module"),
        ('os:nothing', 'has no attribute'),
        (':f', 'is no function that Python finds'),
        ('os:curdir', 'is a str, and no function'),
    ],
)
def test_what_is_no_function(name, message):
    with pytest.raises(ConfigError, match=f'it: .*{message}'):
        find_function(name, 'it')


def test_the_hash_is_that_of_the_text(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ('hashed_a', 'hashed_b', 'hashed_c'):
        text = 'def f(): return 1' if name != 'hashed_c' else 'def f(): 2'
        (tmp_path / f'{name}.py').write_text(text)
        find_function(f'{name}:f', 'it')
    hashes = [source_hash(f'hashed_{n}:f') for n in 'abc']
    assert hashes[0] == hashes[1] != hashes[2]
    assert source_hash('itertools:chain') == ''
