"""Trainings with images without labels: resumed, distributed, broken."""

import logging
import shutil
import signal

import cv2
import numpy as np
import pytest

from mmkd.core.method import Method
from mmkd.errors import ConfigError, DataError
from mmkd.registry import METHODS
from mmkd.teachers.seen import seen_objects
from mmkd.teachers.view import DETECTIONS
from tests.engine.test_distributed import config as distributed_config
from tests.engine.test_distributed import launch, records
from tests.engine.test_resume import assert_same_outcome
from tests.helpers import toy, unlabelled


@pytest.mark.slow
def test_killed_and_resumed(tmp_path):
    """Two-stage samplers, photometric changes, workers that read ahead."""

    def written(folder):
        cfg = unlabelled.pseudo(
            folder / 'run', toy.FASTER_RCNN, images=6, epochs=2
        )
        unlabelled.unlabelled(cfg)
        cfg.distillation.unlabelled.num_workers = 2
        cfg.distillation.methods.pseudo.report_every = 5
        cfg.custom_imports = dict(
            imports=['tests.helpers.toy', 'tests.helpers.unlabelled']
        )
        cfg.custom_hooks = [dict(type='ToyKillAt')]
        cfg.val_dataloader = cfg.val_evaluator = cfg.val_cfg = None
        return toy.write(cfg, folder / 'config.py')

    whole, broken = tmp_path / 'whole', tmp_path / 'broken'
    train = 'tools/train.py'
    job = toy.tool(whole / 'log', train, written(whole))
    assert job.process.exitcode == 0, job.text()
    saved = toy.load(whole / 'run' / 'epoch_1.pth')
    assert saved['distillation']['unlabelled'] == 6

    path = written(broken)
    job = toy.tool(
        broken / 'log', train, path, env=dict(TOY_KILL_AT='within an epoch')
    )
    assert job.process.exitcode == -signal.SIGKILL, job.text()
    job = toy.tool(broken / 'log', train, path, '--resume')
    assert job.process.exitcode == 0, job.text()
    assert 'bit for bit' not in job.text()
    last = 'run/epoch_2.pth'
    assert_same_outcome(whole / last, broken / last)


def test_two_processes_share_the_images(tmp_path):
    """Together they compute what one does with the doubled batch."""

    def written(folder, size):
        cfg = distributed_config(
            folder, iterations=2, methods=dict(hint=toy.HINT)
        )
        cfg.train_dataloader.batch_size = size
        unlabelled.unlabelled(
            cfg,
            weak=[dict(type='Resize', scale=(128, 96), keep_ratio=False)],
        )
        cfg.distillation.unlabelled.batch_size = size
        return cfg

    launch(tmp_path / 'two', written(tmp_path / 'two', 1))
    first, second = records(tmp_path / 'two')
    toy.train(written(tmp_path / 'one', 2))
    (expected,) = records(tmp_path / 'one')
    name = 'hint.unlabelled_loss_hint'
    steps = zip(*(r['losses'] for r in (first, second, expected)), strict=True)
    for a, b, both in steps:
        assert a[name] != b[name]
        assert (a[name] + b[name]) / 2 == pytest.approx(both[name], rel=1e-3)
    assert toy.same(first['weights'], second['weights'])


def test_nothing_found_in_one_of_two_processes(tmp_path):
    """The other one does not wait for it, and the weights stay equal."""
    cfg = distributed_config(
        tmp_path,
        iterations=2,
        teacher=dict(type='ToldBoxes'),
        methods=dict(pseudo=dict(type='mmkd.PseudoLabels')),
    )
    cfg.train_dataloader.batch_size = 1
    cfg.custom_imports.imports.append('tests.helpers.unlabelled')
    order = np.random.default_rng([3, 0]).permutation(8)
    cfg.distillation.teacher = dict(
        type='ToldBoxes', empty=[int(order[1]), int(order[2])]
    )
    unlabelled.unlabelled(cfg, alone=True)
    cfg.distillation.unlabelled.batch_size = 1
    launch(tmp_path, cfg)
    first, second = records(tmp_path)
    name = 'pseudo.unlabelled_loss_cls'
    found = [
        [each[name] > 0 for each in r['losses'][:2]] for r in (first, second)
    ]
    assert found == [[True, False], [False, True]]
    assert toy.same(first['weights'], second['weights'])


class TestImages:
    @pytest.fixture
    def log(self, monkeypatch):
        lines = []
        monkeypatch.setattr(
            logging.Logger,
            'handle',
            lambda _, record: lines.append(record.getMessage()),
        )
        return lines

    def test_leakage_is_named_before_the_training(self, tmp_path, log):
        images = tmp_path / 'images'
        photos = sorted(unlabelled.folder().glob('*.jpg'))
        images.mkdir()
        shutil.copy(photos[0], images / 'copy.jpg')
        shutil.copy(photos[6], images / 'not_read.jpg')
        train = unlabelled.folder().with_name('train2017')
        shutil.copy(next(train.glob('*.jpg')), images / 'other.jpg')
        cfg = unlabelled.unlabelled(
            unlabelled.pseudo(tmp_path / 'run', images=2)
        )
        cfg.distillation.unlabelled.dataset = str(images)
        toy.train(cfg)
        (line,) = (i for i, each in enumerate(log) if 'also stand' in each)
        assert '1 of its 3 images' in log[line]
        assert f'copy.jpg (is {photos[0]})' in log[line]
        assert any('Epoch(train)' in each for each in log[line:])
        assert not any('Epoch(train)' in each for each in log[:line])

    def test_unreadable_images_are_skipped(self, tmp_path, log):
        images = tmp_path / 'images'
        images.mkdir()
        for number, photo in enumerate(unlabelled.folder().glob('*.jpg')):
            content = photo.read_bytes()
            cut = content[:200] if number == 2 else content
            (images / photo.name).write_bytes(cut)
        (images / 'empty.jpg').write_bytes(b'')
        cfg = unlabelled.unlabelled(
            unlabelled.pseudo(tmp_path / 'run', images=8)
        )
        cfg.distillation.unlabelled.dataset = str(images)
        record = toy.Record()
        toy.train(cfg, record)
        assert len(record.losses) == 4
        text = '\n'.join(log)
        assert '1 of 9 images of the folder' in text
        assert 'empty.jpg' in text
        assert text.count('cannot be read; another image takes its') == 1

    def test_an_empty_folder(self, tmp_path):
        (tmp_path / 'images').mkdir()
        cfg = unlabelled.unlabelled(unlabelled.pseudo(tmp_path / 'run'))
        cfg.distillation.unlabelled.dataset = str(tmp_path / 'images')
        with pytest.raises(DataError, match=r'the folder .*images has no im'):
            toy.train(cfg)


BOX = (30, 20, 70, 60)
"""What is white in the images, xyxy in pixels of the files."""


def find_white(image):
    """A detector that looks at the original file."""
    assert image.shape == (90, 120, 3)
    return dict(boxes=np.array([BOX], float), scores=[0.95], labels=[0])


@METHODS.register_module()
class ToySeen(Method):
    """Keeps the student's images and the teacher's objects on them."""

    needs = (DETECTIONS,)
    needs_labels = False
    only_unlabelled = any_geometry = True
    student_paths = ('neck',)
    seen: list = []

    def forward(self, student, teacher, batch):
        self.seen += zip(
            batch.inputs, seen_objects(teacher, batch), strict=True
        )
        return {'x': student.features('neck')[0].square().mean()}


class TestTeachersThatLookAtFiles:
    def config(self, folder, **options):
        images = folder / 'images'
        images.mkdir(parents=True)
        for number in range(4):
            image = np.zeros((90, 120, 3), np.uint8)
            image[20:60, 30:70] = 255
            cv2.imwrite(str(images / f'{number}.png'), image)
        cfg = toy.distilled(
            folder / 'run',
            images=4,
            teacher=dict(
                type='mmkd.PythonDetector',
                function='tests.engine.test_unlabelled:find_white',
                classes='coco',
            ),
            methods=dict(seen=dict(type='ToySeen')),
        )
        unlabelled.unlabelled(cfg, alone=True, **options)
        cfg.distillation.unlabelled.dataset = str(images)
        return cfg

    def test_boxes_lie_on_what_the_student_sees(self, tmp_path):
        """Through resize, flip and a warp of the student's view alone."""
        ToySeen.seen = []
        cfg = self.config(
            tmp_path,
            weak=[
                dict(type='Resize', scale=(160, 120), keep_ratio=False),
                dict(type='RandomFlip', prob=0.5),
            ],
            strong=[
                dict(
                    type='RandomAffine',
                    max_rotate_degree=0.0,
                    max_shear_degree=0.0,
                    border_val=(0, 0, 0),
                )
            ],
        )
        toy.train(cfg)
        places = set()
        for image, objects in ToySeen.seen:
            (box,) = objects.bboxes.tolist()
            white = image.mean(0) > 1  # padding is 0
            rows, columns = white.any(1).nonzero(), white.any(0).nonzero()
            around = [*columns[0], *rows[0], *columns[-1] + 1, *rows[-1] + 1]
            assert box == pytest.approx([float(v) for v in around], abs=1.6)
            places.add(round(box[0]))
        assert len(ToySeen.seen) >= 4
        assert len(places) > 2

    def test_a_change_that_cannot_be_followed(self, tmp_path):
        cfg = self.config(tmp_path, strong=[dict(type='RandomShift')])
        words = r'unlabelled\.strong: RandomShift may move pixels without'
        with pytest.raises(ConfigError, match=words):
            toy.train(cfg)

    def test_frames_of_a_video(self, tmp_path):
        path = str(tmp_path / 'x.avi')
        size = (120, 90)
        codec = cv2.VideoWriter_fourcc(*'MJPG')
        video = cv2.VideoWriter(path, codec, 5, size)
        for _ in range(3):
            video.write(np.zeros((90, 120, 3), np.uint8))
        video.release()
        cfg = self.config(tmp_path / 'x')
        cfg.distillation.unlabelled.dataset = path
        with pytest.raises(ConfigError, match=r'frames of a video.*"batch"'):
            toy.train(cfg)

    def test_transforms_that_are_none(self, tmp_path):
        cfg = self.config(tmp_path, strong=['dict(type="RandomFlip")'])
        with pytest.raises(ConfigError, match=r'strong must be a list of tr'):
            toy.train(cfg)
