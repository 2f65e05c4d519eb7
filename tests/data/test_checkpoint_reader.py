"""Checkpoints are read as weights, and nothing in them is run."""

import io
import pickle
import resource
import zipfile
from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer, MessageHub
from torch import nn
from torch.serialization import add_safe_globals, safe_globals

from mmkd.data.checkpoint_reader import read_checkpoint
from mmkd.errors import CheckpointError
from tests.helpers import hostile, toy


def written(folder, content, **options):
    path = folder / 'file.pth'
    torch.save(content, path, **options)
    return str(path)


def arrays():
    return [
        *(np.arange(6.0).reshape(2, 3), np.asfortranarray(np.eye(3, 2))),
        *(np.array([], 'i8'), np.array(['a', 'bcd']), np.array([b'x'])),
        *(np.array([True]), np.arange(3, dtype='>f4'), np.array(1 + 2j)),
    ]


def test_what_trainings_save(tmp_path):
    """Arrays, numbers and histories come back as they were, and shared."""
    history = HistoryBuffer([1.0, 2.5], [1, 2], max_length=7)
    array = np.arange(4)
    content = {
        'state_dict': OrderedDict(w=nn.Parameter(torch.ones(2))),
        'hub': {'loss': history},
        'arrays': arrays(),
        'state': ('MT19937', array, 3, [array]),
        'numbers': [np.float64(0.5), np.int64(3), np.bool_(True)],
        'text': np.str_('é'),
        'bytes': [b'', b'\xff'],
        'slice': slice(1, 2),
    }
    content['state_dict']._metadata = OrderedDict(a=dict(version=2))
    read = read_checkpoint(written(tmp_path, content))
    expected = toy.load(tmp_path / 'file.pth')
    for found, array in zip(read['arrays'], expected['arrays'], strict=True):
        assert (found.dtype, found.shape) == (array.dtype, array.shape)
        assert found.tobytes('A') == array.tobytes('A')
        assert found.flags.writeable
        assert found.flags.f_contiguous == array.flags.f_contiguous
    assert read['state'][1] is read['state'][3][0]
    assert read['state'][1].tolist() == [0, 1, 2, 3]
    assert toy.same(read['numbers'], expected['numbers'])
    assert [type(each) for each in read['numbers']] == [
        *(np.float64, np.int64, np.bool_)
    ]
    assert (read['text'], read['slice']) == ('é', slice(1, 2))
    assert read['bytes'] == [b'', b'\xff']
    assert read['state_dict']._metadata['a']['version'] == 2
    loss = read['hub']['loss']
    assert type(loss) is HistoryBuffer
    assert vars(loss).keys() == vars(expected['hub']['loss']).keys()
    assert loss.statistics('mean', 1) == 1.25
    loss.update(3.0)
    assert loss.data[0].tolist() == [1.0, 2.5, 3.0]
    hub = MessageHub('test_what_trainings_save')
    hub.load_state_dict(
        dict(log_scalars=read['hub'], runtime_info={}, resumed_keys={})
    )
    assert hub.get_scalar('loss').max() == 3.0


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    ('function', 'arguments', 'named'),
    [
        (exec, ['import os'], 'exec'),
        (eval, ['1'], 'eval'),
        (getattr, [SimpleNamespace, 'x'], 'types.SimpleNamespace'),
        (getattr, ['', 'join'], 'getattr'),
        (setattr, [HistoryBuffer, 'mean', 3], 'setattr'),
        (np.dtype, ['O'], 'numpy.dtype'),
        (np.dtype, [[('a', 'O')]], 'numpy.dtype'),
        (np.fromfile, ['/etc/passwd'], 'fromfile'),
        (bytearray, [2**40], 'bytearray'),
        (bytes, [2**40], 'no PyTorch'),
        (torch.load, ['x'], 'torch.serialization.load'),
    ],
)
def test_nothing_else_is_called(tmp_path, zipped, function, arguments, named):
    path = written(
        tmp_path,
        {'state_dict': {}, 'x': hostile.Calls(function, *arguments)},
        _use_new_zipfile_serialization=zipped,
    )
    with pytest.raises(
        CheckpointError, match=rf'(more than weights|file\.pth).*{named}'
    ):
        read_checkpoint(path)


def test_all_that_is_refused_is_named(tmp_path):
    content = {'a': SimpleNamespace(), 'b': hostile.RunsCode(tmp_path / 'x')}
    with pytest.raises(
        CheckpointError, match=r'\(.*pathlib\S*Path.*, types\.SimpleNames.*\)'
    ):
        read_checkpoint(written(tmp_path, content))
    assert not (tmp_path / 'x').exists()


def test_methods_of_histories_are_not_taken_from_the_file(tmp_path):
    """HistoryBuffer would register them for all histories of the process."""
    history = HistoryBuffer([1.0], [1])
    before = dict(HistoryBuffer._statistics_methods)
    history.__dict__['_statistics_methods'] = {'mean': HistoryBuffer.max}
    with pytest.raises(CheckpointError, match=r'\(HistoryBuffer'):
        read_checkpoint(written(tmp_path, {'loss': history}))
    assert before == HistoryBuffer._statistics_methods


def test_numpy_is_told_nothing_about_memory(tmp_path):
    """A pickle can call numbers pointers; NumPy would follow them."""
    state = (3, '<', None, None, None, -1, -1, 63)
    kind = hostile.Calls(np.dtype, 'f8', False, True, state=state)
    with pytest.raises(AssertionError):  # it would
        assert not pickle.loads(pickle.dumps(kind)).hasobject
    scalar = np.float64(0.5).__reduce__()[0]
    content = {'x': hostile.Calls(scalar, kind, np.float64(0.5).tobytes())}
    read = read_checkpoint(written(tmp_path, content))
    assert read['x'] == 0.5
    assert not read['x'].dtype.hasobject


def test_what_users_allow_is_read_and_stays(tmp_path):
    path = written(tmp_path, {'x': SimpleNamespace(a=1), 'y': np.arange(3)})
    mine = [SimpleNamespace, np.dtype, np.ndarray, getattr]
    with safe_globals([]):
        add_safe_globals(mine)
        read = read_checkpoint(path)
        assert set(mine) <= set(torch.serialization.get_safe_globals())
        torch.serialization.clear_safe_globals()
    assert read['x'].a == 1
    assert read['y'].tolist() == [0, 1, 2]
    with pytest.raises(CheckpointError, match=r'more than weights'):
        read_checkpoint(path)


# --------------------------------------------------------------- memory, files


@pytest.fixture
def bounded():
    """Let a test fail that takes more than 2 GiB beside what is taken."""
    with open('/proc/self/statm') as file:
        taken = int(file.read().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (taken + 2**31, hard))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def test_a_storage_that_claims_terabytes(tmp_path, bounded):
    path = hostile.checkpoint(tmp_path / 'file.pth')
    hostile.changed(
        path,  # the number of elements, and their place in the shape
        lambda name, content: (
            content.replace(b'K\x02', b'\x8a\x06\x00\x00\x00\x00\x00\x01')
            if name == 'data.pkl'
            else content
        ),
    )
    with pytest.raises(CheckpointError, match=r'is no PyTorch checkpoint'):
        read_checkpoint(str(path))


@pytest.mark.parametrize('zipped', [True, False])
def test_a_shape_that_claims_more_than_its_storage(tmp_path, zipped):
    content = {'state_dict': {'w': torch.ones(7)}}
    path = written(tmp_path, content, _use_new_zipfile_serialization=zipped)
    shape, larger = b'K\x07\x85', b'J\x00\x00\x10\x00\x85'
    if zipped:
        hostile.changed(
            tmp_path / 'file.pth',
            lambda name, content: (
                content.replace(shape, larger)
                if name == 'data.pkl'
                else content
            ),
        )
    else:
        whole = (tmp_path / 'file.pth').read_bytes()
        (tmp_path / 'file.pth').write_bytes(whole.replace(shape, larger))
    with pytest.raises(CheckpointError, match=r'is no PyTorch checkpoint'):
        read_checkpoint(path)


def test_a_storage_of_the_old_format_that_claims_terabytes(tmp_path, bounded):
    path = written(
        tmp_path, torch.ones(3), _use_new_zipfile_serialization=False
    )
    content = (tmp_path / 'file.pth').read_bytes()
    number = b'\x8a\x06\x00\x00\x00\x00\x00\x01'
    where = content.index(b'K\x03', content.index(b'storage'))
    parts = content[:where], number, content[where + 2 :]
    (tmp_path / 'file.pth').write_bytes(b''.join(parts))
    with pytest.raises(CheckpointError, match=r'is no PyTorch checkpoint'):
        read_checkpoint(path)


def test_a_compressed_bomb(tmp_path, bounded):
    path = hostile.checkpoint(tmp_path / 'file.pth')
    with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
        root = archive.namelist()[0].partition('/')[0]
        with archive.open(f'{root}/data/9', 'w', force_zip64=True) as file:
            for _ in range(400):
                file.write(bytes(2**20))
    assert path.stat().st_size < 2**20
    with pytest.raises(CheckpointError, match=r'would unpack to 419,43'):
        read_checkpoint(str(path))
    with pytest.raises(CheckpointError, match=r'would unpack to'):
        read_checkpoint(str(path), trust=True)


def test_a_compressed_checkpoint(tmp_path):
    """Somebody has packed it again: it is read all the same."""
    path = hostile.checkpoint(tmp_path / 'file.pth')
    packed = hostile.changed(
        path, lambda _, content: content, compression=zipfile.ZIP_DEFLATED
    )
    read = read_checkpoint(str(packed))
    assert read['state_dict']['w'].tolist() == [1, 1]


def cyclic():
    found = []
    found.append(found)
    return found


def deep(levels):
    found = ()
    for _ in range(levels):
        found = (found, found)
    return found


@pytest.mark.parametrize('content', [cyclic(), {'a': deep(60)}])
def test_structures_without_end(tmp_path, content):
    assert type(read_checkpoint(written(tmp_path, content))) is type(content)


def test_a_torchscript_archive(tmp_path):
    path = tmp_path / 'file.pth'
    torch.jit.save(torch.jit.script(nn.ReLU()), path)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match=r'TorchScript.*state_dict'):
            read_checkpoint(str(path), trust=trust)


@pytest.mark.parametrize(
    'content',
    [
        *(b'', b'PK', b'\x80', b'\x80\x02.', b'PK\x05\x06' + bytes(18)),
        b'version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n',
        *(b'<!DOCTYPE html>', b'cos\nsystem\n(S"true"\ntR.', b'\x89HDF\r\n'),
        *(b'\x80\x02c', b'\x80\x02]q\x00', b'\x80\x04\x95' + b'\xff' * 9),
    ],
)
@pytest.mark.parametrize('trust', [False, True])
def test_files_that_are_no_checkpoints(tmp_path, content, trust):
    path = tmp_path / 'file.pth'
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r'file\.pth .*(again|trust)'):
        read_checkpoint(str(path), trust=trust)


def test_a_folder_and_nothing(tmp_path):
    with pytest.raises(CheckpointError, match=r'is a folder'):
        read_checkpoint(str(tmp_path))
    with pytest.raises(CheckpointError, match=r'does not exist.*working'):
        read_checkpoint(str(tmp_path / 'no.pth'))


def test_safetensors(tmp_path):
    save = pytest.importorskip('safetensors.torch').save_file
    path = tmp_path / 'file.safetensors'
    save({'w': torch.ones(2)}, path)
    assert read_checkpoint(str(path))['w'].tolist() == [1, 1]
    path.write_bytes(b'\xff' * 20)
    with pytest.raises(CheckpointError, match=r'file\.safetensors \(20 b'):
        read_checkpoint(str(path))


def test_content_in_memory():
    buffer = io.BytesIO()
    torch.save([torch.ones(2)], buffer)
    assert read_checkpoint(buffer, name='it')[0].tolist() == [1, 1]
    torch.save(SimpleNamespace(), buffer := io.BytesIO())
    with pytest.raises(CheckpointError, match=r'^it holds more \S+ \S+ \(typ'):
        read_checkpoint(buffer, name='it')
