"""What a study knows of teachers that are not runs: names, URLs, files."""

import hashlib
import http.server
import shutil
import threading
from functools import partial

import pytest
import yaml

from mmkd.detectors.source import find_in_model_index
from mmkd.errors import ConfigError
from tests.helpers import toy
from tests.study.test_study import a_checkpoint, finish, plan, write_configs

NAME = 'paa_r101_fpn_1x_coco'


@pytest.fixture
def tool():
    from mmkd.study import command as study

    return study


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    return write_configs(tmp_path_factory.mktemp('configs'))


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where nothing was downloaded yet."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home' / 'hub' / 'checkpoints'


@pytest.fixture
def study(configs, tmp_path):
    """Writes a study of one student with a teacher, and reads it."""
    from mmkd.study.study import read_study

    def study(own, **run):
        cfg = toy.Config.fromfile(configs / 'distilled.py')
        cfg.distillation.teacher = own
        config = toy.write(cfg, tmp_path / 'own.py')
        content = {
            'work_dir': str(tmp_path / 'study'),
            'metrics': {'AP': 'coco/bbox_mAP'},
            'runs': {
                'own': {'config': str(config), **run},
                'plain': {'config': str(configs / 'plain.py')},
            },
        }
        path = tmp_path / 'study.yaml'
        path.write_text(yaml.dump(content))
        runs = {run.network: run for run in read_study(path).runs}
        return path, runs['own']

    return study


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# -------------------------------------------------------------------- names


@pytest.mark.parametrize('teacher', [NAME, {'name': NAME}, [NAME]])
def test_a_name_is_its_checkpoint(study, home, tmp_path, teacher):
    url = find_in_model_index(NAME)['checkpoint'].encode()
    _, run = study(teacher)
    assert run.teacher_hash == sha256(url)  # as long as there is no file
    file = home / sha256(url)[:8] / url.decode().rpartition('/')[2]
    file.parent.mkdir(parents=True)
    shutil.copy(a_checkpoint(tmp_path), file)
    assert run.teacher_hash == sha256(file.read_bytes())


def test_another_name_is_another_config(study):
    _, run = study(NAME)
    _, other = study('paa_r50_fpn_1x_coco')
    assert run.inputs['config'] != other.inputs['config']
    assert run.inputs['teacher'] != other.inputs['teacher']


def test_an_unknown_name_is_refused(study):
    with pytest.raises(ConfigError, match=r"runs.own: .* index has no 'paa'"):
        study('paa')


@pytest.mark.parametrize('teacher', [NAME, {'name': NAME}])
def test_a_run_stands_in_for_a_name(study, teacher):
    _, run = study(teacher, teacher='plain')
    run.teacher.folder.mkdir(parents=True)
    file = run.teacher.folder / 'epoch_2.pth'
    shutil.copy(a_checkpoint(run.work_dir), file)
    run.write_config()
    run.teacher.write_config()
    written = toy.Config.fromfile(run.config_file).distillation.teacher
    assert written.to_dict() == {
        'config': str(run.teacher.config_file),
        'checkpoint': str(file),
    }
    assert run.teacher_hash == sha256(file.read_bytes())


# --------------------------------------------------------- files and servers


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def served(tmp_path):
    """A checkpoint on a server: its file and its URL."""
    folder = tmp_path / 'served'
    folder.mkdir()
    file = a_checkpoint(folder)
    handler = partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        loop = threading.Thread(
            target=server.serve_forever, kwargs={'poll_interval': 0.01}
        )
        loop.start()
        yield file, f'http://127.0.0.1:{server.server_port}/{file.name}'
        server.shutdown()
        loop.join()


@pytest.fixture
def from_url(study, served, configs):
    _, url = served
    teacher = {'config': str(configs / 'plain.py'), 'checkpoint': url}
    return study(teacher)


def test_a_download_changes_nothing(tool, from_url, served, capsys):
    """A run has the hash of the file from its first moment on."""
    path, run = from_url
    file, _ = served
    assert run.teacher_hash != sha256(file.read_bytes())
    assert tool.prepare(run, keep_stale=False), run.failure
    assert run.teacher_hash == sha256(file.read_bytes())
    finish(run)
    assert plan(tool, path, capsys)['own'] == 'done'


def test_a_removed_download_is_what_it_was(
    tool, from_url, served, home, tmp_path, capsys
):
    path, run = from_url
    assert tool.prepare(run, keep_stale=False), run.failure
    finish(run)
    shutil.rmtree(home)
    assert plan(tool, path, capsys)['own'] == 'done'
    # Trained once more, from another file of the same address.
    (run.folder / 'result.json').unlink()
    (run.folder / 'epoch_2.pth').unlink()
    file, _ = served
    shutil.copy(a_checkpoint(tmp_path, weight=2.0), file)
    assert plan(tool, path, capsys)['own'] == 'is continued'
    assert tool.prepare(run, keep_stale=False), run.failure
    assert not run.noted  # begun anew
    assert run.teacher_hash == sha256(file.read_bytes())


def test_a_teacher_that_cannot_be_had_fails_its_run(tool, from_url, served):
    _, run = from_url
    served[0].unlink()
    assert not tool.prepare(run, keep_stale=False)
    assert 'could not be downloaded' in run.failure


def test_a_lost_file_is_what_it_was(tool, study, configs, tmp_path, capsys):
    file = a_checkpoint(tmp_path)
    about = {'config': str(configs / 'plain.py'), 'checkpoint': str(file)}
    path, run = study(about)
    finish(run)
    file.unlink()
    assert plan(tool, path, capsys)['own'] == 'done'
    path, run = study(about, options={'train_cfg.max_epochs': 1})
    assert not tool.prepare(run, keep_stale=False)
    assert f"the checkpoint '{file}' does not exist" in run.failure
    assert run.result


def test_the_table_shows_each_teacher(study, configs, tmp_path):
    from mmkd.study.command import read_study
    from mmkd.study.table import write_table

    file = a_checkpoint(tmp_path)
    about = {'config': str(configs / 'plain.py'), 'checkpoint': str(file)}
    path, run = study([about, NAME])
    finish(run)
    url = find_in_model_index(NAME)['checkpoint'].encode()
    hashes = [sha256(file.read_bytes())[:8], sha256(url)[:8]]
    assert f'| {" ".join(hashes)} |' in write_table(read_study(path))


# ----------------------------------------------------------------- software


@pytest.mark.parametrize(
    ('function', 'changed'),
    [
        ('hash_tools', 'mmkd train or mmkd test'),
        ('libraries', 'ensemble-boxes or scikit-learn'),
    ],
)
def test_other_software_is_told(
    tool, study, monkeypatch, capsys, function, changed
):
    from mmkd.study import run as study_run

    path, run = study(None)
    finish(run)
    then = dict(run.inputs)
    monkeypatch.setattr(study_run, function, lambda: 'other')
    assert plan(tool, path, capsys)['own'] == f'stale: {changed} changed'
    kept = plan(tool, path, capsys, '--keep-stale')['own']
    assert kept == f'done, but stale and kept: {changed} changed'
    # Before these were looked at, they were not noted.
    del then['tools'], then['libraries']
    run.training.note(fingerprint=then)
    assert plan(tool, path, capsys)['own'] == 'done'


def test_the_libraries_have_versions():
    from mmkd.study.run import libraries

    assert set(libraries()) == {'ensemble-boxes', 'scikit-learn'}
    assert all(libraries().values())
