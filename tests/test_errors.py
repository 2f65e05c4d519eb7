"""Whatever a user can cause is an ``MMKDError``."""

import argparse
import ast
import builtins
import importlib
import inspect
import sys
import typing
from pathlib import Path

import pytest

import mmkd
from mmkd import errors
from mmkd.errors import MMKDError

ROOT = Path(mmkd.__file__).parent
FILES = sorted(ROOT.rglob('*.py'))
ALLOWED = {
    ('__init__.py', 'AttributeError'): "Python's protocol of __getattr__",
    (
        'data/checkpoint_reader.py',
        'pickle.UnpicklingError',
    ): 'read_checkpoint turns it into a CheckpointError',
    (
        'data/checkpoint_reader.py',
        'ValueError',
    ): 'read_checkpoint turns it into a CheckpointError',
    (
        'doctor/zero_weight.py',
        'RuntimeError',
    ): 'the self-test lists it as a failure',
    (
        'doctor/zero_weight.py',
        'last',
    ): 'what stock training raises is listed as a failure',
    (
        'data/layouts/yolo.py',
        'ValueError',
    ): 'what calls it notes the line among the faults of the data',
    ('start/command.py', '_Ended'): 'a signal ends the command',
    ('start/command.py', 'os._exit'): 'its parent ends a worker',
    ('engine/preemption.py', '_ending'): 'a signal ends the training',
    ('engine/preemption.py', 'os._exit'): 'its parent ends a worker',
    (
        'teachers/disk_cache.py',
        'OSError',
    ): 'an entry that cannot be read is computed anew',
    (
        'data/download.py',
        'requests.ConnectionError',
    ): '_receive_all catches it and connects again, or says a DataError',
    (
        'detectors/assignment/replay.py',
        '_AllAssigned',
    ): 'record_assignments, which raises it through the head, catches it',
    (
        'study/file.py',
        'yaml.constructor.ConstructorError',
    ): 'read_yaml turns what the parser raises into a ConfigError',
    (
        'data/class_names.py',
        'ValueError',
    ): 'training_classes turns it into a ConfigError that names both lists',
    ('detectors/blank.py', '_Found'): 'image_channels, whose hook raises it',
    (
        'engine/encoding.py',
        'TypeError',
    ): 'PythonState.restore names what takes no such value',
    ('engine/processes.py', 'first'): 'an MMKDError of the first process',
    ('label/work.py', 'message'): 'an MMKDError of one of the processes',
    ('teachers/python_detector.py', 'fail'): '_refusal makes a ConfigError',
    (
        'engine/python_state.py',
        'KeyError',
    ): 'PythonState.restore, which calls it, names the place',
    (
        'engine/resume.py',
        'TypeError',
    ): 'a gradient that refers to an object is in no file of ours',
    ('cli/completion.py', '_Found'): 'parser_of, which raises it, catches it',
    (
        'doctor/compatibility.py',
        'sys.exit',
    ): 'a signal ends the command, nobody made a mistake',
    (
        'study/command.py',
        'sys.exit',
    ): 'a signal ends the command, nobody made a mistake',
}
"""(file, what it raises) of other errors, and why they may be."""
FINE = (MMKDError, argparse.ArgumentTypeError, NotImplementedError)
"""The second is printed by argparse, with the usage; the third is for those
who write a subclass."""


class Raises(ast.NodeVisitor):
    """Collects what a module raises, and its calls of ``exit``."""

    def __init__(self, path):
        name = '.'.join(path.relative_to(ROOT.parent).with_suffix('').parts)
        module = importlib.import_module(name.removesuffix('.__init__'))
        self.known = {**vars(builtins), **vars(module)}
        self.found = []  # (line, source, the classes; none are unknown)
        self.visit(ast.parse(path.read_text()))

    def visit_ClassDef(self, node):
        before = self.known
        self.known = {**before, 'self': before.get(node.name)}
        self.generic_visit(node)
        self.known = before

    def visit_ExceptHandler(self, node):
        before = self.known
        if node.name:
            self.known = {**before, node.name: self.caught(node.type)}
        self.generic_visit(node)
        self.known = before

    def visit_FunctionDef(self, node):
        before = self.known
        self.generic_visit(node)
        self.known = before

    def visit_NamedExpr(self, node):
        self.known = {**self.known, node.target.id: self.classes(node.value)}
        self.generic_visit(node)

    def visit_Assign(self, node):
        target, value = node.targets[0], node.value
        if ast.unparse(_called(value)) == 'partial':
            value = value.args[0]
        if isinstance(target, ast.Name) and self.classes(value):
            self.known = {**self.known, target.id: self.classes(value)}
        self.generic_visit(node)

    def visit_Raise(self, node):
        if node.exc is not None:
            self.add(node, node.exc)
        self.generic_visit(node)

    def visit_Call(self, node):
        source = ast.unparse(node.func)
        status = ast.unparse(node).startswith('sys.exit(main(')
        exits = source in ('exit', 'quit', 'sys.exit', 'os._exit')
        if exits and not status:
            self.found.append((node.lineno, source, [SystemExit]))
        self.generic_visit(node)

    def add(self, node, raised):
        source = ast.unparse(_called(raised))
        if source.startswith('type('):  # of another error
            raised = _called(raised).args[0]
        self.found.append((node.lineno, source, self.classes(raised)))

    def classes(self, node):
        """The classes of errors that an expression stands for."""
        value = self.value(_called(node))
        if isinstance(value, list):
            return value
        if inspect.isfunction(value):
            value = inspect.get_annotations(value).get('return')
            if isinstance(value, str):
                value = self.value(ast.parse(value, mode='eval').body)
        parts = typing.get_args(value) or [value]
        return [c for c in parts if c is not type(None) and inspect.isclass(c)]

    def value(self, node):
        """What a name, such as ``module.Class``, stands for; or None."""
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if isinstance(node, ast.Attribute):
            owner = self.value(node.value)
            if inspect.isclass(owner) or inspect.ismodule(owner):
                return getattr(owner, node.attr, None)
        return None

    def caught(self, node):
        """The classes that an ``except`` names."""
        if isinstance(node, ast.Tuple):
            return [c for each in node.elts for c in self.caught(each)]
        if isinstance(node, ast.Starred):
            node = node.value
        value = self.value(node)
        return list(value) if isinstance(value, tuple) else [value]


def _called(node):
    return node.func if isinstance(node, ast.Call) else node


def others(path):
    """(line, source) of what is raised that is no ``MMKDError``."""
    return [
        (line, source)
        for line, source, classes in Raises(path).found
        if not classes
        or not all(inspect.isclass(c) and issubclass(c, FINE) for c in classes)
    ]


@pytest.mark.parametrize(
    'path', FILES, ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_module_raises_mmkds_errors(path):
    name = str(path.relative_to(ROOT))
    bad = [
        f'{name}:{line} raises {source}'
        for line, source in others(path)
        if (name, source) not in ALLOWED
    ]
    assert not bad, 'make it an MMKDError, or say in ALLOWED why not'


def test_each_exception_is_needed():
    found = {
        (str(path.relative_to(ROOT)), source)
        for path in FILES
        for _, source in others(path)
    }
    assert set(ALLOWED) - found == set()


CLASSES = [c for c in vars(errors).values() if inspect.isclass(c)]


@pytest.mark.parametrize('cls', CLASSES)
def test_each_class_is_one_error_and_says_what_it_is(cls):
    assert issubclass(cls, MMKDError)
    assert inspect.getdoc(cls) != inspect.getdoc(cls.__base__)
    # ``except ValueError`` and the like catch it as they did.
    builtin = [b for b in cls.__mro__ if b.__module__ == 'builtins']
    assert len(builtin) > 3 or cls is MMKDError


TRY = 'try: function()\n        '
SAMPLE = """
from functools import partial
import yaml
from mmkd.errors import ConfigError, DataError

def refusal() -> DataError:
    return DataError('no')

def missing() -> DataError | None:
    return None

class Some:
    def refusal(self) -> DataError:
        return DataError('no')

    def bad(self, function, error):
        {statement}
"""


@pytest.mark.parametrize(
    ('statement', 'bad'),
    [
        ("raise ValueError('x')", ['ValueError']),
        ('raise RuntimeError', ['RuntimeError']),
        ("raise SystemExit('error: x')", ['SystemExit']),
        ('raise yaml.YAMLError', ['yaml.YAMLError']),
        ('raise function()', ['function']),
        ('import sys; sys.exit(1)', ['sys.exit']),
        ("raise ConfigError('x') from error", []),
        ('raise refusal()', []),
        ('raise self.refusal()', []),
        ('raise self.other()', ['self.other']),
        ('if e := missing(): raise e', []),
        ('e = missing(); raise e', []),
        ('e = function(); raise e', ['e']),
        ('e = partial(refusal, 1); raise e()', []),
        ('e = partial(function, 1); raise e()', ['e']),
        ('if e := function(): raise e', ['e']),
        ('import sys; sys.exit(main())', []),
        ("import sys; sys.exit('error: x')", ['sys.exit']),
        (TRY + 'except DataError as e: raise e from None', []),
        (TRY + 'except (DataError, ConfigError) as e: raise type(e)(1)', []),
        (
            TRY + 'except (DataError, KeyError) as e: raise type(e)(1)',
            ['type(e)'],
        ),
        (TRY + 'except KeyError: raise', []),
    ],
)
def test_what_the_search_finds(statement, bad, tmp_path, monkeypatch):
    path = tmp_path / 'mmkd_sample.py'
    path.write_text(SAMPLE.format(statement=statement))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(f'{__name__}.ROOT', tmp_path / 'x')
    monkeypatch.delitem(sys.modules, 'mmkd_sample', raising=False)
    assert [source for _, source in others(path)] == bad
