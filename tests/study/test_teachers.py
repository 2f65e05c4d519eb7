"""What a study knows of teachers that are not runs: names, URLs, files."""

import hashlib
import shutil

import pytest

from mmkd.detectors.source import find_in_model_index
from mmkd.errors import ConfigError
from mmkd.study import work
from mmkd.study.table import write_table
from tests.helpers import toy
from tests.helpers.studies import a_checkpoint, finish, served

NAME = 'paa_r101_fpn_1x_coco'


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Where nothing was downloaded yet."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    return tmp_path / 'home' / 'hub' / 'checkpoints'


@pytest.fixture
def taught(study, configs, tmp_path):
    """Changes the student's teacher and reads its run."""

    def taught(teacher, /, **options):
        cfg = toy.Config.fromfile(configs / 'distilled.py')
        cfg.distillation.teacher = teacher
        config = toy.write(cfg, tmp_path / 'own.py')
        study.networks['student'] = {'config': str(config), **options}
        return study.runs()['student']

    return taught


def sha256(content):
    return hashlib.sha256(content).hexdigest()


# -------------------------------------------------------------------- names


@pytest.mark.parametrize('teacher', [NAME, {'name': NAME}, [NAME]])
def test_a_name_is_its_checkpoint(taught, home, tmp_path, teacher):
    url = find_in_model_index(NAME)['checkpoint'].encode()
    run = taught(teacher)
    assert run.teacher_hash == sha256(url)  # as long as there is no file
    file = home / sha256(url)[:8] / url.decode().rpartition('/')[2]
    file.parent.mkdir(parents=True)
    shutil.copy(a_checkpoint(tmp_path), file)
    assert run.teacher_hash == sha256(file.read_bytes())


def test_another_name_is_another_config(taught):
    run, other = taught(NAME), taught('paa_r50_fpn_1x_coco')
    assert run.inputs['config'] != other.inputs['config']
    assert run.inputs['teacher'] != other.inputs['teacher']


def test_an_unknown_name_is_refused(taught):
    with pytest.raises(ConfigError, match=r"s.student: .* index has no 'paa'"):
        taught('paa')


@pytest.mark.parametrize('teacher', [NAME, {'name': NAME}])
def test_a_run_stands_in_for_a_name(taught, teacher):
    run = taught(teacher, teacher='teacher')
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


@pytest.fixture
def file(tmp_path):
    """A checkpoint, which ``from_url`` has on a server."""
    (tmp_path / 'served').mkdir()
    return a_checkpoint(tmp_path / 'served')


@pytest.fixture
def from_url(taught, file, configs):
    with served(file.parent) as address:
        url = f'{address}/{file.name}'
        yield taught({'config': str(configs / 'plain.py'), 'checkpoint': url})


def test_a_download_changes_nothing(study, from_url, file):
    """A run has the hash of the file from its first moment on."""
    assert from_url.teacher_hash != sha256(file.read_bytes())
    assert work.prepare(from_url, keep_stale=False), from_url.failure
    assert from_url.teacher_hash == sha256(file.read_bytes())
    finish(from_url)
    assert study.plan()['student'] == 'done'


def test_a_removed_download_is_what_it_was(
    study, from_url, file, home, tmp_path
):
    run = from_url
    assert work.prepare(run, keep_stale=False), run.failure
    finish(run)
    shutil.rmtree(home)
    assert study.plan()['student'] == 'done'
    # Trained once more, from another file of the same address.
    (run.folder / 'result.json').unlink()
    (run.folder / 'epoch_2.pth').unlink()
    shutil.copy(a_checkpoint(tmp_path, weight=2.0), file)
    assert study.plan()['student'] == 'is continued'
    assert work.prepare(run, keep_stale=False), run.failure
    assert not run.noted  # begun anew
    assert run.teacher_hash == sha256(file.read_bytes())


def test_a_teacher_that_cannot_be_had_fails_its_run(from_url, file):
    file.unlink()
    assert not work.prepare(from_url, keep_stale=False)
    assert 'could not be downloaded' in from_url.failure


def test_a_lost_file_is_what_it_was(study, taught, file, configs):
    about = {'config': str(configs / 'plain.py'), 'checkpoint': str(file)}
    finish(taught(about))
    file.unlink()
    assert study.plan()['student'] == 'done'
    run = taught(about, options={'train_cfg.max_epochs': 1})
    assert not work.prepare(run, keep_stale=False)
    assert f"the checkpoint '{file}' does not exist" in run.failure
    assert run.result


def test_the_table_shows_each_teacher(study, taught, file, configs):
    about = {'config': str(configs / 'plain.py'), 'checkpoint': str(file)}
    finish(taught([about, NAME]))
    url = find_in_model_index(NAME)['checkpoint'].encode()
    hashes = [sha256(file.read_bytes())[:8], sha256(url)[:8]]
    assert f'| {" ".join(hashes)} |' in write_table(study.read())
