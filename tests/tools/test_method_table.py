"""The README's table of methods is what its command writes."""

import pytest

from mmkd import methods
from tests.helpers.toy import ROOT
from tools.method_table import BEGIN, END, paper, table, updated


@pytest.fixture(scope='module')
def written():
    return table()


def test_readme_is_up_to_date(written):
    text = (ROOT / 'README.md').read_text()
    assert updated(text, written) == text, (
        'run `python tools/method_table.py` and commit README.md'
    )


def test_every_method_and_every_link(written):
    rows = written.splitlines()[2:]
    names = {row.split('`')[1].removeprefix('mmkd.') for row in rows}
    assert names == {*methods.__all__, 'COPHead'} - {'Method'}
    for row in rows:
        targets = [part.split(')')[0] for part in row.split('](')[1:]]
        local = [t for t in targets if not t.startswith('https://')]
        assert len(local) >= 2
        assert all((ROOT / target).exists() for target in local)


def test_only_what_stands_between_the_marks_changes():
    text = f'before\n{BEGIN}\nold\n{END}\nafter\n'
    assert updated(text, 'new') == f'before\n{BEGIN}\nnew\n{END}\nafter\n'
    with pytest.raises(SystemExit, match='once'):
        updated('no marks', 'new')


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('Source: A, "T", ICML 2020, https://x.y/1. More', 'A, [T]('),
        ('Source: A, B, "T", 2020, https://x.y/1', 'A & B, [T]('),
        ('Source: A, B, C, "T", 2020, https://x.y/1;', 'A et al., [T]('),
    ],
)
def test_papers_are_read_from_docstrings(source, expected):
    shown = paper(type('X', (), {'__doc__': source}))
    assert shown.startswith(expected)
    assert '](https://x.y/1), ' in shown
    with pytest.raises(SystemExit, match='must hold'):
        paper(type('X', (), {'__doc__': 'Source: somebody'}))
