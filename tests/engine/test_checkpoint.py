"""Checkpoint files: safe to read, stock inside, whole or not there."""

import functools
import hashlib
import http.server
import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest
import torch

from mmkd.data.checkpoint_file import (
    check_checkpoint,
    damage,
    load_checkpoint_file,
    write_atomically,
)
from mmkd.engine.checkpoint import join_checkpoint, split_checkpoint
from mmkd.errors import CheckpointError
from tests.helpers import toy

STATE = {'conv.weight': torch.arange(6.0).view(2, 3), 'bn.n': torch.tensor(3)}


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': STATE, 'meta': {'epoch': 1}}, path)
    return path


class Evil:
    """A pickle that runs code when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


class TestReading:
    @pytest.mark.parametrize(
        'content',
        [
            {'state_dict': STATE},
            {'state_dict': STATE, 'meta': {'epoch': 1}},
            {'model': STATE},
            STATE,
        ],
        ids=['state_dict', 'mmengine', 'detectron', 'bare'],
    )
    @pytest.mark.parametrize('as_url', [False, True])
    def test_layouts(self, tmp_path, content, as_url):
        path = tmp_path / 'a b.pth'
        torch.save(content, path)
        source = path.as_uri() if as_url else str(path)
        assert toy.same(load_checkpoint_file(source)['state_dict'], STATE)

    def test_the_legacy_format(self, tmp_path):
        path = tmp_path / 'old.pth'
        torch.save(STATE, path, _use_new_zipfile_serialization=False)
        assert toy.same(load_checkpoint_file(str(path))['state_dict'], STATE)
        assert damage(path) is None

    def test_a_training_checkpoint_of_mmengine(self, tmp_path):
        """Its log history needs classes beside tensors: none is called."""
        cfg = toy.plain(tmp_path, images=2)
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        runner = toy.train(cfg)
        content = load_checkpoint_file(str(tmp_path / 'epoch_1.pth'))
        assert toy.same(content['state_dict'], runner.model.state_dict())
        assert len(content['meta']['dataset_meta']['classes']) == 80

    def test_code_is_not_run(self, tmp_path):
        trace, path = tmp_path / 'trace', tmp_path / 'evil.pth'
        torch.save({'state_dict': STATE, 'meta': Evil(trace)}, path)
        with pytest.raises(CheckpointError, match=r'more than weights.*trust'):
            load_checkpoint_file(str(path))
        assert not trace.exists()
        content = load_checkpoint_file(str(path), trust=True)
        assert trace.exists()
        assert toy.same(content['state_dict'], STATE)

    @pytest.mark.parametrize('part', [0, 0.01, 0.5, 0.99])
    @pytest.mark.parametrize('trust', [False, True])
    def test_truncated(self, saved, part, trust):
        size = int(saved.stat().st_size * part)
        os.truncate(saved, size)
        with pytest.raises(
            CheckpointError, match=rf'weights\.pth \({size:,} bytes\).*again'
        ):
            load_checkpoint_file(str(saved), trust=trust)

    @pytest.mark.parametrize(
        ('content', 'got'),
        [
            ({'weights': 3, 'epoch': 1}, r"keys \['epoch', 'weights'\]"),
            ([1, 2], 'a list'),
            ({}, r'keys \[\]'),
        ],
    )
    def test_something_else(self, tmp_path, content, got):
        torch.save(content, tmp_path / 'other.pth')
        with pytest.raises(CheckpointError, match=f'"state_dict".*got {got}'):
            load_checkpoint_file(str(tmp_path / 'other.pth'))

    def test_a_text(self, tmp_path):
        path = tmp_path / 'page.pth'
        path.write_text('<html>404</html>')
        with pytest.raises(CheckpointError, match=r'page\.pth'):
            load_checkpoint_file(str(path))

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(CheckpointError, match=r'does not exist.*working'):
            load_checkpoint_file(str(tmp_path / 'no.pth'))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A web server on this machine, and an empty folder of downloads."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    root = tmp_path / 'www'
    root.mkdir()
    handler = functools.partial(
        http.server.SimpleHTTPRequestHandler, directory=root
    )
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as site:
        threading.Thread(target=site.serve_forever, daemon=True).start()
        yield root, f'http://127.0.0.1:{site.server_port}'
        site.shutdown()


class TestDownload:
    def put(self, root, name, state=STATE):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(state, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        return path.rename(path.with_name(f'{path.stem}-{digest}.pth'))

    def test_once_and_verified(self, server):
        root, url = server
        path = self.put(root, 'net')
        source = f'{url}/{path.name}'
        assert toy.same(load_checkpoint_file(source)['state_dict'], STATE)
        path.unlink()  # the second time nothing is asked for
        assert toy.same(load_checkpoint_file(source)['state_dict'], STATE)

    def test_files_of_one_name_are_kept_apart(self, server):
        root, url = server
        for folder, value in (('a', 1.0), ('b', 2.0)):
            (root / folder).mkdir()
            torch.save({'w': torch.tensor(value)}, root / folder / 'net.pth')
        for folder, value in (('a', 1.0), ('b', 2.0)):
            content = load_checkpoint_file(f'{url}/{folder}/net.pth')
            assert content['state_dict']['w'] == value

    def test_another_hash(self, server):
        root, url = server
        path = self.put(root, 'net')
        path.rename(root / 'net-00000000.pth')
        with pytest.raises(CheckpointError, match=r'not be downloaded.*hash'):
            load_checkpoint_file(f'{url}/net-00000000.pth')

    def test_not_found(self, server):
        _, url = server
        with pytest.raises(CheckpointError, match=r'404.*other means'):
            load_checkpoint_file(f'{url}/no.pth')


class TestDamage:
    def test_whole(self, saved):
        assert damage(str(saved)) is None
        check_checkpoint(str(saved))
        check_checkpoint('s3://bucket/no.pth')  # not on this machine

    @pytest.mark.parametrize('cut', [1, 50, 500])
    def test_truncated(self, saved, cut):
        size = saved.stat().st_size - cut
        os.truncate(saved, size)
        assert damage(str(saved)) == f'is truncated ({size:,} bytes)'
        with pytest.raises(CheckpointError, match=r'truncated.*again'):
            check_checkpoint(str(saved))

    def test_empty_and_missing(self, tmp_path):
        (tmp_path / 'empty.pth').touch()
        assert damage(str(tmp_path / 'empty.pth')) == 'is empty'
        assert damage(str(tmp_path / 'no.pth')) == 'does not exist'
        assert damage(str(tmp_path)) == 'is a folder'


def joined():
    return {
        'state_dict': {
            'conv.weight': torch.ones(2),
            'distillation.methods.hint.w': torch.full((3,), 5.0),
        },
        'ema_state_dict': {
            'steps': torch.tensor(4),
            'module.conv.weight': torch.ones(2) * 2,
            'module.distillation.methods.hint.w': torch.full((3,), 6.0),
        },
    }


class TestStockLayout:
    own = {'distillation.methods.hint.w': torch.zeros(3)}

    def test_split(self):
        checkpoint = joined()
        split_checkpoint(checkpoint)
        assert list(checkpoint['state_dict']) == ['conv.weight']
        assert list(checkpoint['ema_state_dict']) == [
            'steps',
            'module.conv.weight',
        ]
        kept = checkpoint['distillation']
        assert kept['state_dict']['distillation.methods.hint.w'][0] == 5
        name = 'module.distillation.methods.hint.w'
        assert kept['ema_state_dict'][name][0] == 6

    @pytest.mark.parametrize('resume', [False, True])
    def test_join_is_its_inverse(self, resume):
        checkpoint = joined()
        split_checkpoint(checkpoint)
        join_checkpoint(checkpoint, self.own, resume=resume)
        del checkpoint['distillation']
        assert toy.same(checkpoint, joined())

    def test_a_stock_checkpoint_takes_the_run_s_own(self):
        checkpoint = {'state_dict': {'conv.weight': torch.ones(2)}}
        join_checkpoint(checkpoint, self.own, resume=False)
        assert toy.same(
            checkpoint['state_dict'],
            {'conv.weight': torch.ones(2), **self.own},
        )

    def test_so_does_one_of_another_width(self):
        checkpoint = joined()
        split_checkpoint(checkpoint)
        own = {'distillation.methods.hint.w': torch.zeros(4)}
        join_checkpoint(checkpoint, own, resume=False)
        name = 'distillation.methods.hint.w'
        assert toy.same(checkpoint['state_dict'][name], own[name])

    @pytest.mark.parametrize(
        ('own', 'message'),
        [
            (
                {'distillation.methods.hint.w': torch.zeros(4)},
                r'hint\.w: expected \(4,\), got \(3,\)',
            ),
            ({}, r'hint\.w: expected nothing, got \(3,\)'),
            (
                {**own, 'distillation.methods.hint.b': torch.zeros(1)},
                r'1 of their.*hint\.b: expected \(1,\), got nothing',
            ),
        ],
    )
    def test_resuming_needs_the_same(self, own, message):
        checkpoint = joined()
        split_checkpoint(checkpoint)
        with pytest.raises(CheckpointError, match=message):
            join_checkpoint(checkpoint, own, resume=True)


class TestAtomicWriting:
    def test_the_whole_file(self, tmp_path):
        path = tmp_path / 'file'
        write_atomically(str(path), lambda p: Path(p).write_text('new'))
        assert path.read_text() == 'new'
        assert list(tmp_path.iterdir()) == [path]

    def test_an_error_leaves_the_former_one(self, tmp_path):
        path = tmp_path / 'file'
        path.write_text('old')

        def write(temporary):
            Path(temporary).write_text('ne')
            raise OSError('no space left')

        with pytest.raises(OSError, match='no space left'):
            write_atomically(str(path), write)
        assert path.read_text() == 'old'
        assert list(tmp_path.iterdir()) == [path]

    def test_so_does_a_kill(self, tmp_path):
        path = tmp_path / 'file'
        path.write_text('old')

        def write(temporary):
            Path(temporary).write_text('ne')
            os.kill(os.getpid(), signal.SIGKILL)

        process = multiprocessing.get_context('fork').Process(
            target=write_atomically, args=(str(path), write)
        )
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert path.read_text() == 'old'
        (left,) = tmp_path.glob('.file.*.tmp')
        assert left.read_text() == 'ne'

    def test_two_processes_write_one_file(self, tmp_path):
        """It is always the whole of what one of them wrote."""
        path = tmp_path / 'file'
        fork = multiprocessing.get_context('fork')
        processes = [
            fork.Process(target=write_often, args=(str(path), letter))
            for letter in 'ab'
        ]
        for process in processes:
            process.start()
        while any(process.is_alive() for process in processes):
            if path.exists():
                text = path.read_text()
                assert text in ('a' * 100_000, 'b' * 100_000)
        assert [process.exitcode for process in processes] == [0, 0]
        assert list(tmp_path.iterdir()) == [path]


def write_often(path, letter):
    def write(temporary):
        with Path(temporary).open('w') as file:
            for _ in range(100):
                file.write(letter * 1000)
                file.flush()

    for _ in range(30):
        write_atomically(path, write)


@pytest.fixture(scope='module')
def failed(tmp_path_factory):
    folder = tmp_path_factory.mktemp('full')
    cfg = toy.distilled(folder / 'run', images=2, epochs=3)
    cfg.custom_imports = dict(imports=['tests.helpers.toy'])
    cfg.custom_hooks = [dict(type='ToyFullDisk', epoch=1)]
    cfg.default_hooks.checkpoint.max_keep_ckpts = 1
    path = toy.write(cfg, folder / 'config.py')
    return toy.tool(folder / 'log', 'tools/train.py', path), folder / 'run'


class TestASaveThatFails:
    """The disk is full in the second epoch of a real run."""

    def test_it_says_so_in_one_line(self, failed):
        job, run = failed
        assert job.process.exitcode == 1
        last = job.text().strip().splitlines()[-1]
        assert last.startswith(
            f'error: {run}/epoch_2.pth could not be written'
        )
        assert '--resume' in last

    def test_the_former_checkpoint_is_intact(self, failed):
        run = failed[1]
        pointed = Path((run / 'last_checkpoint').read_text())
        assert pointed == run / 'epoch_1.pth'
        assert toy.load(pointed)['meta']['epoch'] == 1
        assert not list(run.glob('.*.tmp'))
        assert not (run / 'epoch_2.pth').exists()
