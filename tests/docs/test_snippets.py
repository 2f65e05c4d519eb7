"""Commands, configs and links in the pages are those that exist."""

import importlib
import inspect
import re
import shlex
import subprocess
import sys

import pytest
from mmengine.config import Config

import mmkd
from mmkd.cli.main import COMMANDS
from mmkd.core.method import Method
from mmkd.registry import HOOKS, METHODS, MODELS, RUNNERS, TEACHERS
from mmkd.teachers.build import spelled_out
from mmkd.utils import check_options, option_names
from tests.helpers.toy import ROOT

DOCS = ROOT / 'docs'
PAGES = sorted(
    page
    for page in (*ROOT.glob('*.md'), *DOCS.rglob('*.md'))
    if '_build' not in page.parts
)
FENCE = re.compile(r'^```(\w+)\n(.*?)^```', re.MULTILINE | re.DOTALL)
BESIDE = re.compile(r'^(_base_|custom_imports) = .*$', re.MULTILINE)
LINK = re.compile(r'\]\((?!https?://)([^)\s]+)\)')
KIBIBYTES = 1024


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def blocks(page, language):
    """The blocks of code in a language."""
    found = FENCE.findall(page.read_text())
    return [text for kind, text in found if kind == language]


# ------------------------------------------------------------------- commands


def calls(page):
    """(command, arguments) of every call of mmkd in a page."""
    found = []
    for text in blocks(page, 'bash'):
        for line in text.replace('\\\n', ' ').splitlines():
            words = shlex.split(line, comments=True)
            if 'mmkd' in words[:-1]:
                first = words.index('mmkd') + 1
                found.append((words[first], words[first + 1 :]))
    return found


CALLS = {page: calls(page) for page in PAGES}


def parse(command, arguments):
    module = importlib.import_module(COMMANDS[command][0])
    if hasattr(module, 'build_parser'):
        return module.build_parser().parse_args(arguments)
    return module.parse_args(arguments)


def test_pages_name_every_command():
    named = {command for found in CALLS.values() for command, _ in found}
    assert named - {'--help'} == set(COMMANDS)


@pytest.mark.parametrize('page', [p for p in PAGES if CALLS[p]], ids=name_of)
def test_commands_parse(page):
    for command, arguments in CALLS[page]:
        if command == '--help':
            continue
        try:
            parse(command, arguments)
        except SystemExit as error:
            pytest.fail(f'mmkd {command} {shlex.join(arguments)}: {error}')


def test_a_wrong_option_would_be_found():
    with pytest.raises(SystemExit):
        parse('train', ['my_config.py', '--wrok-dir', 'x'])


# -------------------------------------------------------------------- configs


def configs(page):
    """The blocks that are configs, without their bases."""
    return [
        BESIDE.sub('', text)
        for text in blocks(page, 'python')
        if re.search(r'^(distillation|custom_hooks) = ', text, re.MULTILINE)
    ]


@pytest.fixture
def tutorials(example):
    """What the tutorials register."""
    example('own_method')
    example('own_teacher')


@pytest.mark.parametrize('page', [p for p in PAGES if configs(p)], ids=name_of)
@pytest.mark.usefixtures('tutorials')
def test_configs_name_what_exists(page):
    for text in configs(page):
        cfg = Config.fromstring(text, '.py').to_dict()
        distillation = cfg.get('distillation', {})
        check_options('distillation', distillation, PARTS)
        for method in distillation.get('methods', {}).values():
            check_part(METHODS, method)
        for hook in cfg.get('custom_hooks', ()):
            check_part(HOOKS, hook)
        if 'teacher' in distillation:
            check_teacher(distillation['teacher'])


PARTS = ('teacher', 'peers', 'methods', 'unlabelled', 'class_aliases')


def check_teacher(cfg):
    """The options of a teacher, and of those in it."""
    options = spelled_out(cfg)
    for each in options.get('teachers', ()):
        each.pop('label', None)
        check_teacher(each)
    check_part(TEACHERS, options)


def check_part(registry, cfg):
    """A dict with the type of a registered class, and its options."""
    options = dict(cfg)
    kind = registry.get(options.pop('type'))
    assert kind is not None, f'{cfg} names no registered class'
    known = set()
    for base in inspect.getmro(kind) if inspect.isclass(kind) else (kind,):
        if base in (object, Method):
            break
        known |= option_names(base) or set(inspect.signature(base).parameters)
    check_options(str(cfg), options, known | {'loss_weight'})


def test_names_of_mmkd_exist():
    """What pages call ``mmkd.X`` is registered, or a public name."""
    registered = set()
    for registry in (HOOKS, MODELS, METHODS, TEACHERS, RUNNERS):
        registry.import_from_location()
        registered |= set(registry.module_dict)
    tutorials = {'AttentionTransfer', 'Encoder'}
    for page in PAGES:
        if page.name in ('errors.md', 'CHANGELOG.md'):
            continue  # errors.md misspells names on purpose
        for name in re.findall(r'\bmmkd\.([A-Z]\w+)', page.read_text()):
            known = registered | tutorials | set(mmkd.__all__)
            assert name in known | {'X'}, f'{name_of(page)}: mmkd.{name}'


# ---------------------------------------------------------------------- links


def slug(heading):
    """The anchor of a heading, as GitHub and MyST make it."""
    kept = re.sub(r'[^\w\- ]', '', heading.strip().lower())
    return kept.replace(' ', '-')


def anchors(page):
    text = FENCE.sub('', page.read_text())
    return {slug(h) for h in re.findall(r'^#+ (.*)$', text, re.MULTILINE)}


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links(page):
    text = FENCE.sub('', page.read_text())
    for link in LINK.findall(text):
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        if name_of(page).startswith('docs/') and path.endswith(
            'contributing.md'
        ):
            target = ROOT / 'CONTRIBUTING.md'  # which that page includes
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_the_readme_is_short_and_links_every_page_of_how_to():
    text = (ROOT / 'README.md').read_text()
    assert len(text.encode()) <= 10 * KIBIBYTES
    for page in (*DOCS.glob('how_to/*.md'), *DOCS.glob('tutorials/*.md')):
        assert f'({name_of(page)})' in text


# ----------------------------------------------------------------------- site


def test_the_site_builds_without_a_warning(tmp_path):
    """The notebook is left as it is here; `make docs` executes it."""
    command = [sys.executable, '-m', 'sphinx', '-W', '--keep-going', '-q']
    command += ['-D', 'nb_execution_mode=off', str(DOCS), str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 'CrossKD' in (tmp_path / 'methods.html').read_text()
