"""The files of docs/examples as a user's own modules."""

import importlib
import sys

import pytest

from mmkd.registry import METHODS, TEACHERS
from tests.helpers.toy import ROOT

FOLDER = ROOT / 'docs' / 'examples'


@pytest.fixture(scope='module')
def example():
    """Import a file by its name; what it registers goes afterwards."""
    imported = set()

    def load(name):
        imported.add(name)
        return importlib.import_module(name)

    METHODS.import_from_location()
    before = {r: set(r.module_dict) for r in (METHODS, TEACHERS)}
    sys.path.insert(0, str(FOLDER))
    yield load
    sys.path.remove(str(FOLDER))
    for name in imported:
        del sys.modules[name]
    for registry, names in before.items():
        for name in set(registry.module_dict) - names:
            del registry.module_dict[name]
