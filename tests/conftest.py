"""Fixtures of all tests, and the conditions that every test runs under."""

import os

# Before torch is imported: more OpenMP threads than one wait for each other
# where another process is busy, and are far slower.
os.environ.setdefault('OMP_NUM_THREADS', '1')
# No test may depend on a download.
os.environ['HF_HUB_OFFLINE'] = '1'
os.environ.setdefault('MPLBACKEND', 'Agg')

import logging
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.logging import MMLogger

from tests.helpers import made_data
from tests.helpers.hold import VARIABLE

torch.set_num_threads(1)
# Whatever a shell starts in the background ignores SIGINT, and so would the
# trainings that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
LOCAL_HOSTS = ('localhost', '::1', '0.0.0.0', '::')


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        '--seed',
        type=int,
        default=0,
        help='of what tests draw at random, such as instants to kill at',
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker('gpu'):
            item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture(autouse=True, scope='session')
def offline():
    """Turn a connection to another machine into an error that says so."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6):
            host = address[0]
            if host not in LOCAL_HOSTS and not host.startswith('127.'):
                raise RuntimeError(
                    f'a test connects to {host}:{address[1]}; tests run '
                    'without a network: give it a local file instead'
                )
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, 'connect', connect_locally)
        yield


@pytest.fixture(scope='session')
def repo_root() -> Path:
    return ROOT


@pytest.fixture(scope='session')
def shared_data() -> Path:
    """The folder of real data sets that lies beside the repository.

    It holds ``bccd`` (VOC layout) and ``coco_tiny`` (COCO layout). Another
    folder is given by the environment's ``MMKD_SHARED_DATA``.
    """
    if not made_data.SHARED.is_dir():
        pytest.skip(f'needs the data sets in {made_data.SHARED}')
    return made_data.SHARED


def both(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Let trainings read what the tests make, and then real photos.

    Gives the folder, as :func:`tests.helpers.made_data.root` does.
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.param == 'real':
            shared = request.getfixturevalue('shared_data')
            patch.setattr(made_data, 'root', lambda: shared)
        yield made_data.root()


photos = pytest.fixture(both, params=['made', 'real'])
photos_of_class = pytest.fixture(both, scope='class', params=['made', 'real'])


@pytest.fixture(autouse=True)
def own_process():
    """Take back what tools that a test has run in this process have set.

    A process forked with their signal handlers may miss the signal that is
    to end it, and what they silenced would be missing from others' logs.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP)
    handlers = [signal.getsignal(number) for number in numbers]
    silenced = logging.root.manager.disable
    yield
    for number, handler in zip(numbers, handlers, strict=True):
        signal.signal(number, handler)
    logging.disable(silenced)


@pytest.fixture
def hold(tmp_path, monkeypatch):
    """The file at which processes wait as long as it is there."""
    flag = tmp_path / 'hold'
    flag.touch()
    monkeypatch.setenv(VARIABLE, str(flag))
    yield flag
    flag.unlink(missing_ok=True)


@pytest.fixture
def logged():
    """What MMEngine's logger is told at the level of a warning or above."""
    records = []

    class Keep(logging.Handler):
        def emit(self, record):
            records.append(record.getMessage())

    logger, handler = MMLogger.get_current_instance(), Keep(logging.WARNING)
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)
