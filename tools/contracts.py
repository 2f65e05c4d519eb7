"""What import-linter cannot say of the house by itself: see pyproject.toml."""

import ast
from pathlib import Path

from importlinter import Contract, ContractCheck, output

HEADS = {'bbox_head', 'rpn_head', 'roi_head', 'mask_head'}
PACKAGES = ('dense_heads', 'detectors', 'roi_heads', 'task_modules')
ROOM = Path('mmkd', 'detectors')


class HeadsContract(Contract):
    """Only ``mmkd/detectors`` knows MMDetection's heads.

    No other module imports where they are defined, nor reads them as the
    attributes of a detector. Names of modules as paths of taps, such as
    ``'bbox_head.cls_convs'``, are free, and so are the keys of configs.
    """

    def check(self, graph: object, verbose: bool) -> ContractCheck:
        root = Path(__file__).resolve().parents[1]
        found = [
            f'{path.relative_to(root)}:{line}: {what}'
            for path in sorted((root / 'mmkd').rglob('*.py'))
            if not path.is_relative_to(root / ROOM)
            for line, what in knowledge(path.read_text())
        ]
        return ContractCheck(kept=not found, metadata={'found': found})

    def render_broken_contract(self, check: ContractCheck) -> None:
        for line in check.metadata['found']:
            output.print_error(line)


def knowledge(source: str) -> list[tuple[int, str]]:
    """The lines of a module that know a head, with what they know."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr in HEADS:
            if isinstance(node.ctx, ast.Load):
                found.append((node.lineno, f'reads .{node.attr}'))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for name in imported(node):
                if name.startswith(
                    tuple(f'mmdet.models.{p}' for p in PACKAGES)
                ):
                    found.append((node.lineno, f'imports {name}'))
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, 'id', '') == 'getattr'
            and isinstance(node.args[1], ast.Constant)
            and node.args[1].value in HEADS
        ):
            found.append((node.lineno, f'reads {node.args[1].value!r}'))
    return found


def imported(node: ast.ImportFrom | ast.Import) -> list[str]:
    """The full names that an import statement names."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f'{node.module}.{alias.name}' for alias in node.names]
