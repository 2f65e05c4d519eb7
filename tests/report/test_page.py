"""The report of trainings: its numbers, and its page in a browser."""

import argparse
import base64
import copy
import dataclasses
import html
import html.parser
import json
import math
import re
import shutil
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmkd.cli import main
from mmkd.engine.logs import by_step, training_rows
from mmkd.errors import ConfigError
from mmkd.report import attention, eval_coco, evaluation, figures, work_dir
from mmkd.report import page as tool
from mmkd.report.bootstrap import ClassHits, hits_of
from mmkd.report.judge import judge
from mmkd.report.roles import Group, cast
from tests.helpers import made_data, toy

ROOT = Path(__file__).resolve().parents[2]
BROWSERS = ('chromium', 'chromium-browser', 'google-chrome', 'chrome')


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """The work dirs of a plain and of a distilled training of two epochs."""
    folder = tmp_path_factory.mktemp('trained')
    for name, make in (('student', toy.plain), ('distilled', toy.distilled)):
        config = make(folder / name, epochs=2, images=4)
        config.model.test_cfg.rcnn.score_thr = 0.0  # it is sure of nothing
        if name == 'distilled':
            config.custom_hooks = [
                dict(type='mmkd.TelemetryHook', interval=1),
                dict(type='mmkd.GradientBalanceHook', interval=1),
            ]
        toy.train(config)
    return folder


@pytest.fixture(scope='module')
def page(trained, tmp_path_factory):
    """The page of both, written by a process of its own."""
    out = tmp_path_factory.mktemp('page') / 'report.html'
    dirs = [trained / name for name in ('student', 'distilled')]
    options = ('--images', 1, '--out', out)
    job = toy.tool(out.parent / 'log', 'tools/report.py', *dirs, *options)
    assert job.wait() == 0, job.text()
    return out


# ---------------------------------------------------------- scores by hand


def objects(boxes, names, scores=None):
    scores = np.ones(len(boxes)) if scores is None else np.array(scores)
    boxes = np.array(boxes, float).reshape(-1, 4)
    return evaluation.Objects(boxes, np.array(list(names), str), scores)


A, B = [0, 0, 10, 10], [20, 0, 30, 10]
ELSEWHERE = [50, 50, 60, 60]


@pytest.mark.parametrize(
    ('boxes', 'names', 'f1'),
    [
        ([A, B], 'xy', 1.0),
        ([A], 'x', 2 / 3),
        ([A, ELSEWHERE, B], 'xxy', 4 / 5),
        # The right place by the name of the other class.
        ([A, B], 'yx', 0.0),
        # Found twice: the second time is wrong.
        ([A, B, A], 'xyx', 4 / 5),
        ([], '', 0.0),
    ],
)
def test_f1_of_a_picture(boxes, names, f1):
    found = evaluation.f1(objects([A, B], 'xy'), objects(boxes, names))
    assert found == pytest.approx(f1)


def test_f1_without_objects():
    nothing = objects([], '')
    assert evaluation.f1(nothing, nothing) == 1
    assert evaluation.f1(nothing, objects([A], 'x')) == 0


def test_the_score_of_the_best_f1():
    """Right .9, right .6, wrong .5, right .3 of 3: F1 .5, .8, .67, .86."""
    scores = np.array([0.9, 0.6, 0.5, 0.3])
    right = np.array([[True, True, False, True]] * 10)
    hits = ClassHits(scores, np.zeros(4), right, ~right, np.array([3]))
    assert evaluation.best_score([hits]) == pytest.approx(0.05)
    # With 10 wrong ones at .4, the last right one is no longer worth it.
    more = ClassHits(
        np.full(10, 0.4),
        np.zeros(10),
        np.zeros((10, 10), bool),
        np.ones((10, 10), bool),
        np.array([0]),
    )
    assert evaluation.best_score([hits, more]) == pytest.approx(0.51)
    assert evaluation.best_score([more]) == evaluation.DRAWN


def test_the_surest_box_takes_an_object_first():
    near = [1, 0, 11, 10]
    found = objects([near, A, ELSEWHERE], 'xxx', [0.9, 0.6, 0.8])
    right, seen = evaluation.match(objects([A, B], 'xx'), found)
    assert right.tolist() == [True, False, False]
    assert seen.tolist() == [True, False]


def test_pictures_are_ranked_by_the_gain_of_the_second():
    nothing = objects([], '')
    unsure = objects([A, B], 'xy', [0.4, 0.4])
    both = objects([A, B], 'xy', [0.9, 0.9])
    cases = {
        'behind': (both, both, nothing),
        'equal': (both, both, both),
        # What is not drawn does not count.
        'ahead': (both, unsure, both),
        'false': (nothing, both, nothing),
    }
    pictures = [
        evaluation.Picture(name, Path(name), truth, {'s': one, 'd': two})
        for name, (truth, one, two) in cases.items()
    ]
    ranked = evaluation.rank(pictures, {'s': 0.5, 'd': 0.5})
    assert [(p.id, score) for score, p in ranked] == [
        ('behind', -1.0), ('equal', 0.0), ('ahead', 1.0), ('false', 1.0),
    ]  # fmt: skip
    low = evaluation.rank(pictures, {'s': 0.4, 'd': 0.5})
    assert [score for _, p in low for score in [_] if p.id == 'ahead'] == [0]
    alone = evaluation.rank(pictures, {'s': 0.5})
    assert [(p.id, score) for score, p in alone] == [
        ('ahead', 0.0), ('false', 0.0), ('behind', 1.0), ('equal', 1.0),
    ]  # fmt: skip


def test_no_picture_is_gained_on_which_nothing_was():
    ranked = [(-0.5, 'a'), (-0.1, 'b'), (0.0, 'c'), (0.0, 'd'), (0.3, 'e')]
    assert tool.choose(ranked, 2, pair=True) == [
        ('most gained', 0.3, 'e'),
        ('most lost', -0.5, 'a'), ('most lost', -0.1, 'b'),
        ('typical', 0.0, 'c'),
    ]  # fmt: skip
    assert tool.choose(ranked[2:4], 2, pair=True) == [('typical', 0.0, 'd')]
    assert tool.choose(ranked, 0, pair=True) == []


def test_the_worst_and_the_best_are_not_the_same():
    ranked = [(0.1, 'a'), (0.2, 'b'), (0.3, 'c')]
    assert tool.choose(ranked, 2, pair=False) == [
        ('best', 0.3, 'c'), ('best', 0.2, 'b'), ('worst', 0.1, 'a'),
    ]  # fmt: skip
    assert tool.choose(ranked, 1, pair=False) == [
        ('best', 0.3, 'c'), ('worst', 0.1, 'a'), ('typical', 0.2, 'b'),
    ]  # fmt: skip


def dataset_of(name):
    """Two data sets: with a JSON file of masks, and without one."""
    from mmdet.registry import DATASETS
    from mmdet.utils import register_all_modules
    from mmengine.config import Config

    register_all_modules()
    if name == 'coco':
        config = toy.plain(Path('unused')).test_dataloader.dataset
        config.indices = 30
    else:
        config = Config.fromfile(ROOT / 'configs' / 'bccd' / 'student.py')
        config = config.test_dataloader.dataset
        config.data_root = f'{made_data.root()}/bccd/'
    return DATASETS.build(config)


@pytest.mark.parametrize('name', ['coco', 'bccd'])
def test_who_finds_all_has_an_ap_of_one(photos, name):
    dataset = dataset_of(name)
    truth = evaluation.truth_of(dataset)
    pictures = list(evaluation.read_pictures(dataset))
    for picture in pictures:
        picture.found['all'] = picture.truth
        moved = picture.truth.boxes + np.array([1000, 0, 1000, 0])
        picture.found['none'] = objects(moved, picture.truth.names)
        first = picture.truth.names[:1]
        picture.found['one'] = objects(picture.truth.boxes[:1], first)
    scores = {
        run: eval_coco.evaluate(
            truth, evaluation.results_of(pictures, run, truth), 'bbox'
        )
        for run in ('all', 'none', 'one')
    }
    assert scores['all'].figures['AP'] == pytest.approx(1)
    for size in ('APs', 'APm', 'APl'):
        assert scores['all'].figures[size] == pytest.approx(1)
    assert scores['none'].figures['AP'] == 0
    assert 0 < scores['one'].figures['AP'] < 1
    counted = sum(row.objects for row in scores['all'].classes)
    assert counted == sum(len(p.truth.boxes) for p in pictures)


def test_classes_meet_by_name():
    truth = {'categories': [{'id': 7, 'name': 'y'}]}
    picture = evaluation.Picture(3, Path('p'), objects([A], 'y'))
    picture.found['t'] = objects([A, B], 'zy', [0.5, 0.25])
    assert evaluation.results_of([picture], 't', truth) == [
        dict(image_id=3, category_id=7, bbox=[20, 0, 10, 10], score=0.25)
    ]


# --------------------------------------------------------------- attention


def test_attention_by_hand():
    """Squares, averaged over channels, as a share; then the mean of levels."""
    fine = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]], [[1.0, 2.0], [0.0, 1.0]]]])
    # Squares add up to 2, 4, 0 and 2.
    coarse = torch.tensor([[[[1.0, -3.0]]]])
    # Squares are 1 and 9, once per row.
    expected = np.array([[2, 4], [0, 2]]) / 8 + np.array([1, 9]) / 20
    found = attention.attention([fine, coarse], (1.0, 1.0))
    np.testing.assert_allclose(found, expected / 2, rtol=1e-6)


def test_attention_ignores_padding_width_and_scale():
    torch.manual_seed(0)
    level = torch.rand(1, 4, 6, 8)
    plain = attention.attention([level], (1.0, 1.0))
    padded = torch.full((1, 8, 8, 16), 99.0)
    padded[:, :, :6, :8] = 3 * torch.cat([level, level], dim=1)
    same = attention.attention([padded], (0.75, 0.5))
    np.testing.assert_allclose(same, plain, rtol=1e-5)


def test_attention_elsewhere():
    left, right = np.array([[1.0, 0.0]]), np.array([[0.25, 0.75]])
    assert attention.Attention(left, left).elsewhere == 0
    assert attention.Attention(left, right).elsewhere == 0.75


# ---------------------------------------------------------------- work dirs


def test_names_are_as_long_as_needed():
    def short(*paths):
        return work_dir.short_names([Path(path) for path in paths])

    assert short('/a/x', '/a/y') == ['x', 'y']
    assert short('/a/x', '/b/x') == ['a/x', 'b/x']
    with pytest.raises(ConfigError, match='/a/x is given twice'):
        short('/a/x', '/a/x')


def test_what_a_training_has_logged(trained):
    run = work_dir.read_work_dir(trained / 'distilled', 'd')
    # Four images by two, twice.
    assert list(run.logged['loss']) == [1, 2, 3, 4]
    assert run.logged['time'][4] > run.logged['data_time'][4] > 0
    assert list(run.telemetry) == ['hint']
    assert list(run.telemetry['hint']) == [1, 2, 3, 4]
    assert all(-1 <= c <= 1 for c in run.telemetry['hint'].values())
    parts = {'loss_cls', 'loss_rpn_bbox', 'hint.loss_hint'}
    assert parts < set(run.loss_parts)
    for step, total in run.logged['loss'].items():
        named = [values[step] for values in run.loss_parts.values()]
        assert sum(named) == pytest.approx(total, rel=1e-4)
    assert run.environment.startswith('System environment:')
    assert run.checkpoint == str(trained / 'distilled' / 'epoch_2.pth')
    assert run.distils
    assert "type='FasterRCNN'" in run.config_text


def test_balance_is_drawn_where_a_run_has_it(trained):
    runs = work_dir.read_work_dirs(
        [trained / n for n in ('student', 'distilled')]
    )
    plain, balanced = runs
    assert tool.balance([plain]) == ['', '']
    assert list(balanced.logged['balance/hint.share']) == [1, 2, 3, 4]
    assert balanced.logged['balance/hint.factor'][1] == 1
    for chart in tool.balance([balanced]):
        assert 'hint' in texts(chart)


def test_a_moved_work_dir_is_itself(trained, tmp_path):
    shutil.copytree(trained / 'student', tmp_path / 'moved')
    run = work_dir.read_work_dir(tmp_path / 'moved', 'm')
    assert run.checkpoint == str(tmp_path / 'moved' / 'epoch_2.pth')


def read(trained, *names):
    return work_dir.read_work_dirs([trained / name for name in names])


def test_a_folder_without_training_is_refused(tmp_path, capsys):
    assert main(['report', str(tmp_path)]) == 1
    assert f'{tmp_path} holds no training' in capsys.readouterr().err


def test_a_training_without_checkpoint_is_refused(trained, tmp_path, capsys):
    shutil.copytree(trained / 'student', tmp_path / 'x')
    for file in (tmp_path / 'x').glob('*.pth'):
        file.unlink()
    (tmp_path / 'x' / 'last_checkpoint').unlink()
    assert main(['report', str(tmp_path / 'x')]) == 1
    assert 'holds no checkpoint' in capsys.readouterr().err


def test_other_test_data_are_refused(trained):
    runs = [
        work_dir.read_work_dir(trained / name, name)
        for name in ('student', 'distilled')
    ]
    dataset = runs[1].config.test_dataloader.dataset
    dataset.ann_file = 'annotations/instances_train2017.json'
    dataset.data_prefix = dict(img='train2017/')
    with pytest.raises(ConfigError, match='distilled was tested on other'):
        evaluation.evaluate_runs(runs)
    assert len(evaluation.evaluate_runs(runs[:1], limit=2).pictures) == 2


def test_other_images_of_the_same_numbers_are_refused(trained, tmp_path):
    """Two data sets that both number their images from 1."""
    runs = read(trained, 'student', 'distilled')
    root = Path(runs[0].config.test_dataloader.dataset.data_root)
    data = json.loads(
        (root / 'annotations/instances_val2017.json').read_text()
    )
    for image in data['images']:
        shutil.copy(
            root / 'val2017' / image['file_name'],
            tmp_path / f'other_{image["file_name"]}',
        )
        image['file_name'] = f'other_{image["file_name"]}'
    (tmp_path / 'val.json').write_text(json.dumps(data))
    dataset = runs[1].config.test_dataloader.dataset
    dataset.update(data_root='', ann_file=f'{tmp_path}/val.json')
    dataset.data_prefix = dict(img=str(tmp_path))
    with pytest.raises(ConfigError, match='distilled was tested on other'):
        evaluation.evaluate_runs(runs)


def test_a_folder_of_trainings_stands_for_them(trained, tmp_path):
    """Such as that of a study; one without a checkpoint is left out."""
    study = tmp_path / 'study'
    for name in ('student', 'distilled', 'begun'):
        shutil.copytree(
            trained / name.replace('begun', 'student'), study / name
        )
    for file in ('epoch_2.pth', 'epoch_1.pth', 'last_checkpoint'):
        (study / 'begun' / file).unlink(missing_ok=True)
    runs = work_dir.read_work_dirs([study])
    assert [run.name for run in runs] == ['distilled', 'student']
    # `mmkd distill` keeps its run one folder below its config.
    shutil.move(study, tmp_path / 'x' / 'study')
    runs = work_dir.read_work_dirs([tmp_path / 'x'])
    assert [run.name for run in runs] == ['distilled', 'student']


# ------------------------------------------------------------------ teachers


def taught(trained, **teacher):
    """The distilled run, as if with another description of its teacher."""
    run = work_dir.read_work_dir(trained / 'distilled', 'distilled')
    run.config.distillation.teacher.update(teacher)
    return run


@pytest.fixture
def taught_by_the_student(trained):
    checkpoint = str(trained / 'student' / 'epoch_2.pth')
    run = taught(trained, checkpoint=checkpoint)
    run.teacher['config'].model.test_cfg = run.config.model.test_cfg
    return run


def rendered(groups, found, images=1, **options):
    """The page of what was evaluated."""
    verdicts = judge(groups, found, {})
    return tool.render(groups, found, verdicts, {}, images=images, **options)


def lost_in_download(*args, **options):
    raise OSError('<urlopen error [Errno -2] Name or service not known>')


@pytest.mark.parametrize('how', ['no file', 'no network'])
def test_a_lost_teacher_is_told(trained, how, monkeypatch):
    if how == 'no file':
        run = taught(trained, checkpoint='/no/such/teacher.pth')
    else:
        run = taught(trained)
        monkeypatch.setattr(evaluation, 'build_teacher', lost_in_download)
    groups = cast([run])
    found = evaluation.evaluate_runs([run], limit=1)
    (note,) = found.notes
    assert note.startswith('FeatureHint: its teacher cannot be shown: ')
    assert ('/no/such/teacher.pth' in note) == (how == 'no file')
    assert tool.attentions([run], found, [{'id': found.pictures[0].id}]) == []
    page = html.unescape(rendered(groups, found))
    assert note in page
    assert "Its teacher's AP, and so the share of its lead" in page


def test_a_teacher_without_work_dir_has_a_column(
    trained, taught_by_the_student
):
    student = work_dir.read_work_dir(trained / 'student', 'student')
    given = evaluation.evaluate_runs([student, taught_by_the_student])
    assert list(given.scores) == ['student', 'distilled']
    groups = cast([taught_by_the_student])
    alone = evaluation.evaluate_runs([taught_by_the_student])
    assert list(alone.scores) == ['FeatureHint', 'teacher']
    assert alone.scores['teacher'] == given.scores['student']
    assert alone.parameters['teacher'] == given.parameters['student']
    page = rendered(groups, alone)
    results, classes, sizes, cost = Reader(page).tables
    assert results[0] == ['', 'FeatureHint', 'teacher']
    assert classes[0] == ['class', 'FeatureHint', 'teacher', 'objects']
    assert sizes[0] == ['objects', 'FeatureHint', 'teacher']
    assert [row[0] for row in cost[1:]] == ['FeatureHint']
    assert '>teacher: ' in page  # boxes on the pictures
    assert 'there is no plain run of this student' in page


def test_a_teacher_of_two_runs_has_one_column(taught_by_the_student):
    again = dataclasses.replace(taught_by_the_student, name='again')
    found = evaluation.evaluate_runs([taught_by_the_student, again], limit=2)
    assert list(found.scores) == ['distilled', 'again', 'teacher']
    assert list(found.teachers) == ['distilled', 'again']
    assert found.taught == {'distilled': ['teacher'], 'again': ['teacher']}


def test_a_teacher_is_shown_without_its_training_options(trained, tmp_path):
    options = dict(fold_bn=True, compile=True, autocast='bfloat16')
    options['cache'] = dict(dir=str(tmp_path / 'cache'))
    run = taught(trained, **options)
    plain = {k: v for k, v in run.teacher.items() if k not in options}
    assert evaluation.without_speed(run.teacher) == plain
    found = evaluation.evaluate_runs([run], limit=1)
    teacher = found.teachers['distilled']
    assert teacher.speed == type(teacher.speed)()
    assert teacher.cache is None
    assert not (tmp_path / 'cache').exists()


def test_a_teacher_that_trains_is_none_of_these(trained):
    run = taught(trained, trainable=True)
    assert not run.distils
    found = evaluation.evaluate_runs([run], limit=1)
    assert (found.teachers, found.notes) == ({}, [])


# ------------------------------------------------------------------ verdicts


@pytest.fixture(scope='module')
def evaluated(trained):
    """Both runs, named by their roles, and what they find."""
    groups = cast(read(trained, 'student', 'distilled'))
    return groups, evaluation.evaluate_runs([g.first for g in groups])


def found_by(evaluated, plain, distilled):
    """An evaluation in which the two find these of the objects."""
    groups, real = evaluated
    changed = dataclasses.replace(
        real,
        pictures=copy.deepcopy(real.pictures),
        scores=dict(real.scores),
        hits=dict(real.hits),
        parameters=dict(real.parameters),
    )
    for picture in changed.pictures:
        for name, which in (('plain', plain), ('FeatureHint', distilled)):
            picture.found[name] = which(picture.truth)
    for name in changed.scores:
        rows = evaluation.results_of(changed.pictures, name, changed.truth)
        found = eval_coco.evaluation_of(changed.truth, rows, 'bbox')
        changed.scores[name] = eval_coco.scores_of(found, changed.truth)
        changed.hits[name] = hits_of(found)
    return groups, changed


def every(truth):
    return truth


def half(truth):
    rest = slice(0, None, 2)
    return objects(truth.boxes[rest], truth.names[rest])


def none(truth):
    return objects([], '')


def test_a_gain_is_judged_by_the_images(evaluated):
    groups, found = found_by(evaluated, half, every)
    speeds = {name: dict(gflops=1.0, ms=5.0) for name in found.scores}
    (verdict,) = judge(groups, found, speeds)
    assert verdict.outcome == 'gained'
    assert verdict.headline.startswith('Distillation (FeatureHint) gained')
    assert verdict.headline.endswith('at the same size and speed.')
    assert (verdict.plain, verdict.distilled) == ('plain', 'FeatureHint')
    assert 0 < verdict.interval.low < verdict.gain < verdict.interval.high
    gained = 1 - found.scores['plain'].figures['AP']
    assert verdict.gain == pytest.approx(gained)


def test_harm_is_judged_with_what_was_logged(evaluated):
    groups, found = found_by(evaluated, every, half)
    run = groups[1].first
    cosines, losses = run.telemetry, dict(run.logged)
    run.telemetry = {'hint': {1: -0.5, 2: -0.25, 3: 0.1}}
    run.logged['hint.loss_hint'] = {
        step: 90 * sum(
            line[step]
            for name, line in run.loss_parts.items()
            if not name.startswith('hint.')
        )
        for step in run.logged['loss']
    }  # fmt: skip
    try:
        (verdict,) = judge(groups, found, {})
    finally:
        run.telemetry, run.logged = cosines, losses
    assert verdict.outcome == 'harmed'
    text = ' '.join(verdict.text().split())
    assert 'Look at next: the gradient of hint, which pulls against' in text
    assert 'a cosine of -0.25 in the median' in text
    assert "which are 90 times the task's" in text
    assert 'what `mmkd doctor` says of the config' in text


def test_the_same_detections_show_no_gain(evaluated):
    groups, found = found_by(evaluated, half, half)
    (verdict,) = judge(groups, found, {})
    assert verdict.outcome == 'unshown'
    assert '+0.0 AP' in verdict.headline


def test_a_teacher_among_the_runs_gives_the_share(evaluated):
    groups, found = found_by(evaluated, none, half)
    teacher = dataclasses.replace(groups[0].first, name='big')
    teacher.folder = Path('/runs/big')
    found.scores['big'] = eval_coco.evaluate(
        found.truth,
        evaluation.results_of(
            [dataclasses.replace(p, found={'big': p.truth})
             for p in found.pictures], 'big', found.truth,
        ),
        'bbox',
    )  # fmt: skip
    found.parameters['big'] = 7
    run = groups[1].first
    before = run.config.distillation.teacher.checkpoint
    run.config.distillation.teacher.checkpoint = '/runs/big/epoch_2.pth'
    try:
        (verdict,) = judge(
            [*groups, Group('teacher', 'teacher', [teacher])], found, {}
        )
    finally:
        run.config.distillation.teacher.checkpoint = before
    # The plain student finds nothing, the teacher everything.
    assert verdict.share == pytest.approx(verdict.gain)
    assert f"{100 * verdict.gain:.0f} % of the teacher's lead" in (
        verdict.headline
    )


def test_runs_of_other_length_are_not_judged(evaluated):
    groups, found = found_by(evaluated, half, every)
    longer = copy.deepcopy(groups[1])
    longer.first.config.train_cfg.max_epochs = 24
    (verdict,) = judge([groups[0], longer], found, {})
    assert verdict.headline == (
        'plain and FeatureHint are not comparable: 2 against 24 epochs.'
    )
    assert 'Unfinished: FeatureHint, epoch 2 of 24.' in verdict.details


def test_what_is_lacking_is_said(evaluated):
    groups, found = evaluated
    (alone,) = judge(groups[1:], found, {})
    assert 'there is no plain run of this student' in alone.headline
    plain = dataclasses.replace(groups[0], role='other')
    (one,) = judge([plain], found, {})
    assert one.headline == 'There is no distilled run to judge.'


def test_two_plain_runs_are_compared_without_distillation(evaluated):
    groups, found = found_by(evaluated, half, every)
    (verdict,) = judge(
        [dataclasses.replace(group, role='other') for group in groups],
        found,
        {},
    )
    assert verdict.headline.startswith('FeatureHint is ')
    assert ' AP ahead of plain (100.0 against ' in verdict.headline


def test_several_methods_are_judged_best_first(evaluated):
    groups, found = found_by(evaluated, half, every)
    weak = copy.deepcopy(groups[1])
    weak.name = weak.first.name = 'weak'
    for each in (found.scores, found.hits, found.parameters):
        each['weak'] = each['plain']
    for picture in found.pictures:
        picture.found['weak'] = picture.found['plain']
    verdicts = judge([groups[0], weak, groups[1]], found, {})
    assert [each.outcome for each in verdicts] == ['gained', 'unshown']
    page = rendered([groups[0], weak, groups[1]], found)
    assert 'No interval is corrected for their number' in page


@pytest.mark.parametrize(
    ('evaluator', 'metric'),
    [
        (dict(type='CocoMetric'), 'AP'),
        (dict(type='mmdet.VOCMetric'), 'AP50'),
        ([dict(type='CocoMetric'), dict(type='VOCMetric')], 'AP'),
    ],
)
def test_the_metric_is_that_of_the_run(trained, evaluator, metric):
    (run,) = read(trained, 'student')
    run.config.test_evaluator = evaluator
    assert evaluation.metric_of(run) == metric


def test_what_voc_judged_is_told_in_ap50(evaluated):
    groups, found = found_by(evaluated, half, every)
    found.metric = 'AP50'
    (verdict,) = judge(groups, found, {})
    gained = 1 - found.scores['plain'].figures['AP50']
    assert verdict.gain == pytest.approx(gained)
    assert ' AP50 (' in verdict.headline
    assert "validated by VOC's mAP" in html.unescape(rendered(groups, found))


# ------------------------------------------------------------------- curves


def write_scalars(folder, start, rows, end='\n'):
    path = folder / start / 'vis_data' / 'scalars.json'
    path.parent.mkdir(parents=True)
    path.write_text('\n'.join(map(json.dumps, rows)) + end)


@pytest.mark.parametrize('metric', ['coco/bbox_mAP', 'pascal_voc/mAP'])
def test_curves_of_every_metric_and_network(tmp_path, metric):
    rows = [dict(loss=3.0, step=9)]
    rows += [
        {metric: 0.1 * n, f'big/{metric}': 0.2 * n, 'step': n, **more}
        for n, more in ((1, {}), (2, {f'{metric}_s': 0.9, 'other/x': 0.5}))
    ]
    write_scalars(tmp_path, '2025', rows)
    aps = work_dir.read_aps(tmp_path)
    assert aps == {'': {1: 0.1, 2: 0.2}, 'big': {1: 0.2, 2: 0.4}}
    run = argparse.Namespace(name='r', aps=aps)
    assert tool.ap_lines(run) == {'r': aps[''], 'r: big': aps['big']}


def test_curves_of_a_resumed_run(tmp_path):
    metric = 'coco/bbox_mAP'
    rows = [dict(loss=3.0, step=9), dict(loss=2.0, step=18)]
    rows += [{metric: 0.1, 'step': 1}, dict(loss=9.0, step=27)]
    killed_while_it_wrote = '\n{"loss": 8.0, "st'
    write_scalars(tmp_path, '20250101_000000', rows, killed_while_it_wrote)
    rows = [{metric: 0.15, 'step': 1}, dict(loss=1.0, step=27)]
    rows += [{metric: 0.2, 'step': 2}]
    write_scalars(tmp_path, '20250102_000000', rows)
    losses = by_step(training_rows(tmp_path))['loss']
    assert list(losses.items()) == [(9, 3.0), (18, 2.0), (27, 1.0)]
    assert work_dir.read_aps(tmp_path) == {'': {1: 0.15, 2: 0.2}}


def texts(svg):
    """The texts of a chart, those of its legend included."""
    return re.findall(r'<text [^>]*>([^<]*)</text>', svg)


@pytest.mark.parametrize('name', ['_x', 'a$b_{$', 'a$b$', 'x^y'])
def test_any_name_is_drawn_as_it_is(name):
    chart = figures.curves({name: {1: 1.0, 2: 2.0}}, 'x', f'losses of {name}')
    assert {name, f'losses of {name}'} <= set(texts(chart))
    assert name in texts(figures.bars({name: {'small': 1.0}}, 'AP, %'))


def test_an_axis_is_never_upside_down():
    limits = []
    for line in ({1: -3.0, 2: -1.0}, {1: -1.0, 2: 5.0}, {1: 2.0, 2: 5.0}):
        for lines in ({'a': line, 'b': {1: math.nan, 2: 3.0}}, {'a': line}):
            (axes,) = figures.line_chart(lines, 'x', 'y').axes
            limits.append(axes.get_ylim())
    assert all(low < high for low, high in limits)
    assert [low == 0 for low, _ in limits] == [False] * 4 + [True] * 2
    assert limits[1][1] < 0


def test_a_missing_ap_is_no_bar(monkeypatch):
    heights = []
    monkeypatch.setattr(
        figures,
        'as_svg',
        lambda figure, _: heights.extend(
            bar.get_height() for bar in figure.axes[0].containers[0]
        ),
    )
    figures.bars({'a': {'small': None, 'large': 0.0}}, 'AP, %')
    assert math.isnan(heights[0])
    assert heights[1] == 0


# ------------------------------------------------------------------ drawing


def test_a_long_curve_is_thinned_by_means():
    xs, ys = figures.thinned({i: float(i) for i in range(1, 1802)})
    assert len(xs) <= figures.POINTS
    assert (xs[0], ys[0]) == (4, 2.5)
    assert xs[-1] == 1801
    short = {1: 3.0, 5: 4.0}
    assert figures.thinned(short) == ([1, 5], [3.0, 4.0])


def test_panels_tell_right_wrong_and_missed():
    picture = evaluation.Picture(0, Path('p'), objects([A, B], 'xy'))
    picture.found['s'] = objects([A, ELSEWHERE, B], 'xyy', [0.9, 0.8, 0.3])
    truth, found = figures.panels(picture, ['s'])
    assert truth.title == 'ground truth: 2'
    assert [box.kind for box in truth.boxes] == ['truth', 'truth']
    assert found.title == 's: 1 found, 1 missed, 1 false'
    assert [(box.kind, box.x, box.text) for box in found.boxes] == [
        ('missed', 20, 'y'), ('wrong', 50, 'y 0.80'), ('right', 0, 'x 0.90'),
    ]  # fmt: skip
    _, low = figures.panels(picture, ['s'], {'s': 0.3})
    assert low.title == 's: 2 found, 0 missed, 1 false'


def test_difference_is_blue_where_the_student_looks():
    seen = attention.Attention(
        np.array([[0.7, 0.2, 0.1]]), np.array([[0.1, 0.2, 0.7]])
    )
    uri = figures.heat(seen)['difference']
    data = np.frombuffer(base64.b64decode(uri.partition(',')[2]), np.uint8)
    (left, middle, right), *_ = cv2.imdecode(
        data, cv2.IMREAD_UNCHANGED
    ).astype(int)
    assert left[0] > left[2] + 50  # BGR
    assert right[2] > right[0] + 50
    assert middle[3] == 0


# ------------------------------------------------------------------ the page


class Reader(html.parser.HTMLParser):
    """The text of a page's tables and what the page refers to."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.references, self.ids = [], [], []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids += [values['id']] if 'id' in values else []
        for name in ('src', 'href', 'xlink:href'):
            self.references += [values[name]] if name in values else []
        if tag == 'table':
            self.tables.append([])
        if tag == 'tr':
            self.tables[-1].append([])
        if tag in ('td', 'th'):
            self.tables[-1][-1].append('')
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ('td', 'th')

    def handle_data(self, data):
        if self.in_cell:
            self.tables[-1][-1][-1] += data.strip()


def test_the_page_says_what_was_measured(page, evaluated):
    _, found = evaluated
    results, classes, sizes, cost = Reader(page.read_text()).tables
    assert results[0] == ['', 'plain', 'FeatureHint']
    figures = {row[0]: row[1:] for row in results[1:]}
    for key in ('AP', 'AP50', 'AR100'):
        assert figures[key] == [
            f'{100 * scores.figures[key]:.1f}'
            for scores in found.scores.values()
        ]
    for row in ('parameters', 'GFLOPs', 'ms per image'):
        assert [float(cell.split()[0]) > 0 for cell in figures[row]] == [
            True, True,
        ]  # fmt: skip
    assert figures['GFLOPs'][0] == figures['GFLOPs'][1]
    names = [row.name for row in found.scores['plain'].classes]
    assert [row[0] for row in classes[1:]] == names
    assert classes[0][1:] == ['plain', 'FeatureHint', 'gain', 'objects']
    assert [row[0] for row in sizes[1:]] == ['small', 'medium', 'large']
    assert [row[1] for row in cost[1:]] == ['4', '4']


def test_page_and_terminal_begin_with_the_verdict(page, evaluated):
    groups, found = evaluated
    (verdict,) = judge(groups, found, {})
    start = verdict.headline.rpartition(', at')[0] or verdict.headline
    text = html.unescape(page.read_text())
    assert f'<h1>{start}' in text
    assert text.index('<h1>') < text.index('<table')
    printed = ' '.join((page.parent / 'log').read_text().split())
    assert start in printed
    assert printed.index(start) < printed.index('parameters')


def test_a_page_takes_the_place_of_another_as_a_whole(trained, tmp_path):
    """Who reads the old one goes on reading it."""
    out = tmp_path / 'report.html'
    out.write_text('before')
    options = ('--out', str(out), '--eval', '1', '--images', '0')
    with out.open() as old:
        main(
            ['report', str(trained / 'student'), *options, '--benchmark', '0']
        )
        assert old.read() == 'before'
    assert out.read_text().startswith('<!doctype html>')
    assert [path.name for path in tmp_path.iterdir()] == ['report.html']


def panels_of(text):
    """For each panel of a page: its caption, and its boxes by their kind."""
    return [
        (caption, Counter(re.findall(r'<rect class="box (\w+)"', svg)))
        for svg, caption in re.findall(
            r'<svg class="photo".*?(<use.*?)</svg>'
            r'<div class="note">(.*?)</div>',
            text,
            re.S,
        )
    ]


def partly(truth):
    """The first object, and a box where there is none."""
    boxes = [*truth.boxes[:1], [1, 1, 3, 3]]
    return objects(
        boxes, [*truth.names[:1], 'person'], [0.9, 0.75][-len(boxes) :]
    )


def test_captions_count_the_boxes_that_are_drawn(evaluated):
    groups, found = found_by(evaluated, none, partly)
    page = rendered(groups, found, images=2, score=0.5)
    panels = panels_of(html.unescape(page))
    assert len(panels) == 3 * 3
    for caption, count in panels:
        name, _, told = caption.partition(': ')
        if name == 'ground truth':
            assert told == str(count['truth'])
            objects_there = count['truth']
        else:
            assert told == (
                f'{count["right"]} found, {count["missed"]} missed, '
                f'{count["wrong"]} false'
            )
            assert count['right'] + count['missed'] == objects_there
    shown = [count for caption, count in panels if 'FeatureHint' in caption]
    assert all(count['wrong'] == 1 for count in shown)
    assert any(count['right'] == 1 for count in shown)


def test_a_score_hides_what_is_less_sure(evaluated):
    groups, found = found_by(evaluated, none, partly)
    page = rendered(groups, found, images=1, score=0.8)
    assert 'Boxes of a score of 0.80 or more are drawn.' in page
    assert 'class="box wrong" x="1.0"' not in page
    best = html.unescape(rendered(groups, found, images=1))
    assert 'F1 is best on all images: plain 0.50, FeatureHint 0.' in best


def crowd(count):
    def find(truth):
        boxes = [[4 * i, 2, 4 * i + 3, 9] for i in range(count)]
        return objects(boxes, ['person'] * count)

    return find


@pytest.mark.parametrize(('count', 'labels'), [(25, 25), (26, 0), (50, 0)])
def test_many_boxes_have_no_labels(evaluated, count, labels):
    groups, found = found_by(evaluated, none, crowd(count))
    for picture in found.pictures:
        picture.truth = objects([], '')
    page = rendered(groups, found, images=1, score=0.5)
    assert page.count('<text class="wrong"') == labels * page.count(
        f'FeatureHint: 0 found, 0 missed, {count} false</div>'
    )
    assert f'{count} false</div>' in page


def test_the_page_needs_nothing_else(page):
    text = page.read_text()
    reader = Reader(text)
    assert reader.references
    ids = set(reader.ids)
    assert len(ids) == len(reader.ids)
    for reference in reader.references:
        if reference.startswith('#'):
            assert reference[1:] in ids, reference
        else:
            assert reference.startswith('data:'), reference[:80]
    assert not re.search(r'@import|url\((?!#)', text.split('</head>')[0])
    assert len(text.encode()) < 5 * 2**20
    for word in (
        'cosine of FeatureHint',
        'share of the gradient of FeatureHint by iteration',
        'factor of the weight of FeatureHint by iteration',
        'System environment',
        'attention lies',
    ):
        assert word in text


def test_of_a_long_training_few_points_are_drawn(trained):
    """The page stays small, and drawing it takes no longer."""
    losses = {i: 3.0 / (i % 7 + 1) for i in range(1, 90_001)}
    (line,) = figures.line_chart({'a': losses}, 'x', 'y').axes[0].lines
    assert 500 < len(line.get_xdata()) <= figures.POINTS
    run = work_dir.read_work_dir(trained / 'distilled', 'long')
    groups = cast([run])
    run.logged['loss'], run.telemetry = losses, {'a': losses, 'b': losses}
    run.aps[''] = {i: i / 100 for i in range(1, 25)}
    found = evaluation.evaluate_runs([run])
    page = rendered(groups, found, 0)  # no inference without pictures
    assert len(page.encode()) < 2**20


# -------------------------------------------------------------- in a browser


@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip(
        'playwright.sync_api', reason='needs playwright (pip)'
    )
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f'needs a browser: {", ".join(BROWSERS)}')
    with api.sync_playwright() as playwright:
        yield playwright.chromium.launch(
            executable_path=path, args=['--no-sandbox']
        )


@pytest.fixture
def opened(browser, page):
    """The page on a phone in the dark, and all that it has complained of."""
    context = browser.new_context(
        viewport=dict(width=390, height=844), color_scheme='dark', offline=True
    )
    tab, complaints = context.new_page(), []
    tab.on('console', lambda message: complaints.append(message.text))
    tab.on('pageerror', lambda error: complaints.append(str(error)))
    tab.on('requestfailed', lambda request: complaints.append(request.url))
    tab.goto(page.as_uri())
    yield tab, complaints
    context.close()


def test_it_opens_without_complaint_and_every_picture_loads(opened):
    tab, complaints = opened
    pictures = tab.evaluate(
        """async () => {
          const all = [...document.querySelectorAll('image, img')];
          const sizes = all.map(async element => {
            const picture = new Image();
            picture.src = element.getAttribute('href') || element.src;
            await picture.decode();
            return picture.naturalWidth;
          });
          return Promise.all(sizes);
        }"""
    )
    # On each photo there are three maps.
    photos = tab.locator('figure.picture').count()
    assert photos > 0
    assert len(pictures) == 4 * photos
    assert min(pictures) > 0
    shown = tab.evaluate(
        """() => [...document.querySelectorAll('svg.photo use, svg.chart')]
          .map(e => e.getBoundingClientRect().width)"""
    )
    assert len(shown) == 2 * 3 * photos + 7
    assert min(shown) > 50
    assert complaints == []


def test_it_fits_a_phone_and_the_dark(opened):
    tab, _ = opened
    assert tab.evaluate('document.documentElement.scrollWidth') <= 390
    colors = tab.evaluate(
        """() => ['backgroundColor', 'color'].map(
          name => getComputedStyle(document.body)[name])"""
    )
    back, ink = (
        sum(map(int, re.findall(r'\d+', color)[:3])) for color in colors
    )
    assert back < 150
    assert ink > 600


def test_on_a_phone_the_verdict_comes_first_and_names_of_rows_stay(opened):
    tab, _ = opened
    verdict = tab.locator('.verdict').bounding_box()
    assert 0 <= verdict['y'] < 100
    assert verdict['x'] + verdict['width'] <= 390
    # The first table is read without scrolling.
    wide = tab.locator('.wide').first
    assert wide.evaluate('e => e.scrollWidth - e.clientWidth') <= 0
    # In one that scrolls, the names of the rows stay where they are.
    cost = tab.locator('#cost + .wide')
    cost.evaluate('e => e.scrollLeft = 9999')
    assert cost.evaluate('e => e.scrollLeft') > 0
    left = cost.locator('tbody td').first.bounding_box()['x']
    assert left == pytest.approx(cost.bounding_box()['x'], abs=1)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_boxes_are_drawn_in_the_colours_of_the_legend(
    browser, evaluated, tmp_path, scheme
):
    groups, found = found_by(evaluated, none, partly)
    for picture in found.pictures:
        picture.found['FeatureHint'] = objects([[20, 20, 90, 80]], ['person'])
        picture.truth = objects([[20, 20, 90, 80]], ['person'])
    page = tmp_path / 'page.html'
    page.write_text(rendered(groups, found, images=1, score=0.5))
    context = browser.new_context(
        viewport=dict(width=390, height=844), color_scheme=scheme
    )
    tab = context.new_page()
    tab.goto(page.as_uri())
    for kind, color in figures.COLORS.items():
        if kind == 'wrong':
            continue
        rect = tab.locator(f'svg.photo rect.{kind}').first
        rect.scroll_into_view_if_needed()
        svg = rect.locator('xpath=ancestor::*[name()="svg"]')
        image = cv2.imdecode(
            np.frombuffer(svg.screenshot(), np.uint8), cv2.IMREAD_COLOR
        )
        inner, outer = rect.bounding_box(), svg.bounding_box()
        x = round(inner['x'] - outer['x'])
        y = round(inner['y'] - outer['y'] + inner['height'] / 2)
        edge = image[y - 9 : y + 9, x - 3 : x + 4].reshape(-1, 3).astype(int)
        expected = [int(color[i : i + 2], 16) for i in (5, 3, 1)]  # BGR
        assert abs(edge - expected).sum(1).min() < 40, kind
    context.close()


def test_tables_sort(opened):
    tab, complaints = opened
    table = tab.locator('table').nth(1)

    def column(number):
        return table.locator(f'tbody td:nth-child({number})').all_inner_texts()

    def press(number):
        table.locator('th button').nth(number - 1).click()

    before = column(1)
    counts = [int(text) for text in column(5)]
    assert counts != sorted(counts)
    press(5)
    assert [int(text) for text in column(5)] == sorted(counts, reverse=True)
    press(5)
    assert [int(text) for text in column(5)] == sorted(counts)
    press(1)
    press(1)
    names = column(1)
    assert names == sorted(names, key=str.casefold)
    assert sorted(before) == sorted(names)
    # What there is none of comes last, whichever way.
    for _ in range(2):
        press(3)
        values = column(3)
        missing = values.count('–')
        assert 0 < missing < len(values)
        assert values[-missing:] == ['–'] * missing
    assert complaints == []
