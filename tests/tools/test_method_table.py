"""The tables of methods are what their command writes."""

import re

import pytest

from mmkd import methods
from mmkd.detectors.heads import COPHead
from tests.helpers.toy import ROOT
from tools import method_table
from tools.method_table import (
    BEGIN,
    END,
    TABLES,
    Paper,
    classes,
    labels,
    paper_of,
    reads,
    updated,
    users_of_types,
)


@pytest.fixture(scope='module')
def written():
    return {page: table() for page, table in TABLES.items()}


def rows(written, page):
    return written[page].splitlines()[2:]


@pytest.mark.parametrize('page', TABLES)
def test_pages_are_up_to_date(written, page):
    text = (ROOT / page).read_text()
    assert updated(text, written[page]) == text, (
        f'run `python tools/method_table.py` and commit {page}'
    )


@pytest.mark.parametrize('page', TABLES)
def test_every_method_is_a_row(written, page):
    names = [
        row.split('`')[1].removeprefix('mmkd.') for row in rows(written, page)
    ]
    expected = {getattr(methods, n).__name__ for n in methods.__all__}
    assert sorted(names) == sorted(expected - {'Method'} | {'COPHead'})


def test_every_file_exists(written):
    links = re.findall(r'\]\((?!https://)(.*?)\)', written['README.md'])
    assert len(links) > len(classes())
    assert all((ROOT / path).exists() for path in links)
    cells = [row.split(' | ')[3] for row in rows(written, 'docs/methods.md')]
    for code, *tests in (re.findall('`(.*?)`', cell) for cell in cells):
        assert (ROOT / 'mmkd' / code).exists()
        assert tests
        assert all((ROOT / 'tests' / path).exists() for path in tests)


def test_every_method_has_a_config():
    users = users_of_types()
    without = [c for c in classes() if f'mmkd.{c.__name__}' not in users]
    assert without == [COPHead]


def test_needs_in_words():
    assert reads(methods.PKD) == 'features'
    assert reads(methods.KD) == 'class logits'
    assert reads(methods.LD) == 'predictions per prior'
    assert reads(methods.DML) == 'peers'
    assert (labels(methods.PKD), labels(methods.KD)) == ('no', 'yes')


def test_only_what_stands_between_the_marks_changes():
    text = f'before\n{BEGIN}\nold\n{END}\nafter\n'
    expected = f'before\n{BEGIN}\n\nnew\n\n{END}\nafter\n'
    assert updated(text, 'new') == expected
    with pytest.raises(SystemExit, match='once'):
        updated('no marks', 'new')


def test_a_method_without_a_test_is_refused():
    code = ROOT.joinpath('mmkd/methods/nothing.py').relative_to(ROOT)
    with pytest.raises(SystemExit, match='no test in tests/methods names'):
        method_table.tests_of('mmkd.Nothing' + 'AtAll', code)


@pytest.mark.parametrize(
    ('source', 'authors'),
    [
        ('Source: A, "T", ICML 2020, https://x.y/1. More', 'A'),
        ('Source: A, B, "T", 2020, https://x.y/1', 'A & B'),
        ('Source: A, B, C, "T", 2020, https://x.y/1;', 'A et al.'),
    ],
)
def test_papers_are_read_from_docstrings(source, authors):
    paper = paper_of(type('X', (), {'__doc__': source}))
    venue = 'ICML 2020' if 'ICML' in source else '2020'
    assert paper == Paper(authors, 'T', venue, 'https://x.y/1')
    with pytest.raises(SystemExit, match='must hold'):
        paper_of(type('X', (), {'__doc__': 'Source: somebody'}))
