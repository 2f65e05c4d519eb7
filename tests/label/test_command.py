"""`mmkd label` writes down what a detector finds."""

import json
import sys

import cv2
import numpy as np
import pytest

import mmkd.report
from mmkd.data.detections import read_detections
from mmkd.errors import (
    ConfigError,
    DataError,
    PackageError,
    WorkDirError,
)
from mmkd.label.command import main, parse_args
from mmkd.teachers.onnx_detector import OnnxDetector
from tests.label.conftest import VALUES

NAMES = ['part_0/0.png', 'part_0/2.png', 'part_1/1.png', 'part_1/3.png']
IN_ORDER = [VALUES[i] for i in (0, 2, 1, 3)]


def read(path):
    return json.loads(path.read_text())


def check(content, values):
    """Check the boxes of images of these levels of brightness."""
    assert len(content['images']) == len(content['annotations'])
    for image, row, value in zip(
        content['images'], content['annotations'], values, strict=True
    ):
        m = value / 255
        assert row['image_id'] == image['id']
        expected = [30 * m, 25 * m, 20 * m, 10 * m]
        np.testing.assert_allclose(row['bbox'], expected, atol=0.02)
        assert row['score'] == pytest.approx(m, abs=2e-4)
        assert (image['height'], image['width']) == (64, 64)


def test_a_folder(folder, label, capsys):
    out = label(folder)
    content = read(out)
    names = [image['file_name'] for image in content['images']]
    assert names == [
        *('part_0/0.png', 'part_0/2.png'),
        'part_1/1.png',
        'part_1/3.png',
    ]
    check(content, [VALUES[i] for i in (0, 2, 1, 3)])
    assert content['categories'] == [dict(id=1, name='thing')]
    assert not out.with_name('labels.json.parts').exists()
    assert (
        '4 boxes on 4 images, 0 of them without any' in capsys.readouterr().out
    )
    # It is what a student learns from.
    assert read_detections(out).classes == ('thing',)


def test_a_video(video, label):
    content = read(label(video))
    assert [image['id'] for image in content['images']] == [*range(10)]
    assert content['images'][3]['file_name'] == 'video.avi/000003.jpg'
    scores = [row['score'] for row in content['annotations']]
    expected = np.arange(40, 240, 20) / 255
    np.testing.assert_allclose(scores, expected, atol=0.02)  # of JPEG


def test_a_coco_file_keeps_its_ids(folder, label, tmp_path):
    images = [
        dict(id=number, file_name=name, width=64, height=64)
        for number, name in ((70, 'part_1/3.png'), (9, 'part_0/0.png'))
    ]
    truth = tmp_path / 'truth.json'
    categories = [dict(id=4, name='thing')]
    truth.write_text(json.dumps(dict(images=images, categories=categories)))
    content = read(label(truth))  # the images are in a folder beside it
    assert [image['id'] for image in content['images']] == [70, 9]
    check(content, [VALUES[3], VALUES[0]])


def test_scores(folder, label):
    content = read(label(folder, '--score-thr', 0.6))
    scores = [row['score'] for row in content['annotations']]
    assert sorted(scores) == pytest.approx([180 / 255, 240 / 255], abs=1e-3)
    assert len(content['images']) == 4


def test_it_goes_on_where_it_was_stopped(folder, label, monkeypatch, capsys):
    """The images that are done are not looked at again."""
    looked = []
    detect = OnnxDetector.detect

    def stops(self, images, names):
        if len(looked) >= 2:
            raise KeyboardInterrupt
        looked.extend(names)
        return detect(self, images, names)

    monkeypatch.setattr('mmkd.label.work.AT_ONCE', 1)
    with monkeypatch.context() as patch:
        patch.setattr(OnnxDetector, 'detect', stops)
        with pytest.raises(KeyboardInterrupt):
            label(folder)
    (parts,) = folder.parent.glob('*.parts')
    with (parts / '0.jsonl').open('a') as file:
        file.write('{"id": 3, "bo')  # cut off
    seen = []

    def notes(self, images, names):
        seen.extend(names)
        return detect(self, images, names)

    monkeypatch.setattr(OnnxDetector, 'detect', notes)
    check(read(label(folder)), IN_ORDER)
    assert len(seen) == 2
    assert not {*seen} & {*looked}
    assert 'going on: 2 of 4 images are done' in capsys.readouterr().out


def test_another_run_is_not_mixed_in(folder, label, tmp_path):
    parts = tmp_path / 'labels.json.parts'
    parts.mkdir()
    (parts / 'about.json').write_text('{"score_thr": 0.5}')
    with pytest.raises(WorkDirError, match='--overwrite to begin again'):
        label(folder)
    check(
        read(label(folder, '--overwrite')), [VALUES[i] for i in (0, 2, 1, 3)]
    )


def test_a_result_that_is_there(folder, label, capsys):
    out = label(folder)
    before = out.stat().st_mtime_ns
    label(folder)
    assert 'is complete: 4 boxes' in capsys.readouterr().out
    assert out.stat().st_mtime_ns == before
    with pytest.raises(ConfigError, match='exists, and holds something else'):
        label(folder, '--score-thr', 0.5)
    out.write_text('{}')
    with pytest.raises(ConfigError, match='exists, and holds something else'):
        label(folder)


def test_images_that_cannot_be_read(folder, label, capsys):
    (folder / 'part_0' / '0.png').write_bytes(b'no image')
    content = read(label(folder))
    check(content, [VALUES[i] for i in (2, 1, 3)])
    text = capsys.readouterr().err
    assert '1 of 4 images could not be looked at' in text
    assert 'part_0/0.png' in text
    for path in folder.rglob('*.png'):
        path.write_bytes(b'')
    with pytest.raises(DataError, match='got 4 that cannot be read'):
        label(folder, '--overwrite')


def test_a_video_that_ends_early(video, label, capsys):
    """Its header promises 25 frames, and it has 10."""
    content = bytearray(video.read_bytes())
    length = content.index(b'strh') + 8 + 32
    assert content[length : length + 4] == (10).to_bytes(4, 'little')
    content[length : length + 4] = (25).to_bytes(4, 'little')
    video.write_bytes(content)
    images = read(label(video))['images']
    assert [image['id'] for image in images] == [*range(10)]
    text = capsys.readouterr().err
    assert '15 of 25 images could not be looked at' in text
    assert '000010.jpg: the video ends before this frame' in text


def test_pictures_to_look_at(folder, label, tmp_path):
    label(folder, '--preview', 2)
    pictures = sorted((tmp_path / 'labels.preview').glob('*.jpg'))
    assert [path.name for path in pictures] == ['part_0_0.jpg', 'part_1_3.jpg']
    drawn = cv2.imread(str(pictures[0])).astype(int)
    assert abs(drawn - 60).max() > 50  # the box
    assert abs(drawn[40:, 40:] - 60).max() < 20


def test_what_draws_is_asked_for_when_it_draws(folder, label, monkeypatch):
    monkeypatch.delitem(sys.modules, 'mmkd.report.figures', raising=False)
    monkeypatch.delattr(mmkd.report, 'figures', raising=False)
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    label(folder)
    with pytest.raises(PackageError, match=r"pip install 'mmkd\[report\]'"):
        label(folder, '--preview', 1)


def test_against_ground_truth(folder, label, tmp_path, capsys):
    """Two of four boxes are where an object is, so half are right."""
    images = [
        dict(id=i, file_name=name, width=64, height=64)
        for i, name in enumerate(NAMES, 1)
    ]
    rows = []
    for number, image, value in ((1, 2, 180), (2, 4, 240), (3, 1, None)):
        m = (value or 60) / 255
        box = [30 * m, 25 * m, 20 * m, 10 * m] if value else [50, 50, 9, 9]
        area = box[2] * box[3]
        rows.append(
            dict(id=number, image_id=image, category_id=5, bbox=box, area=area)
        )
    truth = dict(images=images, annotations=rows)
    truth['categories'] = [dict(id=5, name='Thing')]
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    label(folder, '--against', tmp_path / 'truth.json')
    text = capsys.readouterr().out
    assert '4 images of the ground truth' in text
    # The two boxes of scores .94 and .71 find 2 of 3 objects: the precision
    # is 1 at 67 of COCO's 101 recalls, 0 to .66.
    assert 'AP50  IoU .50' in text
    assert '66.34' in text
    # F1 of the boxes from .71 on: 2 * 2 / (2 + 3).
    assert any(
        line.split() == ['Thing', '3', '0.71', '0.800']
        for line in text.splitlines()
    )
    assert (tmp_path / 'labels.calibration.svg').is_file()


@pytest.mark.slow
def test_two_processes_find_the_same(label, video):
    single = read(label(video))
    label(video, '--overwrite', '--jobs', 2)
    several = read(label(video))
    assert several['annotations'] == single['annotations']
    assert several['images'] == single['images']


@pytest.mark.parametrize(
    ('source', 'message'),
    [
        ('nowhere', 'expected images, got nothing'),
        ('empty', 'got a folder without any'),
        ('text.avi', 'a file that OpenCV cannot read'),
    ],
)
def test_sources_that_are_none(source, message, label, tmp_path):
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'text.avi').write_text('no video')
    with pytest.raises(DataError, match=message):
        label(tmp_path / source)


def test_teachers_that_cannot_label(folder, label, tmp_path):
    out = ['--out', str(tmp_path / 'a.json')]
    boxes = label(folder)
    with pytest.raises(ConfigError, match='does not run on images by itself'):
        main([str(folder), '--teacher', str(boxes), *out])
    file = str(tmp_path / 'thing.onnx')
    with pytest.raises(ConfigError, match='--texts is for detectors of MMDet'):
        main([str(folder), '--teacher', file, *out, '--texts', 'cat'])
    with pytest.raises(ConfigError, match=r'must be the name of a \.json'):
        main([str(folder), '--teacher', file, '--out', str(tmp_path)])


def test_the_command_line(capsys):
    given = ['a', '--teacher', 'b', '--out', 'c.json']
    for wrong in (['--score-thr', '2'], ['--teacher-options', 'classes']):
        with pytest.raises(SystemExit):
            parse_args([*given, *wrong])
    text = capsys.readouterr().err
    assert "takes a score from 0 to 1, got '2'" in text
    assert "--teacher-options takes KEY=VALUE, got 'classes'" in text
