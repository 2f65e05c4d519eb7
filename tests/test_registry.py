"""What MMEngine knows of mmkd: its classes and its configs."""

import pytest
from mmengine.config import Config
from mmengine.registry import MODELS

from mmkd.errors import ConfigError
from mmkd.registry import config_file
from tests.helpers import toy


def test_a_class_by_its_name():
    assert MODELS.get(
        'mmkd.WeightedSoftCrossEntropyLoss'
    ).__module__.startswith('mmkd.')


class TestConfigs:
    """``mmkd::…`` names a config of mmkd's, wherever mmkd lies."""

    @pytest.mark.parametrize('name', ['lad_r50.py', 'bccd/methods/pkd.py'])
    def test_as_a_base(self, tmp_path, name):
        path = tmp_path / 'my.py'
        path.write_text(f"_base_ = ['mmkd::{name}']\nwork_dir = 'x'\n")
        stock = Config.fromfile(toy.ROOT / 'configs' / name)
        found = Config.fromfile(path)
        assert found.pop('work_dir') == 'x'
        assert found.to_dict() == stock.to_dict()

    def test_other_packages_are_mmengine_s_to_find(self, tmp_path):
        path = tmp_path / 'my.py'
        path.write_text(f"_base_ = ['mmdet::{toy.RETINANET}']\n")
        assert Config.fromfile(path).model._scope_ == 'mmdet'

    @pytest.mark.parametrize('installed', [True, False])
    def test_its_file(self, tmp_path, monkeypatch, installed):
        """In an installed package, and in a clone of one."""
        package = tmp_path / 'other_kd'
        package.mkdir()
        (package / '__init__.py').touch()
        folder = package / '.mim' if installed else tmp_path
        (folder / 'configs').mkdir(parents=True)
        monkeypatch.syspath_prepend(tmp_path)
        found = config_file('other_kd::a/b.py')
        assert found == str(folder / 'configs' / 'a' / 'b.py')

    def test_of_a_package_that_is_not_there(self):
        with pytest.raises(ConfigError, match='Install nowhere, or give'):
            config_file('nowhere::a.py')
