import pytest

from mmkd.cli import main


@pytest.mark.parametrize('command', ['', 'coco', 'voc', 'bccd', 'neon', 'own'])
def test_help_has_examples(capsys, command):
    with pytest.raises(SystemExit) as info:
        main(['prepare', *command.split(), '--help'])
    assert info.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(f'usage: mmkd prepare {command}'.strip())
    assert f'\n    mmkd prepare {command}' in out


def test_copy_without_from(capsys):
    with pytest.raises(SystemExit):
        main(['prepare', 'coco', '--copy'])
    assert '--copy goes with --from FOLDER' in capsys.readouterr().err
