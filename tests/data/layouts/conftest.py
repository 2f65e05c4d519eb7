import pytest


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Conversions go to ``data/`` in the current folder."""
    folder = tmp_path / 'work'
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder
