"""The command line as users call it, on local data and a local server."""

import hashlib
import re
import zipfile

import pytest

from mmkd.cli import main
from mmkd.data.download import RemoteFile


@pytest.fixture
def data(tmp_path):
    return tmp_path / 'data'


@pytest.fixture
def cli(capfd, data):
    """Run a command line; its exit status, output and error output."""

    def cli(*args):
        status = main(['prepare', *map(str, args), '--root', str(data)])
        return (status, *capfd.readouterr())

    return cli


@pytest.fixture
def works(cli):
    def works(*args):
        status, out, err = cli(*args)
        assert (status, err) == (0, '')
        return out

    return works


@pytest.fixture
def fails(cli):
    """Run a command line that has to fail with one line."""

    def fails(*args, match):
        status, _, err = cli(*args)
        assert status == 1
        assert re.fullmatch(rf'error: .*{match}.*\n', err), err

    return fails


@pytest.fixture
def snapshot(data):
    """What is below the root, and when it was written."""
    return lambda: {
        path.relative_to(data).as_posix(): path.lstat().st_mtime_ns
        for path in data.rglob('*')
    }


@pytest.fixture
def remote(site):
    """The description of a file that the site serves."""

    def remote(path):
        content = path.read_bytes()
        md5 = hashlib.md5(content).hexdigest()
        return RemoteFile(
            f'{site.url}/{path.name}', f'md5:{md5}', len(content)
        )

    return remote


@pytest.fixture
def asked(site):
    """The files that the site was asked for."""
    return lambda: [name for name, _ in site.asked]


@pytest.fixture
def zip_folder():
    def zip_folder(path, root, start=''):
        with zipfile.ZipFile(path, 'w') as packed:
            for file in sorted(root.rglob('*')):
                name = file.relative_to(root).as_posix()
                if file.is_file() and name.startswith(start):
                    packed.write(file, name)
        return path

    return zip_folder
