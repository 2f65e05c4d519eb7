"""The tables of methods are what their command writes."""

import re

import pytest
from mmengine.config import Config

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
    defaults_of,
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
    assert set(names) == expected - {'Method'} | {'COPHead'}
    if page != 'docs/official_code.md':  # a row for each setting
        assert len(names) == len(set(names))


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


OFFICIAL = [(cls, each) for cls in classes() for each in cls.official]


@pytest.mark.parametrize(
    ('cls', 'official'), OFFICIAL, ids=lambda x: getattr(x, '__name__', '')
)
class TestOfficialCode:
    """What a class says of its authors' code."""

    def test_the_comparison_exists(self, cls, official):
        path, *names = official.compared.split('::')
        text = (ROOT / path).read_text()
        for name in names:
            assert re.search(rf'^ *(class|def) {name}\b', text, re.MULTILINE)

    def test_the_options_are_valid(self, cls, official):
        assert official.options.keys() <= defaults_of(cls).keys()
        if issubclass(cls, methods.Method):
            cls(**official.options)

    def test_the_cited_config_has_the_options(self, cls, official):
        assert bool(official.ap) == bool(official.config)
        if official.config:
            config = Config.fromfile(ROOT / 'configs' / official.config)
            (used,) = options_in(config.to_dict(), f'mmkd.{cls.__name__}')
            defaults = defaults_of(cls)
            for name, value in official.options.items():
                assert used.get(name, defaults[name]) == value, name


def options_in(value, name):
    """The dicts of a config with this ``type``."""
    if isinstance(value, dict):
        if value.get('type') == name:
            yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from options_in(part, name)


def test_needs_in_words():
    assert reads(methods.PKD) == 'features'
    assert reads(methods.KD) == 'class logits'
    assert reads(methods.LD) == 'predictions per prior'
    assert reads(methods.DML) == 'peers'
    assert (labels(methods.PKD), labels(methods.DKD)) == ('no', 'yes')


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
