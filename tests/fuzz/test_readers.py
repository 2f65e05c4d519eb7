"""Whatever is in a foreign file: an error of ours, or a right result.

Never another exception, a hang, gigabytes, or a file written elsewhere. The
cases are the same in every run; ``MMKD_FUZZ_SEED=N`` draws others.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

hypothesis = pytest.importorskip('hypothesis')

from hypothesis import HealthCheck, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

from mmkd.errors import MMKDError  # noqa: E402

from .bounds import bounded  # noqa: E402
from .mutations import changed_bytes, changed_document  # noqa: E402
from .readers import READERS, Reader  # noqa: E402

CASES = 2000
SEED = os.environ.get('MMKD_FUZZ_SEED')


def contents(reader: Reader) -> st.SearchStrategy[bytes]:
    """The content of files that are nearly valid."""
    found = st.sampled_from(reader.valid).flatmap(changed_bytes)
    if reader.document is None:
        return found
    return found | changed_document(reader.document).map(reader.write)


def try_out(reader: Reader, cases: int, folder: Path) -> None:
    def read(content: bytes) -> None:
        place = Path(tempfile.mkdtemp(dir=folder))
        (place / reader.name).write_bytes(content)
        told = 'nothing'
        try:
            with bounded(place):
                reader.read(place)
        except MMKDError as error:
            told = str(error).strip()
        finally:
            shutil.rmtree(place)
        assert 0 < len(told) < 5000

    checked = settings(
        max_examples=cases,
        derandomize=SEED is None,
        database=None,
        deadline=None,  # see bounds.SECONDS
        suppress_health_check=list(HealthCheck),
        print_blob=True,
    )(given(contents(reader))(read))
    checked = checked if SEED is None else seed(int(SEED))(checked)
    checked()


@pytest.mark.parametrize('kind', READERS)
def test_what_is_valid_is_read(kind, tmp_path):
    """Else the rest would prove nothing."""
    reader = READERS[kind]
    (tmp_path / reader.name).write_bytes(reader.valid[0])
    with bounded(tmp_path):
        reader.read(tmp_path)


@pytest.mark.parametrize('kind', READERS)
def test_a_few_cases(kind, tmp_path):
    try_out(READERS[kind], 5, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('kind', READERS)
def test_many_cases(kind, tmp_path):
    try_out(READERS[kind], -(-CASES // len(READERS)), tmp_path)
