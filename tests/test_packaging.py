"""What is installed: sdist, wheel, and the index that mim reads."""

import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import numpy as np
import pytest
import yaml
from mmengine.fileio import load
from PIL import Image

import mmkd
from mmkd.registry import METHODS
from tests.helpers.toy import ROOT
from tools.method_table import SOURCE

CONFIGS = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / 'configs').rglob('*.py')
    if '_base_' not in path.parts
)


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == mmkd.__version__
    assert {'cff-version', 'title', 'message', 'authors'} <= citation.keys()


# ------------------------------------------------------------ the model index


@pytest.fixture(scope='module')
def metafiles():
    index = load(ROOT / 'model-index.yml')
    return {name: load(ROOT / name) for name in index['Import']}


def test_every_metafile_is_in_the_index(metafiles):
    found = (ROOT / 'configs').rglob('metafile.yml')
    assert sorted(metafiles) == sorted(
        path.relative_to(ROOT).as_posix() for path in found
    )


def test_every_config_is_in_one_metafile(metafiles):
    models = [m for each in metafiles.values() for m in each['Models']]
    assert sorted(model['Config'] for model in models) == CONFIGS
    names = [model['Name'] for model in models]
    assert len({*names}) == len(names)
    assert all(name == name.lower() for name in names)  # as mim asks for them


def test_metafiles_say_what_the_docstrings_say(metafiles):
    """Paper, code and method; the method is that of all their configs."""
    METHODS.import_from_location()
    for file, content in metafiles.items():
        (collection,) = content['Collections']
        assert (ROOT / collection['README']).exists()
        for model in content['Models']:
            assert model['In Collection'] == collection['Name']
        if 'Metadata' not in collection:
            assert file.split('/')[1] in ('bccd', 'neon')
            continue
        method = collection['Metadata']['Method']
        cls = METHODS.get(method)
        source = SOURCE.search(' '.join(cls.__doc__.split()))
        assert collection['Paper'] == {
            'Title': source['title'],
            'URL': source['url'],
        }
        code = Path(inspect.getfile(cls)).relative_to(ROOT)
        assert collection['Code']['URL'] == code.as_posix()
        for model in content['Models']:
            types = re.findall(r"'mmkd\.\w+'", text_of(ROOT / model['Config']))
            assert cls in [METHODS.get(name.strip("'")) for name in types]


def text_of(config: Path) -> str:
    """A config's and its bases', but not those of other packages."""
    text = config.read_text()
    bases = re.findall(r"'(\.{1,2}/[^']+\.py)'", text)
    return text + ''.join(text_of(config.parent / base) for base in bases)


def test_results_are_those_that_are_written(metafiles):
    """AP and AP50 stand beside each other in a table of the pages."""
    pages = [ROOT / 'README.md', *(ROOT / 'docs').rglob('*.md')]
    text = '\n'.join(page.read_text() for page in pages)
    for content in metafiles.values():
        for model in content['Models']:
            for result in model.get('Results', ()):
                ap, ap50 = result['Metrics'].values()
                row = rf'\| \**{ap:.1f}( ± [\d.]+)?\** \| \**{ap50:.1f}\b'
                assert re.search(row, text), model['Name']
                assert model['Metadata']['Seeds'] in (1, 3, 6)


def test_mim_finds_them(metafiles):
    search = pytest.importorskip('mim.commands.search', exc_type=ImportError)
    found = search.convert2df(search.load(str(ROOT / 'model-index.yml')))
    assert sorted(found['config']) == CONFIGS
    assert found.loc['bccd_lad']['bccd/box_ap'] == 44.2
    assert len(search.filter_by_models(found, ['lad'])) == 8


# ------------------------------------------------------- distributions, built


BUILD = """
import sys
from setuptools import build_meta
out = sys.argv[1]  # which both of them change
build_meta.build_sdist(out)
build_meta.build_wheel(out)
"""


def build(folder: Path) -> list[Path]:
    """Copy what a clone holds, and build it there."""
    source, out = folder / 'source', folder / 'dist'
    out.mkdir(parents=True)
    for name in ('mmkd', 'configs', 'tools', 'requirements'):
        ignore = shutil.ignore_patterns('__pycache__')
        shutil.copytree(ROOT / name, source / name, ignore=ignore)
    for pattern in ('*.py', '*.toml', '*.md', '*.in', '*.yml', 'LICENSE'):
        for path in ROOT.glob(pattern):
            shutil.copy(path, source)
    subprocess.run(
        [sys.executable, '-c', BUILD, str(out)],
        cwd=source,
        env={**os.environ, 'SOURCE_DATE_EPOCH': '1700000000'},
        check=True,
        capture_output=True,
    )
    return sorted(out.iterdir())


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    return build(tmp_path_factory.mktemp('first'))


def test_two_builds_are_bit_equal(built, tmp_path):
    again = build(tmp_path)
    assert [p.name for p in built] == [p.name for p in again]
    assert len(built) == 2
    for one, two in zip(built, again, strict=True):
        assert one.read_bytes() == two.read_bytes(), one.name


def test_the_wheel_is_that_of_the_sdist(built, tmp_path):
    wheel, sdist = sorted(built, key=lambda path: path.suffix != '.whl')
    shutil.unpack_archive(sdist, tmp_path)
    (source,) = tmp_path.iterdir()
    subprocess.run(
        [sys.executable, '-c', BUILD, str(tmp_path / 'dist')],
        cwd=source,
        env={**os.environ, 'SOURCE_DATE_EPOCH': '1700000000'},
        check=True,
        capture_output=True,
    )
    again = tmp_path / 'dist' / wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_twine_finds_nothing(built):
    pytest.importorskip('twine')
    command = [sys.executable, '-m', 'twine', 'check', '--strict', *built]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count('PASSED') == 2


# ------------------------------------------------------------------ installed


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    """Runs a program of a fresh environment, in a folder of its own.

    The environment has the wheel, and of this one all packages but mmkd.
    """
    env = {**os.environ, 'OMP_NUM_THREADS': '1'}
    env.pop('PYTHONPATH', None)
    folder = tmp_path_factory.mktemp('installed')
    venv.create(folder / 'venv', with_pip=False, symlinks=True)
    python = folder / 'venv' / 'bin' / 'python'
    wheel = next(path for path in built if path.suffix == '.whl')
    subprocess.run(
        [
            *(sys.executable, '-m', 'pip', '--python', python, 'install'),
            *('--quiet', '--no-deps', '--no-index', wheel),
        ],
        env=env,
        check=True,
    )
    (site,) = (folder / 'venv' / 'lib').glob('python*/site-packages')
    # .pth files there, an editable installation's above all, are not read.
    shared = sysconfig.get_path('purelib')
    (site / 'shared.pth').write_text(f'{shared}\n')
    user = folder / 'user'
    write_photos(user / 'data' / 'bccd' / 'BCCD')

    def run(program, *arguments):
        return subprocess.run(
            [python.with_name(program), *map(str, arguments)],
            cwd=user,
            env=env,
            capture_output=True,
            text=True,
        )

    run.site = site
    run.user = user
    return run


def write_photos(folder: Path) -> None:
    """Four photos of a bright box for each split, in the layout of VOC."""
    for name in ('Annotations', 'JPEGImages', 'ImageSets/Main'):
        (folder / name).mkdir(parents=True)
    for number in range(12):
        left, top = 20 * (number % 4), 24 * (number // 4)
        pixels = np.random.default_rng(number).integers(0, 99, (96, 128, 3))
        pixels[top : top + 48, left : left + 64] += 120
        image = Image.fromarray(pixels.astype(np.uint8))
        image.save(folder / 'JPEGImages' / f'{number}.jpg')
        (folder / 'Annotations' / f'{number}.xml').write_text(
            '<annotation><size><width>128</width><height>96</height>'
            '<depth>3</depth></size><object><name>RBC</name><difficult>0'
            f'</difficult><bndbox><xmin>{left}</xmin><ymin>{top}</ymin><xmax>'
            f'{left + 64}</xmax><ymax>{top + 48}</ymax></bndbox></object>'
            '</annotation>'
        )
    for index, split in enumerate(('train', 'val', 'test')):
        path = folder / 'ImageSets' / 'Main' / f'{split}.txt'
        numbers = range(4 * index, 4 * index + 4)
        path.write_text(''.join(f'{number}\n' for number in numbers))


DELTA = """
_base_ = ['mmkd::bccd/methods/pkd.py']
distillation = dict(teacher=dict(checkpoint=None))
train_dataloader = dict(batch_size=2)
train_cfg = dict(max_epochs=1, val_interval=1)
default_hooks = dict(logger=dict(type='LoggerHook', interval=1))
"""


class TestInstalled:
    """The wheel alone, outside of the clone."""

    def test_the_package_is_the_wheel_s(self, installed):
        done = installed('python', '-c', 'import mmkd; print(mmkd.__file__)')
        assert done.stdout.strip() == f'{installed.site}/mmkd/__init__.py'

    def test_help(self, installed):
        done = installed('mmkd', '--help')
        assert done.returncode == 0, done.stderr
        assert 'prepare' in done.stdout

    def test_every_config_and_the_index_are_there(self, installed):
        folder = installed.site / 'mmkd' / '.mim'
        assert not [name for name in CONFIGS if not (folder / name).is_file()]
        index = yaml.safe_load((folder / 'model-index.yml').read_text())
        assert all((folder / name).is_file() for name in index['Import'])
        assert (folder / 'tools' / 'train.py').is_file()

    @pytest.mark.slow
    def test_a_delta_is_examined_trained_and_tested(self, installed):
        (installed.user / 'my.py').write_text(DELTA)
        done = installed('mmkd', 'doctor', 'my.py')
        assert done.returncode == 1, done.stderr[-3000:]
        findings = done.stdout.partition('\nNotes\n')[0]
        first, *others = re.findall(r'^  \d+\. (.*)', findings, re.M)
        assert first.startswith('the teacher is untrained')
        # four photos of one class are few
        assert all(re.match('(train|val|test): ', line) for line in others)

        done = installed('mmkd', 'train', 'my.py')
        assert done.returncode == 0, done.stderr[-3000:]
        assert 'Epoch(train) [1][2/2]' in done.stdout
        assert 'pkd.loss_pkd' in done.stdout
        checkpoint = 'work_dirs/my/epoch_1.pth'
        assert re.search(
            rf'mmkd test (.*/)?my\.py (.*/)?{checkpoint}', done.stdout
        )

        hub = (
            'import mmkd.registry; from mmengine.hub import get_config; '
            'print(get_config("mmkd::bccd/lad.py").distillation)'
        )
        assert 'mmkd::bccd/paa_big.py' in installed('python', '-c', hub).stdout

        stock = 'mmkd::bccd/gfl_student.py'
        done = installed('mmkd', 'test', stock, checkpoint)
        assert done.returncode == 0, done.stderr[-3000:]
        assert 'pascal_voc/mAP' in done.stdout
        assert (installed.user / 'work_dirs' / 'gfl_student').is_dir()
