"""The tests mirror the rooms: a test lies in the folder of what it tests."""

import ast

from tests.helpers.toy import ROOT

PACKAGE, TESTS = ROOT / 'mmkd', ROOT / 'tests'
ROOMS = sorted(path.parent.name for path in PACKAGE.glob('*/__init__.py'))
WITHOUT_A_ROOM = {'docs', 'fuzz', 'helpers', 'tools'}
"""Folders of tests that are not about a room of ``mmkd``."""


def test_every_room_has_tests_and_every_folder_of_tests_a_room():
    folders = {
        path.name
        for path in TESTS.iterdir()
        if path.is_dir() and list(path.rglob('test_*.py'))
    }
    assert folders - WITHOUT_A_ROOM == set(ROOMS)


def test_helpers_have_names_of_their_own():
    """No two helpers are called the same, but for what one file uses."""
    owners: dict[str, list[str]] = {}
    for path in (TESTS / 'helpers').glob('*.py'):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                owners.setdefault(node.name, []).append(path.name)
    assert not {n: files for n, files in owners.items() if len(files) > 1}
