"""The locks hold all that is required, and a departure from one is found."""

import re
import sys
from email.message import Message
from importlib.metadata import Distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tools import check_lock

ROOT = Path(__file__).resolve().parents[2]
PYTHONS = re.findall(
    r"'Programming Language :: Python :: (3\.\d+)'",
    (ROOT / 'setup.py').read_text(),
)
LOCKS = sorted(ROOT.glob('requirements/lock-*.txt'))
REQUIRED = sorted({*ROOT.glob('requirements/*.txt')} - {*LOCKS})


def test_every_supported_python_has_a_lock():
    names = [f'lock-py{python.replace(".", "")}.txt' for python in PYTHONS]
    assert names
    assert [path.name for path in LOCKS] == sorted(names)


@pytest.mark.parametrize('python', PYTHONS)
def test_a_lock_meets_every_requirement(python):
    name = f'lock-py{python.replace(".", "")}.txt'
    pins = check_lock.read_lock(ROOT / 'requirements' / name)
    required = [
        Requirement(line)
        for path in REQUIRED
        for line in path.read_text().splitlines()
        if line and line[0] != '#'
    ]
    assert len(required) > 40
    for one in required:
        if one.marker and not one.marker.evaluate({'python_version': python}):
            continue
        (pin,) = pins[canonicalize_name(one.name)].specifier
        assert pin.operator == '=='
        assert one.specifier.contains(pin.version), (one, pin)


@pytest.mark.parametrize(
    'path', [*LOCKS, *REQUIRED], ids=lambda path: path.name
)
def test_no_file_names_an_index(path):
    options = re.findall(r'^-.*|\S+://\S*', path.read_text(), re.MULTILINE)
    assert options == []


class Installed(Distribution):
    def __init__(self, name, version):
        self.about = Message()
        self.about['Name'], self.about['Version'] = name, version

    @property
    def metadata(self):
        return self.about

    def read_text(self, filename):
        raise NotImplementedError

    def locate_file(self, path):
        raise NotImplementedError


@pytest.fixture
def environment(monkeypatch, tmp_path):
    """Sets what the lock holds and what is installed."""

    def environment(lock, **versions):
        path = tmp_path / 'lock.txt'
        path.write_text(f'# made by hand\n{lock}\n')
        installed = [Installed(*each) for each in versions.items()]
        monkeypatch.setattr(check_lock, 'lock_file', lambda: path)
        monkeypatch.setattr(check_lock, 'distributions', lambda: installed)

    return environment


def test_what_is_locked_passes(environment, capsys):
    environment(
        'torch==2.13.0\nruamel-yaml==0.19.1\nnvidia-nvtx==13.0\na==1.0rc1',
        **{'torch': '2.13.0+cpu', 'ruamel.yaml': '0.19.1', 'A': '1.0rc1'},
        **{'pip': '23.2.1', 'mmkd': '0.1.0'},
    )
    assert check_lock.main() == 0
    assert capsys.readouterr() == ('', '')


def test_departures_are_named(environment, capsys):
    environment('PyYAML==6.0.4\nrich==15.0.0', pyyaml='6.0.3', tqdm='4.70.1')
    assert check_lock.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[1:3] == [
        '  pyyaml 6.0.3 should be PyYAML==6.0.4',
        '  tqdm 4.70.1 is not in the lock',
    ]
    assert 'make lock' in lines[3]


def test_a_python_without_a_lock(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'version_info', (3, 9))
    assert check_lock.main() == 1
    assert 'lock-py39.txt' in capsys.readouterr().err
