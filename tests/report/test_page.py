"""The report of trainings: its numbers, and its page in a browser."""

import argparse
import base64
import dataclasses
import html
import html.parser
import json
import math
import re
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from mmkd.cli import main
from mmkd.engine.logs import by_step, training_rows
from mmkd.errors import ConfigError
from mmkd.report import attention, evaluation, figures, work_dir
from mmkd.report import page as tool
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
            config.custom_hooks = [dict(type='mmkd.TelemetryHook', interval=1)]
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
    ('boxes', 'names', 'scores', 'ap'),
    [
        ([A, B], 'xy', [0.9, 0.8], 1.0),
        # One of two objects, found first: recall 1/2 at a precision of 1.
        ([A], 'x', [0.9], 0.5),
        # Right, wrong, right: precisions 1 and 2/3.
        ([A, ELSEWHERE, B], 'xxy', [0.9, 0.8, 0.7], (1 + 2 / 3) / 2),
        # Wrong, right, right: 1/2 and 2/3, of which the later is the better.
        ([ELSEWHERE, A, B], 'xxy', [0.9, 0.8, 0.7], 2 / 3),
        # The right place by the name of the other class.
        ([A, B], 'yx', [0.9, 0.8], 0.0),
        # Found twice: the second time is wrong, but comes last.
        ([A, B, A], 'xyx', [0.9, 0.8, 0.7], 1.0),
        # Hardly a detection.
        ([A, B], 'xy', [0.9, 0.01], 0.5),
        ([], '', [], 0.0),
    ],
)
def test_ap_of_a_picture(boxes, names, scores, ap):
    truth = objects([A, B], 'xy')
    found = objects(boxes, names, scores)
    assert evaluation.picture_ap(truth, found) == pytest.approx(ap)


def test_the_surest_box_takes_an_object_first():
    near = [1, 0, 11, 10]
    found = objects([near, A, ELSEWHERE], 'xxx', [0.9, 0.6, 0.8])
    right, seen = evaluation.match(objects([A, B], 'xx'), found)
    assert right.tolist() == [True, False, False]
    assert seen.tolist() == [True, False]


def test_pictures_are_ranked_by_the_gain_of_the_second():
    nothing = objects([], '')
    half = objects([A], 'x')
    both = objects([A, B], 'xy')
    cases = {
        'behind': (both, both, half),
        'equal': (both, half, half),
        'ahead': (both, nothing, both),
        'empty': (nothing, nothing, both),
    }
    pictures = [
        evaluation.Picture(name, Path(name), truth, {'s': one, 'd': two})
        for name, (truth, one, two) in cases.items()
    ]
    ranked = evaluation.rank(pictures, ['s', 'd'])
    assert [(p.id, score) for score, p in ranked] == [
        ('behind', -0.5), ('equal', 0.0), ('ahead', 1.0),
    ]  # fmt: skip
    alone = evaluation.rank(pictures, ['s'])
    assert [(p.id, score) for score, p in alone] == [
        ('ahead', 0.0), ('equal', 0.5), ('behind', 1.0),
    ]  # fmt: skip


def test_the_worst_and_the_best_are_not_the_same():
    ranked = [(0.1, 'a'), (0.2, 'b'), (0.3, 'c')]
    assert tool.choose(ranked, 2) == [
        ('worst', 0.1, 'a'), ('worst', 0.2, 'b'), ('best', 0.3, 'c'),
    ]  # fmt: skip
    assert tool.choose(ranked, 1) == [('worst', 0.1, 'a'), ('best', 0.3, 'c')]
    assert tool.choose(ranked, 0) == []


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
        run: evaluation.evaluate(
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


def test_a_moved_work_dir_is_itself(trained, tmp_path):
    shutil.copytree(trained / 'student', tmp_path / 'moved')
    run = work_dir.read_work_dir(tmp_path / 'moved', 'm')
    assert run.checkpoint == str(tmp_path / 'moved' / 'epoch_2.pth')


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


def lost_in_download(*args, **options):
    raise OSError('<urlopen error [Errno -2] Name or service not known>')


@pytest.mark.parametrize('how', ['no file', 'no network'])
def test_a_lost_teacher_is_told(trained, how, monkeypatch):
    if how == 'no file':
        run = taught(trained, checkpoint='/no/such/teacher.pth')
    else:
        run = taught(trained)
        monkeypatch.setattr(evaluation, 'build_teacher', lost_in_download)
    found = evaluation.evaluate_runs([run], limit=1)
    (note,) = found.notes
    assert note.startswith('distilled: its teacher cannot be shown: ')
    assert ('/no/such/teacher.pth' in note) == (how == 'no file')
    assert tool.attentions([run], found, [{'id': found.pictures[0].id}]) == []
    assert note in html.unescape(tool.render([run], found, 1))


def test_a_teacher_without_work_dir_has_a_column(
    trained, taught_by_the_student
):
    student = work_dir.read_work_dir(trained / 'student', 'student')
    given = evaluation.evaluate_runs([student, taught_by_the_student])
    assert list(given.scores) == ['student', 'distilled']
    alone = evaluation.evaluate_runs([taught_by_the_student])
    name = 'teacher of distilled'
    assert list(alone.scores) == ['distilled', name]
    assert alone.scores[name] == given.scores['student']
    assert alone.parameters[name] == given.parameters['student']
    page = tool.render([taught_by_the_student], alone, 1)
    results, classes, sizes, cost = Reader(page).tables
    assert [row[0] for row in results[1:]] == ['distilled', name]
    assert classes[0] == ['class', 'objects', 'distilled', name]
    assert sizes[0] == ['objects', 'distilled', name]
    assert [row[0] for row in cost[1:]] == ['distilled']
    assert f'{name}: ' in page  # boxes on the pictures


def test_a_teacher_of_two_runs_has_one_column(taught_by_the_student):
    again = dataclasses.replace(taught_by_the_student, name='again')
    found = evaluation.evaluate_runs([taught_by_the_student, again], limit=2)
    assert list(found.scores) == ['distilled', 'again', 'teacher of distilled']
    assert list(found.teachers) == ['distilled', 'again']


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
    assert found.title == 's: 1 found, 1 wrong'
    assert [(box.kind, box.x, box.text) for box in found.boxes] == [
        ('missed', 20, 'y'), ('wrong', 50, 'y 0.80'), ('right', 0, 'x 0.90'),
    ]  # fmt: skip


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

    def handle_data(self, data):
        if self.tables and self.tables[-1] and self.tables[-1][-1]:
            self.tables[-1][-1][-1] += data.strip()


def test_the_page_says_what_was_measured(page, trained):
    dirs = [trained / 'student', trained / 'distilled']
    found = evaluation.evaluate_runs(work_dir.read_work_dirs(dirs))
    results, classes, sizes, cost = Reader(page.read_text()).tables
    for row, (name, scores) in zip(
        results[1:], found.scores.items(), strict=True
    ):
        assert row[:2] == [name, f'{100 * scores.figures["AP"]:.2f}']
    names = [row.name for row in found.scores['student'].classes]
    assert [row[0] for row in classes[1:]] == names
    assert classes[0][2:] == ['student', 'distilled', 'distilled - student']
    assert [row[0] for row in sizes[1:]] == ['small', 'medium', 'large']
    assert [row[1] for row in cost[1:]] == ['4', '4']


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
        'cosine of distilled',
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
    run.logged['loss'], run.telemetry = losses, {'a': losses, 'b': losses}
    run.aps[''] = {i: i / 100 for i in range(1, 25)}
    found = evaluation.evaluate_runs([run])
    page = tool.render([run], found, 0)  # no inference without pictures
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
    # Two photos, and three maps on each.
    assert len(pictures) == 8
    assert min(pictures) > 0
    shown = tab.evaluate(
        """() => [...document.querySelectorAll('svg.photo use, svg.chart')]
          .map(e => e.getBoundingClientRect().width)"""
    )
    assert len(shown) == 2 * 3 + 2 * 3 + 5
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


def test_tables_sort(opened):
    tab, complaints = opened
    table = tab.locator('table').nth(1)

    def column(number):
        return table.locator(f'tbody td:nth-child({number})').all_inner_texts()

    def press(number):
        table.locator('th button').nth(number - 1).click()

    before = column(1)
    counts = [int(text) for text in column(2)]
    assert counts != sorted(counts)
    press(2)
    assert [int(text) for text in column(2)] == sorted(counts, reverse=True)
    press(2)
    assert [int(text) for text in column(2)] == sorted(counts)
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
