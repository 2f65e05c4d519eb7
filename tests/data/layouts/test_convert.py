"""What is kept of a conversion, and how another one goes on from it."""

import json
import os
import shutil
from pathlib import Path

import pytest

from mmkd.cli import main
from mmkd.data.layouts import find_data
from mmkd.errors import DataError
from tests.helpers import made_data
from tests.helpers import own_data as own

PHOTOS = own.photos(20)


def make(root, names=PHOTOS, named=True):
    for name in names:
        size, objects = PHOTOS[name]
        own.draw(root / f'images/{name}.jpg', size)
        own.write(root / f'labels/{name}.txt', own.yolo(size, objects))
    if named:
        own.write(root / 'classes.txt', '\n'.join(own.CLASSES))
    return root


def splits(folder):
    """The split of each image."""
    return {
        row['file_name']: path.stem
        for path in (Path(folder) / 'annotations').iterdir()
        for row in json.loads(path.read_text())['images']
    }


class TestKeeping:
    def test_only_annotations_are_written_and_stay(self, tmp_path):
        root = make(tmp_path / 'mine')
        find_data(str(root))
        first = own.tree(Path('data'))
        assert set(first) == {
            'mine/annotations/train.json',
            'mine/annotations/val.json',
        }
        times = [p.stat().st_mtime_ns for p in Path('data').rglob('*.json')]
        find_data(str(root))
        find_data('data/mine')
        assert own.tree(Path('data')) == first
        again = [p.stat().st_mtime_ns for p in Path('data').rglob('*.json')]
        assert again == times

    def test_new_images_leave_the_others_in_their_splits(self, tmp_path):
        names = list(PHOTOS)
        root = make(tmp_path / 'mine', names[:12])
        find_data(str(root))
        before = splits('data/mine')
        make(root, names)
        (root / f'images/{names[0]}.jpg').unlink()
        (root / f'labels/{names[0]}.txt').unlink()
        data = find_data(str(root))
        after = splits('data/mine')
        gone = f'images/{names[0]}.jpg'
        assert gone not in after
        old = {k: v for k, v in before.items() if k != gone}
        assert {name: after[name] for name in old} == old
        assert len(after) == 19
        assert 'kept from the last time, 8 new images' in data.summary[4]

    def test_changed_labels_are_noticed(self, tmp_path):
        root = make(tmp_path / 'mine')
        find_data(str(root))
        own.write(root / 'labels/photo 0.txt', '1 .5 .5 .5 .5\n')
        ((kind, _),) = own.delivered(find_data(str(root)))['photo 0']
        assert kind == 'dog'

    def test_a_moved_image_moves_what_was_made_of_it(self, tmp_path):
        """The folder that results says where its images came from."""
        root = make(tmp_path / 'mine')
        find_data(str(root))
        (root / 'images/photo 3.jpg').rename(root / 'images/photo x.jpg')
        (root / 'labels/photo 3.txt').rename(root / 'labels/photo x.txt')
        found = own.delivered(find_data('data/mine'))
        assert 'photo x' in found
        assert 'photo 3' not in found
        shutil.rmtree(root)
        with pytest.raises(DataError, match='0 that can and 20 that cannot'):
            find_data('data/mine')

    def test_names_that_are_taken(self, tmp_path, own_folder):
        first = make(tmp_path / 'a/mine')
        second = make(tmp_path / 'b/mine')
        third = make(own_folder / 'data/theirs')
        assert 'data/mine\n' in find_data(str(first)).summary[0] + '\n'
        assert find_data(str(second)).summary[0].endswith('data/mine_coco')
        assert find_data(str(third)).summary[0].endswith('data/theirs_coco')
        assert find_data(str(first)).summary[0].endswith('data/mine')
        assert find_data('data/theirs').classes == own.CLASSES

    @pytest.mark.skipif(os.getuid() == 0, reason='root may write anywhere')
    def test_a_folder_that_cannot_be_written(self, tmp_path):
        root = make(tmp_path / 'mine')
        for path in (root, *root.rglob('*')):
            path.chmod(0o555 if path.is_dir() else 0o444)
        assert own.delivered(find_data(str(root))) == own.known(PHOTOS)


class TestCommand:
    @pytest.fixture
    def prepare(self, capsys):
        def prepare(*arguments):
            status = main(['prepare', 'own', *map(str, arguments)])
            out, err = capsys.readouterr()
            assert status == bool(err)
            return err or out

        return prepare

    def test_it_prints_what_was_understood(self, tmp_path, prepare):
        root = make(tmp_path / 'mine')
        own.write(root / 'labels/photo 1.txt', '0 1 2\n0 .5 .5 .1 .1\n')
        out = prepare(root).splitlines()
        assert [line.split(':')[0] for line in out[:5]] == [
            'layout',
            'images',
            'boxes',
            'classes',
            'splits',
        ]
        assert out[5] == 'lines that cannot be read (1):'
        assert out[6].startswith('  labels/photo 1.txt, line 1: 3 values')
        assert out[-1] == 'mmkd distill --data data/mine'

    def test_options(self, tmp_path, prepare):
        root = make(tmp_path / 'mine')
        out = prepare(
            *(root, '--out', tmp_path / 'out', '--split', '.5', '.3', '.2'),
            *('--seed', 7, '--classes', 'dog', 'cat'),
        )
        assert 'split 50 : 30 : 20 by class with seed 7' in out
        assert 'not asked for: naïve fox' in out
        data = find_data(str(tmp_path / 'out'))
        assert data.classes == ('dog', 'cat')
        expected = {
            name: [row for row in rows if row[0] in data.classes]
            for name, rows in own.known(PHOTOS).items()
        }
        assert own.delivered(data) == expected
        assert len(own.delivered(data, 'test')) == 4
        # Without options they stay as they were.
        before = own.tree(tmp_path / 'out')
        prepare(root, '--out', tmp_path / 'out')
        assert own.tree(tmp_path / 'out') == before
        prepare(root, '--out', tmp_path / 'out', '--seed', 8)
        assert own.tree(tmp_path / 'out') != before

    def test_names_for_numbered_classes(self, tmp_path, prepare):
        root = make(tmp_path / 'mine', named=False)
        assert 'got 2' in prepare(root, '--classes', 'a', 'b')
        prepare(root, '--classes', *own.CLASSES)
        assert own.delivered(find_data(str(root))) == own.known(PHOTOS)

    def test_what_is_read_as_it_stands(self, prepare, own_folder):
        folder = made_data.root() / 'coco_tiny'
        out = prepare(folder)
        assert out.endswith(f'mmkd distill --data {folder}\n')
        assert not (own_folder / 'data').exists()
        prepare(folder, '--split', '.6', '.4')
        found = splits('data/coco_tiny')
        whole = len(found)
        assert sum(s == 'train' for s in found.values()) == pytest.approx(
            0.6 * whole, abs=2
        )

    @pytest.mark.parametrize(
        'fractions', [('.8', '.3'), ('1', '0'), ('.8',), ('.5', 'nan')]
    )
    def test_impossible_fractions(self, tmp_path, prepare, fractions):
        root = make(tmp_path / 'mine')
        error = prepare(root, '--split', *fractions)
        assert 'expected 2 or 3 fractions that add up to 1' in error

    def test_wrong_options(self, tmp_path, prepare):
        root = make(tmp_path / 'mine')
        error = prepare(root, '--classes', 'dog', 'cow')
        assert 'some of cat, dog, naïve fox, got cow' in error
        assert 'names one twice' in prepare(root, '--classes', 'cat', 'cat')
        assert 'got the same' in prepare(root, '--out', root)
        other = make(tmp_path / 'other')
        prepare(root, '--out', 'data/x')
        error = prepare(other, '--out', 'data/x')
        assert f'got that of {root}' in error
        made = made_data.root() / 'coco_tiny'
        copied = tmp_path / 'copied/annotations'
        copied.mkdir(parents=True)
        source = made / 'annotations/instances_val2017.json'
        shutil.copy(source, copied / 'val.json')
        error = prepare(root, '--out', copied.parent)
        assert 'got those of other data' in error


def test_one_labelled_image(tmp_path):
    root = make(tmp_path / 'x', ['photo 0', 'photo 1'])
    with pytest.raises(DataError, match='got 1 of 2 images'):
        find_data(str(root))


def test_an_image_in_both_splits(tmp_path):
    """The file that describes the data says so."""
    root = make(tmp_path / 'x')
    text = 'train: images\nval: images\nnames: [a, b, c]'
    own.write(root / 'data.yaml', text)
    data = find_data(str(root))
    assert own.delivered(data, 'train') == own.delivered(data, 'val')
