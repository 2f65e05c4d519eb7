"""Figures and photos of a report."""

from types import SimpleNamespace

import pytest

from mmkd.errors import PictureError
from mmkd.report.figures import photo


def test_a_file_that_is_no_picture(tmp_path):
    path = tmp_path / 'a.jpg'
    path.write_text('no picture')
    with pytest.raises(PictureError, match=r'a\.jpg could not be read as a'):
        photo(SimpleNamespace(path=path))
