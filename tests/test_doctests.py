"""Every example in a docstring of mmkd runs and gives what it shows."""

import doctest
import importlib
from pathlib import Path

import pytest

import mmkd
from mmkd import losses

ROOT = Path(mmkd.__file__).parent
FILES = {
    '.'.join(['mmkd', *path.relative_to(ROOT).with_suffix('').parts]): path
    for path in sorted(ROOT.rglob('*.py'))
    if '>>>' in path.read_text()
}
"""Modules with examples, and their files."""
SKIP = '# doctest: +SKIP'


def lines_of(path):
    """The first lines of a file's examples, comments too."""
    lines = map(str.strip, path.read_text().splitlines())
    return [line for line in lines if line.startswith('>>>')]


@pytest.mark.parametrize('name', FILES)
def test_examples_give_what_they_show(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    runner, report = doctest.DocTestRunner(verbose=False), []
    found = 0
    for test in doctest.DocTestFinder().find(module):
        found += len(test.examples)
        runner.run(test, out=report.append)
    assert not runner.failures, ''.join(report)
    # None stands where doctest does not look.
    comments = [line[3:].strip()[:1] for line in lines_of(FILES[name])]
    assert found == sum(first != '#' for first in comments)


@pytest.mark.parametrize('name', FILES)
def test_what_is_skipped_has_a_reason(name):
    """A comment stands before it."""
    reason = False
    for line in lines_of(FILES[name]):
        if SKIP in line:
            assert reason, f'{name}: a comment must say why: {line}'
        else:
            reason = line.startswith('>>> #')


@pytest.mark.parametrize('name', losses.__all__)
def test_each_loss_has_an_example(name):
    tests = doctest.DocTestFinder().find(getattr(losses, name), name)
    assert any(test.examples for test in tests)
