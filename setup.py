"""Packaging of mmkd; tools/install.sh sets up a complete environment."""

import gzip
import os
import shutil
import tarfile
from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

ROOT = Path(__file__).resolve().parent
MIM = (
    *('model-index.yml', 'configs/**/*.py', 'configs/**/*.yml'),
    *('tools/train.py', 'tools/test.py', 'tools/dist_*.sh', 'tools/slurm_*'),
)


def read_version() -> str:
    """Read the version without importing mmkd, which needs torch."""
    scope: dict[str, str] = {}
    exec((ROOT / 'mmkd' / 'version.py').read_text(encoding='utf-8'), scope)
    return scope['__version__']


def read_requirements(name: str) -> list[str]:
    """The requirements in ``requirements/<name>.txt``."""
    path = ROOT / 'requirements' / f'{name}.txt'
    lines = path.read_text(encoding='utf-8').splitlines()
    return [line for line in lines if line and not line.startswith('#')]


class BuildWithMim(build_py):
    """Puts below ``mmkd/.mim`` what MMEngine and mim look for there.

    An editable installation has none: there all of it is the clone's.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for pattern in MIM:
            for path in ROOT.glob(pattern):
                target = Path(
                    self.build_lib, 'mmkd', '.mim', path.relative_to(ROOT)
                )
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


class ReproducibleSdist(sdist):
    """The same bytes from the same files, at the time SOURCE_DATE_EPOCH."""

    def make_archive(self, base_name: str, *args: Any, **options: Any) -> str:
        if 'SOURCE_DATE_EPOCH' not in os.environ:
            return super().make_archive(base_name, *args, **options)
        epoch = int(os.environ['SOURCE_DATE_EPOCH'])

        def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
            info.uid = info.gid = 0
            info.uname = info.gname = ''
            info.mode = 0o755 if info.isdir() or info.mode & 0o100 else 0o644
            info.mtime = epoch
            return info

        with (
            open(f'{base_name}.tar.gz', 'wb') as file,
            gzip.GzipFile('', 'wb', fileobj=file, mtime=epoch) as packed,
            tarfile.open(fileobj=packed, mode='w') as archive,
        ):
            archive.add(options['base_dir'], filter=plain)  # in order
        return file.name


MMDET = read_requirements('mmdet')

setup(
    name='mmkd',
    version=read_version(),
    description='Knowledge distillation of object detectors, '
    'on MMDetection 3 and MMEngine',
    long_description=(ROOT / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author='The mmkd authors',
    license='Apache-2.0',
    keywords='knowledge distillation, object detection, mmdetection',
    packages=find_packages(include=['mmkd', 'mmkd.*']),
    package_data={'': ['py.typed', '*.pyi', '*.j2']},
    cmdclass={'build_py': BuildWithMim, 'sdist': ReproducibleSdist},
    entry_points={'console_scripts': ['mmkd=mmkd.cli:main']},
    python_requires='>=3.10',
    # Neither torch nor the mm* packages: which build of them fits is the
    # user's to say, and importing mmkd checks that they are there.
    install_requires=[
        'numpy',
        *(line for line in MMDET if not line.startswith('onedl-')),
    ],
    extras_require={
        'mmdet': MMDET,
        **{
            extra: read_requirements(extra)
            for extra in (
                *('dev', 'docs', 'ensemble', 'foundation', 'mim', 'onnx'),
                'report',
            )
        },
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: POSIX',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.10',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
)
