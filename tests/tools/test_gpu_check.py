"""The GPU's check, walked through with stubs of Python, CUDA and ninja.

The script itself runs, in a small repository of its own; the stubs write down
what they are called with and leave the files that the real ones would.
"""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STUB = r"""#!/usr/bin/env bash
# Python: a machine's, with a PyTorch that sees $GPU, or an environment's.
home=${0%/bin/python}
echo "${home##*/}: $*" >>"$STUBS/calls"
case "$*" in *"${FAIL:-nothing}"*) echo 'it is broken'; exit 1 ;; esac
case "$*" in *"${HANG:-nothing}"*)
    sleep 3600 & echo $! >"$STUBS/hangs"; wait ;; # with an id
esac
value_of() { local all=${2##*"$1" }; echo "${all%% *}"; }
case "$*" in
'-m venv '*) mkdir -p "${*: -1}/bin"; cp "$0" "${*: -1}/bin/python" ;;
'-m pip '*' download '*)
    mkdir -p "$STUBS/onedl_mmcv-2.3.6"
    tar -czf "$(value_of -d "$*")/onedl_mmcv-2.3.6.tar.gz" \
        -C "$STUBS" onedl_mmcv-2.3.6 ;;
'-m pip '*' wheel '*)
    echo "$CUDA_HOME, $TORCH_CUDA_ARCH_LIST, $FORCE_CUDA" >"$STUBS/built"
    folder=$(dirname "${*: -1}")
    echo cuda >"$folder/onedl_mmcv-2.3.6-linux.whl" ;;
'-m pip '*.whl) cp "${*: -1}" "$home/mmcv" ;;
'-m pytest '*)
    cp "$STUBS/junit.xml" "$(value_of --junitxml "$*")" ;;
tools/benchmark.py*)
    echo '{"ratio": 1.5}' >"$(value_of --json "$*")" ;;
*'import mmdet'*) [ "$(cat "$home/mmcv" 2>/dev/null)" = cuda ] ;;
*'import cv2'*) [ -n "${CV2:-}" ] ;;
*purelib*) mkdir -p "$home/site"; echo "$home/site" ;;
-*) [ "$1" = -m ] || PYTHONPATH=$STUBS/site exec "$PYTHON" "$@" ;;
esac
"""
TORCH = """
import os

__version__ = '2.11.0'


class version:
    cuda = '13.0'


class cuda:
    is_available = lambda: bool(os.environ['GPU'])
    get_device_name = lambda: os.environ['GPU']
    get_device_capability = lambda: (9, 0)
"""
NVCC = '#!/bin/sh\necho "#\\$ TOP=$STUBS/cuda/bin/.." >&2\n'
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_gpu" name="test_a[kd]"/>
<testcase classname="tests.test_gpu" name="test_a[cwd]">
  <skipped message="no bfloat16"/></testcase>
<testcase classname="tests.test_gpu" name="test_a[fgd]">
  <failure message="nan"/></testcase>
</testsuite></testsuites>
"""
MARKED = '@pytest.' + 'mark.gpu\ndef test_a():\n    pass\n'


class Machine:
    """A repository, a machine's commands and a folder to stand in."""

    def __init__(self, folder):
        self.folder = folder
        self.root = folder / 'the repository'
        self.stubs = folder / 'stubs'
        for name in ('tools', 'tests', 'configs', 'mmkd'):
            (self.root / name).mkdir(parents=True)
        shutil.copy(ROOT / 'tools' / 'gpu_check.sh', self.root / 'tools')
        shutil.copytree(ROOT / 'requirements', self.root / 'requirements')
        for name in ('setup.py', 'pyproject.toml'):
            shutil.copy(ROOT / name, self.root)
        (self.root / 'tests' / 'test_marked.py').write_text(MARKED)
        (self.root / 'tests' / 'test_other.py').write_text('import absent')
        (self.stubs / 'site' / 'torch').mkdir(parents=True)
        (self.stubs / 'site' / 'torch' / '__init__.py').write_text(TORCH)
        (self.stubs / 'cuda' / 'bin').mkdir(parents=True)
        (self.stubs / 'junit.xml').write_text(JUNIT)
        (self.folder / 'base' / 'bin').mkdir(parents=True)
        self.command('base/bin/python', STUB)
        self.command('bin/nvcc', NVCC)
        self.command('bin/ninja', '#!/bin/sh\n')
        self.env = {
            'GPU': 'NVIDIA H200',
            'PATH': f'{folder}/bin:/usr/bin:/bin',
            'PYTHON': sys.executable,
            'STUBS': str(self.stubs),
        }

    def command(self, name, text):
        path = self.folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)

    def start(self, *arguments, **env):
        """Called from another folder, with relative paths."""
        (self.stubs / 'calls').write_text('')
        return subprocess.Popen(
            ['the repository/tools/gpu_check.sh', *arguments],
            cwd=self.folder,
            env={**self.env, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # A shell's background process has it ignored, and so its heirs.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *arguments, **env):
        """The exit status and all that was printed."""
        options = ('--python', 'base/bin/python', '--out', 'out')
        process = self.start(*options, *arguments, **env)
        text = process.communicate()[0]
        return process.returncode, text

    def until_it_hangs(self, *arguments, **env):
        """The script's process and the id of what its stage waits for."""
        options = ('--python', 'base/bin/python', '--out', 'out')
        process = self.start(*options, *arguments, **env)
        path = self.stubs / 'hangs'
        while not (path.exists() and path.read_text().strip()):
            assert process.poll() is None, process.stdout.read()
            time.sleep(0.05)
        return process, int(path.read_text())

    @property
    def calls(self):
        """What stages called, without what looks at the machine."""
        lines = (self.stubs / 'calls').read_text().splitlines()
        return [line for line in lines if ': -' not in line or '-m' in line]

    @property
    def content(self):
        return json.loads((self.folder / 'out/gpu_check.json').read_text())

    @property
    def statuses(self):
        stages = self.content['stages']
        return {name: stage['status'] for name, stage in stages.items()}


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


STAGES = [
    *('environment', 'mmcv', 'tests'),
    *(f'{k}_batch{n}' for n in (2, 4, 8, 16) for k in ('step', 'lad')),
    'methods',
    *(f'teacher_batch{n}' for n in (2, 4, 8, 16)),
]


def test_without_gpu_it_says_so(machine):
    status, text = machine.run(GPU='')
    assert status == 2
    assert 'PyTorch 2.11.0 sees no CUDA device: nothing to check' in text
    assert not (machine.folder / 'out').exists()


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--wheels', 'nowhere'], '--wheels nowhere is no folder'),
        (['--minutes', '0'], '--minutes 0 is no whole number from 1'),
        (['--minutes', '1=2'], '--minutes 1=2 is no whole number from 1'),
        (['--stage-minutes', 'x'], '--stage-minutes x is no whole number'),
        (['--minutes'], '--minutes takes a value'),
        (['--wheel', 'x'], 'unknown option --wheel'),
        (['--python', 'no-such-python'], "no 'no-such-python'"),
    ],
)
def test_wrong_options(machine, arguments, message):
    status, text = machine.run(*arguments)
    assert status == 1
    assert message in text


def test_a_python_without_pytorch(machine):
    shutil.rmtree(machine.stubs / 'site')
    real = f'#!/bin/sh\nexec {sys.executable} -S "$@"\n'
    machine.command('base/bin/python', real)
    status, text = machine.run()
    assert status == 1
    assert "has no PyTorch (No module named 'torch')" in text


def test_help_from_another_folder(machine):
    process = machine.start('--help')
    text = process.communicate()[0]
    assert process.returncode == 0
    assert text.startswith('Check and measure mmkd on a bare CUDA machine')
    assert '--stage-minutes N' in text
    assert text.rstrip().endswith('another call is to go on.')


def test_all_stages_then_only_what_failed(machine):
    wheels = machine.folder / 'wheels'
    wheels.mkdir()
    (wheels / 'onedl_mmcv-2.3.6-linux.whl').write_text('without CUDA')
    status, text = machine.run('--wheels', 'wheels', FAIL='-m pytest')
    assert status == 1, text
    assert list(machine.statuses) == STAGES
    assert machine.statuses == {
        **dict.fromkeys(STAGES, 'passed'),
        'tests': 'failed',
    }
    assert 'it is broken' in text
    content = machine.content
    assert content['gpu'] == 'NVIDIA H200'
    assert content['torch'] == '2.11.0'
    assert content['cuda'] == '13.0'
    stages = content['stages']
    assert stages['step_batch2']['result'] == {'ratio': 1.5}
    assert stages['step_batch2']['log'] == 'step_batch2.log'
    assert stages['tests']['result'] is None
    # What was built, for which machine, from nothing but the folder.
    cuda = machine.stubs / 'cuda'
    assert (machine.stubs / 'built').read_text() == f'{cuda}, 9.0, 1\n'
    pip = [c for c in machine.calls if '-m pip' in c and '--version' not in c]
    assert all(f'--no-index --find-links {wheels}' in call for call in pip)
    isolated = ['--no-build-isolation' not in call for call in pip]
    assert isolated == [
        *(True, True, False),  # packages, setuptools, mmkd
        True,  # the wheel of mmcv
        *(False, False, True),  # its sources, their build, installation
    ]

    status, text = machine.run('--wheels', 'wheels')
    assert status == 0, text
    assert set(machine.statuses.values()) == {'passed'}
    assert len(machine.calls) == 1
    assert machine.calls[0].endswith(' tests/test_marked.py')
    assert text.count('passed before') == len(STAGES) - 1
    assert machine.content['stages']['tests']['result'] == {
        'passed': 1,
        'skipped': {'no bfloat16': 1},
        'failed': {'tests.test_gpu.test_a[fgd]': 'nan'},
    }

    # An edit, committed or not, is another version.
    (machine.root / 'configs' / 'new.py').write_text('a = 1\n')
    process, _ = machine.until_it_hangs(HANG='benchmark.py step')
    process.terminate()
    assert 'passed before' not in process.communicate()[0]
    assert machine.content['version'] != content['version']
    assert machine.statuses == {
        **dict.fromkeys(STAGES[:3], 'passed'),
        'step_batch2': 'interrupted',
    }
    assert machine.content['stages']['step_batch2']['result'] is None
    assert not (machine.folder / 'out/step_batch2.json').exists()
    # The environment and its mmcv are the machine's: both are still there.
    assert not [call for call in machine.calls if '-m venv' in call]
    assert not [call for call in machine.calls if ' wheel ' in call]


def test_the_environment_is_the_machines(machine):
    """Of a PyTorch and a GPU, whose packages it sees; pip leaves them."""
    status, _ = machine.run(FAIL=' download ')
    assert status == 1
    assert machine.statuses == {'environment': 'passed', 'mmcv': 'failed'}
    venv = next((machine.folder / 'out').glob('*/venv'))
    paths = (venv / 'site' / 'machine.pth').read_text().splitlines()
    assert str(machine.stubs / 'site') in paths
    constraints = (venv.parent / 'constraints.txt').read_text()
    assert 'torch' not in constraints
    assert 'opencv-python==' in constraints
    packages = (venv.parent / 'packages.txt').read_text()
    assert 'onedl-mmdetection' in packages
    assert 'onedl-mmcv' not in packages
    assert shared(venv) == ['opencv_python']

    status, _ = machine.run(FAIL=' download ', GPU='NVIDIA A100', CV2='works')
    assert machine.content['gpu'] == 'NVIDIA A100'
    assert machine.statuses == {'environment': 'passed', 'mmcv': 'failed'}
    venvs = [*(machine.folder / 'out').glob('*/venv')]
    assert len(venvs) == 2
    venvs.remove(venv)
    assert shared(venvs[0]) == ['opencv_python', 'opencv_python_headless']


def shared(venv):
    """What pip takes for installed."""
    files = venv.glob('site/*.dist-info/METADATA')
    return sorted(file.read_text().split()[3] for file in files)


def test_results_without_their_environment(machine):
    """As where the JSON file alone is brought to a fresh machine."""
    machine.run(FAIL=' download ')
    shutil.rmtree(next((machine.folder / 'out').glob('*/venv')))
    status, _ = machine.run(FAIL='-m venv')
    assert status == 1
    assert machine.statuses == {'environment': 'failed'}


def test_an_unfinished_environment_is_made_anew(machine):
    machine.run(FAIL='-m pip --disable')
    assert machine.statuses == {'environment': 'failed'}
    machine.run(FAIL=' download ')
    assert [call for call in machine.calls if '-m venv' in call]
    assert machine.statuses == {'environment': 'passed', 'mmcv': 'failed'}


def test_without_compiler(machine):
    (machine.folder / 'bin' / 'nvcc').unlink()
    status, text = machine.run(CUDA_HOME='nowhere')
    assert status == 1
    assert machine.statuses['mmcv'] == 'failed'
    assert 'error: no nvcc in CUDA_HOME, on PATH' in text


def test_a_signal_ends_the_stage_and_the_script(machine):
    wheels = machine.folder / 'wheels'
    wheels.mkdir()
    (wheels / 'onedl_mmcv-2.3.6-linux.whl').write_text('cuda')
    process, hanging = machine.until_it_hangs(
        '--wheels', 'wheels', HANG='-m pytest'
    )
    process.terminate()
    text = process.communicate()[0]
    assert process.returncode == 128 + signal.SIGTERM
    assert 'interrupted (TERM); another call goes on' in text
    assert has_ended(hanging)
    # A wheel that works on this GPU was taken.
    assert not (machine.stubs / 'built').exists()
    assert machine.statuses == {
        **dict.fromkeys(['environment', 'mmcv'], 'passed'),
        'tests': 'interrupted',
    }


def test_the_compilation_goes_on_where_it_was_interrupted(machine):
    process, hanging = machine.until_it_hangs(HANG=' wheel ')
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 128 + signal.SIGINT
    assert has_ended(hanging)
    assert machine.statuses == {'environment': 'passed', 'mmcv': 'interrupted'}
    assert not (machine.stubs / 'built').exists()
    # The sources are there, and what was compiled of them.
    (machine.stubs / 'hangs').unlink()
    process, _ = machine.until_it_hangs(FAIL=' download ', HANG='-m pytest')
    process.terminate()
    process.communicate()
    assert machine.statuses['mmcv'] == 'passed'


@pytest.fixture
def impatient(machine):
    """The limits that stages are given, while one second ends them."""
    limits = machine.folder / 'limits'
    # sh would lose the functions that bash exports.
    script = (
        '#!/usr/bin/env bash\necho "$2" >>"{}"\nexec {} "$1" 1 "${{@:3}}"\n'
    )
    script = script.format(limits, shutil.which('timeout'))
    machine.command('bin/timeout', script)
    return lambda: [int(limit) for limit in limits.read_text().split()]


def test_it_ends_before_its_minutes_are_over(machine, impatient):
    options = ('--minutes', '60', '--stage-minutes', '60')
    status, text = machine.run(*options, HANG='-m pip')
    assert status == 3, text
    assert machine.statuses == {'environment': 'unfinished'}
    (limit,) = impatient()
    # Some seconds are kept for the end, some were over at the beginning.
    assert 0 < limit <= 60 * 60 - 15
    # The script's clock starts with this many seconds.
    status, text = machine.run('--minutes', '1', SECONDS='50')
    assert status == 3
    assert 'environment: no time left; another call goes on' in text


def test_a_stage_ends_after_its_minutes(machine, impatient):
    status, text = machine.run('--stage-minutes', '7', HANG='-m pip')
    assert status == 1, text
    assert impatient() == [7 * 60]
    assert machine.statuses == {'environment': 'took too long'}
    assert 'environment: took too long after' in text


def has_ended(process):
    """Whether it is gone, or at most not yet buried by its parent."""
    try:
        return ') Z ' in Path(f'/proc/{process}/stat').read_text()
    except FileNotFoundError:
        return True
