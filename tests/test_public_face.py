"""What ``import mmkd`` offers, and what a third party can add to it."""

import ast
import subprocess
import sys

import pytest

import mmkd
from tests.helpers.toy import ROOT

STABLE = {
    '__version__',
    *('Batch', 'ClassMap', 'Distiller', 'FeatureMethod', 'Method'),
    *('StepRecord', 'Teacher', 'TeacherContext', 'TeacherView'),
    *('CheckpointError', 'ConfigError', 'DataError', 'MMKDError', 'TapError'),
    *('HOOKS', 'INDICATORS', 'METHODS', 'MODELS', 'RUNNERS', 'TEACHERS'),
    *('build_distiller', 'build_teacher'),
}
"""Whoever takes a name away breaks somebody's code: see CONTRIBUTING.md."""


def test_the_surface():
    assert set(mmkd.__all__) == STABLE
    for name in STABLE:
        assert getattr(mmkd, name) is not None
        assert name in dir(mmkd)


def test_an_unknown_name():
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        _ = mmkd.distil


def test_type_checkers_see_the_same():
    stub = ast.parse((ROOT / 'mmkd' / '__init__.pyi').read_text())
    typed = {
        (alias.asname, node.module)
        for node in stub.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == set(mmkd._HOMES.items())
    assert (ROOT / 'mmkd' / 'py.typed').is_file()


def test_importing_it_imports_nothing_else():
    code = (
        'import sys, mmkd; '
        "assert not {'torch', 'mmengine', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, '-c', code], check=True, cwd=ROOT)
