"""When a run is stale, and what is done about lost checkpoints."""

import os
import shutil

import pytest

from mmkd.cli import main
from mmkd.study import run as study_run
from mmkd.study import work
from tests.helpers import made_data
from tests.helpers.studies import a_checkpoint

LR = 'optim_wrapper.optimizer.lr'
GONE = 'a checkpoint of teacher-seed0 is gone or damaged. Bring it back to '


@pytest.fixture
def data(tmp_path):
    """A copy of the data to tamper with."""
    source, data = made_data.root() / 'coco_tiny', tmp_path / 'data'
    shutil.copytree(source / 'annotations', data / 'annotations')
    for split in ('train2017', 'val2017'):
        (data / split).mkdir()
        for image in sorted((source / split).iterdir())[:2]:
            shutil.copy(image, data / split)
    return data


@pytest.fixture
def content(content, data):
    for run in content['runs'].values():
        root = {'train_dataloader.dataset.data_root': f'{data}/'}
        run['options'] = {**run.get('options', {}), **root}
    return content


@pytest.fixture
def done(study):
    """The runs of a study, which are done."""
    return study.finish()


# ---------------------------------------------------------------- staleness


def test_what_is_done_is_done(study, done):
    assert study.plan() == dict.fromkeys(done, 'done')


def test_a_changed_option_is_told(study, done):
    study.networks['student']['options'][LR] = 0.5
    told = study.plan()
    assert told['student'] == 'stale: its config changed'
    assert told['teacher'] == told['distilled'] == 'done'


def test_another_work_dir_changes_nothing(study, done, tmp_path):
    study.content['work_dir'] = str(tmp_path / 'b')
    there = study.runs()
    for name in ('student', 'teacher'):
        assert done[name].inputs == there[name].inputs


@pytest.mark.parametrize('kind', ['annotation', 'image', 'removed'])
def test_changed_data_are_told(study, done, data, kind):
    if kind == 'annotation':
        file = data / 'annotations' / 'instances_train2017.json'
        text = file.read_text()
        # As long as before: the content counts.
        file.write_text(text.replace('"category_id": 1,', '"category_id": 2,'))
        assert file.read_text() != text
    else:
        image = next((data / 'train2017').iterdir())
        if kind == 'image':
            image.write_bytes(image.read_bytes() + b'0')
        else:
            image.unlink()
    told = study.plan()
    assert told['student'] == told['teacher'] == 'stale: its data changed'
    assert told['distilled'] == 'waits for teacher-seed0'


def test_another_teacher_is_told(study, done):
    folder = done['teacher'].folder
    new = a_checkpoint(folder.parent, weight=2.0)
    shutil.copy(new, folder / 'epoch_2.pth')
    told = study.plan()
    assert told['distilled'] == "stale: its teacher's checkpoint changed"
    assert told['teacher'] == told['student'] == 'done'


def test_changed_software_is_told_and_can_be_kept(study, done, monkeypatch):
    monkeypatch.setattr(study_run, 'versions', lambda: {'torch': '9.9'})
    told = study.plan()
    assert told['student'] == 'stale: the installed packages changed'
    assert told['distilled'] == 'waits for teacher-seed0'
    told = study.plan('--keep-stale')
    assert set(told.values()) == {
        'done, but stale and kept: the installed packages changed'
    }
    monkeypatch.setattr(study_run, 'hash_code', lambda: 'other')
    study.networks['student']['options'][LR] = 0.5
    assert study.plan('--keep-stale')['student'] == (
        'stale: its config and the code of mmkd and the installed packages '
        'changed'
    )


def test_foreign_files_are_left_alone(study, tmp_path, capsys):
    precious = tmp_path / 'study' / 'student-seed0' / 'epoch_9.pth'
    precious.parent.mkdir(parents=True)
    precious.touch()
    assert main(['study', str(study.write())]) == 1
    assert 'holds files that are not of a study' in capsys.readouterr().err
    assert precious.exists()


# ---------------------------------------------------------- lost checkpoints


@pytest.fixture(params=['removed', 'named', 'damaged', 'last'])
def lost(request, done):
    """The same without the teacher's checkpoint."""
    file = done['teacher'].folder / 'epoch_2.pth'
    if request.param == 'damaged':
        os.truncate(file, 100)
    else:
        file.unlink()
    if request.param in ('named', 'last'):
        (file.parent / 'last_checkpoint').write_text(str(file))
    if request.param == 'last':
        a_checkpoint(file.parent).rename(file.with_name('epoch_1.pth'))
    return done


def test_what_needs_no_lost_checkpoint_is_done(study, lost):
    assert set(study.plan().values()) == {'done'}


def test_nothing_is_trained_from_a_lost_teacher(study, lost):
    study.networks['distilled']['options'][LR] = 0.5
    told = study.plan()
    assert told['teacher'] == told['student'] == 'done'
    assert told['distilled'].startswith(
        f'stale: its config changed, but {GONE}'
    )
    runs = study.runs()
    run = runs['distilled']
    assert not work.prepare(run, keep_stale=False)
    assert run.failure.startswith(f'not run: {GONE}{runs["teacher"].folder}')
    assert 'remove that folder to train it again' in run.failure
    assert run.result  # what there was is kept
    assert not run.config_file.exists()


def test_a_test_needs_no_teacher(study, lost):
    run = lost['distilled']
    (run.folder / 'result.json').unlink()
    assert study.plan()['distilled'] == 'is continued'
    assert work.prepare(run, keep_stale=False)
    assert run.next_step.name == 'test'


def test_what_was_never_tested_is_trained_again(lost):
    """Not tested with the checkpoint ``None``."""
    (lost['teacher'].folder / 'result.json').unlink()
    assert lost['teacher'].next_step.name == 'train'
