"""What ``mmkd --print-completion`` prints, by shtab."""

import argparse
from unittest.mock import patch

from mmkd.errors import PackageError

from .main import COMMANDS, load


class _Found(Exception):
    """Carries a command's parser out of its ``main``."""


def completion(shell: str) -> str:
    """The script that teaches a shell to complete ``mmkd``.

    Args:
        shell: ``bash``, ``zsh`` or ``tcsh``.

    Raises:
        PackageError: If shtab is not installed.
    """
    try:
        import shtab
    except ModuleNotFoundError:
        raise PackageError(
            'the completion of a shell needs shtab: pip install shtab'
        ) from None
    root = argparse.ArgumentParser(prog='mmkd')
    commands = root.add_subparsers()
    for name, (_, text) in COMMANDS.items():
        parser = parser_of(name)
        for action in parser._actions:
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        commands.add_parser(name, help=text, parents=[parser], add_help=False)
    return shtab.complete(root, shell)


def parser_of(name: str) -> argparse.ArgumentParser:
    """The parser of a command, which its ``main`` makes and uses at once."""

    def found(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Found(parser)

    command = load(name)
    try:
        with patch.object(argparse.ArgumentParser, 'parse_args', found):
            command.main([])
    except _Found as error:
        return error.args[0]
    raise AssertionError(f'{name} does not parse its arguments')
