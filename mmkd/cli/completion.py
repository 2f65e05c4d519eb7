"""What ``mmkd --print-completion`` prints, by shtab."""

import argparse
from collections.abc import Mapping
from types import ModuleType
from unittest.mock import patch

from mmkd.errors import PackageError


class _Found(Exception):
    """Carries a command's parser out of its ``main``."""


def completion(
    shell: str, commands: Mapping[str, tuple[ModuleType, str]]
) -> str:
    """The script that teaches a shell to complete ``mmkd``.

    Args:
        shell: ``bash``, ``zsh`` or ``tcsh``.
        commands: The module of each command, and what it does.

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
    found = root.add_subparsers()
    for name, (module, text) in commands.items():
        parser = parser_of(module)
        for action in parser._actions:
            if action.nargs != 0 and not action.choices:
                action.complete = shtab.FILE  # type: ignore[attr-defined]
        found.add_parser(name, help=text, parents=[parser], add_help=False)
    return shtab.complete(root, shell)


def parser_of(command: ModuleType) -> argparse.ArgumentParser:
    """The parser of a command, which its ``main`` makes and uses at once."""

    def found(parser: argparse.ArgumentParser, *_: object) -> None:
        raise _Found(parser)

    with patch.object(argparse.ArgumentParser, 'parse_args', found):
        try:
            command.main([])
        except _Found as error:
            return error.args[0]
    raise NotImplementedError(f'{command.__name__}.main parses nothing')
