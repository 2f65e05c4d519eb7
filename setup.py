"""Packaging of mmkd; tools/install.sh sets up a complete environment."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


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
            for extra in ('dev', 'docs', 'ensemble', 'mim', 'report')
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
