"""The tools of a clone hand over to the commands of ``mmkd``."""

import runpy
import sys

import pytest

from mmkd.cli.main import COMMANDS
from tests.helpers.toy import ROOT

OTHERS = {'eval': 'eval_coco', 'prepare': 'prepare_data'}


@pytest.mark.parametrize('command', COMMANDS)
def test_a_tool_is_a_command(command, monkeypatch):
    given = []
    monkeypatch.setattr('mmkd.cli.main', lambda argv: given.append(argv) or 3)
    path = ROOT / 'tools' / f'{OTHERS.get(command, command)}.py'
    monkeypatch.setattr(sys, 'argv', [str(path), 'x.py', '--amp'])
    with pytest.raises(SystemExit) as info:
        runpy.run_path(str(path), run_name='__main__')
    assert info.value.code == 3
    assert given == [[command, 'x.py', '--amp']]


def test_nothing_else_is_hidden_in_tools():
    assert not list((ROOT / 'tools').glob('_*.py'))
