"""A study of three tiny runs."""

import shutil

import pytest

from tests.helpers import toy
from tests.helpers.studies import StudyFile, write_configs


@pytest.fixture(scope='session')
def configs(tmp_path_factory):
    """The folder of two tiny configs, plain.py and distilled.py."""
    return write_configs(tmp_path_factory.mktemp('configs'))


@pytest.fixture
def content(configs, tmp_path):
    """What the study's file says."""
    plain = {'config': str(configs / 'plain.py')}
    return {
        'name': 'tiny',
        'work_dir': str(tmp_path / 'study'),
        'baseline': 'student',
        'metrics': {'AP': 'coco/bbox_mAP'},
        'runs': {
            'student': {**plain, 'options': {'train_cfg.max_epochs': 1}},
            'distilled': {
                'config': str(configs / 'distilled.py'),
                'teacher': 'teacher',
            },
            'teacher': dict(plain),
        },
    }


@pytest.fixture
def study(content, tmp_path):
    return StudyFile(tmp_path / 'study.yaml', content)


@pytest.fixture
def code(tmp_path):
    """A folder of mmkd as it is now, to be run and changed."""
    shutil.copytree(
        toy.ROOT / 'mmkd',
        tmp_path / 'code' / 'mmkd',
        ignore=shutil.ignore_patterns('.mim', '__pycache__'),
    )
    return tmp_path / 'code'
