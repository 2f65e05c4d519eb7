"""The command `mmkd`: what it says, and its exit statuses."""

import errno
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

import mmkd
from mmkd.cli import main
from mmkd.cli.completion import parser_of
from mmkd.cli.main import COMMANDS
from mmkd.errors import ConfigError
from tests.helpers import toy

cli = sys.modules['mmkd.cli.main']
WITHOUT = """
import sys
for name in ('torch', 'mmengine', 'mmcv', 'mmdet'):
    sys.modules[name] = None
import mmkd
from mmkd.cli import main
sys.exit(main(sys.argv[1:]))
"""


def without_packages(*arguments, code=WITHOUT):
    """`mmkd ARGUMENTS` where nothing that mmkd works on is installed."""
    return subprocess.run(
        [sys.executable, '-c', code, *arguments],
        cwd=toy.ROOT,
        capture_output=True,
        text=True,
    )


def test_help_says_what_there_is():
    done = without_packages('--help')  # and is quick
    assert done.returncode == 0
    for name, (_, text) in COMMANDS.items():
        assert re.search(rf'^  {name} +{text}$', done.stdout, re.MULTILINE)
    for status in (0, 1, 2, 130, 141, 143):
        assert re.search(rf'^  {status} +\w', done.stdout, re.MULTILINE)
    assert done.stdout.count('\n  mmkd ') >= 5


@pytest.mark.parametrize('arguments', [[], ['train', '--help']])
def test_the_module_is_the_command(arguments):
    done = subprocess.run(
        [sys.executable, '-m', 'mmkd', *arguments],
        cwd=toy.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == (0 if arguments else 2)
    assert (done.stdout or done.stderr).startswith('usage: mmkd ')


def test_version(capsys):
    assert main(['--version']) == 0
    assert capsys.readouterr().out == f'mmkd {mmkd.__version__}\n'


def test_a_misspelt_command(capsys):
    assert main(['trian', 'x.py']) == 2
    text = capsys.readouterr().err
    assert 'no command "trian". Did you mean "train"? Known: train, ' in text


@pytest.mark.parametrize('name', COMMANDS)
def test_every_command_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as info:
        main([name, '--help'])
    assert info.value.code == 0
    text = capsys.readouterr().out
    assert text.startswith(f'usage: mmkd {name} ')
    assert f'\n    mmkd {name} ' in text  # an example


def options_of(parser):
    for action in parser._actions:
        yield from action.option_strings
        for nested in getattr(action, 'choices', None) or ():
            if isinstance(action.choices, dict):
                yield from options_of(action.choices[nested])


@pytest.mark.parametrize('name', COMMANDS)
def test_options_have_one_style(name):
    found = [
        o for o in options_of(parser_of(cli.load(name))) if o.startswith('--')
    ]
    assert len(found) > 1
    others = {'--local_rank'}  # as torch.distributed.launch passes it
    assert [o for o in found if not re.fullmatch(r'--[a-z-]+', o)] == [
        o for o in found if o in others
    ]
    spelt = '--workdir --output-dir --options --cfg-option --config-options'
    assert not {*found} & {*spelt.split()}


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ('train', 'required: config'),
        ('train x.py --cfg-options lr', r"takes KEY=VALUE, got 'lr'"),
        ('doctor x.py --cfg-options a=1 lr', r"takes KEY=VALUE, got 'lr'"),
        ('study x.yaml --jobs 0', '--jobs takes a number from 1'),
    ],
)
def test_a_wrong_command_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as info:
        main(arguments.split())
    assert info.value.code == 2
    assert re.search(message, capsys.readouterr().err)


class TestEnds:
    """What a command raises becomes an exit status."""

    def run(self, monkeypatch, result=None, error=None):
        def command(argv):
            assert argv == ['x.py']
            if error:
                raise error
            return result

        fake = SimpleNamespace(main=command)
        monkeypatch.setattr(cli, 'load', lambda name: fake)
        return main(['train', 'x.py'])

    @pytest.mark.parametrize(('result', 'status'), [(None, 0), (1, 1)])
    def test_done(self, monkeypatch, result, status):
        assert self.run(monkeypatch, result) == status

    def test_an_error_of_the_user(self, monkeypatch, capsys):
        assert self.run(monkeypatch, error=ConfigError('no x')) == 1
        assert capsys.readouterr().err == 'error: no x\n'

    def test_an_error_of_ours(self, monkeypatch):
        with pytest.raises(ZeroDivisionError):
            self.run(monkeypatch, error=ZeroDivisionError())

    def test_what_the_system_refuses(self, monkeypatch, capsys):
        error = OSError(errno.ENOSPC, 'No space left on device', '/x/y')
        assert self.run(monkeypatch, error=error) == 1
        assert capsys.readouterr().err == (
            'error: /x/y: No space left on device. Make room on the disk.\n'
        )
        with pytest.raises(OSError, match='of a library'):
            self.run(monkeypatch, error=OSError('of a library'))

    def test_ctrl_c(self, monkeypatch, capsys):
        assert self.run(monkeypatch, error=KeyboardInterrupt()) == 130
        assert capsys.readouterr().err == '\ninterrupted.\n'


def test_an_output_that_is_full():
    with open('/dev/full', 'w') as full:
        done = subprocess.run(
            [sys.executable, '-m', 'mmkd', '--version'],
            cwd=toy.ROOT,
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
        )
    assert done.returncode == 1
    assert done.stderr == (
        'error: No space left on device. Make room on the disk.\n'
    )


def test_an_output_that_nobody_reads():
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(
        [sys.executable, '-m', 'mmkd', '--help'],
        cwd=toy.ROOT,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, '')


@pytest.mark.parametrize('kind', ['a file', 'below a file', 'long', 'a link'])
def test_work_dirs_that_cannot_be(tmp_path, kind, capsys):
    """Of all commands that make one, in a line each."""
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'link').symlink_to('link')
    work_dir = (
        tmp_path
        / {
            'a file': 'file',
            'below a file': 'file/x',
            'long': 'x' * 300,
            'a link': 'link/x',
        }[kind]
    )
    config = toy.write(toy.distilled(tmp_path / 'run'), tmp_path / 'c.py')
    study = tmp_path / 'study.yaml'
    study.write_text(
        f'{{work_dir: {work_dir}, runs: {{a: {{config: {config}}}}}}}'
    )
    given = ['--work-dir', work_dir]
    teacher = ['--teacher', config, '--teacher-checkpoint', config]
    for arguments in (
        ['train', config, *given],
        ['study', study],
        ['distill', '--student', config, *teacher, '--method=pkd', *given],
    ):
        assert main([*map(str, arguments)]) == 1
        error = capsys.readouterr().err.splitlines()[-1]
        assert error.startswith('error: '), error
        assert str(work_dir)[:100] in error


class TestWithoutPackages:
    def test_a_command_that_needs_them(self):
        done = without_packages('train', 'x.py')
        assert done.returncode == 1
        assert done.stderr.startswith(
            'error: mmkd needs torch, mmengine, mmcv, mmdet, which this '
            'Python does not have. Install PyTorch first'
        )

    def test_the_data_need_none(self, tmp_path):
        done = without_packages('prepare', 'bccd', '--from', tmp_path / 'x')
        assert done.returncode == 1
        assert f'error: {tmp_path}/x' in done.stderr

    @pytest.mark.parametrize('name', ['Distiller', 'registry'])
    def test_an_import(self, name):
        code = (
            "import sys; sys.modules['torch'] = None\n"
            'from mmkd.errors import MMKDError\n'
            f'try:\n    from mmkd import {name}\n'
            'except MMKDError as error:\n'
            '    print(isinstance(error, ImportError), error)'
        )
        done = without_packages(code=code)
        assert done.stdout.startswith('True mmkd needs torch, which')


@pytest.mark.parametrize('shell', ['bash', 'zsh'])
def test_completion(shell, capsys):
    assert main(['--print-completion', shell]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert '--cfg-options' in text


def test_bash_completes(tmp_path, capsys):
    """As bash asks: words, and which of them is to be completed."""
    script = tmp_path / 'mmkd'
    main(['--print-completion', 'bash'])
    script.write_text(capsys.readouterr().out)
    ask = (
        f'source {script}; COMP_WORDS=($WORDS); '
        'COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); '
        '_shtab_mmkd; echo "${COMPREPLY[@]}"'
    )
    for words, reply in (
        ('mmkd ev', 'eval'),
        ('mmkd train --wo', '--work-dir'),
        ('mmkd benchmark sc', 'scale'),
        (f'mmkd train {script.parent}/mm', str(script)),
    ):
        done = subprocess.run(
            ['bash', '-c', ask],
            env={'WORDS': words, 'PATH': '/usr/bin:/bin'},
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == reply, done.stderr


def test_completion_without_shtab(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'shtab', None)
    assert main(['--print-completion', 'bash']) == 1
    assert 'pip install shtab' in capsys.readouterr().err


def test_a_shell_that_is_not_known(capsys):
    assert main(['--print-completion', 'fish']) == 2
    assert 'takes one of bash, zsh, tcsh' in capsys.readouterr().err
